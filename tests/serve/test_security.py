"""What the server promises that strangers cannot do; test_refusals.py and test_page.py have the rest of it."""

from __future__ import annotations

import hmac
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from entrollm.cli.main import app
from entrollm.engine.chat import ChatTemplate
from entrollm.serve import keys as serve_keys
from entrollm.serve.keys import Keys
from tests.serve.running import Running
from tests.serve.test_refusals import ASK, CHAT, TEXT, refused

HERE = "127.0.0.1"
EVERYWHERE = "0.0.0.0"


class NoModels:
    """A catalog without entries."""

    entries: tuple[()] = ()


def listening(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[str, bool, str]:
    """The host that a command would listen on, whether it answers to this machine's names alone, and its messages."""
    seen: list[tuple[str, bool]] = []

    def serve(catalog: Any, settings: Any, keys: Any, address: tuple[str, int], *rest: Any) -> None:
        seen.append((address[0], settings.local_only))

    monkeypatch.setattr("entrollm.serve.server.serve", serve)
    monkeypatch.setattr("entrollm.serve.server.open_models", lambda paths, options: NoModels())
    result = CliRunner().invoke(app, ["serve", "OUT", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return (*seen[0], " ".join(result.stderr.split()))


def test_it_binds_to_loopback_unless_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert listening(monkeypatch) == (HERE, True, "")
    host, is_local, messages = listening(monkeypatch, "--host", EVERYWHERE)
    assert (host, is_local) == (EVERYWHERE, False)
    assert "anyone there may use the models; add --api-key-file" in messages
    (tmp_path / "keys").write_text("a-key")
    assert listening(monkeypatch, "--host", EVERYWHERE, "--api-key-file", str(tmp_path / "keys")) == (host, False, "")


@pytest.mark.parametrize("header", ["Bearer one", "Bearer three", "Bearer wrong", "Bearer " + "x" * 1000, None])
def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch, header: str | None) -> None:
    """A digest of each known key is compared, wherever the right one stands."""
    compared: list[tuple[int, int]] = []
    compare = hmac.compare_digest

    def noted(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return compare(a, b)

    keys = Keys(["one", "two", "three"])
    monkeypatch.setattr(serve_keys.hmac, "compare_digest", noted)
    keys.owner(header)
    assert compared == [(32, 32)] * 3


def test_templates_run_in_a_sandbox_with_a_time_limit(
    client: httpx.Client, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = server.models[0].model
    for source, message in (
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 0.5 seconds"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "access to attribute '__class__'"),
        ("{{ self.__init__.__globals__ }}", "access to attribute '__init__'"),
        ("{% include '/etc/passwd' %}", "the chat template failed"),
    ):
        monkeypatch.setattr(model, "_template", ChatTemplate(source, "chat template", {}, seconds=0.5))
        error = refused(client.post(CHAT, json=ASK), 400)
        assert message in error["message"]
        assert "root:" not in error["message"]


def test_no_path_from_a_request_reaches_the_file_system(client: httpx.Client) -> None:
    """Nothing is opened under a name that a request holds, and nothing is connected to."""
    mark, found = "mark-of-a-stranger", []
    path = f"/tmp/{mark}"

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if is_watching and (event.startswith(("open", "os.", "socket.", "subprocess", "urllib"))):
            found.extend(each for each in arguments if mark in str(each))

    is_watching = True
    sys.addaudithook(watch)
    image = {"type": "image_url", "image_url": {"url": f"file://{path}"}}
    bodies: list[tuple[str, dict[str, Any]]] = [
        (TEXT, {"model": path, "prompt": "x"}),
        (TEXT, {"prompt": path, "max_tokens": 1}),
        (TEXT, {"prompt": "x", "suffix": path}),
        (CHAT, {"messages": [{"role": "user", "content": [image]}]}),
        (CHAT, ASK | {"max_tokens": 1, "chat_template_kwargs": {"template": path, "chat_template": path}}),
        (
            CHAT,
            ASK | {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": f"file://{path}"}}}},
        ),
        (TEXT, {"prompt": "x", "guided_grammar": f'start: "a"\n%import {path}'}),
        ("/v1/responses", {"input": "x", "previous_response_id": path, "instructions": path}),
        ("/v1/embeddings", {"model": path, "input": path}),
        ("/tokenize", {"model": f"../..{path}", "prompt": "x"}),
    ]
    statuses = [client.post(where, json=body).status_code for where, body in bodies]
    statuses += [client.get(where).status_code for where in (path, f"/v1/models/{mark}", f"/v1/models/..%2f{mark}")]
    assert set(statuses) <= {200, 400, 404}
    with pytest.raises(FileNotFoundError):
        open(path)  # noqa: PTH123, SIM115 -- the watch sees what it should
    is_watching = False
    assert found == [path]


def test_sizes_of_what_is_compiled_are_bounded(client: httpx.Client) -> None:
    """Definitions in a request that fits; a short one that stands for a huge automaton takes no long time."""
    long = "x" * 70_000
    for body, most in (
        ({"guided_regex": long}, "65536"),
        ({"guided_grammar": f"start: /{long}/"}, "65536"),
        ({"guided_choice": [long]}, "1024"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"const": long}}}},
            "65536",
        ),
    ):
        assert most in refused(client.post(CHAT, json=ASK | body), 400)["message"]
    growing = {"prompt": "x", "guided_regex": "(((a{1,999}){1,999}){1,999}){1,999}b", "max_tokens": 3}
    assert client.post(TEXT, json=growing, timeout=10).json()["choices"][0]["text"].strip("a") in ("", "b")


def test_a_request_leaves_no_thread_behind(client: httpx.Client, server: Running) -> None:
    client.post(TEXT, json={"prompt": "x", "guided_regex": "[ab]", "max_tokens": 2})
    server.wait_until_idle()
    before = threading.active_count()
    for number in range(8):
        client.post(TEXT, json={"prompt": "x", "guided_regex": f"[ab]{{{number + 1}}}", "max_tokens": 2})
    server.wait_until_idle()
    server.wait_until(lambda: threading.active_count() <= before + 6)  # asyncio keeps a few for work
