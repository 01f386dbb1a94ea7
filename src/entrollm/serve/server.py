"""The process: load models, listen, and stop gracefully."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import uvicorn

from entrollm.checkpoint.resolve import resolve
from entrollm.engine.files import chat_template_of, why_no_tokenizer
from entrollm.errors import UnsupportedError
from entrollm.serve.api import Settings
from entrollm.serve.app import Service
from entrollm.serve.catalog import Catalog, Entry
from entrollm.serve.engines import CpuEngine, Engine
from entrollm.serve.keys import Keys
from entrollm.serve.output.choose import choose
from entrollm.serve.served import ServedModel
from entrollm.serve.slots import Slots
from entrollm.serve.trim import limit_arenas

# Connections beyond these are refused at once.
_MAX_CONNECTIONS = 512
# After the answers have ended, for what is still being sent.
_LAST_BYTES_S = 5


@dataclass(frozen=True)
class LoadOptions:
    """How models are loaded.

    Attributes:
        slots: sequences that each model runs at a time, at least 1.
        context_length: tokens of prompt and answer together; a model's own limit still holds.
        engine: loads and runs them.
        tool_format, reasoning_format: how the models write calls and reasoning; see `choose`.
        idle_release_s: see Catalog.
    """

    slots: int = 8
    context_length: int = 8192
    engine: Engine = field(default_factory=CpuEngine)
    tool_format: str = "auto"
    reasoning_format: str = "auto"
    idle_release_s: float | None = None


def open_models(paths: Sequence[str], options: LoadOptions) -> Catalog:
    """Models under the names of their folders; the first is loaded, and others when they are first asked for.

    Raises:
        ValueError: two have the same name, or as load.
        FormatError: a folder is malformed, or as load.
        UnsupportedError: a model has no tokenizer, or as load.
    """
    names = [Path(path).resolve().name if Path(path).exists() else path.rpartition("/")[2] for path in paths]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two models have the name {twice}; rename one of the folders")
    entries = [_entry(name, resolve(path), options) for path, name in zip(paths, names, strict=True)]
    entries[0].served = entries[0].load()
    return Catalog(entries, options.idle_release_s)


def _entry(name: str, path: Path, options: LoadOptions) -> Entry:
    """What the small files of a model tell before it is loaded."""
    if not (path / "tokenizer.json").is_file():
        raise UnsupportedError(why_no_tokenizer(path, "serving"))
    template = chat_template_of(path)
    context_length = min(options.context_length, options.engine.context_length(path))

    def load_it() -> ServedModel:
        model = options.engine.load(path)
        output = choose(model.chat_template, options.tool_format, options.reasoning_format)
        slots, guesses = Slots(model, options.slots), options.engine.guesses(model)
        return ServedModel(name, model, context_length, slots, output, guesses)

    return Entry(name, context_length, template is not None, load_it)


def serve(
    models: Catalog,
    settings: Settings,
    keys: Keys | None,
    address: tuple[str, int],
    grace_s: float,
    on_listening: Callable[[str], None],
) -> None:
    """Answer requests until SIGTERM or SIGINT; running answers then end first.

    Args:
        models: from open_models.
        settings: how the server behaves.
        keys: the keys that clients may use, `None` to ask for none.
        address: host and port; port 0 takes a free one.
        grace_s: seconds that running answers get after a signal. A second signal ends them at once.
        on_listening: is told the URL.
    Raises:
        OSError: the address cannot be listened on.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    limit_arenas()
    listening = listen(*address)
    service = Service(models, settings, keys)
    config = uvicorn.Config(
        service.app,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=_LAST_BYTES_S,
    )
    host, port = listening.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    server = GracefulServer(config, service, grace_s, lambda: on_listening(url))
    server.run(sockets=[listening])


class GracefulServer(uvicorn.Server):
    """uvicorn, except that a signal lets running answers end while new requests get 503.

    Args:
        config: uvicorn's.
        service: what it serves.
        grace_s: seconds that running answers get.
        on_listening: is called once connections are accepted.
    """

    def __init__(
        self, config: uvicorn.Config, service: Service, grace_s: float, on_listening: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._service = service
        self._grace_s = grace_s
        self._on_listening = on_listening
        self._stop_by_s: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        await super().startup(sockets)
        if self.started:
            self._on_listening()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop; the second signal stops at once."""
        if self._stop_by_s is not None:
            self.should_exit = self.force_exit = True
            return
        self._stop_by_s = time.monotonic() + self._grace_s
        self._service.api.is_stopping = True

    async def on_tick(self, counter: int) -> bool:
        """Tell uvicorn, ten times a second, whether it is over."""
        scheduler = self._service.scheduler
        if self._stop_by_s is not None and (scheduler.is_idle or time.monotonic() >= self._stop_by_s):
            scheduler.end()
            self.should_exit = True
        return await super().on_tick(counter)


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address.

    Raises:
        OSError: it cannot be bound.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
        listening = socket.socket(family, kind)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise OSError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    listening.set_inheritable(True)
    return listening
