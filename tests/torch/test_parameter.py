"""Coded weights where a model's code uses a parameter as a tensor."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import entrollm.hf
from entrollm.errors import UnsupportedError
from entrollm.torch.layers import EntroLinear
from entrollm.torch.parameter import Transposed
from entrollm.torch.weight import CodedWeight


@pytest.fixture
def weight(coded: Path) -> CodedWeight:
    layer = entrollm.hf.load(coded, dtype=torch.float32).model.layers[0].mlp.up_proj
    assert isinstance(layer, EntroLinear)
    return layer.weight


READS: dict[str, Callable[[Any, Tensor], Any]] = {
    "x @ w.T": lambda w, x: operator.matmul(x, w.T),
    "x @ w.t()": lambda w, x: torch.matmul(x, w.t()),
    "mm of w.transpose": lambda w, x: torch.mm(x, w.transpose(0, 1)),
    "w.transpose(-1, -2)": lambda w, x: torch.matmul(x, w.transpose(-1, -2)),
    "w.transpose(0, 0)": lambda w, x: w.transpose(0, 0) + 0,
    "w.T * 2": lambda w, x: w.T * 2,
    "w.T.contiguous()": lambda w, x: w.T.contiguous(),
    "w.T[3:5]": lambda w, x: w.T[3:5],
    "addmm of w.T": lambda w, x: torch.addmm(torch.ones(128), x, w.T),
    "w @ x.T": lambda w, x: w @ x.T,
    "1 - w": lambda w, x: 1 - w,
    "w / 3 + x[0]": lambda w, x: w / 3 + x[0],
    "-w": lambda w, x: -w,
    "w > 0": lambda w, x: w > 0,
    "w[5]": lambda w, x: w[5],
    "w[-1]": lambda w, x: w[-1],
    "w[2:9:3]": lambda w, x: w[2:9:3],
    "w[ids]": lambda w, x: w[torch.tensor([[3, 1], [0, -1]])],
    "w[mask]": lambda w, x: w[torch.arange(128) > 120],
    "w[:, 3]": lambda w, x: w[:, 3],
    "w[:, None]": lambda w, x: w[:, None],
    "w.unsqueeze(-1)": lambda w, x: w.unsqueeze(-1),
    "w.chunk": lambda w, x: torch.cat(w.chunk(4)),
    "w.view": lambda w, x: w.view(2, 64, 96),
    "cat of a list": lambda w, x: torch.cat([w, x]),
    "rows by iteration": lambda w, x: torch.stack(list(w)),
    "einsum": lambda w, x: torch.einsum("bi,oi->bo", x, w),
    "conv2d": lambda w, x: torch.nn.functional.conv2d(x[:, :, None, None], w.unsqueeze(-1).unsqueeze(-1)),
    "w.detach().clone()": lambda w, x: w.detach().clone(),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_it_reads_as_a_tensor(weight: CodedWeight, read: Callable[[Any, Tensor], Any]) -> None:
    x = torch.randn(7, 96, generator=torch.Generator().manual_seed(1))
    expected = read(weight.dequantize(), x)
    torch.testing.assert_close(read(weight, x), expected, rtol=1e-4, atol=1e-4)


def test_a_product_with_the_transposed_does_not_decode(weight: CodedWeight, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 96)
    expected = weight(x)
    monkeypatch.setattr(CodedWeight, "dequantize", None)
    assert isinstance(weight.T, Transposed) and weight.T.shape == (96, 128)
    assert torch.equal(torch.matmul(x, weight.T), expected)  # type: ignore[arg-type]
    assert torch.equal(weight[:4], weight.rows(torch.arange(4)))
    facts = weight.size(), weight.size(0), weight.dim(), weight.ndim, weight.numel(), len(weight)
    assert facts == (torch.Size((128, 96)), 128, 2, 2, 128 * 96, 128)
    assert weight.is_floating_point() and not weight.requires_grad and weight.element_size() == 4


def test_what_tensors_lack_is_missing(weight: CodedWeight) -> None:
    for name in ("SCB", "quant_state", "weight_scale", "_metadata"):
        assert not hasattr(weight, name) and not hasattr(weight.T, name)
    with pytest.raises(AttributeError, match="has no attribute 'quant_state'"):
        _ = weight.quant_state


def _set(w: Any) -> None:
    w[3] = 0


def _add(w: Any) -> None:
    w += 1


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.data,
        lambda w: w.T.data,
        lambda w: w.copy_(torch.zeros(128, 96)),
        lambda w: w.T.zero_(),
        lambda w: w.mul_(torch.ones(96)),
        lambda w: torch.nn.init.zeros_(w),
        _set,
        _add,
    ],
)
def test_changes_in_place_are_refused_and_name_what_to_keep(weight: CodedWeight, change: Callable[[Any], Any]) -> None:
    before = weight.dequantize()
    expected = rf"{weight.name}: the model uses \w+ of this weight.*keep=\['{weight.name}'\]"
    with pytest.raises(UnsupportedError, match=expected):
        change(weight)
    assert torch.equal(weight.dequantize(), before)


def test_it_can_be_multiplied_with_a_number(coded: Path, tmp_path: Path) -> None:
    model = entrollm.hf.load(coded, dtype=torch.float32)
    layer = model.model.layers[0].mlp.up_proj
    x, ids = torch.randn(3, 96), torch.tensor([5, 0])
    before, rows, whole = layer(x), layer.weight.rows(ids), layer.weight.dequantize()
    assert layer.weight.div_(4) is layer.weight
    assert torch.equal(layer(x), before / 4)
    assert torch.equal(layer.weight.rows(ids), rows / 4)
    assert torch.equal(layer.weight.dequantize(), whole / 4)
    assert torch.equal(copy.deepcopy(layer)(x), before / 4)
    with pytest.raises(UnsupportedError, match=r"up_proj.weight was multiplied with 0\.25 in place since"):
        model.save_pretrained(tmp_path)
    layer.weight *= torch.tensor(4.0)
    assert torch.equal(layer(x), before)
    model.save_pretrained(tmp_path)
