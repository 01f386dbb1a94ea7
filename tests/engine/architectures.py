"""Small random checkpoints of every supported architecture, and the comparison of a model with transformers.

`ARCHITECTURES` maps a name to a function that writes the checkpoint into an empty folder and returns the folder.
They are bf16, in several shards, as `save_pretrained` writes them; ask `compare_with_transformers` about any Model
made from one (or from a folder that holds the same weights otherwise encoded).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from entrollm.engine.model import Model
from entrollm.engine.weights import Floats

VOCAB_SIZE = 307
# The greedy comparison decodes this many tokens after a prompt of PROMPT_TOKENS.
GREEDY_TOKENS = 64
PROMPT_TOKENS = 20

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_PARTIAL = {"partial_rotary_factor": 0.5}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2}
_GRANITE = {
    "embedding_multiplier": 6.0,
    "attention_multiplier": 0.1,
    "residual_multiplier": 0.4,
    "logits_scaling": 3.0,
}
_GROUPED_EXPERTS = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 48,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.5,
}
_LATENT = {
    "num_key_value_heads": 6,
    "kv_lora_rank": 24,
    "q_lora_rank": 40,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
}
_DELTA = {
    "head_dim": 16,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 12,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
_GEMMA4 = {
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 7,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_SHARED_EXPERT = {"moe_intermediate_size": 48, "shared_expert_intermediate_size": 80}
_YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}


def _longrope(count: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.05 * index for index in range(count)],
        "long_factor": [2.0 + 0.5 * index for index in range(count)],
    }


# The longrope models switch at 32 tokens, so the greedy comparison crosses it.
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama-bias": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("LlamaConfig", {"head_dim": 32, "hidden_size": 64, "num_attention_heads": 4}),
    "llama-llama3-rope": ("LlamaConfig", {"rope_parameters": _LLAMA3_ROPE}),
    "llama-linear-rope": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}},
    ),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral-window": ("MistralConfig", {"sliding_window": 7}),
    "phi3": ("Phi3Config", {}),
    "phi3-window": ("Phi3Config", {"sliding_window": 9}),
    "phi3-longrope": ("Phi3Config", {"original_max_position_embeddings": 32, "rope_parameters": _longrope(8)}),
    "phi3-partial": (
        "Phi3Config",
        {
            "original_max_position_embeddings": 32,
            "rope_parameters": {**_longrope(6), "partial_rotary_factor": 0.75},
            "tie_word_embeddings": True,
        },
    ),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen2-yarn": ("Qwen2Config", {"rope_parameters": _YARN_ROPE}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "qwen3-window": (
        "Qwen3Config",
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "num_hidden_layers": 4,
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": 9,
            "sliding_window_pattern": 3,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
            },
            "final_logit_softcapping": 2.0,
        },
    ),
    "gemma4": (
        "Gemma4TextConfig",
        {
            **_GEMMA4,
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 12,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "final_logit_softcapping": 2.0,
        },
    ),
    "gemma4-experts": (
        "Gemma4TextConfig",
        {
            **_GEMMA4,
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "enable_moe_block": True,
            "num_experts": 6,
            "top_k_experts": 2,
            "moe_intermediate_size": 48,
        },
    ),
    "gemma4_unified": ("Gemma4UnifiedTextConfig", _GEMMA4),
    "gemma": ("GemmaConfig", {"head_dim": 32}),
    "gemma2": (
        "Gemma2Config",
        {
            "head_dim": 24,
            "query_pre_attn_scalar": 40,
            "sliding_window": 6,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 2.0,
        },
    ),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0, 1]}),
    "smollm3-window": ("SmolLM3Config", {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 6}),
    "olmo2": ("Olmo2Config", {}),
    "olmo3": (
        "Olmo3Config",
        {
            "num_hidden_layers": 4,
            "sliding_window": 11,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": _YARN_ROPE,
            },
        },
    ),
    "granite": (
        "GraniteConfig",
        {
            "embedding_multiplier": 6.0,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.4,
            "logits_scaling": 3.0,
            "tie_word_embeddings": True,
        },
    ),
    "granite-hybrid": (
        "GraniteMoeHybridConfig",
        {
            "num_local_experts": 0,
            "shared_intermediate_size": 112,
            "layer_types": ["full_attention"] * 3,
            "position_embedding_type": "rope",
            "attention_multiplier": 0.2,
            "mamba_n_heads": 6,
        },
    ),
    "granite-hybrid-nope": (
        "GraniteMoeHybridConfig",
        {
            "num_local_experts": 0,
            "shared_intermediate_size": 112,
            "layer_types": ["full_attention"] * 3,
            "attention_multiplier": 0.2,
            "mamba_n_heads": 6,
        },
    ),
    "glm4": ("Glm4Config", {"head_dim": 16}),
    "cohere2": (
        "Cohere2Config",
        {"num_hidden_layers": 4, "sliding_window": 7, "logit_scale": 0.25, "tie_word_embeddings": True},
    ),
    "stablelm": ("StableLmConfig", {"use_qkv_bias": True, "rope_parameters": {**_DEFAULT_ROPE, **_PARTIAL}}),
    "stablelm-parallel": ("StableLmConfig", {"use_parallel_residual": True}),
    "nemotron": ("NemotronConfig", {"rope_parameters": {**_DEFAULT_ROPE, **_PARTIAL}}),
    "seed_oss": ("SeedOssConfig", {"head_dim": 24, "attention_out_bias": True, "mlp_bias": True}),
    "exaone4": ("Exaone4Config", {"sliding_window": 8, "sliding_window_pattern": 2, "num_hidden_layers": 4}),
    "exaone4-full": ("Exaone4Config", {"sliding_window": None, "layer_types": ["full_attention"] * 3}),
    "ministral": (
        "MinistralConfig",
        {
            "head_dim": 16,
            "num_hidden_layers": 4,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "ministral3": (
        "Ministral3Config",
        {
            "head_dim": 16,
            "rope_parameters": {**_YARN_ROPE, "original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.3},
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "gpt_neox-serial": (
        "GPTNeoXConfig",
        {"use_parallel_residual": False, "rope_parameters": {**_DEFAULT_ROPE, "partial_rotary_factor": 1.0}},
    ),
    "phi": ("PhiConfig", {}),
    "gpt2": ("GPT2Config", {"n_embd": 96, "n_layer": 3, "n_head": 6, "n_positions": 256}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 5}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_EXPERTS, "moe_intermediate_size": 48, "mlp_only_layers": [1]}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {
            **_EXPERTS,
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 80,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,
        },
    ),
    "olmoe": ("OlmoeConfig", _EXPERTS),
    "gpt_oss": (
        "GptOssConfig",
        {
            "head_dim": 16,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "sliding_window": 9,
            "swiglu_limit": 1.5,
            "rope_parameters": {**_YARN_ROPE, "truncate": False},
        },
    ),
    "granitemoe": ("GraniteMoeConfig", {"num_local_experts": 5, **_GRANITE}),
    "granitemoeshared": (
        "GraniteMoeSharedConfig",
        {"num_local_experts": 5, "shared_intermediate_size": 80, **_GRANITE},
    ),
    "glm4_moe": (
        "Glm4MoeConfig",
        {**_GROUPED_EXPERTS, "head_dim": 16, "use_qk_norm": True, "attention_bias": True, "first_k_dense_replace": 1},
    ),
    "ernie4_5": ("Ernie4_5Config", {"head_dim": 16, "use_bias": True}),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        {"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 48, "moe_num_shared_experts": 2, "use_bias": True},
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        {**_LATENT, **_GROUPED_EXPERTS, "topk_method": "group_limited_greedy", "q_lora_rank": None},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **_LATENT,
            **_GROUPED_EXPERTS,
            "first_k_dense_replace": 1,
            "attention_bias": True,
            "rope_parameters": {**_YARN_ROPE, "mscale": 0.7, "mscale_all_dim": 0.9},
        },
    ),
    "glm4_moe_lite": ("Glm4MoeLiteConfig", {**_LATENT, **_GROUPED_EXPERTS, "rope_interleave": False}),
    "mistral4": (
        "Mistral4Config",
        {
            **_LATENT,
            **_GROUPED_EXPERTS,
            "rope_parameters": {**_YARN_ROPE, "original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.3},
        },
    ),
    "qwen3_next": ("Qwen3NextConfig", {**_DELTA, **_EXPERTS, **_SHARED_EXPERT}),
    "qwen3_5": ("Qwen3_5TextConfig", {**_DELTA, "attention_bias": True}),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", {**_DELTA, **_EXPERTS, **_SHARED_EXPERT}),
    "lfm2": (
        "Lfm2Config",
        {"layer_types": ["conv", "full_attention", "conv"], "conv_bias": True, "block_multiple_of": 16},
    ),
    "granite-hybrid-mamba": (
        "GraniteMoeHybridConfig",
        {
            **_GRANITE,
            "num_local_experts": 5,
            "shared_intermediate_size": 80,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "mamba_n_heads": 12,
            "mamba_n_groups": 2,
            "mamba_d_state": 16,
        },
    ),
    "nemotron_h": (
        "NemotronHConfig",
        {
            **_GROUPED_EXPERTS,
            "moe_shared_expert_intermediate_size": 80,
            "layers_block_type": ["linear_attention", "full_attention", "mlp", "linear_attention", "moe"],
            "head_dim": 16,
            "mamba_num_heads": 12,
            "mamba_head_dim": 8,
            "n_groups": 3,
            "ssm_state_size": 16,
        },
    ),
    "phimoe": (
        "PhimoeConfig",
        {
            "num_local_experts": 5,
            "attention_bias": True,
            "lm_head_bias": True,
            "router_jitter_noise": 0.2,
            "rope_parameters": {
                **_longrope(8),
                "short_mscale": 1.1,
                "long_mscale": 1.3,
                "original_max_position_embeddings": 128,
            },
        },
    ),
}

# Seeds of weights with which no two experts have scores so close that rounding changes which one is chosen, and no
# norm follows values so small that it enlarges the rounding of activations beyond the tolerance.
_SEEDS = {"qwen3_moe": 8, "qwen3_next": 9, "qwen3_5_moe": 9}


_ROUTERS = ("gate.weight", "router.weight", "router.proj.weight")


def _causal_class(config: Any) -> Any:
    """The class of a model; AutoModelForCausalLM does not know all of them."""
    if type(config) in transformers.AutoModelForCausalLM._model_mapping:
        return transformers.AutoModelForCausalLM._model_mapping[type(config)]
    return getattr(transformers, type(config).__name__.replace("Config", "ForCausalLM"))


def _write_checkpoint(name: str, folder: Path) -> Path:
    class_name, options = _CONFIGS[name]
    config = getattr(transformers, class_name)(**{**_COMMON, **options})
    torch.manual_seed(_SEEDS.get(name, 7))
    model = _causal_class(config)(config)
    # What these add to the weights of their norms is 1.
    center = 0 if config.model_type == "gemma" or config.model_type.startswith(("gemma2", "gemma3", "nemotron")) else 1
    with torch.no_grad():
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("correction_bias"):
                buffer.copy_(0.3 * torch.randn_like(buffer))
            elif buffer_name.endswith("layer_scalar"):
                buffer.copy_(0.8 + 0.1 * torch.randn_like(buffer))
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("norm.weight"):
                parameter.copy_(center + 0.2 * torch.randn_like(parameter))
            elif parameter_name.endswith(_ROUTERS) and "per_layer_input" not in parameter_name:
                # Experts of clearly different scores, so that rounding changes no choice.
                parameter.copy_(4 * torch.randn_like(parameter) / parameter.shape[1] ** 0.5)
            elif parameter.dim() == 1:
                parameter.copy_(0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(1.5 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
        if config.model_type.startswith("gemma4"):
            # Its attention has no other scale, and sharp attention enlarges the rounding of activations.
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith("q_norm.weight"):
                    parameter.mul_(0.3)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="100KB")
    return folder


ARCHITECTURES: dict[str, Callable[[Path], Path]] = {name: partial(_write_checkpoint, name) for name in _CONFIGS}


def random_ids(count: int, *, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> list[int]:
    """`count` token ids."""
    return [int(token_id) for token_id in np.random.default_rng(seed).integers(0, vocab_size, count)]


def load_reference(folder: Path) -> Any:
    """The checkpoint in transformers, in float32."""
    torch.set_num_threads(1)
    config = transformers.AutoConfig.from_pretrained(folder)
    return _causal_class(config).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def reference_logits(reference: Any, ids: list[int]) -> Floats:
    """float32 (n, vocab_size) of a transformers model."""
    with torch.no_grad():
        logits: Floats = reference(torch.tensor([ids])).logits[0].numpy()
    return logits


def reference_greedy(reference: Any, prompt: list[int], count: int) -> list[int]:
    """The `count` likeliest tokens that a transformers model generates one after another."""
    with torch.no_grad():
        output = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=count,
        )
    return [int(token_id) for token_id in output[0, len(prompt) :]]


def relative_difference(found: Floats, expected: Floats) -> float:
    """The largest difference, relative to the largest expected magnitude."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def compare_with_transformers(model: Model, folder: Path, *, tolerance: float) -> None:
    """Assert that `model` computes what transformers computes from the checkpoint in `folder`.

    Logits of a short and of a longer sequence to the relative tolerance, and GREEDY_TOKENS equal tokens.
    """
    reference = load_reference(folder)
    for count in (1, PROMPT_TOKENS, 60):
        ids = random_ids(count, seed=count)
        difference = relative_difference(model.logits(ids), reference_logits(reference, ids))
        assert difference <= tolerance, f"{count} tokens: relative difference {difference:.2e}"
    prompt = random_ids(PROMPT_TOKENS)
    result = model.generate(prompt, max_tokens=GREEDY_TOKENS)
    assert list(result.token_ids) == reference_greedy(reference, prompt, GREEDY_TOKENS)
