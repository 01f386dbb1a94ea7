"""From a prompt to the jobs that answer it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from entrollm.errors import EntroLLMError
from entrollm.serve.errors import bad_request
from entrollm.serve.fields import Sampling
from entrollm.serve.grammar import AnswerForm
from entrollm.serve.job import Job
from entrollm.serve.served import ServedModel

# What /v1/completions of OpenAI takes.
_COMPLETION_TOKENS = 16

Result = TypeVar("Result")


@dataclass(frozen=True)
class Prompted:
    """A prompt and what is asked about it.

    Attributes:
        served: the model.
        body: how to sample.
        ids: the prompt's tokens.
        logprobs: how many likeliest tokens to report with each token; `None` for no report.
        shown_tokens: special tokens that the text shows.
        form: what the answers must look like.
        is_chat: whether answers are texts of their own, and not continuations of the prompt.
    """

    served: ServedModel
    body: Sampling
    ids: Sequence[int]
    logprobs: int | None = None
    shown_tokens: Collection[int] = ()
    form: AnswerForm | None = None
    is_chat: bool = False


@dataclass(frozen=True)
class Asker:
    """Who asks.

    Attributes:
        client: whose turn it uses in the queue.
        deadline_s: time.monotonic() at which answers are given up.
    """

    client: Hashable
    deadline_s: float


def answer_jobs(asker: Asker, prompted: Prompted) -> list[Job]:
    """One job for each choice to a prompt.

    Raises:
        ApiError: the prompt is too long, or an option is wrong.
    """
    served, ids, is_chat = prompted.served, prompted.ids, prompted.is_chat
    check_length(served, ids, "messages" if is_chat else "prompt")
    most = served.context_length - len(ids) if is_chat else _COMPLETION_TOKENS
    jobs: list[Job] = []
    for choice in range(prompted.body.choices):
        try:
            answer = served.model.new_answer(
                ids,
                continues_text=not is_chat,
                context_length=served.context_length,
                shown_tokens=prompted.shown_tokens,
                **prompted.body.keywords(choice, most),
            )
        except (TypeError, ValueError) as error:
            raise bad_request(str(error)) from None
        if prompted.form is not None:
            answer.constrain(prompted.form.copy())
        job = Job(asker.client, served, ids, answer, _nobody, asker.deadline_s, prompted.logprobs)
        job.after = jobs[0] if jobs else None
        jobs.append(job)
    return jobs


def reading_job(asker: Asker, served: ServedModel, ids: Sequence[int], field: str) -> Job:
    """A job that reads a prompt and does not answer it.

    Args:
        asker, served, ids: as for answer_jobs.
        field: of the request, for errors.
    Raises:
        ApiError: the prompt is too long, or a token is outside the vocabulary.
    """
    check_length(served, ids, field)
    vocab_size = served.model.shape.vocab_size
    wrong = next((token for token in ids if token >= vocab_size), None)
    if wrong is not None:
        raise bad_request(f"token id {wrong} is outside the vocabulary of {vocab_size}", field)
    return Job(asker.client, served, ids, None, _nobody, asker.deadline_s)


def check_length(served: ServedModel, ids: Sequence[int], field: str) -> None:
    """Check that a prompt leaves room for an answer.

    Raises:
        ApiError: it does not.
    """
    if len(ids) >= served.context_length:
        raise bad_request(
            f"the prompt has {len(ids)} tokens and leaves no room for an answer in a context of "
            f"{served.context_length}; shorten it",
            field,
            "context_length_exceeded",
        )


async def in_thread(work: Callable[[], Result], field: str) -> Result:
    """Run work that takes time for long texts; what it finds wrong is the fault of `field`."""
    try:
        return await asyncio.to_thread(work)
    except (TypeError, ValueError, EntroLLMError) as error:
        raise bad_request(str(error), field) from None


def _nobody(event: object) -> None:
    """What waits for a job before someone does."""
