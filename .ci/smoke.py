#!/usr/bin/env python
"""Check an installed wheel: compress the example model, verify it, compare it with its source, generate.

Usage: smoke.py MODEL. It needs the wheel and its dependencies alone, so that it runs wherever a wheel is made. Under an
emulator that the system does not start by itself, ENTROLLM_EMULATOR holds the words that go before a program.
"""

import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import entrollm

_PROMPT = "The history of the city"


def run(*arguments: str) -> str:
    """Run the command line of the installed package and return what it prints."""
    emulator = shlex.split(os.environ.get("ENTROLLM_EMULATOR", ""))
    command = [*emulator, sys.executable, "-m", "entrollm", *arguments]
    print("$ entrollm", *arguments, flush=True)
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8").stdout


def check(holds: bool, expectation: str) -> None:
    """End with an error unless what was expected holds; an assert would be skipped by python -O."""
    if not holds:
        sys.exit(f"smoke test failed: expected {expectation}")


def check_identity() -> None:
    """The version, where the package comes from, and what it runs on."""
    version = importlib.metadata.version("entrollm")
    printed = run("--version").strip()
    check(printed == f"entrollm {version}", f"--version to print {version}, found {printed!r}")
    sources = Path(__file__).resolve().parent.parent / "src"
    check(sources not in Path(entrollm.__file__).resolve().parents, "the installed package, found the source tree")
    facts: dict[str, Any] = json.loads(run("info", "--json"))
    check(facts["version"] == version, f"info to tell version {version}, found {facts['version']}")
    check(facts["isas"][facts["isa"]], f"this processor to run {facts['isa']}")
    print(f"entrollm {version}, Python {facts['python']}, {facts['system']}, {facts['isa']}")


def divergence(reference: Path, compressed: Path) -> float:
    """Mean KL divergence in nats of the predictions after each token of the prompt."""
    model, other = entrollm.load(reference), entrollm.load(compressed)
    check(model.tokenizer is not None, f"a tokenizer in {reference}")
    tokens = model.tokenizer.encode(_PROMPT).ids
    logits = [np.asarray(each.logits(tokens), np.float64) for each in (model, other)]
    p, q = (rows - np.log(np.exp(rows).sum(axis=-1, keepdims=True)) for rows in logits)
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def main() -> None:
    """Run every check on the model named on the command line."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    model = Path(sys.argv[1])
    check_identity()
    with tempfile.TemporaryDirectory(prefix="entrollm-smoke-") as folder:
        out = Path(folder) / "compressed"
        run("compress", str(model), "-o", str(out), "--bits", "4")
        run("compress", str(model), "-o", str(out), "--bits", "8", "--overwrite")
        run("verify", str(out), "--against", str(model))
        kl = divergence(model, out)
        check(0 <= kl < 0.02, f"an 8-bit model within 0.02 nats of its source, found {kl:.4f}")
        command = ("run", str(out), "-p", _PROMPT, "--max-tokens", "12", "--temperature", "0", "--json")
        first, again = (json.loads(run(*command)) for _ in range(2))
        check(first["text"] == again["text"] and first["text"].strip() != "", "the same text twice")
    print(f"KL {kl:.5f} nats; {_PROMPT!r} goes on {first['text']!r}")
    print("smoke test passed")


if __name__ == "__main__":
    main()
