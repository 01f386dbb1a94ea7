"""`entrollm info`: show what this installation runs on."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import asdict
from typing import Any

from entrollm.cli.console import JsonOption, print_json, stdout

EXAMPLES = (
    ("entrollm info", "version, processor, instruction set and its speed"),
    ("entrollm info --json", "the same for scripts"),
)


def command(json_output: JsonOption = False) -> None:
    """Show the version, the processor, the instruction set that the kernels use, and its speed.

    The environment variable ENTROLLM_ISA selects another of the instruction sets listed, as in: ENTROLLM_ISA=scalar
    entrollm run ...
    """
    from entrollm import _core
    from entrollm.engine.measure import product_speed
    from entrollm.format.spec import FORMAT_VERSION
    from entrollm.report import format_rate
    from entrollm.threads import default_threads

    threads = default_threads()
    speed = product_speed(threads)
    facts: dict[str, Any] = {
        "version": importlib.metadata.version("entrollm"),
        "format_version": FORMAT_VERSION,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "isa": _core.isa(),
        "isas": dict(_core.isas()),
        "threads": threads,
        "product": asdict(speed),
    }
    if json_output:
        print_json(facts)
        return
    facts["isas"] = ", ".join(name if runs else f"{name} (not on this processor)" for name, runs in _core.isas())
    facts["product"] = (
        f"{format_rate(speed.weights_per_s, 1, 'weights')} decoded and multiplied from cache, "
        f"Gaussian weights on a 4-bit grid stored in {speed.coded_bits:.2f} bits"
    )
    for key, value in facts.items():
        stdout.print(f"{key.replace('_', ' '):15} [bold]{value}[/bold]")
