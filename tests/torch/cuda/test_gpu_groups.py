"""The CUDA kernels for group scales against the format's reference and float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import entrollm.hf
from entrollm import _core, compress
from entrollm.format.reader import CompressedModel
from entrollm.matrix import matrix_of
from entrollm.torch.cuda.grouped import GroupedCudaMatrix, GroupedFields
from entrollm.torch.entries import to_tensor
from entrollm.torch.weight import CodedWeight
from tests.checkpoint.imported.test_gptq import config, packer
from tests.support.gguf_sources import write_gguf
from tests.support.paths import GOLDEN
from tests.support.quantized_sources import write_source
from tests.torch.cuda.gpu_checks import check_in_graph
from tests.torch.cuda.groups import KINDS, random_groups

DEVICE = torch.device("cuda", 0)
SHAPES = [(16, 64), (1, 500), (300, 1056), (5000, 2048), (40, 14336)]

pytestmark = pytest.mark.usefixtures("gpu")


def made(name: str, rows: int, columns: int) -> tuple[GroupedCudaMatrix, np.ndarray]:
    """A matrix on the GPU, and what the format says that it is, float32."""
    symbols, groups = random_groups(name, rows, columns)
    part = GroupedFields.of(name, torch.from_numpy(symbols).cuda(), groups)
    return GroupedCudaMatrix.from_fields(part, DEVICE), groups.apply(symbols.astype(np.float32), slice(None))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", KINDS)
def test_decoding_is_exact(name: str, shape: tuple[int, int]) -> None:
    matrix, expected = made(name, *shape)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(matrix.dequantize(dtype).cpu(), torch.from_numpy(expected).to(dtype))
    ids = torch.tensor([shape[0] - 1, 0, shape[0]])
    found = matrix.rows(ids.cuda()).cpu()
    assert torch.equal(found[:2], torch.from_numpy(expected[ids[:2].numpy()]))
    assert found[2].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", KINDS)
def test_products_match_float64(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Products do not round weights to the arithmetic of their source, which costs up to 2^-9 of a weight."""
    matrix, weights = made(name, *shape)
    limit = {torch.float32: 1e-3, torch.bfloat16: 8e-3, torch.float16: 2e-3}[dtype]
    limit = max(limit, 4e-3) if KINDS[name][1].arithmetic == "BF16" else limit
    for batch in {torch.float32: (1, 3, 8, 40), torch.bfloat16: (1, 5), torch.float16: (2,)}[dtype]:
        x = torch.randn(batch, shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
        expected = x.double().numpy() @ weights.astype(np.float64).T
        y = matrix.multiply(x.cuda())
        assert y.dtype == dtype and y.shape == (batch, shape[0])
        # Of what such products are on average, since the one output of a single row may be near 0.
        size = np.linalg.norm(weights.astype(np.float64)) * batch**0.5
        assert np.linalg.norm(y.double().cpu().numpy() - expected) < limit * size


def test_a_product_waits_for_what_came_before() -> None:
    """Kernels overlap in a graph; each must still see what the one before it wrote."""
    matrices = [made("gptq", 1024, 1024)[0] for _ in range(2)]
    x = torch.randn(1, 1024, device="cuda")

    def chain() -> torch.Tensor:
        y = x
        for _ in range(20):
            for matrix in matrices:
                y = matrix.multiply(y)
            y = y / y.norm()
        return y

    check_in_graph(chain)


def test_folders_with_group_scales_multiply_on_the_gpu() -> None:
    pool = _core.ThreadPool(1)
    with CompressedModel.open(Path(GOLDEN) / "v1-groups") as stored:
        for name, spec in stored.specs.items():
            entries = {suffix: to_tensor(array) for suffix, array in stored.entries(name).items()}
            weight = CodedWeight(name, spec, entries, torch.float32, DEVICE)
            matrix = matrix_of(stored, name)
            assert isinstance(weight.matrix(), GroupedCudaMatrix) == (matrix.groups is not None)
            expected = torch.from_numpy(matrix.dequantize(np.arange(spec.rows), pool))
            assert torch.equal(weight.dequantize().cpu(), expected)
            x = torch.randn(3, spec.columns)
            product = x @ expected.T
            assert torch.allclose(weight(x.cuda()).cpu(), product, atol=2e-3 * float(product.abs().max()))


@pytest.mark.parametrize("source", ["gptq", "q4_k"])
def test_imported_models_answer_as_on_the_cpu(source: str, tmp_path: Path) -> None:
    if source == "gptq":
        write_source(tmp_path / "source", config(4, 32), packer(4, 32, act_order=True))
        compress(tmp_path / "source", tmp_path / "out")
    else:
        write_gguf(tmp_path / "source.gguf", "Q4_K", {"tokenizer.ggml.pre": "llama-bpe"})
        compress(tmp_path / "source.gguf", tmp_path / "out")
    tokens = torch.arange(5, 17)[None]
    answers = []
    for device in ("cpu", "cuda"):
        model = entrollm.hf.load(tmp_path / "out", dtype=torch.float32, device=device)
        there = tokens.to(device)
        found = model.generate(there, attention_mask=torch.ones_like(there), max_new_tokens=16, do_sample=False)
        answers.append(found.cpu())
        kinds = {type(module.matrix()) for module in model.modules() if isinstance(module, CodedWeight)}
        assert (GroupedCudaMatrix in kinds) == (device == "cuda")
    assert torch.equal(*answers)
