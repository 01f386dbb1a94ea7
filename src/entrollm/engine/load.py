"""Load a model folder, compressed or not, ready to run."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from entrollm.checkpoint.names import other_parts
from entrollm.checkpoint.resolve import resolve
from entrollm.engine.files import ModelFiles, read_model_files, why_no_tokenizer
from entrollm.engine.linear import CodedWeights, DenseWeights
from entrollm.engine.memory import Memory, check_memory
from entrollm.engine.model import Model
from entrollm.files.shards import is_gguf
from entrollm.format.checksums import check_files
from entrollm.format.reader import CompressedModel, is_compressed, read_config
from entrollm.threads import check_threads

_logger = logging.getLogger(__name__)


def load(
    model: str | Path,
    threads: int | None = None,
    *,
    memory: Memory = "auto",
    check: bool = True,
    cache_type: str = "f32",
) -> Model:
    """Load a model.

    Args:
        model: a folder, a Hub id, or a GGUF file (whose tokenizer is not read). A compressed folder runs from its
            coded bytes; an ordinary checkpoint is expanded to float32, which takes four bytes per weight.
        threads: worker threads of the coded products; by default one for each performance core.
        memory: "file" multiplies with the coded bytes as the file has them. "fast" transcodes every matrix, in a
            thread and at the latest when it is first multiplied with, to a form that multiplies faster and takes up
            to 0.9 bits a weight more memory; the file's pages are released. "auto" does so for the matrices that gain
            from it on this processor, if its memory suffices. A number of bytes is for models with experts that are
            larger than the memory: products are from the file, of which at most that many bytes are held, so that the
            experts that were not used for longest give way; only the experts that a layer chooses for one pass are
            held all the same where they exceed it, as they may for a prompt. The results are the same bit for bit.
        check: compare the files of a compressed folder with their checksums: small files, headers and kept tensors
            here, and each matrix before it is first used, by a thread that runs ahead. A damaged matrix raises
            CorruptStreamError there.
        cache_type: how keys and values of the tokens so far are held: "f32", "f16" in half the memory, or "int8" in
            little more than a quarter, after a Hadamard transform that spreads large features over all.
    Raises:
        FormatError: the folder is malformed or damaged.
        UnsupportedError: its architecture, or an option of it, is not implemented, or its attention does not read a
            cache of this type.
        ValueError: it is neither a folder nor a Hub id, `threads` is not from 1 to 1024, or `memory` or
            `cache_type` is none of the choices.
    """
    memory = check_memory(memory)
    if threads is not None:
        check_threads(threads)
    path = resolve(model)
    if check and not is_gguf(path):
        check_files(path)
    if not is_gguf(path) and is_compressed(read_config(path)):
        model_folder = CompressedModel.open(path, check=False)  # they are checked
        coded = CodedWeights(model_folder, threads, memory, check=check)
        loaded = Model(read_model_files(path), coded, cache_type, model_folder.fingerprint)
        _report_other_parts(path, model_folder.config, [*model_folder.specs, *model_folder.plain])
        coded.prepare()
        return loaded
    if isinstance(memory, int):
        raise ValueError(
            f"{path} is not compressed, and is expanded to float32; a limit of memory is for folders that "
            "entrollm compress makes"
        )
    from entrollm.checkpoint.model_folder import Checkpoint  # what runs compressed models starts without

    checkpoint = Checkpoint.open(path)
    weights = DenseWeights(checkpoint, threads)
    _report_other_parts(path, checkpoint.config, checkpoint.tensors)
    if not is_gguf(path):
        return Model(read_model_files(path), weights, cache_type, weights.fingerprint)
    files = ModelFiles(checkpoint.config, no_tokenizer=why_no_tokenizer(path))
    return Model(files, weights, cache_type, weights.fingerprint)


def _report_other_parts(path: Path, config: Mapping[str, Any], names: Collection[str]) -> None:
    """Say what of a model of text and images is not run."""
    others = other_parts(names) if "text_config" in config else []
    if others:
        _logger.warning(
            "%s: %d tensors of other parts than text, such as %s, are not run here; the transformers plugin runs them",
            path,
            len(others),
            others[0],
        )
