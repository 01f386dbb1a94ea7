"""Train a second small model, with rows that are multiples of 256, to say what the example model says.

    python benchmarks/train_student.py examples/tiny-llama --text TEXT -o STUDENT

The student has another shape than its teacher (fewer, wider layers and an output head of its own) and begins with its
embedding, turned at random; everything else is learned from the teacher's predictions on the text. It is there for
quality.py: llama.cpp's k-quants take rows of 256 weights, which the example model does not have, and what was fitted
to one model should hold for another.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

WINDOW, BATCH, STEPS, WARM_UP = 256, 16, 1239, 100
RATE, LEAST_RATE = 2e-3, 0.05
# Tensors of 128 MB come and go at every step; returning them to the system costs two thirds of the time.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "8000000000", "MALLOC_TRIM_THRESHOLD_": "16000000000"}


def new_student(teacher: LlamaForCausalLM) -> LlamaForCausalLM:
    """A model of 21 M weights with the teacher's embedding in 512 columns."""
    config = LlamaConfig(
        vocab_size=teacher.config.vocab_size,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=teacher.config.bos_token_id,
        eos_token_id=teacher.config.eos_token_id,
        rms_norm_eps=1e-5,
    )
    student = LlamaForCausalLM(config)
    turn, _ = torch.linalg.qr(torch.randn(config.hidden_size, teacher.config.hidden_size))
    embedding = teacher.model.embed_tokens.weight.float() @ turn.T
    with torch.no_grad():
        student.model.embed_tokens.weight.copy_(embedding)
        student.lm_head.weight.copy_(embedding * 0.5)
    return student


def train(student: LlamaForCausalLM, teacher: LlamaForCausalLM, windows: torch.Tensor, steps: int) -> None:
    """Lower the KL divergence from the teacher, one token's prediction like another."""
    matrices = [parameter for parameter in student.parameters() if parameter.dim() == 2]
    vectors = [parameter for parameter in student.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), fused=True)
    order = torch.randperm(len(windows))
    begin, place, mean = time.perf_counter(), 0, 0.0
    for step in range(steps):
        if place + BATCH > len(windows):
            order, place = torch.randperm(len(windows)), 0
        tokens = windows[order[place : place + BATCH]]
        place += BATCH
        cosine = LEAST_RATE + (1 - LEAST_RATE) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / WARM_UP) * cosine
        with torch.no_grad():
            wanted = teacher(tokens).logits.float().log_softmax(-1)
        with torch.autocast("cpu", torch.bfloat16):
            logits = student(tokens).logits
        found = logits.float().log_softmax(-1)
        loss = functional.kl_div(found, wanted, log_target=True, reduction="none").sum(-1).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        mean = loss.item() if step == 0 else 0.98 * mean + 0.02 * loss.item()
        if step % 50 == 0:
            print(f"step {step}, {time.perf_counter() - begin:.0f} s: KL divergence {mean:.3f}", flush=True)


def main() -> None:
    """Train and save in bfloat16."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--output", "-o", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    if not _KEEP_MEMORY.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **_KEEP_MEMORY})
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(arguments.teacher)
    ids = tokenizer(arguments.text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    windows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).reshape(-1, WINDOW)
    teacher = AutoModelForCausalLM.from_pretrained(arguments.teacher, dtype=torch.bfloat16).eval()
    student = new_student(teacher)
    train(student, teacher, windows, arguments.steps)
    student.to(torch.bfloat16).save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
