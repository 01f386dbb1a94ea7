"""Stream a checkpoint through the compressor, one output shard at a time."""

from __future__ import annotations

import functools
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrollm import _core
from entrollm.checkpoint.gguf_tokenizer import convert_tokenizer
from entrollm.checkpoint.model_folder import Checkpoint, TensorInfo
from entrollm.checkpoint.resolve import resolve
from entrollm.checkpoint.side_files import side_files, tokenizer_files
from entrollm.compress.folder import OutputFolder, write_index
from entrollm.compress.imported import PackedMethods, PackedSummary, plan_packed, summarize_packed, taken_over
from entrollm.compress.methods import Methods, PaperMethods, SizedMethods, has_drift
from entrollm.compress.options import CompressOptions, PostFit
from entrollm.compress.refit import Refit
from entrollm.compress.stacks import split_stacks
from entrollm.compress.target import Target
from entrollm.compress.tensor import TensorCompressor, stored_dtype
from entrollm.errors import EntroLLMError, FormatError, UnsupportedError
from entrollm.files.dtypes import DTYPES, check_finite
from entrollm.files.safetensors import open_safetensors
from entrollm.files.shards import is_gguf
from entrollm.format import layout
from entrollm.format.reader import CompressedModel
from entrollm.format.spec import FORMAT_VERSION
from entrollm.format.writer import ShardWriter
from entrollm.matrix import CodedMatrix, matrix_of
from entrollm.quantize.select import TensorPlan, plan_tensors
from entrollm.quantize.statistics import Statistics
from entrollm.threads import default_threads

_log = logging.getLogger(__name__)
_COPY_ROWS_BYTES = 1 << 24
_DEFAULT_BITS = 4
# The share of a size limit that is left for scales that change.
_ROOM = 0.001


@dataclass(frozen=True, slots=True)
class CompressProgress:
    """How far a run is; sent after every chunk.

    Attributes:
        weights_done, weights: quantized weights finished, and in the whole model.
        tensor: the tensor in work.
    """

    weights_done: int
    weights: int
    tensor: str


@dataclass(frozen=True, slots=True)
class CompressResult:
    """What a run did. Bits are per weight over all weights of the model, norms and headers included.

    Attributes:
        path: the model folder.
        weights: weights of the whole model; quantized_weights of them are coded.
        source_bytes, file_bytes: sizes of the weight files, headers included.
        file_bits: file_bytes * 8 / weights.
        entropy_bits, huffman_bits: per coded weight, weighted over tensors.
        coded_bits: stored bits per coded weight: streams, sizes, scales and the header.
        elapsed_s: wall time of this run, without a post_fit; resumed_weights were finished by an earlier one.
        packed: what became of matrices that were quantized already; None where there were none.
        is_refitted: whether the scales of a post_fit are stored; it may have had none, or they would take too much.
    """

    path: Path
    weights: int
    quantized_weights: int
    source_bytes: int
    file_bytes: int
    file_bits: float
    entropy_bits: float
    huffman_bits: float
    coded_bits: float
    elapsed_s: float
    resumed_weights: int
    packed: PackedSummary | None = None
    is_refitted: bool = False

    def to_json(self) -> dict[str, Any]:
        """All fields, the path as text."""
        return {**asdict(self), "path": str(self.path)}


def compress(
    model: str | Path,
    out: str | Path,
    options: CompressOptions | None = None,
    *,
    statistics: Statistics | None = None,
    post_fit: PostFit | None = None,
    overwrite: bool = False,
    on_progress: Callable[[CompressProgress], None] | None = None,
) -> CompressResult:
    """What `entrollm.compress.compress` documents."""
    options = options or CompressOptions()
    if statistics is not None and options.target is None:
        raise ValueError("calibration needs a size to compress to: bits per weight or bytes")
    if post_fit is not None and options.target is None:
        raise ValueError("tuning needs a size to compress to: bits per weight or bytes")
    started = time.monotonic()
    with Checkpoint.open(resolve(model)) as checkpoint:
        order = statistics.order if statistics is not None and has_drift(options) else ()
        plans, shards = plan_shards(checkpoint, options, order)
        small_files = _side_files(checkpoint, options)
        folder = OutputFolder(Path(out), _fingerprint(checkpoint, plans, options, statistics), overwrite)
        try:
            planned = options if post_fit is None else _with_room(options)
            methods = make_methods(checkpoint, plans, planned, len(shards), statistics)
            run = _Run(checkpoint, plans, folder, options, on_progress, methods)
            records = [run.shard(index, names, len(shards)) for index, names in enumerate(shards)]
            _finish(checkpoint, folder, records, options, statistics is not None, small_files)
            elapsed_s = time.monotonic() - started
            scales = {} if post_fit is None else post_fit(folder.partial)
            refit = Refit(folder.partial, checkpoint, scales, options.threads) if scales else None
            is_refitted = refit is not None and _has_room_for(refit, records, options)
            # From here on the shards are no longer what a resumed run could take over.
            for record in records:
                (folder.partial / record["file"]).with_suffix(".json").unlink()
            if refit is not None and is_refitted:
                for record, names in zip(records, shards, strict=True):
                    record["file_bytes"] = refit.shard(folder.partial / record["file"], names)
                _write_index(folder, records)
            if post_fit is not None:
                _check_limit(records, options)
            folder.publish()
        finally:
            folder.close()
        return _summarize(checkpoint, options, Path(out), records, elapsed_s, run.resumed_weights, is_refitted)


class _Run:
    """The state of one run over all shards."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plans: dict[str, TensorPlan],
        folder: OutputFolder,
        options: CompressOptions,
        on_progress: Callable[[CompressProgress], None] | None,
        methods: Methods,
    ) -> None:
        self._methods = methods
        self._checkpoint = checkpoint
        self._plans = plans
        self._folder = folder
        self._options = options
        self._on_progress = on_progress
        self._total = sum(_weights(checkpoint.tensors[name]) for name, plan in plans.items() if not plan.is_kept)
        self._done = 0
        self._lock = threading.Lock()
        self.resumed_weights = 0

    def shard(self, index: int, names: list[str], count: int) -> dict[str, Any]:
        """Write one shard, or find it finished; returns its record for the index and the summary."""
        path = self._folder.partial / layout.shard_name(index, count)
        record_path = path.with_suffix(".json")
        if path.is_file() and record_path.is_file():
            record: dict[str, Any] = json.loads(record_path.read_text(encoding="utf-8"))
            self._done += record["quantized_weights"]
            self.resumed_weights += record["quantized_weights"]
            self._resume(path, record["matrices"])
            self._report(names[0])
            _log.info("%s is finished already", path.name)
            return record
        coded = [name for name in names if not self._is_plain(name)]
        plain = [name for name in names if self._is_plain(name)]
        record = {"quantized_weights": 0, "entropy_bits": 0.0, "huffman_bits": 0.0, "kept_bytes": 0, "matrices": {}}
        threads = self._options.threads or default_threads()
        with ShardWriter(path) as writer, ThreadPoolExecutor(threads) as executor:
            compressor = TensorCompressor(self._checkpoint, executor, self._options.prefer, self._options.processor)
            for name in coded:
                self._code(name, compressor, writer, record)
            for name in plain:
                info = self._checkpoint.tensors[name]
                dtype = stored_dtype(self._checkpoint, name)
                record["kept_bytes"] += writer.add_plain(
                    name, dtype, info.shape, _chunks(self._checkpoint, info, dtype)
                )
                self._checkpoint.release(name)
        record["entries"] = [entry.name for entry in writer.entries]
        record["file"] = path.name
        record["file_bytes"] = path.stat().st_size
        self._folder.write_text(record_path.name, json.dumps(record))
        return record

    def _resume(self, path: Path, matrices: dict[str, dict[str, Any]]) -> None:
        """Take note of the matrices of a finished shard, in their order."""
        threads = self._options.threads or default_threads()
        with CompressedModel(path, {}, {path.name: open_safetensors(path)}) as model:
            for name, matrix in matrices.items():
                weights = functools.partial(_dequantized, matrix_of(model, name), threads)
                self._methods.resume(name, matrix["stored_bytes"], weights)

    def _is_plain(self, name: str) -> bool:
        return self._plans[name].is_kept or _weights(self._checkpoint.tensors[name]) == 0

    def _code(self, name: str, compressor: TensorCompressor, writer: ShardWriter, record: dict[str, Any]) -> None:
        weights = _weights(self._checkpoint.tensors[name])

        def progress(finished: int) -> None:
            with self._lock:
                self._done += finished
            self._report(name)

        tensor = compressor.compress(name, self._methods.quantizer(name), progress)
        stored_bytes = writer.matrix_bytes(name, tensor.spec, tensor.arrays)
        while not self._methods.settle(name, stored_bytes):
            tensor = compressor.compress(name, self._methods.quantizer(name), lambda finished: None)
            stored_bytes = writer.matrix_bytes(name, tensor.spec, tensor.arrays)
        record["matrices"][name] = {"stored_bytes": stored_bytes, "entropy_bits": tensor.entropy_bits}
        writer.add_matrix(name, tensor.spec, tensor.arrays)
        record["quantized_weights"] += weights
        record["entropy_bits"] += tensor.entropy_bits * weights
        record["huffman_bits"] += tensor.huffman_bits * weights

    def _report(self, name: str) -> None:
        if self._on_progress is not None:
            self._on_progress(CompressProgress(self._done, self._total, name))


def _dequantized(matrix: CodedMatrix, threads: int) -> NDArray[np.float32]:
    return matrix.dequantize(np.arange(matrix.spec.rows), _core.ThreadPool(threads))


def make_methods(
    checkpoint: Checkpoint,
    plans: dict[str, TensorPlan],
    options: CompressOptions,
    shards: int,
    statistics: Statistics | None = None,
) -> Methods:
    """The quantizers that the options ask for.

    Raises:
        ValueError: the target is out of reach.
    """
    if taken := taken_over(checkpoint, options):
        return PackedMethods(checkpoint, taken, PaperMethods(plans))
    if options.target is None:
        return PaperMethods(plans)
    coded = [name for name, plan in plans.items() if not plan.is_kept and _weights(checkpoint.tensors[name])]
    kept = [name for name in plans if name not in set(coded)]
    return SizedMethods(checkpoint, coded, kept, options, shards, statistics)


def _weights(info: TensorInfo) -> int:
    count = 1
    for length in info.shape:
        count *= length
    return count


def plan_shards(
    checkpoint: Checkpoint, options: CompressOptions, order: Sequence[str] = ()
) -> tuple[dict[str, TensorPlan], list[list[str]]]:
    """What happens to each tensor, and which tensors share an output file; stacks of the checkpoint are split.

    Tensors come in the given order, the others after them in that of the checkpoint. A shard holds consecutive tensors
    whose source bytes fit `options.shard_bytes`; a larger tensor has its own.
    """
    checkpoint.check_integers(tuple(override.pattern for override in options.overrides if override.bits is None))
    if taken := taken_over(checkpoint, options):
        plans = plan_packed(checkpoint, taken, options)
    else:
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        plans = plan_tensors(shapes, options.bits or _DEFAULT_BITS, options.overrides, options.granularity)
    plans = split_stacks(checkpoint, plans)
    plans = {name: plans[name] for name in [*order, *plans] if name in plans}
    shards: list[list[str]] = []
    size = 0
    for name in plans:
        tensor_bytes = checkpoint.tensors[name].size_bytes
        if not shards or size + tensor_bytes > options.shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor_bytes
    if not shards:
        raise FormatError(f"{checkpoint.path} has no tensors")
    return plans, shards


def _fingerprint(
    checkpoint: Checkpoint, plans: dict[str, TensorPlan], options: CompressOptions, statistics: Statistics | None
) -> dict[str, Any]:
    """What must be equal for a run to continue an interrupted one."""
    return {
        "format_version": FORMAT_VERSION,
        "files": {str(f.resolve()): [f.stat().st_size, f.stat().st_mtime_ns] for f in checkpoint.files},
        "tensors": {name: [plan.bits, plan.granularity, plan.is_packed] for name, plan in plans.items()},
        "prefer": options.prefer,
        "processor": options.processor,
        "method": options.method,
        "drift": options.drift,
        "fine_scales": options.fine_scales,
        "statistics": None if statistics is None else statistics.fingerprint,
        "target": None if options.target is None else asdict(options.target),
        "shard_bytes": options.shard_bytes,
    }


def _chunks(checkpoint: Checkpoint, info: TensorInfo, dtype: str) -> Iterator[NDArray[Any]]:
    """A tensor in runs of rows of about 16 MB."""
    rows = info.shape[0] if info.shape else 1
    step = max(1, _COPY_ROWS_BYTES * rows // max(1, info.size_bytes))
    for begin in range(0, rows, step):
        part = (info.name, begin, min(rows, begin + step)) if info.shape else (info.name,)
        stored = checkpoint.read(*part)
        check_finite(info.name, stored)
        yield stored if dtype == info.dtype else checkpoint.read_float32(*part).astype(DTYPES[dtype])


def _side_files(checkpoint: Checkpoint, options: CompressOptions) -> dict[str, bytes]:
    """The small files that the output carries, by name.

    Raises:
        UnsupportedError: the tokenizer of a GGUF file is not converted, and no folder is named for it.
        ValueError: the folder that is named for it has none.
    """
    if options.tokenizer is None and is_gguf(checkpoint.path):
        try:
            return {name: text.encode() for name, text in convert_tokenizer(checkpoint.path).items()}
        except UnsupportedError as error:
            raise UnsupportedError(
                f"{error}; add --tokenizer FOLDER, a folder with the tokenizer.json of the model that it was made from"
            ) from None
    if options.tokenizer is not None and not (options.tokenizer / "tokenizer.json").is_file():
        raise ValueError(f"{options.tokenizer} is no folder with a tokenizer.json")
    found = {}
    if checkpoint.path.is_dir():
        found = {file.relative_to(checkpoint.path).as_posix(): file for file in side_files(checkpoint.path)}
    if options.tokenizer is not None:
        found |= {file.relative_to(options.tokenizer).as_posix(): file for file in tokenizer_files(options.tokenizer)}
    return {name: file.read_bytes() for name, file in found.items() if name != "config.json"}


def _finish(
    checkpoint: Checkpoint,
    folder: OutputFolder,
    records: list[dict[str, Any]],
    options: CompressOptions,
    is_calibrated: bool,
    small_files: dict[str, bytes],
) -> None:
    """Write what surrounds the shards: index, configuration, tokenizer files."""
    for name, content in small_files.items():
        (folder.partial / name).parent.mkdir(parents=True, exist_ok=True)
        (folder.partial / name).write_bytes(content)
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    config["quantization_config"] = {
        "quant_method": layout.QUANT_METHOD,
        "version": FORMAT_VERSION,
        **_method_fields(checkpoint, options, is_calibrated),
        "prefer": options.prefer,
    }
    folder.write_text("config.json", json.dumps(config, indent=2) + "\n")
    _write_index(folder, records)


def _limit(options: CompressOptions) -> int | None:
    """The size that was asked for, if one was."""
    return None if options.target is None else options.target.file_bytes


def _with_room(options: CompressOptions) -> CompressOptions:
    """The options with room below a limit, since other scales may deflate less well."""
    limit = _limit(options)
    return options if limit is None else replace(options, target=Target(file_bytes=int(limit * (1 - _ROOM))))


def _has_room_for(refit: Refit, records: list[dict[str, Any]], options: CompressOptions) -> bool:
    """Whether the files stay within the limit with other scales, but for the digits of errors in their headers."""
    limit = _limit(options)
    return limit is None or _file_bytes(records) + refit.growth() <= limit


def _check_limit(records: list[dict[str, Any]], options: CompressOptions) -> None:
    limit, size = _limit(options), _file_bytes(records)
    if limit is not None and size > limit:
        raise EntroLLMError(f"the tuned files would take {size} bytes, over the limit of {limit}; leave out --tune")


def _file_bytes(records: list[dict[str, Any]]) -> int:
    return sum(record["file_bytes"] for record in records)


def _write_index(folder: OutputFolder, records: list[dict[str, Any]]) -> None:
    if len(records) > 1:
        names = {entry: record["file"] for record in records for entry in record["entries"]}
        write_index(folder, names, _file_bytes(records))


def _method_fields(checkpoint: Checkpoint, options: CompressOptions, is_calibrated: bool) -> dict[str, Any]:
    """How the model was quantized, for people who read config.json."""
    if taken_over(checkpoint, options):
        return {"method": "imported", "source": checkpoint.quantization}
    if options.target is None:
        return {"method": "paper", "bits": options.bits or _DEFAULT_BITS, "granularity": options.granularity}
    asked = {key: value for key, value in asdict(options.target).items() if value is not None}
    return {"method": options.method if is_calibrated else "ecsq", **asked}


def _summarize(
    checkpoint: Checkpoint,
    options: CompressOptions,
    out: Path,
    records: list[dict[str, Any]],
    elapsed_s: float,
    resumed: int,
    is_refitted: bool,
) -> CompressResult:
    coded = sum(record["quantized_weights"] for record in records)
    file_bytes = _file_bytes(records)
    kept = sum(record["kept_bytes"] for record in records)
    weights = sum(_weights(info) for info in checkpoint.tensors.values())
    per_weight = max(1, coded)
    taken = taken_over(checkpoint, options)
    return CompressResult(
        path=out,
        weights=weights,
        quantized_weights=coded,
        source_bytes=checkpoint.file_bytes(),
        file_bytes=file_bytes,
        file_bits=file_bytes * 8 / max(1, weights),
        entropy_bits=sum(record["entropy_bits"] for record in records) / per_weight,
        huffman_bits=sum(record["huffman_bits"] for record in records) / per_weight,
        coded_bits=(file_bytes - kept) * 8 / per_weight,
        elapsed_s=elapsed_s,
        resumed_weights=resumed,
        packed=summarize_packed(
            checkpoint, taken, {name: matrix for record in records for name, matrix in record["matrices"].items()}
        ),
        is_refitted=is_refitted,
    )
