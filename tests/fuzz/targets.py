"""What is fuzzed: for each target, files that are made once, a mutation of them, and how they are read."""

from __future__ import annotations

import base64
import json
import random
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from entrollm import CompressOptions, _core, compress
from entrollm.checkpoint.gguf_tokenizer import convert_tokenizer
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.checkpoint.side_files import side_files
from entrollm.compress import CodingOptions, compress_folder
from entrollm.compress import Target as Size
from entrollm.compress.difference import restored_matrices
from entrollm.files.gguf import BLOCK_TYPES
from entrollm.files.safetensors import open_safetensors
from entrollm.format import layout
from entrollm.format.checksums import CHECKSUMS_NAME
from entrollm.format.reader import CompressedModel
from entrollm.matrix import matrix_of, multiply
from tests.checkpoint.imported import test_float4_layers, test_fp8
from tests.checkpoint.imported.test_damage import LAYER, SOURCES
from tests.fuzz.model_targets import MODEL_TARGETS
from tests.fuzz.mutate import mutate_json, mutate_text, to_text
from tests.fuzz.served_targets import SERVED_TARGETS
from tests.fuzz.target import Files, Target, mutated, write
from tests.fuzz.text_targets import TEXT_TARGETS
from tests.support.checkpoints import write_checkpoint
from tests.support.float4_sources import nvfp4_packer
from tests.support.gguf_sources import GgufSource, llama_values
from tests.support.lossless_cases import write_tensors
from tests.support.paths import GOLDEN
from tests.support.quantized_sources import CONFIG, Arrays, write_folder

_FILES = Files()
_TABLE = "entrollm.tensors"
_FILE = "model.safetensors"
_PARTS = tuple(f"model-{number:05d}-of-00003.gguf" for number in (1, 2, 3))
_FORMATS = {
    **SOURCES,
    "fp8": (test_fp8.BLOCKS, test_fp8.packer("blocks")),
    "NVFP4": (test_float4_layers.NVFP4, nvfp4_packer("weight_packed", divides=True)),
}


def _small_weights() -> Arrays:
    """Matrices with codes of several kinds, and kept tensors of several types, in few bytes."""
    generator = np.random.default_rng(21)

    def normal(*shape: int) -> Any:
        return generator.standard_normal(shape).astype(np.float32)

    return {
        "embed.weight": normal(30, 64).astype(ml_dtypes.bfloat16),
        "layers.0.up.weight": normal(20, 130).astype(np.float16),
        "layers.0.norm.weight": normal(64).astype(ml_dtypes.bfloat16),
        "layers.1.positive.weight": np.abs(normal(5, 70)),
        "layers.1.constant.weight": np.full((9, 65), 0.5, np.float32),
        "layers.1.empty.weight": np.zeros((0, 5), np.float32),
        "layers.1.bias": normal(13).astype(np.float64),
        "head.weight": normal(30, 64),
    }


def _split(path: Path) -> tuple[Any, bytes]:
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def _join(path: Path, header: bytes, data: bytes, generator: random.Random) -> None:
    length = len(header) if generator.randrange(30) else generator.choice((0, 7, len(header) + 1, 2**40, 2**64 - 1))
    if not generator.randrange(30):
        data = data[: generator.randrange(len(data) + 1)]
    write(path, length.to_bytes(8, "little") + header + data)


def _with_noise(data: bytes, generator: random.Random) -> bytes:
    """The same number of bytes, a few of them changed."""
    changed = bytearray(data)
    for _ in range(generator.choice((1, 4, 40))):
        changed[generator.randrange(len(data))] = generator.choice((0, 0xFF, 0x80, generator.randrange(256)))
    return bytes(changed)


def _mutate_header(folder: Path, seed: tuple[Any, bytes], generator: random.Random) -> None:
    _join(folder / _FILE, mutated(seed[0], generator), seed[1], generator)


def _prepare_safetensors(folder: Path) -> list[Any]:
    write_checkpoint(folder / "source", _small_weights())
    return [_split(path) for path in sorted((folder / "source").glob("*.safetensors"))]


def _read_safetensors(folder: Path) -> None:
    file = open_safetensors(folder / _FILE)
    try:
        for name in file.tensors:
            file.array(name).sum(dtype=np.float64) if file.tensors[name].dtype[0] in "FB" else file.array(name)
    finally:
        file.close()


def _prepare_specs(folder: Path) -> list[Any]:
    kept = ("layers.0.norm.weight", "layers.1.empty.weight", "head.weight")
    weights = {name: array for name, array in _small_weights().items() if name not in kept}
    write_checkpoint(folder / "source", weights)
    options = {
        "row": CodingOptions(bits=4, granularity="row"),
        "speed": CodingOptions(bits=8, prefer="speed"),
        "fixed": CodingOptions(bits=3, prefer="fixed"),
        "steps": CodingOptions(target=Size(bits_per_weight=4.5)),
        "lossless": CodingOptions(lossless=("*",)),
    }
    for name, each in options.items():
        compress_folder(folder / "source", folder / name, each)
    shutil.copyfile(folder / "row" / "config.json", folder / "config.json")  # without the checksums of headers
    return [_split(path / _FILE) for path in (*(folder / name for name in options), GOLDEN / "v2-trellis")]


def _prepare_groups(folder: Path) -> list[Any]:
    seeds = []
    for number, name in enumerate(_FORMATS):
        source, coded = folder / f"source-{number}", folder / f"coded-{number}"
        _write_packed(source, name)
        compress_folder(source, coded)
        seeds.append(_split(coded / _FILE))
        shutil.copyfile(coded / "config.json", folder / "config.json")
    return seeds


def _mutate_specs(folder: Path, seed: tuple[Any, bytes], generator: random.Random) -> None:
    """Change the table of specs, a spec within it or the coded bytes, and seldom the header around them."""
    header, data = seed
    kind = generator.randrange(12)
    if kind < 2:
        _mutate_header(folder, seed, generator)
        return
    if kind < 4:
        _join(folder / _FILE, to_text(header), _with_noise(data, generator), generator)
        return
    table = json.loads(zlib.decompress(base64.b64decode(header["__metadata__"][_TABLE])))
    if kind < 9:
        name = generator.choice(sorted(table["coded"]))
        table["coded"][name] = _mutated_spec(table["coded"][name], generator)
        text = to_text(table)
    else:
        text = mutated(table, generator)
    packed = zlib.compress(text, 1)
    if not generator.randrange(20):
        packed = mutate_text(packed, generator)
    changed = {**header, "__metadata__": {**header["__metadata__"], _TABLE: base64.b64encode(packed).decode()}}
    _join(folder / _FILE, to_text(changed), data, generator)


def _mutated_spec(text: str, generator: random.Random) -> str:
    if not generator.randrange(5):
        return mutate_text(text.encode(), generator).decode("latin-1")
    spec = mutate_json(json.loads(text), generator)
    if isinstance(spec, dict) and "crc32" in spec and generator.randrange(8):
        spec = {**{key: value for key, value in spec.items() if key != "crc32"}, "crc32": spec["crc32"]}
    return json.dumps(spec, separators=(",", ":"))


def _read_specs(folder: Path) -> None:
    """Read rows of each matrix and multiply by it, as it is coded and, where it can be, as it is flat."""
    pool = _core.ThreadPool(1)
    with CompressedModel.open(folder, check=False) as model:
        for name, spec in model.specs.items():
            matrix = matrix_of(model, name)
            if spec.rows * spec.columns < 100_000:  # a matrix of one symbol may claim any shape in a few bytes
                matrix.dequantize(np.arange(min(spec.rows, 2), dtype=np.int64), pool)
                x = np.ones((1, spec.columns), np.float32)
                multiply([matrix], x, pool)
                if matrix.can_be_flat:
                    multiply([matrix.to_flat(pool)], x, pool)
        for name in model.plain:
            model.array(name)


class _Unchecked(CompressedModel):
    """A folder whose damaged bytes are read in spite of their checksums."""

    def check_checksum(self, name: str) -> None:
        pass


def _prepare_difference(folder: Path) -> list[Any]:
    """A folder of differences to `base`, some of which are in lists."""
    generator = np.random.default_rng(33)
    base = {
        "a.weight": generator.standard_normal((20, 130)).astype(ml_dtypes.bfloat16),
        "b.weight": generator.standard_normal((9, 70)).astype(np.float16),
    }
    model = {name: (array.view(np.uint16) + np.uint16(2)).view(array.dtype) for name, array in base.items()}
    model["a.weight"][3, 4:9] = 100.0
    write_tensors(folder / "base", base)
    write_tensors(folder / "model", model)
    compress(folder / "model", folder / "coded", CompressOptions(lossless=True, base=folder / "base", threads=1))
    shutil.copyfile(folder / "coded" / "config.json", folder / "config.json")
    described = json.loads((folder / "coded" / layout.DIFFERENCE_NAME).read_text())
    return [(described, _split(folder / "coded" / _FILE))]


def _mutate_difference(folder: Path, seed: tuple[Any, tuple[Any, bytes]], generator: random.Random) -> None:
    described, file = seed
    is_described = generator.randrange(2) == 0
    text = mutated(described, generator) if is_described else _FILES.text(described)
    _FILES.write(folder / layout.DIFFERENCE_NAME, text)
    if is_described:
        _join(folder / _FILE, _FILES.text(file[0]), file[1], generator)
    else:
        _mutate_specs(folder, file, generator)


def _read_difference(folder: Path) -> None:
    pool = _core.ThreadPool(1)
    with _Unchecked.open(folder, check=False, restores=True) as model, Checkpoint.open(folder / "base") as base:
        for matrix in restored_matrices(model, base).values():
            for _ in matrix.chunks(pool):
                pass


def _prepare_folder(folder: Path) -> list[Any]:
    write_checkpoint(folder / "source", _small_weights())
    compress_folder(folder / "source", folder / "coded", CodingOptions(shard_bytes=12_000))
    for file in (folder / "coded").iterdir():
        file.rename(folder / file.name)
    shutil.rmtree(folder / "source")
    (folder / "coded").rmdir()
    names = ("config.json", layout.INDEX_NAME, CHECKSUMS_NAME)
    seed = {name: json.loads((folder / name).read_text()) for name in names}
    seed["modules.json"] = [{"idx": 0, "name": "0", "path": ""}, {"idx": 1, "name": "1", "path": "1_Pooling"}]
    return [seed]


def _mutate_files(folder: Path, seed: Mapping[str, Any], generator: random.Random) -> None:
    changed = generator.choice(sorted(seed))
    for name, value in seed.items():
        is_changed = name == changed or not generator.randrange(9)
        _FILES.write(folder / name, mutated(value, generator) if is_changed else _FILES.text(value))
    if CHECKSUMS_NAME in seed and changed != CHECKSUMS_NAME and generator.randrange(4):
        _FILES.remove(folder / CHECKSUMS_NAME)  # it would find the change


def _read_folder(folder: Path) -> None:
    side_files(folder)
    with CompressedModel.open(folder) as model:
        model.file_bytes()


def _prepare_checkpoint(folder: Path) -> list[Any]:
    """The index of a checkpoint, and a configuration with a description of how weights are quantized, or nested."""
    write_checkpoint(folder / "source", _small_weights())
    for file in (folder / "source").glob("*.safetensors"):
        file.rename(folder / file.name)
    index = json.loads((folder / "source" / layout.INDEX_NAME).read_text())
    shutil.rmtree(folder / "source")
    configs: list[Any] = [{**CONFIG, "text_config": {"hidden_size": 64, "torch_dtype": "bfloat16"}}]
    for quantization, _ in _FORMATS.values():
        configs.append({**CONFIG, "quantization_config": quantization})
        configs.append({**CONFIG, "compression_config": quantization, "text_config": {}})
        configs.append({"model_type": "x", "text_config": {**CONFIG, "quantization_config": quantization}})
    return [{"config.json": config, layout.INDEX_NAME: index} for config in configs]


def _read_checkpoint(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint:
        checkpoint.check_integers()
        checkpoint.file_bytes()
        for name in checkpoint.tensors:
            checkpoint.read_float32(name)


def _prepare_gguf(folder: Path) -> list[Any]:
    values = llama_values() | {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.chat_template": "{{ messages }}"}
    more = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0, "tokenizer.ggml.model": "llama"}
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *(f"▁{i}" for i in range(61))]
    more |= {"tokenizer.ggml.tokens": pieces, "tokenizer.ggml.scores": [-float(i) for i in range(320)]}
    more |= {"tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * 61]}
    tensors = [
        ["token_embd.weight", [320, 32], 8, 320 * 34],
        ["output_norm.weight", [32], 0, 128],
        ["blk.0.attn_q.weight", [32, 32], 8, 32 * 34],
        ["blk.0.attn_norm.weight", [32], 0, 128],
    ]
    blocks = []  # one matrix of every type, two blocks to a row, and those of plain numbers
    for number, kind in BLOCK_TYPES.items():
        if kind.weights > 1:
            blocks.append([f"blk.0.ffn_{kind.name}.weight", [2, 2 * kind.weights], number, 4 * kind.size_bytes])
    blocks += [[f"blk.0.{kind}.weight", [2, 8], kind, 16 * size] for kind, size in ((0, 4), (1, 2), (30, 2))]
    few = {"tokenizer.ggml.tokens": [*(f"t{i}" for i in range(19)), "1"]}
    tensors_of_few = [["token_embd.weight", [20, 32], 8, 20 * 34], *tensors[1:]]
    sizes = {"expert_count": 3, "expert_used_count": 2, "expert_feed_forward_length": 2}
    named = {key.replace("llama.", "gpt-oss.", 1): value for key, value in (llama_values() | few).items()}
    named |= {f"gpt-oss.{key}": value for key, value in sizes.items()} | {"general.architecture": "gpt-oss"}
    experts = [[f"blk.0.ffn_{part}_exps.weight", [3, 2, 32], 8, 3 * 2 * 34] for part in ("gate", "up", "down")]
    experts += [[f"blk.0.ffn_{part}_exps.bias", [3, 2], 0, 24] for part in ("gate", "up")]
    return [
        [values | few, tensors_of_few],
        [values | more, tensors],
        [{"general.architecture": "llama"}, blocks],
        [named, [*tensors_of_few[:1], *experts]],
    ]


def _gguf_bytes(parts: Any) -> bytes:
    try:
        values, tensors = parts
        rows = [(name, tuple(shape), kind, bytes(size)) for name, shape, kind, size in tensors]
        return GgufSource(values, rows).to_bytes()
    except Exception:  # no file can say this
        return GgufSource({}).to_bytes()


def _mutate_gguf(folder: Path, seed: Any, generator: random.Random) -> None:
    content = _gguf_bytes(mutate_json(seed, generator) if generator.randrange(4) else seed)
    for _ in range(generator.choice((0, 0, 1, 2))):
        content = mutate_text(content, generator)
    write(folder / "model.gguf", content)


def _prepare_parts(folder: Path) -> list[Any]:
    """The parts of a split file; a later one has no metadata of the model."""
    values, tensors = _prepare_gguf(folder)[0]
    parts = []
    for number, part in enumerate((tensors[:1], tensors[1:2], tensors[2:])):
        split = {"split.no": number, "split.count": 3, "split.tensors.count": len(tensors)}
        parts.append([split | values if number == 0 else split, part])
    return [parts]


def _mutate_parts(folder: Path, seed: Any, generator: random.Random) -> None:
    parts = mutate_json(seed, generator)
    damaged = generator.randrange(20)
    for number, name in enumerate(_PARTS):
        (folder / name).unlink(missing_ok=True)
        if isinstance(parts, list) and number < len(parts):
            content = _gguf_bytes(parts[number])
            write(folder / name, mutate_text(content, generator) if number == damaged else content)


def _read_parts(folder: Path) -> None:
    with Checkpoint.open(folder / _PARTS[0]) as checkpoint:
        for name, info in checkpoint.tensors.items():
            if info.weights:
                checkpoint.read_float32(name)


def _read_gguf(folder: Path) -> None:
    path = folder / "model.gguf"
    with Checkpoint.open(path) as checkpoint:
        for name, info in checkpoint.tensors.items():
            if info.weights:
                checkpoint.read_float32(name)
    convert_tokenizer(path)


def _write_packed(folder: Path, name: str) -> None:
    """A checkpoint with one linear layer in a quantized format."""
    quantization, pack = _FORMATS[name]
    parts, _ = pack(np.random.default_rng(5), 64, 128)
    tensors: Arrays = {"model.embed_tokens.weight": np.ones((4, 8), np.float16)}
    tensors |= {LAYER + part: np.asarray(array) for part, array in parts.items()}
    if name == "fp8":
        folder.mkdir(parents=True)
        save_file({key: np.ascontiguousarray(array) for key, array in tensors.items()}, folder / _FILE)
        (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": quantization}))
    else:
        write_folder(folder, tensors, {**CONFIG, "quantization_config": quantization})


def _imported(name: str) -> Target:
    def prepare(folder: Path) -> list[Any]:
        _write_packed(folder / "source", name)
        config = json.loads((folder / "source" / "config.json").read_text())
        return [(config, *_split(folder / "source" / _FILE))]

    return Target(prepare, _mutate_imported, _read_imported)


def _mutate_imported(folder: Path, seed: tuple[Any, Any, bytes], generator: random.Random) -> None:
    config, header, data = seed
    part = generator.randrange(4)
    if part:
        config = {**config, "quantization_config": mutate_json(config["quantization_config"], generator)}
    _FILES.write(folder / "config.json", to_text(config) if part else _FILES.text(config))
    text = mutated(header, generator) if part in (0, 2) else _FILES.text(header)
    data = _with_noise(data, generator) if part == 3 else data
    _join(folder / _FILE, text, data, generator)


def _read_imported(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint:
        checkpoint.check_integers()
        for name in [*checkpoint.imported, *checkpoint.fp8]:
            checkpoint.read_imported(name)
            checkpoint.read_float32(name)


TARGETS: Mapping[str, Target] = {
    "safetensors": Target(_prepare_safetensors, _mutate_header, _read_safetensors),
    "specs": Target(_prepare_specs, _mutate_specs, _read_specs),
    "groups": Target(_prepare_groups, _mutate_specs, _read_specs),
    "difference": Target(_prepare_difference, _mutate_difference, _read_difference),
    "folder": Target(_prepare_folder, _mutate_files, _read_folder),
    "checkpoint": Target(_prepare_checkpoint, _mutate_files, _read_checkpoint),
    "gguf": Target(_prepare_gguf, _mutate_gguf, _read_gguf),
    "gguf-parts": Target(_prepare_parts, _mutate_parts, _read_parts),
    **{name.lower().replace(", ", "-").replace(" ", "-"): _imported(name) for name in _FORMATS},
    **TEXT_TARGETS,
    **SERVED_TARGETS,
    **MODEL_TARGETS,
}
