"""Configuration and token ids of GGUF files, against llama.cpp's own; skipped without llama-cpp-python.

The other project runs in a process of its own, with the interpreter that LLAMACPP_PYTHON names, or this one.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

from entrollm.checkpoint.gguf_splits import SPLITS
from entrollm.checkpoint.gguf_tokenizer import convert_tokenizer
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.engine.load import load
from tests.checkpoint.gguf_layers import LAYERED
from tests.checkpoint.gguf_random import random_model
from tests.checkpoint.test_gguf_metadata import scaling
from tests.checkpoint.test_gguf_tokenizer import TEXTS, merges_of, trained, values_of

PYTHON = os.environ.get("LLAMACPP_PYTHON", sys.executable)
ASK = """
import json, sys
import llama_cpp
from llama_cpp import Llama

path, texts, ids = json.load(sys.stdin)
model = Llama(path, n_ctx=64, verbose=False, logits_all=True, n_threads=1)
raw = llama_cpp.llama_model_get_vocab(model.model)
found = {
    "layers": llama_cpp.llama_model_n_layer(model.model),
    "hidden": llama_cpp.llama_model_n_embd(model.model),
    "heads": llama_cpp.llama_model_n_head(model.model),
    "kv_heads": llama_cpp.llama_model_n_head_kv(model.model),
    "context": llama_cpp.llama_model_n_ctx_train(model.model),
    "rows": llama_cpp.llama_vocab_n_tokens(raw),
    "bos": llama_cpp.llama_vocab_bos(raw),
    "eos": llama_cpp.llama_vocab_eos(raw),
    "ends": [i for i in range(llama_cpp.llama_vocab_n_tokens(raw)) if llama_cpp.llama_vocab_is_eog(raw, i)],
    "tokens": [model.tokenize(text.encode(), add_bos=True, special=True) for text in texts],
}
if ids:
    model.eval(ids)
    found["logits"] = model.scores[: len(ids)].tolist()
print("FOUND" + json.dumps(found))
"""


@functools.cache
def is_installed() -> bool:
    """Whether the other project can be asked."""
    done = subprocess.run([PYTHON, "-c", "import llama_cpp"], capture_output=True)
    return done.returncode == 0


pytestmark = pytest.mark.skipif(not is_installed(), reason="llama-cpp-python is not installed")


def ask(path: Path, texts: list[str], ids: list[int]) -> dict[str, Any]:
    given = json.dumps([str(path), texts, ids])
    done = subprocess.run([PYTHON, "-c", ASK], input=given, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.partition("FOUND")[2])
    return found


def check_config(path: Path, found: dict[str, Any]) -> None:
    with Checkpoint.open(path) as checkpoint:
        config = checkpoint.config
    ours = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
    theirs = ("layers", "hidden", "heads", "rows")
    assert [config[key] for key in ours] == [found[key] for key in theirs]
    # The first layer's, which may have none.
    assert found["kv_heads"] in (0, config["num_key_value_heads"])
    assert config["max_position_embeddings"] == found["context"]
    if config["bos_token_id"] is not None:
        assert config["bos_token_id"] == found["bos"]
    ends = config["eos_token_id"]
    assert sorted(ends if isinstance(ends, list) else [ends]) == found["ends"]


def unsplit(texts: list[str]) -> Tokenizer:
    """A tokenizer whose merges go across words, so that its tokens tell how text was split."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts * 3, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return tokenizer


# Words that begin and end in the middle of others, runs of digits, marks, spaces and line ends.
SPLIT_TEXTS = [
    "camelCase HTTPServer iPhone's DON'T don'tStop we'll O'Reilly",
    "1 22 333 4444 55555 3.14159 $1,234.56 x2y3 2nd",
    "a/b//c path/to/file.txt\n/etc/hosts\n\n  if (x != y) {\n\treturn;\n}\r\n",
    "wait...\n\n\nwhat?!\n  - item\n  - item \n \n end  ",
    "na\u00efve caf\u00e9 \u00fcbermut \u65e5\u672c\u8a9e\u3001\u4e2d\u6587 \U0001f600\U0001f680 \u00a35 \u20ac7",
]


@pytest.mark.parametrize(
    ("pre", "add_bos"),
    [*((pre, None) for pre in SPLITS), ("llama-bpe", True), ("llama-bpe", False), ("gpt-2", True), ("gpt-2", False)],
)
def test_byte_level_tokenizers(pre: str, add_bos: bool | None, tmp_path: Path) -> None:
    # Qwen's own tokenizer composes characters first, and so does the converted one; llama.cpp leaves that out.
    texts = [text for text in (*TEXTS, *SPLIT_TEXTS) if text and "\u0301" not in text]
    original = unsplit(texts)
    values = values_of(original, "gpt2", pre=pre, merges=merges_of(original), add_bos_token=add_bos)
    rows = len(values["tokenizer.ggml.tokens"])
    path = tmp_path / "model.gguf"
    path.write_bytes(random_model(values, rows).to_bytes())
    found = ask(path, texts, [])
    check_config(path, found)
    tokenizer = Tokenizer.from_str(convert_tokenizer(path)["tokenizer.json"])
    assert [tokenizer.encode(text).ids for text in texts] == found["tokens"]


@pytest.mark.parametrize(
    ("last", "roles"),
    [
        ((), {"eos": 7}),
        ((), {"eos": 7, "eot": 8, "eom": 9}),
        (("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"), {"eos": -3}),
        (("<|endoftext|>", "<|im_start|>", "<|im_end|>"), {"eos": -1}),
        (("<|endoftext|>", "<|fim_prefix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"), {"eos": -5}),
        (("<|return|>", "<|call|>", "<|end|>"), {"eos": 7}),
        (("<|calls|>", "<|flush|>", "<|end|>"), {"eos": 7}),
        (("<end_of_turn>", "<eos>"), {"eos": 7, "fim_sep": 12}),
        (("<|tool_response>",), {"eos": 7}),
        (("<EOT>", "[EOT]", "[EOS]", "[e~[", "[PAD]"), {"eos": 7}),
    ],
)
def test_end_tokens(last: tuple[str, ...], roles: dict[str, int], tmp_path: Path) -> None:
    original = trained("gpt-2")
    values = values_of(original, "gpt2", pre="gpt-2", merges=merges_of(original))
    tokens = [*values["tokenizer.ggml.tokens"], *last]
    types = [*values["tokenizer.ggml.token_type"], *(3 for _ in last)]
    values |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    values |= {f"tokenizer.ggml.{role}_token_id": number % len(tokens) for role, number in roles.items()}
    path = tmp_path / "model.gguf"
    path.write_bytes(random_model(values, len(tokens)).to_bytes())
    check_config(path, ask(path, [], []))


@pytest.mark.parametrize("begins", [True, False])
def test_sentence_piece_tokenizers(begins: bool, tmp_path: Path) -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["on", "▁t", "im", "er", "ime", "▁time", "▁up", "▁upon", "▁th", "▁the", "▁there", "▁w"]
    scores = [0.0] * 259 + [float(-i) for i in range(12)]
    characters = sorted(set("▁Onceupatim,hrws.dol"))
    scores += [-100.0 - i for i in range(len(characters))]
    pieces += characters
    values = {
        "model": "llama",
        "tokens": pieces,
        "scores": scores,
        "token_type": [2, 3, 3, *(6 for _ in range(256)), *(1 for _ in pieces[259:])],
        "add_space_prefix": begins,
    }
    path = tmp_path / "model.gguf"
    path.write_bytes(random_model({f"tokenizer.ggml.{key}": v for key, v in values.items()}, len(pieces)).to_bytes())
    texts = ["Once upon a time, there was a child.", "time", " time", "there  there", "é"]
    found = ask(path, texts, [])
    tokenizer = Tokenizer.from_str(convert_tokenizer(path)["tokenizer.json"])
    assert [tokenizer.encode(text).ids for text in texts] == found["tokens"]


@pytest.mark.parametrize(
    ("architecture", "values"),
    [
        ("llama", {}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("gemma", {}),
        ("gemma2", {"llama.attention.sliding_window": 12, "llama.attn_logit_softcapping": 5.0}),
        ("gemma3", {"llama.attention.sliding_window": 12, "llama.final_logit_softcapping": 3.0}),
        ("gemma3", {**scaling(type="linear", factor=4.0), "llama.rope.freq_base": 1e6}),
        ("granite", {"llama.attention.scale": 0.25, "llama.logit_scale": 4.0}),
        ("granite", {"llama.embedding_scale": 3.0, "llama.residual_scale": 0.5, "llama.logit_scale": 1.0}),
        ("smollm3", {}),
        ("olmo2", {}),
        ("seed_oss", {}),
        ("qwen2moe", {}),
        ("qwen3moe", {}),
        ("olmoe", {}),
        ("gpt-oss", {"llama.attention.sliding_window": 12, "llama.attention.key_length": 32}),
        ("phi3", {"llama.rope.dimension_count": 16}),
        ("glm4", {"llama.rope.dimension_count": 16}),
        *((name, {}) for name in LAYERED if name != "phimoe"),
        ("llama", {"llama.rope.scale_linear": 4.0}),
        ("llama", scaling(factor=4.0)),
        ("llama", scaling(type="none", factor=4.0)),
        ("qwen2", scaling(type="yarn", factor=4.0, original_context_length=32)),
        ("qwen3", scaling(type="yarn", factor=4.0, original_context_length=64)),
        ("llama", scaling(type="yarn", factor=2.0)),
        ("qwen2", scaling(type="yarn", factor=4.0, original_context_length=32, attn_factor=0.8)),
    ],
)
def test_logits(architecture: str, values: dict[str, Any], tmp_path: Path) -> None:
    original = trained("gpt-2")
    named = values_of(original, "gpt2", pre="gpt-2", merges=merges_of(original)) | values
    rows = len(named["tokenizer.ggml.tokens"])
    path = tmp_path / "model.gguf"
    path.write_bytes(random_model(named, rows, architecture).to_bytes())
    ids = np.random.default_rng(9).integers(5, rows, 48).tolist()
    found = ask(path, [], ids)
    check_config(path, found)
    theirs, ours = np.array(found["logits"]), load(path).logits(ids)
    # llama.cpp keeps keys and values in 16 bits.
    assert np.abs(theirs - ours).max() < 0.03 * theirs.std()


def test_phimoe_but_for_its_norms_and_experts(tmp_path: Path) -> None:
    """llama.cpp has neither the mean of the norms of Phi-3.5-MoE nor its weights of experts, which are 1 far apart."""
    original = trained("gpt-2")
    named = values_of(original, "gpt2", pre="gpt-2", merges=merges_of(original))
    rows = len(named["tokenizer.ggml.tokens"])
    source = random_model(named, rows, "phimoe")
    generator = np.random.default_rng(4)
    theirs = []
    for index, (name, shape, kind, content) in enumerate(source.tensors):
        array = np.frombuffer(content, np.float32).reshape(shape).copy()
        factor = 1
        if name == "token_embd.weight":
            array -= array.mean(axis=1, keepdims=True)  # all that norms read has no mean
        elif "attn_output" in name:
            array -= array.mean(axis=0)
        elif "ffn_gate_inp" in name:
            array = np.outer([1, -1, 0.5, -0.5], generator.standard_normal(shape[1])).astype(np.float32)
        elif "_exps" in name:
            array[2:] = array[:2]  # the experts that are chosen together
            if "down" in name:
                array -= array.mean(axis=1, keepdims=True)
                factor = 2
        source.tensors[index] = (name, shape, kind, array.tobytes())
        theirs.append((name, shape, kind, (factor * array).tobytes()))
    (tmp_path / "ours.gguf").write_bytes(source.to_bytes())
    (tmp_path / "theirs.gguf").write_bytes(replace(source, tensors=theirs).to_bytes())
    ids = np.random.default_rng(9).integers(5, rows, 48).tolist()
    found = np.array(ask(tmp_path / "theirs.gguf", [], ids)["logits"])
    assert np.abs(found - load(tmp_path / "ours.gguf").logits(ids)).max() < 0.03 * found.std()
