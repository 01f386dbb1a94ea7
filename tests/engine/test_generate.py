"""The generation loop: when it ends, what it returns, which options it runs with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from entrollm.engine.cache import Cache
from entrollm.engine.detokenize import Detokenizer
from entrollm.engine.generate import Generation, GenerationResult
from entrollm.engine.model import Model
from entrollm.engine.options import GenerateKeywords, GenerationOptions, resolve_options
from entrollm.engine.sampling import SamplingOptions
from entrollm.engine.weights import Floats, Ids
from entrollm.errors import FormatError, UnsupportedError
from entrollm.models import read_config
from entrollm.models.config import ModelConfig
from entrollm.models.config_fields import Fields
from tests.engine.dense import load_dense
from tests.engine.tokenizers_for_tests import byte_level
from tests.support.paths import TINY_LLAMA

TOKENIZER = byte_level()
EOS = 1
CONTEXT = 32


def small_config() -> ModelConfig:
    values: dict[str, object] = {
        "model_type": "llama",
        "vocab_size": TOKENIZER.get_vocab_size(),
        "hidden_size": 4,
        "intermediate_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "max_position_embeddings": CONTEXT,
    }
    return read_config(Fields(values, "config.json"))


class ScriptedDecoder:
    """Stands for a model that says what it is told to, and records what it is asked."""

    def __init__(self, script: Sequence[int]) -> None:
        self.config = small_config()
        self.script = list(script)
        self.calls: list[list[int]] = []

    def new_cache(self) -> Cache:
        return Cache(self.config)

    def forward(self, ids: Ids, cache: Cache, *, last: int | None = None, observe: object = None) -> Floats:
        assert last == 1 and observe is None
        self.calls.append(ids.tolist())
        cache.ids.extend(ids.tolist())
        logits = np.zeros((1, self.config.vocab_size), dtype=np.float32)
        logits[0, self.script[len(self.calls) - 1]] = 1
        return logits


def scripted(script: Sequence[int], prompt: Sequence[int] = (5, 6), **keywords: object) -> tuple[list[str], Generation]:
    options = resolve_options(keywords, Fields({}, "generation_config.json"), (EOS,))  # type: ignore[arg-type]
    generation = Generation(ScriptedDecoder(script), prompt, options, Detokenizer(TOKENIZER))  # type: ignore[arg-type]
    return list(generation), generation


def encode(text: str) -> list[int]:
    return list(TOKENIZER.encode(text).ids)


@pytest.fixture(scope="module")
def example() -> Model:
    return load_dense(TINY_LLAMA)


def test_end_token() -> None:
    ids = encode("the cat é")
    pieces, generation = scripted([*ids, EOS, 7])
    result = generation.result
    assert result.text == "".join(pieces) == "the cat é"
    assert result.token_ids == (*ids, EOS)
    assert (result.finish_reason, result.prompt_tokens) == ("stop", 2)


def test_max_tokens() -> None:
    ids = encode("the cat sat on the mat")
    _, generation = scripted([*ids, EOS], max_tokens=3)
    assert generation.result.token_ids == tuple(ids[:3])
    assert generation.result.finish_reason == "length"


def test_context_limit() -> None:
    _, generation = scripted([7] * 100, prompt=[5] * 20, max_tokens=50)
    assert len(generation.result.token_ids) == CONTEXT - 20
    assert generation.result.finish_reason == "context"


def test_no_room_in_the_context() -> None:
    with pytest.raises(ValueError, match=r"32 tokens and leaves no room .* context is 32 tokens; shorten the prompt"):
        scripted([7], prompt=[5] * CONTEXT)


def test_stop_string_ends_the_text_before_it() -> None:
    ids = encode("Once upon a time, there was")
    pieces, generation = scripted([*ids, EOS], stop=["a ti", "zzz"])
    assert generation.result.text == "".join(pieces) == "Once upon "
    assert generation.result.finish_reason == "stop"
    assert len(generation.result.token_ids) < len(ids)


def test_text_held_back_for_a_stop_string_comes_at_the_end() -> None:
    pieces, generation = scripted([*encode("the cat"), EOS], stop="cat and")
    assert generation.result.text == "".join(pieces) == "the cat"


def test_unfinished_bytes_come_at_the_end() -> None:
    pieces, generation = scripted([*encode("Ж")[:1], EOS])
    assert pieces == ["\ufffd"]
    assert generation.result.text == "\ufffd"


def test_each_token_is_computed_once() -> None:
    decoder = ScriptedDecoder([7, 8, 9, EOS])
    options = resolve_options({}, Fields({}, "generation_config.json"), (EOS,))
    list(Generation(decoder, [3, 4], options, None))  # type: ignore[arg-type]
    assert decoder.calls == [[3, 4], [7], [8], [9]]


def test_an_abandoned_generation_keeps_its_beginning() -> None:
    options = resolve_options({}, Fields({}, "generation_config.json"), (EOS,))
    decoder = ScriptedDecoder([*encode("the cat"), EOS])
    generation = Generation(decoder, [3], options, Detokenizer(TOKENIZER))  # type: ignore[arg-type]
    first = next(iter(generation))
    assert generation.result.text == first
    assert generation.result.finish_reason == "unfinished"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": 5}, "stop should be a string or a sequence of strings, got 5"),
        ({"logit_bias": [1]}, "logit_bias should map token ids to numbers, got \\[1\\]"),
    ],
)
def test_options_of_another_type_are_refused(options: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        resolve_options(options, Fields({}, "generation_config.json"), ())


def test_stop_strings_need_a_tokenizer() -> None:
    options = resolve_options({"stop": "x"}, Fields({}, "generation_config.json"), ())
    with pytest.raises(ValueError, match=r"stop strings need a tokenizer.*no tokenizer\.json"):
        Generation(ScriptedDecoder([EOS]), [3], options, None)  # type: ignore[arg-type]


def test_tokens_per_second() -> None:
    def speed(count: int, decode_s: float) -> float:
        return GenerationResult("", tuple(range(count)), "stop", 1, 0.5, decode_s).tokens_per_second

    assert speed(11, 2.0) == 5.0
    assert speed(1, 0.0) == 0.0


def resolve(keywords: GenerateKeywords, model: dict[str, object]) -> GenerationOptions:
    return resolve_options(keywords, Fields(model, "generation_config.json"), (9,))


def test_options_come_from_the_caller_then_the_model() -> None:
    model: dict[str, object] = {
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
        "repetition_penalty": 1.05,
        "max_new_tokens": 99,
        "eos_token_id": [3, 4],
        "num_beams": 1,
    }
    resolved = resolve({}, model)
    assert resolved.sampling == SamplingOptions(repetition_penalty=1.05, temperature=0.7, top_k=20, top_p=0.8)
    assert (resolved.max_tokens, resolved.eos_token_ids) == (99, (3, 4))
    explicit = resolve({"temperature": 0.0, "top_k": 0, "max_tokens": 5, "seed": 1, "min_p": None}, model)
    assert explicit.sampling == SamplingOptions(repetition_penalty=1.05, temperature=0.0, top_k=0, top_p=0.8, seed=1)
    assert explicit.max_tokens == 5


def test_without_do_sample_the_likeliest_token_is_taken() -> None:
    assert resolve({}, {"temperature": 0.7, "top_p": 0.8}).sampling.temperature == 0.0
    assert resolve({"seed": 4}, {}).sampling.temperature == 0.0
    assert resolve({"top_p": 0.9}, {}).sampling.temperature == 1.0
    assert resolve({"temperature": 0.5}, {}).sampling.temperature == 0.5


def test_end_tokens_of_config_serve_if_generation_config_has_none() -> None:
    assert resolve({}, {}).eos_token_ids == (9,)
    assert resolve({}, {"eos_token_id": 2}).eos_token_ids == (2,)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ({"num_beams": 4}, UnsupportedError, r"generation_config\.json: num_beams 4 is not supported; remove it"),
        ({"suppress_tokens": [1]}, UnsupportedError, r"suppress_tokens \[1\] is not supported"),
        ({"temperature": "hot"}, FormatError, r"generation_config\.json: temperature should be a finite number"),
        ({"top_p": 3.0}, FormatError, r"generation_config\.json: top_p should be from 0 to 1, got 3\.0"),
        ({"eos_token_id": "x"}, FormatError, "eos_token_id should be a token id or a list of token ids, found 'x'"),
        ({"eos_token_id": [1, -1]}, FormatError, "eos_token_id should be a token id or a list"),
        ({"do_sample": 1}, FormatError, "do_sample should be true or false, found 1"),
        ({"max_new_tokens": 0}, FormatError, "max_new_tokens should be an integer from 1"),
    ],
)
def test_bad_generation_config(model: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        resolve({}, model)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"max_tokens": 0}, ValueError, "max_tokens should be at least 1, got 0"),
        ({"stop": ["a", ""]}, ValueError, "a stop string should not be empty"),
        ({"top_p": 2.0}, ValueError, "top_p should be from 0 to 1"),
        ({"topp": 0.5}, TypeError, "unknown option topp; known: max_tokens, stop"),
    ],
)
def test_bad_options(keywords: GenerateKeywords, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        resolve(keywords, {})


def test_streamed_text_is_the_result(example: Model) -> None:
    pieces: list[str] = []
    result = example.generate("The king", max_tokens=20, temperature=0.9, seed=3, on_text=pieces.append)
    assert "".join(pieces) == result.text
    assert len(result.token_ids) == 20
    assert result.prefill_s > 0
    assert result.decode_s > 0
    assert example.tokenizer is not None
    prompt = example.encode("The king")
    whole = example.tokenizer.decode([*prompt, *result.token_ids])
    assert whole == "The king" + result.text
    assert example.generate(prompt, max_tokens=20, temperature=0.9, seed=3).text == result.text


def test_generation_with_a_cache_equals_one_without(example: Model) -> None:
    cache = example.new_cache()
    for prompt in ("Once upon a time", "Once upon a time there was a dog", "It rained"):
        stream = example.stream(prompt, cache=cache, max_tokens=8)
        assert "".join(stream) == example.generate(prompt, max_tokens=8).text
        assert cache.length == stream.result.prompt_tokens + 7


def test_empty_prompt_starts_from_the_start_token(example: Model) -> None:
    assert example.encode("") == [0]
    assert example.generate("", max_tokens=2).prompt_tokens == 1
