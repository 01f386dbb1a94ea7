"""Full queues, clients that leave, time limits, failures, and the end of the server."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from entrollm.cli.main import app
from entrollm.engine.sampling import Sampler
from entrollm.errors import FormatError
from entrollm.serve.api import Settings
from entrollm.serve.engines import CpuEngine
from entrollm.serve.server import LoadOptions
from entrollm.serve.slots import Slots
from tests.serve.conftest import Serve
from tests.serve.running import Running
from tests.serve.test_completions import complete, events
from tests.serve.test_refusals import refused

TEXT = "/v1/completions"
LONG: dict[str, Any] = {"prompt": "The king", "max_tokens": 450, "stream": True}


class Stream:
    """A stream over a bare socket, which can be left at any time."""

    def __init__(self, running: Running, **body: Any) -> None:
        host, port = running.url.removeprefix("http://").split(":")
        self.socket = socket.create_connection((host, int(port)), timeout=30)
        content = json.dumps(body).encode()
        head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        self.socket.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)

    def read_until(self, text: bytes) -> bytes:
        """Read until `text` has come."""
        found = b""
        while text not in found:
            part = self.socket.recv(65536)
            assert part, found
            found += part
        return found

    def leave(self) -> None:
        """Close the connection."""
        self.socket.close()


@pytest.fixture(scope="module")
def narrow(serve: Serve) -> Running:
    """A server with one slot and a queue of two."""
    return serve(LoadOptions(slots=1, engine=CpuEngine(threads=2)), Settings(queue_length=2))


def counter(running: Running, name: str) -> float:
    found = re.search(rf"^entrollm_{name} (\S+)$", httpx.get(running.url + "/metrics").text, re.MULTILINE)
    assert found
    return float(found[1])


def test_a_full_queue_refuses_with_retry_after(narrow: Running) -> None:
    running = Stream(narrow, **LONG)
    running.read_until(b"data: ")
    waiting = [Stream(narrow, **LONG) for _ in range(2)]
    narrow.wait_until(lambda: narrow.service.scheduler.waiting == 2)
    with httpx.Client(base_url=narrow.url, timeout=30) as client:
        response = client.post(TEXT, json={"prompt": "x"})
        error = refused(response, 429)
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        assert 1 <= int(response.headers["retry-after"]) <= 120
        assert client.get("/health").json() == {"status": "ok", "running": 1, "waiting": 2}
        for stream in (running, *waiting):
            stream.leave()
        narrow.wait_until_idle()
        assert complete(client, prompt="The king", max_tokens=3)["usage"]["completion_tokens"] == 3


def test_a_client_that_leaves_frees_its_slot(narrow: Running) -> None:
    before = counter(narrow, "cancelled_total"), counter(narrow, "generated_tokens_total")
    stream = Stream(narrow, **LONG)
    stream.read_until(b"data: ")
    stream.leave()
    narrow.wait_until_idle()
    assert counter(narrow, "cancelled_total") == before[0] + 1
    assert counter(narrow, "generated_tokens_total") < before[1] + 450
    # Without a stream, too.
    waiting = Stream(narrow, **LONG | {"stream": False})
    narrow.wait_until(lambda: narrow.service.scheduler.running == 1)
    waiting.leave()
    narrow.wait_until_idle()
    assert counter(narrow, "cancelled_total") == before[0] + 2
    assert counter(narrow, "generated_tokens_total") < before[1] + 900


def test_a_client_that_leaves_while_it_waits(narrow: Running) -> None:
    before = counter(narrow, "cancelled_total")
    running = Stream(narrow, **LONG)
    running.read_until(b"data: ")
    waiting = Stream(narrow, **LONG)
    narrow.wait_until(lambda: narrow.service.scheduler.waiting == 1)
    waiting.leave()
    narrow.wait_until(lambda: narrow.service.scheduler.waiting == 0)
    running.leave()
    narrow.wait_until_idle()
    assert counter(narrow, "cancelled_total") == before + 2


def test_choices_wait_for_the_prompt_of_the_first(serve: Serve) -> None:
    running = serve(LoadOptions(slots=4, engine=CpuEngine(threads=2)))
    before = counter(running, "reused_prompt_tokens_total")
    with httpx.Client(base_url=running.url, timeout=60) as client:
        answer = complete(client, prompt="word " * 100, n=4, max_tokens=2)
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    tokens = answer["usage"]["prompt_tokens"]
    assert counter(running, "reused_prompt_tokens_total") == before + 3 * (tokens - 1)
    running.stop()


def test_time_limits(serve: Serve) -> None:
    running = serve(LoadOptions(slots=1, engine=CpuEngine(threads=2)), Settings(timeout_s=0.4))
    with httpx.Client(base_url=running.url, timeout=60) as client:
        body = {"prompt": "The king", "max_tokens": 500, "logit_bias": {"1": -100}}
        slow = running.models[0].model.step

        def step(steps: Any) -> Any:
            time.sleep(0.02)
            return slow(steps)

        running.models[0].model.step = step  # type: ignore[method-assign]
        first = Stream(running, **body, stream=True)
        first.read_until(b"data: ")
        running.service.scheduler._running[0].deadline_s += 1.5
        error = refused(client.post(TEXT, json=body), 503)
        assert (error["code"], error["type"]) == ("timeout", "server_error")
        assert b'"code":"timeout"' in first.read_until(b"error")
        error = refused(client.post(TEXT, json=body), 504)
        assert "took too long" in error["message"]
        running.wait_until_idle()
        assert counter(running, "expired_total") == 3
    running.stop()


def test_a_step_that_fails_is_reported_and_the_server_goes_on(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    running = serve(LoadOptions(slots=2, engine=CpuEngine(threads=2)))
    model = running.models[0].model
    step = model.step

    def broken(steps: Any) -> Any:
        raise FormatError("model.safetensors: the checksum is wrong")

    with httpx.Client(base_url=running.url, timeout=60) as client:
        before = complete(client, prompt="The king", max_tokens=8)
        model.step = broken  # type: ignore[method-assign]
        error = refused(client.post(TEXT, json={"prompt": "The king was"}), 500)
        assert error["message"] == "the model failed: model.safetensors: the checksum is wrong"
        assert "a step of tiny failed" in caplog.text
        with client.stream("POST", TEXT, json=LONG) as response:
            lines = [line for line in response.iter_lines() if line.startswith("data: ")]
        assert json.loads(lines[-1][6:])["error"]["code"] == "model_failed"
        model.step = step  # type: ignore[method-assign]
        assert complete(client, prompt="The king", max_tokens=8)["choices"] == before["choices"]
    running.stop()


def test_a_slot_that_cannot_be_had_ends_its_answer_alone(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    running = serve(LoadOptions(slots=2, engine=CpuEngine(threads=2)))

    def full(self: Slots, prompt: Any) -> Any:
        raise MemoryError("out of memory")

    with httpx.Client(base_url=running.url, timeout=60) as client:
        with monkeypatch.context() as patch:
            patch.setattr(Slots, "take", full)
            error = refused(client.post(TEXT, json={"prompt": "The king"}), 500)
        assert (error["code"], error["message"]) == ("model_failed", "the model failed: out of memory")
        assert complete(client, prompt="The king", max_tokens=2)["choices"]
    assert running.service.scheduler.is_idle
    running.stop()


def test_a_sampler_that_fails_ends_its_answer_alone(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    running = serve(LoadOptions(slots=2, engine=CpuEngine(threads=2)))
    choose = Sampler.__call__

    def failing(self: Sampler, logits: Any, **keywords: Any) -> int:
        if self._options.seed == 13:
            raise FormatError("the logits are not finite")
        return choose(self, logits, **keywords)

    monkeypatch.setattr(Sampler, "__call__", failing)
    with httpx.Client(base_url=running.url, timeout=60) as client:
        stream = Stream(running, **LONG)
        stream.read_until(b"data: ")
        error = refused(client.post(TEXT, json={"prompt": "The king", "seed": 13}), 500)
        assert error["message"] == "the logits are not finite"
        stream.read_until(b"[DONE]")
    running.stop()


def test_a_long_prompt_does_not_stall_a_stream(serve: Serve) -> None:
    """Steps that read a prompt beside a stream take a bounded number of its tokens."""
    running = serve(LoadOptions(slots=2, engine=CpuEngine(threads=2)))
    model = running.models[0].model
    step, sizes = model.step, []

    def recorded(steps: Any) -> Any:
        sizes.append([len(each.ids) for each in steps])
        return step(steps)

    model.step = recorded  # type: ignore[method-assign]
    with httpx.Client(base_url=running.url, timeout=60) as client:
        stream = Stream(running, **LONG)
        stream.read_until(b"data: ")
        complete(client, prompt="word " * 200, max_tokens=2)
        stream.leave()
    mixed = [max(size) for size in sizes if len(size) == 2]  # a piece of the prompt beside one token
    assert len(mixed) >= 3
    assert sum(mixed) >= 190
    assert max(mixed) <= 100
    assert all(min(size) == 1 for size in sizes if len(size) == 2)
    running.stop()


def test_a_stop_lets_running_answers_end(serve: Serve) -> None:
    running = serve(LoadOptions(slots=1, engine=CpuEngine(threads=2)))
    stream = Stream(running, **LONG | {"max_tokens": 200})
    stream.read_until(b"data: ")
    running.server.handle_exit(signal.SIGTERM, None)
    with httpx.Client(base_url=running.url, timeout=30) as client:
        response = client.post(TEXT, json={"prompt": "x"})
        assert refused(response, 503)["code"] == "stopping"
        assert "retry-after" in response.headers
        assert client.get("/health").status_code == 503
    assert b'"finish_reason":"length"' in stream.read_until(b"[DONE]")
    running.thread.join(20)
    assert not running.thread.is_alive()
    with pytest.raises(httpx.ConnectError):
        httpx.get(running.url + "/health")


def test_grace_ends(serve: Serve) -> None:
    running = serve(LoadOptions(slots=1, engine=CpuEngine(threads=2)))
    running.server._grace_s = 0.2
    stream = Stream(running, **LONG | {"logit_bias": {"1": -100}, "max_tokens": 500})
    stream.read_until(b"data: ")
    slow = running.models[0].model.step

    def step(steps: Any) -> Any:
        time.sleep(0.1)
        return slow(steps)

    running.models[0].model.step = step  # type: ignore[method-assign]
    started = time.monotonic()
    running.server.handle_exit(signal.SIGTERM, None)
    assert b'"code":"stopping"' in stream.read_until(b"error")
    running.thread.join(20)
    assert time.monotonic() - started < 4
    assert not running.service.scheduler._thread.is_alive()


def test_the_command_from_start_to_sigterm(folder: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    command = [sys.executable, "-m", "entrollm", "serve", str(folder), "--port", "0", "--slots", "2"]
    command += ["--context", "64", "--api-key-file", str(keys), "--threads", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.fullmatch(r"serving tiny at (http://127\.0\.0\.1:\d+)/v1\n", line)
        assert found, line
        with httpx.Client(base_url=found[1], headers={"authorization": "Bearer secret"}, timeout=60) as client:
            assert client.get("/v1/models").json()["data"][0]["context_length"] == 64
            threading.Timer(0.3, process.send_signal, (signal.SIGTERM,)).start()
            pieces = events(client, TEXT, prompt="The king", max_tokens=1000, logit_bias={"1": -100})
            assert pieces[-1]["choices"][0]["finish_reason"] == "length"
        assert process.wait(20) == 0


@pytest.mark.skipif(os.name == "nt", reason="a second socket may take a port there")
def test_an_address_in_use_is_one_line(server: Running, folder: Path) -> None:
    port = server.url.rpartition(":")[2]
    result = CliRunner().invoke(app, ["serve", str(folder), "--port", port])
    assert result.exit_code == 1
    assert result.stderr == f"error: cannot listen on 127.0.0.1 port {port}: Address already in use\n"


@pytest.mark.parametrize(("option", "seconds"), [("--timeout", "1e300"), ("--grace", "inf"), ("--idle-release", "inf")])
def test_times_that_nobody_lives_to_see_are_refused(option: str, seconds: str, folder: Path) -> None:
    result = CliRunner().invoke(app, ["serve", str(folder), option, seconds])
    assert result.exit_code == 1
    assert f"{option} should be at most 1000000000 seconds" in result.stderr


def test_models_that_cannot_be_served(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "tiny"
    other.mkdir()
    for file in folder.iterdir():
        if file.name not in ("tokenizer.json", "generation_config.json"):
            (other / file.name).symlink_to(file)
    twice = CliRunner().invoke(app, ["serve", str(folder), str(other)])
    assert twice.exit_code == 1
    assert "two models have the name tiny; rename one of the folders" in twice.stderr
    without = CliRunner().invoke(app, ["serve", str(other)])
    assert without.exit_code == 1
    assert "has no tokenizer.json, which serving needs" in without.stderr
    (other / "tokenizer.json").symlink_to(folder / "tokenizer.json")
    (other / "generation_config.json").write_text('{"num_beams": 4}')
    beams = CliRunner().invoke(app, ["serve", str(other), "--no-check"])
    assert beams.exit_code == 1
    assert "error: tiny/generation_config.json: num_beams 4 is not supported" in beams.stderr


def test_a_missing_package_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sse_starlette", None)
    result = CliRunner().invoke(app, ["serve", str(folder)])
    assert result.exit_code == 1
    assert "sse_starlette is missing; install it with: pip install 'entrollm[serve]'" in result.stderr
