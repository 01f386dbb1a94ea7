"""The web application: its routes, its errors, and the scheduler's life beside it."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from entrollm.serve.answering import JsonResponse, deliver
from entrollm.serve.answers import Json
from entrollm.serve.api import Api, Settings
from entrollm.serve.catalog import Catalog
from entrollm.serve.chat_fields import ChatRequest
from entrollm.serve.errors import ApiError
from entrollm.serve.fields import CompletionRequest, DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from entrollm.serve.guard import Guard
from entrollm.serve.job import Event, Job
from entrollm.serve.keys import Keys
from entrollm.serve.metrics import Metrics
from entrollm.serve.responses_fields import ResponsesRequest
from entrollm.serve.scheduler import Scheduler
from entrollm.serve.trim import keep_trimming

_LOG = logging.getLogger(__name__)


class Service:
    """The server without its socket.

    Attributes:
        app: the web application.
        api: its endpoints.
        scheduler: runs the models while the application runs.

    Args:
        catalog: the models.
        settings: how it behaves.
        keys: the keys that clients may use, `None` to ask for none.
    """

    def __init__(self, catalog: Catalog, settings: Settings, keys: Keys | None = None) -> None:
        metrics = Metrics()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.scheduler = Scheduler(settings.queue_length, self._post, metrics)
        self.api = Api(catalog, settings, self.scheduler, metrics)
        self._catalog = catalog
        self._metrics = metrics
        self.app = FastAPI(
            title="EntroLLM",
            version=importlib.metadata.version("entrollm"),
            docs_url=None,  # these pages load scripts from elsewhere
            redoc_url=None,
            lifespan=self._lifespan,
        )
        _add_routes(self.app, self.api)
        self.app.openapi = partial(_describe, self.app)  # type: ignore[method-assign]
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
        keeping = [
            asyncio.create_task(self._catalog.keep_releasing(self.scheduler.runs)),
            asyncio.create_task(keep_trimming(self._metrics.requests.total, lambda: self.scheduler.is_idle)),
        ]
        try:
            yield
        finally:
            for task in keeping:
                task.cancel()
            await asyncio.to_thread(self.scheduler.stop)

    def _post(self, events: Sequence[tuple[Job, Event]]) -> None:
        """Carry the scheduler's events from its thread to that of the event loop."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(deliver, events)


_BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
_SCHEMAS = "#/components/schemas/"
_ERROR_SCHEMA: Json = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def _add_routes(app: FastAPI, api: Api) -> None:
    posts = {
        "/v1/chat/completions": api.chat,
        "/v1/completions": api.complete,
        "/v1/responses": api.respond,
        "/v1/embeddings": api.embed,
        "/tokenize": api.tokenize,
        "/detokenize": api.detokenize,
    }
    for path, handler in posts.items():
        app.add_api_route(path, handler, methods=["POST"])
    gets = (
        ("/", api.page),
        ("/v1/models", api.models),
        ("/v1/models/{name}", api.model),
        ("/health", api.health),
        ("/metrics", api.metrics),
    )
    for path, getter in gets:
        app.add_api_route(path, getter, methods=["GET"])


def _describe(app: FastAPI) -> Json:
    """The OpenAPI description, with the bodies that the handlers read themselves and the errors of all paths."""
    if app.openapi_schema is None:
        described = get_openapi(title=app.title, version=app.version, routes=app.routes)
        references, definitions = models_json_schema(
            [(kind, "validation") for kind in _BODIES.values()], ref_template=_SCHEMAS + "{model}"
        )
        schemas = {**definitions.get("$defs", {}), "Error": _ERROR_SCHEMA}
        described["components"] = {"schemas": schemas}
        failed = {"description": "Error", "content": {"application/json": {"schema": {"$ref": f"{_SCHEMAS}Error"}}}}
        for path, operations in described["paths"].items():
            for operation in operations.values():
                operation["responses"] = {"200": {"description": "Answer"}, "4XX": failed, "5XX": failed}
                if path in _BODIES:
                    schema = references[_BODIES[path], "validation"]
                    operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        app.openapi_schema = described
    return app.openapi_schema


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
