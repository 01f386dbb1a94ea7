"""Tokenizers of GGUF files give the tokens of the tokenizers that they were made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from entrollm.checkpoint.gguf_tokenizer import convert_tokenizer
from entrollm.errors import FormatError, UnsupportedError
from tests.support.gguf_sources import GgufSource

TEXTS = [
    "Once upon a time, there was a child.",
    "  spaces   and\n\nlines\r\n\t12345 67 it's WE'LL",
    "naïve café £5 日本語 😀 übermut e\u0301",
    "<s>special</s> and <tool>x",
    "",
]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained(pre: str) -> Tokenizer:
    """A tokenizer as the models of this kind have it."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if pre == "gpt-2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif pre == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    else:
        pattern = LLAMA3 if pre == "llama-bpe" else LLAMA3.replace("{1,3}", "")
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, words])
        if pre == "qwen2":
            tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return tokenizer


def values_of(tokenizer: Tokenizer, model: str, **more: Any) -> dict[str, Any]:
    """What a converter to GGUF writes of a tokenizer."""
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)
    types = {"<unk>": 2, "<s>": 3, "</s>": 3, "<tool>": 4}
    values = {
        "model": model,
        "tokens": vocabulary,
        "token_type": [types.get(token, 6 if token.startswith("<0x") else 1) for token in vocabulary],
        "bos_token_id": tokenizer.token_to_id("<s>"),
        "eos_token_id": tokenizer.token_to_id("</s>"),
        **more,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


def convert(tmp_path: Path, values: dict[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    (tmp_path / "model.gguf").write_bytes(GgufSource(values).to_bytes())
    files = convert_tokenizer(tmp_path / "model.gguf")
    return Tokenizer.from_str(files["tokenizer.json"]), json.loads(files["tokenizer_config.json"])


def check_equal(found: Tokenizer, expected: Tokenizer) -> None:
    for text in TEXTS:
        wanted = expected.encode(text, add_special_tokens=False).ids
        assert found.encode(text, add_special_tokens=False).ids == wanted, text
        assert found.decode(wanted) == expected.decode(wanted)


def merges_of(tokenizer: Tokenizer) -> list[str]:
    return [" ".join(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "smollm", "gpt-2"])
def test_byte_level_tokenizers_are_converted(pre: str, tmp_path: Path) -> None:
    original = trained(pre)
    values = values_of(original, "gpt2", pre=pre, merges=merges_of(original), add_bos_token=pre == "llama-bpe")
    found, config = convert(tmp_path, values | {"tokenizer.chat_template": "{{ messages }}"})
    check_equal(found, original)
    assert found.encode("a").ids == ([0] if pre == "llama-bpe" else []) + original.encode("a").ids
    assert (config["bos_token"], config["eos_token"], config["chat_template"]) == ("<s>", "</s>", "{{ messages }}")


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("glm4", "it's 12345", ["it", "'s", " ", "123", "45"]),
        ("dbrx", "it's 12345", ["it", "'s", " ", "123", "45"]),
        ("qwen35", "नमस्ते 12", ["नमस्ते", " ", "1", "2"]),
        ("deepseek-v3", "abc12345日本x!", ["abc", "123", "45", "日本", "x", "!"]),
        ("refact", "a12 b", ["a", "1", "2", " b"]),
    ],
)
def test_text_is_split_as_the_file_says(pre: str, text: str, words: list[str], tmp_path: Path) -> None:
    original = trained("gpt-2")
    found, _ = convert(tmp_path, values_of(original, "gpt2", pre=pre, merges=merges_of(original)))
    assert found.pre_tokenizer is not None
    assert [text[start:end] for _, (start, end) in found.pre_tokenizer.pre_tokenize_str(text)] == words


def gemma4_values() -> dict[str, Any]:
    """A small tokenizer of Gemma 4's kind."""
    merges = ["o n", "▁ t", "i m", "e r", "im e", "▁t ime", "\n \n", "▁ ▁", "h er", "▁t her"]
    pieces = ["<pad>", "</s>", "<s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += sorted(set("\n▁Oonceupatim,hrws.dl"))
    pieces += ["".join(merge.split(" ")) for merge in merges]
    types = [3, 3, 3, 2, *(6 for _ in range(256)), *(1 for _ in pieces[260:])]
    values = {"tokens": pieces, "token_type": types, "merges": merges, "scores": [0.0] * len(pieces)}
    values |= {"model": "gemma4", "bos_token_id": 2, "eos_token_id": 1, "unknown_token_id": 3}
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()} | {"tokenizer.ggml.add_bos_token": True}


def test_gemma4_tokenizers_are_converted(tmp_path: Path) -> None:
    found, config = convert(tmp_path, gemma4_values())
    text = "Once  upon there\n\na time é"
    tokens = found.encode(text).tokens
    assert tokens[0] == config["bos_token"] == "<s>" and "▁ther" in tokens and "\n\n" in tokens and "<0xC3>" in tokens
    assert found.decode(found.encode(text).ids) == text


@pytest.mark.parametrize("begin, end", [("<s:>", "</s>"), ("$A", "</s>"), ("<s>", "$B:1"), ("a:0", "b:")])
def test_ends_may_have_any_characters(begin: str, end: str, tmp_path: Path) -> None:
    values = values_of(trained("gpt-2"), "gpt2", pre="gpt-2", merges=[], add_bos_token=True, add_eos_token=True)
    values["tokenizer.ggml.tokens"][:2] = [begin, end]
    values["tokenizer.ggml.token_type"][:2] = [3, 3]
    values["tokenizer.ggml.bos_token_id"], values["tokenizer.ggml.eos_token_id"] = 0, 1
    encoding = convert(tmp_path, values)[0].encode("a")
    assert encoding.ids == [0, values["tokenizer.ggml.tokens"].index("a"), 1]
    assert encoding.tokens == [begin, "a", end]


@pytest.mark.parametrize("begins", [True, False])
def test_sentence_piece_tokenizers_are_converted(begins: bool, tmp_path: Path) -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["on", "▁t", "im", "er", "ime", "▁time", "▁up", "▁upon", "▁th", "▁the", "▁there", "▁w"]
    scores = [0.0] * 259 + [float(-i) for i in range(12)]
    characters = sorted(set("▁Onceupatim,hrws.d"))
    pieces += characters
    scores += [-100.0 - i for i in range(len(characters))]
    pairs = []
    for piece in pieces[259:271]:  # by falling score, then by the left part's number
        splits = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        splits = [split for split in splits if all(part in pieces for part in split)]
        pairs += sorted(splits, key=lambda split: pieces.index(split[0]))
    ids = {piece: number for number, piece in enumerate(pieces)}
    original = Tokenizer(models.BPE(ids, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    original.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace] if begins else [replace])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    original.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if begins else steps)
    original.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in pieces[:3]])
    values = values_of(original, "llama", scores=scores, add_space_prefix=begins, unknown_token_id=0)
    found, config = convert(tmp_path, values)
    check_equal(found, original)
    assert found.encode("time").tokens[0] == "<s>" and config["unk_token"] == "<unk>"
    assert found.encode("Once upon a time").tokens[-1] == "▁time"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "bert"}, UnsupportedError, "a tokenizer of kind 'bert' cannot be converted"),
        ({"tokens": None}, UnsupportedError, "the file has no tokenizer"),
        ({"pre": "other"}, UnsupportedError, "that splits text as 'other' cannot be converted"),
        ({"pre": None}, UnsupportedError, "that splits text as None cannot be converted"),
        ({"pre": ["gpt-2"]}, FormatError, r"tokenizer.ggml.pre is \['gpt-2'\], expected a name"),
        ({"tokens": "x"}, FormatError, "tokens is not a list of str"),
        ({"tokens": ["a", "a"]}, FormatError, "tokens has the same token twice"),
        ({"token_type": [1]}, FormatError, "token_type has 1 elements, expected 3"),
        ({"merges": ["ab"]}, FormatError, "a merge of tokenizer.ggml.merges is not a pair of tokens"),
        ({"merges": ["x y"]}, FormatError, "its vocabulary is malformed: .*Token `x` out of vocabulary"),
        ({"add_bos_token": "x"}, FormatError, "add_bos_token is 'x', expected true or false"),
        ({"model": "llama"}, FormatError, "scores is not a list of float"),
        ({"add_bos_token": True}, UnsupportedError, r"a text has a token added to it \(bos\).*does not say which"),
        ({"add_eos_token": True}, UnsupportedError, r"a text has a token added to it \(eos\).*does not say which"),
        ({"bos_token_id": 3}, FormatError, "bos_token_id is 3, expected the number of a token"),
        ({"add_sep_token": True}, UnsupportedError, "does not know tokenizer.ggml.add_sep_token True"),
        ({"suppress_tokens": [1]}, UnsupportedError, "does not know tokenizer.ggml.suppress_tokens"),
        ({"normalizer.lowercase": True}, UnsupportedError, "does not know tokenizer.ggml.normalizer.lowercase"),
    ],
)
def test_other_tokenizers_are_refused(changes: dict[str, Any], error: type, message: str, tmp_path: Path) -> None:
    values = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab"], "merges": ["a b"]} | changes
    with pytest.raises(error, match=message):
        convert(tmp_path, {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None})
