"""`entrollm serve`: answer OpenAI's API over HTTP."""

from __future__ import annotations

import importlib.util
import ipaddress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from entrollm.cli.console import CacheTypeOption, CheckOption, MemoryOption, ThreadsOption, message, warn
from entrollm.cli.options import read_memory
from entrollm.cli.speculation import DraftOption, SpeculateOption, open_speculation

if TYPE_CHECKING:
    from entrollm.serve.engines import Engine

_MOST_SECONDS = 10**9

EXAMPLES = (
    ("entrollm serve OUT", "API at http://127.0.0.1:8000/v1, chat page at /"),
    ("entrollm serve OUT OUT2 --port 9000 --slots 16", "two models"),
    ("entrollm serve OUT --host 0.0.0.0 --api-key-file KEYS", "for other machines"),
    ("entrollm serve OUT --device cuda", "on a GPU, with transformers"),
    ("entrollm serve OUT --cache-type int8 --speculate ngram", "long contexts, and faster single answers"),
)


@dataclass(frozen=True)
class _OwnOptions:
    """Options of entrollm's own engine, as they are given."""

    threads: int | None
    memory: str
    cache_type: str
    speculate: str | None
    draft: str | None


_DEFAULTS = _OwnOptions(None, "auto", "f32", None, None)


def command(
    models: Annotated[
        list[str], typer.Argument(metavar="OUT...", help="Model folders or Hub ids.", show_default=False)
    ],
    host: Annotated[str, typer.Option("--host", metavar="HOST", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, metavar="PORT", help="0 takes a free one.")] = 8000,
    slots: Annotated[
        int, typer.Option("--slots", min=1, max=256, metavar="N", help="Answers that a model generates at a time.")
    ] = 8,
    context: Annotated[
        int, typer.Option("--context", min=2, metavar="N", help="Tokens of prompt and answer together, at most.")
    ] = 8192,
    queue: Annotated[
        int, typer.Option("--queue", min=1, metavar="N", help="Answers that may wait for a slot; then 429.")
    ] = 64,
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", metavar="KEYS", help="File with the keys of clients, one per line.")
    ] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", min=1, metavar="S", help="Seconds until an answer is given up.")
    ] = 600,
    grace: Annotated[
        float, typer.Option("--grace", min=0, metavar="S", help="Seconds for running answers after SIGTERM.")
    ] = 60,
    idle_release: Annotated[
        float | None,
        typer.Option("--idle-release", min=0, metavar="S", help="Release a model after so many seconds without use."),
    ] = None,
    tool_format: Annotated[
        str,
        typer.Option(
            "--tool-format",
            metavar="auto|none|hermes|qwen-coder|glm|llama|pythonic|mistral|deepseek|gemma|harmony",
            help="How the models write calls of tools; auto reads it off their chat templates.",
        ),
    ] = "auto",
    reasoning_format: Annotated[
        str,
        typer.Option(
            "--reasoning-format",
            metavar="auto|none|think|mistral|gemma",
            help="How they mark reasoning, which is then split off.",
        ),
    ] = "auto",
    device: Annotated[
        str, typer.Option("--device", metavar="DEVICE", help="cpu, or a device of torch such as cuda or cuda:1.")
    ] = "cpu",
    engine: Annotated[
        str,
        typer.Option(
            "--engine",
            metavar="auto|entrollm|transformers",
            help="What runs the models; auto takes entrollm's own engine on the CPU and transformers elsewhere.",
        ),
    ] = "auto",
    speculate: SpeculateOption = None,
    draft: DraftOption = None,
    threads: ThreadsOption = None,
    memory: MemoryOption = "auto",
    cache_type: CacheTypeOption = "f32",
    check: CheckOption = True,
) -> None:
    """Serve models over HTTP, with the API that OpenAI's clients speak, and a chat page.

    Several requests are answered at once, and prompts that begin like an earlier one are not read again. Of several
    models, the first is loaded at the start, and each of the others when a request first names it. The server needs
    the extra: pip install 'entrollm[serve]'. It listens on this machine only, unless --host says otherwise. SIGTERM or
    Ctrl-C lets running answers end; a second one stops at once.
    """
    from entrollm.errors import UnsupportedError

    for package in ("starlette", "pydantic", "uvicorn", "sse_starlette", "llguidance"):
        if importlib.util.find_spec(package) is None:
            raise UnsupportedError(f"{package} is missing; install it with: pip install 'entrollm[serve]'")
    from entrollm.serve.api import Settings
    from entrollm.serve.keys import read_keys
    from entrollm.serve.output.choose import check_formats
    from entrollm.serve.server import LoadOptions, open_models, serve

    keys = None if api_key_file is None else read_keys(api_key_file)
    for option, seconds in (("--timeout", timeout), ("--grace", grace), ("--idle-release", idle_release)):
        if seconds is not None and seconds > _MOST_SECONDS:
            raise ValueError(f"{option} should be at most {_MOST_SECONDS} seconds, got {seconds}")
    is_local = _is_loopback(host)
    if not is_local and keys is None:
        warn(f"{host} can be reached from other machines, and anyone there may use the models; add --api-key-file")
    check_formats(tool_format, reasoning_format)
    runs = _engine(engine, device, _OwnOptions(threads, memory, cache_type, speculate, draft), check=check)
    options = LoadOptions(slots, context, runs, tool_format, reasoning_format, idle_release)
    catalog = open_models(models, options)
    settings = Settings(queue_length=queue, timeout_s=timeout, local_only=is_local and keys is None)
    names = ", ".join(entry.name for entry in catalog.entries)
    serve(catalog, settings, keys, (host, port), grace, lambda url: message(f"serving {names} at {url}/v1"))


def _engine(name: str, device: str, own: _OwnOptions, *, check: bool) -> Engine:
    """What runs the models.

    Raises:
        ValueError: there is no such engine, or an option is not one of it.
        EntroLLMError: the draft model does not load.
    """
    from entrollm.serve.engines import CpuEngine

    if name not in ("auto", "entrollm", "transformers"):
        raise ValueError(f"--engine should be auto, entrollm or transformers; got {name!r}")
    if name == "entrollm" or (name == "auto" and device == "cpu"):
        if device != "cpu":
            raise ValueError(f"--engine entrollm runs on the CPU alone; leave it out for --device {device}")
        memory = read_memory(own.memory)
        if own.speculate == "mtp":
            raise ValueError("serve guesses by --speculate ngram or --draft MODEL; --speculate mtp is an option of run")
        speculate = open_speculation(own.speculate, own.draft, threads=own.threads, memory=memory, check=check)
        return CpuEngine(own.threads, memory, check, own.cache_type, speculate)
    for field in fields(own):
        if getattr(own, field.name) != getattr(_DEFAULTS, field.name):
            option = f"--{field.name.replace('_', '-')}"
            raise ValueError(f"{option} is an option of entrollm's own engine, and transformers runs these models")
    from entrollm.hf.serving import TransformersEngine

    return TransformersEngine(device, check)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
