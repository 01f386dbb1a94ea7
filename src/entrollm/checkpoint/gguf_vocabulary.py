"""The vocabulary of a GGUF file, and the tokens that begin and end a text, by llama.cpp's rules."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from entrollm.checkpoint.gguf_splits import SPLITS
from entrollm.errors import FormatError
from entrollm.files.gguf import GgufFile

PREFIX = "tokenizer.ggml."
BYTE_LEVEL, SENTENCE_PIECE, GEMMA4 = "gpt2", "llama", "gemma4"

# What SentencePiece models have where the file names no such token.
_SENTENCE_PIECE_DEFAULTS = {"bos": 1, "eos": 2, "unknown": 0}
# Tokens that end a turn are known by their text: files name only one of them.
_ENDS = frozenset(
    {"<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"}
    | {"<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"}
    | {"<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~["}
)
# By role, the texts of tokens between files and parts of files; they end an answer too.
_FILE_ENDS = {
    "fim_pad": frozenset({"<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"}),
    "fim_rep": frozenset({"<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"}),
    "fim_sep": frozenset({"<|file_sep|>"}),
}


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, and the type of each as llama.cpp numbers them; both are empty where the file has none."""

    path: Path
    metadata: Any
    tokens: list[str]
    types: list[int]

    @classmethod
    def read(cls, file: GgufFile) -> Self:
        """The vocabulary of a file.

        Raises:
            FormatError: it is malformed.
        """
        empty = cls(file.path, file.metadata, [], [])
        if PREFIX + "tokens" not in file.metadata:
            return empty
        tokens = empty.list_of("tokens", str)
        if len(set(tokens)) != len(tokens):
            raise FormatError(f"{file.path}: {PREFIX}tokens has the same token twice")
        types = [1] * len(tokens)
        if PREFIX + "token_type" in file.metadata:
            types = empty.list_of("token_type", int, len(tokens))
        return cls(file.path, file.metadata, tokens, types)

    @property
    def kind(self) -> object:
        """What llama.cpp calls the tokenizer's model."""
        return self.metadata.get(PREFIX + "model")

    @property
    def pre(self) -> str | None:
        """How the file says that text is split into words.

        Raises:
            FormatError: it says so by something else than a name.
        """
        value = self.metadata.get(PREFIX + "pre")
        if value is not None and not isinstance(value, str):
            raise FormatError(f"{self.path}: {PREFIX}pre is {value!r:.80}, expected a name")
        return value

    def id_of(self, role: str) -> int | None:
        """The number of a token that has a role, such as bos.

        Raises:
            FormatError: the file has something else there.
        """
        key = f"{PREFIX}{role}_token_id"
        number = self.metadata.get(key)
        if number is None:
            number = _SENTENCE_PIECE_DEFAULTS.get(role) if self.kind == SENTENCE_PIECE else None
            return number if number is not None and number < len(self.tokens) else None
        if type(number) is not int or not 0 <= number < (len(self.tokens) or 2**31):
            raise FormatError(f"{self.path}: {key} is {number!r:.80}, expected the number of a token")
        return number

    def special(self, role: str) -> str | None:
        """The text of a token that has a role."""
        number = self.id_of(role)
        return self.tokens[number] if number is not None and self.tokens else None

    def flag(self, key: str, default: bool) -> bool:
        """A flag of the tokenizer."""
        value = self.metadata.get(PREFIX + key, default)
        if not isinstance(value, bool):
            raise FormatError(f"{self.path}: {PREFIX}{key} is {value!r:.80}, expected true or false")
        return value

    def list_of(self, key: str, kind: type, count: int | None = None) -> list[Any]:
        """A list of the tokenizer, of as many elements as stated."""
        values = self.metadata.get(PREFIX + key)
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            raise FormatError(f"{self.path}: {PREFIX}{key} is not a list of {kind.__name__}")
        if count is not None and len(values) != count:
            raise FormatError(f"{self.path}: {PREFIX}{key} has {len(values)} elements, expected {count}")
        return values

    def begins_text(self) -> bool:
        """Whether the start token comes before every text: the file says so, or else the kind of tokenizer."""
        split = SPLITS.get(self.pre or "")
        by_kind = self.kind == SENTENCE_PIECE or (split is not None and split.begins_text)
        return self.flag("add_bos_token", by_kind)


def is_end_text(token: str) -> bool:
    """Whether a token is one that ends an answer by its text, whatever type the file gives it."""
    return token in _ENDS or any(token in known for known in _FILE_ENDS.values())


def start_token(vocabulary: Vocabulary) -> int | None:
    """The number of the token that begins a text, if there is one."""
    return vocabulary.id_of("bos")


def end_tokens(vocabulary: Vocabulary) -> list[int]:
    """The numbers of the tokens that end an answer: the file's end token first, then the others in their order."""
    named = [number for role in ("eos", "eot", "eom") if (number := vocabulary.id_of(role)) is not None]
    texts = set(vocabulary.tokens) & _ENDS
    # Where these two end an answer, the third ends a part of one.
    if texts >= {"<|return|>", "<|call|>"} or ("<|flush|>" in texts and texts & {"<|call|>", "<|calls|>"}):
        texts.discard("<|end|>")
    if "<|tool_response>" in texts:
        texts.discard("</s>")
    ends = {number for number, token in enumerate(vocabulary.tokens) if token in texts}
    for role, known in _FILE_ENDS.items():
        number = vocabulary.id_of(role)
        if number is None:
            number = next((number for number, token in enumerate(vocabulary.tokens) if token in known), None)
        if number is not None:
            ends.add(number)
    return [*dict.fromkeys([*named, *sorted(ends)])]
