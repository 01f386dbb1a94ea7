"""GPU memory and time of loading a compressed random model of a published shape with transformers.

    python benchmarks/cuda/load.py --json results.json

The weights are random, so what the model says means nothing; its size, and what loading takes, are those of its shape.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from calibrate import write_model
from transformers import AutoModelForCausalLM

from entrollm.compress import CodingOptions, Target, compress_folder
from entrollm.hf import CodedWeight
from gemv import commit

PROMPT_TOKENS = 2048


class Peak:
    """GPU memory and seconds of one step."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._begin = time.perf_counter()

    def read(self) -> dict[str, float]:
        """Since the beginning of the step."""
        torch.cuda.synchronize()
        return {
            "seconds": time.perf_counter() - self._begin,
            "peak_bytes": torch.cuda.max_memory_allocated(),
            "held_bytes": torch.cuda.memory_allocated(),
        }


def run(folder: Path, layers: int, bits: float) -> dict[str, Any]:
    """Compress, load, and answer a token and a prompt, in an empty folder."""
    model_folder = folder / "model"
    model_folder.mkdir()
    write_model(model_folder, layers)
    torch.cuda.empty_cache()
    begin = time.perf_counter()
    result = compress_folder(model_folder, folder / "out", CodingOptions(target=Target(bits_per_weight=bits)))
    found: dict[str, Any] = {"compress_seconds": time.perf_counter() - begin}
    found |= {"weights": result.weights, "file_bytes": result.file_bytes, "file_bits": result.file_bits}
    begun = Peak()
    model = AutoModelForCausalLM.from_pretrained(folder / "out", device_map="cuda", dtype=torch.bfloat16)
    found["load"] = begun.read()
    token = torch.ones(1, 1, dtype=torch.long, device="cuda")
    begun = Peak()
    with torch.no_grad():
        model(token, use_cache=False)
    found["first_token"] = begun.read()
    coded = [module for module in model.modules() if isinstance(module, CodedWeight)]
    found["layout_bytes"] = sum(weight.matrix().size_bytes for weight in coded)
    found["largest_layer_bytes"] = 2 * max(weight.shape.numel() for weight in coded)
    begun = Peak()
    with torch.no_grad():
        model(token.expand(1, PROMPT_TOKENS), use_cache=False, logits_to_keep=1)
    found["prompt"] = begun.read()
    return found


def main() -> None:
    """Run, and print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--bits", type=float, default=2.4)
    parser.add_argument("--folder", type=Path, help="where the model goes for the time of the run")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = run(Path(folder), arguments.layers, arguments.bits)
    found = {"device": torch.cuda.get_device_name(), "commit": commit(), "layers": arguments.layers, **found}
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
