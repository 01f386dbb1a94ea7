"""Tokens that a model folder adds to those of tokenizer.json, as transformers' AutoTokenizer adds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, pre_tokenizers

from entrollm.errors import FormatError

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_MOST_DIGITS = 10  # of a token's number: Python refuses to read thousands
# Of several new tokens, those with these roles get their numbers first.
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("extra_special_tokens", "additional_special_tokens")


@dataclass(frozen=True)
class TokenFiles:
    """The files beside tokenizer.json that name tokens; each is empty where there is no such file.

    Attributes:
        folder: where they are, for errors.
        tokenizer_config, special_tokens_map, added_tokens: the files of these names.
    """

    folder: Path
    tokenizer_config: Mapping[str, Any]
    special_tokens_map: Mapping[str, Any]
    added_tokens: Mapping[str, Any]


def add_tokens(tokenizer: Tokenizer, files: TokenFiles) -> None:
    """Add what the files name to a tokenizer: tokens with their numbers first, then special ones that are new.

    Raises:
        FormatError: a file is malformed, or a token would get another number than it has there.
    """
    is_split = files.tokenizer_config.get("split_special_tokens", False)
    if not isinstance(is_split, bool):
        raise _malformed(files.folder / "tokenizer_config.json", "split_special_tokens", is_split)
    tokenizer.encode_special_tokens = is_split
    _set_first_space(tokenizer, files.tokenizer_config)
    named = list(_named(files))
    specials = {str(token.content) for token in named}
    source, numbered = _numbered(files, specials)
    known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    for number, token in sorted(numbered.items()):
        if token.content in known and _flags(known[token.content]) == _flags(token):
            found: int | None = tokenizer.token_to_id(token.content)
        else:
            tokenizer.add_tokens([token])
            found = tokenizer.token_to_id(token.content)
        if found != number:
            raise FormatError(
                f"{source}: the token {token.content!r} has the number {number} there, and {found} in "
                f"{files.folder / 'tokenizer.json'}; one of the two files belongs to another model"
            )
    known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_tokens([token for token in named if token.content not in known])
    for token in known.values():
        if token.content in specials and not token.special:
            token.special = True
            tokenizer.add_tokens([token])


def _set_first_space(tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
    """Let a text begin with a space as tokenizer_config.json says, which these classes put above tokenizer.json."""
    has_space, first = config.get("add_prefix_space", False), tokenizer.pre_tokenizer
    has_class = str(config.get("tokenizer_class")).removesuffix("Fast") in ("GPT2Tokenizer", "GPTNeoXTokenizer")
    if has_class and isinstance(has_space, bool) and isinstance(first, pre_tokenizers.ByteLevel):
        first.add_prefix_space = has_space
        tokenizer.pre_tokenizer = first


def _numbered(files: TokenFiles, specials: set[str]) -> tuple[Path, dict[int, AddedToken]]:
    """The tokens that come with their number, and the file that they are from; tokenizer_config.json wins."""
    source = files.folder / "tokenizer_config.json"
    decoder = files.tokenizer_config.get("added_tokens_decoder")
    if decoder is not None:
        if not isinstance(decoder, dict):
            raise _malformed(source, "added_tokens_decoder", decoder)
        found = {}
        for number, value in decoder.items():
            if not number.isdecimal() or len(number) > _MOST_DIGITS or not isinstance(value, dict):
                raise _malformed(source, f"added_tokens_decoder {number!r:.40}", value)
            found[int(number)] = _token(source, value)
        return source, found
    source = files.folder / "added_tokens.json"
    for content, number in files.added_tokens.items():
        if type(number) is not int:
            raise _malformed(source, repr(content), number)
    return source, {
        number: AddedToken(content, normalized=content not in specials, special=content in specials)
        for content, number in files.added_tokens.items()
    }


def _named(files: TokenFiles) -> Iterator[AddedToken]:
    """The special tokens that have a role, the usual ones first, and those that are listed as such."""
    # Where tokenizer_config.json lists tokens by number, the older file is not read.
    is_current = files.tokenizer_config.get("added_tokens_decoder") is not None
    values = {**files.tokenizer_config, **({} if is_current else files.special_tokens_map)}
    source = files.folder / "tokenizer_config.json"
    listed: Any = next((values[key] for key in _LISTS if values.get(key)), [])
    roles = [key for key, value in values.items() if key.endswith("_token") and isinstance(value, str | dict)]
    found = [values[key] for key in sorted(roles, key=lambda key: _ROLES.index(key) if key in _ROLES else len(_ROLES))]
    roles_of_model = values.get("model_specific_special_tokens") or {}
    if not isinstance(roles_of_model, dict):
        raise _malformed(source, "model_specific_special_tokens", roles_of_model)
    found += roles_of_model.values()
    if isinstance(listed, dict):
        found += listed.values()
    elif isinstance(listed, list):
        found += listed
    else:
        raise _malformed(source, _LISTS[0], listed)
    for value in found:
        if value != "":
            token = AddedToken(value, special=True) if isinstance(value, str) else _token(source, value)
            token.special = True
            yield token


def _token(source: Path, value: Any) -> AddedToken:
    """A token that is written as an object."""
    if not isinstance(value, dict) or not isinstance(value.get("content"), str) or not value["content"]:
        raise _malformed(source, "a token", value)
    flags = {key: value[key] for key in _FLAGS if key in value}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise _malformed(source, f"the token {value['content']!r:.40}", value)
    return AddedToken(value["content"], **flags)


def _flags(token: AddedToken) -> tuple[bool, ...]:
    return tuple(getattr(token, flag) for flag in _FLAGS)


def _malformed(source: Path, what: str, found: object) -> FormatError:
    return FormatError(f"{source}: {what} is {found!r:.80}, which is not how tokens are written")
