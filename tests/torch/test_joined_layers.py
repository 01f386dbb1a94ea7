"""Layers that get the same input multiply in one launch: found by watching, and equal to products made apart."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from transformers import AutoModelForSeq2SeqLM, CompileConfig

import entrollm.hf
from entrollm.hf import CodedWeight, EntroLinear
from entrollm.torch import joined_layers, operators
from tests.torch.models import ids, logits, write_coded

LAYERS = 2
# Products of a token by a Llama: QKV, output, gate and up, down; and the head.
PRODUCTS = 4 * LAYERS + 1
PRODUCTS_APART = 7 * LAYERS + 1


@pytest.fixture
def model(coded_untied: Path) -> Any:
    return entrollm.hf.load(coded_untied, dtype=torch.float32)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Rows of every product that is made outside of operators."""
    made: list[int] = []
    multiply = operators.multiply

    def counted(x: Tensor, coded: Any) -> Tensor:
        made.append(coded.matrix().shape[0])
        return multiply(x, coded)

    monkeypatch.setattr(operators, "multiply", counted)
    yield made


def attention(model: Any) -> tuple[EntroLinear, ...]:
    found = model.model.layers[0].self_attn
    return found.q_proj, found.k_proj, found.v_proj


def call(layers: Any, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [layer(x) for layer in layers]


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(map(torch.equal, found, expected))


def test_the_second_call_multiplies_once_for_each_group(model: Any, products: list[int]) -> None:
    tokens = ids(3)
    apart = logits(model, tokens)
    assert len(products) == PRODUCTS_APART
    products.clear()
    assert torch.equal(logits(model, tokens), apart)
    assert len(products) == PRODUCTS
    assert products[:2] == [96 + 32 + 32, 96]


@pytest.mark.parametrize("shape", [(96,), (1, 1, 96), (2, 4, 96), (3, 3, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_equal_those_made_apart(
    model: Any, products: list[int], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    layers = attention(model)
    x = torch.randn(shape).to(dtype)
    expected = call(layers, x)
    products.clear()
    found = call(layers, x)
    assert equal(found, expected)
    assert all(a.is_contiguous() and a.dtype == b.dtype for a, b in zip(found, expected, strict=True))
    assert len(products) == (1 if x.numel() <= 8 * 96 else 3)


def test_products_are_only_for_the_tensor_they_were_made_of(model: Any) -> None:
    q, k, v = attention(model)
    x, other = torch.randn(1, 96), torch.randn(1, 96)
    expected, of_other = call((q, k, v), x), call((q, k, v), other)
    for order in ((2, 1, 0), (1, 0, 2), (0, 0, 1, 1, 2), (2, 0, 2, 2)):
        assert equal(call([(q, k, v)[i] for i in order], x), [expected[i] for i in order])
    with torch.no_grad():
        assert torch.equal(q(x), expected[0])
        assert torch.equal(k(other), of_other[1])
        assert torch.equal(v(x.clone()), expected[2])
        q(x)
        x.copy_(other)
        assert torch.equal(k(x), of_other[1])


def test_an_input_that_is_written_to_between_the_calls_makes_no_group(model: Any) -> None:
    q, k, v = attention(model)
    x = torch.randn(1, 96)
    for _ in range(3):
        with torch.no_grad():
            q(x)
            expected = torch.nn.functional.linear(x.mul_(2), k.weight.dequantize(), k.bias)
            assert torch.allclose(k(x), expected, atol=1e-3)
            v(x.mul_(0.5))


def test_nothing_is_kept_once_all_have_come(model: Any) -> None:
    layers = attention(model)
    call(layers, torch.randn(1, 96))
    x = torch.randn(1, 96)
    found = call(layers, x)
    references = [weakref.ref(tensor) for tensor in (x, *found)]
    del x, found
    gc.collect()
    assert [reference() for reference in references] == [None] * 4


def test_the_next_group_lets_go_of_what_is_left(model: Any) -> None:
    layers, mlp = attention(model), model.model.layers[0].mlp
    x = torch.randn(1, 96)
    expected = call(layers, x)
    of_mlp = call((mlp.gate_proj, mlp.up_proj), x)
    call(layers[:1], x)
    assert equal(call((mlp.gate_proj,), x), of_mlp[:1])
    assert equal(call(layers[1:], x), expected[1:])
    reference = weakref.ref(x)
    assert equal(call((mlp.up_proj,), x), of_mlp[1:])
    del x
    assert reference() is None


def test_products_that_nobody_comes_for_end_the_group(model: Any, products: list[int]) -> None:
    q, k, v = attention(model)
    x = torch.randn(1, 96)
    expected = call((q, k, v), x)
    for _ in range(10):
        assert equal(call((q,), x), expected[:1])
    products.clear()
    assert equal(call((q, k, v), x), expected)
    assert products == [96, 32, 32]


def test_gradients_and_inference_mode_multiply_apart(model: Any) -> None:
    layers = attention(model)
    x = torch.randn(1, 96)
    expected = call(layers, x)
    found = [layer(x.requires_grad_()) for layer in layers]
    assert all(torch.allclose(a, b, atol=1e-6) and a.requires_grad for a, b in zip(found, expected, strict=True))
    with torch.inference_mode():
        inner = x.detach().clone()
        assert equal([layer(inner) for layer in layers], expected)


def test_copies_and_other_backends(model: Any, products: list[int]) -> None:
    tokens = ids(1)
    logits(model, tokens)
    expected = logits(model, tokens)
    clone = copy.deepcopy(model)
    entrollm.hf.set_backend(model, "plain")
    products.clear()
    assert torch.equal(logits(clone, tokens), expected)
    assert len(products) == PRODUCTS
    assert torch.allclose(logits(model, tokens), expected, atol=1e-3)
    entrollm.hf.set_backend(model, "auto")
    assert torch.equal(logits(model, tokens), expected)


def test_a_layer_is_saved_while_it_is_watched(model: Any) -> None:
    q, k, v = attention(model)
    x = torch.randn(1, 96)
    expected = call((q,), x)
    buffer = io.BytesIO()
    torch.save(q, buffer)
    buffer.seek(0)
    assert equal(call((torch.load(buffer, weights_only=False),), x), expected)
    call((k, v), x)


def test_threads_share_a_model(model: Any) -> None:
    tokens = [ids(1, seed=seed) for seed in range(4)]
    logits(model, tokens[0])
    expected = [logits(model, each) for each in tokens]
    with ThreadPoolExecutor(4) as executor:
        found = list(executor.map(lambda i: logits(model, tokens[i % 4]), range(40)))
    assert all(torch.equal(each, expected[i % 4]) for i, each in enumerate(found))


class Backend:
    """A backend of torch.compile that runs graphs as they are, and notes how many products each has."""

    def __init__(self) -> None:
        self.products: list[int] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        products = [node for node in graph.graph.nodes if node.target is torch.ops.entrollm.linear.default]
        self.products.append(len(products))
        return aot_eager(graph, inputs)

    def __deepcopy__(self, memo: Any) -> Backend:
        return self


def test_compiled_code_has_one_product_for_each_group(model: Any) -> None:
    tokens = ids(1)
    logits(model, tokens)
    backend = Backend()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        found = [compiled(tokens, use_cache=False).logits for _ in range(3)]
    assert equal(found, [logits(model, tokens)] * 3)
    assert backend.products == [PRODUCTS]


def test_a_copy_compiles_to_products_of_its_own(model: Any) -> None:
    tokens = ids(1)
    expected = logits(model, tokens)
    backend = Backend()
    copied = copy.deepcopy(model)
    numbers = {weight.number for weight in model.modules() if isinstance(weight, CodedWeight)}
    copies = [weight for weight in copied.modules() if isinstance(weight, CodedWeight)]
    sources = [joined_layers._source_of(weight.number) for weight in copies]
    assert len(sources) == len(numbers) and not numbers & {number for number, _, _ in sources}
    compiled = torch.compile(copied, backend=backend, fullgraph=True)
    with torch.no_grad():
        found = compiled(tokens, use_cache=False).logits
    assert equal([found], [expected])
    assert backend.products == [PRODUCTS]
    # A matrix whose joined layers are gone multiplies alone.
    (query,) = [layer for name, layer in copied.named_modules() if name.endswith("0.self_attn.q_proj")]
    weight = query.weight
    assert len(joined_layers._source_of(weight.number)[2]) > 1
    del copied, copies, compiled, query
    torch._dynamo.reset()
    gc.collect()
    assert joined_layers._source_of(weight.number) == (weight.number, 0, (weight.spec.rows,))


def test_static_cache_is_compiled_once(model: Any) -> None:
    backend = Backend()
    config = CompileConfig(backend=backend, mode=None, fullgraph=True)
    config._compile_all_devices = True

    def greedy(count: int, **options: Any) -> Tensor:
        tokens = ids(count)
        found: Tensor = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count + 3, do_sample=False, **options
        )
        return found

    for count in (5, 9, 7):
        found = greedy(count, cache_implementation="static", max_cache_len=32, compile_config=config)
        assert torch.equal(found, greedy(count))
    assert backend.products == [PRODUCTS]


def test_compiling_without_a_look_at_every_module(model: Any) -> None:
    config = entrollm.hf.compile_config()
    backend = Backend()

    def compiled(*arguments: Any, options: dict[str, Any]) -> Any:
        assert options == {"triton.cudagraphs": True}  # torch keeps the filter of guards to itself
        return backend(*arguments)

    config.backend = compiled
    config._compile_all_devices = True
    tokens = ids(5)
    for _ in range(2):
        found = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=8,
            do_sample=False,
            cache_implementation="static",
            compile_config=config,
        )
        expected = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False)
        assert torch.equal(found, expected)
    assert backend.products == [PRODUCTS]


@pytest.fixture(scope="module")
def translator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    options = {**sizes, "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu"}
    return write_coded(tmp_path_factory.mktemp("t5"), config="T5Config", kind="AutoModelForSeq2SeqLM", **options)


def test_cross_attention_shares_what_has_one_input(translator: Path) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(translator, dtype=torch.float32)
    source, target = ids(6), ids(1)

    def answer() -> Tensor:
        with torch.no_grad():
            found: Tensor = model(input_ids=source, decoder_input_ids=target).logits
        return found

    expected = answer()
    assert all(torch.equal(answer(), expected) for _ in range(5))
    own, cross = (model.decoder.block[0].layer[i] for i in (0, 1))

    assert own.SelfAttention.q.joining is own.SelfAttention.v.joining is not None
    assert cross.EncDecAttention.q.joining is None
    assert cross.EncDecAttention.k.joining is cross.EncDecAttention.v.joining is not None


def test_the_parts_of_an_expert_are_multiplied_at_once(tmp_path: Path, products: list[int]) -> None:
    options = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}
    model = entrollm.hf.load(write_coded(tmp_path, config="Qwen3MoeConfig", **options), dtype=torch.float32)
    stack = model.model.layers[0].mlp.experts.gate_up_proj
    x = torch.randn(2, 96)
    expected = torch.cat([part(x) for part in stack.parts(1)], dim=-1)
    products.clear()
    assert torch.equal(stack.multiply(1, x), expected)
    assert products == [128]
