"""`entrollm eval` on the example model."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from entrollm.cli.main import app
from tests.support.paths import EXAMPLES

MODEL = str(EXAMPLES / "tiny-llama")
TEXT = str(EXAMPLES / "wikitext-2-test.txt")


def run(*args: str):
    return CliRunner().invoke(app, ["eval", *args], catch_exceptions=False)


def test_perplexity_is_that_of_transformers() -> None:
    result = run(MODEL, "--text", TEXT, "--max-windows", "2", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert (found["window"], found["windows"], found["reference"]) == (512, 2, None)
    (model,) = found["models"]
    assert model["file_bytes"] == 31_478_440
    assert (model["text_tokens"], model["text_bytes"], model["predictions"]) == (344_745, 1_256_449, 2 * 511)

    ids = Tokenizer.from_file(f"{MODEL}/tokenizer.json").encode(Path(TEXT).read_text("utf-8")).ids
    reference = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    batch = torch.tensor(ids[:1024]).reshape(2, 512)
    with torch.no_grad():
        logits = reference(batch).logits[:, :-1].double()
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), batch[:, 1:].reshape(-1)).item()
    assert model["nats_per_token"] == pytest.approx(loss, rel=1e-5)
    assert model["bits_per_byte"] == pytest.approx(loss / 0.6931471805599453 * 344_745 / 1_256_449, rel=1e-5)


def test_a_model_against_itself_agrees() -> None:
    result = run(MODEL, MODEL, "--text", TEXT, "--against", MODEL, "--window", "64", "--max-windows", "3", "--json")
    found = json.loads(result.stdout)
    assert len(found["models"]) == 2
    for model in found["models"]:
        assert model["kl"]["maximum"] == pytest.approx(0, abs=1e-9)
        assert model["kl"]["top1_agreement"] == 1
        assert model["perplexity"] == found["reference"]["perplexity"]


def test_the_type_of_the_cache_is_that_of_the_models() -> None:
    options = ["--against", MODEL, "--window", "64", "--max-windows", "2", "--cache-type", "int8", "--json"]
    (model,) = json.loads(run(MODEL, "--text", TEXT, *options).stdout)["models"]
    assert 0 < model["kl"]["mean"] < 1e-3


def test_people_get_a_table() -> None:
    result = run(MODEL, "--text", TEXT, "--max-windows", "1")
    assert result.exit_code == 0
    assert "wikitext-2-test.txt: 1 windows of 512 tokens, 511 predictions" in result.stdout
    assert "31.5 MB" in result.stdout


def test_bos_begins_every_window() -> None:
    plain = json.loads(run(MODEL, "--text", TEXT, "--max-windows", "1", "--json").stdout)
    begun = json.loads(run(MODEL, "--text", TEXT, "--max-windows", "1", "--bos", "--json").stdout)
    assert plain["models"][0]["nats_per_token"] != begun["models"][0]["nats_per_token"]


def test_a_window_beyond_the_context_is_refused() -> None:
    result = run(MODEL, "--text", TEXT, "--window", "1024")
    assert result.exit_code == 1
    assert "--window 1024 is longer than the context of 512 tokens" in result.stderr


def test_a_short_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Once upon a time")
    result = run(MODEL, "--text", str(tmp_path / "short.txt"), "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["type"] == "ValueError"
    assert "tokens, and one window takes 512" in result.stderr


def test_a_missing_text_is_named() -> None:
    result = run(MODEL, "--text", "nothing.txt")
    assert result.exit_code == 1
    assert result.stderr == "error: nothing.txt: No such file or directory\n"


def test_a_missing_model_is_named() -> None:
    result = run("./nothing", "--text", TEXT)
    assert result.exit_code == 1
    assert "./nothing: no such folder" in result.stderr
