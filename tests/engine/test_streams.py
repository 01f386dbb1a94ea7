"""Streams that share a cache, are dropped half way, or are given text that is not Unicode."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import pytest

from entrollm.engine.model import Model
from tests.engine.dense import load_dense
from tests.support.paths import TINY_LLAMA


@pytest.fixture(scope="module")
def example() -> Model:
    return load_dense(TINY_LLAMA)


def test_two_streams_on_one_cache_do_not_mix(example: Model) -> None:
    cache = example.new_cache()
    first = example.stream("The king", cache=cache, max_tokens=20)
    second = example.stream("It rained", cache=cache, max_tokens=20)
    pieces = iter(first)
    next(pieces)
    text = "".join(second)
    with pytest.raises(ValueError, match=r"another stream has used this stream's cache.*new_cache\(\)"):
        list(pieces)
    assert text == example.generate("It rained", max_tokens=20).text
    assert first.result.finish_reason == "unfinished"


def test_a_cache_serves_again_after_a_dropped_stream(example: Model) -> None:
    cache = example.new_cache()
    next(iter(example.stream("The king", cache=cache, max_tokens=20)))
    assert "".join(example.stream("The king", cache=cache, max_tokens=20)) == (
        example.generate("The king", max_tokens=20).text
    )


def test_a_dropped_stream_frees_its_cache_at_once(example: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    caches = []
    new_cache = example._decoder.new_cache

    def remembered() -> object:
        cache = new_cache()
        caches.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(example._decoder, "new_cache", remembered)
    gc.disable()
    try:
        stream = example.stream("The king", max_tokens=20)
        next(iter(stream))
        del stream
        for _ in example.stream("The king", max_tokens=20):
            break
        assert [cache() for cache in caches] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("text", ["caf\udce9", "\ud800", "ab\udfff"])
def test_lone_surrogates_are_refused(example: Model, text: str) -> None:
    with pytest.raises(ValueError, match=f"not valid Unicode at character {len(text) - 1}.*not UTF-8"):
        example.encode(text)
    with pytest.raises(ValueError, match="not valid Unicode"):
        example.generate(text, max_tokens=2)


@pytest.mark.parametrize(("arguments", "given"), [([b"-p", b"caf\xe9"], b""), ([], b"caf\xe9")])
@pytest.mark.parametrize("utf8_mode", [b"0", b"1"])
def test_prompts_that_are_not_utf8(arguments: list[bytes], given: bytes, utf8_mode: bytes) -> None:
    command = [sys.executable.encode(), b"-X", b"utf8=" + utf8_mode, b"-m", b"entrollm", b"run"]
    done = subprocess.run([*command, str(TINY_LLAMA).encode(), *arguments], input=given, capture_output=True)
    assert done.returncode == 1
    assert b"error:" in done.stderr
    assert b"UTF-8" in done.stderr
    assert b"Traceback" not in done.stderr
