"""Greedy text of transformers on coded weights, against the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import GenerationConfig

import entrollm
import entrollm.hf
from entrollm import CompressOptions, compress
from tests.support.paths import TINY_LLAMA
from tests.torch.models import ids

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
    compress(TINY_LLAMA, tmp_path / "coded", CompressOptions(bits=bits))
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


def test_generate_on_the_cpu_is_that_of_the_model(coded: Path) -> None:
    model = entrollm.hf.load(coded, dtype=torch.float32)
    tokens = ids()
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(entrollm.hf.generate(model, tokens, **options), model.generate(tokens, **options))


class Recorder:
    """In the place of a model on a GPU: what `generate` is called with, and whether stops may be seen late there."""

    device = torch.device("cuda")

    def generate(self, inputs: torch.Tensor | None, **options: Any) -> tuple[dict[str, Any], list[bool]]:
        return options, late_stops()


def late_stops() -> list[bool]:
    """Whether checks are deferred on a GPU, and on the CPU."""
    check = transformers.generation.utils.DeferredStopCheck.is_supported
    return [check(torch.device(kind), None, False, is_assistant=False) for kind in ("cuda", "cpu")]


def test_generate_on_a_gpu_chooses_a_static_cache() -> None:
    model = Recorder()
    prompt = torch.zeros(1, 500, dtype=torch.long)
    options, late = entrollm.hf.generate(model, prompt, max_new_tokens=13)
    assert late == [True, False] and late_stops() == [False, False]
    config = options.pop("compile_config")
    assert config == entrollm.hf.compile_config()
    assert options == {"max_new_tokens": 13, "cache_implementation": "static", "max_cache_len": 1024}
    for count, size in ((1, 512), (12, 512), (524, 1024), (525, 2048)):
        assert entrollm.hf.generate(model, prompt, max_new_tokens=count)[0]["max_cache_len"] == size
    assert entrollm.hf.generate(model, input_ids=prompt, max_new_tokens=13)[0]["max_cache_len"] == 1024
    # What the caller chose stays.
    assert entrollm.hf.generate(model, prompt, max_new_tokens=1, max_cache_len=600)[0]["max_cache_len"] == 600
    for chosen in ({"cache_implementation": "offloaded"}, {"past_key_values": object()}, {"use_cache": False}):
        assert entrollm.hf.generate(model, prompt, max_new_tokens=1, **chosen)[0] == {"max_new_tokens": 1, **chosen}
    # In a configuration, too, which is not changed itself.
    config = GenerationConfig(max_new_tokens=13)
    (option,) = entrollm.hf.generate(model, prompt, generation_config=config)[0].values()
    assert (option.cache_implementation, option.max_cache_len, option.max_new_tokens) == ("static", 1024, 13)
    assert option.compile_config == entrollm.hf.compile_config()
    assert config.cache_implementation is None
    config = GenerationConfig(use_cache=False)
    assert entrollm.hf.generate(model, prompt, generation_config=config)[0] == {"generation_config": config}
