"""Mixed requests to `entrollm serve`: right, cancelled, malformed, huge, slowly read. Each answer is checked.

usage: python benchmarks/serve_load.py [OUT] [--requests N] [--clients N] [--seed N] [--device DEVICE] [--json FILE]

Greedy answers must be those of `entrollm run`, everything else must be an answer of the right form or a named error. Of
2000 requests or more, the server's memory may grow by 5 % from the end of the first fifth to the end. OUT needs a chat
template; without OUT, the example model is compressed. On another device than the CPU, products of a batch are rounded
otherwise than those of one answer, so texts are not compared there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from common import finish
from entrollm import CompressOptions, Model, compress, load

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-llama"
MOST_GROWTH = 0.05
# With fewer requests, the memory is not compared.
MEMORY_REQUESTS = 2000
SLOTS = 8
# After its last answer, the server gives freed memory back within this time.
TRIM_S = 1.5
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }} <tool_call>\n{% endif %}assistant:"
)
PROMPTS = [
    f"The {who} {did}" for who in ("king", "queen", "old man", "ship", "war") for did in ("was", "went to", "of")
]
TEXT, CHAT, RESPONSES, EMBEDDINGS = "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings"
SCHEMA = {"type": "object", "properties": {"age": {"type": "integer", "maximum": 99}}, "required": ["age"]}
SCHEMA["additionalProperties"] = False
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
BAD_BODIES = [
    b"",
    b"{",
    b"[1]",
    b"\xff\xfe{}",
    b'{"prompt": "x", "temperature": NaN}',
    b'{"prompt": "x", "temperature": 1e999}',
    b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b'{"prompt": {"a": [1]}}',
    b'{"prompt": "x", "n": -1}',
    b'{"prompt": "x", "colour": 1}',
    b'{"prompt": [1e300]}',
    b'{"prompt": "x", "stop": 5}',
    b'{"prompt": "x", "guided_regex": "("}',
    b'{"prompt": "x", "logit_bias": {"99999999": 1}}',
    b'{"prompt": "\\ud800"}',
    b'{"messages": [{"role": "king"}], "prompt": "x", "input": []}',
]


class WrongAnswerError(AssertionError):
    """An answer is not what it should be."""


@dataclass
class Load:
    """One run.

    Attributes:
        url: of the server.
        expected: greedy answers of 12 tokens, by prompt; "chat:" stands before those to dialogues. Empty if texts are
            not compared.
        random: decides what is asked.
        statuses: how often each kind of request got each status.
    """

    url: str
    expected: dict[str, str]
    random: random.Random
    client: httpx.AsyncClient
    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    vectors: dict[str, list[float]] = field(default_factory=dict)

    async def ask(self, kind: str, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """The answer, or `None` if the server is full."""
        response = await self.client.post(path, json=body)
        self.statuses[kind, response.status_code] += 1
        if response.status_code == 429:
            self.check_error(response)
            return None
        expect(response.status_code == 200, kind, response.text)
        found: dict[str, Any] = response.json()
        return found

    def check_text(self, asked: str, text: str) -> None:
        """Check a greedy answer."""
        expect(not self.expected or text == self.expected[asked], asked, (text, self.expected.get(asked)))

    def check_error(self, response: httpx.Response) -> None:
        """Check that a refusal has OpenAI's shape."""
        error = response.json()["error"]
        expect(set(error) == {"message", "type", "param", "code"} and bool(error["message"]), "error", response.text)

    async def greedy(self) -> None:
        prompt = self.random.choice(PROMPTS)
        found = await self.ask("greedy", TEXT, {"prompt": prompt, "max_tokens": 12})
        if found:
            self.check_text(prompt, found["choices"][0]["text"])

    async def greedy_stream(self) -> None:
        prompt = self.random.choice(PROMPTS)
        await self.stream("greedy stream", TEXT, {"prompt": prompt, "max_tokens": 12}, prompt, "text")

    async def chat(self) -> None:
        prompt = self.random.choice(PROMPTS)
        body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 12}
        await self.stream("chat stream", CHAT, body, f"chat:{prompt}", "content")

    async def stream(self, kind: str, path: str, body: dict[str, Any], asked: str, key: str) -> None:
        async with self.client.stream("POST", path, json=body | {"stream": True}) as response:
            self.statuses[kind, response.status_code] += 1
            if response.status_code == 429:
                return
            lines = [line[6:] async for line in response.aiter_lines() if line.startswith("data: ")]
        expect(lines[-1] == "[DONE]", kind, lines)
        choices = [json.loads(line)["choices"][0] for line in lines[:-1]]
        text = "".join((choice["delta"] if key == "content" else choice).get(key) or "" for choice in choices)
        self.check_text(asked, text)

    async def sampled(self) -> None:
        body = {"prompt": self.random.choice(PROMPTS), "temperature": 1.2, "seed": self.random.randrange(9), "n": 2}
        found = await self.ask("sampled", TEXT, body | {"max_tokens": 6, "logprobs": 1})
        if found:
            expect(len(found["choices"]) == 2, "sampled", found)

    async def schema(self) -> None:
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 40, "response_format": form}
        found = await self.ask("schema", CHAT, body)
        if found and found["choices"][0]["finish_reason"] == "stop":
            value = json.loads(found["choices"][0]["message"]["content"])
            expect(set(value) == {"age"} and value["age"] <= 99, "schema", value)

    async def regex(self) -> None:
        found = await self.ask("regex", TEXT, {"prompt": "x", "guided_regex": "[0-9]{2}-[a-z]{3}", "max_tokens": 9})
        if found and found["choices"][0]["finish_reason"] == "stop":
            text = found["choices"][0]["text"]
            expect(re.fullmatch("[0-9]{2}-[a-z]{3}", text) is not None, "regex", text)

    async def tool(self) -> None:
        body = {"messages": [{"role": "user", "content": "x"}], "tools": [TOOL], "tool_choice": "required"}
        found = await self.ask("tool", CHAT, body | {"max_tokens": 90, "parallel_tool_calls": False})
        if found and found["choices"][0]["finish_reason"] == "tool_calls":
            (call,) = found["choices"][0]["message"]["tool_calls"]
            expect(call["function"]["name"] == "now", "tool", call)

    async def responses(self) -> None:
        prompt = self.random.choice(PROMPTS)
        found = await self.ask("responses", RESPONSES, {"input": prompt, "max_output_tokens": 12})
        if found:
            self.check_text(f"chat:{prompt}", found["output"][0]["content"][0]["text"])

    async def embedding(self) -> None:
        prompt = self.random.choice(PROMPTS)
        found = await self.ask("embedding", EMBEDDINGS, {"input": prompt, "dimensions": 8})
        if found:
            vector = found["data"][0]["embedding"]
            known = self.vectors.setdefault(prompt, vector)
            expect(max(abs(a - b) for a, b in zip(vector, known, strict=True)) < 1e-4, prompt, (vector, known))

    async def echo(self) -> None:
        prompt = self.random.choice(PROMPTS)
        found = await self.ask("echo", TEXT, {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 0})
        if found:
            choice = found["choices"][0]
            expect(choice["text"] == prompt and choice["logprobs"]["token_logprobs"][0] is None, "echo", choice)

    async def malformed(self) -> None:
        path = self.random.choice((TEXT, CHAT, RESPONSES, EMBEDDINGS, "/tokenize", "/detokenize"))
        content = self.random.choice(BAD_BODIES)
        response = await self.client.post(path, content=content, headers={"content-type": "application/json"})
        self.statuses["malformed", response.status_code] += 1
        expect(400 <= response.status_code < 500, "malformed", (path, content[:80], response.status_code))
        self.check_error(response)

    async def huge(self) -> None:
        if self.random.random() < 0.3:
            content = b'{"prompt": "' + b"x" * (10 << 20) + b'"}'
            response = await self.client.post(TEXT, content=content, headers={"content-type": "application/json"})
            expect(response.status_code == 413, "huge", response.text)
        else:
            response = await self.client.post(TEXT, json={"prompt": "word " * 50_000})
            expect(response.status_code == 400, "huge", response.text)
        self.statuses["huge", response.status_code] += 1
        self.check_error(response)

    async def cancelled(self) -> None:
        """Leave a stream after some bytes, or before the first."""
        reader, writer = await self.open(TEXT, {"prompt": "The king", "max_tokens": 400, "stream": True})
        for _ in range(self.random.randrange(4)):
            await reader.read(200)
        self.statuses["cancelled", 0] += 1
        if self.random.random() < 0.5:
            writer.transport.abort()
        else:
            writer.close()

    async def slow(self) -> None:
        """Read a stream in small pieces with pauses."""
        prompt = self.random.choice(PROMPTS)
        reader, writer = await self.open(TEXT, {"prompt": prompt, "max_tokens": 12, "stream": True})
        found = b""
        while not (found.endswith(b"0\r\n\r\n") or b" 429 " in found[:20]):
            part = await reader.read(300)
            if not part:
                break
            found += part
            await asyncio.sleep(0.02)
        writer.close()
        self.statuses["slow", int(found[9:12])] += 1
        if found[9:12] == b"200":
            pieces = re.findall(r'"text":"((?:[^"\\]|\\.)*)"', found.decode())
            text = "".join(json.loads(f'"{piece}"') for piece in pieces)
            self.check_text(prompt, text)

    async def half_closed(self) -> None:
        """Close the sending side before the answer has come."""
        reader, writer = await self.open(TEXT, {"prompt": "The king", "max_tokens": 3})
        writer.write_eof()
        found = await reader.read()
        writer.close()
        self.statuses["half closed", int(found[9:12] or 0)] += 1

    async def open(self, path: str, body: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, port = self.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        await writer.drain()
        return reader, writer

    @property
    def kinds(self) -> list[Callable[[], Awaitable[None]]]:
        """What is asked; those that stand twice come twice as often."""
        often = [self.greedy, self.greedy_stream, self.chat, self.malformed, self.cancelled]
        once = [self.sampled, self.schema, self.regex, self.tool, self.responses, self.embedding, self.echo]
        return [*often, *often, *once, self.slow, self.half_closed]


def expect(holds: bool, what: object, found: object) -> None:
    """Fail if an answer is wrong."""
    if not holds:
        raise WrongAnswerError(f"{what}: {str(found)[:2000]}")


async def fill(client: httpx.AsyncClient, slots: int) -> None:
    """Let every slot hold a sequence that almost fills its context, so that caches take the same memory each time."""
    context = (await client.get("/v1/models")).json()["data"][0]["context_length"]
    bodies = [{"prompt": [5 + slot] * (context - 2), "max_tokens": 1} for slot in range(slots)]
    for response in await asyncio.gather(*(client.post(TEXT, json=body) for body in bodies)):
        expect(response.status_code == 200, "fill", response.text)


async def run(load_: Load, requests: int, clients: int) -> None:
    """Make requests, some of them at the same time."""
    left = iter(range(requests))

    async def one_client() -> None:
        for number in left:
            work = load_.huge if number % 50 == 7 else load_.random.choice(load_.kinds)
            async with asyncio.timeout(600):
                await work()

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(one_client())


def resident_bytes(pid: int) -> int:
    """The memory of a process that is its own."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found
    return 1024 * int(found[1])


def answers_of(model: Model) -> dict[str, str]:
    """The greedy answers of `entrollm run` to all prompts."""
    found = {prompt: model.generate(prompt, max_tokens=12, temperature=0.0).text for prompt in PROMPTS}
    for prompt in PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        found[f"chat:{prompt}"] = model.chat(messages, max_tokens=12, temperature=0.0).text
    return found


def prepare(folder: Path) -> Path:
    """The example model at 4 bits."""
    out = folder / "tiny"
    compress(EXAMPLE, out, CompressOptions(bits=4))
    (out / "chat_template.jinja").write_text(TEMPLATE)
    return out


async def measure(url: str, pid: int, expected: dict[str, str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Make all requests in five parts, and note the memory after each; few of them in one."""
    memory = []
    started = time.perf_counter()
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        load_ = Load(url, expected, random.Random(arguments.seed), client)
        parts = 5 if arguments.requests >= MEMORY_REQUESTS else 1
        for _ in range(parts):
            await run(load_, arguments.requests // parts, arguments.clients)
            if parts > 1:
                await fill(client, SLOTS)
            while (await client.get("/health")).json()["running"]:
                await asyncio.sleep(0.05)
            await asyncio.sleep(TRIM_S)
            memory.append(resident_bytes(pid))
            print(f"{sum(load_.statuses.values())} requests, {memory[-1] / 1e6:.1f} MB", flush=True)
        counters = (await client.get("/metrics")).text
    elapsed_s = time.perf_counter() - started
    failed = re.search(r"^entrollm_failed_total (\d+)$", counters, re.MULTILINE)
    expect(failed is not None and failed[1] == "0", "failed answers", counters)
    kinds = {f"{kind}, {status}": count for (kind, status), count in sorted(load_.statuses.items())}
    return {"requests": kinds, "memory_bytes": memory, "growth": memory[-1] / memory[0] - 1, "elapsed_s": elapsed_s}


def main() -> None:
    """Run, print what came, and end with JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = arguments.out or prepare(Path(folder))
        expected = answers_of(load(out)) if arguments.device == "cpu" else {}
        command = [sys.executable, "-m", "entrollm", "serve", str(out), "--port", "0", "--slots", str(SLOTS)]
        command += ["--device", arguments.device]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
            assert server.stderr is not None
            found_urls = (re.search(r"http://\S+?(?=/v1)", line) for line in server.stderr)
            url = next(filter(None, found_urls), None)
            try:
                assert url, "the server did not start"
                found = asyncio.run(measure(url[0], server.pid, expected, arguments))
                expect(server.poll() is None, "the server ended", server.returncode)
            finally:
                server.terminate()
                complaints = server.stderr.read()
        expect(server.returncode == 0 and not complaints, "the end of the server", complaints)
    for kind, count in found["requests"].items():
        print(f"{kind:24} {count:6}")
    print(f"memory grew by {found['growth']:.1%} from the first fifth to the end")
    finish(found, arguments.json)
    if arguments.requests >= MEMORY_REQUESTS:
        expect(found["growth"] <= MOST_GROWTH, "memory grew", found["growth"])


if __name__ == "__main__":
    main()
