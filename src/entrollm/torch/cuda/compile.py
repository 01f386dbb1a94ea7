"""Compile the kernels with NVRTC when they are first needed, and cache the result on disk."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

from entrollm.errors import UnsupportedError
from entrollm.torch.cuda.tuning import tuning_of

_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"$', re.MULTILINE)


def check_installed() -> None:
    """Check that the packages of the `cuda` extra can be imported.

    Raises:
        UnsupportedError: one is missing.
    """
    try:
        import cuda.bindings.nvrtc
        import cuda.core  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(f"the GPU kernels need {error.name}; install it: pip install 'entrollm[cuda]'") from None


def kernel(source: str, name: str, capability: tuple[int, int], macros: tuple[tuple[str, int], ...]) -> Any:
    """Get the function `name` of kernels/`source`, compiled for the current device, as a cuda.core Kernel.

    Raises:
        UnsupportedError: the device is too old, or the compiler is missing or fails.
    """
    tuning_of(capability)
    check_installed()
    from cuda.core import ObjectCode

    return ObjectCode.from_cubin(_cubin(source, capability, macros)).get_kernel(name)


@functools.cache
def _cubin(source: str, capability: tuple[int, int], macros: tuple[tuple[str, int], ...]) -> bytes:
    from cuda.bindings import nvrtc

    text = _read(source)
    _, major, minor = nvrtc.nvrtcVersion()
    key = hashlib.sha256(repr((text, capability, macros, major, minor)).encode()).hexdigest()[:32]
    path = cache_folder() / f"{Path(source).stem}-{key}.cubin"
    if path.is_file():
        return path.read_bytes()
    cubin = compile_source(text, capability, macros)
    _write(path, cubin)
    return cubin


def compile_source(text: str, capability: tuple[int, int], macros: tuple[tuple[str, int], ...]) -> bytes:
    """Compile to a cubin; no GPU is needed.

    Raises:
        UnsupportedError: NVRTC is missing, or rejects the source; the message has its log.
    """
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(
        arch=f"sm_{capability[0]}{capability[1]}",
        std="c++17",
        define_macro=[(name, str(value)) for name, value in macros] or None,
    )
    try:
        return bytes(Program(text, "c++", options).compile("cubin").code)
    except Exception as error:  # cuda.core's own classes are private, and are no RuntimeErrors since version 1.1
        raise UnsupportedError(f"NVRTC cannot compile the GPU kernels: {error}") from error


def cache_folder() -> Path:
    """Where compiled kernels are cached: in ENTROLLM_CACHE, or in the folder `entrollm` of the user's cache."""
    chosen = os.environ.get("ENTROLLM_CACHE")
    if chosen:
        return Path(chosen) / "cuda"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "entrollm" / "cuda"


def _read(name: str, seen: set[str] | None = None) -> str:
    """A source with the project's own headers included, each of them once."""
    seen = {name} if seen is None else seen
    text = (resources.files("entrollm.torch.cuda") / "kernels" / name).read_text(encoding="utf-8")

    def header(match: re.Match[str]) -> str:
        if match[1] in seen:
            return ""
        seen.add(match[1])
        return _read(match[1], seen)

    return _INCLUDE.sub(header, text).replace("#pragma once\n", "")


def _write(path: Path, content: bytes) -> None:
    """Write a whole file or none. A folder that cannot be written to costs one compilation per process."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content)
        Path(file.name).replace(path)
    except OSError:
        return
