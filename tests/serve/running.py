"""A server in a thread of the test process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import uvicorn

from entrollm.serve.api import Settings
from entrollm.serve.app import Service
from entrollm.serve.catalog import Catalog
from entrollm.serve.keys import Keys
from entrollm.serve.server import GracefulServer, listen


class Running:
    """A server on a free port.

    Attributes:
        url: where it listens.
        models: those that are loaded at the start.
        service: the application.
        server: the HTTP server, for signals.
    """

    def __init__(self, catalog: Catalog, settings: Settings, keys: Keys | None) -> None:
        self.models = [entry.served for entry in catalog.entries if entry.served is not None]
        self.service = Service(catalog, settings, keys)
        listening = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        started = threading.Event()
        config = uvicorn.Config(self.service.app, log_level="warning", timeout_graceful_shutdown=5)
        self.server = GracefulServer(config, self.service, 20, started.set)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listening]}, daemon=True)
        self.thread.start()
        assert started.wait(20)

    def stop(self) -> None:
        """Stop gracefully and wait for the end."""
        self.server.handle_exit(15, None)
        self.thread.join(30)
        assert not self.thread.is_alive()

    def wait_until(self, holds: Callable[[], bool], seconds: float = 20) -> None:
        """Wait for a state of the server; fail if it does not come."""
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, "the server did not reach the state in time"
            time.sleep(0.01)

    def wait_until_idle(self) -> None:
        """Wait until no answer runs or waits."""
        self.wait_until(lambda: self.service.scheduler.is_idle)
