"""What HTTP and the scheduler add to a token: one stream against `generate` of the same model in the same process.

usage: python benchmarks/serve_overhead.py OUT [--pairs N] [--tokens N] [--threads N] [--json FILE]

Both take turns, so that what disturbs the machine disturbs both. The client is a process of its own that only reads
bytes. "http" is the processor time of the thread that speaks HTTP, "between" the time of the scheduler's thread between
the steps of the model; both are per token, and are what can be wrong with the server even where the ratio is noisy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from common import finish
from entrollm.serve.api import Settings
from entrollm.serve.app import Service
from entrollm.serve.engines import CpuEngine
from entrollm.serve.server import GracefulServer, LoadOptions, listen, open_models

PROMPT = "The king"
# Reads one stream after another, and prints the seconds that each took.
CLIENT = """
import socket, sys, time
for line in sys.stdin:
    port, body = line.strip().split(" ", 1)
    started = time.perf_counter()
    with socket.create_connection(("127.0.0.1", int(port))) as s:
        head = "POST /v1/completions HTTP/1.1\\r\\nHost: localhost\\r\\nContent-Type: application/json\\r\\n"
        s.sendall(f"{head}Content-Length: {len(body)}\\r\\n\\r\\n{body}".encode())
        end = b""
        while b"[DONE]" not in end:
            part = s.recv(65536)
            if not part:
                break
            end = end[-64:] + part
    print(time.perf_counter() - started if b"[DONE]" in end else -1, flush=True)
"""


class Server:
    """A server in a thread of this process."""

    def __init__(self, out: Path, threads: int) -> None:
        import uvicorn

        catalog = open_models([str(out)], LoadOptions(engine=CpuEngine(threads=threads)))
        (served,) = [entry.served for entry in catalog.entries]
        assert served is not None
        self.model: Any = served.model
        self.service = Service(catalog, Settings(), None)
        listening = listen("127.0.0.1", 0)
        self.port = listening.getsockname()[1]
        started = threading.Event()
        config = uvicorn.Config(self.service.app, log_level="warning", access_log=False)
        self._server = GracefulServer(config, self.service, 5, started.set)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listening]})
        self._thread.start()
        started.wait(20)

    def http_cpu_s(self) -> float:
        """Processor time of the thread that speaks HTTP."""
        assert self._thread.ident is not None
        return time.clock_gettime(time.pthread_getcpuclockid(self._thread.ident))

    def stop(self) -> None:
        """Stop and wait for the end."""
        self._server.handle_exit(15, None)
        self._thread.join()


def summary(values: list[float], unit: str) -> str:
    """The median, its standard error (from the quartiles), and the range."""
    quarters = statistics.quantiles(values, n=4)
    error = 0.93 * (quarters[2] - quarters[0]) / len(values) ** 0.5
    return f"{statistics.median(values):.4g} +- {error:.2g} {unit} [{min(values):.4g}, {max(values):.4g}]"


def main() -> None:
    """Measure, print, and end with JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    server = Server(arguments.out, arguments.threads)
    metrics = server.service.scheduler._metrics
    with subprocess.Popen([sys.executable, "-c", CLIENT], stdin=-1, stdout=-1, text=True) as client:
        assert client.stdin is not None and client.stdout is not None

        def ask(tokens: int) -> float:
            """The milliseconds that a stream takes."""
            assert client.stdin is not None and client.stdout is not None
            body = {"prompt": PROMPT, "max_tokens": tokens, "stream": True, "temperature": 0}
            client.stdin.write(f"{server.port} {json.dumps(body)}\n")
            client.stdin.flush()
            elapsed_s = float(client.stdout.readline())
            assert elapsed_s > 0
            return 1e3 * elapsed_s

        def pair() -> dict[str, float]:
            """Both, one after the other."""
            result = server.model.generate(PROMPT, max_tokens=arguments.tokens, temperature=0.0)
            tokens = len(result.token_ids) - 1
            assert tokens == arguments.tokens - 1
            run_ms = 1e3 * result.decode_s / tokens
            first_ms = ask(1)
            cpu_s, steps_s, steps = server.http_cpu_s(), metrics.step_s, metrics.steps
            elapsed_ms = ask(arguments.tokens)
            assert metrics.steps - steps == arguments.tokens
            serve_ms, step_ms = (elapsed_ms - first_ms) / tokens, 1e3 * (metrics.step_s - steps_s) / (tokens + 1)
            http_ms = 1e3 * (server.http_cpu_s() - cpu_s) / (tokens + 1)
            between_ms = (elapsed_ms - 1e3 * (metrics.step_s - steps_s)) / (tokens + 1)
            return {
                "run": run_ms,
                "serve": serve_ms,
                "step": step_ms,
                "http": http_ms,
                "between": between_ms,
                "serve / run": serve_ms / run_ms,
                "http / run": http_ms / run_ms,
                "between / run": between_ms / run_ms,
            }

        pair()  # warms up
        time.sleep(2)
        pairs = [pair() for _ in range(arguments.pairs)]
        found = {key: [each[key] for each in pairs] for key in pairs[0]}
        client.stdin.close()
    server.stop()
    for key, values in found.items():
        print(f"{key:14} {summary(values, '' if '/' in key else 'ms a token')}")
    finish({key: [round(value, 5) for value in values] for key, values in found.items()}, arguments.json)


if __name__ == "__main__":
    main()
