"""Greedy text with guesses of the next tokens, and attention whose heads share keys: the tokens stay the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, Gemma3Config, GenerationConfig

import entrollm.hf
from entrollm.engine.pace import LENGTHS
from entrollm.engine.speculate import Guess
from entrollm.hf.attention import shared_keys
from entrollm.hf.speculation import speculate
from tests.torch.models import ids

TOKENS = 30


class Heard:
    """A streamer that counts the tokens of each call."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.ended = False

    def put(self, tokens: torch.Tensor) -> None:
        self.counts.append(tokens.numel())

    def end(self) -> None:
        self.ended = True


class Always:
    """Takes every guess as it is, however long a step takes."""

    def choose(self, kind: int, most: int) -> int:
        return next((length for length in reversed(LENGTHS) if length <= most), 0)

    def record(self, *each: Any) -> None:
        pass

    record_unused = record


class Told:
    """Guesses what it was told."""

    def __init__(self, text: list[int]) -> None:
        self._text = text
        self._known = 0

    def extend(self, tokens: list[int]) -> None:
        self._known += len(tokens)

    def guess(self, most: int) -> Guess:
        return Guess(self._text[self._known : self._known + most])


@pytest.fixture(scope="module")
def model(coded: Path) -> Any:
    return entrollm.hf.load(coded, dtype=torch.float32)


def greedy(model: Any, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    found: torch.Tensor = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=TOKENS, do_sample=False, **options
    )
    return found


def guessed(model: Any, tokens: torch.Tensor, **options: Any) -> torch.Tensor | None:
    given = {"max_new_tokens": TOKENS, "do_sample": False, "prompt_lookup_num_tokens": 7}
    return speculate(model, tokens, given | options)


def test_guesses_do_not_change_the_tokens(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("entrollm.hf.speculation.Pace", lambda is_free: Always())
    tokens = ids().repeat(1, 3)
    expected = greedy(model, tokens)
    made = expected[0, tokens.shape[1] :].tolist()
    heard = Heard()
    found = guessed(model, tokens, streamer=heard, attention_mask=torch.ones_like(tokens))
    assert found is not None and torch.equal(found, expected)
    assert heard.ended and heard.counts[0] == tokens.shape[1] and sum(heard.counts[1:]) == TOKENS
    for last in (0, 9, 20):
        found = guessed(model, tokens, eos_token_id=made[last], pad_token_id=0)
        assert found is not None
        assert found[0].tolist() == tokens[0].tolist() + made[: made.index(made[last]) + 1]
    one = guessed(model, tokens, max_new_tokens=1)
    assert one is not None and torch.equal(one, expected[:, : tokens.shape[1] + 1])


def test_right_guesses_come_together(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = greedy(model, ids())[0].tolist()
    monkeypatch.setattr("entrollm.hf.speculation.Pace", lambda is_free: Always())
    monkeypatch.setattr("entrollm.hf.speculation.NgramDrafter", lambda: Told(text))
    heard = Heard()
    found = guessed(model, ids(), streamer=heard)
    assert found is not None and found[0].tolist() == text
    assert heard.counts == [12, 1, 8, 8, 8, 4, 1]


def test_calls_that_are_left_to_transformers(model: Any) -> None:
    tokens = ids()
    for options in (
        {"do_sample": True},
        {"repetition_penalty": 1.2},
        {"num_beams": 2},
        {"output_scores": True, "return_dict_in_generate": True},
        {"attention_mask": torch.zeros_like(tokens)},
        {"max_new_tokens": 10_000},
        {"stopping_criteria": [lambda *each: True]},
    ):
        assert guessed(model, tokens, **options) is None
    assert guessed(model, ids(batch=2)) is None
    config = GenerationConfig(max_new_tokens=4, do_sample=False, prompt_lookup_num_tokens=3)
    found = speculate(model, None, {"input_ids": tokens, "generation_config": config})
    assert found is not None and torch.equal(found, greedy(model, tokens)[:, : tokens.shape[1] + 4])


def test_what_a_call_leaves_open_is_as_the_model_has_it(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = ids()
    made = greedy(model, tokens)[0, tokens.shape[1] :].tolist()
    config = GenerationConfig(prompt_lookup_num_tokens=3)
    without_end = GenerationConfig(max_new_tokens=TOKENS, prompt_lookup_num_tokens=3)
    found = speculate(model, tokens, {"generation_config": config})
    assert found is not None
    assert torch.equal(found, model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False))
    monkeypatch.setattr(model.generation_config, "eos_token_id", made[4])
    found = speculate(model, tokens, {"generation_config": without_end})
    assert found is not None and found[0, tokens.shape[1] :].tolist() == made[: made.index(made[4]) + 1]
    monkeypatch.setattr(model.generation_config, "do_sample", True)
    assert speculate(model, tokens, {"generation_config": without_end}) is None


def test_heads_that_share_keys(model: Any) -> None:
    tokens = ids(batch=2)
    expected = greedy(model, tokens)
    with shared_keys(model):
        assert model.config._attn_implementation == "entrollm_sdpa"
        assert torch.equal(greedy(model, tokens, cache_implementation="static", disable_compile=True), expected)
        assert torch.equal(greedy(model, tokens), expected)
    assert model.config._attn_implementation == "sdpa"


def test_attention_of_other_parts_stays() -> None:
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = size | {"vocab_size": 64, "num_key_value_heads": 1, "head_dim": 16}
    config = Gemma3Config(text_config=text, vision_config=size | {"image_size": 28, "patch_size": 14})
    each = {"": "sdpa", "text_config": "sdpa", "vision_config": "eager"}
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=each)

    def used() -> list[str]:
        return [part._attn_implementation for part in (model.config, config.text_config, config.vision_config)]

    config = model.config
    assert used() == ["sdpa", "sdpa", "eager"]
    with shared_keys(model):
        assert used() == ["entrollm_sdpa", "entrollm_sdpa", "eager"]
    assert used() == ["sdpa", "sdpa", "eager"]
