"""What a model keeps of the tokens seen so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from entrollm.engine.layer_cache import CACHE_TYPES, CacheType, LayerCache
from entrollm.engine.state import NoState, RecurrentState
from entrollm.errors import UnsupportedError
from entrollm.models.config import GatedDelta, LatentAttention, Mamba2, ModelConfig, SharedKeys, ShortConvolution

LayerState = LayerCache | RecurrentState | NoState


def check_cache_type(cache_type: str, config: ModelConfig) -> CacheType:
    """Return `cache_type`.

    Raises:
        ValueError: it is not one of the choices.
        UnsupportedError: the model's attention does not read keys and values of this type.
    """
    for choice in CACHE_TYPES:
        if cache_type == choice:
            break
    else:
        raise ValueError(f"the cache's type should be one of {', '.join(CACHE_TYPES)}, found {cache_type!r}")
    is_latent = any(isinstance(config.mixer(index), LatentAttention) for index in range(config.num_layers))
    if choice == "int8" and (is_latent or config.attention_cap is not None or config.has_sinks):
        kind = "latent attention" if is_latent else "attention with capped scores or sinks"
        raise UnsupportedError(f"{kind} ({config.model_type}) has no int8 cache; use f16, or f32")
    return choice


def new_layer_state(config: ModelConfig, index: int, cache_type: CacheType = "f32") -> LayerState:
    """What layer `index` keeps of the tokens of a sequence."""
    config = config.layer(index)
    if not config.block.has_mixer:
        return NoState()
    match config.mixer(index):
        case SharedKeys():
            return NoState()
        case LatentAttention(rank=rank, rotated=rotated):
            # The vectors that keys and values are made of, and the rotated features that all heads share.
            return LayerCache(1, rank + rotated, config.windows[index], 0, cache_type)
        case GatedDelta() as form:
            channels = 2 * form.key_heads * form.key_dim + form.value_heads * form.value_dim
            return RecurrentState((form.kernel - 1, channels), (form.value_heads, form.key_dim, form.value_dim))
        case ShortConvolution(kernel=kernel):
            return RecurrentState((kernel - 1, config.hidden_size), None)
        case Mamba2() as form:
            channels = form.heads * form.head_dim + 2 * form.groups * form.state
            return RecurrentState((form.kernel - 1, channels), (form.heads, form.state, form.head_dim))
    # Attention with these options reads its keys and values as one array.
    can_share = config.attention_cap is None and not config.has_sinks
    return LayerCache(config.num_kv_heads, config.head_dim, config.windows[index], None, cache_type, can_share)


def cache_bytes_per_token(config: ModelConfig, cache_type: CacheType) -> int:
    """Bytes that each token of a sequence takes in the caches of all layers; windows keep the last ones alone."""
    total = 0
    for index in range(config.num_layers):
        layer = new_layer_state(config, index, cache_type)
        if isinstance(layer, LayerCache):
            total += layer.position_bytes
    return total


class Mark(NamedTuple):
    """A place in a sequence that its cache can go back to.

    Attributes:
        length: tokens before it.
        states: copies of the layers' states by their number, where layers have one.
    """

    length: int
    states: dict[int, RecurrentState]


class Cache:
    """The state of one sequence: its token ids and every layer's keys and values, or its state.

    Args:
        config: the model's.
        cache_type: how keys and values are held.

    Attributes:
        cache_type: likewise.
        ids: the tokens seen so far.
        is_long: whether the keys were rotated with longrope's long frequencies.
        layers: what each layer keeps.
    """

    def __init__(self, config: ModelConfig, cache_type: CacheType = "f32") -> None:
        self._config = config
        self.cache_type = cache_type
        self._claim = object()
        self.reset()

    def claim(self) -> object:
        """Take the cache over for one run; returns a mark for is_claimed_by, which earlier marks then fail."""
        self._claim = object()
        return self._claim

    def is_claimed_by(self, mark: object) -> bool:
        """Whether no other run has claimed the cache since."""
        return mark is self._claim

    @property
    def length(self) -> int:
        """Tokens seen so far."""
        return len(self.ids)

    def reset(self) -> None:
        """Forget everything."""
        self.ids: list[int] = []
        self.is_long = False
        self.layers: list[LayerState] = [
            new_layer_state(self._config, index, self.cache_type) for index in range(self._config.num_layers)
        ]

    def shared(self, ids: Sequence[int]) -> int:
        """The number of tokens that reuse(ids) would keep and a fork for `ids` would start with."""
        shared = 0
        for old, new in zip(self.ids, ids[:-1], strict=False):
            if old != new:
                break
            shared += 1
        return shared if all(layer.can_truncate(shared) for layer in self.layers) else 0

    def reuse(self, ids: Sequence[int]) -> int:
        """Keep the longest usable beginning that the sequence shares with `ids`, short of its last token.

        Returns:
            The number of tokens kept; the caller runs the model on ids from there on.
        """
        shared = self.shared(ids)
        if shared == 0:
            self.reset()
            return 0
        del self.ids[shared:]
        for layer in self.layers:
            layer.truncate(shared)
        return shared

    def mark(self) -> Mark:
        """Where the sequence is, for rewind: copies of what cannot go back by itself."""
        states = {
            number: layer.fork(self.length)
            for number, layer in enumerate(self.layers)
            if isinstance(layer, RecurrentState)
        }
        return Mark(self.length, states)

    @property
    def has_states(self) -> bool:
        """Whether a layer keeps a state that cannot go back by itself."""
        return any(isinstance(layer, RecurrentState) for layer in self.layers)

    def rewind(self, length: int, mark: Mark) -> None:
        """Forget the tokens from `length` on; all since the mark if layers keep a state, which holds all of them.

        Args:
            length: of the sequence, from the mark's to now.
            mark: of this cache; what came before it stays.
        """
        if length == self.length:
            return
        if mark.states:
            length = mark.length
        del self.ids[length:]
        for number, layer in enumerate(self.layers):
            state = mark.states.get(number)
            if state is None:
                layer.truncate(length)
            else:
                self.layers[number] = state

    def fork(self, length: int) -> Cache:
        """A cache of its own that starts with the first `length` tokens of this one.

        Args:
            length: at most what shared() returned for the sequence that goes on from there.
        """
        copy = Cache(self._config, self.cache_type)
        copy.ids = self.ids[:length]
        copy.is_long = self.is_long
        copy.layers = [layer.fork(length) for layer in self.layers]
        return copy
