"""The commands that make, check and decode a compressed folder, on the example model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from entrollm.cli.main import app
from tests.support.paths import EXAMPLES

MODEL = EXAMPLES / "tiny-llama"


def invoke(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def invoke_json(*arguments: object, code: int = 0) -> Any:
    return json.loads(invoke(*arguments, "--json", code=code).stdout)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compressed") / "out"
    invoke("compress", MODEL, "-o", out, "--bits", 4)
    return out


def test_compress_reports_what_the_files_hold(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = invoke_json("compress", MODEL, "-o", out)
    assert result["weights"] == 15_735_168
    assert result["file_bytes"] == sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert result["file_bits"] == pytest.approx(result["file_bytes"] * 8 / result["weights"])
    # The promise of --prefer size, on the whole file.
    assert result["huffman_bits"] < result["coded_bits"] < 1.03 * result["huffman_bits"]


def test_compress_for_speed_stays_near_the_optimum(tmp_path: Path) -> None:
    for bits, excess, target in ((4, 0.25, "avx512"), (8, 1.0, "arm")):
        arguments = ("--bits", bits, "--prefer", "speed", "--target", target)
        result = invoke_json("compress", MODEL, "-o", tmp_path / str(bits), *arguments)
        assert result["huffman_bits"] < result["coded_bits"] < result["huffman_bits"] + excess


def test_overrides_and_kept_tensors_are_followed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("--bits", 4, "--bits", "*.q_proj.*=8", "--keep", "model.embed_tokens*")
    invoke("compress", MODEL, "-o", out, *arguments, "--granularity", "row")
    report = invoke_json("inspect", out)
    grids = {tensor["name"]: tensor["grid"] for tensor in report["tensors"]}
    assert grids["model.layers.0.self_attn.q_proj.weight"].endswith("8-row")
    assert grids["model.layers.0.self_attn.k_proj.weight"].endswith("4-row")
    assert "model.embed_tokens.weight" in report["kept"]


def test_compress_refuses_an_existing_output(compressed: Path) -> None:
    error = invoke_json("compress", MODEL, "-o", compressed, code=1)["error"]
    assert error["type"] == "ValueError" and "--overwrite" in error["message"]
    invoke("compress", MODEL, "-o", compressed, "--bits", 4, "--overwrite")


def test_inspect_adds_up(compressed: Path) -> None:
    report = invoke_json("inspect", compressed)
    assert len(report["tensors"]) == 57 and len(report["kept"]) == 17
    assert report["weights"] == 15_735_168
    for tensor in report["tensors"]:
        assert 0 < tensor["entropy_bits"] <= tensor["huffman_bits"] <= tensor["file_bits"]
        assert 0 < tensor["relative_error"] < 1
    assert "everything included" in invoke("inspect", compressed).stdout


def test_verify_accepts_what_compress_wrote(compressed: Path) -> None:
    result = invoke_json("verify", compressed, "--against", MODEL)
    assert result["ok"] and result["compared"] and result["matrices"] == 57


def test_verify_refuses_a_flipped_byte(compressed: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in compressed.iterdir():
        content = bytearray(file.read_bytes())
        if file.suffix == ".safetensors":
            content[len(content) // 2] ^= 1
        (damaged / file.name).write_bytes(content)
    error = invoke_json("verify", damaged, code=1)["error"]
    assert error["type"] == "CorruptStreamError"


def test_export_is_an_ordinary_checkpoint(compressed: Path, tmp_path: Path) -> None:
    result = invoke_json("export", compressed, "-o", tmp_path / "exported", "--dtype", "f32")
    assert result["weights"] == 15_735_168
    # Compressing the export with the same grids finds the same integers.
    invoke("compress", tmp_path / "exported", "-o", tmp_path / "again", "--bits", 4)
    first, again = (invoke_json("inspect", folder) for folder in (compressed, tmp_path / "again"))
    for before, after in zip(first["tensors"], again["tensors"], strict=True):
        assert before["entropy_bits"] == pytest.approx(after["entropy_bits"], abs=1e-9)


def test_demo_prints_the_papers_table() -> None:
    arguments = ("--model", MODEL, "--text", EXAMPLES / "wikitext-2-test.txt", "--max-windows", 1)
    rows = {row["label"]: row for row in invoke_json("demo", *arguments)["rows"]}
    assert list(rows) == ["original", "uint8", "uint4", "uint8 + Huffman", "uint4 + Huffman"]
    assert rows["uint8"]["bits_per_weight"] == pytest.approx(8, rel=0.01)
    assert rows["uint4"]["bits_per_weight"] == pytest.approx(4, rel=0.01)
    for bits in (4, 8):
        assert rows[f"uint{bits} + Huffman"]["size_bytes"] < 0.85 * rows[f"uint{bits}"]["size_bytes"]
    assert rows["original"]["perplexity"] < rows["uint8"]["perplexity"] < rows["uint4"]["perplexity"]


def test_demo_says_where_to_run_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "--model" in invoke_json("demo", code=1)["error"]["message"]


def test_demo_refuses_a_prompt_that_it_would_not_use() -> None:
    error = invoke_json("demo", "--table", "-p", "Once", code=1)["error"]
    assert error["message"] == "--prompt cannot be given with --table, which generates no text"


def test_info_names_the_instruction_set() -> None:
    facts = invoke_json("info")
    assert facts["isa"] == next(name for name, runs in facts["isas"].items() if runs)
    assert facts["product"]["weights_per_s"] > 1e6
    assert 2.9 < facts["product"]["coded_bits"] < 3.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-kl", 0.1), "--max-kl goes with --calibration"),
        (("--max-kl", 0, "--calibration", "self"), "--max-kl must be above 0 and finite, found 0.0"),
        (("--max-kl", "nan", "--calibration", "self"), "--max-kl must be above 0 and finite, found nan"),
        (("--max-kl", 0.1, "--bpw", 3, "--calibration", "self"), "--max-kl goes with --calibration"),
        (("--calibration", "self", "--bits", 4), "--calibration goes with a size such as --bpw 4.5"),
        (("--bpw", 3, "--tune"), "--tune needs a text: add --calibration FILE or --calibration self"),
        (("--bpw", 3, "--sampled", 9), "--sampled goes with --calibration"),
        (("--bpw", 3, "--device", "cuda"), "--device cuda goes with --calibration"),
        (("--bpw", 3, "--sampled", 0, "--calibration", "self"), "needs a text or at least 8 sampled windows"),
    ],
)
def test_calibration_options_that_do_not_go_together_are_refused(
    arguments: tuple[object, ...], message: str, tmp_path: Path
) -> None:
    result = invoke("compress", MODEL, "-o", tmp_path / "out", *arguments, code=1)
    assert message in " ".join(result.output.split())


def test_a_gpu_without_torch_for_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("compress", MODEL, "-o", tmp_path / "out", "--bpw", 3, "--calibration", "self", "--device", "cuda")
    monkeypatch.setattr("torch.version.cuda", None)
    result = invoke(*arguments, code=1)
    assert "is built without CUDA" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()
