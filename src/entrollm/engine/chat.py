"""Chat templates: the jinja programs that models ship to lay out a dialogue."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from entrollm.errors import EntroLLMError, FormatError

Message = Mapping[str, object]

_WORKER = Path(__file__).with_name("template_worker.py")
_MEMORY_BYTES = 1 << 29
_SECONDS = 10.0


class ChatTemplate:
    """A chat template; it runs in a sandbox, in a process with limits, since it comes with the model.

    The process starts with the first dialogue and ends with this object. Safe to use from several threads, and after a
    fork.

    Args:
        text: the jinja source.
        source: the file it came from, for messages.
        special_tokens: bos_token, eos_token and so on, which the template can name.
        seconds: how long one dialogue may take.
    """

    def __init__(self, text: str, source: str, special_tokens: Mapping[str, str], *, seconds: float = _SECONDS) -> None:
        self._text = text
        self._source = source
        self._special_tokens = dict(special_tokens)
        self._seconds = seconds
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[str] | None = None
        self._owner = os.getpid()

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: object) -> str:
        """Lay a dialogue out as text.

        Args:
            messages: each with a "role" and, usually, a "content"; JSON values.
            add_generation_prompt: end with the beginning of an answer.
            variables: more names for the template, such as enable_thinking; JSON values.
        Raises:
            TypeError: messages is not a sequence of mappings with a string "role", or a value is not one of JSON's.
            ValueError: there are no messages, or the template refuses them.
            FormatError: the template is not valid jinja, fails, or takes too much time or memory.
            EntroLLMError: the process does not start.
        """
        _check_messages(messages)
        names = {**self._special_tokens, "tools": None, "documents": None, **variables}
        names |= {"messages": [dict(message) for message in messages], "add_generation_prompt": add_generation_prompt}
        answer = self._ask(json.dumps(names))
        if "refused" in answer:
            raise ValueError(f"{self._source}: the chat template refuses these messages: {answer['refused']}")
        if "invalid" in answer:
            raise FormatError(f"{self._source}: the chat template is not valid: {answer['invalid']}")
        if "failed" in answer:
            raise FormatError(f"{self._source}: the chat template failed: {answer['failed']}")
        return answer["text"]

    def _ask(self, request: str) -> dict[str, str]:
        """What the process answers; it is killed when it takes too long."""
        if self._owner != os.getpid():  # the process belongs to the parent of a fork
            self._lock, self._worker, self._owner = threading.Lock(), None, os.getpid()
        with self._lock:
            if self._worker is None or self._worker.poll() is not None:
                self._worker = self._start()
            worker = self._worker
            assert worker.stdin is not None and worker.stdout is not None
            late = threading.Event()

            def stop() -> None:
                late.set()
                worker.kill()

            timer = threading.Timer(self._seconds, stop)
            timer.start()
            try:
                worker.stdin.write(request + "\n")
                worker.stdin.flush()
                answer = worker.stdout.readline()
            except BrokenPipeError:
                answer = ""
            finally:
                timer.cancel()
            if answer.endswith("\n"):
                found: dict[str, str] = json.loads(answer)
                return found
            _end(worker)
            self._worker = None
        reason = f"it took more than {self._seconds:g} seconds" if late.is_set() else "it ended the process that ran it"
        return {"failed": reason}

    def _start(self) -> subprocess.Popen[str]:
        # Isolated: the folder of this package must not hide modules of the standard library.
        command = [sys.executable, "-I", "-X", "utf8", str(_WORKER)]
        worker = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8"
        )
        assert worker.stdin is not None and worker.stdout is not None
        first: dict[str, Any] = {"path": sys.path, "template": self._text, "memory_bytes": _MEMORY_BYTES}
        try:
            worker.stdin.write(json.dumps(first) + "\n")
            worker.stdin.flush()
            is_ready = worker.stdout.readline() != ""
        except BrokenPipeError:
            is_ready = False
        if not is_ready:
            _end(worker)
            raise EntroLLMError(f"{self._source}: {sys.executable} does not start; it runs chat templates")
        return worker

    def __del__(self) -> None:
        if self._worker is not None and self._owner == os.getpid():
            _end(self._worker)


def _end(worker: subprocess.Popen[str]) -> None:
    worker.kill()
    for stream in (worker.stdin, worker.stdout):
        if stream is not None:
            with contextlib.suppress(BrokenPipeError):
                stream.close()
    worker.wait()


def _check_messages(messages: Sequence[Message]) -> None:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise TypeError(f"messages should be a list of {{'role': ..., 'content': ...}}, got {type(messages).__name__}")
    if not messages:
        raise ValueError("messages should not be empty")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TypeError(f"each message should be a mapping with a string 'role', got {message!r}")
