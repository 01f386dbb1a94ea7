"""The endpoints."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from entrollm.checkpoint.panics import decode
from entrollm.serve import answers as formats
from entrollm.serve.answering import (
    Answers,
    JsonResponse,
    completion_events,
    nobody_reads,
    respond,
    stream,
    unless_gone,
)
from entrollm.serve.asking import Asker, Prompted, answer_jobs, in_thread, reading_job
from entrollm.serve.catalog import Catalog, Entry
from entrollm.serve.chat_fields import ChatRequest, check_chat
from entrollm.serve.dialogue import dialogue_answers
from entrollm.serve.echo import Echo, PromptLogprobs
from entrollm.serve.embedding import Pooled, encoded, read_all
from entrollm.serve.errors import bad_request
from entrollm.serve.fields import (
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    Sampling,
    TokenizeRequest,
    parse,
)
from entrollm.serve.forms import guided_form
from entrollm.serve.job import Job
from entrollm.serve.metrics import Metrics
from entrollm.serve.page import page
from entrollm.serve.responses import ResponsesFormat
from entrollm.serve.responses_fields import ResponsesRequest
from entrollm.serve.scheduler import Scheduler


@dataclass(frozen=True)
class Settings:
    """How the server behaves.

    Attributes:
        queue_length: answers that may wait for a slot.
        timeout_s: seconds from the arrival of a request until its answers are given up.
        max_body_bytes: longer bodies are refused.
        local_only: answer only requests whose Host header names this machine.
    """

    queue_length: int = 64
    timeout_s: float = 600.0
    max_body_bytes: int = 8 << 20
    local_only: bool = True


class Api:
    """What the server answers.

    Args:
        catalog: the models.
        settings: how it behaves.
        scheduler: runs the models.
        metrics: what is counted.
    """

    def __init__(self, catalog: Catalog, settings: Settings, scheduler: Scheduler, metrics: Metrics) -> None:
        self._catalog = catalog
        self._settings = settings
        self._scheduler = scheduler
        self._metrics = metrics
        self._started_s = int(time.time())
        self._page = page()
        self.is_stopping = False

    async def chat(self, request: Request) -> Response:
        """/v1/chat/completions: answer a dialogue."""
        body = parse(ChatRequest, await request.body())
        check_chat(body)
        served = await self._catalog.get(body.model)
        answers = await dialogue_answers(self._scheduler, self._asker(request), served, body)
        return await self._answer(request, body, answers, formats.Chat(served.token_text))

    async def respond(self, request: Request) -> Response:
        """/v1/responses: answer a dialogue, in the other of OpenAI's two shapes."""
        body = parse(ResponsesRequest, await request.body())
        chat = body.to_chat()
        served = await self._catalog.get(body.model)
        answers = await dialogue_answers(self._scheduler, self._asker(request), served, chat)
        form = ResponsesFormat(body, served.name, answers.jobs[0])
        answers.submit()
        if body.stream:
            return stream(form.events(answers), self._settings.timeout_s)
        return await respond(request, answers, form.whole)

    async def complete(self, request: Request) -> Response:
        """/v1/completions: continue one or more texts."""
        body = parse(CompletionRequest, await request.body())
        if body.max_tokens == 0 and not body.echo:
            raise bad_request("max_tokens should be at least 1 without echo", "max_tokens")
        served = await self._catalog.get(body.model)
        if body.echo and body.logprobs is not None and not served.model.gives_prompt_logits:
            raise bad_request(f"{served.name} gives no log-probabilities of a prompt here", "logprobs")
        form = await in_thread(lambda: guided_form(served.grammars, body), "guided")
        jobs: list[Job] = []
        echoes: list[Echo | None] = []
        for prompt in body.prompt:
            ids = (
                prompt if isinstance(prompt, list) else await in_thread(partial(served.model.encode, prompt), "prompt")
            )
            asked = self._continuations(request, Prompted(served, body, ids, body.logprobs, form=form), body)
            jobs += asked
            echo = (
                Echo(
                    prompt
                    if isinstance(prompt, str)
                    else await in_thread(partial(decode, served.tokenizer, ids, skip_special_tokens=True), "prompt")
                )
                if body.echo
                else None
            )
            if echo is not None and body.logprobs is not None:
                asked[0].observe = PromptLogprobs(served.model, ids, body.logprobs, echo)
            echoes += [echo] * len(asked)
        answers = Answers(self._scheduler, jobs)
        for choice, echo in zip(answers.choices, echoes, strict=True):
            choice.echo = echo
        return await self._answer(request, body, answers, formats.Completion(served.token_text))

    async def embed(self, request: Request) -> Response:
        """/v1/embeddings: vectors of one or more texts."""
        body = parse(EmbeddingRequest, await request.body())
        served = await self._catalog.get(body.model)
        size = served.model.shape.hidden_size
        if body.dimensions is not None and body.dimensions > size:
            raise bad_request(f"dimensions should be at most {size} with {served.name}", "dimensions")
        asker = self._asker(request)
        pooled = [Pooled(body.pooling or "mean") for _ in body.input]
        jobs = []
        for text, reader in zip(body.input, pooled, strict=True):
            ids = text if isinstance(text, list) else await in_thread(partial(served.model.encode, text), "input")
            job = reading_job(asker, served, ids, "input")
            job.observe = reader
            jobs.append(job)
        if await unless_gone(request, read_all(self._scheduler, jobs)) is None:
            return nobody_reads()
        encoding = body.encoding_format or "float"
        data = [
            {"object": "embedding", "index": index, "embedding": encoded(reader.vector(body.dimensions), encoding)}
            for index, reader in enumerate(pooled)
        ]
        tokens = sum(len(job.prompt) for job in jobs)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JsonResponse({"object": "list", "data": data, "model": served.name, "usage": usage})

    async def tokenize(self, request: Request) -> Response:
        """/tokenize: the token ids of a text."""
        body = parse(TokenizeRequest, await request.body())
        served = await self._catalog.get(body.model)
        ids = await in_thread(
            lambda: served.model.encode(body.prompt, add_special_tokens=body.add_special_tokens), "prompt"
        )
        return JsonResponse({"tokens": ids, "count": len(ids), "max_model_len": served.context_length})

    async def detokenize(self, request: Request) -> Response:
        """/detokenize: the text of token ids."""
        body = parse(DetokenizeRequest, await request.body())
        served = await self._catalog.get(body.model)
        vocab_size = served.model.shape.vocab_size
        wrong = next((token for token in body.tokens if token >= vocab_size), None)
        if wrong is not None:
            raise bad_request(f"token id {wrong} is outside the vocabulary of {vocab_size}", "tokens")
        text = await in_thread(partial(decode, served.tokenizer, body.tokens, skip_special_tokens=False), "tokens")
        return JsonResponse({"prompt": text})

    async def page(self, request: Request) -> Response:
        """/: the chat page."""
        return self._page

    async def models(self, request: Request) -> Response:
        """/v1/models: the models that are served."""
        return JsonResponse({"object": "list", "data": [self._describe(entry) for entry in self._catalog.entries]})

    async def model(self, request: Request) -> Response:
        """/v1/models/NAME: one of them."""
        return JsonResponse(self._describe(self._catalog.find(request.path_params["name"])))

    async def health(self, request: Request) -> Response:
        """/health: whether new requests are answered."""
        status = "stopping" if self.is_stopping else "ok"
        body = {"status": status, "running": self._scheduler.running, "waiting": self._scheduler.waiting}
        return JsonResponse(body, status_code=503 if self.is_stopping else 200)

    async def metrics(self, request: Request) -> Response:
        """/metrics: counters in Prometheus' text format."""
        gauges = {"running": self._scheduler.running, "waiting": self._scheduler.waiting}
        return PlainTextResponse(self._metrics.render(gauges), media_type="text/plain; version=0.0.4")

    def _describe(self, entry: Entry) -> dict[str, object]:
        return {
            "id": entry.name,
            "object": "model",
            "created": self._started_s,
            "owned_by": "entrollm",
            "context_length": entry.context_length,
            "chat": entry.has_chat_template,
            "loaded": entry.served is not None,
        }

    def _asker(self, request: Request) -> Asker:
        return Asker(request.state.client, time.monotonic() + self._settings.timeout_s)

    def _continuations(self, request: Request, prompted: Prompted, body: CompletionRequest) -> list[Job]:
        """The jobs of a prompt; those of an echo alone only read it."""
        if body.max_tokens != 0:
            return answer_jobs(self._asker(request), prompted)
        jobs = [reading_job(self._asker(request), prompted.served, prompted.ids, "prompt") for _ in range(body.choices)]
        for job in jobs[1:]:
            job.after = jobs[0]
        return jobs

    async def _answer(self, request: Request, body: Sampling, answers: Answers, form: formats.Format) -> Response:
        """The response of a completion."""
        jobs = answers.jobs
        if len(jobs) > self._settings.queue_length:
            raise bad_request(f"a request may ask for {self._settings.queue_length} answers, found {len(jobs)}", "n")
        if body.stream_options and not body.stream:
            raise bad_request("stream_options needs stream: true", "stream_options")
        response = formats.Response(form, jobs[0].served.name, jobs, body.choices)
        answers.submit()
        if body.stream:
            events = completion_events(answers, response, form, with_usage=body.includes_usage)
            return stream(events, self._settings.timeout_s)
        return await respond(request, answers, response.whole)
