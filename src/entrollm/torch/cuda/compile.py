"""Compile the kernels with NVRTC when they are first needed, and cache the result on disk."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import tempfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from entrollm.errors import UnsupportedError
from entrollm.torch.cuda.tuning import Capability, dotted, tuning_of

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


@dataclass(frozen=True)
class Target:
    """What kernels are compiled for.

    Attributes:
        capability: a compute capability.
        is_portable: whether they are compiled to PTX, which the driver translates for the GPU at hand.
    """

    capability: Capability
    is_portable: bool = False

    @classmethod
    def chosen(cls, capability: Capability) -> Target:
        """The target for a GPU: its own capability, or the older one that ENTROLLM_CUDA_TARGET names, as in "8.0".

        With the latter, kernels are those of the older GPUs, also in their use of shared memory, for tests.

        Raises:
            UnsupportedError: the variable names a newer capability than the GPU has, or none.
        """
        text = os.environ.get("ENTROLLM_CUDA_TARGET")
        if not text:
            return cls(capability)
        parts = re.fullmatch(r"(\d+)\.(\d)", text)
        named = (int(parts[1]), int(parts[2])) if parts else None
        if named is None or named > capability:
            raise UnsupportedError(
                f"ENTROLLM_CUDA_TARGET must be a compute capability up to that of the GPU, such as "
                f"{dotted(capability)}; it is {text!r}"
            )
        return cls(named, is_portable=named != capability)

    @property
    def architecture(self) -> str:
        """As compilers name it."""
        return f"sm_{self.capability[0]}{self.capability[1]}"


Macros = tuple[tuple[str, int], ...]
"""Names and values that the compiler defines."""


def kernel(source: str, name: str, target: Target, macros: Macros) -> Any:
    """Get the function `name` of kernels/`source`, compiled for the current device, as a cuda.core Kernel.

    Raises:
        UnsupportedError: the device is too old, or the compiler is missing or fails.
    """
    tuning_of(target.capability)
    check_installed()
    from cuda.core import ObjectCode

    code = _compiled(source, target, macros)
    return (ObjectCode.from_ptx(code) if target.is_portable else ObjectCode.from_cubin(code)).get_kernel(name)


@functools.cache
def _compiled(source: str, target: Target, macros: Macros) -> bytes:
    from cuda.bindings import nvrtc

    text = read_source(source)
    _, major, minor = nvrtc.nvrtcVersion()
    key = hashlib.sha256(repr((text, target, macros, major, minor)).encode()).hexdigest()[:32]
    path = cache_folder() / f"{Path(source).stem}-{key}.{'ptx' if target.is_portable else 'cubin'}"
    if path.is_file():
        return path.read_bytes()
    code = compile_source(text, target, macros)
    _write(path, code)
    return code


def compile_source(text: str, target: Target, macros: Macros) -> bytes:
    """Compile to a cubin, or to PTX for a portable target; no GPU is needed.

    Raises:
        UnsupportedError: NVRTC is missing, or rejects the source; the message has its log.
    """
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(
        arch=target.architecture,
        std="c++17",
        define_macro=[(name, str(value)) for name, value in macros] or None,
    )
    try:
        return bytes(Program(text, "c++", options).compile("ptx" if target.is_portable else "cubin").code)
    except Exception as error:  # cuda.core's own classes are private, and are no RuntimeErrors since version 1.1
        raise UnsupportedError(f"NVRTC cannot compile the GPU kernels: {error}") from error


def cache_folder() -> Path:
    """Where compiled kernels are cached: in ENTROLLM_CACHE, or in the folder `entrollm` of the user's cache."""
    chosen = os.environ.get("ENTROLLM_CACHE")
    if chosen:
        return Path(chosen) / "cuda"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "entrollm" / "cuda"


def read_source(name: str, seen: set[str] | None = None) -> str:
    """A source with the project's own headers included, each of them once."""
    seen = {name} if seen is None else seen
    text = (resources.files("entrollm.torch.cuda") / "kernels" / name).read_text(encoding="utf-8")

    def header(match: re.Match[str]) -> str:
        if match[1] in seen:
            return ""
        seen.add(match[1])
        return read_source(match[1], seen)

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
