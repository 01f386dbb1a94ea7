"""Linear attention by the gated delta rule (Qwen3-Next, Qwen3.5).

The memory M of a head maps keys to values. A token decays it, and then corrects what it has for the token's key:
M <- a M; M <- M + k (b (v - k M)). Its output is q M. A run of tokens is computed at once, as in Yang et al., "Gated
Delta Networks" (arXiv 2412.06464): the corrections solve a triangular system.
"""

from __future__ import annotations

import numpy as np

from entrollm import _core
from entrollm.engine.arithmetic import sigmoid, silu
from entrollm.engine.attention import Angles
from entrollm.engine.projection import Projection
from entrollm.engine.state import Recurrence, RecurrentState, convolve, load_kernel
from entrollm.engine.weights import Floats, Weights, load_tensor
from entrollm.models.config import GatedDelta, ModelConfig

# Tokens that are computed at once.
_CHUNK = 64
_EPS = np.float32(1e-6)


class GatedDeltaRule:
    """The mixer of one layer.

    Raises:
        FormatError: a tensor is missing or has another shape.
    """

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str, form: GatedDelta) -> None:
        place, hidden = f"{prefix}linear_attn.", config.hidden_size
        self._form, self._pool, self._eps = form, weights.pool, config.norm_eps
        self._keys, self._values = form.key_heads * form.key_dim, form.value_heads * form.value_dim
        mixed = 2 * self._keys + self._values
        names = {"in_proj_qkv": mixed, "in_proj_z": self._values}
        names |= {"in_proj_b": form.value_heads, "in_proj_a": form.value_heads}
        if form.is_by_head:
            names = {"in_proj_qkvz": mixed + self._values, "in_proj_ba": 2 * form.value_heads}
        self._input = Projection(weights, {place + name: size for name, size in names.items()}, hidden, False)
        self._output = Projection(weights, {f"{place}out_proj": hidden}, self._values, False)
        self._kernel = load_kernel(weights, f"{place}conv1d.weight", mixed, form.kernel)
        self._decay = -np.exp(load_tensor(weights, f"{place}A_log", (form.value_heads,)))
        self._decay_bias = load_tensor(weights, f"{place}dt_bias", (form.value_heads,))
        self._norm = load_tensor(weights, f"{place}norm.weight", (form.value_dim,))

    def __call__(self, x: Floats, angles: Angles | None, cache: Recurrence) -> Floats:
        """float32 (n, hidden_size), normalised -> float32 (n, hidden_size)."""
        n, form = len(x), self._form
        mixed, gate, strengths, decays = self._parts(self._input(x))
        logs = self._decay * np.logaddexp(decays + self._decay_bias, np.float32(0))
        found = cache.advance([mixed, sigmoid(strengths), logs], self._step)
        found = _core.rms_norm(found.reshape(-1, form.value_dim), self._norm, self._eps, self._pool)
        return self._output(found.reshape(n, self._values) * silu(gate))

    def _parts(self, x: Floats) -> tuple[Floats, Floats, Floats, Floats]:
        """The inputs of the convolution, the gates of the outputs, and each value head's strength and decay."""
        form, n = self._form, len(x)
        if not form.is_by_head:
            ends = np.cumsum([2 * self._keys + self._values, self._values, form.value_heads])
            mixed, gate, strengths, decays = np.split(x, ends, axis=1)
            return mixed, gate, strengths, decays
        each = self._values // form.key_heads
        by_head = x[:, : 2 * self._keys + 2 * self._values].reshape(n, form.key_heads, -1)
        ends = np.cumsum([form.key_dim, form.key_dim, each])
        queries, keys, values, gate = (part.reshape(n, -1) for part in np.split(by_head, ends, axis=2))
        pairs = x[:, 2 * self._keys + 2 * self._values :].reshape(n, form.key_heads, 2, -1)
        strengths, decays = (pairs[:, :, i].reshape(n, form.value_heads) for i in (0, 1))
        return np.concatenate([queries, keys, values], axis=1), gate, strengths, decays

    def _step(self, state: RecurrentState, /, *rows: Floats) -> Floats:
        mixed, strengths, logs = rows
        form, n = self._form, len(mixed)
        mixed = silu(convolve(state, mixed, self._kernel, None))
        queries, keys, values = np.split(mixed, [self._keys, 2 * self._keys], axis=1)
        queries, keys = (self._unit(part.reshape(n, form.key_heads, form.key_dim)) for part in (queries, keys))
        queries = queries * np.float32(form.key_dim**-0.5)
        values = values.reshape(n, form.value_heads, form.value_dim).transpose(1, 0, 2)
        found = np.empty((n, form.value_heads, form.value_dim), dtype=np.float32)
        for start in range(0, n, _CHUNK):
            part = slice(start, start + _CHUNK)
            output = _run_chunk(
                state, queries[:, part], keys[:, part], values[:, part], strengths[part].T, logs[part].T
            )
            found[part] = output.transpose(1, 0, 2)
        return found.reshape(n, self._values)

    def _unit(self, x: Floats) -> Floats:
        """Unit vectors for each value head: float32 (n, key_heads, key_dim) -> (value_heads, n, key_dim)."""
        x = x / np.sqrt((x * x).sum(axis=-1, keepdims=True) + _EPS)
        return np.repeat(x, self._form.value_heads // self._form.key_heads, axis=1).transpose(1, 0, 2)


def _run_chunk(
    state: RecurrentState, queries: Floats, keys: Floats, values: Floats, strengths: Floats, logs: Floats
) -> Floats:
    """Bring the memory forward by a few tokens.

    Args:
        state: its memory is float32 (heads, key_dim, value_dim).
        queries, keys, values: float32 (heads, n, key_dim or value_dim).
        strengths, logs: float32 (heads, n): how much of an error a token corrects, and the logarithms of the decays.
    Returns:
        float32 (heads, n, value_dim).
    """
    total = np.cumsum(logs, axis=1)
    spans = total[:, :, None] - total[:, None, :]
    lower = np.tril(np.ones(spans.shape[1:], dtype=bool))
    decays = np.exp(np.where(lower, spans, np.float32(-np.inf)))
    grown = np.exp(total)[:, :, None]
    system = (keys @ keys.transpose(0, 2, 1)) * decays * strengths[:, :, None]
    diagonal = np.arange(system.shape[1])
    system[:, diagonal, diagonal] = 1
    # What each token adds, given what the memory at the start and the tokens before it have for its key.
    wanted = strengths[:, :, None] * (values - (keys * grown) @ state.memory)
    added: Floats = np.linalg.solve(system, wanted)
    found: Floats = (queries * grown) @ state.memory
    found += ((queries @ keys.transpose(0, 2, 1)) * decays) @ added
    left = np.exp(total[:, -1:] - total)[:, :, None]
    state.memory = state.memory * grown[:, -1:] + (keys * left).transpose(0, 2, 1) @ added
    return found
