"""The endpoints."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from entrollm.errors import EntroLLMError
from entrollm.serve import answers as formats
from entrollm.serve.answering import Answers, JsonResponse, respond, stream
from entrollm.serve.chat_fields import ChatRequest, check_chat, check_tools
from entrollm.serve.errors import ApiError, bad_request
from entrollm.serve.fields import CompletionRequest, DetokenizeRequest, Sampling, TokenizeRequest, parse
from entrollm.serve.grammar import AnswerForm
from entrollm.serve.job import Job
from entrollm.serve.metrics import Metrics
from entrollm.serve.output.harmony import Harmony
from entrollm.serve.page import page
from entrollm.serve.scheduler import Scheduler
from entrollm.serve.served import ServedModel

# What /v1/completions of OpenAI takes.
_COMPLETION_TOKENS = 16

Result = TypeVar("Result")


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


@dataclass(frozen=True)
class _Ask:
    """A prompt and what is asked about it."""

    served: ServedModel
    body: Sampling
    ids: Sequence[int]
    logprobs: int | None
    shown_tokens: Collection[int] = ()
    form: AnswerForm | None = None
    is_chat: bool = False


class Api:
    """What the server answers.

    Args:
        models: at least one, each with a tokenizer.
        settings: how it behaves.
        scheduler: runs the models.
        metrics: what is counted.
    """

    def __init__(
        self, models: Sequence[ServedModel], settings: Settings, scheduler: Scheduler, metrics: Metrics
    ) -> None:
        self._models = {served.name: served for served in models}
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
        served = self._served(body.model)
        if not served.model.has_chat_template:
            raise bad_request(f"the model {served.name} has no chat template; use /v1/completions", "model")
        check_tools(body)
        messages = [message.to_template() for message in body.messages]
        variables = dict(body.chat_template_kwargs or {})
        if body.offered:
            if served.output.calls is None:
                raise bad_request(
                    f"the chat template of {served.name} writes no calls of tools that are known here; if you know how "
                    "the model writes them, start the server with --tool-format",
                    "tools",
                )
            variables["tools"] = [tool.model_dump(exclude_none=True) for tool in body.tools or []]
        ids = await _in_thread(lambda: served.model.encode_chat(messages, **variables), "messages")
        form = await _in_thread(lambda: self._form(served, body, ids), "response_format")
        names = [function.name for function in body.offered]
        shown = served.shown_tokens(with_calls=bool(names))
        jobs = self._jobs(request, _Ask(served, body, ids, body.listed_logprobs, shown, form, is_chat=True))
        answers = Answers(self._scheduler, jobs)
        for choice in answers.choices:
            choice.parser = served.output.parser(names, is_open=served.begins_in_reasoning(ids))
            choice.most_calls = 1 if body.parallel_tool_calls is False else None
        return await self._answer(request, body, answers, formats.Chat(served.token_text))

    async def complete(self, request: Request) -> Response:
        """/v1/completions: continue one or more texts."""
        body = parse(CompletionRequest, await request.body())
        served = self._served(body.model)
        jobs: list[Job] = []
        for prompt in body.prompt:
            ids = (
                prompt if isinstance(prompt, list) else await _in_thread(partial(served.model.encode, prompt), "prompt")
            )
            jobs += self._jobs(request, _Ask(served, body, ids, body.logprobs))
        return await self._answer(request, body, Answers(self._scheduler, jobs), formats.Completion(served.token_text))

    async def tokenize(self, request: Request) -> Response:
        """/tokenize: the token ids of a text."""
        body = parse(TokenizeRequest, await request.body())
        served = self._served(body.model)
        ids = await _in_thread(
            lambda: served.model.encode(body.prompt, add_special_tokens=body.add_special_tokens), "prompt"
        )
        return JsonResponse({"tokens": ids, "count": len(ids), "max_model_len": served.context_length})

    async def detokenize(self, request: Request) -> Response:
        """/detokenize: the text of token ids."""
        body = parse(DetokenizeRequest, await request.body())
        served = self._served(body.model)
        vocab_size = served.model.config.vocab_size
        wrong = next((token for token in body.tokens if token >= vocab_size), None)
        if wrong is not None:
            raise bad_request(f"token id {wrong} is outside the vocabulary of {vocab_size}", "tokens")
        return JsonResponse({"prompt": served.tokenizer.decode(body.tokens, skip_special_tokens=False)})

    async def page(self) -> Response:
        """/: the chat page."""
        return self._page

    async def models(self) -> Response:
        """/v1/models: the models that are served."""
        return JsonResponse({"object": "list", "data": [self._describe(served) for served in self._models.values()]})

    async def model(self, name: str) -> Response:
        """/v1/models/NAME: one of them."""
        return JsonResponse(self._describe(self._served(name)))

    async def health(self) -> Response:
        """/health: whether new requests are answered."""
        status = "stopping" if self.is_stopping else "ok"
        body = {"status": status, "running": self._scheduler.running, "waiting": self._scheduler.waiting}
        return JsonResponse(body, status_code=503 if self.is_stopping else 200)

    async def metrics(self) -> Response:
        """/metrics: counters in Prometheus' text format."""
        gauges = {"running": self._scheduler.running, "waiting": self._scheduler.waiting}
        return PlainTextResponse(self._metrics.render(gauges), media_type="text/plain; version=0.0.4")

    def _served(self, name: str | None) -> ServedModel:
        if name is None and len(self._models) == 1:
            return next(iter(self._models.values()))
        if name is None:
            raise bad_request(f"name one of the models: {', '.join(self._models)}", "model")
        if name not in self._models:
            message = f"there is no model {name[:80]!r} here, only {', '.join(self._models)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return self._models[name]

    def _describe(self, served: ServedModel) -> dict[str, object]:
        return {
            "id": served.name,
            "object": "model",
            "created": self._started_s,
            "owned_by": "entrollm",
            "context_length": served.context_length,
            "chat": served.model.has_chat_template,
        }

    def _form(self, served: ServedModel, body: ChatRequest, prompt: Sequence[int]) -> AnswerForm | None:
        """What the answer must look like, if the request says so."""
        schema = None if body.response_format is None else body.response_format.schema_of_answer
        if schema is not None:
            return served.after_reasoning(served.grammars.json_schema(schema, "response_format"), prompt)
        if not body.required:
            return None
        functions = {function.name: function.parameters or {"type": "object"} for function in body.required}
        grammar = served.call_grammar(functions, several=body.parallel_tool_calls is not False)
        # The grammar of harmony has room for reasoning.
        return grammar if isinstance(served.output.calls, Harmony) else served.after_reasoning(grammar, prompt)

    def _jobs(self, request: Request, ask: _Ask) -> list[Job]:
        """One job for each choice to a prompt."""
        served, ids = ask.served, ask.ids
        room = served.context_length - len(ids)
        if room < 1:
            raise bad_request(
                f"the prompt has {len(ids)} tokens and leaves no room for an answer in a context of "
                f"{served.context_length}; shorten it",
                "messages" if ask.is_chat else "prompt",
                "context_length_exceeded",
            )
        deadline_s = time.monotonic() + self._settings.timeout_s
        jobs: list[Job] = []
        for choice in range(ask.body.choices):
            try:
                answer = served.model.new_answer(
                    ids,
                    continues_text=not ask.is_chat,
                    context_length=served.context_length,
                    shown_tokens=ask.shown_tokens,
                    **ask.body.keywords(choice, room if ask.is_chat else _COMPLETION_TOKENS),
                )
            except (TypeError, ValueError) as error:
                raise bad_request(str(error)) from None
            if ask.form is not None:
                answer.constrain(ask.form.copy())
            job = Job(request.state.client, served, ids, answer, lambda _: None, deadline_s, ask.logprobs)
            job.after = jobs[0] if jobs else None
            jobs.append(job)
        return jobs

    async def _answer(self, request: Request, body: Sampling, answers: Answers, form: formats.Format) -> Response:
        """The response."""
        jobs = answers.jobs
        if len(jobs) > self._settings.queue_length:
            raise bad_request(f"a request may ask for {self._settings.queue_length} answers, found {len(jobs)}", "n")
        if body.stream_options and not body.stream:
            raise bad_request("stream_options needs stream: true", "stream_options")
        answers.submit()
        response = formats.Response(form, jobs[0].served.name, jobs, body.choices)
        if body.stream:
            timeout_s = self._settings.timeout_s
            return stream(answers, response, form, with_usage=body.includes_usage, timeout_s=timeout_s)
        return await respond(request, answers, response)


async def _in_thread(work: Callable[[], Result], field: str) -> Result:
    """Run work that takes time for long texts; what it finds wrong is the fault of `field`."""
    try:
        return await asyncio.to_thread(work)
    except (TypeError, ValueError, EntroLLMError) as error:
        raise bad_request(str(error), field) from None
