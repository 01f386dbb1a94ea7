"""The web application: its routes, its errors, and the scheduler's life beside it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from entrollm.serve.answering import JsonResponse, deliver
from entrollm.serve.api import Api, Settings
from entrollm.serve.catalog import Catalog
from entrollm.serve.errors import ApiError
from entrollm.serve.guard import Guard
from entrollm.serve.job import Event, Job
from entrollm.serve.keys import Keys
from entrollm.serve.metrics import Metrics
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
        routes = _routes(self.api)
        guard = Middleware(
            Guard,
            keys=keys,
            max_body_bytes=settings.max_body_bytes,
            local_only=settings.local_only,
            is_stopping=lambda: self.api.is_stopping,
            metrics=metrics,
            routes=routes,
        )
        self.app = Starlette(
            routes=routes,
            middleware=[guard],
            exception_handlers={ApiError: _refused, HTTPException: _not_served, Exception: _broken},
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
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


def _routes(api: Api) -> list[Route]:
    async def describe(request: Request) -> Response:
        from entrollm.serve.describe import describe  # which few ask for

        return JsonResponse(await asyncio.to_thread(describe))

    posts = {
        "/v1/chat/completions": api.chat,
        "/v1/completions": api.complete,
        "/v1/responses": api.respond,
        "/v1/embeddings": api.embed,
        "/tokenize": api.tokenize,
        "/detokenize": api.detokenize,
    }
    gets = {
        "/": api.page,
        "/v1/models": api.models,
        "/v1/models/{name}": api.model,
        "/health": api.health,
        "/metrics": api.metrics,
        "/openapi.json": describe,
    }
    return [
        *(Route(path, handler, methods=["POST"]) for path, handler in posts.items()),
        *(Route(path, handler, methods=["GET"]) for path, handler in gets.items()),
    ]


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JsonResponse(error.to_json(), status_code=error.status, headers=error.headers)


async def _not_served(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {404: "there is nothing at this path", 405: "this path does not take this method"}
    shown = ApiError(error.status_code, messages.get(error.status_code, str(error.detail)))
    return JsonResponse(shown.to_json(), status_code=error.status_code, headers=error.headers)


async def _broken(request: Request, error: Exception) -> Response:
    _LOG.error("a request failed", exc_info=error)
    return JsonResponse(ApiError(500, "the server failed; its log has the reason").to_json(), status_code=500)
