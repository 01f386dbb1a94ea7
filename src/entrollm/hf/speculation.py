"""Greedy generation on a GPU with guesses of the next tokens: the text's own n-grams, checked several at a time."""

from __future__ import annotations

import copy
import time
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from entrollm.engine.pace import Pace
from entrollm.engine.speculate import Guess, NgramDrafter
from entrollm.hf.runners import Together, attention_windows

# Options of `generate` that these loops know, or that matter to sampling alone.
_KNOWN = frozenset(
    {"max_new_tokens", "max_length", "do_sample", "use_cache", "prompt_lookup_num_tokens", "temperature", "top_k"}
    | {"top_p", "min_p", "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config"}
)
_PROMPT_TOKENS = 512  # of one call
_TRANSFORMERS_TOKENS = 20  # that transformers makes where nobody says how many
_runners: weakref.WeakKeyDictionary[Any, Together] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class _Call:
    """What a call of `generate` asks for.

    Attributes:
        ids: the prompt.
        most: tokens to make at most.
        most_guessed: tokens of a guess at most.
        ends: tokens that end the text.
        streamer: is given tokens, or `None` if absent.
    """

    ids: list[int]
    most: int
    most_guessed: int
    ends: frozenset[int]
    streamer: Any


def speculate(model: Any, inputs: Tensor | None, options: dict[str, Any]) -> Tensor | None:
    """Generate with guesses, or do nothing.

    The tokens are those of greedy generation, but for products and attention of several tokens, which may be rounded
    otherwise than those of one.

    Args:
        model: a model of transformers on a GPU.
        inputs, options: as `entrollm.hf.generate` has them, with prompt_lookup_num_tokens.
    Returns:
        the prompt and the new tokens (1, n); `None` if there is more than one prompt, if the call samples or has other
        options than lengths and ends, or if the model's layers keep something else than keys and values.
    """
    call = _understood(model, inputs, dict(options))
    if call is None:
        return None
    runner = _runner_of(model)
    if runner is None:
        return None
    on_device = torch.cuda.device(model.device) if model.device.type == "cuda" else nullcontext()
    # Not inference mode, in which layers with one input do not share a launch.
    with torch.no_grad(), on_device:
        made = _generate(runner, call)
    return torch.tensor([[*call.ids, *made]], device=model.device)


def _understood(model: Any, inputs: Tensor | None, options: dict[str, Any]) -> _Call | None:
    # As transformers does: what the call leaves open is as the model's own configuration has it.
    config = copy.deepcopy(options.pop("generation_config", None) or GenerationConfig())  # type: ignore[no-untyped-call]
    config.update(**model.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
    rest = config.update(**options)
    streamer, mask = rest.pop("streamer", None), rest.pop("attention_mask", None)
    tokens = rest.pop("input_ids", None) if inputs is None else inputs
    if rest or tokens is None or len(tokens) != 1 or (mask is not None and not bool(mask.all())):
        return None
    if config.do_sample or not set(_changes(config)) <= _KNOWN:
        return None
    ids = tokens[0].tolist()
    most = config.max_new_tokens
    if most is None:
        most = _TRANSFORMERS_TOKENS if config.max_length is None else config.max_length - len(ids)
    ends = [] if config.eos_token_id is None else torch.as_tensor(config.eos_token_id).reshape(-1).tolist()
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not ids or most < 1 or (limit is not None and len(ids) + most > limit):
        return None
    return _Call(ids, most, config.prompt_lookup_num_tokens, frozenset(ends), streamer)


def _changes(config: GenerationConfig) -> dict[str, Any]:
    """The options that a configuration switches on."""
    changes: dict[str, Any] = config.to_diff_dict()
    return {name: value for name, value in changes.items() if value is not None and value is not False}


def _runner_of(model: Any) -> Together | None:
    """What runs the model's tokens, with its graphs, which later calls use again."""
    if model not in _runners:
        windows = attention_windows(model.config)
        if windows is None or model.config._attn_implementation not in ("sdpa", "eager"):
            return None
        _runners[model] = Together(weakref.proxy(model), windows)
    return _runners[model]


def _generate(runner: Together, call: _Call) -> list[int]:
    drafter, pace = NgramDrafter(), Pace(is_free=True)
    drafter.extend(call.ids)
    cache = runner.new_cache()
    if call.streamer is not None:
        call.streamer.put(torch.tensor([call.ids]))
    for start in range(0, len(call.ids), _PROMPT_TOKENS):
        logits = runner.read(call.ids[start : start + _PROMPT_TOKENS], cache, all_logits=False)
    chosen = logits.argmax(-1).tolist()
    made: list[int] = []
    while True:
        chosen = _until_end(chosen, call, len(made))
        made += chosen
        if call.streamer is not None:
            call.streamer.put(torch.tensor(chosen))
        if made[-1] in call.ends or len(made) == call.most:
            break
        drafter.extend(chosen)
        chosen = _step(runner, cache, made[-1], min(call.most_guessed, call.most - len(made) - 1), drafter, pace)
    if call.streamer is not None:
        call.streamer.end()
    return made


def _until_end(chosen: Sequence[int], call: _Call, made: int) -> list[int]:
    """Tokens up to the first that ends the text."""
    last = next((i for i, token in enumerate(chosen) if token in call.ends), len(chosen) - 1)
    return list(chosen[: min(last + 1, call.most - made)])


def _step(runner: Together, cache: Any, token: int, most: int, drafter: NgramDrafter, pace: Pace) -> list[int]:
    """Run the last token and a guess of those that follow; return the tokens that the model chooses, at least one."""
    started = time.perf_counter()
    guess = drafter.guess(most) if most > 0 else Guess()
    tokens = list(guess.tokens[: pace.choose(guess.kind, len(guess.tokens))])
    chosen: list[int] = runner.extend([token, *tokens], cache).argmax(-1).tolist()
    right = next((i for i, guessed in enumerate(tokens) if guessed != chosen[i]), len(tokens))
    del cache.ids[len(cache.ids) - len(tokens) + right :]
    pace.record(guess.kind, len(tokens), right, time.perf_counter() - started)
    if guess.tokens and not tokens:
        pace.record_unused(guess.kind, chosen[0] == guess.tokens[0])
    return chosen[: right + 1]
