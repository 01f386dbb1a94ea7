"""One process of a tensor-parallel run: loads the folders it is given and writes what they answer."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import entrollm.hf  # noqa: F401 (registers the quantization method)
from entrollm.errors import UnsupportedError
from entrollm.hf import CodedWeight
from tests.torch.models import ids


def main(out: Path, folders: list[Path]) -> None:
    torch.set_num_threads(1)
    results = {}
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, distributed_config=DistributedConfig(tp_size=2)
        )
        with torch.no_grad():
            logits = model(ids(batch=2)).logits
        tokens = model.generate(ids(), attention_mask=torch.ones_like(ids()), max_new_tokens=8, do_sample=False)
        weights = [module for module in model.modules() if isinstance(module, CodedWeight)]
        try:
            model.save_pretrained(out / "saved")
        except UnsupportedError as error:
            refusal = str(error)
        results[folder.parent.name] = {
            "logits": logits,
            "tokens": tokens,
            "shapes": {weight.name: tuple(weight.shape) for weight in weights if weight.entries()},
            "dense_bytes": sum(entry.nbytes for weight in weights for entry in weight.entries().values()),
            "refusal": refusal,
        }
    torch.save(results, out / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(argument) for argument in sys.argv[2:]])
