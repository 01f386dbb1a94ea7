"""Greedy text of transformers on coded weights, against the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import ids

import entrollm
import entrollm.hf
from entrollm import CompressOptions, compress

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-llama"
TOKENS = 24


def greedy(model: Any, prompt: list[int], count: int = TOKENS, **options: Any) -> list[int]:
    tokens = torch.tensor([prompt])
    found = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, do_sample=False, **options
    )
    return found[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", ["coded", "coded_untied"])
def test_greedy_tokens_are_those_of_the_engine(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    prompt = ids()[0].tolist()
    expected = list(entrollm.load(folder, threads=1).generate(prompt, max_tokens=TOKENS, temperature=0.0).token_ids)
    assert greedy(entrollm.hf.load(folder, dtype=torch.float32), prompt) == expected


@pytest.mark.parametrize("bits", [4, 8])
def test_example_model_writes_the_same_text(bits: int, tmp_path: Path) -> None:
    compress(EXAMPLE, tmp_path / "coded", CompressOptions(bits=bits))
    engine = entrollm.load(tmp_path / "coded", threads=1)
    prompt = engine.encode("The history of the city")
    expected = list(engine.generate(prompt, max_tokens=TOKENS, temperature=0.0).token_ids)
    model = entrollm.hf.load(tmp_path / "coded", dtype=torch.float32)
    assert greedy(model, prompt) == expected
    if bits == 4:
        entrollm.hf.set_backend(model, "plain")
        assert greedy(model, prompt, 1) == expected[:1]


def test_static_cache(coded: Path) -> None:
    model = entrollm.hf.load(coded, dtype=torch.float32)
    prompt = ids()[0].tolist()
    assert greedy(model, prompt, cache_implementation="static", disable_compile=True) == greedy(model, prompt)
