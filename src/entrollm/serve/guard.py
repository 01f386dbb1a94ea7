"""What every request passes before it reaches a handler: host, key and size."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
from collections.abc import Callable, Collection

from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from entrollm.serve.errors import ApiError
from entrollm.serve.keys import Keys
from entrollm.serve.metrics import Metrics

# The page asks for a key itself, and probes have none.
_OPEN_PATHS = frozenset({"/", "/health"})
_BODY_TIMEOUT_S = 60.0
# Of a refused body, so much is read and dropped: a connection that closes while a client writes loses the answer.
_MOST_DROPPED_BYTES = 64 << 20
_DROP_TIMEOUT_S = 10.0


class Guard:
    """Refuses requests before they are read.

    Args:
        app: the application behind.
        keys: the keys that clients may use, `None` to ask for none.
        max_body_bytes: longer bodies are refused.
        local_only: refuse names of other hosts in the Host header, as a web page sends them whose own host name was
            made to point here.
        is_stopping: whether new requests are refused.
        metrics: where requests are counted.
        routes: those of the application.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Keys | None,
        max_body_bytes: int,
        local_only: bool,
        is_stopping: Callable[[], bool],
        metrics: Metrics,
        routes: Collection[Route],
    ) -> None:
        self._app = app
        self._keys = keys
        self._max_body_bytes = max_body_bytes
        self._local_only = local_only
        self._is_stopping = is_stopping
        self._metrics = metrics
        self._posts = frozenset(route.path for route in routes if "POST" in (route.methods or ()))
        self._paths: dict[object, str] = {route.endpoint: route.path for route in routes}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection of ASGI."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        has_started = has_whole_body = False

        async def noted() -> Message:
            nonlocal has_whole_body
            message = await receive()
            has_whole_body = not message.get("more_body", False)
            return message

        async def counted(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                self._count(scope, message["status"])
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, await self._bounded(noted) if self._takes_body(scope) else receive, counted)
        except ApiError as error:
            if not has_started:
                if self._takes_body(scope) and not has_whole_body:
                    await _drop_body(scope, receive)
                await _send_error(error, counted)

    def _takes_body(self, scope: Scope) -> bool:
        return scope["method"] == "POST" and scope["path"] in self._posts

    def _count(self, scope: Scope, status: int) -> None:
        # Counted by route, or a stranger could fill the memory with paths.
        path = self._paths.get(scope.get("endpoint"), "other")
        self._metrics.requests[path, status] += 1

    def _check(self, scope: Scope) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if self._local_only and not _is_local(headers.get("host", "")):
            raise ApiError(403, "this server answers on localhost only; start it with --host to change that")
        state = scope.setdefault("state", {})
        state["client"] = (scope.get("client") or ("",))[0]
        if self._keys is not None and scope["path"] not in _OPEN_PATHS:
            owner = self._keys.owner(headers.get("authorization"))
            if owner is None:
                raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
            state["client"] = owner
        if not self._takes_body(scope):
            return
        if self._is_stopping():
            raise ApiError(503, "the server is stopping", code="stopping", retry_after_s=10)
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # Web pages of other origins can send other types without asking.
            raise ApiError(415, "the body should be JSON with the header Content-Type: application/json")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > self._max_body_bytes:
            raise self._too_long()

    def _too_long(self) -> ApiError:
        return ApiError(413, f"the body is longer than {self._max_body_bytes} bytes", code="body_too_long")

    async def _bounded(self, receive: Receive) -> Receive:
        """Read the body, which may come without a length, and pass it on in one piece."""
        body = bytearray()
        try:
            async with asyncio.timeout(_BODY_TIMEOUT_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the client went away before the end of the body")
                    body += message.get("body", b"")
                    if len(body) > self._max_body_bytes:
                        raise self._too_long()
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise ApiError(408, "the body did not arrive in time") from None
        first: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replayed() -> Message:
            return first.pop() if first else await receive()

        return replayed


async def _drop_body(scope: Scope, receive: Receive) -> None:
    """Read the rest of a refused body, unless it is longer than what is dropped."""
    headers = dict(scope["headers"])
    length = headers.get(b"content-length", b"0")
    if not length.isdigit() or int(length[:20]) > _MOST_DROPPED_BYTES or b"expect" in headers:
        return
    dropped = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DROP_TIMEOUT_S):
            while dropped <= _MOST_DROPPED_BYTES:
                message = await receive()
                dropped += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


def _is_local(host: str) -> bool:
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


async def _send_error(error: ApiError, send: Send) -> None:
    body = json.dumps(error.to_json()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    # The rest of a refused body may not have been read.
    headers["connection"] = "close"
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
