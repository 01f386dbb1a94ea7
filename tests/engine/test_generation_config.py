"""Every option that transformers' GenerationConfig has: followed, without effect, or refused by name."""

from __future__ import annotations

import math

import numpy as np
import pytest
import transformers

from entrollm.engine.generate import Generation
from entrollm.engine.model import Model
from entrollm.engine.options import HONOURED, INERT, REFUSED, GenerationOptions, resolve_options
from entrollm.engine.sampling import Sampler, SamplingOptions
from entrollm.errors import FormatError, UnsupportedError
from entrollm.models.config_fields import Fields
from tests.engine.dense import load_dense
from tests.support.paths import TINY_LLAMA


def resolve(model: dict[str, object], prompt_tokens: int = 10, **keywords: object) -> GenerationOptions:
    fields = Fields(model, "generation_config.json")
    return resolve_options(keywords, fields, (9,), prompt_tokens)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def example() -> Model:
    return load_dense(TINY_LLAMA)


def test_every_option_of_transformers_is_known() -> None:
    known = [*HONOURED, *INERT, *REFUSED]
    assert len(known) == len(set(known))
    assert set(vars(transformers.GenerationConfig())) <= set(known)


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_options_that_would_change_the_text_are_refused(key: str) -> None:
    for value in REFUSED[key]:
        resolve({key: value})
    with pytest.raises(UnsupportedError, match=rf"generation_config\.json: {key} 0\.3 is not supported; remove it"):
        resolve({key: 0.3})


def test_defaults_of_transformers_are_without_effect() -> None:
    resolve(transformers.GenerationConfig._get_default_generation_params())


def test_a_model_that_samples_has_the_top_k_of_transformers() -> None:
    default = transformers.GenerationConfig._get_default_generation_params()["top_k"]
    assert resolve({"do_sample": True}).sampling.top_k == default
    assert resolve({"do_sample": True, "top_k": 0}).sampling.top_k == 0
    assert resolve({"do_sample": True}, top_k=3).sampling.top_k == 3
    assert resolve({}, temperature=0.5).sampling.top_k == 0


def test_minimum_lengths() -> None:
    assert resolve({}).min_tokens == 0
    assert resolve({"min_new_tokens": 6}).min_tokens == 6
    assert resolve({"min_length": 16}).min_tokens == 6
    assert resolve({"min_length": 3}).min_tokens == 0
    assert resolve({"min_length": 16, "min_new_tokens": 2}).min_tokens == 2


def test_end_tokens_are_not_chosen_before_the_minimum(example: Model) -> None:
    free = example.generate("The king", max_tokens=12)
    end = free.token_ids[0]
    early = resolve({"eos_token_id": [end, 10**6]}, max_tokens=12)
    late = resolve({"eos_token_id": [end, 10**6], "min_new_tokens": 5}, max_tokens=12)
    found = {}
    for name, options in (("early", early), ("late", late)):
        generation = Generation(example._decoder, example.encode("The king"), options, None)
        list(generation)
        found[name] = generation.result.token_ids
    assert found["early"] == (end,)
    assert len(found["late"]) > 5
    assert end not in found["late"][:5]


def test_banned_tokens_are_never_chosen() -> None:
    logits = np.array([0.0, 5.0, 4.0, 1.0], np.float32)
    assert Sampler(SamplingOptions(), 4, [])(logits, banned=(1, 99)) == 2
    sampler = Sampler(SamplingOptions(temperature=5.0, seed=1), 4, [])
    assert 1 not in {sampler(logits, banned=(1,)) for _ in range(100)}
    assert logits[1] == 5.0


def test_stop_strings_of_the_model_end_the_text() -> None:
    assert resolve({"stop_strings": "###"}).stop == ("###",)
    assert resolve({"stop_strings": ["a", "b"]}).stop == ("a", "b")
    assert resolve({"stop_strings": ["a"]}, stop="z").stop == ("z",)
    assert resolve({"stop_strings": ["a"]}, stop=[]).stop == ()
    for wrong in ([""], ["a", 3], 3):
        with pytest.raises(FormatError, match="stop_strings should be a string or a list of strings"):
            resolve({"stop_strings": wrong})


def test_max_length_counts_the_prompt() -> None:
    assert resolve({"max_length": 30}).max_tokens == 20
    assert resolve({"max_length": 10**9}).max_tokens == 256
    assert resolve({"max_length": 30, "max_new_tokens": 7}).max_tokens == 7
    assert resolve({"max_length": 5}, max_tokens=4).max_tokens == 4
    with pytest.raises(ValueError, match=r"the prompt has 10 tokens.*allows 10 with the answer \(max_length\)"):
        resolve({"max_length": 10})


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"max_tokens": 1.5}, "max_tokens should be an integer, got 1.5"),
        ({"max_tokens": True}, "max_tokens should be an integer, got True"),
        ({"max_tokens": "7"}, "max_tokens should be an integer, got '7'"),
        ({"max_tokens": math.nan}, "max_tokens should be an integer, got nan"),
        ({"top_k": 2.5}, "top_k should be an integer, got 2.5"),
        ({"seed": 1.0}, "seed should be an integer, got 1.0"),
        ({"temperature": "hot"}, "temperature should be a number, got 'hot'"),
        ({"top_p": True}, "top_p should be a number, got True"),
        ({"stop": ["a", 3]}, "a stop string should be a string, got 3"),
    ],
)
def test_options_of_the_wrong_type(keywords: dict[str, object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        resolve({}, **keywords)


@pytest.mark.parametrize("count", [0, -1, -(10**30)])
def test_token_counts_below_one(count: int) -> None:
    with pytest.raises(ValueError, match=f"max_tokens should be at least 1, got {count}"):
        resolve({}, max_tokens=count)


def test_integers_of_numpy_are_integers() -> None:
    assert resolve({}, max_tokens=np.int64(5), top_k=np.int32(3)).max_tokens == 5
