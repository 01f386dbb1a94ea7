"""Mamba-2: a state-space layer with one decay for each head.

The memory M of a head decays and takes in what a token says: M <- exp(d A) M + (d B) x. Its output is C M + D x. A run
of tokens is computed at once, as in Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060).
"""

from __future__ import annotations

import numpy as np

from entrollm import _core
from entrollm.engine.arithmetic import ACTIVATIONS, silu
from entrollm.engine.attention import Angles
from entrollm.engine.projection import Projection
from entrollm.engine.state import Recurrence, RecurrentState, convolve, load_kernel
from entrollm.engine.weights import Floats, Weights, load_tensor
from entrollm.models.config import Mamba2, ModelConfig

# Tokens that are computed at once.
_CHUNK = 64


class Mamba2Mixer:
    """The mixer of one layer.

    Raises:
        FormatError: a tensor is missing or has another shape.
    """

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str, form: Mamba2) -> None:
        place, hidden = f"{prefix}{form.place}.", config.hidden_size
        self._form, self._pool, self._eps = form, weights.pool, config.norm_eps
        self._inner, self._shared = form.heads * form.head_dim, form.groups * form.state
        channels = self._inner + 2 * self._shared
        parts = {f"{place}in_proj": self._inner + channels + form.heads}
        self._input = Projection(weights, parts, hidden, form.has_bias)
        self._output = Projection(weights, {f"{place}out_proj": hidden}, self._inner, form.has_bias)
        self._kernel = load_kernel(weights, f"{place}conv1d.weight", channels, form.kernel)
        self._kernel_bias: Floats | None = None
        if form.has_convolution_bias:
            self._kernel_bias = load_tensor(weights, f"{place}conv1d.bias", (channels,))
        self._decay = -np.exp(load_tensor(weights, f"{place}A_log", (form.heads,)))
        self._skip = load_tensor(weights, f"{place}D", (form.heads,))
        self._time_bias = load_tensor(weights, f"{place}dt_bias", (form.heads,))
        norm = load_tensor(weights, f"{place}norm.weight", (self._inner,))
        self._norm = norm.reshape(form.groups, -1)
        self._activate = ACTIVATIONS[form.activation]

    def __call__(self, x: Floats, angles: Angles | None, cache: Recurrence) -> Floats:
        """float32 (n, hidden_size), normalised -> float32 (n, hidden_size)."""
        form = self._form
        gate, mixed, times = np.split(self._input(x), [self._inner, 2 * self._inner + 2 * self._shared], axis=1)
        times = np.logaddexp(times + self._time_bias, np.float32(0))
        if form.time_limits is not None:
            times = np.clip(times, *form.time_limits).astype(np.float32, copy=False)
        found = cache.advance([mixed, times], self._step) * silu(gate)
        groups = found.reshape(len(x), form.groups, -1)
        found = _core.rms_norm(np.ascontiguousarray(groups), self._norm, self._eps, self._pool)
        return self._output(found.reshape(len(x), self._inner))

    def _step(self, state: RecurrentState, /, *rows: Floats) -> Floats:
        mixed, times = rows
        form, n = self._form, len(mixed)
        mixed = self._activate(convolve(state, mixed, self._kernel, self._kernel_bias))
        x, writes, reads = np.split(mixed, [self._inner, self._inner + self._shared], axis=1)
        x = x.reshape(n, form.heads, form.head_dim).transpose(1, 0, 2)
        writes, reads = (self._by_head(part) for part in (writes, reads))
        found = np.empty((n, form.heads, form.head_dim), dtype=np.float32)
        for start in range(0, n, _CHUNK):
            part = slice(start, start + _CHUNK)
            steps = times[part].T
            output = _run_chunk(
                state, x[:, part] * steps[:, :, None], writes[:, part], reads[:, part], steps * self._decay[:, None]
            )
            output += x[:, part] * self._skip[:, None, None]
            found[part] = output.transpose(1, 0, 2)
        return found.reshape(n, self._inner)

    def _by_head(self, x: Floats) -> Floats:
        """What heads of a group share, for each of them: float32 (n, groups * state) -> (heads, n, state)."""
        form = self._form
        grouped = x.reshape(len(x), form.groups, form.state)
        return np.repeat(grouped, form.heads // form.groups, axis=1).transpose(1, 0, 2)


def _run_chunk(state: RecurrentState, x: Floats, writes: Floats, reads: Floats, logs: Floats) -> Floats:
    """Bring the memory forward by a few tokens.

    Args:
        state: its memory is float32 (heads, state, head_dim).
        x: what is taken in, float32 (heads, n, head_dim).
        writes, reads: where to, and from where: float32 (heads, n, state).
        logs: float32 (heads, n), the logarithms of the decays.
    Returns:
        float32 (heads, n, head_dim).
    """
    total = np.cumsum(logs, axis=1)
    spans = total[:, :, None] - total[:, None, :]
    lower = np.tril(np.ones(spans.shape[1:], dtype=bool))
    decays = np.exp(np.where(lower, spans, np.float32(-np.inf)))
    grown = np.exp(total)[:, :, None]
    found: Floats = (reads * grown) @ state.memory
    found += ((reads @ writes.transpose(0, 2, 1)) * decays) @ x
    left = np.exp(total[:, -1:] - total)[:, :, None]
    state.memory = state.memory * grown[:, -1:] + (writes * left).transpose(0, 2, 1) @ x
    return found
