"""Compress a checkpoint to a folder: plan it, make its shards, write what surrounds them."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from entrollm.checkpoint.gguf_tokenizer import convert_tokenizer
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.checkpoint.resolve import resolve
from entrollm.checkpoint.side_files import side_files, tokenizer_files
from entrollm.compress.coder import MatrixCoder
from entrollm.compress.folder import OutputFolder, check_output, check_replaced, write_index
from entrollm.compress.methods import make_methods
from entrollm.compress.options import ALL_MATRICES, DEFAULT_BITS, CodingOptions, PostFit
from entrollm.compress.planning import Plan, make_plan, with_size
from entrollm.compress.progress import CompressProgress, ProgressCounter
from entrollm.compress.refit import Refit
from entrollm.compress.result import FolderResult, Run, summarize
from entrollm.compress.shard import RECORD_VERSION, ShardMaker, ShardRecord, record_of
from entrollm.compress.sized import has_drift
from entrollm.compress.source import check_unchanged, stamps
from entrollm.compress.statistics import Statistics
from entrollm.compress.target import Target
from entrollm.errors import EntroLLMError, Message, Option, Placeholder, UnsupportedError
from entrollm.files.contents import check_is_file
from entrollm.files.shards import is_gguf
from entrollm.format import layout
from entrollm.format.checksums import CHECKSUMS_NAME, checksums_text
from entrollm.format.spec import FORMAT_VERSION

# The share of a size limit that is left free for a post_fit, whose scales may deflate less well.
_ROOM = 0.001


def compress_folder(
    model: str | Path,
    out: str | Path,
    options: CodingOptions | None = None,
    *,
    statistics: Statistics | None = None,
    post_fit: PostFit | None = None,
    overwrite: bool = False,
    on_progress: Callable[[CompressProgress], None] | None = None,
) -> FolderResult:
    """See `entrollm.compress.compress_folder`."""
    options = options or CodingOptions()
    started = time.monotonic()
    with Checkpoint.open(resolve(model)) as checkpoint:
        opened = stamps(checkpoint)
        if statistics is not None and statistics.source:
            check_unchanged(checkpoint, statistics.source, "calibrated")
        options = with_size(checkpoint, options)
        if statistics is not None and options.target is None:
            raise ValueError("calibration needs a size to compress to: bits per weight or bytes")
        if post_fit is not None and options.target is None:
            raise ValueError("tuning needs a size to compress to: bits per weight or bytes")
        order = statistics.order if statistics is not None and has_drift(options) else ()
        plan = make_plan(checkpoint, options, order)
        small_files = side_contents(checkpoint, options)
        check_output(Path(out), overwrite)
        check_replaced(Path(out), small_files)
        folder = OutputFolder(Path(out), _fingerprint(checkpoint, plan, options, statistics), overwrite)
        try:
            aimed = options if post_fit is None else _with_room(options)
            methods = make_methods(checkpoint, plan, aimed, statistics)
            counter = ProgressCounter(_weights_to_code(checkpoint, plan), on_progress)
            with MatrixCoder(checkpoint, methods, options) as coder:
                maker = ShardMaker(checkpoint, plan, coder, folder, counter)
                records = [maker.make(index) for index in range(len(plan.shards))]
            config = _config(checkpoint, plan, options, is_calibrated=statistics is not None)
            _write_surroundings(folder, records, config, small_files)
            elapsed_s = time.monotonic() - started
            scales = {} if post_fit is None else post_fit(folder.partial)
            refitted = _refit(folder, checkpoint, plan, records, options, scales)
            if post_fit is not None:
                _check_limit(refitted, options)
            _write_checksums(folder)
            check_unchanged(checkpoint, opened)
            run = Run(Path(out), elapsed_s, maker.resumed_weights, is_refitted=refitted is not records)
            result = summarize(checkpoint, plan, refitted, run)
            folder.publish()
        finally:
            folder.close()
        return result


def _weights_to_code(checkpoint: Checkpoint, plan: Plan) -> int:
    return sum(checkpoint.tensors[name].weights for name in plan.coded)


def _fingerprint(
    checkpoint: Checkpoint, plan: Plan, options: CodingOptions, statistics: Statistics | None
) -> dict[str, Any]:
    """What must be equal for a run to continue an interrupted one."""
    return {
        "format_version": FORMAT_VERSION,
        "record_version": RECORD_VERSION,
        "files": stamps(checkpoint),
        "config": f"{zlib.crc32(json.dumps(checkpoint.config, sort_keys=True).encode()):08x}",
        "tensors": {name: [t.bits, t.granularity, t.is_imported, t.is_lossless] for name, t in plan.tensors.items()},
        "prefer": options.prefer,
        "processor": options.processor,
        "method": options.method,
        "drift": options.drift,
        "fine_scales": options.fine_scales,
        "trellis": options.trellis,
        "statistics": None if statistics is None else statistics.fingerprint,
        "target": None if options.target is None else asdict(options.target),
        "shard_bytes": options.shard_bytes,
    }


def side_contents(checkpoint: Checkpoint, options: CodingOptions) -> dict[str, bytes]:
    """The files beside the weights that the output gets, by name.

    Raises:
        UnsupportedError: the tokenizer of a GGUF file cannot be converted, and the options name no other.
        FormatError: a file of the tokenizer is a Git LFS pointer.
        ValueError: the folder that the options name has no tokenizer.
    """
    if options.tokenizer is None and is_gguf(checkpoint.path):
        try:
            return {name: text.encode() for name, text in convert_tokenizer(checkpoint.path).items()}
        except UnsupportedError as error:
            added = "add {}, a folder with the tokenizer.json of the model that it was made from"
            hint = Message(added, Option("tokenizer", Placeholder("FOLDER")))
            raise UnsupportedError(error.message, hint=hint) from None
    if options.tokenizer is not None and not (options.tokenizer / "tokenizer.json").is_file():
        raise ValueError(f"{options.tokenizer} is not a folder with a tokenizer.json")
    for file in tokenizer_files(checkpoint.path):
        check_is_file(file)
    found = {file.relative_to(checkpoint.path).as_posix(): file for file in side_files(checkpoint.path)}
    if options.tokenizer is not None:
        found |= {file.relative_to(options.tokenizer).as_posix(): file for file in tokenizer_files(options.tokenizer)}
    return {name: file.read_bytes() for name, file in found.items() if name != "config.json"}


def _config(checkpoint: Checkpoint, plan: Plan, options: CodingOptions, is_calibrated: bool) -> dict[str, Any]:
    """The config.json of the output. Its method fields are for human readers."""
    method: dict[str, Any]
    if plan.imported:
        method = {"method": "imported", "source": checkpoint.quantization}
    elif ALL_MATRICES in options.lossless:
        method = {"method": "lossless"}
    elif options.target is None:
        method = {"method": "paper", "bits": options.bits or DEFAULT_BITS, "granularity": options.granularity}
    else:
        target = options.target
        size = {"bits_per_weight": target.bits_per_weight or target.coded_bits, "file_bytes": target.file_bytes}
        size = {key: value for key, value in size.items() if value is not None}
        method = {"method": options.method if is_calibrated else "ecsq", **size}
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    config["quantization_config"] = {
        "quant_method": layout.QUANT_METHOD,
        "version": FORMAT_VERSION,
        **method,
        "prefer": options.prefer,
    }
    return config


def _write_surroundings(
    folder: OutputFolder,
    records: Sequence[ShardRecord],
    config: Mapping[str, Any],
    small_files: Mapping[str, bytes],
) -> None:
    # An interrupted run may have left files that the source no longer has, and checksums of shards that change yet.
    shards = [folder.partial / record.file for record in records]
    folder.keep_only({*small_files, *(path.name for shard in shards for path in (shard, record_of(shard)))})
    for name, content in small_files.items():
        folder.write_bytes(name, content)
    folder.write_text("config.json", json.dumps(config, indent=2) + "\n")
    _write_index(folder, records)


def _write_checksums(folder: OutputFolder) -> None:
    """Cover the files that decide what the model computes; model cards and licences may change."""
    files = {file.relative_to(folder.partial).as_posix() for file in tokenizer_files(folder.partial)}
    files |= {name for name in ("config.json", layout.INDEX_NAME) if (folder.partial / name).is_file()}
    folder.write_text(CHECKSUMS_NAME, checksums_text(folder.partial, files))


def _write_index(folder: OutputFolder, records: Sequence[ShardRecord]) -> None:
    if len(records) > 1:
        names = {entry: record.file for record in records for entry in record.entries}
        write_index(folder, names, _file_bytes(records))


def _refit(
    folder: OutputFolder,
    checkpoint: Checkpoint,
    plan: Plan,
    records: list[ShardRecord],
    options: CodingOptions,
    scales: Mapping[str, NDArray[Any]],
) -> list[ShardRecord]:
    """Store the scales of a post_fit if there are some and the files stay within a limit.

    Returns:
        the new records, or `records` if the files stay as they are.
    """
    refit = Refit(folder.partial, checkpoint, scales, options.threads) if scales else None
    if refit is not None and not _has_room_for(refit, records, options):
        refit = None
    # Without its record, a later run does not take a shard for one that it could resume.
    for record in records:
        record_of(folder.partial / record.file).unlink()
    if refit is None:
        return records
    refitted = [
        replace(record, file_bytes=refit.shard(folder.partial / record.file, names))
        for record, names in zip(records, plan.shards, strict=True)
    ]
    _write_index(folder, refitted)
    return refitted


def _has_room_for(refit: Refit, records: Sequence[ShardRecord], options: CodingOptions) -> bool:
    """Whether the files stay within a limit with other scales.

    The errors in the headers may get other digits too, which only `_check_limit` sees.
    """
    limit = _limit(options)
    return limit is None or _file_bytes(records) + refit.growth() <= limit


def _limit(options: CodingOptions) -> int | None:
    """The size in bytes that must not be exceeded; None if absent."""
    return None if options.target is None else options.target.file_bytes


def _with_room(options: CodingOptions) -> CodingOptions:
    """The options with a limit that leaves room for other scales."""
    limit = _limit(options)
    return options if limit is None else replace(options, target=Target(file_bytes=int(limit * (1 - _ROOM))))


def _check_limit(records: Sequence[ShardRecord], options: CodingOptions) -> None:
    limit, size = _limit(options), _file_bytes(records)
    if limit is not None and size > limit:
        raise EntroLLMError(
            f"the tuned files would take {size} bytes, over the limit of {limit}",
            hint=Message("leave out {}", Option("tune")),
        )


def _file_bytes(records: Sequence[ShardRecord]) -> int:
    return sum(record.file_bytes for record in records)
