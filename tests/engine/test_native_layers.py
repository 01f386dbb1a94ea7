"""Native halves of layers: the same bits as the same operations called from Python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entrollm import CompressOptions, Model, _core, compress, load
from entrollm.codec.blocks import choose_blocks
from entrollm.engine.batch import SequenceStep
from entrollm.engine.projection import Projection
from entrollm.engine.weights import Floats
from entrollm.format.code import Code, Field
from tests.engine.architectures import random_ids
from tests.support.matrices import store

# Whether attention and feed-forward parts of an architecture are native.
KINDS = {
    "llama-bias": (True, True),
    "phi3-longrope": (True, True),
    "qwen2-window": (True, True),
    "qwen3": (True, True),
    "gemma3": (True, True),
    "gemma2": (False, True),
    "olmo2": (True, True),
    "granite": (True, True),
    "ministral3": (True, True),
    "mixtral": (True, False),
    "glm4": (False, True),
    "gpt_neox": (False, False),
}


def outputs(model: Model) -> list[Floats]:
    """Logits of a prompt, of tokens after it, and of sequences side by side."""
    ids = random_ids(44)
    caches = [model.new_cache(), model.new_cache()]
    first = [SequenceStep(np.array(ids[:37]), caches[0]), SequenceStep(np.array(ids[:2]), caches[1])]
    found = [model.logits(ids[:40]), model.step(first)]
    for i in range(37, 40):
        found.append(model.step([SequenceStep(np.array(ids[i : i + 1]), cache) for cache in caches]))
        found.append(model.step([SequenceStep(np.array(ids[i : i + 1]), caches[1])]))
    return found


def noting(kind: str, made: list[str]) -> Callable[..., object]:
    """A native class that notes that an object of it is made."""
    make: Callable[..., object] = getattr(_core, kind)

    def noted(*args: object) -> object:
        made.append(kind)
        return make(*args)

    return noted


@pytest.mark.parametrize("name", [*KINDS, "lossless"])
def test_native_parts_equal_python(
    name: str, checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = CompressOptions(bits=4) if name in KINDS else CompressOptions(lossless=True)
    compress(checkpoint(name if name in KINDS else "llama"), tmp_path / "coded", options)
    made: list[str] = []
    for kind in ("AttentionBlock", "FeedForwardBlock"):
        monkeypatch.setattr(_core, kind, noting(kind, made))
    natively = outputs(load(tmp_path / "coded", threads=2))
    assert ("AttentionBlock" in made, "FeedForwardBlock" in made) == KINDS.get(name, (True, True))
    made.clear()
    monkeypatch.setattr(Projection, "native", lambda self: None)
    in_python = outputs(load(tmp_path / "coded", threads=1))
    assert not made
    for ours, expected in zip(natively, in_python, strict=True):
        np.testing.assert_array_equal(ours.view(np.uint32), expected.view(np.uint32))


def product(rows: int, columns: int, bias: Floats | None = None) -> _core.JoinedProduct:
    """A product with a matrix of zeros."""
    symbols = np.zeros((rows, columns), np.uint8)
    stored = store(Code(Field(8, ()), 0), symbols, choose_blocks(rows, columns))
    return _core.JoinedProduct("zeros", [stored.open()], bias)


def attention(
    heads: int = 2, width: int = 16, norm: Floats | None = None, head_norms: Floats | None = None
) -> _core.AttentionBlock:
    """Attention with two heads of 8 features on one key-value head; other numbers do not fit."""
    around = _core.Surroundings(norm, None, 1e-5, None)
    shape = _core.AttentionShape(heads, 1, 8, None)
    return _core.AttentionBlock(product(32, 16), product(16, width), around, shape, head_norms, None, None)


def attend(rows: int = 1, length: int = 3, **changed: Any) -> Floats:
    """Run it on one sequence, with some arguments replaced."""
    keys, values = np.zeros((1, 8, length), np.float32), np.zeros((1, length, 8), np.float32)
    given: dict[str, Any] = {"count": rows, "keys": keys, "values": values, "window": None, "cosines": None}
    given = {**given, "features": 16, **changed}
    x = np.zeros((rows, given["features"]), np.float32)
    sequence = given["count"], given["keys"], given["values"], given["window"], given.get("scales")
    sequence = (*sequence, given.get("earlier", []))
    angles = given["cosines"], given.get("sines", given["cosines"]), given.get("factors")
    return attention()(x, *angles, [sequence], _core.ThreadPool(1))


_HALF = np.zeros((1, 1, 4), np.float32)
REFUSALS: dict[str, tuple[Callable[[], object], str]] = {
    "features": (lambda: attend(features=17), "another number of features"),
    "rows": (lambda: attend(rows=2, count=1), "a row for each new token"),
    "no tokens": (lambda: attend(count=0), "fewer positions than new tokens"),
    "too many tokens": (lambda: attend(rows=4), "fewer positions than new tokens"),
    "keys": (lambda: attend(keys=np.zeros((1, 7, 3), np.float32)), "the same positions"),
    "narrow heads": (
        lambda: attend(keys=np.zeros((1, 7, 3), np.float32), values=np.zeros((1, 3, 7), np.float32)),
        "do not fit the heads",
    ),
    "values": (lambda: attend(values=np.zeros((1, 4, 8), np.float32)), "the same positions"),
    "types": (lambda: attend(keys=np.zeros((1, 8, 3), np.float16)), "of one type"),
    "doubles": (lambda: attend(keys=np.zeros((1, 8, 3))), "float32, float16 or int8"),
    "no scales": (
        lambda: attend(keys=np.zeros((1, 8, 3), np.int8), values=np.zeros((1, 3, 8), np.int8)),
        "integers, and nothing else, should have scales",
    ),
    "needless scales": (lambda: attend(scales=np.zeros((2, 1, 3), np.float32)), "and nothing else"),
    "few scales": (
        lambda: attend(
            keys=np.zeros((1, 8, 3), np.int8),
            values=np.zeros((1, 3, 8), np.int8),
            scales=np.zeros((2, 1, 2), np.float32),
        ),
        "each head and position",
    ),
    "turned keys": (lambda: attend(keys=np.zeros((1, 3, 8), np.float32).swapaxes(1, 2)), "lie side by side"),
    "turned values": (lambda: attend(values=np.zeros((1, 8, 3), np.float32).swapaxes(1, 2)), "one behind the other"),
    "window": (lambda: attend(window=0), "at least one position"),
    "wide angles": (lambda: attend(cosines=np.zeros((1, 5), np.float32)), "do not fit the rows"),
    "more angles": (lambda: attend(cosines=np.zeros((2, 4), np.float32)), "do not fit the rows"),
    "sines": (lambda: attend(cosines=_HALF, sines=_HALF[:, :, :3]), "as many sines"),
    "no sines": (lambda: attend(cosines=_HALF, sines=None), "as many sines"),
    "factors": (lambda: attend(factors=np.ones(2, np.float32)), "for each row"),
    "heads": (lambda: attention(heads=3), "do not fit the heads"),
    "output": (lambda: attention(width=17), "do not fit the heads"),
    "norm": (lambda: attention(norm=np.ones(15, np.float32)), "for each feature"),
    "head norms": (lambda: attention(head_norms=np.ones(16, np.float32)), "each feature of queries and keys"),
    "bias": (lambda: product(4, 4, np.ones(3, np.float32)), "a bias for each output"),
    "no matrices": (lambda: _core.JoinedProduct("none", [], None), "needs a matrix"),
    "gates": (
        lambda: _core.FeedForwardBlock(
            product(14, 16), product(16, 8), _core.Surroundings(None, None, 1e-5, None), False
        ),
        "do not fit each other",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refuses(case: str) -> None:
    assert attend().shape == (1, 16)
    call, message = REFUSALS[case]
    with pytest.raises(ValueError, match=message):
        call()
