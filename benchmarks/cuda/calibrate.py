"""Calibrate and compress a random model of a published shape on a GPU, timed by phase.

    python benchmarks/cuda/calibrate.py --json results.json
    torchrun --nproc-per-node 2 benchmarks/cuda/calibrate.py --json results.json

The weights are random: what takes the time is the same, and quality means nothing. Half of the windows are random
tokens, which stand for a text, and half the model writes itself, as `entrollm compress --calibration FILE` has it.
With torchrun, GPUs share the calibration; the first process reports.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from entrollm.calibrate import DEFAULT_WINDOWS, follow, measure, sample_windows
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.compress import CodingOptions, Target, compress_folder
from entrollm.compress.progress import CompressProgress
from entrollm.processes import ALONE, Group, is_shared
from entrollm.torch.device import TorchDevice
from entrollm.torch.group import TorchGroup
from gemv import commit

CONFIG = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
}
WINDOW = 512


class Record:
    """Seconds by phase and other figures; written after each phase, so that a run that is cut short tells of them.

    Args:
        path: the file; None to write none.
        speaks: whether to print as well.
    """

    def __init__(self, path: Path | None, speaks: bool) -> None:
        self._path = path
        self._speaks = speaks
        self._started = time.perf_counter()
        self.figures: dict[str, Any] = {"device": torch.cuda.get_device_name(), "commit": commit(), "seconds": {}}

    def phase(self, name: str) -> None:
        """End a phase."""
        torch.cuda.synchronize()
        now = time.perf_counter()
        self.figures["seconds"][name] = round(now - self._started, 2)
        self.figures["gpu_peak_bytes"] = torch.cuda.max_memory_allocated()
        self._started = now
        if self._speaks:
            print(name, self.figures["seconds"][name], flush=True)
        self.write()

    def write(self) -> None:
        """Write what is known."""
        if self._path is not None:
            self._path.write_text(json.dumps(self.figures, indent=1) + "\n")


def write_model(folder: Path, layers: int) -> None:
    """A checkpoint in bfloat16 whose rows have unlike sizes, one file for each layer."""
    torch.manual_seed(0)
    hidden, inner, vocabulary = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    assert isinstance(hidden, int)
    assert isinstance(inner, int)
    assert isinstance(vocabulary, int)
    square, wide = (hidden, hidden), (inner, hidden)
    matrices = {f"self_attn.{name}_proj": square for name in "qkvo"}
    matrices |= {"mlp.gate_proj": wide, "mlp.up_proj": wide, "mlp.down_proj": (hidden, inner)}
    norms = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (hidden,))
    files: list[dict[str, tuple[int, ...]]] = [
        {f"model.layers.{index}.{name}.weight": shape for name, shape in {**matrices, **norms}.items()}
        for index in range(layers)
    ]
    table = (vocabulary, hidden)
    files.append({"model.embed_tokens.weight": table, "lm_head.weight": table, "model.norm.weight": (hidden,)})
    places = {}
    for number, shapes in enumerate(files):
        file = f"model-{number:05d}.safetensors"
        places |= dict.fromkeys(shapes, file)
        save_file({name: _random(shape) for name, shape in shapes.items()}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))


def _random(shape: tuple[int, ...]) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    sizes = torch.randn(shape[0], 1, device="cuda").mul(0.3).exp() * shape[1] ** -0.5
    return (torch.randn(shape, device="cuda") * sizes).bfloat16().cpu()


def run(folder: Path, layers: int, bits: float, record: Record, group: Group) -> None:
    """All phases, in an empty folder of this process; the first one writes the model."""
    model = group.from_first(folder / "model")
    statistics_folder = folder / "statistics"
    statistics_folder.mkdir()
    if group.rank == 0:
        model.mkdir()
        write_model(model, layers)
    group.from_first(None)
    record.phase("write the model")
    device = TorchDevice("cuda", group)
    with Checkpoint.open(model) as checkpoint:
        shape = (DEFAULT_WINDOWS, WINDOW)
        written = sample_windows(checkpoint, shape, device=device)
        torch.cuda.empty_cache()
        record.phase("let it write")
        text = np.random.default_rng(0).integers(0, CONFIG["vocab_size"], shape)

        def progress(done: float, total: float) -> None:
            if done == total / 2:
                record.phase("forward")

        statistics = measure(checkpoint, np.concatenate([text, written]), statistics_folder, progress, device)
        record.phase("backward")
    if group.rank:
        follow(model, statistics)
        return
    kept = sum(file.stat().st_size for file in statistics_folder.iterdir())
    record.figures |= {"windows": 2 * DEFAULT_WINDOWS, "tokens": WINDOW, "statistics_bytes": kept}

    once = threading.Lock()  # several threads report

    def first(progress: CompressProgress) -> None:
        if once.acquire(blocking=False):
            record.phase("rates and first matrix")

    options = CodingOptions(target=Target(bits_per_weight=bits))
    result = compress_folder(model, folder / "out", options, statistics=statistics, on_progress=first)
    group.from_first(None)
    record.phase("quantize and code")
    names = ("weights", "file_bytes", "file_bits", "entropy_bits", "huffman_bits", "coded_bits")
    record.figures |= {name: getattr(result, name) for name in names}


def main() -> None:
    """Run, and print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--bits", type=float, default=3.0)
    parser.add_argument("--folder", type=Path, help="where the model and the statistics go for the time of the run")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    group = ALONE
    if is_shared():
        shared = TorchGroup("cuda")
        shared.open()
        group = shared
    is_first = group.rank == 0
    record = Record(arguments.json if is_first else None, is_first)
    shape = {name: CONFIG[name] for name in ("hidden_size", "intermediate_size", "vocab_size")}
    record.figures |= {"layers": arguments.layers, **shape, "cores": os.cpu_count(), "gpus": group.size}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        run(Path(folder), arguments.layers, arguments.bits, record, group)
    group.close()
    if not is_first:
        return
    seconds = record.figures["seconds"]
    record.figures["minutes"] = (sum(seconds.values()) - seconds["write the model"]) / 60
    record.write()
    print(json.dumps(record.figures, indent=1))


if __name__ == "__main__":
    main()
