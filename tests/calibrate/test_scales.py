"""Scales that move, below integers that stay."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from entrollm.calibrate.scales import MovingScales
from entrollm.compress import CodingOptions, Target, compress_folder
from entrollm.format.reader import CompressedModel
from entrollm.matrix import matrix_of
from entrollm.threads import start_pool
from tests.support.checkpoints import write_random_llama


def test_scales_move_below_a_trellis(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    source = write_random_llama(tmp_path / "source", layers=1, tied=True)
    compress_folder(source, tmp_path / "out", CodingOptions(target=Target(bits_per_weight=4.0), trellis=True))
    with CompressedModel.open(tmp_path / "out") as model:
        scales, name = MovingScales(model, threads=1), "model.layers.0.mlp.down_proj.weight"
        before = scales.weight(name)
        np.testing.assert_array_equal(before, matrix_of(model, name).dequantize(np.arange(64), start_pool(1)))
        scales.values[name + ".scale"] *= 2
        np.testing.assert_allclose(scales.weight(name), 2 * before, rtol=1e-5, atol=1e-6)
