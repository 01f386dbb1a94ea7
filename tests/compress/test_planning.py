"""The plan of a checkpoint: what is coded, kept and imported, and in which file."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.cli.console import describe_error
from entrollm.compress import CodingOptions, Target
from entrollm.compress.planning import make_plan
from entrollm.errors import OptionError
from entrollm.quantize.select import BitsOverride
from tests.checkpoint.imported.test_gptq import config, packer
from tests.support.checkpoints import write_checkpoint
from tests.support.quantized_sources import LINEARS, write_source

WEIGHTS = {
    "b.weight": np.ones((4, 8), np.float32),
    "norm.weight": np.ones(8, np.float32),
    "a.weight": np.ones((2, 8), np.float32),
    "empty.weight": np.ones((0, 8), np.float32),
    "layers.0.experts.up_proj": np.ones((2, 3, 8), np.float32),
}
MEMBERS = ("layers.0.experts.up_proj.0", "layers.0.experts.up_proj.1")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", WEIGHTS)


def test_matrices_are_coded_and_the_rest_is_kept(source: Path) -> None:
    with Checkpoint.open(source) as checkpoint:
        plan = make_plan(checkpoint, CodingOptions(overrides=[BitsOverride("a.*", None)]))
    assert set(plan.coded) == {"b.weight", *MEMBERS}
    assert set(plan.kept) == {"norm.weight", "a.weight", "empty.weight"}
    assert set(plan.tensors) == {*plan.coded, *plan.kept}
    assert plan.shards == (tuple(plan.tensors),)
    assert not plan.imported


def test_an_order_comes_first(source: Path) -> None:
    with Checkpoint.open(source) as checkpoint:
        rest = tuple(make_plan(checkpoint, CodingOptions()).tensors)
    with Checkpoint.open(source) as checkpoint:
        order = (MEMBERS[1], "a.weight", "absent")
        plan = make_plan(checkpoint, CodingOptions(), order)
    assert tuple(plan.tensors)[:2] == order[:2]
    assert tuple(plan.tensors)[2:] == tuple(name for name in rest if name not in order)
    assert plan.coded[:2] == order[:2]


def test_shards_hold_consecutive_tensors_that_fit(source: Path) -> None:
    with Checkpoint.open(source) as checkpoint:
        plan = make_plan(checkpoint, CodingOptions(shard_bytes=100))
        sizes = [[checkpoint.tensors[name].size_bytes for name in shard] for shard in plan.shards]
    assert tuple(name for shard in plan.shards for name in shard) == tuple(plan.tensors)
    assert len(plan.shards) > 1 and all(sum(shard) <= 100 or len(shard) == 1 for shard in sizes)
    for shard, after in itertools.pairwise(sizes):
        assert sum(shard) + after[0] > 100


def test_a_plan_for_some_matrices_keeps_the_others(source: Path) -> None:
    with Checkpoint.open(source) as checkpoint:
        plan = make_plan(checkpoint, CodingOptions(shard_bytes=100)).coding(["b.weight"])
    assert plan.coded == ("b.weight",)
    assert set(plan.kept) == set(plan.tensors) - {"b.weight"}
    assert len(plan.shards) == 1


def test_quantized_matrices_are_imported(tmp_path: Path) -> None:
    write_source(tmp_path / "source", config(4, 128), packer(4, 128))
    with Checkpoint.open(tmp_path / "source") as checkpoint:
        plan = make_plan(checkpoint, CodingOptions())
        assert set(plan.imported) == {name + ".weight" for name in LINEARS} == set(plan.coded)
        assert all(plan.tensors[name].is_imported for name in plan.coded)
        assert "lm_head.weight" in plan.kept
        with pytest.raises(ValueError, match="is quantized already"):
            make_plan(checkpoint, CodingOptions(target=Target(bits_per_weight=3.0)))
        with pytest.raises(OptionError, match="its integers are kept: leave out trellis, which rounds") as raised:
            make_plan(checkpoint, CodingOptions(trellis=True))
        assert describe_error(raised.value).endswith("leave out --trellis, which rounds")
