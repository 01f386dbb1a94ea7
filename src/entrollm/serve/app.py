"""The web application: its routes, its errors, and the scheduler's life beside it."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from entrollm.serve.answering import JsonResponse, deliver
from entrollm.serve.api import Api, Settings
from entrollm.serve.chat_fields import ChatRequest
from entrollm.serve.errors import ApiError
from entrollm.serve.fields import CompletionRequest, DetokenizeRequest, TokenizeRequest
from entrollm.serve.guard import Guard
from entrollm.serve.job import Event, Job
from entrollm.serve.keys import Keys
from entrollm.serve.metrics import Metrics
from entrollm.serve.scheduler import Scheduler
from entrollm.serve.served import ServedModel

_LOG = logging.getLogger(__name__)


class Service:
    """The server without its socket.

    Attributes:
        app: the web application.
        api: its endpoints.
        scheduler: runs the models while the application runs.

    Args:
        models: at least one, with different names, each with a tokenizer.
        settings: how it behaves.
        keys: the keys that clients may use, `None` to ask for none.
    """

    def __init__(self, models: Sequence[ServedModel], settings: Settings, keys: Keys | None = None) -> None:
        metrics = Metrics()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.scheduler = Scheduler(models, settings.queue_length, self._post, metrics)
        self.api = Api(models, settings, self.scheduler, metrics)
        self.app = FastAPI(
            title="EntroLLM",
            version=importlib.metadata.version("entrollm"),
            docs_url=None,  # these pages load scripts from elsewhere
            redoc_url=None,
            lifespan=self._lifespan,
        )
        _add_routes(self.app, self.api)
        _add_error_handlers(self.app)
        self.app.add_middleware(
            Guard,
            keys=keys,
            max_body_bytes=settings.max_body_bytes,
            local_only=settings.local_only,
            is_stopping=lambda: self.api.is_stopping,
            metrics=metrics,
        )

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self._loop = asyncio.get_running_loop()
        self.scheduler.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self.scheduler.stop)

    def _post(self, events: Sequence[tuple[Job, Event]]) -> None:
        """Carry the scheduler's events from its thread to that of the event loop."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(deliver, events)


def _add_routes(app: FastAPI, api: Api) -> None:
    posts = (
        ("/v1/chat/completions", api.chat, ChatRequest),
        ("/v1/completions", api.complete, CompletionRequest),
        ("/tokenize", api.tokenize, TokenizeRequest),
        ("/detokenize", api.detokenize, DetokenizeRequest),
    )
    for path, handler, body in posts:
        app.add_api_route(path, handler, methods=["POST"], openapi_extra=_body_schema(body))
    gets = (
        ("/", api.page),
        ("/v1/models", api.models),
        ("/v1/models/{name}", api.model),
        ("/health", api.health),
        ("/metrics", api.metrics),
    )
    for path, getter in gets:
        app.add_api_route(path, getter, methods=["GET"])


def _body_schema(kind: type[BaseModel]) -> dict[str, object]:
    """What the OpenAPI description says of a body that the handler reads itself."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": kind.model_json_schema()}}}}


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return JsonResponse(error.to_json(), status_code=error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def not_served(request: Request, error: HTTPException) -> Response:
        messages = {404: "there is nothing at this path", 405: "this path does not take this method"}
        shown = ApiError(error.status_code, messages.get(error.status_code, str(error.detail)))
        return JsonResponse(shown.to_json(), status_code=error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        _LOG.error("a request failed", exc_info=error)
        return JsonResponse(ApiError(500, "the server failed; its log has the reason").to_json(), status_code=500)
