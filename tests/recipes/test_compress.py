"""The whole way from Python: what it writes, what it reports, and that it is what the command does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import entrollm
from entrollm import CompressOptions, CompressResult, EntroLLMError, OptionError, load
from entrollm.cli.console import describe_error
from entrollm.cli.main import app
from entrollm.compress import CodingOptions, compress_folder
from entrollm.evaluate import Windows, evaluate
from entrollm.recipes import Stage
from entrollm.recipes.search import Trial
from tests.support.checkpoints import write_checkpoint, write_random_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One random layer."""
    return write_random_llama(tmp_path_factory.mktemp("model"), layers=1, tied=True)


class Recorded:
    """Keeps what is reported."""

    def __init__(self) -> None:
        self.stages: dict[Stage, tuple[float, float]] = {}
        self.trials: list[Trial] = []

    def advance(self, stage: Stage, done: float, total: float) -> None:
        if stage not in self.stages or done >= self.stages[stage][0]:
            self.stages[stage] = done, total

    def tried(self, trial: Trial) -> None:
        self.trials.append(trial)


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def by_command(model: Path, out: Path, *arguments: str) -> dict[str, object]:
    result = CliRunner().invoke(app, ["compress", str(model), "-o", str(out), *arguments, "--json"])
    assert result.exit_code == 0, result.output
    found: dict[str, object] = json.loads(result.stdout)
    return found


def test_grids_are_those_of_the_folder_compressor(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model")
    reported = Recorded()
    result = entrollm.compress(checkpoint, tmp_path / "out", CompressOptions(bits=5), progress=reported)
    compress_folder(checkpoint, tmp_path / "folder", CodingOptions(bits=5))
    assert files(tmp_path / "out") == files(tmp_path / "folder")
    assert isinstance(result, CompressResult)
    assert (result.tuning, result.search) == (None, None)
    assert not {"tuning", "search", "kl", "trials"} & result.to_json().keys()
    assert reported.stages == {"compressing": (result.quantized_weights, result.quantized_weights)}


def test_a_calibrated_and_tuned_model_is_that_of_the_command(model: Path, tmp_path: Path) -> None:
    options = CompressOptions(bpw=3.0, calibration="self", sampled=16, tune=True, threads=1)
    reported = Recorded()
    result = entrollm.compress(model, tmp_path / "python", options, progress=reported)
    arguments = ("--bpw", "3.0", "--calibration", "self", "--sampled", "16", "--tune", "--threads", "1")
    found = by_command(model, tmp_path / "command", *arguments)
    assert files(tmp_path / "python") == files(tmp_path / "command")
    assert list(reported.stages) == ["writing", "calibrating", "compressing", "tuning"]
    assert all(done == total for done, total in reported.stages.values())
    tuned = result.tuning
    assert tuned is not None and tuned.kl_after < tuned.kl_before
    assert found["tuning"]["kl_after"] == tuned.kl_after  # type: ignore[index]
    assert result.to_json()["tuning"]["is_kept"] == result.is_refitted
    assert result.file_bits == pytest.approx(3, rel=0.005)


def test_the_search_is_that_of_the_command(model: Path, tmp_path: Path) -> None:
    options = CompressOptions(max_kl=0.3, calibration="self", sampled=8, threads=1)
    reported = Recorded()
    result = entrollm.compress(model, tmp_path / "python", options, progress=reported)
    arguments = ("--max-kl", "0.3", "--calibration", "self", "--sampled", "8", "--threads", "1")
    found = by_command(model, tmp_path / "command", *arguments)
    assert files(tmp_path / "python") == files(tmp_path / "command")
    assert result.search is not None and result.search.divergence.mean <= result.search.max_kl == 0.3
    assert result.search.trials == tuple(reported.trials)
    assert found["kl"] == result.to_json()["kl"]
    assert "tuning" not in found


def test_another_seed_writes_another_text(model: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        options = CompressOptions(bpw=3.0, calibration="self", sampled=8, seed=seed, threads=1)
        entrollm.compress(model, tmp_path / str(seed), options)
    shards = [(tmp_path / str(seed) / "model.safetensors").read_bytes() for seed in (0, 1)]
    assert shards[0] != shards[1]


def test_calibration_pays(model: Path, tmp_path: Path) -> None:
    plain = CompressOptions(bpw=4.0, threads=1)
    steered = CompressOptions(bpw=4.0, calibration="self", sampled=32, threads=1)
    windows = Windows(np.random.default_rng(8).integers(0, 512, (6, 64)), 1, 1)
    found = []
    for name, options in (("plain", plain), ("steered", steered)):
        entrollm.compress(model, tmp_path / name, options)
        evaluations, _ = evaluate([load(tmp_path / name)], windows, load(model))
        assert evaluations[0].divergence is not None
        found.append(evaluations[0].divergence.mean)
    assert found[1] < 0.9 * found[0]


def test_an_input_that_changes_after_calibration_is_an_error(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*args: object, **kwargs: object) -> object:
        os.utime(model / "model.safetensors", (1, 1))
        return compress_folder(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("entrollm.recipes.calibrated.compress_folder", late)
    options = CompressOptions(bpw=4.0, calibration="self", sampled=8, threads=1)
    with pytest.raises(EntroLLMError, match=r"model\.safetensors changed while it was calibrated; run the command"):
        entrollm.compress(model, tmp_path / "out", options)
    assert list(tmp_path.iterdir()) == []


def test_files_of_others_are_refused_before_calibration(model: Path, tmp_path: Path) -> None:
    entrollm.compress(model, tmp_path / "out", CompressOptions(bits=8, measure=False))
    (tmp_path / "out" / "notes.txt").write_text("mine")
    reported = Recorded()
    with pytest.raises(ValueError, match=r"would delete: notes\.txt; move or remove them"):
        options = CompressOptions(bpw=3.0, calibration="self")
        entrollm.compress(model, tmp_path / "out", options, overwrite=True, progress=reported)
    assert not reported.stages


def test_an_existing_output_is_refused_before_calibration(model: Path, tmp_path: Path) -> None:
    entrollm.compress(model, tmp_path / "out")
    reported = Recorded()
    with pytest.raises(OptionError, match="pass overwrite=True to replace it"):
        options = CompressOptions(bpw=3.0, calibration="self")
        entrollm.compress(model, tmp_path / "out", options, progress=reported)
    assert not reported.stages


def test_a_missing_torch_is_named(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("entrollm.recipes.calibrated", "entrollm.recipes.device"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "entrollm.torch.device", None)
    options = CompressOptions(bpw=3.0, calibration="self")
    with pytest.raises(OptionError, match=r"^calibration needs entrollm\.torch\.device, which is not") as raised:
        entrollm.compress(model, tmp_path / "out", options)
    shown = describe_error(raised.value)
    assert shown.startswith("--calibration needs entrollm.torch.device, which is not installed")
    assert shown.endswith("; install torch and transformers with: pip install 'entrollm[hf]'")


def test_what_needs_no_calibration_needs_no_torch(model: Path, tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "sys.modules |= dict.fromkeys(('torch', 'transformers', 'accelerate'))\n"
        "import entrollm\n"
        "from entrollm import CompressOptions, compress, plan\n"
        "source, out = sys.argv[1:]\n"
        "for name, options in {'a': {'bits': 4}, 'b': {'bpw': 4.0}, 'c': {'lossless': True}}.items():\n"
        "    compress(source, f'{out}/{name}', CompressOptions(**options))\n"
        "    entrollm.load(f'{out}/{name}').logits([1, 2])\n"
        "plan(source, CompressOptions(bpw=4.0))\n"
    )
    subprocess.run([sys.executable, "-c", program, str(model), str(tmp_path)], check=True, timeout=120)


def test_a_plan_is_that_of_the_command(model: Path) -> None:
    planned = entrollm.plan(model, CompressOptions(bpw=4.0))
    result = CliRunner().invoke(app, ["plan", str(model), "--bpw", "4.0", "--json"])
    found = json.loads(result.stdout)
    assert found["file_bytes"] == planned.file_bytes
    assert [tensor["name"] for tensor in found["tensors"]] == [tensor.name for tensor in planned.tensors]


def test_importing_the_package_imports_little() -> None:
    program = (
        "import sys, entrollm\n"
        "heavy = ('numpy', 'torch', 'transformers', 'tokenizers', 'huggingface_hub', 'rich', 'entrollm._core')\n"
        "assert not [name for name in heavy if name in sys.modules], sys.modules.keys()\n"
        "assert callable(entrollm.compress) and {'load', 'Model'} <= set(dir(entrollm))\n"
        "import entrollm.compress.pipeline\n"
        "assert entrollm.compress.__module__ == 'entrollm.recipes.compress'\n"
        "assert entrollm.load.__module__ == 'entrollm.engine.load'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_name_that_the_package_lacks_is_named() -> None:
    with pytest.raises(AttributeError, match="module 'entrollm' has no attribute 'decompress'"):
        _ = entrollm.decompress  # type: ignore[attr-defined]
