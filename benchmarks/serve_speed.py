"""What serving costs: streams, prompts that are known, a stream beside a long prompt, masks, and the start.

usage: python benchmarks/serve_speed.py OUT [--only PART...] [--rounds N] [--tokens N] [--threads N] [--device D]
           [--peer GGUF] [--json FILE]

Parts: start, clients (eight against one), prefix (first token of a known prompt against an unknown one), stall (time
between tokens of a stream while a prompt of 4,000 tokens is read, against that before), mask (a grammar's part of a
token). --peer measures the server of llama-cpp-python with a GGUF file in the same way, as far as it has the parts.
serve_overhead.py has what HTTP adds to a token.
"""

from __future__ import annotations

import argparse
import json
import re
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from common import finish
from entrollm import load
from entrollm.serve.grammar import Grammars

PARTS = ("start", "clients", "prefix", "stall", "mask")
WORDS = "the king was in his garden and many ships went over sea that day while old men told tales of war"
CLIENTS = 8
LONG = 4000
# The running stream is watched for so long beside the prompt.
STALL_S = 12.0
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "tags": {"type": "array", "items": {"type": "string"}}},
    "required": ["name", "tags"],
    "additionalProperties": False,
}


def text(words: int, seed: int) -> str:
    """A text that no other seed begins alike."""
    return " ".join(np.random.default_rng(seed).choice(WORDS.split(), words))


class Client:
    """Asks one server."""

    def __init__(self, url: str, model: str | None) -> None:
        self.url = url
        self._named = {} if model is None else {"model": model}

    def body(self, prompt: str, tokens: int) -> dict[str, Any]:
        """A request for a stream."""
        asked = {"prompt": prompt, "max_tokens": tokens, "stream": True, "temperature": 0}
        return asked | self._named | {"stream_options": {"include_usage": True}}

    def stream(self, prompt: str, tokens: int) -> tuple[list[float], int, int]:
        """When events came, from the request on, and the numbers of tokens of the answer and of the prompt."""
        body = self.body(prompt, tokens)
        started, times, usage = time.perf_counter(), [], {}
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=600) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    times.append(time.perf_counter() - started)
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise RuntimeError(line)
                    usage = event.get("usage") or usage
        return times, usage.get("completion_tokens", len(times)), usage.get("prompt_tokens", 0)


@contextmanager
def server(
    command: Sequence[str], ready: Callable[[subprocess.Popen[str]], str], stderr: int = subprocess.PIPE
) -> Iterator[tuple[str, float]]:
    """A running server: its URL, and the seconds until it listened."""
    started = time.perf_counter()
    with subprocess.Popen(command, stderr=stderr, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            url = ready(process)
            threading.Thread(target=lambda: list(process.stderr or ()), daemon=True).start()
            yield url, time.perf_counter() - started
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def ours(out: Path, arguments: argparse.Namespace) -> Any:
    """`entrollm serve`."""
    command = [sys.executable, "-m", "entrollm", "serve", str(out), "--port", "0", "--slots", str(CLIENTS)]
    command += ["--device", arguments.device] if arguments.device != "cpu" else ["--threads", str(arguments.threads)]

    def ready(process: subprocess.Popen[str]) -> str:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"http://\S+?(?=/v1)", line):
                return found[0]
        raise RuntimeError("".join(lines))

    return server(command, ready)


def peer(path: Path, threads: int) -> Any:
    """The server of llama-cpp-python."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(path), "--n_ctx", "8192"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--n_threads", str(threads), "--n_threads_batch", str(threads), "--interrupt_requests", "false"]

    def ready(process: subprocess.Popen[str]) -> str:
        url = f"http://127.0.0.1:{port}"
        while process.poll() is None:
            try:
                if httpx.get(f"{url}/v1/models").status_code == 200:
                    return url
            except httpx.TransportError:
                time.sleep(0.005)
        raise RuntimeError("the peer did not start")

    # It writes more at its start than a pipe holds that nobody reads.
    return server(command, ready, subprocess.DEVNULL)


def clients(client: Client, tokens: int, seed: int) -> dict[str, float]:
    """Tokens per second of one client and of eight, prompts included."""
    return {
        "one": together(client, [text(3, 100 * seed)], tokens),
        "eight": together(client, [text(3, 100 * seed + i) for i in range(CLIENTS)], tokens),
    }


def together(client: Client, prompts: Sequence[str], tokens: int) -> float:
    """Tokens per second of streams side by side, read as bytes so that reading takes next to no time."""
    host, port = client.url.removeprefix("http://").split(":")
    found: dict[socket.socket, bytes] = {}
    started = time.perf_counter()
    with selectors.DefaultSelector() as selector:
        for prompt in prompts:
            body = json.dumps(client.body(prompt, tokens))
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection = socket.create_connection((host, int(port)), timeout=600)
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            found[connection] = b""
            selector.register(connection, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                connection = key.fileobj  # type: ignore[assignment]
                part = connection.recv(65536)
                found[connection] += part
                if not part or b"[DONE]" in found[connection][-64:]:
                    selector.unregister(connection)
                    connection.close()
    elapsed_s = time.perf_counter() - started
    made = 0
    for answer in found.values():
        if b"[DONE]" not in answer:
            raise RuntimeError(answer[-2000:].decode())
        counts = re.findall(rb'"completion_tokens": ?(\d+)', answer)
        made += int(counts[-1]) if counts else answer.count(b"data: {")
    return made / elapsed_s


def prefix(client: Client, seed: int) -> dict[str, float]:
    """Seconds to the first token of a prompt of about 1,000 tokens that is new, and again."""
    prompt = text(800, 7000 + seed)
    times, _, count = client.stream(prompt, 1)
    return {"uncached": times[0], "cached": client.stream(prompt, 1)[0][0], "prompt_tokens": count}


def stall(client: Client) -> dict[str, float]:
    """Gaps between the tokens of a stream, before and while a long prompt is read beside it."""
    times: list[float] = []
    began, done = threading.Event(), threading.Event()

    def watch() -> None:
        body = {"prompt": "The king", "max_tokens": 2000, "stream": True, "temperature": 0, "logprobs": 0}
        with httpx.stream("POST", f"{client.url}/v1/completions", json=body, timeout=600) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    times.append(time.perf_counter())
                if len(times) == 40:
                    began.set()
                if done.is_set():
                    return

    def read() -> None:
        body = {"prompt": text(LONG, 5), "max_tokens": 1, "stream": True}
        with httpx.stream("POST", f"{client.url}/v1/completions", json=body, timeout=600) as response:
            next(iter(response.iter_raw()), None)
        done.set()

    watching, reading = threading.Thread(target=watch), threading.Thread(target=read, daemon=True)
    watching.start()
    began.wait(60)
    asked = time.perf_counter()
    reading.start()
    done.wait(STALL_S)
    done.set()
    watching.join()
    gaps = np.diff(times)
    before = gaps[20:39]
    beside = gaps[np.array(times[1:]) > asked + 0.05]
    return {
        "before_s": float(np.median(before)),
        "beside_s": float(np.median(beside)),
        "beside_p95_s": float(np.quantile(beside, 0.95)),
        "beside_max_s": float(beside.max()),
        "tokens": len(beside),
    }


def mask(model: Any) -> dict[str, float]:
    """Median milliseconds of a mask, on a random walk through a schema."""
    random = np.random.default_rng(3)
    grammars = Grammars(model.tokenizer, model.config.vocab_size, model.end_token_ids)
    found = []
    for _ in range(3):
        grammar = grammars.json_schema(SCHEMA, "schema")
        for _ in range(100):
            started = time.perf_counter()
            allowed = grammar.allowed()
            elapsed_s = time.perf_counter() - started
            token = int(random.choice(np.flatnonzero(allowed)))
            started = time.perf_counter()
            if token in model.end_token_ids:
                break
            grammar.accept(token)
            found.append(elapsed_s + time.perf_counter() - started)
    return {"median_ms": 1e3 * statistics.median(found), "p95_ms": 1e3 * float(np.quantile(found, 0.95))}


def summary(values: Sequence[float]) -> str:
    """The median and the range."""
    return f"{statistics.median(values):.4g} [{min(values):.4g}, {max(values):.4g}]"


def measure(context: Any, name: str | None, parts: Sequence[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """All parts that need a running server, in alternating rounds."""
    found: dict[str, Any] = {}
    with context as (url, start_s):
        client = Client(url, name)
        client.stream("The king", 16)  # whatever is made at the first answer
        time.sleep(2)
        found["start_s"] = start_s
        for number in range(arguments.rounds):
            if "clients" in parts:
                for key, value in clients(client, arguments.tokens, number + 1).items():
                    found.setdefault(key, []).append(value)
            if "prefix" in parts:
                for key, value in prefix(client, number).items():
                    found.setdefault(key, []).append(value)
        if "stall" in parts and name is None:
            found["stall"] = stall(client)
    return found


def report(title: str, found: dict[str, Any]) -> None:
    """Print what was measured."""
    print(title)
    for key, values in found.items():
        print(f"  {key:14} {summary(values) if isinstance(values, list) else values}")
    for above, below in (("eight", "one"), ("cached", "uncached")):
        if above in found and below in found:
            ratios = [a / b for a, b in zip(found[above], found[below], strict=True)]
            print(f"  {above} / {below}: {summary(ratios)}")


def main() -> None:
    """Measure, print, and end with JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    parts: Sequence[str] = arguments.only
    results: dict[str, Any] = {}
    if "start" in parts:
        starts = []
        for _ in range(arguments.rounds + 1):  # the first warms the files
            with ours(arguments.out, arguments) as (_, start_s):
                starts.append(start_s)
        results["start"] = {"seconds": starts[1:]}
    if "mask" in parts:
        results["mask"] = mask(load(arguments.out, arguments.threads))
    if set(parts) - {"start", "mask"}:
        results["ours"] = measure(ours(arguments.out, arguments), None, parts, arguments)
        if arguments.peer is not None:
            others = [part for part in parts if part in ("clients", "prefix")]
            results["peer"] = measure(peer(arguments.peer, arguments.threads), "any", others, arguments)
    for title, found in results.items():
        report(title, found)
    finish(results, arguments.json)


if __name__ == "__main__":
    main()
