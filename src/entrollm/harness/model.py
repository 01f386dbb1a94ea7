"""A model of this package as lm-eval wants it: likelihoods of continuations, and text until a stop string."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm  # type: ignore[import-untyped]

from entrollm.checkpoint.panics import decode, encode
from entrollm.checkpoint.resolve import resolve
from entrollm.engine.batch import SequenceStep
from entrollm.engine.files import why_no_tokenizer
from entrollm.engine.load import load
from entrollm.engine.memory import check_memory
from entrollm.engine.model import Model
from entrollm.engine.sampling import check_finite
from entrollm.evaluate.perplexity import token_losses
from entrollm.harness.running import Running, start

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

Pair = tuple[tuple[str, str] | None, list[int], list[int]]
Likelihood = tuple[float, bool]

# lm-eval's own limit where a task names none.
_MAX_GENERATED = 256
# Options of generate_until that are followed, by their names in lm-eval and here.
_SAMPLING = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}
# Options that other back ends need, and that change nothing here.
_INERT = frozenset({"do_sample", "until", "max_gen_toks", "max_new_tokens", "use_cache", "num_beams"})


@register_model("entrollm")
class HarnessModel(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """A compressed folder, or any other model that `entrollm run` takes, as a model of lm-eval.

    Tokens, start tokens and windows are those of lm-eval's own back end for transformers. Requests are sorted, so that
    those with a common beginning share its computation, which changes no bit of the results.

    Args:
        path: a folder or a Hub id.
        max_length: tokens of context and continuation together; by default the model's context.
        batch_size: texts that are generated side by side, "auto" for 8; likelihoods are computed one by one, because
            a single request fills the processor.
        threads, memory, cache_type, check: as for `load`.
        add_bos_token: whether texts begin with the start token; by default as tokenizer.json says.
    Raises:
        FormatError, UnsupportedError: the model cannot be run.
        ValueError: it has no tokenizer, or an argument is malformed.
    """

    def __init__(
        self,
        path: str,
        *,
        max_length: int | None = None,
        batch_size: int | str = 8,
        threads: int | None = None,
        memory: str | int = "auto",
        cache_type: str = "f32",
        check: bool = True,
        add_bos_token: bool | None = None,
        **ignored: object,
    ) -> None:
        super().__init__()
        unknown = set(ignored) - {"device", "max_batch_size"}
        if unknown:
            raise ValueError(f"entrollm models have no argument {', '.join(sorted(unknown))}")
        folder = resolve(path)
        self._model = load(folder, threads, memory=check_memory(memory), check=check, cache_type=cache_type)
        if self._model.tokenizer is None:
            raise ValueError(why_no_tokenizer(folder, "reading a text"))
        self._path = path
        self._tokens = self._model.tokenizer
        self._special = self._model.special_tokens
        self._adds_start = add_bos_token
        context = self._model.config.context_length
        self.max_length = context if max_length is None else max_length
        if not 2 <= self.max_length <= context:
            raise ValueError(f"max_length should be from 2 to the context of {context} tokens, got {max_length}")
        self.batch_size = 8 if batch_size == "auto" else int(batch_size)
        if self.batch_size < 1:
            raise ValueError(f"batch_size should be 1 or more, got {batch_size}")

    @property
    def model(self) -> Model:
        """The model itself."""
        return self._model

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text.

        Raises:
            ValueError: the model names none.
        """
        named = self._special_id("eos_token")
        ends = self._model.end_token_ids if named is None else (named,)
        if not ends:
            raise ValueError(f"{self._path}: the model names no end token, which the harness needs")
        return ends[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it: the start token, or the end token without one."""
        start_token = self._special_id("bos_token")
        return self.eot_token_id if start_token is None else start_token

    def _special_id(self, name: str) -> int | None:
        text = self._special.get(name)
        return None if text is None else self._tokens.token_to_id(text)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """The token ids of a text; a start token that the text begins with is not added again."""
        adds = self._adds_start if add_special_tokens is None else add_special_tokens
        prefix = decode(self._tokens, [self.prefix_token_id], skip_special_tokens=False)
        if add_special_tokens is None and prefix and string.startswith(prefix):
            adds = False
        return encode(self._tokens, string, add_special_tokens=True if adds is None else adds)

    def _loglikelihood_tokens(self, requests: list[Pair], disable_tqdm: bool = False, **_: object) -> list[Likelihood]:
        found: dict[int, Likelihood] = {}
        # Neighbours in this order share the longest beginnings.
        order = sorted(range(len(requests)), key=lambda i: (requests[i][1], requests[i][2]))
        cache = self._model.new_cache()
        for index in tqdm(order, disable=disable_tqdm, desc="likelihoods"):
            texts, context, continuation = requests[index]
            if len(continuation) > self.max_length:
                raise ValueError(f"a continuation of {len(continuation)} tokens exceeds max_length {self.max_length}")
            ids = [*context, *continuation][-(self.max_length + 1) :]
            logits = self._model.logits(ids[:-1], last=len(continuation), cache=cache)
            targets = np.array(continuation, dtype=np.int64)
            is_greedy = bool((logits.argmax(axis=1) == targets).all())
            losses = token_losses(logits, targets)
            check_finite(losses, "predictions")
            found[index] = (-float(losses.sum()), is_greedy)
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, found[index])
        return [found[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in nats; see lm-eval."""
        totals = []
        for request in tqdm(requests, disable=disable_tqdm, desc="texts"):
            (text,) = request.args
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            pairs: list[Pair] = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(nats for nats, _ in self._loglikelihood_tokens(pairs, disable_tqdm=True)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text after each context up to a stop string, greedy unless the task asks for sampling; see lm-eval."""
        waiting = []
        for index, request in enumerate(requests):
            context, options = request.args
            waiting.append(_Wanted(index, self.tok_encode(context), self._answer_options(options), request.args))
        waiting.sort(key=lambda wanted: wanted.ids, reverse=True)
        found: dict[int, str] = {}
        running: list[tuple[_Wanted, Running]] = []
        with tqdm(total=len(requests), disable=disable_tqdm, desc="answers") as progress:
            while waiting or running:
                while waiting and len(running) < self.batch_size:
                    wanted = waiting.pop()
                    ids = wanted.ids[-(self.max_length - wanted.max_tokens) :]
                    running.append((wanted, start(self._model, ids, wanted.options, [each for _, each in running])))
                going = [(wanted, each) for wanted, each in running if not each.has_ended]
                for wanted, each in running:
                    if each.has_ended:
                        found[wanted.index] = each.text
                        self.cache_hook.add_partial("generate_until", wanted.request, each.text)
                        progress.update()
                running = going
                if running:
                    logits = self._model.step([SequenceStep(each.next_ids, each.cache) for _, each in running])
                    for (_, each), row in zip(running, logits, strict=True):
                        each.push(row)
        return [found[index] for index in range(len(requests))]

    def _answer_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        unknown = set(options) - _INERT - set(_SAMPLING)
        if unknown or options.get("num_beams", 1) != 1:
            raise ValueError(f"generation options {dict(options)!r}: only {sorted(_SAMPLING)} are supported, no beams")
        most = int(options.get("max_gen_toks", options.get("max_new_tokens", _MAX_GENERATED)))
        if not 1 <= most < self.max_length:
            raise ValueError(f"max_gen_toks should be from 1 to {self.max_length - 1} in this context, got {most}")
        sampling = {ours: options[theirs] for theirs, ours in _SAMPLING.items() if theirs in options}
        if not options.get("do_sample", options.get("temperature", 0.0) > 0):
            sampling = {"temperature": 0.0}
        until = options.get("until") or []
        # The end token's text may also come from other tokens.
        end = decode(self._tokens, [self.eot_token_id], skip_special_tokens=False)
        stop = [text for text in [*([until] if isinstance(until, str) else until), end] if text]
        return {"max_tokens": most, "stop": stop, **sampling}

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Lay a dialogue out as text; without add_generation_prompt it ends within the last message."""
        text = self._model.render_chat(chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        end = text.rfind(last)
        if end < 0:
            raise ValueError("the chat template changes the last message, so that it cannot be continued")
        return text[: end + len(last)]

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in lm-eval's cache of requests."""
        return str(self._path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the chat template, or None if it is not used.

        Raises:
            ValueError: a template is asked for by name, or the model has none.
        """
        if chat_template is False:
            return None
        if chat_template is not True:
            raise ValueError(f"{self._path} has one chat template at most, and none by the name of {chat_template!r}")
        if self._model.chat_template is None:
            raise ValueError(f"{self._path} has no chat template")
        return self._model.chat_template


@dataclass(frozen=True)
class _Wanted:
    """A text to generate: its place among the requests, its context and its options."""

    index: int
    ids: list[int]
    options: dict[str, Any]
    request: Iterable[Any] = field(repr=False)

    @property
    def max_tokens(self) -> int:
        return int(self.options["max_tokens"])
