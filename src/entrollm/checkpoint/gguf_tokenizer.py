"""Convert the tokenizer of a GGUF file to tokenizer.json: byte-level BPE of known kinds, and SentencePiece BPE."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from entrollm.errors import FormatError, UnsupportedError
from entrollm.files.gguf import open_gguf

_PREFIX = "tokenizer.ggml."
_ROLES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
# The expression that splits text into words, and llama.cpp's names of the ways of splitting.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = frozenset({"llama3", "llama-v3", "llama-bpe"})
_QWEN2, _SMOLLM, _GPT2 = "qwen2", "smollm", "gpt-2"


def convert_tokenizer(path: Path) -> dict[str, str]:
    """The text of tokenizer.json and tokenizer_config.json for a GGUF file, by file name.

    Raises:
        FormatError: the vocabulary is malformed.
        UnsupportedError: the tokenizer is of a kind that cannot be converted.
    """
    vocabulary = _read(path)
    kind = vocabulary.metadata.get(_PREFIX + "model")
    if kind == "gpt2":
        tokenizer = _byte_level(vocabulary)
    elif kind == "llama":
        tokenizer = _sentence_piece(vocabulary)
    else:
        raise UnsupportedError(f"{path}: a tokenizer of kind {kind!r:.80} cannot be converted")
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {name: token for role, name in _ROLES.items() if (token := vocabulary.special(role)) is not None}
    template = vocabulary.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    _add_special_tokens(tokenizer, vocabulary)
    _add_ends(tokenizer, vocabulary, starts=kind == "llama")
    return {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(config, indent=2) + "\n"}


@dataclass(frozen=True)
class _Vocabulary:
    """The tokens by id, and the type of each, as llama.cpp numbers types."""

    path: Path
    metadata: Any
    tokens: list[str]
    types: list[int]

    def special(self, role: str) -> str | None:
        """The text of the token that has a role, such as bos; None if absent."""
        number = self.metadata.get(f"{_PREFIX}{role}_token_id")
        return self.tokens[number] if type(number) is int and 0 <= number < len(self.tokens) else None

    def flag(self, key: str, default: bool) -> bool:
        """A flag of the tokenizer."""
        value = self.metadata.get(_PREFIX + key, default)
        if not isinstance(value, bool):
            raise FormatError(f"{self.path}: {_PREFIX}{key} is {value!r:.80}, expected true or false")
        return value

    def list_of(self, key: str, kind: type, count: int | None = None) -> list[Any]:
        """A list of the tokenizer, with `count` elements if that is given."""
        values = self.metadata.get(_PREFIX + key)
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            raise FormatError(f"{self.path}: {_PREFIX}{key} is not a list of {kind.__name__}")
        if count is not None and len(values) != count:
            raise FormatError(f"{self.path}: {_PREFIX}{key} has {len(values)} elements, expected {count}")
        return values


def _read(path: Path) -> _Vocabulary:
    file = open_gguf(path)
    metadata = file.metadata
    empty = _Vocabulary(path, metadata, [], [])
    if _PREFIX + "tokens" not in metadata:
        raise UnsupportedError(f"{path}: the file has no tokenizer")
    tokens = empty.list_of("tokens", str)
    if len(set(tokens)) != len(tokens):
        raise FormatError(f"{path}: {_PREFIX}tokens has the same token twice")
    types = empty.list_of("token_type", int, len(tokens)) if _PREFIX + "token_type" in metadata else [1] * len(tokens)
    return _Vocabulary(path, metadata, tokens, types)


def _byte_level(vocabulary: _Vocabulary) -> Tokenizer:
    """A byte-level BPE tokenizer, as in Llama 3, Qwen and SmolLM."""
    pre = vocabulary.metadata.get(_PREFIX + "pre")
    merges = [tuple(merge.split(" ")) for merge in vocabulary.list_of("merges", str)]
    if any(len(merge) != 2 for merge in merges):
        raise FormatError(f"{vocabulary.path}: a merge of {_PREFIX}merges is not a pair of tokens")
    tokenizer = _make(vocabulary, merges, ignore_merges=pre in _LLAMA3)
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_of_text = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre in _LLAMA3 or pre == _QWEN2:
        words = Regex(_WORDS.format(digits="" if pre == _QWEN2 else "{1,3}"))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(words, "isolated"), bytes_of_words])
        if pre == _QWEN2:
            tokenizer.normalizer = normalizers.NFC()
    elif pre == _SMOLLM:
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_of_text])
    elif pre == _GPT2:
        tokenizer.pre_tokenizer = bytes_of_text
    else:
        raise UnsupportedError(f"{vocabulary.path}: a tokenizer that splits text as {pre!r:.80} cannot be converted")
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(vocabulary: _Vocabulary) -> Tokenizer:
    """A SentencePiece BPE tokenizer that falls back to bytes, as in Llama 2 and Mistral."""
    scores = vocabulary.list_of("scores", float, len(vocabulary.tokens))
    ids = {token: number for number, token in enumerate(vocabulary.tokens)}
    merges: list[tuple[float, int, str, str]] = []
    for token, score in zip(vocabulary.tokens, scores, strict=True):
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in ids and right in ids:
                merges.append((-score, ids[left], left, right))
    merges.sort(key=lambda merge: merge[:2])
    unknown = next((t for t, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == _UNKNOWN), None)
    pairs = [(left, right) for _, _, left, right in merges]
    tokenizer = _make(vocabulary, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    begins = vocabulary.flag("add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces] if begins else [spaces])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if begins else steps)
    return tokenizer


def _make(vocabulary: _Vocabulary, merges: list[Any], **options: Any) -> Tokenizer:
    ids = {token: number for number, token in enumerate(vocabulary.tokens)}
    try:
        return Tokenizer(models.BPE(ids, merges, **options))
    except Exception as error:  # the library raises plain Exception for every malformed vocabulary
        raise FormatError(f"{vocabulary.path}: its vocabulary is malformed: {error}") from error


def _add_special_tokens(tokenizer: Tokenizer, vocabulary: _Vocabulary) -> None:
    """Mark the tokens that are never split. Control tokens are left out of decoded text."""
    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if kind in (_CONTROL, _UNKNOWN):
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])


def _add_ends(tokenizer: Tokenizer, vocabulary: _Vocabulary, starts: bool) -> None:
    """Add the start and end tokens to encoded text as the file says."""
    bos = vocabulary.special("bos") if vocabulary.flag("add_bos_token", starts) else None
    eos = vocabulary.special("eos") if vocabulary.flag("add_eos_token", False) else None
    used = [token for token in (bos, eos) if token is not None]
    if not used:
        return
    ids = {token: vocabulary.tokens.index(token) for token in used}
    single = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
    template = processors.TemplateProcessing(single=single, pair=[*single, "$B"], special_tokens=list(ids.items()))
    level = processors.ByteLevel(trim_offsets=False)
    is_bytes = isinstance(tokenizer.decoder, decoders.ByteLevel)
    tokenizer.post_processor = processors.Sequence([level, template]) if is_bytes else template
