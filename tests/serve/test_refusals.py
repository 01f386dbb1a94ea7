"""Requests that are refused: each with a status, and a message that names what is wrong, in OpenAI's shape."""

from __future__ import annotations

import json
import socket
from typing import Any

import httpx
import pytest

from entrollm.serve.api import Settings
from entrollm.serve.keys import Keys
from tests.serve.conftest import Serve

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}


def refused(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a response, which must have OpenAI's shape."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        (TEXT, {}, "prompt", "the field prompt is missing"),
        (CHAT, {}, "messages", "the field messages is missing"),
        (TEXT, {"prompt": "x", "colour": 1}, "colour", "unknown field 'colour'; leave it out"),
        (TEXT, {"prompt": "x", "store": 0}, "store", "store is not supported here; leave it out"),
        (TEXT, {"prompt": "x", "best_of": 3}, "best_of", "best_of is not supported here; leave it out"),
        (TEXT, {"prompt": "x", "suffix": "y"}, "suffix", "suffix is not supported"),
        (CHAT, ASK | {"reasoning_effort": "low"}, "reasoning_effort", "tiny has no reasoning_effort"),
        (CHAT, ASK | {"modalities": ["text", "audio"]}, "modalities", "modalities is not supported"),
        (CHAT, ASK | {"prompt": "x"}, "prompt", "unknown field 'prompt'"),
        (TEXT, {"prompt": "x", "temperature": "hot"}, "temperature", "valid number, found 'hot'"),
        (TEXT, {"prompt": "x", "temperature": -1}, "temperature", "greater than or equal to 0, found -1"),
        (TEXT, {"prompt": "x", "temperature": 1e-5}, None, "temperature should be 0 or at least 0.001"),
        (TEXT, {"prompt": "x", "top_p": 1.5}, "top_p", "less than or equal to 1, found 1.5"),
        (CHAT, ASK | {"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        (TEXT, {"prompt": "x", "max_tokens": True}, "max_tokens", "valid integer, found True"),
        (TEXT, {"prompt": "x", "max_tokens": 1.5}, "max_tokens", "valid integer"),
        (TEXT, {"prompt": "x", "n": 10**6}, "n", "less than or equal to 16"),
        (TEXT, {"prompt": ["x"] * 64, "n": 2}, "n", "may ask for 64 answers, found 128"),
        (TEXT, {"prompt": "x", "seed": 2**70}, "seed", "seed"),
        (TEXT, {"prompt": "x", "presence_penalty": 3}, "presence_penalty", "less than or equal to 2"),
        (TEXT, {"prompt": "x", "stop": ""}, "stop.0", "at least 1 character"),
        (TEXT, {"prompt": "x", "stop": ["a"] * 17}, "stop", "at most 16 items"),
        (TEXT, {"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias", "map token ids to numbers, found 'a'"),
        (TEXT, {"prompt": "x", "logit_bias": {"99999": 1}}, None, "token 99999, which is outside the vocabulary"),
        (TEXT, {"prompt": "x", "logit_bias": {"5": 101}}, "logit_bias.5", "less than or equal to 100"),
        (TEXT, {"prompt": "x", "logprobs": 6}, "logprobs", "less than or equal to 5"),
        (TEXT, {"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options", "needs stream: true"),
        (TEXT, {"prompt": []}, "prompt", "should hold 1 to 64 prompts"),
        (TEXT, {"prompt": [1, "x"]}, "prompt", "should be a text, token ids, or a list of either"),
        (TEXT, {"prompt": 3}, "prompt", "should be a text, token ids"),
        (TEXT, {"prompt": [[]]}, "prompt", "should be a text, token ids"),
        (TEXT, {"prompt": None}, "prompt", "should be a text, token ids"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "valid string"),
        (TEXT, {"prompt": [99999]}, None, "token id 99999 is outside the vocabulary of 8192"),
        (TEXT, {"prompt": "bad \ud800"}, "prompt", "not valid Unicode"),
        (TEXT, {"prompt": "word " * 600}, "prompt", "leaves no room for an answer in a context of 512"),
        (CHAT, {"messages": [{"role": "user", "content": "word " * 600}]}, "messages", "leaves no room"),
        (CHAT, {"messages": []}, "messages", "at least 1 item"),
        (CHAT, {"messages": [{"content": "x"}]}, "messages.0.role", "the field messages.0.role is missing"),
        (CHAT, {"messages": [{"role": "king", "content": "x"}]}, "messages.0.role", "role"),
        (CHAT, {"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages.0.mood", "unknown field"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/etc/passwd"}}]}]},
            "messages.0.content.0.type",
            "should be 'text', found 'image_url'",
        ),
        (CHAT, ASK | {"top_logprobs": 3}, "top_logprobs", "needs logprobs: true"),
        (CHAT, ASK | {"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differ; give one of them"),
        (CHAT, ASK | {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "may not set messages"),
        ("/detokenize", {"tokens": [99999]}, "tokens", "token id 99999 is outside"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0", "greater than or equal to 0"),
        ("/tokenize", {"prompt": 5}, "prompt", "valid string"),
    ],
)
def test_bad_fields(client: httpx.Client, path: str, body: dict[str, Any], param: str | None, message: str) -> None:
    response = client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    error = refused(response, 400)
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b"\xff\xfe{}",
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b'{"\\ud800": 1}',
    ],
)
def test_bodies_that_are_not_valid(client: httpx.Client, body: bytes) -> None:
    for path in (CHAT, TEXT, "/tokenize", "/detokenize"):
        refused(client.post(path, content=body, headers={"content-type": "application/json"}), 400)


def test_fields_that_change_nothing_are_taken(client: httpx.Client) -> None:
    body = ASK | {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "n": None, "tools": []}
    body |= {"max_tokens": 2, "parallel_tool_calls": True, "response_format": {"type": "text"}, "logit_bias": None}
    assert client.post(CHAT, json=body).status_code == 200


def test_other_content_types(client: httpx.Client) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        error = refused(client.post(TEXT, content=b'{"prompt": "x"}', headers={"content-type": kind}), 415)
        assert "Content-Type: application/json" in error["message"]


def test_paths_and_methods(client: httpx.Client) -> None:
    assert refused(client.get("/nothing"), 404)["type"] == "not_found_error"
    refused(client.get("/../../etc/passwd"), 404)
    refused(client.get("/v1/models/..%2f..%2fetc%2fpasswd"), 404)
    refused(client.get(TEXT), 405)
    refused(client.post("/v1/models", json={}), 405)
    refused(client.post("/health", content=b"\xff"), 405)


def test_no_other_origin_is_let_in(client: httpx.Client) -> None:
    headers = {"origin": "https://example.com", "access-control-request-method": "POST"}
    assert client.options(TEXT, headers=headers).status_code == 405
    response = client.get("/v1/models", headers=headers)
    assert not any(name.startswith("access-control") for name in response.headers)


def test_other_hosts_are_refused_on_loopback(client: httpx.Client) -> None:
    for host in ("attacker.example", "attacker.example:8000", "127.0.0.1.attacker.example", "", "[2001:db8::1]"):
        assert "localhost only" in refused(client.get("/v1/models", headers={"host": host}), 403)["message"]
    for host in ("localhost", "LocalHost:1", "127.0.0.1", "127.8.8.8:80", "[::1]:9"):
        assert client.get("/v1/models", headers={"host": host}).status_code == 200


def test_long_bodies(serve: Serve) -> None:
    running = serve(settings=Settings(max_body_bytes=1000))
    with httpx.Client(base_url=running.url, timeout=20) as client:
        content = b'{"prompt": "' + b"x" * 2000 + b'"}'
        error = refused(client.post(TEXT, content=content, headers={"content-type": "application/json"}), 413)
        assert "longer than 1000 bytes" in error["message"]
        # A client that writes all of its body before it reads gets the answer, too.
        host, port = running.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            head = b"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: 10000000"
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\n" + head + b"\r\n\r\n" + b"x" * 10**7)
            assert b" 413 " in connection.recv(1000)
        # Without a length, the body is counted.
        chunks = (content[i : i + 100] for i in range(0, len(content), 100))
        refused(client.post(TEXT, content=chunks, headers={"content-type": "application/json"}), 413)
        for length, status in ((b"9" * 18, b" 413 "), (b"-1", b" 400 "), (b"x", b" 400 ")):
            host, port = running.url.removeprefix("http://").split(":")
            with socket.create_connection((host, int(port)), timeout=20) as connection:
                head = b"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: " + length
                connection.sendall(b"POST /v1/completions HTTP/1.1\r\n" + head + b"\r\n\r\n{}")
                assert status in connection.recv(1000)
        assert client.post(TEXT, json={"prompt": "x", "max_tokens": 1}).status_code == 200
    running.stop()


def test_keys(serve: Serve) -> None:
    running = serve(settings=Settings(local_only=False), keys=Keys(["right", "other"]))
    with httpx.Client(base_url=running.url, timeout=20) as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "right"}):
            for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
                assert refused(client.get(path, headers=headers), 401)["code"] == "invalid_api_key"
            refused(client.post(TEXT, json={"prompt": "x"}, headers=headers), 401)
        assert client.get("/health").status_code == 200
        assert client.get("/").status_code == 200
        client.headers["authorization"] = "Bearer other"
        assert client.get("/v1/models").status_code == 200
        assert client.post(TEXT, json={"prompt": "x", "max_tokens": 1}).status_code == 200
    running.stop()
