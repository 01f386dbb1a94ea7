"""Tokens outside tokenizer.json get the ids that AutoTokenizer gives them, or are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

import entrollm
from entrollm.checkpoint.panics import decode, encode, panics_named
from entrollm.engine.files import read_model_files
from entrollm.errors import FormatError
from tests.engine.tokenizers_for_tests import byte_level
from tests.support.paths import TINY_LLAMA

SIZE = byte_level().get_vocab_size()
TEXTS = [
    "a <tool>b</tool> c",
    "<tool> b <|im_end|> <pad>",
    "<s>x</s> the  cat",
    " <image>  <image>",
    "Once upon a time <mask> <x1> <x2>",
]


def token(content: str, **flags: bool) -> dict[str, Any]:
    return {"content": content, **dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False), **flags}


def write(folder: Path, files: dict[str, Any], *added: AddedToken) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer = byte_level()
    tokenizer.add_tokens(list(added))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def numbered(*tokens: dict[str, Any], first: int = SIZE) -> dict[str, Any]:
    return {"added_tokens_decoder": {str(first + i): value for i, value in enumerate(tokens)}}


FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
CASES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "plain config": {"tokenizer_config": FAST},
    "numbered": {"tokenizer_config": FAST | numbered(token("<tool>", special=True), token("</tool>", special=False))},
    "numbered, stripping": {"tokenizer_config": FAST | numbered(token("<image>", lstrip=True, rstrip=True))},
    "numbered, normalized": {"tokenizer_config": FAST | numbered(token("<tool>", normalized=True))},
    "numbered, also named": {
        "tokenizer_config": FAST | numbered(token("<pad>", special=False)) | {"pad_token": "<pad>"},
    },
    "named and new": {"tokenizer_config": FAST | {"pad_token": "<pad>", "eos_token": "<|im_end|>"}},
    "named, in the order of the roles": {
        "tokenizer_config": FAST | {"image_token": "<image>", "pad_token": "<pad>", "bos_token": "<tool>"},
    },
    "named and in the vocabulary": {"tokenizer_config": FAST | {"bos_token": "<s>", "unk_token": "the"}},
    "listed": {"tokenizer_config": FAST | {"additional_special_tokens": ["<x1>", "<x2>"], "pad_token": "<pad>"}},
    "listed anew": {"tokenizer_config": FAST | {"extra_special_tokens": ["<x2>", "<x1>"]}},
    "listed by name": {"tokenizer_config": FAST | {"extra_special_tokens": {"image_token": "<image>"}}},
    "listed by role": {
        "tokenizer_config": FAST
        | {"extra_special_tokens": ["<x2>"], "model_specific_special_tokens": {"image_token": "<image>"}}
    },
    "added": {"tokenizer_config": FAST, "added_tokens": {"<tool>": SIZE, "</tool>": SIZE + 1}},
    "added in another order": {"tokenizer_config": FAST, "added_tokens": {"<tool>": SIZE + 1, "</tool>": SIZE}},
    "added and special": {
        "tokenizer_config": FAST,
        "added_tokens": {"<|im_end|>": SIZE, "<tool>": SIZE + 1},
        "special_tokens_map": {"eos_token": "<|im_end|>", "pad_token": token("<pad>")},
    },
    "added beside numbered": {
        "tokenizer_config": FAST | numbered(token("<tool>", special=True)),
        "added_tokens": {"</tool>": SIZE},
        "special_tokens_map": {"pad_token": "<pad>"},
    },
    "a map": {"tokenizer_config": FAST, "special_tokens_map": {"mask_token": token("<mask>", lstrip=True)}},
    "special tokens are split": {
        "tokenizer_config": FAST | numbered(token("<tool>", special=True)) | {"split_special_tokens": True},
    },
    "a word of the vocabulary": {"tokenizer_config": FAST | numbered(token("the", special=True), first=-1)},
}
# The number of a word that the tokenizer has already.
CASES["a word of the vocabulary"]["tokenizer_config"]["added_tokens_decoder"] = {
    str(byte_level().token_to_id("the")): token("the", special=True)
}


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "GPTNeoXTokenizer", "GPTNeoXTokenizerFast"])
@pytest.mark.parametrize("has_space", [True, False, None])
@pytest.mark.parametrize("is_stored", [True, False])
def test_texts_begin_with_a_space_as_the_configuration_says(
    name: str, has_space: bool | None, is_stored: bool, tmp_path: Path
) -> None:
    config = {"tokenizer_class": name} | ({} if has_space is None else {"add_prefix_space": has_space})
    folder = write(tmp_path / "model", {"tokenizer_config": config})
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=is_stored)
    tokenizer.save(str(folder / "tokenizer.json"))
    ours = read_model_files(folder).tokenizer
    assert ours is not None
    text = "Once upon a time"
    assert ours.encode(text).ids == AutoTokenizer.from_pretrained(folder)(text)["input_ids"]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("known", [(), (AddedToken("<tool>", special=False),)], ids=["bare", "with a token"])
def test_ids_are_those_of_auto_tokenizer(name: str, known: tuple[AddedToken, ...], tmp_path: Path) -> None:
    folder = write(tmp_path / "model", CASES[name], *known)
    try:
        ours = read_model_files(folder).tokenizer
    except FormatError as error:
        assert "belongs to another model" in str(error)
        assert known
        return
    theirs = AutoTokenizer.from_pretrained(folder)
    assert ours is not None
    for text in TEXTS:
        assert ours.encode(text).ids == theirs(text)["input_ids"], text
    ids = list(range(ours.get_vocab_size()))
    assert [ours.id_to_token(number) for number in ids] == theirs.convert_ids_to_tokens(ids)
    special = {number for number, added in ours.get_added_tokens_decoder().items() if added.special}
    assert special == {number for number, added in theirs.added_tokens_decoder.items() if added.special}


def test_the_example_has_the_ids_of_auto_tokenizer() -> None:
    ours, theirs = read_model_files(TINY_LLAMA).tokenizer, AutoTokenizer.from_pretrained(TINY_LLAMA)
    assert ours is not None
    for text in [*TEXTS, "The king said: “no”."]:
        assert ours.encode(text).ids == theirs(text)["input_ids"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"tokenizer_config": numbered(token("<tool>"), first=SIZE + 5)},
            f"has the number {SIZE + 5} there, and {SIZE}",
        ),
        ({"tokenizer_config": numbered(token("the"))}, f"'the' has the number {SIZE} there, and"),
        ({"added_tokens": {"<tool>": SIZE + 1}}, rf"added_tokens\.json: the token '<tool>' has the number {SIZE + 1}"),
        (
            {"added_tokens": {"<tool>": "x"}},
            r"added_tokens\.json: '<tool>' is 'x', which is not how",
        ),
        ({"tokenizer_config": {"added_tokens_decoder": [1]}}, r"added_tokens_decoder is \[1\]"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": token("a")}}}, "added_tokens_decoder 'x' is"),
        ({"tokenizer_config": {"added_tokens_decoder": {"9" * 5000: token("a")}}}, "added_tokens_decoder '9999"),
        ({"tokenizer_config": {"added_tokens_decoder": {"3": {"x": 1}}}}, r"a token is \{'x': 1\}"),
        ({"tokenizer_config": numbered({"content": "a", "special": 3})}, "the token 'a' is"),
        ({"tokenizer_config": {"extra_special_tokens": 3}}, "extra_special_tokens is 3"),
        ({"tokenizer_config": {"extra_special_tokens": [3]}}, "a token is 3"),
        ({"tokenizer_config": {"split_special_tokens": 1}}, "split_special_tokens is 1"),
    ],
)
def test_other_numbers_and_malformed_files_are_refused(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=message):
        read_model_files(write(tmp_path / "model", files))


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model", "tekken.json", "vocab.json"])
def test_other_kinds_of_tokenizers_are_named(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in TINY_LLAMA.iterdir():
        if not file.name.startswith("tokenizer"):
            (folder / file.name).symlink_to(file)
    (folder / name).write_bytes(b"x")
    model = entrollm.load(folder)
    with pytest.raises(ValueError, match=rf"has no tokenizer\.json, only {name}, which is not read; make one with"):
        model.encode("a")
    assert model.generate([1, 2], max_tokens=2).token_ids


def test_a_tokenizer_that_makes_the_library_panic_is_refused_by_name(tmp_path: Path) -> None:
    """The library cuts the prefix off a piece that is shorter than it; its panic is no Exception."""
    folder = write(tmp_path / "model", {})
    values = json.loads((folder / "tokenizer.json").read_text())
    values["model"]["continuing_subword_prefix"] = "#" * 40
    (folder / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(FormatError, match=r"tokenizer\.json: the tokenizers library fails on it \(.*fetch it again"):
        read_model_files(folder)


def test_other_base_exceptions_pass() -> None:
    with pytest.raises(KeyboardInterrupt), panics_named("tokenizer.json"):
        raise KeyboardInterrupt


def test_expressions_that_take_for_ever_are_an_error() -> None:
    """The library gives up such an expression, with a panic."""
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a|aa)+$b"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace(Regex("(a|aa)+$b"), "")])
    text = "a" * 40 + "c"
    with pytest.raises(FormatError, match=r"tokenizer\.json: the tokenizers library fails on it .*retry-limit"):
        encode(tokenizer, text, add_special_tokens=False)
    token = tokenizer.token_to_id("a")
    with pytest.raises(FormatError, match=r"tokenizer\.json: the tokenizers library fails on it"):
        decode(tokenizer, [*[token] * 40, token + 2], skip_special_tokens=False)


def test_an_unknown_token_that_there_is_not_is_an_error() -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0}, [], unk_token="<unk>"))
    assert encode(tokenizer, "a", add_special_tokens=False) == [0]
    with pytest.raises(FormatError, match=r"tokenizer\.json: the tokenizers library fails on it \(Unk token"):
        encode(tokenizer, "b", add_special_tokens=False)


def test_halves_of_characters_are_refused(tmp_path: Path) -> None:
    """JSON can spell half of a pair of surrogates, which is no text; both halves together are a character."""
    (tmp_path / "config.json").write_text("{}")
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(r'{"bos_token": "\ud83d\ude00"}')
    assert read_model_files(tmp_path).special_tokens == {"bos_token": "\N{GRINNING FACE}"}
    settings.write_text(r'{"bos_token": "\ud83d"}')
    with pytest.raises(FormatError, match=r"tokenizer_config\.json: not valid JSON: .*surrogates not allowed"):
        read_model_files(tmp_path)
