"""One process of two that share a model on two GPUs; writes what it answers."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import entrollm.hf  # noqa: F401 (registers the quantization method)


def main(folder: Path, out: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, distributed_config=DistributedConfig(tp_size=2)
    )
    tokens = torch.arange(2, 22, device=model.device)[None]
    with torch.no_grad():
        logits = model(tokens).logits
    found = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=16, do_sample=False)
    answer = {"logits": logits.cpu(), "tokens": found.cpu(), "device": str(model.device)}
    torch.save(answer, out / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
