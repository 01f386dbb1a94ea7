"""Models that run from coded weights, against transformers running the exported checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from entrollm import CompressOptions, Model, _core, compress, load
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.compress.export import export
from entrollm.compress.verify import verify
from entrollm.format.reader import CompressedModel
from tests.engine.architectures import (
    ARCHITECTURES,
    GREEDY_TOKENS,
    PROMPT_TOKENS,
    load_reference,
    random_ids,
    reference_greedy,
    reference_logits,
    relative_difference,
)
from tests.support.paths import TINY_LLAMA

TOLERANCE = 2e-3
# Logits of one pass and of token-by-token passes differ only by the float32 sums of attention.
SAME_WEIGHTS_TOLERANCE = 5e-4


# Every architecture is coded with 4 bits, and the first ones with 8 as well.
CODED = [(name, bits) for number, name in enumerate(ARCHITECTURES) for bits in ((8, 4) if number < 24 else (4,))]


@pytest.fixture(scope="session")
def compressed(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], tuple[Path, Path]]:
    """A function from an architecture and bits to its compressed folder and the float32 export of that."""
    made: dict[tuple[str, int], tuple[Path, Path]] = {}

    def get(name: str, bits: int) -> tuple[Path, Path]:
        if (name, bits) not in made:
            folder = tmp_path_factory.mktemp(f"{name}-{bits}")
            compress(checkpoint(name), folder / "coded", CompressOptions(bits=bits))
            with CompressedModel.open(folder / "coded") as model:
                export(model, folder / "exported", _core.ThreadPool(1), "f32")
            made[name, bits] = folder / "coded", folder / "exported"
        return made[name, bits]

    return get


@pytest.mark.parametrize(("name", "bits"), CODED)
def test_coded_model_computes_what_transformers_does(
    name: str, bits: int, compressed: Callable[[str, int], tuple[Path, Path]]
) -> None:
    coded, exported = compressed(name, bits)
    model, reference = load(coded), load_reference(exported)
    for count in (1, PROMPT_TOKENS, 60):
        ids = random_ids(count, seed=count)
        assert relative_difference(model.logits(ids), reference_logits(reference, ids)) <= TOLERANCE
    _compare_greedy(model, reference)


def _compare_greedy(model: Model, reference: Any) -> None:
    """The same 64 greedy tokens, but for ties that are closer than the tolerance: activations have 16 bits."""
    prompt = random_ids(PROMPT_TOKENS)
    expected = reference_greedy(reference, prompt, GREEDY_TOKENS)
    tokens = list(model.generate(prompt, max_tokens=GREEDY_TOKENS).token_ids)
    while tokens != expected:
        assert len(tokens) == len(expected)
        first = next(i for i, (ours, theirs) in enumerate(zip(tokens, expected, strict=True)) if ours != theirs)
        logits = reference_logits(reference, prompt + expected[:first])[-1]
        gap = float(logits[expected[first]] - logits[tokens[first]])
        assert gap <= TOLERANCE * float(np.abs(logits).max()), f"token {first}: other than by a tie"
        start = expected[: first + 1]
        rest = GREEDY_TOKENS - len(start)
        tokens = start + (list(model.generate(prompt + start, max_tokens=rest).token_ids) if rest else [])


def test_shipped_model_generates_the_same_tokens(tmp_path: Path) -> None:
    compress(TINY_LLAMA, tmp_path / "coded", CompressOptions(bits=8))
    with CompressedModel.open(tmp_path / "coded") as opened:
        export(opened, tmp_path / "exported", _core.ThreadPool(1), "f32")
    model, reference = load(tmp_path / "coded"), load_reference(tmp_path / "exported")
    prompt = model.encode("The history of the city")
    tokens = list(model.generate(prompt, max_tokens=GREEDY_TOKENS, temperature=0.0).token_ids)
    assert tokens == reference_greedy(reference, prompt, GREEDY_TOKENS)


@pytest.mark.parametrize(("name", "bits"), CODED)
def test_integers_are_those_of_the_original(
    name: str,
    bits: int,
    checkpoint: Callable[[str], Path],
    compressed: Callable[[str, int], tuple[Path, Path]],
) -> None:
    with CompressedModel.open(compressed(name, bits)[0]) as model, Checkpoint.open(checkpoint(name)) as original:
        result = verify(model, _core.ThreadPool(2), original)
    assert result.compared and result.matrices > 0


def _step_by_step(model: Model, ids: np.ndarray) -> np.ndarray:
    """The logits after each token, every prefix run from an empty cache."""
    return np.stack([model.logits(ids[: n + 1])[-1] for n in range(len(ids))])


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_batch_prefill_equals_token_by_token(name: str, compressed: Callable[[str, int], tuple[Path, Path]]) -> None:
    model = load(compressed(name, 4)[0])
    ids = random_ids(PROMPT_TOKENS)
    assert relative_difference(model.logits(ids), _step_by_step(model, ids)) <= SAME_WEIGHTS_TOLERANCE


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_threads_do_not_change_logits(granularity: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    compress(checkpoint("llama"), tmp_path / "coded", CompressOptions(bits=4, granularity=granularity))
    ids = random_ids(PROMPT_TOKENS)
    expected = load(tmp_path / "coded", threads=1).logits(ids)
    for threads in (2, 5):
        np.testing.assert_array_equal(load(tmp_path / "coded", threads=threads).logits(ids), expected)


@pytest.mark.parametrize(("name", "keep"), [("gpt_oss", "*experts*"), ("granitemoe", "*moe*")])
def test_kept_experts_of_a_stack_run(name: str, keep: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    words = tmp_path / "words"
    load_reference(checkpoint(name)).to(torch.bfloat16).save_pretrained(words)
    compress(words, tmp_path / "kept", CompressOptions(lossless=True, keep=[keep]))
    ids = random_ids(PROMPT_TOKENS, seed=3)
    assert relative_difference(load(tmp_path / "kept").logits(ids), load(words).logits(ids)) <= 1e-5


def test_a_lossless_model_computes_what_its_original_does(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    words = tmp_path / "words"
    reference = load_reference(checkpoint("llama")).to(torch.bfloat16)
    reference.save_pretrained(words)
    compress(words, tmp_path / "coded", CompressOptions(lossless=True))
    compress(words, tmp_path / "kept", CompressOptions(bits=8, keep=["*"]))
    ids = random_ids(PROMPT_TOKENS, seed=3)
    expected = load(words).logits(ids)
    for memory in ("file", "fast"):
        assert relative_difference(load(tmp_path / "coded", memory=memory).logits(ids), expected) <= 1e-5
    assert relative_difference(load(tmp_path / "kept").logits(ids), expected) <= 1e-5
