"""verify accepts what compress wrote and names everything else."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from entrollm import _core
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.compress import CodingOptions, compress_folder
from entrollm.compress.verify import VerifyResult, verify
from entrollm.errors import CorruptStreamError, FormatError
from entrollm.format.reader import CompressedModel
from entrollm.matrix import matrix_of
from tests.support.checkpoints import example_weights, write_checkpoint
from tests.support.folders import MULTI_ROW, change_entries, change_spec, check_all, read_entry, reseal, write_example
from tests.support.paths import GOLDEN

OPTIONS = CodingOptions(bits=4, granularity="row")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model")


@pytest.fixture
def file(checkpoint: Path, tmp_path: Path) -> Path:
    compress_folder(checkpoint, tmp_path / "out", OPTIONS)
    return tmp_path / "out" / "model.safetensors"


def check(file: Path, original: Path | None = None) -> VerifyResult:
    with CompressedModel.open(file.parent) as model:
        return verify(model, _core.ThreadPool(2), None if original is None else Checkpoint.open(original))


def test_what_was_written_is_accepted(checkpoint: Path, file: Path) -> None:
    weights = example_weights()
    matrices = [array for array in weights.values() if array.ndim == 2 and array.size]
    result = VerifyResult(len(matrices), len(weights) - len(matrices), sum(a.size for a in matrices), False)
    assert check(file) == result
    assert check(file, checkpoint).compared


def test_progress_reaches_the_whole(file: Path) -> None:
    seen: list[tuple[float, float]] = []
    with CompressedModel.open(file.parent) as model:
        result = verify(model, _core.ThreadPool(1), None, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (result.weights, result.weights)
    assert sorted(seen) == seen


@pytest.mark.parametrize("name", ["head.weight.coded", "layers.1.bias"])
def test_a_flipped_bit_is_found(file: Path, name: str) -> None:
    content = read_entry(file, name, np.uint8)
    content[5] ^= 4
    if name == "layers.1.bias":
        change_entries(file, {name: ("F32", content.view(np.float32))})
    else:
        change_entries(file, {name: ("U8", content)})
    with pytest.raises(CorruptStreamError, match="have CRC-32"):
        check(file)


def test_padding_is_zero(file: Path) -> None:
    name = "head.weight"
    content = read_entry(file, f"{name}.coded", np.uint8)
    content[-1] = 1
    change_entries(file, {f"{name}.coded": ("U8", content)})
    reseal(file, name)
    check_all(file.parent)
    with pytest.raises(CorruptStreamError, match=f"{name}: the padding at the end of its entry is not zero"):
        check(file)


def store_zeros_in_bits(file: Path, place: int) -> str:
    """Give the matrix of zeros a code with a dense stream of 40 bytes, all zero but the one at `place`."""
    name = "layers.1.zero.weight"
    with CompressedModel.open(file.parent) as model:
        side = (model.specs[name].parts or (0, 0, 0))[2]
    change_spec(file, name, code={"bits": 1, "symbols": [0, 0]}, parts=[64, 0, side])
    dense = np.zeros(64, np.uint8)
    dense[place] = 1
    change_entries(
        file, {name + ".coded": ("U8", np.concatenate([dense, read_entry(file, name + ".coded", np.uint8)]))}
    )
    reseal(file, name)
    return name


def test_padding_of_the_dense_stream_is_zero(file: Path) -> None:
    name = store_zeros_in_bits(file, 63)
    with pytest.raises(CorruptStreamError, match=f"{name}: the padding after its dense stream is not zero"):
        check(file)


@pytest.mark.parametrize("suffix", ["dense", "sparse"])
def test_padding_of_version_1_is_zero(tmp_path: Path, suffix: str) -> None:
    file = write_example(tmp_path / "one") / "model.safetensors"
    check(file)
    content = read_entry(file, f"{MULTI_ROW}.{suffix}", np.uint8)
    content[-1] = 1
    change_entries(file, {f"{MULTI_ROW}.{suffix}": ("U8", content)})
    reseal(file, MULTI_ROW)
    with pytest.raises(CorruptStreamError, match=f"the padding after its {suffix} stream is not zero"):
        check(file)


def test_symbols_that_the_code_stores_otherwise_are_refused(file: Path) -> None:
    """A code may name a symbol twice; only the first place is how the encoder writes it."""
    store_zeros_in_bits(file, 0)
    with pytest.raises(CorruptStreamError, match="encoding its integers again gives other bytes in dense, near row 0"):
        check(file)


def test_other_integers_than_the_originals_are_refused(file: Path, checkpoint: Path) -> None:
    name = "layers.1.zero.weight"
    change_spec(file, name, code=1)
    reseal(file, name)
    check(file)
    with pytest.raises(FormatError, match=f"{name}: quantizing the original again gives other integers, from row 0"):
        check(file, checkpoint)


def test_another_error_than_the_stored_one_is_refused(file: Path, checkpoint: Path) -> None:
    name = "head.weight"
    change_spec(file, name, error=0.5)
    reseal(file, name)
    check(file)
    with pytest.raises(FormatError, match=rf"{name}: its error against the original is 0\.\d+, stored 0\.500000"):
        check(file, checkpoint)


def test_another_original_is_refused(file: Path, tmp_path: Path) -> None:
    weights = example_weights()
    del weights["head.weight"]
    other = write_checkpoint(tmp_path / "other", weights)
    with pytest.raises(
        FormatError, match=r"tensor 'head\.weight' is only in .*out; .* was made from another checkpoint"
    ):
        check(file, other)
    weights = example_weights() | {"more.weight": np.ones((2, 2), np.float32)}
    with pytest.raises(FormatError, match=r"tensor 'more\.weight' is only in .*more; "):
        check(file, write_checkpoint(tmp_path / "more", weights))
    weights = example_weights()
    weights["head.weight"] = weights["head.weight"].reshape(96, 200)
    with pytest.raises(FormatError, match=r"head\.weight: the original has shape \(96, 200\), not \(200, 96\)"):
        check(file, write_checkpoint(tmp_path / "shape", weights))
    weights = example_weights()
    weights["layers.1.bias"][3] += 1
    with pytest.raises(FormatError, match=r"layers\.1\.bias: the kept tensor differs from the original"):
        check(file, write_checkpoint(tmp_path / "bias", weights))


def test_buffers_that_only_the_original_has_are_no_difference(file: Path, tmp_path: Path) -> None:
    """transformers drops buffers such as position_ids when it saves a model."""
    buffers = {
        "embeddings.position_ids": np.arange(8)[None],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    original = write_checkpoint(tmp_path / "with-buffers", {**example_weights(), **buffers})
    assert check(file, original).left_out == tuple(buffers)
    original = write_checkpoint(tmp_path / "with-more", {**example_weights(), "embeddings.weight_ids": np.arange(8)})
    with pytest.raises(FormatError, match=r"'embeddings\.weight_ids' is only in .*with-more"):
        check(file, original)


@pytest.mark.parametrize("folder", ["v1-groups", "v2-trellis"])
def test_other_matrices_with_the_name_of_a_paper_grid_are_compared_as_they_are(folder: str, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / folder, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    with CompressedModel.open(file.parent) as model:
        pool = _core.ThreadPool(1)
        rows = {name: np.arange(spec.rows) for name, spec in model.specs.items()}
        original = {name: matrix_of(model, name).dequantize(rows[name], pool) for name in rows}
    for name in original:
        change_spec(file, name, grid="paper-asymmetric-4")
        reseal(file, name)
    result = check(file, write_checkpoint(tmp_path / "original", original))
    assert result.compared and result.matrices == len(original)
