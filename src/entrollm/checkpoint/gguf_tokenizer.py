"""Convert the tokenizer of a GGUF file to tokenizer.json: byte-level BPE of known kinds, and SentencePiece BPE."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from entrollm.checkpoint.gguf_metadata import generation_config
from entrollm.checkpoint.gguf_splits import SPLITS
from entrollm.checkpoint.gguf_vocabulary import (
    BYTE_LEVEL,
    GEMMA4,
    PREFIX,
    SENTENCE_PIECE,
    Vocabulary,
    is_end_text,
)
from entrollm.checkpoint.panics import panics_named
from entrollm.errors import FormatError, UnsupportedError
from entrollm.files.gguf import open_gguf

_ROLES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_TEMPLATE = "tokenizer.chat_template"
_USED = frozenset(
    {"model", "pre", "tokens", "token_type", "scores", "merges", "add_bos_token", "add_eos_token", "add_space_prefix"}
    | {f"{role}_token_id" for role in (*_ROLES, "eot", "eom", "fim_pad", "fim_rep", "fim_sep")}
)
# They name tokens that only a prompt of a special form holds, or concern other kinds of tokenizers.
_INERT = frozenset(
    {"token_type_count", "seperator_token_id", "cls_token_id", "mask_token_id", "remove_extra_whitespaces"}
    | {f"{role}_token_id" for role in ("fim_pre", "fim_suf", "fim_mid", "prefix", "suffix", "middle")}
)
_FIXED: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {"add_sep_token": (False,), "suppress_tokens": ([],), "precompiled_charsmap": ([],)}
)
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4


def convert_tokenizer(path: Path) -> dict[str, str]:
    """The tokenizer files of a GGUF file, and its advice on sampling as generation_config.json if it has any, as text.

    Raises:
        FormatError: the vocabulary is malformed.
        UnsupportedError: the tokenizer is of a kind that cannot be converted.
    """
    file = open_gguf(path)
    vocabulary = Vocabulary.read(file)
    if not vocabulary.tokens:
        raise UnsupportedError(f"{path}: the file has no tokenizer")
    _check_keys(vocabulary)
    with panics_named(path):
        tokenizer = _tokenizer(vocabulary)
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {name: token for role, name in _ROLES.items() if (token := vocabulary.special(role)) is not None}
    if (template := _templates(vocabulary)) is not None:
        config["chat_template"] = template
    files = {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(config, indent=2) + "\n"}
    if advice := generation_config(file):
        files["generation_config.json"] = json.dumps(advice, indent=2) + "\n"
    return files


def _tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    kind = vocabulary.kind
    if kind == BYTE_LEVEL:
        tokenizer = _byte_level(vocabulary)
    elif kind == SENTENCE_PIECE:
        tokenizer = _sentence_piece(vocabulary)
    elif kind == GEMMA4:
        tokenizer = _gemma4(vocabulary)
    else:
        raise UnsupportedError(f"{vocabulary.path}: a tokenizer of kind {kind!r:.80} cannot be converted")
    _add_special_tokens(tokenizer, vocabulary)
    _add_ends(tokenizer, vocabulary)
    return tokenizer


def _check_keys(vocabulary: Vocabulary) -> None:
    """Refuse options of a tokenizer that the conversion does not follow."""
    for key, value in vocabulary.metadata.items():
        name = key.removeprefix(PREFIX)
        if name == key or name in _USED or name in _INERT:
            continue
        if name not in _FIXED or value not in _FIXED[name]:
            raise UnsupportedError(f"{vocabulary.path}: the conversion of tokenizers does not know {key} {value!r:.80}")


def _templates(vocabulary: Vocabulary) -> str | list[dict[str, str]] | None:
    """The chat template; with further ones by name, all of them."""
    texts = {
        key.removeprefix(_TEMPLATE).removeprefix(".") or "default": text
        for key, text in vocabulary.metadata.items()
        if key == _TEMPLATE or key.startswith(_TEMPLATE + ".")
    }
    for name, text in texts.items():
        if not isinstance(text, str):
            raise FormatError(f"{vocabulary.path}: the chat template {name!r:.80} is {text!r:.80}, expected a string")
    if texts.keys() <= {"default"}:
        return texts.get("default")
    return [{"name": name, "template": text} for name, text in texts.items()]


def _byte_level(vocabulary: Vocabulary) -> Tokenizer:
    """BPE over bytes of words."""
    split = SPLITS.get(vocabulary.pre or "")
    if split is None:
        raise UnsupportedError(
            f"{vocabulary.path}: a tokenizer that splits text as {vocabulary.pre!r:.80} cannot be converted"
        )
    tokenizer = _make(vocabulary, _merges(vocabulary), ignore_merges=split.keeps_tokens)
    steps: list[Any] = []
    if split.splits_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    steps += [pre_tokenizers.Split(Regex(words), "isolated") for words in split.words]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split.words))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if split.composes:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _merges(vocabulary: Vocabulary) -> list[tuple[str, ...]]:
    merges = [tuple(merge.split(" ")) for merge in vocabulary.list_of("merges", str)]
    if any(len(merge) != 2 for merge in merges):
        raise FormatError(f"{vocabulary.path}: a merge of {PREFIX}merges is not a pair of tokens")
    return merges


def _gemma4(vocabulary: Vocabulary) -> Tokenizer:
    """BPE over characters with bytes for what is in no piece; lines are split, and spaces are not."""
    unknown = vocabulary.special("unknown")
    tokenizer = _make(vocabulary, _merges(vocabulary), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\n]+|\n+"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _sentence_piece(vocabulary: Vocabulary) -> Tokenizer:
    """SentencePiece BPE with bytes for what is in no piece, as in Llama 2 and Mistral."""
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


def _make(vocabulary: Vocabulary, merges: list[Any], **options: Any) -> Tokenizer:
    ids = {token: number for number, token in enumerate(vocabulary.tokens)}
    try:
        return Tokenizer(models.BPE(ids, merges, **options))
    except Exception as error:  # the library raises plain Exception for every malformed vocabulary
        raise FormatError(f"{vocabulary.path}: its vocabulary is malformed: {error}") from error


def _add_special_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Mark the tokens that are found in text as wholes; control tokens are left out of decoded text."""
    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if kind in (_CONTROL, _UNKNOWN) or is_end_text(token):
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])


def _add_ends(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Put the start and end tokens where the file wants them, or else where its kind of tokenizer has them."""
    wanted = {"bos": vocabulary.begins_text(), "eos": vocabulary.flag("add_eos_token", False)}
    bos, eos = (vocabulary.special(role) if is_wanted else None for role, is_wanted in wanted.items())
    for role, token in (("bos", bos), ("eos", eos)):
        if wanted[role] and token is None:
            raise UnsupportedError(
                f"{vocabulary.path}: a text has a token added to it ({role}), but {PREFIX}{role}_token_id does not say "
                "which"
            )
    used = [token for token in (bos, eos) if token is not None]
    if not used:
        return
    # The library would read a colon or a dollar sign in a token as a part of the template.
    is_plain = not re.search("[:$]", "".join(used))
    names = {token: token if is_plain else f"token {i}" for i, token in enumerate(used)}
    single = [*([names[bos]] if bos else []), "$A", *([names[eos]] if eos else [])]
    special = [{"id": names[t], "ids": [vocabulary.tokens.index(t)], "tokens": [t]} for t in dict.fromkeys(used)]
    template = processors.TemplateProcessing(single=single, pair=[*single, "$B"], special_tokens=special)
    level = processors.ByteLevel(trim_offsets=False)
    is_bytes = isinstance(tokenizer.decoder, decoders.ByteLevel)
    tokenizer.post_processor = processors.Sequence([level, template]) if is_bytes else template
