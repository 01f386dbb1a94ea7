"""Models of transformers as `entrollm serve` runs them: several sequences in one step, on any device."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.utils.logging import disable_progress_bar

from entrollm.engine.batch import SequenceCache, SequenceStep
from entrollm.engine.files import ModelFiles, read_model_files
from entrollm.engine.text_model import TextModel, TextShape
from entrollm.engine.weights import Floats
from entrollm.errors import UnsupportedError
from entrollm.hf.load import check_device, load
from entrollm.hf.runners import OneByOne, Runner, Together, attention_windows
from entrollm.models.config_fields import Fields

_LOG = logging.getLogger(__name__)
# Prompt tokens of one call: bounds the activations.
_TOKENS_PER_CALL = 512
# Of a model that names no limit, such as a recurrent one.
_UNBOUNDED = 1 << 20
# Products of a batch are rounded otherwise than those of one row: this share of the logits' norm in 16-bit types.
_TOLERANCE = 0.05


@dataclass(frozen=True)
class TransformersEngine:
    """Loads models with transformers, for `entrollm serve`.

    Attributes:
        device: a torch device for the whole model.
        check: whether to compare all bytes with their checksums before they are loaded.
    """

    device: str = "cuda"
    check: bool = True

    def context_length(self, path: Path) -> int:
        """Tokens that a model takes, read before it is loaded.

        Raises:
            UnsupportedError: transformers does not know the model.
        """
        try:
            return _context_length(AutoConfig.from_pretrained(path))
        except (ValueError, KeyError, OSError) as error:
            raise UnsupportedError(f"{path}: transformers does not read config.json: {error}") from error

    def load(self, path: Path) -> TextModel:
        """Load a compressed folder.

        Raises:
            FormatError, UnsupportedError, ValueError: as entrollm.hf.load.
        """
        disable_progress_bar()  # type: ignore[no-untyped-call]  # a server's messages are lines
        device = check_device(self.device)
        if device.type == "meta":
            raise ValueError("device is 'meta', where tensors have no numbers")
        # Of the types that files have, processors are fast with this one alone.
        dtype: str | torch.dtype = torch.float32 if device.type == "cpu" else "auto"
        return TransformersModel(read_model_files(path), load(path, self.device, dtype=dtype, check=self.check))

    def guesses(self, model: TextModel) -> None:
        """Guess nothing."""


class TransformersModel(TextModel):
    """A causal model of transformers that takes steps of several sequences.

    Sequences go through the model together if all of its layers keep keys and values, if rotations do not depend on
    how long a sequence is (longrope, dynamic), and if a trial gives the same logits as the model's own cache does;
    otherwise one at a time, prompts as a whole and none of them reused. Products of a batch are rounded otherwise than
    those of one row, so an answer can depend on what runs beside it.

    Attributes:
        runs_together: whether sequences go through the model together.

    Args:
        files: the model folder's small files.
        model: the loaded model, on one device.
    Raises:
        UnsupportedError: the model has no output head to read hidden states from.
    """

    def __init__(self, files: ModelFiles, model: Any) -> None:
        head = model.get_output_embeddings()
        if head is None:
            raise UnsupportedError(f"{type(model).__name__} has no output head, so it does not generate text")
        self._model, self._head = model, head
        text = model.config.get_text_config(decoder=True)
        ends = Fields({"ends": text.eos_token_id, "start": text.bos_token_id}, "config.json")
        shape = TextShape(
            _rows_of(head),
            text.hidden_size,
            _context_length(model.config),
            next(iter(ends.token_ids("start")), None),
            ends.token_ids("ends"),
        )
        super().__init__(files, shape)
        # Here and below not inference mode, in which layers with one input do not share a launch.
        with torch.no_grad(), self._on_device():
            self._runner, self._has_plain_head = self._chosen_runner()
        self.runs_together = isinstance(self._runner, Together)

    @property
    def gives_prompt_logits(self) -> bool:
        """Whether logits_of works: the model does nothing to the output of its head."""
        return self._has_plain_head

    @property
    def reads_pieces(self) -> bool:
        """Whether a prompt may come in several steps."""
        return self._runner.reads_pieces

    @property
    def least_piece(self) -> int:
        """Tokens of a piece of a prompt, fewer of which would take as long; a GPU waits for calls to be started."""
        return _TOKENS_PER_CALL // 2 if self._model.device.type == "cuda" else 1

    def new_cache(self) -> SequenceCache:
        """An empty cache for one sequence."""
        return self._runner.new_cache()

    def step(self, steps: Sequence[SequenceStep]) -> Floats:
        """See TextModel."""
        rows: list[Tensor | None] = [None] * len(steps)
        with torch.no_grad(), self._on_device():
            streams = [i for i, each in enumerate(steps) if _is_stream(each)]
            for index, each in enumerate(steps):
                if index not in streams:
                    rows[index] = self._read(each)
            if streams:
                tokens = [int(steps[i].ids[0]) for i in streams]
                logits = self._runner.decode(tokens, [steps[i].cache for i in streams])
                for row, index in enumerate(streams):
                    rows[index] = logits[row]
            wanted = [row for row, each in zip(rows, steps, strict=True) if each.needs_logits and row is not None]
            if not wanted:
                return np.empty((0, self.shape.vocab_size), dtype=np.float32)
            return _to_numpy(torch.stack(wanted))

    def logits_of(self, hidden: Floats) -> Floats:
        """See TextModel; gives_prompt_logits must hold."""
        with torch.no_grad(), self._on_device():
            rows = torch.from_numpy(np.ascontiguousarray(hidden)).to(self._model.device, self._model.dtype)
            return _to_numpy(self._head(rows))

    def _read(self, step: SequenceStep) -> Tensor:
        """Run all tokens of one step and return the logits after the last."""
        ids = step.ids.tolist()
        most = _TOKENS_PER_CALL if self._runner.reads_pieces else len(ids)
        for start in range(0, len(ids), most):
            piece = ids[start : start + most]
            if step.observe is None:
                logits = self._runner.read(piece, step.cache, all_logits=False)
            else:
                with self._seen_by_head() as seen:
                    logits = self._runner.read(piece, step.cache, all_logits=True)
                hidden = _to_numpy(seen[0].flatten(0, -2))
                # All of the sequence if it had to start over.
                step.observe(step.cache.length - len(hidden), hidden)
        return logits[-1]

    @contextmanager
    def _seen_by_head(self) -> Iterator[list[Tensor]]:
        """The inputs of the output head during the block."""
        seen: list[Tensor] = []
        handle = self._head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            yield seen
        finally:
            handle.remove()

    def _chosen_runner(self) -> tuple[Runner, bool]:
        """How sequences run, as a trial shows, and whether logits are the output of the head."""
        single = OneByOne(self._model)
        ids = [(7 * i + 1) % self.shape.vocab_size for i in range(24)]
        with self._seen_by_head() as seen:
            expected = single.read(ids, single.new_cache(), all_logits=True)
        is_plain = _are_close(self._head(seen[0])[0], expected)
        windows = attention_windows(self._model.config)
        if windows is None or self._model.config._attn_implementation not in ("sdpa", "eager"):
            why = "the model keeps more than keys and values, or rotates keys by the length of the sequence"
            _LOG.info("sequences run one at a time: %s", why)
            return single, is_plain
        together = Together(self._model, windows)
        caches = [together.new_cache(), together.new_cache()]
        begun = zip((22, 9), caches, strict=True)
        found = [together.read(ids[:count], cache, all_logits=False)[0] for count, cache in begun]
        try:
            found += [*together.decode([ids[22], ids[9]], caches)]
        except RuntimeError as error:
            if not together.without_graphs():
                raise
            _LOG.warning("no CUDA graphs, since a step cannot be recorded: %s", error)
            found += [*together.decode([ids[22], ids[9]], caches)]
        if all(_are_close(row, expected[i]) for row, i in zip(found, (21, 8, 22, 9), strict=True)):
            return together, is_plain
        _LOG.warning("sequences run one at a time: in a batch the model gives other logits")
        return single, is_plain

    def _on_device(self) -> Any:
        device = self._model.device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _is_stream(step: SequenceStep) -> bool:
    return len(step.ids) == 1 and step.cache.length > 0 and step.observe is None


def _to_numpy(tensor: Tensor) -> Floats:
    array: Floats = tensor.float().cpu().numpy()
    return array


def _are_close(found: Tensor, expected: Tensor) -> bool:
    difference = (found.float() - expected.float()).norm()
    return bool(difference <= _TOLERANCE * (expected.float() - expected.float().mean()).norm())


def _rows_of(head: Any) -> int:
    return int(getattr(head, "out_features", 0) or head.weight.shape[0])


def _context_length(config: Any) -> int:
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or _UNBOUNDED
