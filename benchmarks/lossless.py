"""Lossless coding of real checkpoints in bf16: bits of every role, sizes and rates beside other compressors.

usage: python benchmarks/lossless.py FILE.safetensors ... [--threads N] [--json FILE]

Only matrices count. Those in float32 are rounded to bf16 first, which leaves their exponents nearly as they were. Every
compressor gets the same file; rates are GB/s of bf16, from file to file, and what comes back is compared.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmz
import ml_dtypes
import zstandard
from numpy.typing import NDArray
from safetensors.numpy import save_file

from common import finish
from entrollm import _core
from entrollm.codec.huffman import entropy_bits
from entrollm.codec.words import divide
from entrollm.compress import CodingOptions, compress_folder
from entrollm.compress.export import export
from entrollm.files.safetensors import open_safetensors
from entrollm.format.lossless import LosslessKind
from entrollm.format.reader import CompressedModel
from entrollm.threads import default_threads, start_pool

BF16 = LosslessKind("BF16")
Words = dict[str, NDArray[Any]]


def main() -> None:
    """Run, print the tables, and end with JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = {str(path): measure(path, options.threads) for path in options.files}
    finish({"isa": _core.isa(), "threads": options.threads, "models": results}, options.json)


def measure(path: Path, threads: int) -> dict[str, Any]:
    """All rows of a checkpoint, which are printed too."""
    words = read_matrices(path)
    size = sum(array.nbytes for array in words.values())
    roles = bits_by_role(words)
    print(f"{path}: {size / 1e6:.0f} MB of bf16 matrices")
    for role, (weights, bits) in roles.items():
        print(f"  {role:32} {weights / 1e6:8.2f} M weights, {bits:.3f} bits of exponent")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "source").mkdir()
        source = folder / "source" / "model.safetensors"
        save_file(words, source)
        (source.parent / "config.json").write_text('{"model_type": "other"}')
        rows = [ours(folder, prefer, threads) for prefer in ("size", "speed")]
        rows += [with_zstd(source, level, threads) for level in (3, 12)] + [with_lmz(source, threads)]
    total = sum(weights * (bits + 8) for weights, bits in roles.values()) / 8
    print(f"  exponents' entropy and 8 bits: {total / size:.2%} of bf16")
    for row in rows:
        row["share"] = row["bytes"] / size
        for key in ("encode", "decode"):
            row[key + "_gb_s"] = size / 1e9 / row.pop(key + "_s")
        print(
            f"  {row['name']:20} {row['share']:.2%} of bf16 ({row['bytes'] / total - 1:+.2%} over the entropy), "
            f"encodes {row['encode_gb_s']:.2f} GB/s, decodes {row['decode_gb_s']:.2f} GB/s"
        )
    return {"bytes": size, "entropy_share": total / size, "roles": roles, "rows": rows}


def read_matrices(path: Path) -> Words:
    """The matrices of a file in bf16."""
    with open_safetensors(path) as file:
        names = [n for n, entry in file.tensors.items() if len(entry.shape) == 2 and entry.dtype in ("F32", "BF16")]
        return {name: file.array(name).astype(ml_dtypes.bfloat16) for name in names}


def bits_by_role(words: Words) -> dict[str, tuple[int, float]]:
    """Weights and bits of the exponents' entropy, of each matrix by itself, by what is after the layer's number."""
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for name, array in words.items():
        symbols, _ = divide(BF16, array)
        role = re.sub(r"^(.*\.\d+\.)?(.*?)(\.weight)?$", r"\2", name)
        found[role].append((array.size, entropy_bits([int(count) for count in _core.histogram(symbols)])))
    totals = {role: sum(weights for weights, _ in rows) for role, rows in found.items()}
    return {role: (totals[role], sum(w * bits for w, bits in rows) / totals[role]) for role, rows in found.items()}


def timed(run: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def ours(folder: Path, prefer: Any, threads: int) -> dict[str, Any]:
    """A compressed folder and its export."""
    out, back = folder / prefer, folder / f"{prefer}-back"
    options = CodingOptions(lossless=("*",), prefer=prefer, processor="x86", threads=threads)
    encode_s = timed(lambda: compress_folder(folder / "source", out, options))
    with CompressedModel.open(out) as model:
        decode_s = timed(lambda: export(model, back, start_pool(threads)))
    check(folder / "source" / "model.safetensors", back / "model.safetensors")
    size = (out / "model.safetensors").stat().st_size
    return {"name": f"entrollm {prefer}", "bytes": size, "encode_s": encode_s, "decode_s": decode_s}


def with_zstd(source: Path, level: int, threads: int) -> dict[str, Any]:
    """zstd over the file as it is."""
    packed, back = source.with_name("packed.zst"), source.with_name("back")

    def encode() -> None:
        with source.open("rb") as data, packed.open("wb") as out:
            zstandard.ZstdCompressor(level=level, threads=threads).copy_stream(data, out)

    def decode() -> None:
        with packed.open("rb") as data, back.open("wb") as out:
            zstandard.ZstdDecompressor().copy_stream(data, out)

    encode_s, decode_s = timed(encode), timed(decode)
    check(source, back)
    size = packed.stat().st_size
    return {"name": f"zstd -{level}", "bytes": size, "encode_s": encode_s, "decode_s": decode_s}


def with_lmz(source: Path, threads: int) -> dict[str, Any]:
    """lmzip at its own level."""
    packed, back = source.with_name("packed.lmz"), source.with_name("back.lmz.safetensors")
    encode_s = timed(lambda: lmz.compress(str(source), str(packed), workers=threads))
    decode_s = timed(lambda: lmz.decompress(str(packed), str(back), workers=threads))
    check(source, back)
    return {"name": "lmzip", "bytes": packed.stat().st_size, "encode_s": encode_s, "decode_s": decode_s}


def check(source: Path, back: Path) -> None:
    """Compare the tensors that came back; headers may be in another order."""
    with open_safetensors(source) as first, open_safetensors(back) as second:
        if set(first.tensors) != set(second.tensors):
            raise SystemExit(f"{back} has other tensors than {source}")
        for name in first.tensors:
            if first.array(name).tobytes() != second.array(name).tobytes():
                raise SystemExit(f"{name} differs in {back}")


if __name__ == "__main__":
    main()
