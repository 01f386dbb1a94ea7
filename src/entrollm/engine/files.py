"""The small files of a model folder: configuration, tokenizer, chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer

from entrollm.checkpoint.panics import panics_named
from entrollm.engine.tokens import TokenFiles, add_tokens
from entrollm.errors import FormatError
from entrollm.files.contents import check_is_file
from entrollm.files.shards import is_gguf

# The escape of half of a pair, which may be alone.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
# Tokenizers of other kinds.
_OTHER_TOKENIZERS = (
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
)


@dataclass(frozen=True)
class ModelFiles:
    """What a model folder holds besides its weights.

    Attributes:
        config: config.json.
        tokenizer: tokenizer.json, or None if there is none.
        generation_config: generation_config.json, or {}.
        special_tokens: the text of bos_token, eos_token and so on.
        chat_template: jinja source, or None if there is none.
        no_tokenizer: why there is no tokenizer, and what to do.
    """

    config: Mapping[str, object]
    tokenizer: Tokenizer | None = None
    generation_config: Mapping[str, object] = field(default_factory=dict)
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | None = None
    no_tokenizer: str = "this model has no tokenizer.json; give token ids in place of text"


def read_model_files(folder: Path) -> ModelFiles:
    """Read the small files of the model in `folder`.

    Raises:
        FormatError: config.json is missing, or a file is malformed; the message names it.
    """
    config = read_json(folder / "config.json")
    if config is None:
        raise FormatError(f"{folder / 'config.json'}: there is no such file; a model folder needs one")
    names = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    tokenizer_config, special_tokens_map, added_tokens = (read_json(folder / name) or {} for name in names)
    special_tokens = _read_special_tokens(special_tokens_map) | _read_special_tokens(tokenizer_config)
    tokenizer = _read_tokenizer(folder / "tokenizer.json")
    if tokenizer is not None:
        with panics_named(folder / "tokenizer.json"):
            add_tokens(tokenizer, TokenFiles(folder, tokenizer_config, special_tokens_map, added_tokens))
    return ModelFiles(
        config=config,
        tokenizer=tokenizer,
        no_tokenizer="" if tokenizer is not None else why_no_tokenizer(folder),
        generation_config=read_json(folder / "generation_config.json") or {},
        special_tokens=special_tokens,
        chat_template=_read_chat_template(folder, tokenizer_config),
    )


def _read_text(path: Path) -> str | None:
    check_is_file(path)
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: not UTF-8 text: {error}") from error


def read_json(path: Path) -> dict[str, object] | None:
    """The object in a JSON file, or None if there is no such file.

    Raises:
        FormatError: it is not UTF-8, not JSON, or not an object.
    """
    text = _read_text(path)
    if text is None:
        return None
    try:
        values = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(values, ensure_ascii=False).encode()  # halves of pairs alone are no text
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise FormatError(f"{path}: should hold a JSON object, found {type(values).__name__}")
    return values


def _read_tokenizer(path: Path) -> Tokenizer | None:
    check_is_file(path)
    if not path.exists():
        return None
    with panics_named(path):
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for every malformed file
            raise FormatError(f"{path}: not a valid tokenizer: {error}") from error
    # Both are for batches in training; a prompt is never cut or filled up.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def why_no_tokenizer(folder: Path, needed_by: str | None = None) -> str:
    """What there is in place of tokenizer.json; its ids would be guesses without the tools of its own kind.

    Args:
        folder: a folder without one, or a GGUF file.
        needed_by: what needs it and cannot take token ids in place of text; `None` if that can.
    """
    if is_gguf(folder):
        return (
            f"the tokenizer of {folder} is not read here; `entrollm compress {folder} -o OUT` converts it, then use OUT"
        )
    others = [name for name in _OTHER_TOKENIZERS if (folder / name).is_file()]
    if not others:
        if needed_by is not None:
            return f"{folder} has no tokenizer.json, which {needed_by} needs"
        return ModelFiles.no_tokenizer
    return (
        f"{folder} has no tokenizer.json, only {others[0]}, which is not read; make one with transformers: "
        f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
    )


def _read_special_tokens(values: Mapping[str, object]) -> dict[str, str]:
    """The entries named *_token, written as a string or as an object with a "content"."""
    tokens = {}
    for key, value in values.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            tokens[key] = text
    return tokens


def chat_template_of(folder: Path) -> str | None:
    """The chat template of a model folder, or None if it has none.

    Raises:
        FormatError: a file is malformed; the message names it.
    """
    return _read_chat_template(folder, read_json(folder / "tokenizer_config.json") or {})


def _read_chat_template(folder: Path, tokenizer_config: Mapping[str, object]) -> str | None:
    """The template from its own file, else from tokenizer_config.json, else from chat_template.json."""
    text = _read_text(folder / "chat_template.jinja")
    if text is not None:
        return text
    source, template = folder / "tokenizer_config.json", tokenizer_config.get("chat_template")
    if template is None:
        source = folder / "chat_template.json"
        template = (read_json(source) or {}).get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
        if template is None:
            raise FormatError(f"{source}: chat_template is a list without an entry named 'default'")
    if template is not None and not isinstance(template, str):
        raise FormatError(f"{source}: chat_template should be a string or a list, found {type(template).__name__}")
    return template
