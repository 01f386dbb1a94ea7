"""Caches that begin alike share the positions of their beginning, and stay independent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from entrollm import Model, load
from entrollm.engine.batch import SequenceStep
from entrollm.engine.cache import Cache
from entrollm.engine.layer_cache import LayerCache
from entrollm.engine.weights import Floats
from tests.engine.architectures import random_ids

IDS = random_ids(700)


def run(model: Model, cache: Cache, ids: list[int]) -> Floats:
    return model._decoder.forward(np.array(ids), cache)


def layer(cache: Cache) -> LayerCache:
    found = cache.layers[0]
    assert isinstance(found, LayerCache)
    return found


@pytest.fixture(scope="module", params=["f32", "f16", "int8"])
def model(request: pytest.FixtureRequest, coded_folder: Callable[[str], Path]) -> Model:
    return load(coded_folder("llama"), threads=1, cache_type=request.param)


def fresh(model: Model, ids: list[int], last: int) -> Floats:
    return model.logits(ids, last=last)


def test_forks_share_whole_blocks_and_give_the_same_bits(model: Model) -> None:
    source = model.new_cache()
    run(model, source, IDS[:600])
    fork = source.fork(590)
    later = fork.fork(550)
    for other in (fork, later):
        (shared,) = layer(other)._shared
        assert shared[1].shape[1] == 512
        assert np.shares_memory(shared[0], layer(source)._shared[0][0])
    others = random_ids(60, seed=9)
    for cache, length in ((source, 600), (fork, 590), (later, 550)):
        found = np.concatenate(
            [run(model, cache, others[:7]), run(model, cache, others[7:8]), run(model, cache, others[8:])]
        )
        assert np.array_equal(found, fresh(model, IDS[:length] + others, 60))


@pytest.mark.parametrize("threads", [1, 3])
def test_one_step_of_sequences_with_and_without_shared_positions(
    threads: int, model: Model, coded_folder: Callable[[str], Path]
) -> None:
    together = load(coded_folder("llama"), threads=threads, cache_type=model.new_cache().cache_type)
    source, alone = together.new_cache(), together.new_cache()
    run(together, source, IDS[:600])
    run(together, alone, IDS[:40])
    lengths, counts = (600, 590, 256, 40), (1, 5, 2, 3)
    caches = (source, source.fork(590), source.fork(256), alone)
    others = [random_ids(count, seed=count) for count in counts]
    steps = [SequenceStep(np.array(ids), cache, True) for ids, cache in zip(others, caches, strict=True)]
    expected = [fresh(model, IDS[:length] + ids, 1) for length, ids in zip(lengths, others, strict=True)]
    assert np.array_equal(together.step(steps), np.concatenate(expected))


def test_a_cache_goes_back_behind_what_it_shares(model: Model) -> None:
    source = model.new_cache()
    run(model, source, IDS)
    fork = source.fork(650)
    for cache, kept in ((source, 300), (fork, 255), (fork, 100)):
        text = IDS[:kept] + random_ids(30, seed=kept)
        assert cache.reuse(text) == kept
        assert np.array_equal(run(model, cache, text[kept:]), fresh(model, text, 30))
    # The first has written where the fork once looked, and the fork has not seen it.
    again = source.fork(300)
    assert np.array_equal(run(model, again, IDS[300:320]), fresh(model, IDS[:320], 20))


def test_forks_of_forks_add_runs(model: Model) -> None:
    cache = model.new_cache()
    run(model, cache, IDS[:300])
    forks = [cache]
    for length in (400, 600, 700):
        fork = forks[-1].fork(forks[-1].length)
        run(model, fork, IDS[fork.length : length])
        forks.append(fork)
    last = forks[-1].fork(690)
    assert [shared[1].shape[1] for shared in layer(last)._shared] == [256, 256]
    text = IDS[:690] + random_ids(9, seed=1)
    assert np.array_equal(run(model, last, text[690:]), fresh(model, text, 9))


def test_shared_positions_go_into_files(model: Model, tmp_path: Path) -> None:
    source = model.new_cache()
    run(model, source, IDS[:600])
    fork = source.fork(600)
    model.save_cache(fork, tmp_path / "cache")
    restored = model.restore_cache(tmp_path / "cache")
    assert np.array_equal(run(model, restored, IDS[600:610]), fresh(model, IDS[:610], 10))


def test_a_beginning_takes_memory_once(model: Model) -> None:
    source = model.new_cache()
    run(model, source, IDS[:640])
    forks = [source.fork(600) for _ in range(8)]
    own = sum(layer(fork).capacity * layer(fork).position_bytes for fork in forks)
    assert own < 8 * 400 * layer(source).position_bytes
