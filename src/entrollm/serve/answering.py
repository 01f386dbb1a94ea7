"""From a checked request to its response: jobs for the scheduler, their events, the body or the stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from functools import partial
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response as HttpResponse

from entrollm.serve.answers import Choice, Format, Json, Response
from entrollm.serve.errors import ApiError
from entrollm.serve.job import Event, Job, PromptRead
from entrollm.serve.output.items import Item
from entrollm.serve.scheduler import Scheduler

_PING_S = 15
Result = TypeVar("Result")
_END = b"data: [DONE]\n\n"


class JsonResponse(HttpResponse):
    """A body of JSON in ASCII, which any text of a model or a client can be written in."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        """Encode."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def deliver(events: Sequence[tuple[Job, Event]]) -> None:
    """Hand events to those who wait for them; called on the event loop's thread."""
    for job, event in events:
        job.sink(event)


class Answers:
    """The answers to one request, while they are generated.

    Attributes:
        jobs, choices: one per answer.

    Args:
        scheduler: generates them.
        jobs: one per choice; their sinks are set here.
    """

    def __init__(self, scheduler: Scheduler, jobs: Sequence[Job]) -> None:
        self._scheduler = scheduler
        self.jobs = jobs
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.choices = [Choice(index) for index in range(len(jobs))]
        for index, job in enumerate(jobs):
            job.sink = partial(self._put, index)

    def submit(self) -> None:
        """Let the jobs wait for their turn.

        Raises:
            ApiError: the queue is full.
        """
        self._scheduler.submit(self.jobs)

    async def tokens(self) -> AsyncIterator[tuple[Choice, list[Item]]]:
        """What each token completes, with the choice that it belongs to, until all choices have ended.

        Raises:
            ApiError: one of them failed.
        """
        left = len(self.choices)
        while left:
            index, event = await self._events.get()
            choice = self.choices[index]
            if choice.finish_reason != "unfinished":
                continue  # it ended after a call
            if isinstance(event, ApiError):
                raise event
            if isinstance(event, PromptRead):
                choice.finish_reason = "length"
                left -= 1
                yield choice, []
                continue
            choice.tokens += 1
            choice.finish_reason = event.finish_reason
            if event.logprobs is not None:
                choice.unsent.append(event.logprobs)
            items = choice.read(event.text)
            if choice.finish_reason != "unfinished":
                left -= 1
                if event.finish_reason == "unfinished":
                    self._scheduler.cancel([self.jobs[index]])
            yield choice, items

    def close(self) -> None:
        """Give up what has not ended."""
        unfinished = [
            job
            for job, choice in zip(self.jobs, self.choices, strict=True)
            if choice.finish_reason == "unfinished" and not job.is_over
        ]
        if unfinished:
            self._scheduler.cancel(unfinished)

    def _put(self, index: int, event: Event) -> None:
        self._events.put_nowait((index, event))


async def unless_gone(request: Request, work: Coroutine[object, object, Result]) -> Result | None:
    """The result of `work`, or `None` if the client goes away before; work is cancelled then.

    Raises:
        ApiError: work raised it.
    """
    gone = asyncio.create_task(_until_gone(request))
    task = asyncio.create_task(work)
    try:
        await asyncio.wait((gone, task), return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        gone.cancel()
        task.cancel()


def nobody_reads() -> HttpResponse:
    """The response to a client that has gone; the status is the usual one for that."""
    return HttpResponse(status_code=499)


async def respond(request: Request, answers: Answers, whole: Callable[[Sequence[Choice]], Json]) -> HttpResponse:
    """The whole response, once all answers have ended; they are given up if the client goes away.

    Args:
        request: of the client.
        answers: submitted ones.
        whole: makes the body.
    Raises:
        ApiError: an answer failed.
    """
    try:
        choices = await unless_gone(request, _collect(answers))
    finally:
        answers.close()
    return nobody_reads() if choices is None else JsonResponse(whole(choices))


def stream(events: AsyncIterator[bytes], timeout_s: float) -> HttpResponse:
    """A response of events, which end early if the client goes away or does not read for `timeout_s`."""
    # Here, since it takes long to import.
    from sse_starlette import EventSourceResponse
    from sse_starlette.sse import AppStatus

    # Streams end with their answers; uvicorn's own signal would cut them off.
    AppStatus.enable_automatic_graceful_drain = False
    return EventSourceResponse(events, ping=_PING_S, send_timeout=timeout_s, sep="\n")


async def completion_events(
    answers: Answers, response: Response, form: Format, *, with_usage: bool
) -> AsyncIterator[bytes]:
    """The events of a stream of completions; the answers are given up when the iteration ends early."""
    try:
        for choice in answers.choices:
            opening = form.opening(choice)
            if opening is not None:
                yield event_of(response.piece(opening))
        async for choice, items in answers.tokens():
            for piece in form.pieces(choice, items):
                yield event_of(response.piece(piece))
            if choice.finish_reason != "unfinished":
                yield event_of(response.piece(form.closing(choice)))
        if with_usage:
            yield event_of(response.piece(None, response.usage(answers.choices)))
        yield _END
    except ApiError as error:
        yield event_of(error.to_json())
    finally:
        answers.close()


async def _collect(answers: Answers) -> Sequence[Choice]:
    async for choice, items in answers.tokens():
        choice.items += items
        choice.logprobs += choice.unsent
        choice.unsent.clear()
    return answers.choices


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def event_of(body: Json, name: str | None = None) -> bytes:
    """An event of a stream."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + json.dumps(body, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"
