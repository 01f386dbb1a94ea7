"""The example model, compressed and with a chat template, and servers that run it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from entrollm import CompressOptions, compress
from entrollm.serve.api import Settings
from entrollm.serve.engines import CpuEngine
from entrollm.serve.keys import Keys
from entrollm.serve.server import LoadOptions, open_models
from tests.serve.running import Running
from tests.support.paths import TINY_LLAMA

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'refused' %}{{ raise_exception('no such role') }}{% endif %}"
    "{{ message.role }}: {{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}\n"
    "{% endfor %}{% if tools %}Tools: {{ tools | tojson }}\n{% endif %}{% if mood is defined %}({{ mood }}) {% endif %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

Serve = Callable[..., Running]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example model at 4 bits."""
    path = tmp_path_factory.mktemp("served") / "tiny"
    compress(TINY_LLAMA, path, CompressOptions(bits=4))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="session")
def serve(folder: Path) -> Iterator[Serve]:
    """A function that starts a server in a thread; all of them end with the session."""
    with ExitStack() as stack:

        def start(
            options: LoadOptions | None = None,
            settings: Settings | None = None,
            keys: Keys | None = None,
        ) -> Running:
            catalog = open_models([str(folder)], options or LoadOptions(slots=4, engine=CpuEngine(threads=2)))
            running = Running(catalog, settings or Settings(), keys)
            stack.callback(running.stop)
            return running

        yield start


@pytest.fixture(scope="session")
def server(serve: Serve) -> Running:
    """A server that the tests of a session share."""
    return serve()


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    """An HTTP client of the shared server."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(autouse=True)
def no_threads_left(serve: Serve) -> Iterator[None]:
    """No test leaves a thread that died of an exception."""
    died: list[threading.ExceptHookArgs] = []
    before = threading.excepthook
    threading.excepthook = died.append
    yield
    threading.excepthook = before
    assert not died
