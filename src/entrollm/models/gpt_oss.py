"""GPT-OSS: experts with a clamped activation and biases, attention sinks, every other layer with a window."""

from dataclasses import replace

from entrollm.models.config import ClampedGlu, Experts, Mlp, ModelConfig, Routing
from entrollm.models.config_fields import Fields
from entrollm.models.experts import read_counts
from entrollm.models.read import Defaults, patterned_kinds, read_decoder, windows_of

_DEFAULTS = Defaults(context_length=131072, head_dim=64, kv_heads=8, norm_eps=1e-5, theta=150000.0)
_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_PLACE = "mlp.experts"


def read_config(fields: Fields) -> ModelConfig:
    """Read a gpt_oss config.json."""
    if "rope_parameters" not in fields and "rope_scaling" not in fields:
        fields = fields.updated(Fields({"rope_parameters": _ROPE}, fields.source))
    config = read_decoder(fields, _DEFAULTS)
    count, used = read_counts(fields, 128, 4)
    glu = ClampedGlu(slope=fields.factor("swiglu_alpha", 1.702), limit=fields.factor("swiglu_limit", 7.0))
    size = config.intermediate_size
    experts = Experts(
        count=count,
        used=used,
        router="mlp.router",
        # Matrices from MXFP4 have the usual orientation, those of other checkpoints are transposed.
        expert=Mlp(
            up=(f"{_PLACE}.gate_up_proj.{{}}",),
            down=f"{_PLACE}.down_proj.{{}}",
            size=size,
            suffix=".T",
            glu=glu,
        ),
        stack=Mlp(
            up=(f"{_PLACE}.gate_up_proj.{{}}",),
            down=f"{_PLACE}.down_proj.{{}}",
            size=size,
            suffix="",
            is_transposed=True,
            glu=glu,
        ),
        biases=(f"{_PLACE}.gate_up_proj_bias", f"{_PLACE}.down_proj_bias"),
        normalises=True,
        routing=Routing(has_bias=True),
    )
    attention_bias = fields.flag("attention_bias", True)
    return replace(
        config,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        has_sinks=True,
        windows=windows_of(fields, patterned_kinds(fields, config.num_layers, 2), 128),
        experts=(experts,) * config.num_layers,
    )
