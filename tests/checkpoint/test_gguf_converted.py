"""GGUF files of models of transformers: logits equal those of the original, and llama.cpp's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from entrollm import CompressOptions, _core, compress
from entrollm.checkpoint.gguf_tokenizer import convert_tokenizer
from entrollm.compress.export import export
from entrollm.engine.load import load
from entrollm.format.reader import CompressedModel
from tests.checkpoint.gguf_converted import KINDS, make_model, tokens, write_file
from tests.checkpoint.test_gguf_tokenizer import gemma4_values
from tests.checkpoint.test_llamacpp import ask, is_installed
from tests.engine.architectures import load_reference, reference_logits, relative_difference

TOKENS = tokens()
VOCABULARY = len(TOKENS["tokenizer.ggml.tokens"])
IDS = np.random.default_rng(9).integers(5, VOCABULARY, 48).tolist()


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest) -> tuple[str, Any, Any]:
    """A kind of model, a model, and its logits."""
    torch.set_num_threads(1)
    model = make_model(KINDS[request.param], VOCABULARY)
    return request.param, model, reference_logits(model, IDS)


@pytest.mark.parametrize("is_quantized", [False, True], ids=["floats", "blocks"])
def test_logits(made: tuple[str, Any, Any], is_quantized: bool, tmp_path: Path) -> None:
    name, model, expected = made
    path = write(name, model, tmp_path, is_quantized=is_quantized)
    found = load(path).logits(IDS)
    assert relative_difference(found, expected) < 1e-4
    # llama.cpp rounds what it multiplies with blocks to 8 bits.
    if is_installed() and not is_quantized:
        theirs = np.array(ask(path, [], IDS)["logits"])
        assert np.abs(theirs - found).max() < 0.03 * theirs.std()


def write(name: str, model: Any, folder: Path, *, is_quantized: bool) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(write_file(KINDS[name], model, is_quantized=is_quantized, tokens=TOKENS).to_bytes())
    return path


@pytest.mark.parametrize("name", ["qwen35moe", "granitehybrid-experts", "gemma4-experts"])
def test_coded_blocks(name: str, tmp_path: Path) -> None:
    """Stacks that are joined, and columns in another order."""
    model = make_model(KINDS[name], VOCABULARY)
    path = write(name, model, tmp_path, is_quantized=True)
    compress(path, tmp_path / "coded", CompressOptions(measure=False))
    assert relative_difference(load(tmp_path / "coded").logits(IDS), reference_logits(model, IDS)) < 2e-3


@pytest.mark.parametrize("name", ["mistral4", "granitehybrid-experts", "gemma4-experts"])
def test_experts_in_floats(name: str, tmp_path: Path) -> None:
    """They are coded, and exported as the stacks that transformers loads."""
    model = make_model(KINDS[name], VOCABULARY)
    path = write(name, model, tmp_path, is_quantized=False)
    compress(path, tmp_path / "coded", CompressOptions(bits=8, granularity="row", measure=False))
    with CompressedModel.open(tmp_path / "coded") as coded:
        assert not [kept for kept in coded.plain if "experts" in kept and coded.array(kept).ndim > 1]
        export(coded, tmp_path / "exported", _core.ThreadPool(1), "f32")
    expected = reference_logits(load_reference(tmp_path / "exported"), IDS)
    assert relative_difference(load(tmp_path / "coded").logits(IDS), expected) < 2e-3


@pytest.mark.skipif(not is_installed(), reason="llama-cpp-python is not installed")
def test_gemma4_tokens(tmp_path: Path) -> None:
    """Token ids of Gemma 4's kind of tokenizer are llama.cpp's."""
    values = gemma4_values()
    kind = KINDS["gemma4-experts"]
    model = make_model(kind, len(values["tokenizer.ggml.tokens"]))
    path = tmp_path / "model.gguf"
    path.write_bytes(write_file(kind, model, is_quantized=False, tokens=values).to_bytes())
    texts = ["Once upon a time, there was a child.", "a  time\n\nthere\n", " é"]
    tokenizer = Tokenizer.from_str(convert_tokenizer(path)["tokenizer.json"])
    assert [tokenizer.encode(text).ids for text in texts] == ask(path, texts, [])["tokens"]
