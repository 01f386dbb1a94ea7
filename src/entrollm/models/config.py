"""The description of a decoder: its sizes, and the known parts that its layers combine."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from entrollm.models.rope import Rope


@dataclass(frozen=True, kw_only=True)
class Names:
    """The names of the tensors outside the layers; the layers' start with `layers` and their number.

    Attributes:
        embedding, head: matrices, with `.weight`.
        norm: the last norm, without `.weight`.
        positions: the matrix of position embeddings that are added to the tokens'; None if there is none.
    """

    embedding: str = "model.embed_tokens.weight"
    layers: str = "model.layers."
    norm: str = "model.norm"
    head: str = "lm_head.weight"
    positions: str | None = None


@dataclass(frozen=True, kw_only=True)
class Block:
    """The parts of a layer, by their names in it, and the order in which they run.

    A layer adds to its input what attention makes of it, and to the sum what the feed-forward part makes of that.

    Attributes:
        qkv: the projections to queries, keys and values: three matrices, or one for all; or two, where values are the
            keys before their norm and rotation.
        output: the projection of the mixed values.
        sinks: the scores that mix no value, where the model has them.
        up: the projections into the feed-forward part: gate and up, one for both, or up alone.
        down: the projection out of it.
        q_norm, k_norm: the norms of queries and keys, where the model has them.
        attention_norm, mlp_norm: the norms of the inputs; None if there is none.
        attention_output_norm, mlp_output_norm: the norms of the outputs before they are added; None if there is none.
        scale: the tensor of one number that the output of the layer is multiplied by; None if there is none.
        has_mixer, has_mlp: a layer has both parts, but in models whose layers are single parts.
        is_parallel: the feed-forward part reads the input of the layer, as attention does.
        is_transposed: matrices are stored as (in_features, out_features).
    """

    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    output: str = "self_attn.o_proj"
    sinks: str = "self_attn.sinks"
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    attention_norm: str | None = "input_layernorm"
    attention_output_norm: str | None = None
    mlp_norm: str | None = "post_attention_layernorm"
    mlp_output_norm: str | None = None
    scale: str | None = None
    has_mixer: bool = True
    has_mlp: bool = True
    is_parallel: bool = False
    is_transposed: bool = False


@dataclass(frozen=True, kw_only=True)
class ClampedGlu:
    """The gated activation min(gate, limit) * sigmoid(slope * min(gate, limit)) * (1 + clip(up, -limit, limit)).

    Gate and up are neighbouring features of one projection.

    Attributes:
        slope, limit: its numbers.
    """

    slope: float
    limit: float


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """A feed-forward part.

    Attributes:
        up: the projections into it: gate and up, one for both, or up alone.
        down: the projection out of it.
        size: features between them.
        has_bias: both projections add a bias.
        suffix: what the names of the matrices end with.
        is_transposed: matrices are stored as (in_features, out_features).
        glu: the activation, if it is not the one that the model names.
    """

    up: tuple[str, ...]
    down: str
    size: int
    has_bias: bool = False
    suffix: str = ".weight"
    is_transposed: bool = False
    glu: ClampedGlu | None = None


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How the products of a router become the experts of a token and their weights.

    Attributes:
        scores: what is made of the products: their softmax, the sigmoid of each, or SparseMixer's choice of two.
        has_bias: the router adds a bias.
        correction: the tensor that is added to the scores for the choice alone; "" if there is none.
        is_correction_matrix: this tensor has two axes, the first of one row.
        groups, used_groups: experts are chosen among the best groups of neighbours.
        best: the score of a group is the sum of this many of its best scores.
        scale: factor on the weights.
        least_sum: what weights are divided by at least, where they are made to add up to 1.
        jitter: how far scores may be below the best, relatively, to count in SparseMixer's weights.
        norm: the weights of a norm of the router's own, without `weight_offset`; "" if there is none.
        norm_scale: factor on them.
        factors: the tensor with a factor for the weights of each expert; "" if there is none.
    """

    scores: Literal["softmax", "sigmoid", "sparse_mixer"] = "softmax"
    has_bias: bool = False
    correction: str = ""
    is_correction_matrix: bool = False
    groups: int = 1
    used_groups: int = 1
    best: int = 1
    scale: float = 1.0
    least_sum: float = 0.0
    jitter: float = 0.0
    norm: str = ""
    norm_scale: float = 1.0
    factors: str = ""


@dataclass(frozen=True, kw_only=True)
class Beside:
    """The norms of a layer in which the usual feed-forward part runs beside the experts; each has two of its own.

    Attributes:
        norm, output_norm: of the input and output of the usual part.
        experts_norm, experts_output_norm: of the experts' input and output; the router sees what is not normalised.
    """

    norm: str
    output_norm: str
    experts_norm: str
    experts_output_norm: str


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Feed-forward parts of which each token runs through the few that a router chooses for it.

    Attributes:
        count: how many there are.
        used: how many a token runs through.
        router: the matrix whose products with a token are the scores of the experts, without `.weight`.
        expert: an expert, {} in its names being its number.
        normalises: the weights of the chosen experts add up to 1; else they are their shares among all.
        stack: an expert where the checkpoint has all of them in one tensor of three axes; None if none does.
        biases: the tensors whose rows are the biases of the experts' projections, up and down; empty without biases.
        routing: how experts are chosen.
        shared: the part that all tokens run through beside the experts; None if there is none.
        shared_gate: the matrix that scales the output of the shared part, without `.weight`; "" if there is none.
        beside: the norms of experts beside the usual feed-forward part; None if they take its place.
    """

    count: int
    used: int
    router: str
    expert: Mlp
    normalises: bool
    stack: Mlp | None = None
    biases: tuple[str, ...] = ()
    routing: Routing = field(default_factory=Routing)
    shared: Mlp | None = None
    shared_gate: str = ""
    beside: Beside | None = None


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Attention whose keys and values are projections of one short vector for each token (MLA).

    Attributes:
        rank: features of this vector.
        query_rank: features of a vector in between of which queries are projections; None if there is none.
        plain, rotated: features of a query that are not rotated, and of those that are; the rotated features of keys
            are the same for all heads.
        value: features of a value.
        scale: factor on the scores.
        has_bias: the projections of the input, and that of the mixed values, add a bias.
    """

    rank: int
    query_rank: int | None
    plain: int
    rotated: int
    value: int
    scale: float
    has_bias: bool


@dataclass(frozen=True, kw_only=True)
class GatedDelta:
    """Linear attention by the gated delta rule.

    Attributes:
        key_heads, key_dim: of queries and keys.
        value_heads, value_dim: of values; the value heads share the key heads evenly.
        kernel: tokens that the convolution before it sees.
        is_by_head: the rows of its fused projections are ordered by key head.
    """

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int
    kernel: int
    is_by_head: bool


@dataclass(frozen=True, kw_only=True)
class ShortConvolution:
    """A convolution over a few tokens between two gates.

    Attributes:
        kernel: tokens that it sees.
        has_bias: it and its projections add a bias.
    """

    kernel: int
    has_bias: bool


@dataclass(frozen=True, kw_only=True)
class Mamba2:
    """A state-space layer with one decay for each head.

    Attributes:
        place: its name in a layer.
        heads, head_dim: of its features.
        groups: heads of a group share where they read and write, and are normalised together.
        state: features of the memory for each feature of a head.
        kernel: tokens that the convolution before it sees.
        has_bias, has_convolution_bias: whether its projections, and the convolution, add a bias.
        activation: of the convolution.
        time_limits: the least and the greatest step in time; None if there are none.
    """

    place: str
    heads: int
    head_dim: int
    groups: int
    state: int
    kernel: int
    has_bias: bool
    has_convolution_bias: bool
    activation: str = "silu"
    time_limits: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class SharedKeys:
    """Attention over the keys and values of an earlier layer, to which a layer has queries alone.

    Attributes:
        source: number of the earlier layer, which has the same window and heads.
    """

    source: int


# What mixes tokens in a layer in place of the usual attention.
Mixer = LatentAttention | GatedDelta | ShortConvolution | Mamba2 | SharedKeys


@dataclass(frozen=True, kw_only=True)
class LayerInputs:
    """Vectors that each layer has for each token beside the residual stream, from an embedding and a projection.

    A layer multiplies the activation of `gate` with its vector, and adds what `projection` and `norm` make of that.

    Attributes:
        size: features of a vector.
        vocab_size: rows of the embedding.
        embedding: the matrix with the vectors of all layers side by side.
        model_projection: the matrix from embedded tokens to the vectors of all layers, without `.weight`.
        model_norm: of what it makes, without `.weight`.
        gate, projection, norm: the parts of a layer, without `.weight`.
    """

    size: int
    vocab_size: int
    embedding: str = "model.embed_tokens_per_layer.weight"
    model_projection: str = "model.per_layer_model_projection"
    model_norm: str = "model.per_layer_projection_norm"
    gate: str = "per_layer_input_gate"
    projection: str = "per_layer_projection"
    norm: str = "post_per_layer_input_norm"


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """The sizes of one layer, where layers differ in them; as in ModelConfig."""

    num_kv_heads: int
    head_dim: int
    intermediate_size: int


@dataclass(frozen=True, kw_only=True)
class TokenHead:
    """A layer behind the model's that guesses the token after the next one (multi-token prediction).

    It reads a projection of two vectors side by side: the embedding of the next token and the last hidden state, each
    behind a norm of its own. What comes out goes through a norm and the output head of the model.

    Attributes:
        layer: what the names of the layer start with.
        like: number of the layer of the model that has the same parts.
        token_norm, hidden_norm, projection, norm: without `.weight`.
    """

    layer: str
    like: int
    token_norm: str
    hidden_norm: str
    projection: str
    norm: str


@dataclass(frozen=True, kw_only=True)
class Norm:
    """How a model normalises: by the root mean square, unless it is centered.

    Attributes:
        is_centered: the mean is subtracted first (LayerNorm).
        weight_offset: added to the stored weights.
        has_bias: a bias is added.
    """

    is_centered: bool = False
    weight_offset: float = 0.0
    has_bias: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder-only transformer and the options in which architectures differ.

    Attributes:
        model_type: as in config.json.
        norm_eps: of all norms.
        context_length: tokens of prompt and answer together that the model was made for.
        tied_embeddings: the output head is the embedding matrix.
        rope: the rotary position embedding.
        windows: per layer, how many tokens back (itself included) a token sees; None for all.
        layer_ropes: per layer, its rotary embedding, or None for a layer without; an empty tuple if all have `rope`.
        has_rotated_neighbours: features 2i and 2i + 1 of a head are rotated together, not those half a rotation apart.
        qkv_bias, output_bias, mlp_bias, head_bias: which projections add a bias.
        is_qkv_by_head: the rows of a fused projection are ordered by head, the query, key and value of each together.
        qk_norm: queries and keys are normalised, per head or over their whole width.
        has_value_norm: values are normalised per head, by a norm without weights.
        has_output_gate: what a head mixes is scaled by sigmoids, whose features follow those of its query.
        has_sinks: each head has a score that takes part in the softmax and mixes no value.
        attention_scale: factor on the scores; None for head_dim ** -0.5.
        attention_cap, logit_cap: cap * tanh(x / cap) bounds the scores and the logits; None if it does not.
        activation: the nonlinearity of the feed-forward part, by its name in config.json.
        is_gated: the activation of one projection multiplies the other.
        mixers: per layer, what mixes tokens in place of the usual attention, or None; an empty tuple if nothing does.
        experts: per layer, the experts in place of a feed-forward part; None for a layer without, and an empty tuple if
            no layer has any.
        embedding_scale, residual_scale, logit_scale: factors on the embeddings, on all that layers add, on the logits.
        norm: the kind of norm.
        block: the parts of a layer.
        layer_blocks: the parts of each layer, where layers differ in them; an empty tuple if all have `block`.
        layer_shapes: the sizes of each layer, where layers differ in them; an empty tuple if none does.
        layer_inputs: the vectors of each token for each layer; None if there are none.
        token_head: the layer that guesses tokens, which a checkpoint may have or not; None if none has it.
        names: of the tensors.
        bos_token_id: the token that starts a text, if any.
        eos_token_ids: the tokens that end one.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    context_length: int
    tied_embeddings: bool
    rope: Rope
    windows: tuple[int | None, ...]
    layer_ropes: tuple[Rope | None, ...] = ()
    has_rotated_neighbours: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    is_qkv_by_head: bool = False
    qk_norm: Literal["", "head", "width"] = ""
    has_value_norm: bool = False
    has_output_gate: bool = False
    has_sinks: bool = False
    attention_scale: float | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None
    activation: str = "silu"
    is_gated: bool = True
    mixers: tuple[Mixer | None, ...] = ()
    experts: tuple[Experts | None, ...] = ()
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    norm: Norm = field(default_factory=Norm)
    block: Block = field(default_factory=Block)
    layer_blocks: tuple[Block, ...] = ()
    layer_shapes: tuple[LayerShape, ...] = ()
    layer_inputs: LayerInputs | None = None
    token_head: TokenHead | None = None
    names: Names = field(default_factory=Names)
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def ropes(self) -> tuple[Rope | None, ...]:
        """The rotary embedding of each layer."""
        return self.layer_ropes or (self.rope,) * self.num_layers

    @property
    def mlp(self) -> Mlp:
        """The feed-forward part of a layer without experts."""
        block = self.block
        return Mlp(
            up=block.up,
            down=block.down,
            size=self.intermediate_size,
            has_bias=self.mlp_bias,
            is_transposed=block.is_transposed,
        )

    def mixer(self, index: int) -> Mixer | None:
        """What mixes tokens in a layer; None for the usual attention."""
        return self.mixers[index] if self.mixers else None

    def layer(self, index: int) -> ModelConfig:
        """The configuration with the parts and sizes of a layer in place of those of most."""
        config = replace(self, block=self.layer_blocks[index]) if self.layer_blocks else self
        if not self.layer_shapes:
            return config
        shape = self.layer_shapes[index]
        return replace(
            config,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            intermediate_size=shape.intermediate_size,
        )

    @property
    def is_fused(self) -> bool:
        """Whether queries, keys and values are one matrix."""
        return len(self.block.qkv) == 1
