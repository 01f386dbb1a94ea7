"""The expressions by which tokenizers of GGUF files split text into words, by llama.cpp's names."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from entrollm.checkpoint.gguf_vocabulary import LLAMA3_SPLITS


def _words(letters: str, digits: str, others: str) -> str:
    """Contractions, words with one other character before them, numbers, other characters, and spaces."""
    return (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?{letters}+|{digits}| ?{others}+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_OTHERS = r"[^\s\p{L}\p{N}]"
_THREE_DIGITS = _words(r"\p{L}", r"\p{N}{1,3}", _OTHERS)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
# Each splits what those before it have left.
SPLITS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        **dict.fromkeys((*sorted(LLAMA3_SPLITS), "glm4", "chatglm-bpe", "dbrx"), (_THREE_DIGITS,)),
        "qwen2": (_words(r"\p{L}", r"\p{N}", _OTHERS),),
        "qwen35": (_words(r"[\p{L}\p{M}]", r"\p{N}", r"[^\s\p{L}\p{M}\p{N}]"),),
        "deepseek-v3": _DEEPSEEK_V3,
    }
)
# Those whose text is composed first.
COMPOSED = ("qwen2", "qwen35")
# Those that split digits off, and then words as GPT-2 does.
SINGLE_DIGITS = ("smollm", "refact")
