"""Guessed tokens: the same text as without, faster where they are right, hardly slower where they are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from entrollm import Model, UnsupportedError, load
from entrollm.engine.batch import SequenceStep
from entrollm.engine.cache import Cache
from entrollm.engine.generate import Generation
from entrollm.engine.head_drafter import HeadDrafter
from entrollm.engine.latent_attention import MultiHeadLatentAttention
from entrollm.engine.options import GenerationOptions
from entrollm.engine.pace import LENGTHS, Pace
from entrollm.engine.sampling import Sampler, SamplingOptions, candidates
from entrollm.engine.speculate import Drafter, Guess, ModelDrafter, NgramDrafter
from entrollm.engine.state import NoState
from entrollm.engine.weights import Floats, Ids
from entrollm.models import read_config
from entrollm.models.config_fields import Fields
from tests.engine.architectures import random_ids
from tests.engine.dense import load_dense
from tests.support.paths import TINY_LLAMA

VOCABULARY = 6


class MarkovDecoder:
    """Stands for a model whose next token depends on the last one alone."""

    def __init__(self, logits: Floats) -> None:
        values = {"model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 4, "intermediate_size": 4}
        values |= {"num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 64}
        self.config = read_config(Fields(values, "config.json"))
        self.table = logits
        self.passes = 0

    def new_cache(self) -> Cache:
        return Cache(self.config)

    def keeps_rotations(self, length: int, longer: int) -> bool:
        return True

    def forward(
        self, ids: Ids, cache: Cache, *, last: int, observe: Callable[[int, Floats], None] | None = None
    ) -> Floats:
        self.passes += 1
        if observe is not None:
            observe(cache.length, np.zeros((len(ids), self.config.hidden_size), dtype=np.float32))
        for layer in cache.layers:
            layer.extend(len(ids))  # type: ignore[union-attr]
        cache.ids.extend(ids.tolist())
        return self.table[ids[-last:]].copy()


class PaddedDecoder(MarkovDecoder):
    """One whose vocabulary is padded to another number of logits."""

    def __init__(self, logits: Floats, vocab_size: int) -> None:
        kept = logits[:vocab_size, :vocab_size]
        missing = vocab_size - len(kept)
        super().__init__(np.pad(kept, ((0, missing), (0, missing)), constant_values=9.0))
        self.config = replace(self.config, vocab_size=vocab_size)


class MarkovHead:
    """Stands for the layer of a model that guesses the token after the next one."""

    def __init__(self, logits: Floats) -> None:
        self.table = logits

    def new_state(self) -> NoState:
        return NoState()

    def __call__(self, hidden: Floats, ids: Sequence[int], start: int, state: NoState) -> Floats:
        assert len(hidden) == len(ids)
        return np.array(ids, dtype=np.float32)[:, None]

    def logits(self, hidden: Floats) -> Floats:
        return self.table[hidden[:, 0].astype(int)].copy()


class Always:
    """A pace that guesses as much as there is room for."""

    def __init__(self, is_free: bool) -> None:
        pass

    def choose(self, kind: int, most: int) -> int:
        return min(most, 3)

    def record(self, *values: object) -> None:
        pass

    record_late = record_unused = record


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("entrollm.engine.speculate.Pace", Always)


def generate(decoder: MarkovDecoder, drafter: Drafter | None, tokens: int, **sampling: float) -> Generation:
    options = GenerationOptions(tokens, (), (), SamplingOptions(**sampling))  # type: ignore[arg-type]
    generation = Generation(decoder, [0, 1, 2, 0, 1], options, None, drafter=drafter)  # type: ignore[arg-type]
    assert list(generation) == []  # there is no tokenizer
    return generation


def table(seed: int, sharpness: float = 1.5) -> Floats:
    return (sharpness * np.random.default_rng(seed).standard_normal((VOCABULARY, VOCABULARY))).astype(np.float32)


def drafter_of(kind: str) -> Drafter:
    if kind == "ngram":
        return NgramDrafter()
    near = table(0) + 0.7 * table(1)  # a model that is right often, and not always
    if kind == "head":
        return HeadDrafter(MarkovHead(near))  # type: ignore[arg-type]
    return ModelDrafter(MarkovDecoder(near), VOCABULARY)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["ngram", "model", "head"])
def test_sampled_tokens_have_the_distribution_of_the_model(kind: str, always: None) -> None:
    """A chi-square test of the last two of eight tokens, whose joint distribution is known."""
    settings = {"temperature": 0.9, "top_p": 0.95}
    chances = np.zeros((VOCABULARY, VOCABULARY))
    for row, logits in zip(chances, table(0), strict=True):
        ids, probabilities = candidates(logits, SamplingOptions(**settings))  # type: ignore[arg-type]
        row[ids] = probabilities
    joint = np.linalg.matrix_power(chances, 7)[1][:, None] * chances
    counts = np.zeros_like(joint)
    runs, right = 2000, 0
    for seed in range(runs):
        result = generate(MarkovDecoder(table(0)), drafter_of(kind), 8, seed=seed, **settings).result
        counts[result.token_ids[-2:]] += 1
        right += result.right_tokens
    assert right > runs / 8
    assert counts[joint == 0].sum() == 0
    expected = joint[joint * runs >= 5] * runs
    found = counts[joint * runs >= 5]
    chi_square = float((np.square(found - expected) / expected).sum())
    freedom = len(expected) - 1
    assert freedom > 10
    assert chi_square < freedom + 3.7 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("kind", ["ngram", "model", "head"])
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "repetition_penalty": 1.3, "frequency_penalty": 0.2}])
def test_guesses_change_no_token(kind: str, settings: dict[str, float], always: None) -> None:
    plain, guessing = MarkovDecoder(table(0)), MarkovDecoder(table(0))
    expected = generate(plain, None, 50, seed=3, **settings).result
    found = generate(guessing, drafter_of(kind), 50, seed=3, **settings).result
    assert found.token_ids == expected.token_ids
    assert found.right_tokens > 0
    assert guessing.passes == plain.passes - found.right_tokens
    assert (expected.guessed_tokens, expected.right_tokens) == (0, 0)


@pytest.mark.parametrize("vocab_size", [VOCABULARY - 1, VOCABULARY + 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_may_have_another_number_of_logits(vocab_size: int, temperature: float, always: None) -> None:
    settings = {"temperature": temperature, "repetition_penalty": 1.3, "logit_bias": {VOCABULARY - 1: -2.0}}
    drafter = ModelDrafter(PaddedDecoder(table(0), vocab_size), VOCABULARY)  # type: ignore[arg-type]
    expected = generate(MarkovDecoder(table(0)), None, 40, seed=3, **settings).result  # type: ignore[arg-type]
    found = generate(MarkovDecoder(table(0)), drafter, 40, seed=3, **settings).result  # type: ignore[arg-type]
    assert found.token_ids == expected.token_ids
    assert found.right_tokens > 0


def test_a_draft_guesses_nothing_after_a_token_that_it_lacks() -> None:
    drafter = ModelDrafter(PaddedDecoder(table(0), VOCABULARY - 1), VOCABULARY)  # type: ignore[arg-type]
    sampler = Sampler(SamplingOptions(), VOCABULARY, [1])
    drafter.extend([1, 2])
    assert len(drafter.guess(2, sampler.copy).tokens) == 2
    drafter.extend([VOCABULARY - 1])
    drafter.prepare()
    assert drafter.guess(2, sampler.copy) == Guess()


@pytest.fixture(scope="module")
def coded(coded_folder: Callable[[str], Path]) -> Callable[[str], Model]:
    def get(name: str) -> Model:
        return load(coded_folder(name), threads=1)

    return get


class Script(NgramDrafter):
    """Guesses what it was told, with an error in each third guess."""

    def __init__(self, text: Sequence[int]) -> None:
        super().__init__()
        self.text = text
        self.guesses = 0

    def guess(self, most: int, new_sampler: Callable[[], Sampler]) -> Guess:
        self.guesses += 1
        found = list(self.text[len(self._ids) : len(self._ids) + most])
        if self.guesses % 3 == 0:
            found[1:2] = [found[0]]
        return Guess(found)


@pytest.mark.parametrize("name", ["mistral-window", "phi3-longrope", "lfm2", "deepseek_v3"])
def test_models_go_back_behind_a_wrong_guess(
    name: str, always: None, coded: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = coded(name)
    prompt = random_ids(20, seed=1)
    options = {"max_tokens": 24, "temperature": 0.7, "seed": 2}
    expected = model.generate(prompt, **options).token_ids  # type: ignore[arg-type]
    monkeypatch.setattr("entrollm.engine.model.NgramDrafter", lambda: Script([*prompt, *expected]))
    cache = model.new_cache()
    stream = model.stream(prompt, speculate="ngram", cache=cache, **options)  # type: ignore[arg-type]
    list(stream)
    assert stream.result.token_ids == expected
    assert 6 <= stream.result.right_tokens < stream.result.guessed_tokens
    assert cache.ids == [*prompt, *expected][: cache.length]
    assert cache.length == 20 + 23


@pytest.mark.parametrize("name", ["mistral-window", "lfm2"])
def test_guesses_go_on_after_steps_without(
    name: str, always: None, coded: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch makes every third token, as a server does when another answer comes and goes."""
    model = coded(name)
    prompt = random_ids(20, seed=1)
    expected = list(model.generate(prompt, max_tokens=24).token_ids)
    monkeypatch.setattr("entrollm.engine.model.NgramDrafter", lambda: Script([*prompt, *expected]))
    text = model.new_answer(prompt, continues_text=True, max_tokens=24)
    cache, other = model.new_cache(), model.new_cache()
    (row,) = model.step([SequenceStep(np.array(prompt), cache)])
    found = [text.push(row)[0]]
    pending = found[:]
    speculation = model.speculation(cache, pending, "ngram")
    turn = 0
    while text.finish_reason == "unfinished":
        turn += 1
        if turn % 3 == 0:
            row, _ = model.step([SequenceStep(np.array(pending), cache), SequenceStep(np.array([5]), other)])
            made = [text.push(row)[0]]
            pending = made[:]
        else:
            speculation.follow(pending)
            made = [token for token, _ in speculation.step(text)]
            pending = speculation.pending
        found += made
    assert found == expected
    assert 3 <= speculation.right < speculation.guessed


def test_latent_attention_of_guesses_takes_the_formula_of_single_tokens(
    coded: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = coded("deepseek_v3")
    monkeypatch.setattr(MultiHeadLatentAttention, "_mix_expanded", lambda *_: pytest.fail("not absorbed"))
    for count in (1, LENGTHS[-1] + 1):
        assert model.logits(random_ids(count, seed=1)).shape[0] == count


def test_ngrams_repeat_what_followed_and_go_round() -> None:
    drafter = NgramDrafter()
    drafter.extend([1, 2, 3, 4, 9, 2, 3])
    assert drafter.guess(2, lambda: None) == Guess([4, 9], 0)  # type: ignore[arg-type, return-value]
    drafter.extend([4])
    assert drafter.guess(9, lambda: None) == Guess([9, 2, 3, 4, 9, 2, 3, 4, 9], 1)  # type: ignore[arg-type, return-value]
    drafter.extend([7])
    assert drafter.guess(2, lambda: None) == Guess()  # type: ignore[arg-type, return-value]


def test_the_more_tokens_agree_the_longer_guesses_begin() -> None:
    drafter, text = NgramDrafter(), list(range(30))
    drafter.extend(text)
    kinds = []
    for count in (4, 5, 6, 11, 12, 20):
        drafter.extend(text[len(drafter._ids) - 30 : count])
        guess = drafter.guess(3, lambda: None)  # type: ignore[arg-type, return-value]
        assert guess.tokens == text[count : count + 3]
        kinds.append(guess.kind)
    assert kinds == [2, 2, 3, 3, 4, 4]
    lengths = []
    for kind in (0, 3, 4):
        pace = Pace(True)
        pace.record(0, 0, 0, 1.0)
        pace._elapsed = 1000.0  # there is time to lose
        lengths.append(pace.choose(kind, 15))
    assert lengths[0] < lengths[1] <= lengths[2]


@pytest.mark.parametrize(("is_free", "cost"), [(True, 0.2), (False, 0.2), (False, 0.9)])
def test_wrong_guesses_lose_little_time(is_free: bool, cost: float) -> None:
    pace, total, tokens = Pace(is_free), 0.0, 400
    for _ in range(tokens):
        count = pace.choose(0, 15)
        assert count in (0, *LENGTHS)
        total += 1 + cost * count
        pace.record(0, count, 0, 1 + cost * count)
    assert total < tokens / 0.95


def test_right_guesses_become_long() -> None:
    pace, total, made = Pace(True), 0.0, 0
    while made < 400:
        count = pace.choose(2, 15)
        total += 1 + 0.2 * count
        made += 1 + count
        pace.record(2, count, count, 1 + 0.2 * count)
    assert made / total > 3


def test_a_draft_model_of_another_vocabulary_is_refused(coded: Callable[[str], Model]) -> None:
    model = load_dense(TINY_LLAMA)
    with pytest.raises(UnsupportedError, match=r"the draft model has no tokenizer.json"):
        model.generate("a", speculate=coded("llama"))
    with pytest.raises(UnsupportedError, match=r"a lfm2, whose layers keep a state that cannot take guesses back"):
        model.generate("a", speculate=coded("lfm2"))
    with pytest.raises(ValueError, match="speculate should be 'ngram', 'mtp' or a model, got 'lookup'"):
        model.generate("a", speculate="lookup")  # type: ignore[arg-type]
    other = load_dense(TINY_LLAMA)
    assert other.tokenizer is not None
    other.tokenizer.add_tokens(["surprising"])
    with pytest.raises(UnsupportedError, match=r"and token \d+, 'surprising', is one of only one of them"):
        model.generate("a", speculate=other)


def test_a_model_guesses_for_itself() -> None:
    model = load_dense(TINY_LLAMA)
    expected = model.generate("Once upon a time", max_tokens=40)
    found = model.generate("Once upon a time", max_tokens=40, speculate=load_dense(TINY_LLAMA))
    assert found.text == expected.text
