"""Measures models against one original on several texts: KL divergence with its spread between windows, perplexity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from entrollm import _core
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.engine.files import read_model_files
from entrollm.engine.linear import DenseLinear
from entrollm.engine.load import load
from entrollm.engine.model import Model
from entrollm.engine.weights import Embedding, Floats, Linear
from entrollm.evaluate import LanguageModel, Protocol, Windows, cut_windows
from entrollm.evaluate.divergence import summarize_divergences, top1_agreements
from entrollm.evaluate.perplexity import log_softmax, pieces, summarize_losses
from entrollm.models import read_config
from entrollm.models.config_fields import Fields
from quality_peers import Tensors
from quality_text import Text
from quality_torch import TorchModel, decoded

WINDOW = 512


@dataclass(frozen=True)
class Identity:
    """What is measured, whatever the text.

    Attributes:
        name: of the row, unique among the results of a model.
        family: of the curve that it is a point of.
        is_ours: whether this project's methods made it.
        file_bits: bits per weight of its files, everything included.
        note: what must be known to read the figures.
    """

    name: str
    family: str
    is_ours: bool
    file_bits: float
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One model on one text.

    Attributes:
        name, family, is_ours, file_bits, note: as in `Identity`.
        text: the name of the text.
        kl_mean, kl_p99: of the predictions, in nats.
        top1: share of predictions with the original's likeliest token.
        perplexity: of the model.
        window_kl: mean KL of each window, from which standard errors of paired differences follow.
    """

    name: str
    family: str
    is_ours: bool
    file_bits: float
    note: str
    text: str
    kl_mean: float
    kl_p99: float
    top1: float
    perplexity: float
    window_kl: list[float]


class ArrayWeights:
    """Weights in memory, for the engine."""

    def __init__(self, tensors: Tensors, threads: int) -> None:
        self._tensors = tensors
        self.pool = _core.ThreadPool(threads)

    def __contains__(self, name: str, /) -> bool:
        return name in self._tensors

    def linear(self, *names: str) -> Linear:
        """The matrices `names`, side by side."""
        return DenseLinear(np.concatenate([self._tensors[name] for name in names]))

    def embedding(self, name: str, /) -> Embedding:
        """The matrix `name`."""
        return DenseLinear(self._tensors[name])

    def tensor(self, name: str, /) -> Floats:
        """The tensor `name`."""
        return self._tensors[name]


class Measurement:
    """One original and the texts that others are compared with it on.

    The original's logits are kept: 4 bytes x vocabulary for each token of the windows.

    Args:
        model: the folder of the original.
        texts: what to measure on, the first `max_windows` windows of each.
        threads: for products.
        is_in_torch: whether transformers runs the models in place of the engine.
    """

    def __init__(
        self, model: Path, texts: Sequence[Text], max_windows: int, threads: int, is_in_torch: bool = False
    ) -> None:
        self.model = model
        self.threads = threads
        self._files = read_model_files(model)
        self.config = read_config(Fields(self._files.config, "config.json"))
        if self._files.tokenizer is None:
            raise ValueError(f"{model} has no tokenizer.json")
        protocol = Protocol(min(WINDOW, self.config.context_length), max_windows)
        self.windows: dict[str, Windows] = {
            text.name: cut_windows(self._files.tokenizer, text.content, protocol) for text in texts
        }
        self._pool = ThreadPoolExecutor(threads)
        self._torch = TorchModel(model, threads) if is_in_torch else None
        original = self._model(originals(model))
        self._logits = {name: [original.logits(ids)[:-1] for ids in w.ids] for name, w in self.windows.items()}

    def folder(self, path: Path, identity: Identity) -> Iterator[Row]:
        """Measure a compressed folder on each text."""
        model = load(path, threads=self.threads) if self._torch is None else self._model(decoded(path))
        return self._rows(model, identity)

    def tensors(self, tensors: Tensors, identity: Identity) -> Iterator[Row]:
        """Measure weights in memory on each text."""
        return self._rows(self._model(tensors), identity)

    def _model(self, tensors: Tensors) -> LanguageModel:
        if self._torch is None:
            return Model(self._files, ArrayWeights(tensors, self.threads))
        self._torch.set_weights(tensors)
        return self._torch

    def _rows(self, model: LanguageModel, identity: Identity) -> Iterator[Row]:
        for text, windows in self.windows.items():
            yield self._row(model, identity, text, windows)

    def _row(self, model: LanguageModel, identity: Identity, text: str, windows: Windows) -> Row:
        divergences: list[NDArray[np.float64]] = []
        agreements: list[NDArray[np.bool_]] = []
        losses: list[NDArray[np.float64]] = []
        for ids, wanted in zip(windows.ids, self._logits[text], strict=True):
            found = model.logits(ids)[:-1]
            parts = (np.array_split(array, self.threads) for array in (wanted, found, ids[1:]))
            compared = self._pool.map(_compare, *parts)
            divergence, loss = (np.concatenate(arrays) for arrays in zip(*compared, strict=True))
            divergences.append(divergence)
            agreements.append(top1_agreements(wanted, found))
            losses.append(loss)
        kl = summarize_divergences(np.stack(divergences), np.stack(agreements))
        if not np.isfinite(kl.mean):
            raise ValueError(f"{identity.name}: the divergence on {text} is not finite")
        row = Row(
            **vars(identity),
            text=text,
            kl_mean=kl.mean,
            kl_p99=kl.percentile_99,
            top1=kl.top1_agreement,
            perplexity=summarize_losses(np.stack(losses), windows.text_tokens, windows.text_bytes).perplexity,
            window_kl=[float(window.mean()) for window in divergences],
        )
        print(f"{row.name:32} {row.file_bits:.3f} bits  {text}: KL {row.kl_mean:.4f}", flush=True)
        return row


def _compare(wanted: Floats, found: Floats, targets: NDArray[np.int64]) -> tuple[NDArray[np.float64], ...]:
    """The divergence of each prediction and the loss of its token, from one pass over the logits."""
    divergences, losses = np.empty(len(found)), np.empty(len(found))
    for rows in pieces(found):
        reference, model = log_softmax(wanted[rows]), log_softmax(found[rows])
        divergences[rows] = (np.exp(reference) * (reference - model)).sum(axis=1)
        losses[rows] = -model[np.arange(len(model)), targets[rows]]
    return np.maximum(divergences, 0.0), losses


def originals(model: Path) -> Tensors:
    """All weights of a checkpoint, in float32."""
    with Checkpoint.open(model) as checkpoint:
        return {name: checkpoint.read_float32(name) for name in checkpoint.tensors}
