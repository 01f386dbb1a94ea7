"""How close a compressed model stayed to its original, measured in seconds on a short text of this package."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.checkpoint.resolve import resolve
from entrollm.engine.files import ModelFiles
from entrollm.engine.load import load
from entrollm.engine.model import Model
from entrollm.engine.streamed import StreamedWeights
from entrollm.errors import EntroLLMError
from entrollm.evaluate.evaluation import evaluate
from entrollm.evaluate.windows import Windows

TOKENS = 256
"""Tokens of the text that are read, its beginning; fewer if the context or the text is shorter."""

TEXT = """\
The ferry to the island leaves twice a day, at seven in the morning and again at half past four, unless the wind is \
above forty knots. Last winter it was cancelled on eleven days, and on the twelfth the captain, a quiet woman named \
Ruth Halloran, sailed anyway because the school had run out of heating oil. She later said that the sea had looked \
worse than it was.

Most visitors come for the lighthouse. It was built in 1871 from granite that was cut on the mainland and carried over \
in small boats, and its lamp could be seen from nineteen miles away. Today the light is automatic, but the keeper's \
house is still there, with a kitchen, two bedrooms and a library of about three hundred books. If you ask at the shop, \
somebody will give you the key.

"How long does it take to walk around the whole island?" is the question that people ask first. The answer depends on \
the tide. At low water the path along the beach is dry, and you need less than three hours; at high water you have to \
climb over the rocks, which takes twice as long. Bring good shoes, something to drink, and a map, since telephones do \
not work on the northern side.

Here is a list of what to see:
1. The lighthouse and its library.
2. The chapel, which has a painted ceiling.
3. The harbour, where fish is sold every Friday from 9:00 to 12:30.
"""


@dataclass(frozen=True)
class Closeness:
    """How close a compressed model stayed to its original, on the first tokens of `TEXT`.

    Attributes:
        kl: mean KL divergence from the original's predictions, in nats per token.
        top1_agreement: share of the predictions with the same likeliest token.
        perplexity, original_perplexity: of the compressed model and of the original.
        predictions: how many were compared.
        elapsed_s: what that took.
    """

    kl: float
    top1_agreement: float
    perplexity: float
    original_perplexity: float
    predictions: int
    elapsed_s: float

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


def measure_closeness(
    original: str | Path,
    compressed: str | Path,
    threads: int | None = None,
    on_progress: Callable[[float, float], None] | None = None,
) -> Closeness:
    """Compare a compressed model with its original, which is read one piece at a time.

    Args:
        original: a checkpoint folder, a Hub id or a .gguf file.
        compressed: the folder that was made from it; its tokenizer reads the text.
        threads: of the engine; `None` for one per performance core.
        on_progress: called with the tokens that are done and all tokens.
    Raises:
        EntroLLMError: the engine cannot run the model, or logits are not finite.
        ValueError: the folder has no tokenizer.json, or the models have different vocabularies.
        OSError: a file cannot be read.
    """
    started = time.monotonic()
    model = load(compressed, threads, memory="file", check=False)  # what was just written needs no check
    ids = np.array(model.encode(TEXT)[: min(TOKENS, model.config.context_length)], np.int64)
    if len(ids) < 2:
        raise EntroLLMError(f"its context of {model.config.context_length} tokens is too short to predict any")
    with Checkpoint.open(resolve(original)) as checkpoint:
        reference = Model(ModelFiles(checkpoint.config), StreamedWeights(checkpoint, threads))
        windows = Windows(ids[np.newaxis], len(ids), len(TEXT.encode()))
        (found,), wanted = evaluate([model], windows, reference, on_progress)
    assert found.divergence is not None and wanted is not None  # there is a reference
    return Closeness(
        kl=found.divergence.mean,
        top1_agreement=found.divergence.top1_agreement,
        perplexity=found.perplexity.perplexity,
        original_perplexity=wanted.perplexity.perplexity,
        predictions=found.perplexity.predictions,
        elapsed_s=time.monotonic() - started,
    )
