"""GLM-4.7-Flash: the experts of GLM-4.5 with latent attention."""

from dataclasses import replace

from entrollm.errors import UnsupportedError
from entrollm.models.config import ModelConfig
from entrollm.models.config_fields import Fields
from entrollm.models.experts import read_corrected_experts
from entrollm.models.latent import read_latent_decoder
from entrollm.models.read import Defaults
from entrollm.models.token_head import head_behind_layers

_DEFAULTS = Defaults(
    context_length=202752, kv_heads=20, norm_eps=1e-5, partial_rotary=1.0, bos_token_id=0, eos_token_id=1
)
_DENSE, _SPARSE = "dense", "sparse"


def read_config(fields: Fields) -> ModelConfig:
    """Read a glm4_moe_lite config.json."""
    config = read_latent_decoder(fields, _DEFAULTS, ranks=(512, 768), plain=192, rotated=64, value=256)
    experts = read_corrected_experts(fields, count=64, used=4, size=1536, scale=1.8)
    key = "mlp_layer_types"
    kinds = [_DENSE] + [_SPARSE] * (config.num_layers - 1)
    kinds = fields.texts(key, config.num_layers) if key in fields else kinds
    for kind in kinds:
        if kind not in (_DENSE, _SPARSE):
            raise UnsupportedError(f"{fields.source}: {key} has {kind!r:.40}; supported: {_DENSE}, {_SPARSE}")
    return replace(
        config,
        experts=tuple(experts if kind == _SPARSE else None for kind in kinds),
        token_head=head_behind_layers(config),
    )
