"""Which options a generation runs with: the caller's, else the model's, else none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypedDict, TypeVar

from entrollm.engine.sampling import SamplingOptions, check_number
from entrollm.errors import FormatError, UnsupportedError
from entrollm.models.config_fields import Fields

_T = TypeVar("_T")

DEFAULT_MAX_TOKENS = 256
_MAX_LENGTH = 2**63

# Every option that transformers' GenerationConfig has is in one of the next three.
# These are followed.
HONOURED = frozenset(
    {"max_length", "max_new_tokens", "min_length", "min_new_tokens", "stop_strings", "do_sample", "temperature"}
    | {"top_k", "top_p", "min_p", "repetition_penalty", "bos_token_id", "eos_token_id"}
)
# These say how to compute, what to return besides the text, or something about beams or encoders.
INERT = frozenset(
    {"early_stopping", "length_penalty", "use_cache", "use_mtp", "cache_implementation", "cache_config"}
    | {"max_cache_len", "renormalize_logits", "remove_invalid_values", "output_attentions", "output_hidden_states"}
    | {"output_scores", "output_logits", "return_dict_in_generate", "pad_token_id", "decoder_start_token_id"}
    | {"is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"}
    | {"prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind"}
    | {"target_lookbehind", "assistant_ensemble_weight", "speculation_type", "compile_config", "disable_compile"}
    | {"continuous_batching_config", "low_memory", "prefill_chunk_size", "_from_model_config", "transformers_version"}
)
# These would change the text and are refused, but for the values at which they do nothing.
REFUSED: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        "max_time": (),
        "num_beams": (1,),
        "num_beam_groups": (1,),
        "diversity_penalty": (0,),
        "num_return_sequences": (1,),
        "no_repeat_ngram_size": (0,),
        "encoder_no_repeat_ngram_size": (0,),
        "encoder_repetition_penalty": (1,),
        "exponential_decay_length_penalty": (),
        "typical_p": (1,),
        "top_h": (),
        "epsilon_cutoff": (0,),
        "eta_cutoff": (0,),
        "penalty_alpha": (0,),
        "dola_layers": (),
        "guidance_scale": (1,),
        "watermarking_config": (),
        "token_healing": (False,),
        "bad_words_ids": ([],),
        "constraints": ([],),
        "force_words_ids": ([],),
        "suppress_tokens": ([],),
        "begin_suppress_tokens": ([],),
        "forced_bos_token_id": (),
        "forced_eos_token_id": (),
        "sequence_bias": ([], {}),
    }
)
# What transformers assumes where a model that samples names no top_k.
_SAMPLED_TOP_K = 50


class GenerateKeywords(TypedDict, total=False):
    """The keyword arguments of Model.generate, stream and chat; None is the same as leaving one out.

    max_tokens, stop and the fields of SamplingOptions. temperature 0 takes the likeliest token. top_k, top_p or
    min_p without a temperature turns sampling on.
    """

    max_tokens: int | None
    stop: str | Sequence[str] | None
    repetition_penalty: float | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None


@dataclass(frozen=True)
class GenerationOptions:
    """How to sample and when to end.

    Attributes:
        max_tokens: at most this many new tokens; at least 1.
        min_tokens: no end token is chosen before this many new tokens.
        stop: strings that end the text, and are left out of it.
        eos_token_ids: tokens that end the text.
        sampling: how each token is chosen.
    Raises:
        TypeError: max_tokens is not an integer or a stop string is not one.
        ValueError: max_tokens is below 1 or a stop string is empty.
    """

    max_tokens: int
    stop: tuple[str, ...]
    eos_token_ids: tuple[int, ...]
    sampling: SamplingOptions
    min_tokens: int = 0

    def __post_init__(self) -> None:
        check_number("max_tokens", self.max_tokens, is_integer=True)
        for stop in self.stop:
            if not isinstance(stop, str):
                raise TypeError(f"a stop string should be a string, got {stop!r}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens should be at least 1, got {self.max_tokens}")
        if "" in self.stop:
            raise ValueError("a stop string should not be empty")


def resolve_options(
    keywords: GenerateKeywords, generation_config: Fields, config_eos: tuple[int, ...], prompt_tokens: int = 0
) -> GenerationOptions:
    """Fill what the caller left out from generation_config.json.

    Args:
        keywords: the caller's options.
        generation_config: the model's; its values count for sampling only if it says do_sample, as elsewhere.
        config_eos: the end tokens of config.json, used if generation_config has none.
        prompt_tokens: in the prompt; max_length and min_length of generation_config.json count them.
    Raises:
        ValueError: an option of the caller's is out of range or unknown.
        FormatError: generation_config.json holds a malformed value.
        UnsupportedError: generation_config.json asks for something that is not implemented.
    """
    unknown = set(keywords) - GenerateKeywords.__optional_keys__
    if unknown:
        known = ", ".join(GenerateKeywords.__annotations__)
        raise TypeError(f"unknown option {', '.join(sorted(unknown))}; known: {known}")
    for key, inert in REFUSED.items():
        if key in generation_config and generation_config.raw(key) not in inert:
            raise UnsupportedError(
                f"{generation_config.source}: {key} {generation_config.raw(key)!r} is not supported; remove it to go on"
            )
    stop = keywords.get("stop")
    if stop is None:
        stop = _stop_strings(generation_config)
    elif not isinstance(stop, Iterable):
        raise TypeError(f"stop should be a string or a sequence of strings, got {stop!r}")
    max_tokens = keywords.get("max_tokens")
    do_sample = generation_config.flag("do_sample", False)
    return GenerationOptions(
        max_tokens=_max_tokens(generation_config, prompt_tokens) if max_tokens is None else max_tokens,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        eos_token_ids=generation_config.token_ids("eos_token_id") or config_eos,
        sampling=_sampling(keywords, _model_sampling(generation_config, do_sample), do_sample),
        min_tokens=_min_tokens(generation_config, prompt_tokens),
    )


def _stop_strings(fields: Fields) -> list[str]:
    value = fields.raw("stop_strings")
    if value is None:
        return []
    strings = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str) and item]
    if len(strings) != (len(value) if isinstance(value, list) else 1):
        raise fields.error("stop_strings", "a string or a list of strings, none of them empty")
    return strings


def _max_tokens(fields: Fields, prompt_tokens: int) -> int:
    """The model's own limit; max_length counts the prompt and matters only without max_new_tokens."""
    if "max_new_tokens" in fields or "max_length" not in fields:
        return fields.integer("max_new_tokens", DEFAULT_MAX_TOKENS)
    longest = fields.integer("max_length", high=_MAX_LENGTH)
    if prompt_tokens >= longest:
        raise ValueError(
            f"the prompt has {prompt_tokens} tokens, and {fields.source} allows {longest} with the answer "
            "(max_length); give max_tokens, or a shorter prompt"
        )
    return min(DEFAULT_MAX_TOKENS, longest - prompt_tokens)


def _min_tokens(fields: Fields, prompt_tokens: int) -> int:
    if "min_new_tokens" in fields:
        return fields.integer("min_new_tokens", low=0)
    return max(0, fields.integer("min_length", 0, low=0) - prompt_tokens)


def _model_sampling(fields: Fields, do_sample: bool) -> SamplingOptions:
    try:
        return SamplingOptions(
            repetition_penalty=fields.number("repetition_penalty", 1.0),
            temperature=fields.number("temperature", 1.0),
            top_k=fields.integer("top_k", _SAMPLED_TOP_K if do_sample else 0, low=0),
            top_p=fields.number("top_p", 1.0),
            min_p=fields.number("min_p", 0.0),
        )
    except ValueError as error:
        raise FormatError(f"{fields.source}: {error}") from error


def _sampling(keywords: GenerateKeywords, model: SamplingOptions, do_sample: bool) -> SamplingOptions:
    filters = (keywords.get("top_k"), keywords.get("top_p"), keywords.get("min_p"))
    wants_sampling = do_sample or any(value is not None for value in filters)
    return SamplingOptions(
        repetition_penalty=_first(keywords.get("repetition_penalty"), model.repetition_penalty),
        temperature=_first(keywords.get("temperature"), model.temperature if wants_sampling else 0.0),
        top_k=_first(keywords.get("top_k"), model.top_k),
        top_p=_first(keywords.get("top_p"), model.top_p),
        min_p=_first(keywords.get("min_p"), model.min_p),
        seed=keywords.get("seed"),
        presence_penalty=_first(keywords.get("presence_penalty"), 0.0),
        frequency_penalty=_first(keywords.get("frequency_penalty"), 0.0),
        logit_bias=_first(keywords.get("logit_bias"), {}),
    )


def _first(value: _T | None, default: _T) -> _T:
    return default if value is None else value
