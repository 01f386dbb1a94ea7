"""The arithmetic of rarer parts, against torch and against the native one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from entrollm import _core
from entrollm.engine.arithmetic import ACTIVATIONS, cap, plain_attention, rotate_neighbours

REFERENCES = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu2": lambda x: torch.relu(x) ** 2,
}


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations(name: str) -> None:
    x = np.concatenate([np.linspace(-12, 12, 4001), [-1e4, 1e4, 0.0, -0.0, 1e-30]]).astype(np.float32)
    given = x.copy()
    found = ACTIVATIONS[name](x)
    expected = REFERENCES[name](torch.from_numpy(given)).numpy()
    np.testing.assert_array_equal(x, given)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)


def test_caps_stay_below_their_bound() -> None:
    x = np.array([-1e6, -3.0, 0.0, 1e-3, 1e6], dtype=np.float32)
    np.testing.assert_allclose(cap(x.copy(), 2.0), 2 * np.tanh(x / 2), rtol=1e-6)


@pytest.mark.parametrize(("n", "length", "window"), [(1, 9, None), (5, 9, None), (9, 9, 4), (3, 9, 2)])
def test_attention_with_a_cap_out_of_reach_is_attention(n: int, length: int, window: int | None) -> None:
    generator = np.random.default_rng(4)
    queries, keys, values = (
        generator.standard_normal(shape).astype(np.float32) for shape in ((n, 6, 16), (2, 16, length), (2, length, 16))
    )
    expected = _core.attention(queries, keys, values, window, _core.ThreadPool(1))
    found = plain_attention(queries * np.float32(16**-0.5), keys, values, window, bound=1e4)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_rotation_of_neighbours() -> None:
    generator = np.random.default_rng(5)
    x = generator.standard_normal((3, 2, 8)).astype(np.float32)
    angles = generator.standard_normal((3, 1, 3)).astype(np.float32)
    expected = x.copy()
    expected[..., 0:6:2] = x[..., 0:6:2] * np.cos(angles) - x[..., 1:6:2] * np.sin(angles)
    expected[..., 1:6:2] = x[..., 1:6:2] * np.cos(angles) + x[..., 0:6:2] * np.sin(angles)
    rotate_neighbours(x, np.cos(angles), np.sin(angles))
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-6)
