"""A small compressed folder, and ways to damage one."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from entrollm import _core
from entrollm.errors import EntroLLMError
from entrollm.format import layout
from entrollm.format.blocks import Blocks
from entrollm.format.checksums import CHECKSUMS_NAME
from entrollm.format.code import Code, Field, Leaf, Split
from entrollm.format.grid import GridKind
from entrollm.format.reader import CompressedModel
from entrollm.format.spec import TensorSpec
from entrollm.matrix import matrix_of, multiply
from tests.support.matrices import store
from tests.support.version1 import Version1Writer

Header = dict[str, Any]
MULTI_ROW, SPLIT_ROW, CONSTANT, NORM, BIAS = "a.weight", "b.weight", "c.weight", "norm.weight", "b.bias"


def example_symbols() -> dict[str, NDArray[np.uint8]]:
    """Three matrices: several rows to a block, rows of two blocks, and a constant."""
    generator = np.random.default_rng(11)
    return {
        MULTI_ROW: np.minimum(generator.geometric(0.2, (10, 100)), 63).astype(np.uint8),
        SPLIT_ROW: generator.choice(np.array([1, 2, 5, 6, 200], np.uint8), (3, 4200), p=[0.6, 0.2, 0.1, 0.08, 0.02]),
        CONSTANT: np.full((7, 3), 9, np.uint8),
    }


EXAMPLE_CODES = {
    MULTI_ROW: Code(Field(1, (0,), Field(2, (4, 8, 12), Field(8, ()))), low_bits=2),
    SPLIT_ROW: Code(Split(Field(1, (1,), Field(1, (2, 6))), Field(1, (5, 200)))),
    CONSTANT: Code(Leaf(9)),
}


def example_tensors() -> dict[str, tuple[TensorSpec, dict[str, NDArray[Any]]]]:
    """The matrices with specs, their scales in the spec or per row and column."""
    generator = np.random.default_rng(12)
    row_scales = {
        layout.SCALE: generator.uniform(0.5, 1, 3).astype(np.float32),
        layout.OFFSET: generator.uniform(-2, -1, 3).astype(np.float32),
        layout.COLUMN_SCALE: generator.uniform(0.5, 2, 4200).astype(np.float32),
    }
    tensors = {}
    for name, symbols in example_symbols().items():
        code = EXAMPLE_CODES[name]
        stored = store(code, symbols)
        arrays: dict[str, NDArray[Any]] = {
            layout.DENSE: stored.dense,
            layout.SPARSE: stored.sparse,
            layout.SPARSE_SIZES: stored.sizes,
        }
        per_row = name == SPLIT_ROW
        spec = TensorSpec(
            rows=symbols.shape[0],
            columns=symbols.shape[1],
            dtype="BF16",
            grid_name="example",
            code=code,
            blocks=Blocks(*stored.blocks),
            kind=GridKind(scale=None if per_row else 0.25, offset=-1.5 if name == MULTI_ROW else None),
            relative_error=0.125,
        )
        tensors[name] = (spec, arrays | (row_scales if per_row else {}))
    return tensors


def example_plain() -> dict[str, NDArray[Any]]:
    """Tensors that stay in their own type."""
    generator = np.random.default_rng(13)
    return {
        NORM: generator.standard_normal(100).astype(ml_dtypes.bfloat16),
        BIAS: generator.standard_normal((3, 1)).astype(np.float32),
    }


def write_config(path: Path, **changes: Any) -> None:
    """The config.json of a compressed folder."""
    quantization = {"quant_method": "entrollm", "version": 1, **changes}
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": quantization}))


def write_shard(path: Path, matrices: tuple[str, ...], plain: tuple[str, ...]) -> list[str]:
    """One file with some of the example's tensors; returns the names of its entries."""
    tensors, kept = example_tensors(), example_plain()
    dtypes = {NORM: "BF16", BIAS: "F32"}
    with Version1Writer(path) as writer:
        for name in matrices:
            writer.add_matrix(name, *tensors[name])
        for name in plain:
            writer.add_plain(name, dtypes[name], kept[name].shape, [kept[name]])
    return [entry.name for entry in writer.entries]


def write_example(path: Path) -> Path:
    """A folder with one file."""
    path.mkdir(parents=True, exist_ok=True)
    write_config(path)
    write_shard(path / "model.safetensors", (MULTI_ROW, SPLIT_ROW, CONSTANT), (NORM, BIAS))
    return path


def write_sharded_example(path: Path) -> Path:
    """A folder with two files and an index."""
    path.mkdir(parents=True, exist_ok=True)
    write_config(path)
    weight_map = {}
    for file, matrices, plain in (
        ("model-00001-of-00002.safetensors", (MULTI_ROW,), (NORM,)),
        ("model-00002-of-00002.safetensors", (SPLIT_ROW, CONSTANT), (BIAS,)),
    ):
        weight_map |= dict.fromkeys(write_shard(path / file, matrices, plain), file)
    (path / layout.INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def harmless_flips(folder: Path, file: Path, places: Iterable[int], generator: np.random.Generator) -> int:
    """Flip a bit at each place of a file in turn, which must be refused or change nothing that is read.

    Returns:
        how many changed nothing.
    """
    content, expected = file.read_bytes(), contents(folder)
    harmless = 0
    for at in places:
        damaged = bytearray(content)
        damaged[at] ^= 1 << int(generator.integers(8))
        file.write_bytes(damaged)
        try:
            check_all(folder)
            found = contents(folder)
        except EntroLLMError:
            continue
        assert found == expected, (at, content[max(0, at - 20) : at + 20])
        harmless += 1
    return harmless


def read_safetensors(path: Path) -> tuple[Header, bytes]:
    """The header and the data of a file."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def write_safetensors(path: Path, header: Header, data: bytes) -> None:
    """A file of this header and data, in a folder without the checksums of its headers, which would find any change."""
    (path.parent / CHECKSUMS_NAME).unlink(missing_ok=True)
    text = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def change_header(path: Path, change: Callable[[Header], None]) -> None:
    """Rewrite a file with a changed header."""
    header, data = read_safetensors(path)
    change(header)
    write_safetensors(path, header, data)


def change_spec(path: Path, name: str, **changes: Any) -> None:
    """Rewrite a file with a changed spec; None removes a field."""

    def change(texts: dict[str, str]) -> None:
        spec = json.loads(texts[name]) | changes
        crc32 = spec.pop("crc32")
        spec = {key: value for key, value in spec.items() if value is not None} | {"crc32": crc32}
        texts[name] = json.dumps(spec, separators=(",", ":"))

    change_specs(path, change)


def change_specs(path: Path, change: Callable[[dict[str, str]], Any]) -> None:
    """Rewrite a file with changed texts of specs, whatever its version."""

    def rewrite(header: Header) -> None:
        if "entrollm.tensors" in header["__metadata__"]:
            change_table(header, lambda table: change(table["coded"]))
        else:
            change(header["__metadata__"])

    change_header(path, rewrite)


def change_table(header: Header, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the table of a header."""
    metadata = header["__metadata__"]
    table = json.loads(zlib.decompress(base64.b64decode(metadata["entrollm.tensors"])))
    change(table)
    metadata["entrollm.tensors"] = base64.b64encode(zlib.compress(json.dumps(table).encode())).decode()


def change_entries(path: Path, changes: Mapping[str, tuple[str, NDArray[Any]] | None]) -> None:
    """Rewrite a file with entries replaced by (dtype, array), added, or removed by None."""
    header, data = read_safetensors(path)
    entries: dict[str, tuple[str, list[int], bytes]] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            entries[name] = (entry["dtype"], entry["shape"], data[begin:end])
    for name, change in changes.items():
        entries.pop(name, None)
        if change is not None:
            entries[name] = (change[0], list(change[1].shape), change[1].tobytes())
    result: Header = {"__metadata__": header["__metadata__"]}
    joined = b""
    for name, (dtype, shape, content) in entries.items():
        result[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(joined), len(joined) + len(content)]}
        joined += content
    write_safetensors(path, result, joined)


def read_entry(path: Path, name: str, dtype: type) -> NDArray[Any]:
    """A copy of an entry."""
    header, data = read_safetensors(path)
    begin, end = header[name]["data_offsets"]
    return np.frombuffer(data[begin:end], dtype).copy()


def contents(path: Path) -> dict[str, bytes]:
    """Everything that a folder says: integers, dequantized rows, plain tensors. Raises when it is damaged."""
    pool = _core.ThreadPool(2)
    result = {}
    with CompressedModel.open(path) as model:
        for name, spec in model.specs.items():
            matrix = matrix_of(model, name)
            symbols = matrix.symbols(0, spec.rows, pool)
            rows = matrix.dequantize(np.arange(spec.rows, dtype=np.int64), pool)
            y = multiply([matrix], np.ones((2, spec.columns), np.float32), pool)
            result[name] = symbols.tobytes() + rows.tobytes() + y.tobytes() + spec.dtype.encode()
        for name in model.plain:
            result[name] = model.array(name).tobytes() + model.dtype(name).encode()
    return result


def check_all(path: Path) -> None:
    """Every checksum of a folder."""
    with CompressedModel.open(path) as model:
        for name in (*model.specs, *model.plain):
            model.check_checksum(name)


def reseal(file: Path, name: str) -> None:
    """Give a matrix that was changed the checksum of its new bytes."""
    header, data = read_safetensors(file)
    arrays = {}
    for suffix in layout.SUFFIXES:
        if name + suffix in header:
            begin, end = header[name + suffix]["data_offsets"]
            arrays[suffix] = np.frombuffer(data[begin:end], np.uint8)

    def change(texts: dict[str, str]) -> None:
        texts[name] = f'{texts[name][:-10]}{layout.checksum(name, texts[name], arrays):08x}"}}'

    change_specs(file, change)


def refuse(folder: Path, error: type[Exception], message: str) -> None:
    """Check that reading all of a folder fails with a message."""
    with pytest.raises(error, match=message):
        contents(folder)
