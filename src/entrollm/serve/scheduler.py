"""The thread that runs the models: which sequences go into the next step, and what comes out of it."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from entrollm.engine.batch import SequenceStep
from entrollm.engine.sampling import token_logprobs
from entrollm.engine.weights import Floats
from entrollm.errors import FormatError
from entrollm.serve.engines import Guesses
from entrollm.serve.errors import ApiError
from entrollm.serve.fair_queue import FairQueue, QueueFullError
from entrollm.serve.grammar import GrammarError
from entrollm.serve.job import Event, Job, NewToken, Observe, PromptRead
from entrollm.serve.metrics import Metrics
from entrollm.serve.served import ServedModel

_LOG = logging.getLogger(__name__)
_MAX_RETRY_AFTER_S = 120

# Hands events to their sinks, on whatever thread the sinks live.
Post = Callable[[Sequence[tuple[Job, Event]]], None]


class Scheduler:
    """Generates many answers at once: each step of a model takes the next tokens of all its running sequences.

    Models take steps in turn, in the order in which the first of their running answers began.

    Prompts are read in pieces beside the running streams, as many tokens at a time as `Pace` allows. An answer
    that runs alone on a model that guesses makes several tokens in a step.

    Args:
        queue_length: answers that may wait for a slot.
        post: is called with the events of a step.
        metrics: where to count.
    """

    def __init__(self, queue_length: int, post: Post, metrics: Metrics) -> None:
        self._queue: FairQueue[Job] = FairQueue(queue_length)
        self._post = post
        self._metrics = metrics
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._must_end = False
        self._arrivals: dict[Job, float] = {}
        self._mean_answer_s = 5.0
        self._thread = threading.Thread(target=self._run, name="entrollm-scheduler", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def end(self) -> None:
        """Let the thread end after its current step; answers that are not finished fail."""
        with self._changed:
            self._must_end = True
            self._changed.notify()

    def stop(self) -> None:
        """End the thread and wait for it."""
        self.end()
        self._thread.join()

    @property
    def waiting(self) -> int:
        """Answers that wait for a slot."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Answers that have a slot."""
        return len(self._running)

    def runs(self, served: ServedModel) -> bool:
        """Whether an answer of this model waits or runs."""
        with self._changed:
            return any(job.served is served for job in self._arrivals)

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits or runs."""
        with self._changed:
            return not (self._queue or self._running)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Let jobs of one client wait for slots.

        Raises:
            ApiError: the queue is full, or the scheduler has ended.
        """
        with self._changed:
            if self._must_end:
                raise _stopping()
            try:
                self._queue.add(jobs[0].client, jobs)
            except QueueFullError:
                raise ApiError(
                    429,
                    f"{len(self._queue)} answers wait already; try again later",
                    code="queue_full",
                    retry_after_s=self._retry_after_s(),
                ) from None
            now = time.monotonic()
            self._arrivals.update((job, now) for job in jobs)
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Give up jobs for which nobody waits; they report nothing more."""
        with self._changed:
            for job in jobs:
                job.is_cancelled = True
            self._changed.notify()

    def _retry_after_s(self) -> int:
        slots = len(self._running) or 1
        return max(1, min(_MAX_RETRY_AFTER_S, math.ceil(len(self._queue) * self._mean_answer_s / slots)))

    def _run(self) -> None:
        while self._turn():
            pass
        with self._changed:
            left = [*self._running, *self._queue.remove(lambda _: True)]
            events = [(job, _stopping()) for job in left if not job.is_cancelled]
            for job in left:
                self._end(job)
        if events:
            self._post(events)

    def _turn(self) -> bool:
        """Let each model that runs take a step, and say whether to go on; nothing of a turn outlives it."""
        with self._changed:
            self._changed.wait_for(lambda: self._must_end or self._queue or self._running)
            if self._must_end:
                return False
            events = [*self._give_up(), *self._admit()]
        for served in dict.fromkeys(job.served for job in self._running):
            events += self._step(served, [job for job in self._running if job.served is served])
        if events:
            self._post(events)
        return True

    def _give_up(self) -> list[tuple[Job, Event]]:
        """End what was cancelled or has waited too long."""
        now = time.monotonic()
        over = self._queue.remove(lambda job: job.is_cancelled or job.deadline_s <= now)
        over += [job for job in self._running if job.is_cancelled or job.deadline_s <= now]
        events: list[tuple[Job, Event]] = []
        for job in over:
            if job.is_cancelled:
                self._metrics.cancelled += 1
            else:
                self._metrics.expired += 1
                has_begun = job.slot is not None
                message = "the answer took too long" if has_begun else "no slot became free in time; try again later"
                status, retry_s = (504, None) if has_begun else (503, self._retry_after_s())
                events.append((job, ApiError(status, message, code="timeout", retry_after_s=retry_s)))
            self._end(job)
        return events

    def _admit(self) -> list[tuple[Job, Event]]:
        """Give slots to those who wait, and end those whose slot cannot be had, such as for want of memory."""
        events: list[tuple[Job, Event]] = []

        def fits(job: Job) -> bool:
            is_first = job.after is None or job.after.has_read_prompt or job.after.is_over
            return is_first and job.served.slots.has_room

        while (job := self._queue.take(fits)) is not None:
            slots, reused = job.served.slots, 0
            try:
                if job.observe is None:
                    job.slot, reused = slots.take(job.prompt)
                else:
                    job.slot = slots.take_empty()
            except Exception as error:
                _LOG.exception("no slot of %s can be had", job.served.name)
                events.append((job, self._fail(job, f"the model failed: {error}")))
                continue
            job.pending, job.reused_tokens = job.prompt[reused:], reused
            self._running.append(job)
            self._metrics.prompt_tokens += len(job.prompt)
            self._metrics.reused_prompt_tokens += reused
        return events

    def _step(self, served: ServedModel, jobs: Sequence[Job]) -> list[tuple[Job, Event]]:
        """Run the next tokens of the jobs, which are all that run on this model."""
        streams = [job for job in jobs if job.has_read_prompt]
        if served.guesses is not None and len(jobs) == len(streams) == 1 and jobs[0].logprobs is None:
            return self._step_by_guesses(served.guesses, jobs[0])
        room = served.pace.prompt_tokens(len(streams))
        taken: list[tuple[Job, int]] = [(job, len(job.pending)) for job in streams]
        prompt_tokens = 0
        for job in jobs:
            if not job.has_read_prompt and prompt_tokens < room:
                count = len(job.pending)
                if served.model.reads_pieces:
                    count = min(count, room - prompt_tokens)
                taken.append((job, count))
                prompt_tokens += count
        steps = []
        failed: dict[Job, str] = {}
        for job, count in taken:
            assert job.slot is not None
            ids = np.array(job.pending[:count], dtype=np.int64)
            is_last = count == len(job.pending)
            observe = None
            if job.observe is not None and not job.has_read_prompt:
                observe = partial(_observe, job, job.observe, failed)
            steps.append(SequenceStep(ids, job.slot.cache, is_last and job.answer is not None, observe))
        started = time.perf_counter()
        try:
            rows = iter(served.model.step(steps))
        except Exception as error:
            # Whatever went wrong, those who wait must hear of it, and the other sequences go on.
            _LOG.exception("a step of %s failed", served.name)
            return [(job, self._fail(job, f"the model failed: {error}", keep=False)) for job, _ in taken]
        events: list[tuple[Job, Event]] = []
        for (job, count), step in zip(taken, steps, strict=True):
            row = next(rows) if step.needs_logits else None
            if job in failed:
                events.append((job, self._fail(job, failed[job])))
                continue
            job.pending = job.pending[count:]
            if job.pending:
                continue
            job.has_read_prompt = True
            if row is not None:
                events.append((job, self._push(job, row)))
            else:
                self._end(job)
                events.append((job, PromptRead()))
        elapsed_s = time.perf_counter() - started
        served.pace.record(len(streams), prompt_tokens, elapsed_s)
        self._metrics.steps += 1
        self._metrics.step_s += elapsed_s
        return events

    def _step_by_guesses(self, guesses: Guesses, job: Job) -> list[tuple[Job, Event]]:
        """Make the next tokens of an answer that runs alone."""
        assert job.slot is not None and job.answer is not None
        started = time.perf_counter()
        try:
            if job.speculation is None:
                job.speculation = guesses(job.slot.cache, job.pending)
            speculation = job.speculation
            speculation.follow(job.pending)
            guessed, right = speculation.guessed, speculation.right
            made = speculation.step(job.answer)
        except GrammarError as error:
            return [(job, self._fail_grammar(job, error, keep=False))]
        except Exception as error:
            _LOG.exception("a step of %s failed", job.served.name)
            return [(job, self._fail(job, f"the model failed: {error}", keep=False))]
        job.pending = speculation.pending
        metrics, reason = self._metrics, job.answer.finish_reason
        metrics.guessed_tokens += speculation.guessed - guessed
        metrics.right_tokens += speculation.right - right
        metrics.generated_tokens += len(made)
        metrics.steps += 1
        metrics.step_s += time.perf_counter() - started
        if reason != "unfinished":
            self._end(job)
        (*first, last) = made
        events: list[tuple[Job, Event]] = [(job, NewToken(token, text, "unfinished", None)) for token, text in first]
        return [*events, (job, NewToken(*last, reason, None))]

    def _push(self, job: Job, logits: Floats) -> Event:
        """Choose the job's next token."""
        assert job.answer is not None
        try:
            token, text = job.answer.push(logits)
        except GrammarError as error:
            return self._fail_grammar(job, error)
        except (FormatError, ValueError) as error:
            return self._fail(job, str(error))
        job.pending = (token,)
        self._metrics.generated_tokens += 1
        if job.answer.tokens == 1:
            self._metrics.record_first_token(time.monotonic() - self._arrivals[job])
        logprobs = None if job.logprobs is None else token_logprobs(logits, token, job.logprobs)
        reason = job.answer.finish_reason
        if reason != "unfinished":
            self._end(job)
        return NewToken(token, text, reason, logprobs)

    def _fail(self, job: Job, message: str, *, keep: bool = True) -> ApiError:
        self._metrics.failed += 1
        self._end(job, keep=keep)
        return ApiError(500, message, code="model_failed")

    def _fail_grammar(self, job: Job, error: GrammarError, *, keep: bool = True) -> ApiError:
        self._fail(job, str(error), keep=keep)
        return ApiError(400, str(error), code="grammar_failed")

    def _end(self, job: Job, *, keep: bool = True) -> None:
        job.is_over = True
        job.speculation = None
        arrival_s = self._arrivals.pop(job)
        if job.slot is not None:
            self._mean_answer_s += 0.2 * (time.monotonic() - arrival_s - self._mean_answer_s)
            # A prompt that was only read is nobody's beginning.
            job.served.slots.give_back(job.slot, keep=keep and job.answer is not None)
            job.slot = None
            self._running.remove(job)


def _observe(job: Job, observe: Observe, failed: dict[Job, str], start: int, hidden: Floats) -> None:
    """Show a job its hidden states; what it finds wrong with them ends this job alone, and not the whole step."""
    try:
        observe(start, hidden)
    except FormatError as error:
        failed[job] = str(error)


def _stopping() -> ApiError:
    return ApiError(503, "the server is stopping", code="stopping")
