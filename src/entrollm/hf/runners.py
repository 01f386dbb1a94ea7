"""How the tokens of sequences go through a model of transformers: all together, or one sequence at a time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from entrollm.engine.batch import SequenceCache
from entrollm.hf.arena import Arena, ArenaCache
from entrollm.hf.attention import shared_keys

# Lengths of caches are rounded up to powers of two from here on, so that few graphs serve all.
_SHORTEST = 256


class Runner(Protocol):
    """Runs a model on the tokens of sequences.

    Attributes:
        reads_pieces: whether several tokens can follow others.
    """

    reads_pieces: bool

    def new_cache(self) -> SequenceCache:
        """An empty cache for one sequence."""

    def read(self, ids: Sequence[int], cache: Any, *, all_logits: bool) -> Tensor:
        """Run the next tokens of one sequence and add them to its cache.

        Returns:
            logits (1, vocab_size) after the last token, or (n, vocab_size) after all.
        """

    def decode(self, ids: Sequence[int], caches: Sequence[Any]) -> Tensor:
        """Run one token of each sequence: logits (n, vocab_size)."""


class _Call:
    """Calls a model by the names that its release of transformers has."""

    def __init__(self, model: Any) -> None:
        names = inspect.signature(model.forward).parameters
        self._model = model
        self._cache = "cache" if "cache" in names else "past_key_values"
        self._keep = {"logits_to_keep": 1} if "logits_to_keep" in names else {}

    def __call__(self, ids: Tensor, cache: Any, *, all_logits: bool = False, **options: Any) -> Tensor:
        """Logits (batch, n, vocab_size) of token ids (batch, n), or (batch, 1, vocab_size) of the last ones."""
        keep = {} if all_logits else self._keep
        logits: Tensor = self._model(input_ids=ids, use_cache=True, **{self._cache: cache}, **keep, **options).logits
        return logits if all_logits else logits[:, -1:]


class OneByOne:
    """Runs one sequence at a time, each with the cache that transformers makes for the model.

    A prompt has to come as a whole: recurrent layers of transformers take several tokens at the beginning only, and
    rotations may depend on how long the sequence is. Where that changes them, the sequence is read again.
    """

    reads_pieces = False

    def __init__(self, model: Any) -> None:
        self._call = _Call(model)
        self._model = model
        self._limits = _rotation_limits(model.config)

    def new_cache(self) -> SequenceCache:
        """See Runner."""
        return WholeCache(self._model.config)

    def read(self, ids: Sequence[int], cache: Any, *, all_logits: bool) -> Tensor:
        """See Runner."""
        known, count = cache.length, len(ids)
        if any(0 < known <= limit < known + count for limit in self._limits):
            # The keys so far were rotated otherwise than those to come will be.
            ids = [*cache.ids, *ids]
            cache.reuse(ids)
        tokens = torch.tensor([list(ids)], device=self._model.device)
        logits = self._call(tokens, cache.states, all_logits=all_logits)[0]
        cache.ids += ids
        return logits[-count:]

    def decode(self, ids: Sequence[int], caches: Sequence[Any]) -> Tensor:
        """See Runner."""
        each = zip(ids, caches, strict=True)
        return torch.cat([self.read([token], cache, all_logits=False) for token, cache in each])


class WholeCache:
    """A sequence with whatever its model keeps of it, which no other sequence can begin with; see SequenceCache.

    Attributes:
        ids: the tokens seen so far.
        states: of transformers.
    """

    def __init__(self, config: Any) -> None:
        self._config = config
        self._clear()

    def _clear(self) -> None:
        self.ids: list[int] = []
        self.states = DynamicCache(config=self._config)

    @property
    def length(self) -> int:
        """Tokens seen so far."""
        return len(self.ids)

    def shared(self, ids: Sequence[int]) -> int:
        """See SequenceCache."""
        return 0

    def reuse(self, ids: Sequence[int]) -> int:
        """See SequenceCache."""
        self._clear()
        return 0

    def fork(self, length: int) -> WholeCache:
        """See SequenceCache."""
        return WholeCache(self._config)


class Together:
    """Runs the next tokens of all sequences in one call, on a GPU by CUDA graphs.

    Args:
        model: one whose layers all keep keys and values, see attention_windows.
        windows: of its layers.
    """

    reads_pieces = True

    def __init__(self, model: Any, windows: Sequence[int | None]) -> None:
        self._call = _Call(model)
        self._model = model
        self._arena = Arena(windows)
        self._is_additive = model.config._attn_implementation == "eager"
        self._graphs: dict[tuple[int, ...], _Graph] | None = None
        if model.device.type == "cuda":
            # One pool for all: a graph's results are read before another one runs.
            self._graphs, self._pool = {}, torch.cuda.graph_pool_handle()

    def new_cache(self) -> SequenceCache:
        """See Runner."""
        return ArenaCache(self._arena)

    def read(self, ids: Sequence[int], cache: Any, *, all_logits: bool) -> Tensor:
        """See Runner."""
        start, stop = cache.length, cache.length + len(ids)
        self._arena.reserve(stop)
        self._arena.rows, self._arena.positions, self._arena.length = cache.row, slice(start, stop), stop
        positions = torch.arange(start, stop, device=self._model.device)[None]
        tokens = torch.tensor([list(ids)], device=self._model.device)
        logits = self._run(tokens, positions, all_logits=all_logits)[0]
        cache.ids += ids
        return logits

    def decode(self, ids: Sequence[int], caches: Sequence[Any]) -> Tensor:
        """See Runner."""
        count, longest = len(ids), 1 + max(cache.length for cache in caches)
        self._arena.reserve(longest)
        rows = [cache.row for cache in caches]  # taking one may move the buffers
        batch = 1 << (count - 1).bit_length()
        length = min(max(_SHORTEST, 1 << (longest - 1).bit_length()), self._arena.capacity)
        inputs = torch.zeros((3, batch), dtype=torch.int64)
        inputs[:, :count] = torch.tensor([list(ids), rows, [cache.length for cache in caches]])
        logits = self._replay((batch, length), inputs, lambda held: self._decode(held, length))
        for token, cache in zip(ids, caches, strict=True):
            cache.ids.append(token)
        return logits[:count]

    def extend(self, ids: Sequence[int], cache: Any) -> Tensor:
        """Run a few tokens of one sequence and add them to its cache: logits (n, vocab_size) after each.

        On a GPU, every number of tokens has a graph of its own.
        """
        start, stop = cache.length, cache.length + len(ids)
        self._arena.reserve(stop)
        row = cache.row
        length = min(max(_SHORTEST, 1 << (stop - 1).bit_length()), self._arena.capacity)
        inputs = torch.tensor([list(ids), range(start, stop)])
        logits = self._replay((len(ids), length, row), inputs, lambda held: self._extend(held, row, length))
        cache.ids += ids
        return logits

    def _replay(self, key: tuple[int, ...], inputs: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        """Run a step with inputs on the CPU, on a GPU by the graph that has this key; the next call overwrites it."""
        if self._graphs is None:
            return run(inputs.to(self._model.device))
        if self._arena.is_moved:
            self._graphs.clear()
            self._arena.is_moved = False
        if key not in self._graphs:
            with shared_keys(self._model):
                self._graphs[key] = _Graph(run, inputs.to(self._model.device), self._pool)
        return self._graphs[key](inputs)

    def without_graphs(self) -> bool:
        """Run without CUDA graphs from now on, and say whether there were any."""
        had_graphs, self._graphs = self._graphs is not None, None
        return had_graphs

    def _decode(self, inputs: Tensor, length: int) -> Tensor:
        """The logits of one token each of some rows, whose caches are read up to `length`: (batch, vocab_size).

        Args:
            inputs: int64 (3, batch): tokens, rows and positions.
            length: tokens, more than any position.
        """
        tokens, rows, positions = inputs
        self._arena.rows, self._arena.positions, self._arena.length = rows, positions, length
        return self._run(tokens[:, None], positions[:, None])[:, -1]

    def _extend(self, inputs: Tensor, row: int, length: int) -> Tensor:
        """The logits after each of some tokens of a row, which is read up to `length`: (n, vocab_size).

        Args:
            inputs: int64 (2, n): tokens and positions.
            row: of the arena.
            length: tokens, more than any position.
        """
        tokens, positions = inputs
        self._arena.rows, self._arena.positions, self._arena.length = row, positions, length
        return self._run(tokens[None], positions[None], all_logits=True)[0]

    def _run(self, tokens: Tensor, positions: Tensor, *, all_logits: bool = False) -> Tensor:
        windows = set(self._arena.windows)
        masks = {window: self._mask(positions, window) for window in windows}
        names = {"full_attention" if window is None else "sliding_attention": mask for window, mask in masks.items()}
        mask = names if len(windows) > 1 else next(iter(names.values()))
        return self._call(tokens, self._arena.cache, all_logits=all_logits, position_ids=positions, attention_mask=mask)

    def _mask(self, positions: Tensor, window: int | None) -> Tensor:
        """What each query sees: (batch, 1, n, length)."""
        distance = positions[:, None, :, None] - torch.arange(self._arena.length, device=positions.device)
        seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        if not self._is_additive:
            return seen
        least = torch.finfo(self._model.dtype).min
        return torch.where(seen, 0.0, least).to(self._model.dtype)


class _Graph:
    """A step, recorded once and replayed.

    Args:
        run: from inputs to logits.
        inputs: int64, on the GPU: those of the first step, whose memory those of others are copied to.
        pool: of graphs.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], inputs: Tensor, pool: Any) -> None:
        self._inputs = inputs
        self._graph = torch.cuda.CUDAGraph()
        # Outside of the graph first, so that whatever is made at the first call exists.
        side = torch.cuda.Stream(inputs.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(inputs.device))
        with torch.cuda.stream(side):
            run(inputs)
        torch.cuda.current_stream(inputs.device).wait_stream(side)
        with torch.cuda.graph(self._graph, pool=pool):
            self._logits = run(inputs)

    def __call__(self, inputs: Tensor) -> Tensor:
        """The logits, which the next call overwrites: (batch, vocab_size)."""
        self._inputs.copy_(inputs)
        self._graph.replay()
        return self._logits


def attention_windows(config: Any) -> list[int | None] | None:
    """For each layer the tokens that one sees, `None` for all; `None` if a layer keeps something else than that.

    Nor are there any if rotations depend on the length of a sequence: transformers chooses them for a whole call, by
    the largest position in it.

    Args:
        config: a model's configuration.
    """
    if any(_rope_type(each) == "longrope" or "dynamic" in _rope_type(each) for each in _ropes(config)):
        return None
    windows: list[int | None] = []
    kinds = getattr(config.get_text_config(decoder=True), "layer_types", None) or ()
    if not set(kinds) <= {"full_attention", "sliding_attention"}:
        return None
    for layer in DynamicCache(config=config).layers:
        name = type(layer).__name__
        if name not in ("DynamicLayer", "DynamicSlidingWindowLayer"):
            return None
        windows.append(getattr(layer, "sliding_window", None))
    # A model gives its layers two kinds of masks at most.
    return windows if windows and len(set(windows)) <= 2 and len(set(windows) - {None}) <= 1 else None


def _ropes(config: Any) -> list[Mapping[str, Any]]:
    """The rotations of a model's text part, of which some have one for each type of layer."""
    found = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    return [found, *(each for each in found.values() if isinstance(each, Mapping))]


def _rope_type(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _rotation_limits(config: Any) -> set[int]:
    """Numbers of tokens beyond which longrope rotates all keys of a sequence otherwise."""
    text = config.get_text_config(decoder=True)
    name = "original_max_position_embeddings"
    ropes = [rope for rope in _ropes(config) if _rope_type(rope) == "longrope"]
    limits = [rope.get(name) or getattr(text, name, None) or text.max_position_embeddings for rope in ropes]
    return {int(limit) for limit in limits}
