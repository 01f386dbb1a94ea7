"""The architectures that the engine runs: each file reads one model_type's config.json into a ModelConfig."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from entrollm.errors import UnsupportedError
from entrollm.models import (
    cohere2,
    deepseek_v2,
    deepseek_v3,
    ernie4_5,
    ernie4_5_moe,
    exaone4,
    gemma,
    gemma2,
    gemma3,
    gemma4,
    glm4,
    glm4_moe,
    glm4_moe_lite,
    gpt2,
    gpt_neox,
    gpt_oss,
    granite,
    granite_hybrid,
    granitemoe,
    granitemoeshared,
    lfm2,
    llama,
    ministral,
    ministral3,
    mistral,
    mistral4,
    mixtral,
    nemotron,
    nemotron_h,
    olmo2,
    olmo3,
    olmoe,
    phi,
    phi3,
    phimoe,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_5,
    qwen3_5_moe,
    qwen3_moe,
    qwen3_next,
    seed_oss,
    smollm3,
    stablelm,
)
from entrollm.models.config import ModelConfig
from entrollm.models.config_fields import Fields

ARCHITECTURES: Mapping[str, Callable[[Fields], ModelConfig]] = {
    "cohere2": cohere2.read_config,
    "deepseek_v2": deepseek_v2.read_config,
    "deepseek_v3": deepseek_v3.read_config,
    "ernie4_5": ernie4_5.read_config,
    "ernie4_5_moe": ernie4_5_moe.read_config,
    "exaone4": exaone4.read_config,
    "gemma": gemma.read_config,
    "gemma2": gemma2.read_config,
    "gemma3_text": gemma3.read_config,
    "gemma4_text": gemma4.read_config,
    "gemma4_unified_text": gemma4.read_unified_config,
    "glm4": glm4.read_config,
    "glm4_moe": glm4_moe.read_config,
    "glm4_moe_lite": glm4_moe_lite.read_config,
    "gpt2": gpt2.read_config,
    "gpt_neox": gpt_neox.read_config,
    "gpt_oss": gpt_oss.read_config,
    "granite": granite.read_config,
    "granitemoe": granitemoe.read_config,
    "granitemoehybrid": granite_hybrid.read_config,
    "granitemoeshared": granitemoeshared.read_config,
    "lfm2": lfm2.read_config,
    "llama": llama.read_config,
    "ministral": ministral.read_config,
    "ministral3": ministral3.read_config,
    "mistral": mistral.read_config,
    "mistral4": mistral4.read_config,
    "mixtral": mixtral.read_config,
    "nemotron": nemotron.read_config,
    "nemotron_h": nemotron_h.read_config,
    "olmo2": olmo2.read_config,
    "olmo3": olmo3.read_config,
    "olmoe": olmoe.read_config,
    "phi": phi.read_config,
    "phi3": phi3.read_config,
    "phimoe": phimoe.read_config,
    "qwen2": qwen2.read_config,
    "qwen2_moe": qwen2_moe.read_config,
    "qwen3": qwen3.read_config,
    "qwen3_5_moe_text": qwen3_5_moe.read_config,
    "qwen3_5_text": qwen3_5.read_config,
    "qwen3_moe": qwen3_moe.read_config,
    "qwen3_next": qwen3_next.read_config,
    "seed_oss": seed_oss.read_config,
    "smollm3": smollm3.read_config,
    "stablelm": stablelm.read_config,
}
# Models of text and images, by model type: what model type their text part has where its section names none.
MULTIMODAL: Mapping[str, str] = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "gemma4_unified": "gemma4_unified_text",
    "lfm2_vl": "lfm2",
    "llava": "llama",
    "llava_next": "llama",
    "mistral3": "mistral",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
}
# What a section for the text part leaves to the whole.
_SHARED = ("tie_word_embeddings", "bos_token_id", "eos_token_id")


def read_config(fields: Fields) -> ModelConfig:
    """Read config.json with the architecture that its model_type names; of a multimodal model, that of its text part.

    Raises:
        FormatError: a value is missing, of the wrong type, out of range or inconsistent with another.
        UnsupportedError: the model type, or an option of it, is not implemented.
    """
    model_type = fields.text("model_type")
    if model_type in MULTIMODAL:
        text = fields.section("text_config")
        whole = Fields({"model_type": MULTIMODAL[model_type]}, text.source).updated(text)
        fields = whole.updated(fields.only(*_SHARED), text.source)
        model_type = fields.text("model_type")
    if model_type not in ARCHITECTURES:
        supported = ", ".join(sorted({*ARCHITECTURES, *MULTIMODAL}))
        raise UnsupportedError(
            f"{fields.source}: model_type {model_type!r} is not supported; supported: {supported}. The transformers "
            "plugin (entrollm.hf) runs any other architecture of transformers"
        )
    return ARCHITECTURES[model_type](fields)
