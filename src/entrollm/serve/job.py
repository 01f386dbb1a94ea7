"""One answer that the server generates, and what it reports while it does."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from entrollm.engine.answer import AnswerText, FinishReason
from entrollm.engine.sampling import TokenLogprobs
from entrollm.engine.speculate import Speculation
from entrollm.engine.weights import Floats
from entrollm.serve.errors import ApiError
from entrollm.serve.served import ServedModel
from entrollm.serve.slots import Slot


@dataclass(frozen=True)
class NewToken:
    """A token of an answer.

    Attributes:
        text: what it adds to the text, often "".
        finish_reason: "unfinished" but for the last token.
        logprobs: where they were asked for.
    """

    token: int
    text: str
    finish_reason: FinishReason
    logprobs: TokenLogprobs | None


@dataclass(frozen=True)
class PromptRead:
    """The prompt of a job without an answer has been read."""


# Is given the hidden states of tokens, and the position of the first; see SequenceStep.
Observe = Callable[[int, Floats], None]
# An ApiError ends the answer.
Event = NewToken | PromptRead | ApiError


@dataclass(eq=False)
class Job:
    """One answer to generate.

    Attributes:
        client: whose turn it uses in the queue.
        served: the model.
        prompt: token ids, at least one, which leave room in the context.
        answer: chooses the tokens and makes the text; `None` to read the prompt only.
        sink: is given each event, in the order in which they happen.
        deadline_s: time.monotonic() at which it is given up.
        logprobs: how many likeliest tokens to report with each token; `None` for no report.
        observe: is given the prompt's hidden states, all of them, on the scheduler's thread; see SequenceStep.
        after: an answer to the same prompt, whose reading of the prompt this one waits for.
        is_cancelled: nobody waits for it any more; set by cancel of the scheduler.
        reused_tokens: tokens of the prompt that a cache held when the answer began.
        pending: tokens that the cache lacks.
        speculation: guesses tokens while the answer runs alone, once it has.
    """

    client: Hashable
    served: ServedModel
    prompt: Sequence[int]
    answer: AnswerText | None
    sink: Callable[[Event], None]
    deadline_s: float
    logprobs: int | None = None
    observe: Observe | None = None
    after: Job | None = None
    is_cancelled: bool = False
    reused_tokens: int = 0
    # The rest belongs to the scheduler's thread.
    slot: Slot | None = None
    pending: Sequence[int] = ()
    speculation: Speculation | None = None
    has_read_prompt: bool = False
    is_over: bool = False
