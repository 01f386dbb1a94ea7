"""Evaluate models on a text in one pass. The reference's logits are used window by window and never stored."""

from __future__ import annotations

import gc
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrollm.errors import EntroLLMError
from entrollm.evaluate.divergence import Divergence, summarize_divergences, token_divergences, top1_agreements
from entrollm.evaluate.perplexity import Float32, Float64, Perplexity, summarize_losses, token_losses
from entrollm.evaluate.windows import Windows

Int64 = NDArray[np.int64]

KEPT_BYTES = 1 << 30
"""Logits of the reference that `evaluate_in_turn` keeps, at least those of one window."""


class LanguageModel(typing.Protocol):
    """A model to evaluate."""

    def logits(self, ids: Int64, /) -> Float32:
        """Return float32 logits, shape (n, vocabulary), of the token after each of ids, shape (n,)."""


@dataclass(frozen=True)
class Evaluation:
    """One model's figures; `divergence` is `None` without a reference."""

    perplexity: Perplexity
    divergence: Divergence | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the figures as one JSON object, with the divergence under "kl"."""
        result = self.perplexity.to_json()
        if self.divergence is not None:
            result["kl"] = self.divergence.to_json()
        return result


def evaluate(
    models: Sequence[LanguageModel],
    windows: Windows,
    reference: LanguageModel | None = None,
    progress: Callable[[float, float], None] | None = None,
) -> tuple[list[Evaluation], Evaluation | None]:
    """Measure models, and the reference too, on the windows of a text.

    Args:
        models: the models to measure.
        windows: from `cut_windows`.
        reference: the model whose predictions the others are compared with; it reads each window once, for all of them.
        progress: called after each window with the number of tokens done, and of all tokens.
    Returns:
        One evaluation per model, and the reference's.
    Raises:
        ValueError: a model and the reference have different vocabularies.
        EntroLLMError: a model's logits are not finite.
    """
    tallies = [_Tally() for _ in models]
    reference_tally = _Tally()
    for number, ids in enumerate(windows.ids):
        wanted = None if reference is None else _predict(reference, ids, number)
        if wanted is not None:
            reference_tally.add(wanted, ids, None)
        for model, tally in zip(models, tallies, strict=True):
            tally.add(_predict(model, ids, number), ids, wanted)
        if progress is not None:
            progress((number + 1) * len(ids), windows.ids.size)
    evaluations = [tally.summarize(windows) for tally in tallies]
    return evaluations, None if reference is None else reference_tally.summarize(windows)


def evaluate_in_turn(
    loaders: Sequence[Callable[[], LanguageModel]],
    windows: Windows,
    reference: LanguageModel | None = None,
    progress: Callable[[float, float], None] | None = None,
) -> tuple[list[Evaluation], Evaluation | None]:
    """Do what `evaluate` does with one model in memory at a time, besides the reference.

    The reference's logits are kept for as many windows as fit in `KEPT_BYTES`, which each model then reads. Models are
    loaded again for the next windows, unless there is only one.

    Args:
        loaders: each loads one of the models.
        windows, reference, progress: as for `evaluate`.
    Returns, raises:
        as `evaluate`.
    """
    tallies = [_Tally() for _ in loaders]
    reference_tally = _Tally()
    only = loaders[0]() if len(loaders) == 1 else None
    done, total = 0, len(windows.ids) * len(loaders)
    begin = 0
    while begin < len(windows.ids):
        wanted = _keep(reference, windows, begin, reference_tally)
        end = begin + len(wanted)
        for loader, tally in zip(loaders, tallies, strict=True):
            model = only if only is not None else loader()
            for number in range(begin, end):
                ids = windows.ids[number]
                tally.add(_predict(model, ids, number), ids, wanted[number - begin])
                done += 1
                if progress is not None:
                    progress(done * windows.ids.size / total, windows.ids.size)
            if only is None:
                del model
                gc.collect()  # before the next is loaded; what a model refers to refers back to it
        begin = end
    evaluations = [tally.summarize(windows) for tally in tallies]
    return evaluations, None if reference is None else reference_tally.summarize(windows)


def _keep(reference: LanguageModel | None, windows: Windows, begin: int, tally: _Tally) -> list[Float32 | None]:
    """The reference's logits for the windows from `begin` on that fit; for all windows `None` without a reference."""
    if reference is None:
        return [None] * (len(windows.ids) - begin)
    kept: list[Float32 | None] = []
    kept_bytes = 0
    for number in range(begin, len(windows.ids)):
        ids = windows.ids[number]
        logits = _predict(reference, ids, number)
        tally.add(logits, ids, None)
        kept.append(logits)
        kept_bytes += logits.nbytes
        if kept_bytes + logits.nbytes > KEPT_BYTES:
            break
    return kept


@dataclass
class _Tally:
    """The figures of one model so far, one array per window."""

    losses: list[Float64] = field(default_factory=list)
    divergences: list[Float64] = field(default_factory=list)
    agreements: list[NDArray[np.bool_]] = field(default_factory=list)

    def add(self, logits: Float32, ids: Int64, wanted: Float32 | None) -> None:
        self.losses.append(token_losses(logits, ids[1:]))
        if wanted is None:
            return
        if wanted.shape != logits.shape:
            raise ValueError(
                f"the reference has a vocabulary of {wanted.shape[1]} and the model one of {logits.shape[1]}; "
                "compare a model with its own original"
            )
        self.divergences.append(token_divergences(wanted, logits))
        self.agreements.append(top1_agreements(wanted, logits))

    def summarize(self, windows: Windows) -> Evaluation:
        perplexity = summarize_losses(np.stack(self.losses), windows.text_tokens, windows.text_bytes)
        if not self.divergences:
            return Evaluation(perplexity)
        return Evaluation(perplexity, summarize_divergences(np.stack(self.divergences), np.stack(self.agreements)))


def _predict(model: LanguageModel, ids: Int64, number: int) -> Float32:
    """Return the logits that predict ids[1:]."""
    logits = model.logits(ids)[:-1]
    # The sum is NaN or infinite if any logit is. A mask of all logits would take too much memory.
    if not np.isfinite(logits.sum(dtype=np.float64)):
        raise EntroLLMError(f"window {number}: the model's logits are not finite; its weights may be damaged")
    return logits
