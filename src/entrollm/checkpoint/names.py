"""The names of a decoder's tensors, which the engine, the plugin, compression and export share.

transformers reads a causal model's tensors with or without the prefix `model.`, since base models are saved without it,
and the text part of a larger model has a prefix of its own. Here each has one name: the one in a causal model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, Protocol

from numpy.typing import NDArray

from entrollm.errors import FormatError
from entrollm.files.safetensors import Entry

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# What architectures with names of their own call it.
_EMBEDDINGS = {EMBEDDING, "transformer.wte.weight", "gpt_neox.embed_in.weight", "backbone.embeddings.weight"}

_PREFIX = "model."
# The longest first: the others are beginnings or ends of it.
_PREFIXES = (
    "language_model.model.",
    "model.language_model.",
    "text_model.model.",
    "model.text_model.",
    "language_model.",
    "text_model.",
    _PREFIX,
    "",
)
_BODY = re.compile(
    r"embed_tokens(_per_layer)?\.weight|(norm|final_layernorm|embedding_norm)\.(weight|bias)|rotary_emb\.inv_freq"
    r"|per_layer_(model_projection|projection_norm)\.weight|layers\.\d+\.layer_scalar"
    r"|layers\.\d+\.(self_attn|linear_attn|mamba|mlp|shared_mlp|block_sparse_moe|feed_forward|(operator|ffn)_norm"
    r"|conv|[eh]norm|eh_proj|shared_head|embed_tokens|router|experts|per_layer_(input_gate|projection)|post_per_layer_input_norm"
    r"|(input|(pre|post)_(attention|feedforward|self_attn|mlp))_layernorm(_[12])?)\..+"
)
# GPT-2's own names; its first checkpoints are saved without the prefix.
_GPT2 = re.compile(r"(transformer\.)?(?P<body>w[tp]e\.weight|ln_f\.(weight|bias)|h\.\d+\.(attn|mlp|ln_1|ln_2)\..+)")
# The layer for guesses of models that have it apart from their layers.
_TOKEN_HEAD = re.compile(r"mtp\..+")
_HEAD = re.compile(r"(language_model\.|text_model\.|model\.)*lm_head\..+")


def canonical_names(stored: Collection[str], *, is_tied: bool = False) -> Mapping[str, str]:
    """The name that each stored tensor has in a causal model; all keep theirs where one is not a decoder's.

    Args:
        stored: the names in the files.
        is_tied: whether the output head is the embedding, so that the one that is stored is both.
    Returns:
        canonical to stored name.
    Raises:
        FormatError: two tensors have the same name in a causal model.
    """
    found: dict[str, str] = {}
    for name in stored:
        canonical = _canonical(name)
        if canonical is None:
            return MappingProxyType({name: name for name in stored})
        _add(found, canonical, name)
    return MappingProxyType(_tied(found) if is_tied else found)


def other_parts(stored: Collection[str]) -> list[str]:
    """The tensors that are not a decoder's."""
    return [name for name in stored if _canonical(name) is None]


def text_names(stored: Collection[str], *, is_tied: bool = False) -> Mapping[str, str]:
    """The name that each tensor has in a causal model; those of other parts, such as vision, keep theirs.

    Args, result and errors as for `canonical_names`.
    """
    found: dict[str, str] = {}
    for name in stored:
        _add(found, _canonical(name) or name, name)
    return MappingProxyType(_tied(found) if is_tied else found)


def output_head(stored: Names, *, is_tied: bool, embedding: str = EMBEDDING, head: str = HEAD) -> str:
    """The name of the matrix that makes the logits.

    A head that is stored is used, even where config.json says that it is the embedding: transformers ties the two only
    if they are equal.

    Raises:
        FormatError: there is none.
    """
    if head in stored:
        return head
    if is_tied:
        return embedding
    raise FormatError(
        f"{head}: the tensor is missing, and config.json does not say tie_word_embeddings; a base model without an "
        "output head cannot generate text"
    )


class Names(Protocol):
    """What tells whether it has a tensor."""

    def __contains__(self, name: str, /) -> bool:
        """Whether the tensor exists."""


class NamedTensors(Protocol):
    """A file with tensors by name."""

    path: Any
    size_bytes: int

    @property
    def tensors(self) -> Mapping[str, Entry]:
        """The tensors."""

    def array(self, name: str) -> NDArray[Any]:
        """A read-only view of a tensor."""

    def release(self, name: str) -> None:
        """Let a tensor's pages go."""

    def close(self) -> None:
        """Let go of the file."""


class RenamedFile:
    """A file whose tensors have other names.

    Args:
        file: the file.
        names: for each name to show, that in the file.
    """

    def __init__(self, file: NamedTensors, names: Mapping[str, str]) -> None:
        self.path = file.path
        self.size_bytes = file.size_bytes
        self._file = file
        self._names = {name: theirs for name, theirs in names.items() if theirs in file.tensors}
        self.tensors: Mapping[str, Entry] = MappingProxyType(
            {name: file.tensors[theirs] for name, theirs in self._names.items()}
        )

    def array(self, name: str) -> NDArray[Any]:
        """A read-only view of a tensor."""
        return self._file.array(self._names[name])

    def release(self, name: str) -> None:
        """Let a tensor's pages go."""
        self._file.release(self._names[name])

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def _add(found: dict[str, str], canonical: str, name: str) -> None:
    if canonical in found:
        raise FormatError(f"{name!r} and {found[canonical]!r} are both {canonical!r}; remove one of them")
    found[canonical] = name


def _tied(found: dict[str, str]) -> dict[str, str]:
    """The names where the output head is the embedding, so that the one that is stored is both."""
    if HEAD not in found or not found.keys().isdisjoint(_EMBEDDINGS):
        return found
    return {EMBEDDING if name == HEAD else name: theirs for name, theirs in found.items()}


def _canonical(name: str) -> str | None:
    if _HEAD.fullmatch(name):
        return name[name.index("lm_head.") :]
    if _TOKEN_HEAD.fullmatch(name):
        return name
    if match := _GPT2.fullmatch(name):
        return f"transformer.{match['body']}"
    for prefix in _PREFIXES:
        if name.startswith(prefix) and _BODY.fullmatch(name, len(prefix)):
            return _PREFIX + name[len(prefix) :]
    return None


def natural_key(name: str) -> tuple[tuple[int, str], ...]:
    """Sort key of a tensor's name in which numbers compare as such, so that layer 2 comes before layer 10."""
    parts = enumerate(re.split(r"([0-9]+)", name))
    return tuple((len(part.lstrip("0")), part.lstrip("0")) if index % 2 else (-1, part) for index, part in parts)
