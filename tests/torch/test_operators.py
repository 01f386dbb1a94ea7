"""Products as torch operators: tracing, compiling, gradients, and torch functions that get a coded weight."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

import entrollm.hf
from entrollm.hf import CodedWeight, EntroLinear
from entrollm.torch import operators
from tests.torch.models import difference, ids, logits


@pytest.fixture(scope="module")
def model(coded_untied: Path) -> Any:
    return entrollm.hf.load(coded_untied, dtype=torch.float32)


@pytest.fixture
def layer(model: Any) -> EntroLinear:
    found: EntroLinear = model.model.layers[0].mlp.up_proj
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_keep_their_contracts(layer: EntroLinear, dtype: torch.dtype) -> None:
    number = layer.weight.number
    x = torch.randn(3, 96, dtype=dtype, requires_grad=True)
    # Gradients are checked against the decoded matrix below: the product rounds its input.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operators.linear, (x, number, 128), test_utils=tests)
    torch.library.opcheck(operators.linear_backward, (torch.randn(3, 128, dtype=dtype), number, 96))
    torch.library.opcheck(operators.rows, (torch.tensor([0, 5, 5]), number, 96, dtype))


@pytest.mark.parametrize("backend", ["auto", "plain"])
@pytest.mark.parametrize("shape", [(96,), (2, 96), (2, 3, 96), (0, 96)])
def test_products_take_any_leading_axes(layer: EntroLinear, shape: tuple[int, ...], backend: Any) -> None:
    x = torch.randn(shape)
    expected = functional.linear(x, layer.weight.dequantize(), layer.bias)
    layer.weight.set_backend(backend)
    try:
        found = layer(x)
    finally:
        layer.weight.set_backend("auto")
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-3)


def test_gradient_passes_to_the_input(layer: EntroLinear) -> None:
    x = torch.randn(4, 96, requires_grad=True)
    outer = torch.randn(4, 128)
    layer(x).backward(outer)
    assert x.grad is not None
    assert torch.allclose(x.grad, outer @ layer.weight.dequantize(), atol=1e-5)
    assert not list(layer.weight.parameters())


def test_compiled_model_is_one_graph(model: Any) -> None:
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        found = compiled(ids(), use_cache=False).logits
    assert torch.equal(found, logits(model, ids()))


def test_gradients_and_traces_go_through_operators(layer: EntroLinear) -> None:
    x = torch.randn(2, 96)
    traced = make_fx(lambda x: layer(x) * 2)(x)
    assert torch.ops.entrollm.linear.default in [node.target for node in traced.graph.nodes]
    other = torch.randn(2, 96)
    assert torch.equal(traced(other), layer(other) * 2)
    assert not operators.is_observed(x)
    assert operators.is_observed(x.requires_grad_())
    with torch.no_grad():
        assert not operators.is_observed(x)


def test_whole_model_traces_with_fake_tensors(model: Any) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        found = model(torch.zeros((2, 7), dtype=torch.int64)).logits
    assert tuple(found.shape) == (2, 7, 307)


def test_torch_functions_take_a_coded_weight(layer: EntroLinear) -> None:
    weight, dense = layer.weight, layer.weight.dequantize()
    x, tokens = torch.randn(2, 96), torch.tensor([[0, 127], [3, 3]])
    assert torch.equal(functional.linear(x, weight), layer.weight(x))
    assert torch.equal(functional.linear(x, weight, bias=layer.bias), layer(x))
    assert torch.equal(functional.embedding(tokens, weight, 3), dense[tokens])
    assert torch.equal(torch.matmul(dense.T, weight), dense.T @ dense)
    assert torch.equal(torch.addmm(layer.bias, x, weight.dequantize().T), torch.addmm(layer.bias, x, dense.T))


def test_copies_are_independent(layer: EntroLinear) -> None:
    x = torch.randn(2, 96)
    expected = layer(x)
    clone = copy.deepcopy(layer)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert len({each.weight.number for each in (clone, layer, loaded)}) == 3
    clone.weight.coded.zero_()
    assert torch.equal(loaded(x), expected)
    assert torch.equal(layer(x), expected)


def test_state_of_an_equal_model_can_be_loaded(layer: EntroLinear) -> None:
    x = torch.randn(2, 96)
    clone = copy.deepcopy(layer)
    clone(x)
    for entry in clone.weight.entries().values():
        entry.zero_()
    clone.load_state_dict(layer.state_dict())
    assert torch.equal(clone(x), layer(x))


def test_row_outside_of_an_embedding_is_refused(model: Any) -> None:
    with pytest.raises(IndexError, match="outside of its 307 rows"):
        model(torch.tensor([[307]]))


def test_plain_backend_agrees(coded_untied: Path) -> None:
    model = entrollm.hf.load(coded_untied, dtype=torch.float32)
    expected = logits(model, ids(batch=2))
    entrollm.hf.set_backend(model, "fast")  # which differs on NVIDIA GPUs alone
    assert torch.equal(logits(model, ids(batch=2)), expected)
    entrollm.hf.set_backend(model, "plain")
    assert difference(logits(model, ids(batch=2)), expected) < 1e-3
    with pytest.raises(ValueError, match="backend must be one of auto, fast, plain, found 'quick'"):
        entrollm.hf.set_backend(model, "quick")  # type: ignore[arg-type]


def test_printing_names_the_grid(layer: EntroLinear) -> None:
    assert "CodedWeight(128 x 96, paper-" in str(layer)
    assert isinstance(layer.weight, CodedWeight)
