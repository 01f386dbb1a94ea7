"""Generation on a GPU: sampling, several prompts, guesses of the next tokens, and heads that share keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import entrollm.hf
from entrollm import CompressOptions, compress
from entrollm.hf.attention import shared_keys
from tests.support.paths import TINY_LLAMA
from tests.torch.models import difference, ids, logits, write_coded

TOKENS = 48


@pytest.fixture(scope="module")
def folder(gpu: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("example") / "coded"
    compress(TINY_LLAMA, folder, CompressOptions(bits=8))
    return folder


def generated(model: Any, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    mask = torch.ones_like(tokens)
    found: torch.Tensor = entrollm.hf.generate(model, tokens, attention_mask=mask, max_new_tokens=TOKENS, **options)
    return found


def test_guesses_do_not_change_the_tokens(folder: Path, gpu: torch.device) -> None:
    model = entrollm.hf.load(folder, dtype=torch.float32, device=gpu)
    tokens = ids(20).repeat(1, 3).to(gpu)
    expected = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=TOKENS, do_sample=False)
    for most in (3, 15):
        for _ in range(2):  # the second time with the graphs of the first
            assert torch.equal(generated(model, tokens, do_sample=False, prompt_lookup_num_tokens=most), expected)
    # What these loops do not know is transformers' own.
    both = tokens.repeat(2, 1)[:, :10]
    assert generated(model, both[:1], do_sample=True, prompt_lookup_num_tokens=3).shape == (1, 10 + TOKENS)


def test_prompts_of_unlike_lengths_in_a_batch(folder: Path, gpu: torch.device) -> None:
    model = entrollm.hf.load(folder, dtype=torch.float32, device=gpu)
    long, short = ids(12).to(gpu), ids(7, seed=1).to(gpu)
    padded = torch.cat([torch.zeros_like(long[:, :5]), short], 1)
    tokens, mask = torch.cat([long, padded]), torch.ones(2, 12, dtype=torch.long, device=gpu)
    mask[1, :5] = 0
    found = entrollm.hf.generate(model, tokens, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False)
    assert torch.equal(found[:1], generated(model, long, do_sample=False))
    assert torch.equal(found[1:, 5:], generated(model, short, do_sample=False))


def test_sampling_draws_from_the_same_distribution(folder: Path, gpu: torch.device) -> None:
    model = entrollm.hf.load(folder, dtype=torch.float32, device=gpu)
    tokens = ids(12).to(gpu)
    options: dict[str, Any] = {"do_sample": True, "top_k": 4, "temperature": 0.8}
    torch.manual_seed(5)
    found = generated(model, tokens, **options)
    torch.manual_seed(5)
    mask = torch.ones_like(tokens)
    assert torch.equal(found, model.generate(tokens, attention_mask=mask, max_new_tokens=TOKENS, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 5])
def test_heads_share_keys(count: int, dtype: torch.dtype, gpu: torch.device, tmp_path: Path) -> None:
    """With caches that are longer than the sequences, whose rest a mask hides."""
    model = entrollm.hf.load(write_coded(tmp_path, head_dim=16), dtype=dtype, device=gpu)
    tokens = ids(40, batch=2).to(gpu)

    def last() -> torch.Tensor:
        with torch.no_grad():
            cache = model(tokens[:, :-count], use_cache=True).past_key_values
            mask = torch.ones(2, 1, count, 40, dtype=torch.bool, device=gpu).tril(40 - count)
            found: torch.Tensor = model(tokens[:, -count:], past_key_values=cache, attention_mask=mask).logits
        return found

    with shared_keys(model):
        shared = last()
    for expected in (last(), logits(model, tokens)[:, -count:]):
        # Products round vectors to 16 bits where they are few.
        assert difference(shared.float().cpu(), expected.float().cpu()) < (2e-3 if dtype == torch.float32 else 3e-2)
