"""The decoder-only transformer that every supported architecture is an instance of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from entrollm import _core
from entrollm.checkpoint.names import output_head
from entrollm.engine.arithmetic import cap
from entrollm.engine.attention import Angles, Rotations, SelfAttention
from entrollm.engine.batch import Segment, SequencesState, SequenceStep, joined_angles, passes
from entrollm.engine.cache import Cache, LayerState, check_cache_type
from entrollm.engine.experts import ExpertsBeside, MixedExperts
from entrollm.engine.feed_forward import FeedForward
from entrollm.engine.layer_cache import LayerCache
from entrollm.engine.layer_inputs import LayerInput, TokenInputs
from entrollm.engine.mixers import make_mixer
from entrollm.engine.projection import Norm, Projection, load_norm
from entrollm.engine.token_head import SharedParts, TokenHead
from entrollm.engine.weights import Embedding, Floats, Ids, Weights, load_embedding, load_tensor
from entrollm.errors import CorruptStreamError, UnsupportedError
from entrollm.models.config import ModelConfig, SharedKeys

# Prompt tokens per pass through the layers: bounds the activations without re-reading the weights too often.
_TOKENS_PER_PASS = 512


class Embeddings:
    """The vectors that tokens enter the layers as.

    Raises:
        FormatError: a tensor is missing or has another shape than config.json asks for.
    """

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self._tokens = load_embedding(weights, config.names.embedding, (config.vocab_size, config.hidden_size))
        self._scale = None if config.embedding_scale == 1.0 else np.float32(config.embedding_scale)
        self._positions: Embedding | None = None
        if config.names.positions is not None:
            shape = (config.context_length, config.hidden_size)
            self._positions = load_embedding(weights, config.names.positions, shape)

    def __call__(self, ids: Ids, start: int) -> Floats:
        """The vectors of tokens that follow `start` others: int64 (n,) -> float32 (n, hidden_size).

        Raises:
            ValueError: the model has no embeddings of such late positions.
        """
        stop = start + len(ids)
        if self._positions is not None and stop > self._positions.shape[0]:
            raise ValueError(f"this model has {self._positions.shape[0]} positions, and {stop} tokens do not fit")
        x = self._tokens.rows(ids)
        if self._scale is not None:
            x *= self._scale
        if self._positions is not None:
            x += self._positions.rows(np.arange(start, stop))
        return x


class Decoder:
    """A model's layers over its weights.

    Args:
        config: the model's.
        weights: its tensors.
        cache_type: how new caches hold keys and values.
    Raises:
        FormatError: a tensor is missing or has another shape than config.json asks for.
        UnsupportedError: the attention does not read keys and values of this type.
        ValueError: there is no such type.
    """

    def __init__(self, config: ModelConfig, weights: Weights, cache_type: str = "f32") -> None:
        self.config = config
        self._cache_type = check_cache_type(cache_type, config)
        self._embeddings = Embeddings(config, weights)
        self._inputs = None if config.layer_inputs is None else TokenInputs(config, weights, config.layer_inputs)
        self._layers = [Layer(config, weights, index) for index in range(config.num_layers)]
        self._norm = load_norm(config, weights, config.names.norm)
        names = config.names
        head = output_head(weights, is_tied=config.tied_embeddings, embedding=names.embedding, head=names.head)
        bias: Floats | bool = False
        if config.head_bias:
            # A head that is the embedding has a bias of its own.
            bias = load_tensor(weights, f"{names.head.removesuffix('.weight')}.bias", (config.vocab_size,))
        self._head = Projection(weights, {head.removesuffix(".weight"): config.vocab_size}, config.hidden_size, bias)
        self._rotations = Rotations(config)
        self._weights = weights
        self._token_head: TokenHead | None = None

    def new_cache(self) -> Cache:
        """An empty cache for one sequence."""
        return Cache(self.config, self._cache_type)

    def token_head(self) -> TokenHead:
        """The layer that guesses the token after the next one, loaded when it is first asked for.

        Raises:
            FormatError: a tensor of it is missing or has another shape.
            UnsupportedError: the checkpoint has none.
        """
        if self._token_head is None:
            self._token_head = self._load_token_head()
        return self._token_head

    def _load_token_head(self) -> TokenHead:
        config, form = self.config, self.config.token_head
        if form is None or f"{form.projection}.weight" not in self._weights:
            raise UnsupportedError(f"this {config.model_type} has no layer that guesses tokens (a multi-token head)")
        layer = Layer(config, self._weights, form.like, form.layer)
        shared = SharedParts(self._embeddings, self._rotations, self.logits)
        return TokenHead(config, self._weights, form, layer, shared)

    def forward(
        self,
        ids: Ids,
        cache: Cache,
        *,
        last: int | None = None,
        observe: Callable[[int, Floats], None] | None = None,
    ) -> Floats:
        """Run the model on the tokens that follow those in the cache, and add them to it.

        Args:
            ids: int64 (n,), n >= 1, each in [0, vocab_size).
            cache: the tokens before; left in an undefined state if this call is interrupted, until its reset().
            last: compute the logits of that many last positions alone, n at most.
            observe: is given the hidden states; see SequenceStep.
        Returns:
            float32 (n, vocab_size), or (last, vocab_size).
        """
        wanted = len(ids) if last is None else last
        ids = self._begin(ids, cache)
        hidden = []
        for x, _ in self._run([Segment(0, ids, cache)]):
            if observe is not None:
                observe(cache.length - len(x), self._norm(x))
            hidden.append(x)
        return self.logits(self._norm((hidden[0] if len(hidden) == 1 else np.concatenate(hidden))[-wanted:]))

    def step(self, steps: Sequence[SequenceStep]) -> Floats:
        """Run the model on the next tokens of several sequences at once, and add them to their caches.

        All sequences go through each product together; attention is per sequence. Coded matrices give each sequence
        the same bits as on its own.

        Args:
            steps: at least one, each with a cache of its own; the caches are left in an undefined state if this call
                is interrupted, until their reset().
        Returns:
            float32 (n, vocab_size): the logits after the last token of each step with needs_logits, in their order.
        """
        segments = []
        for index, each in enumerate(steps):
            if not isinstance(each.cache, Cache):
                raise TypeError(f"the cache of a step should be from new_cache(), got {type(each.cache).__name__}")
            segments.append(Segment(index, self._begin(each.ids, each.cache), each.cache))
        last: dict[int, Floats] = {}
        for x, done in self._run(segments):
            row = 0
            for segment in done:
                count, observe = len(segment.ids), steps[segment.index].observe
                if observe is not None:
                    observe(segment.cache.length - count, self._norm(x[row : row + count]))
                row += count
                last[segment.index] = x[row - 1 : row]
        wanted = [last[index] for index, step in enumerate(steps) if step.needs_logits]
        if not wanted:
            return np.empty((0, self.config.vocab_size), dtype=np.float32)
        return self.logits(self._norm(np.concatenate(wanted)))

    def is_long(self, length: int) -> bool:
        """Whether the keys of a sequence of `length` tokens are rotated with longrope's long frequencies."""
        return self._rotations.is_long(length)

    def keeps_rotations(self, length: int, longer: int) -> bool:
        """Whether a sequence of `length` tokens grows to `longer` ones without starting over; see _begin."""
        return self.is_long(length) == self.is_long(longer)

    def _begin(self, ids: Ids, cache: Cache) -> Ids:
        """The tokens to run: `ids`, or the sequence from its start where its rotations change."""
        is_long = self._rotations.is_long(cache.length + len(ids))
        if is_long != cache.is_long and cache.length:
            # Every hidden state depends on the frequencies, so crossing longrope's limit starts the sequence over.
            ids = np.concatenate([np.array(cache.ids, dtype=np.int64), ids])
            cache.reset()
        cache.is_long = is_long
        return ids

    def _run(self, segments: Sequence[Segment]) -> Iterator[tuple[Floats, list[Segment]]]:
        """The hidden states of all tokens, in passes of bounded size, each with what it consists of."""
        for part in passes(segments, _TOKENS_PER_PASS):
            yield self._run_layers(part), part

    def logits(self, hidden: Floats) -> Floats:
        """The logits of hidden states behind the final norm: float32 (n, hidden_size) to (n, vocab_size)."""
        logits = self._head(hidden)
        if self.config.logit_scale != 1.0:
            logits *= np.float32(self.config.logit_scale)
        if self.config.logit_cap is not None:
            cap(logits, self.config.logit_cap)
        return logits

    def _run_layers(self, segments: Sequence[Segment]) -> Floats:
        rows = [
            self._rotations.rows(segment.cache.length, len(segment.ids), segment.cache.is_long) for segment in segments
        ]
        entering = [self._embeddings(segment.ids, segment.cache.length) for segment in segments]
        for segment in segments:
            segment.cache.ids.extend(segment.ids.tolist())
        only = len(segments) == 1
        angles = rows[0] if only else joined_angles(rows)
        x = entering[0] if only else np.concatenate(entering)
        inputs: Floats | None = None
        if self._inputs is not None:
            inputs = self._inputs(np.concatenate([segment.ids for segment in segments]), x)
        for index, layer in enumerate(self._layers):
            state = segments[0].cache.layers[layer.state] if only else SequencesState(segments, layer.state)
            x = layer(x, angles[index], state, None if inputs is None else inputs[index])
        return x


class Layer:
    """Attention and a feed-forward part, whose outputs are added to the residual stream.

    Each of the two runs as native code where that has all of its options and its matrices are coded, with the same
    bits as result.

    Args:
        config: the model's.
        weights: its tensors.
        index: number of the layer.
        prefix: what the names of its tensors start with; None for the usual names with its number.

    Attributes:
        state: number of the layer whose state this one reads and extends, which is its own but for shared keys.

    Raises:
        FormatError: a tensor is missing or has another shape.
    """

    def __init__(self, config: ModelConfig, weights: Weights, index: int, prefix: str | None = None) -> None:
        config = config.layer(index)
        prefix, block = prefix or f"{config.names.layers}{index}.", config.block

        def norm(name: str | None) -> Norm | None:
            return None if name is None else load_norm(config, weights, prefix + name)

        self._attention_norm, self._attention_output_norm = (
            norm(block.attention_norm),
            norm(block.attention_output_norm),
        )
        self._mlp_norm, self._mlp_output_norm = norm(block.mlp_norm), norm(block.mlp_output_norm)
        self._mixer = make_mixer(config, weights, prefix, index) if block.has_mixer else None
        mixer = config.mixer(index)
        self.state = mixer.source if isinstance(mixer, SharedKeys) else index
        experts = config.experts[index] if config.experts else None
        self._feed_forward: FeedForward | MixedExperts | ExpertsBeside | None = None
        if block.has_mlp and experts is not None and experts.beside is not None:
            self._feed_forward = ExpertsBeside(config, weights, prefix, experts, experts.beside)
        elif block.has_mlp and experts is not None:
            self._feed_forward = MixedExperts(config, weights, prefix, experts)
        elif block.has_mlp:
            self._feed_forward = FeedForward(config, weights, prefix, config.mlp)
        self._is_parallel = block.is_parallel
        self._shares_norm = block.is_parallel and block.mlp_norm == block.attention_norm
        self._scale = None if config.residual_scale == 1.0 else np.float32(config.residual_scale)
        self._input: LayerInput | None = None
        if config.layer_inputs is not None:
            self._input = LayerInput(config, weights, prefix, config.layer_inputs)
        self._output_scale = None if block.scale is None else load_tensor(weights, prefix + block.scale, (1,))
        self._eps, self._pool = config.norm_eps, weights.pool
        self._native_attention: _core.AttentionBlock | None = None
        self._native_feed_forward: _core.FeedForwardBlock | None = None
        self._is_prepared = False

    def __call__(
        self,
        x: Floats,
        angles: Angles | None,
        state: LayerState | SequencesState,
        vectors: Floats | None = None,
    ) -> Floats:
        """float32 (n, hidden_size) -> a new float32 (n, hidden_size).

        Args:
            x: the residual stream.
            angles: of the rotation; None if the layer does not rotate.
            state: what the layer keeps of the sequence, or of each sequence in the pass.
            vectors: the layer's own of each token, float32 (n, size); None if the model has none.
        """
        if not self._is_prepared:
            self._prepare()
        x = self._through_parts(x, angles, state)
        if self._input is not None and vectors is not None:
            x += self._input(x, vectors)
        if self._output_scale is not None:
            x *= self._output_scale
        return x

    def _through_parts(self, x: Floats, angles: Angles | None, state: LayerState | SequencesState) -> Floats:
        """Attention and the feed-forward part; see __call__."""
        normalised, mixed = x, x
        if self._native_attention is not None and isinstance(state, LayerCache | SequencesState):
            turns = (None, None, None) if angles is None else (angles.cosines, angles.sines, angles.query_factors)
            mixed = _run(self._native_attention, x, *turns, state.extend(len(x)), self._pool)
        elif self._mixer is not None:
            if self._attention_norm is not None:
                normalised = self._attention_norm(x)
            mixed = self._added(self._mixer(normalised, angles, state), self._attention_output_norm, x)
        if self._feed_forward is None:
            return mixed
        if self._native_feed_forward is not None:
            return _run(self._native_feed_forward, mixed, self._pool)
        read = x if self._is_parallel else mixed
        if self._shares_norm:
            read = normalised
        elif self._mlp_norm is not None:
            read = self._mlp_norm(read)
        return self._added(self._feed_forward(read), self._mlp_output_norm, mixed)

    def _added(self, found: Floats, norm: Norm | None, x: Floats) -> Floats:
        """What a part found, normalised, scaled and added to x."""
        if norm is not None:
            found = norm(found)
        if self._scale is not None:
            found *= self._scale
        found += x
        return found

    def _prepare(self) -> None:
        """Make the native parts, once the matrices have their final form."""
        if not self._is_parallel:
            around = self._surroundings(self._attention_norm, self._attention_output_norm)
            if around is not None and isinstance(self._mixer, SelfAttention):
                self._native_attention = self._mixer.native(around)
            around = self._surroundings(self._mlp_norm, self._mlp_output_norm)
            if around is not None and isinstance(self._feed_forward, FeedForward):
                self._native_feed_forward = self._feed_forward.native(around)
        self._is_prepared = True

    def _surroundings(self, norm: Norm | None, output_norm: Norm | None) -> _core.Surroundings | None:
        """What is around a part; None if a norm does more than native code does."""
        if any(each is not None and (each.is_centered or each.bias is not None) for each in (norm, output_norm)):
            return None
        weight, output_weight = (None if each is None else each.weight for each in (norm, output_norm))
        scale = None if self._scale is None else float(self._scale)
        return _core.Surroundings(weight, output_weight, self._eps, scale)


def _run(block: Callable[..., Floats], *args: object) -> Floats:
    """Run a native part.

    Raises:
        CorruptStreamError: a block of a matrix does not decode.
    """
    try:
        return block(*args)
    except _core.CorruptBlockError as error:
        raise CorruptStreamError(f"{error}; the file is damaged, compress or fetch it again") from None
