"""Where the checkpoints of different architectures have the layer that guesses the token after the next one."""

from __future__ import annotations

from entrollm.models.config import ModelConfig, TokenHead


def head_behind_layers(config: ModelConfig) -> TokenHead:
    """The head as DeepSeek V3 has it: one layer more than config.json counts, with the head's other parts in it."""
    layer = f"{config.names.layers}{config.num_layers}."
    return TokenHead(
        layer=layer,
        like=config.num_layers - 1,
        token_norm=f"{layer}enorm",
        hidden_norm=f"{layer}hnorm",
        projection=f"{layer}eh_proj",
        norm=f"{layer}shared_head.norm",
    )


def head_of_its_own(config: ModelConfig) -> TokenHead | None:
    """The head as Qwen3-Next has it, whose layer has the usual attention; None if no layer of the model has."""
    like = [index for index in range(config.num_layers) if config.mixer(index) is None]
    if not like:
        return None
    return TokenHead(
        layer="mtp.layers.0.",
        like=like[-1],
        token_norm="mtp.pre_fc_norm_embedding",
        hidden_norm="mtp.pre_fc_norm_hidden",
        projection="mtp.fc",
        norm="mtp.norm",
    )
