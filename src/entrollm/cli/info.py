"""`entrollm info`: what this installation runs on."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

from entrollm.cli.console import JsonOption, print_json, stdout

EXAMPLES = (("entrollm info", "version, processor, instruction set"),)


def command(json_output: JsonOption = False) -> None:
    """Show the version, the processor, and the instruction set that the kernels use.

    ENTROLLM_ISA=scalar (or avx512) forces a set.
    """
    from entrollm import _core
    from entrollm.specs import FORMAT_VERSION
    from entrollm.threads import default_threads

    facts: dict[str, Any] = {
        "version": importlib.metadata.version("entrollm"),
        "format_version": FORMAT_VERSION,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "isa": _core.isa(),
        "threads": default_threads(),
    }
    if json_output:
        print_json(facts)
        return
    for key, value in facts.items():
        stdout.print(f"{key.replace('_', ' '):15} [bold]{value}[/bold]")
