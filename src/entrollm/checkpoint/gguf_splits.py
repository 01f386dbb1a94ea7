"""The ways to split text into words before byte-level BPE, by llama.cpp's names of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True)
class Split:
    """A way to split text.

    Attributes:
        words: the expressions whose matches are words, each for what those before it have left; none for GPT-2's.
        splits_digits: each digit is a word before that.
        composes: characters are composed first (NFC), as the model's own tokenizer does and llama.cpp does not.
        keeps_tokens: a word that is a token stays whole, whatever merges would make of it.
        begins_text: the start token comes before every text, unless the file says otherwise.
    """

    words: tuple[str, ...] = ()
    splits_digits: bool = False
    composes: bool = False
    keeps_tokens: bool = False
    begins_text: bool = False


_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
# A change from small letters to capitals begins a word. llama.cpp takes letters beyond ASCII for both.
_CAPITAL, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASES = tuple(rf"[^\r\n\p{{L}}\p{{N}}]?{word}" for word in (f"{_CAPITAL}*{_SMALL}+", f"{_CAPITAL}+{_SMALL}*"))
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_MARKS_ALONE = r" ?[^\s\p{L}\p{N}\r\n]+"
_SPACES = (r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+")


def _words(letters: str, digits: str, marks: str) -> tuple[str]:
    return ("|".join([letters, rf"\p{{N}}{digits}", marks, *_SPACES]),)


_THREE_DIGITS = _words(_LETTERS, "{1,3}", _MARKS)
_ONE_DIGIT = _words(_LETTERS, "", _MARKS)
_LLAMA3 = Split(words=_THREE_DIGITS, keeps_tokens=True, begins_text=True)
_GPT2, _CODE = Split(), Split(splits_digits=True)
_QWEN2 = Split(words=_ONE_DIGIT, composes=True)
_QWEN35 = _words(rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+", "", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*")
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    "|".join(
        [
            r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+""",
            r" ?[\p{P}\p{S}]+[\r\n]*",
            *_SPACES,
        ]
    ),
)

SPLITS: Mapping[str, Split] = MappingProxyType(
    {
        **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "lfm2"), _LLAMA3),
        **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), Split(words=_THREE_DIGITS)),
        **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
        "qwen35": Split(words=_QWEN35, composes=True),
        "deepseek-v3": Split(words=_DEEPSEEK_V3),
        "stablelm2": Split(words=_ONE_DIGIT),
        "seed-coder": Split(words=_words(_LETTERS, "", _MARKS_ALONE)),
        "tekken": Split(words=_words("|".join(_CASES), "", _PATHS), keeps_tokens=True, begins_text=True),
        "gpt-4o": Split(words=_words("|".join(f"{word}{_ENDINGS}?" for word in _CASES), "{1,3}", _PATHS)),
        **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "exaone"), _CODE),
        **dict.fromkeys(("gpt-2", "phi-2", "olmo", "exaone4", "granite-docling"), _GPT2),
    }
)
