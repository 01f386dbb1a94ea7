"""Which options a generation runs with: the caller's, else the model's, else none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict, TypeVar

from entrollm.engine.sampling import SamplingOptions
from entrollm.errors import FormatError, UnsupportedError
from entrollm.models.config_fields import Fields

_T = TypeVar("_T")

DEFAULT_MAX_TOKENS = 256

# Options of generation_config.json that would change the text, and the values at which they do nothing.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "no_repeat_ngram_size": (0,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "penalty_alpha": (0,),
    "guidance_scale": (1,),
    "bad_words_ids": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "sequence_bias": (),
}


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


@dataclass(frozen=True)
class GenerationOptions:
    """How to sample and when to end.

    Attributes:
        max_tokens: at most this many new tokens; at least 1.
        stop: strings that end the text, and are left out of it.
        eos_token_ids: tokens that end the text.
        sampling: how each token is chosen.
    Raises:
        ValueError: max_tokens is below 1 or a stop string is empty.
    """

    max_tokens: int
    stop: tuple[str, ...]
    eos_token_ids: tuple[int, ...]
    sampling: SamplingOptions

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens should be at least 1, got {self.max_tokens}")
        if "" in self.stop:
            raise ValueError("a stop string should not be empty")


def resolve_options(
    keywords: GenerateKeywords, generation_config: Fields, config_eos: tuple[int, ...]
) -> GenerationOptions:
    """Fill what the caller left out from generation_config.json.

    Args:
        keywords: the caller's options.
        generation_config: the model's; its values count for sampling only if it says do_sample, as elsewhere.
        config_eos: the end tokens of config.json, used if generation_config has none.
    Raises:
        ValueError: an option of the caller's is out of range or unknown.
        FormatError: generation_config.json holds a malformed value.
        UnsupportedError: generation_config.json asks for something that is not implemented.
    """
    unknown = set(keywords) - GenerateKeywords.__optional_keys__
    if unknown:
        known = ", ".join(GenerateKeywords.__annotations__)
        raise TypeError(f"unknown option {', '.join(sorted(unknown))}; known: {known}")
    for key, inert in _UNSUPPORTED.items():
        if key in generation_config and generation_config.raw(key) not in inert:
            raise UnsupportedError(
                f"{generation_config.source}: {key} {generation_config.raw(key)!r} is not supported; remove it to go on"
            )
    stop = keywords.get("stop")
    return GenerationOptions(
        max_tokens=_first(keywords.get("max_tokens"), generation_config.integer("max_new_tokens", DEFAULT_MAX_TOKENS)),
        stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
        eos_token_ids=generation_config.token_ids("eos_token_id") or config_eos,
        sampling=_sampling(keywords, _model_sampling(generation_config), generation_config.flag("do_sample", False)),
    )


def _model_sampling(fields: Fields) -> SamplingOptions:
    try:
        return SamplingOptions(
            repetition_penalty=fields.number("repetition_penalty", 1.0),
            temperature=fields.number("temperature", 1.0),
            top_k=fields.integer("top_k", 0, low=0),
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
    )


def _first(value: _T | None, default: _T) -> _T:
    return default if value is None else value
