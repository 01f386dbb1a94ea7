"""The endpoints."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from entrollm.errors import EntroLLMError
from entrollm.serve import answers as formats
from entrollm.serve.answering import Answers, JsonResponse, respond, stream
from entrollm.serve.errors import ApiError, bad_request
from entrollm.serve.fields import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Sampling,
    TokenizeRequest,
    check_chat,
    check_tools,
    parse,
)
from entrollm.serve.grammar import Grammars, TokenGrammar
from entrollm.serve.job import Job, ServedModel
from entrollm.serve.metrics import Metrics
from entrollm.serve.page import page
from entrollm.serve.scheduler import Scheduler
from entrollm.serve.token_text import TokenText
from entrollm.serve.tool_calls import OPEN, ToolCallFinder, call_grammar

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
    is_chat: bool = False
    grammar: TokenGrammar | None = None


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
        self._token_texts = {
            served.name: TokenText(served.model.tokenizer) for served in models if served.model.tokenizer is not None
        }
        self._grammars = {
            served.name: Grammars(served.model.tokenizer, served.model.config.vocab_size, served.model.end_token_ids)
            for served in models
            if served.model.tokenizer is not None
        }
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
            if "tools" not in (template := served.model.chat_template or "") or OPEN not in template:
                raise bad_request(f"the chat template of {served.name} has no tools of the form {OPEN}", "tools")
            variables["tools"] = [tool.model_dump(exclude_none=True) for tool in body.tools or []]
        ids = await _in_thread(lambda: served.model.encode_chat(messages, **variables), "messages")
        grammar = await _in_thread(lambda: self._grammar(served, body), "response_format")
        jobs = self._jobs(request, _Ask(served, body, ids, body.listed_logprobs, is_chat=True, grammar=grammar))
        names = [function.name for function in body.offered]
        return await self._answer(request, body, jobs, formats.Chat(self._token_texts[served.name]), names)

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
        return await self._answer(request, body, jobs, formats.Completion(self._token_texts[served.name]))

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
        tokenizer, vocab_size = served.model.tokenizer, served.model.config.vocab_size
        wrong = next((token for token in body.tokens if token >= vocab_size), None)
        if wrong is not None or tokenizer is None:
            raise bad_request(f"token id {wrong} is outside the vocabulary of {vocab_size}", "tokens")
        return JsonResponse({"prompt": tokenizer.decode(body.tokens, skip_special_tokens=False)})

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

    def _grammar(self, served: ServedModel, body: ChatRequest) -> TokenGrammar | None:
        """What the answer must look like, if the request says so."""
        grammars = self._grammars[served.name]
        schema = None if body.response_format is None else body.response_format.schema_of_answer
        if schema is not None:
            return grammars.json_schema(schema, "response_format")
        if not body.required:
            return None
        functions = {function.name: function.parameters or {"type": "object"} for function in body.required}
        return grammars.lark(call_grammar(functions, several=body.parallel_tool_calls is not False), "tools")

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
                    **ask.body.keywords(choice, room if ask.is_chat else _COMPLETION_TOKENS),
                )
            except (TypeError, ValueError) as error:
                raise bad_request(str(error)) from None
            if ask.grammar is not None:
                answer.constrain(ask.grammar.copy())
            job = Job(request.state.client, served, ids, answer, lambda _: None, deadline_s, ask.logprobs)
            job.after = jobs[0] if jobs else None
            jobs.append(job)
        return jobs

    async def _answer(
        self, request: Request, body: Sampling, jobs: list[Job], form: formats.Format, functions: Sequence[str] = ()
    ) -> Response:
        """The response; calls of `functions` are found in the answers."""
        if len(jobs) > self._settings.queue_length:
            raise bad_request(f"a request may ask for {self._settings.queue_length} answers, found {len(jobs)}", "n")
        if body.stream_options and not body.stream:
            raise bad_request("stream_options needs stream: true", "stream_options")
        answers = Answers(self._scheduler, jobs)
        if functions:
            for each in answers.choices:
                each.finder = ToolCallFinder(functions)
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
