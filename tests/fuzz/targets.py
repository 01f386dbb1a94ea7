"""What is fuzzed: for each target, files that are made once, a mutation of them, and how they are read."""

from __future__ import annotations

import base64
import json
import random
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from entrollm import _core
from entrollm.checkpoint.gguf_tokenizer import convert_tokenizer
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.checkpoint.side_files import side_files
from entrollm.cli.compare import read_json
from entrollm.compress import CodingOptions, compress_folder
from entrollm.engine.files import read_model_files
from entrollm.engine.options import resolve_options
from entrollm.files.safetensors import open_safetensors
from entrollm.format import layout
from entrollm.format.checksums import CHECKSUMS_NAME
from entrollm.format.reader import CompressedModel
from entrollm.matrix import matrix_of
from entrollm.models import ARCHITECTURES, read_config
from entrollm.models.config_fields import Fields
from entrollm.report import read_points
from tests.checkpoint.imported.test_damage import SOURCES
from tests.engine.tokenizers_for_tests import byte_level, sentence_piece
from tests.fuzz.mutate import mutate_json, mutate_text, to_text
from tests.support.checkpoints import write_checkpoint
from tests.support.gguf_sources import GgufSource, llama_values, write_gguf
from tests.support.quantized_sources import CONFIG, write_source

_TABLE = "entrollm.tensors"


@dataclass(frozen=True)
class Target:
    """A parser.

    Attributes:
        prepare: writes what is not mutated into a folder; returns the seeds of mutations.
        mutate: writes a mutation of a seed into the folder.
        read: reads the folder as the product does; it may raise the errors that the product reports.
    """

    prepare: Callable[[Path], list[Any]]
    mutate: Callable[[Path, Any, random.Random], None]
    read: Callable[[Path], object]


def _mutated(value: Any, generator: random.Random) -> bytes:
    """Mostly a mutated value, now and then damaged text."""
    if generator.randrange(5):
        return to_text(mutate_json(value, generator))
    return mutate_text(to_text(value), generator)


def _split(path: Path) -> tuple[Any, bytes]:
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def _join(path: Path, header: bytes, data: bytes, generator: random.Random) -> None:
    length = len(header) if generator.randrange(30) else generator.choice((0, 7, len(header) + 1, 2**40, 2**64 - 1))
    if not generator.randrange(30):
        data = data[: generator.randrange(len(data) + 1)]
    path.write_bytes(length.to_bytes(8, "little") + header + data)


def _mutate_header(folder: Path, seed: tuple[Any, bytes], generator: random.Random) -> None:
    _join(folder / "model.safetensors", _mutated(seed[0], generator), seed[1], generator)


def _prepare_safetensors(folder: Path) -> list[Any]:
    write_checkpoint(folder / "source")
    return [_split(path) for path in sorted((folder / "source").glob("*.safetensors"))]


def _read_safetensors(folder: Path) -> None:
    file = open_safetensors(folder / "model.safetensors")
    try:
        for name in file.tensors:
            file.array(name).sum(dtype=np.float64) if file.tensors[name].dtype[0] in "FB" else file.array(name)
    finally:
        file.close()


def _prepare_specs(folder: Path) -> list[Any]:
    write_checkpoint(folder / "source")
    seeds = []
    for name, options in (("coded", CodingOptions()), ("lossless", CodingOptions(lossless=("*",)))):
        compress_folder(folder / "source", folder / name, options)
        seeds.append(_split(folder / name / "model.safetensors"))
    shutil.copyfile(folder / "coded" / "config.json", folder / "config.json")  # without the checksums of headers
    return seeds


def _mutate_specs(folder: Path, seed: tuple[Any, bytes], generator: random.Random) -> None:
    """Change the table of specs, or a spec within it, and seldom the header around them."""
    header, data = seed
    if not generator.randrange(6):
        _mutate_header(folder, seed, generator)
        return
    table = json.loads(zlib.decompress(base64.b64decode(header["__metadata__"][_TABLE])))
    if generator.randrange(3):
        name = generator.choice(sorted(table["coded"]))
        table["coded"][name] = _mutated_spec(table["coded"][name], generator)
        text = to_text(table)
    else:
        text = _mutated(table, generator)
    packed = zlib.compress(text)
    if not generator.randrange(20):
        packed = mutate_text(packed, generator)
    changed = {**header, "__metadata__": {**header["__metadata__"], _TABLE: base64.b64encode(packed).decode()}}
    _join(folder / "model.safetensors", to_text(changed), data, generator)


def _mutated_spec(text: str, generator: random.Random) -> str:
    if not generator.randrange(5):
        return mutate_text(text.encode(), generator).decode("latin-1")
    spec = mutate_json(json.loads(text), generator)
    if isinstance(spec, dict) and "crc32" in spec and generator.randrange(8):
        spec = {**{key: value for key, value in spec.items() if key != "crc32"}, "crc32": spec["crc32"]}
    return json.dumps(spec, separators=(",", ":"))


def _read_specs(folder: Path) -> None:
    pool = _core.ThreadPool(1)
    with CompressedModel.open(folder, check=False) as model:
        for name, spec in model.specs.items():
            matrix_of(model, name).dequantize(np.arange(min(spec.rows, 2), dtype=np.int64), pool)
        for name in model.plain:
            model.array(name)


def _prepare_folder(folder: Path) -> list[Any]:
    write_checkpoint(folder / "source")
    compress_folder(folder / "source", folder / "coded", CodingOptions(shard_bytes=60_000))
    for file in (folder / "coded").iterdir():
        file.rename(folder / file.name)
    names = ("config.json", layout.INDEX_NAME, CHECKSUMS_NAME)
    seed = {name: json.loads((folder / name).read_text()) for name in names}
    seed["modules.json"] = [{"idx": 0, "name": "0", "path": ""}, {"idx": 1, "name": "1", "path": "1_Pooling"}]
    return [seed]


def _mutate_folder(folder: Path, seed: Mapping[str, Any], generator: random.Random) -> None:
    changed = generator.choice(sorted(seed))
    for name, value in seed.items():
        is_changed = name == changed or not generator.randrange(9)
        (folder / name).write_bytes(_mutated(value, generator) if is_changed else to_text(value))
    if changed != CHECKSUMS_NAME and generator.randrange(4):
        (folder / CHECKSUMS_NAME).unlink()  # it would find the change


def _read_folder(folder: Path) -> None:
    side_files(folder)
    with CompressedModel.open(folder) as model:
        model.file_bytes()


def _prepare_gguf(folder: Path) -> list[Any]:
    write_gguf(folder / "model.gguf", "Q8_0")
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
    return [[values, tensors], [values | more, tensors]]


def _mutate_gguf(folder: Path, seed: Any, generator: random.Random) -> None:
    try:
        values, tensors = mutate_json(seed, generator) if generator.randrange(4) else seed
        rows = [(name, tuple(shape), kind, bytes(size)) for name, shape, kind, size in tensors]
        content = GgufSource(values, rows).to_bytes()
    except Exception:  # no file can say this
        content = GgufSource(seed[0]).to_bytes()
    for _ in range(generator.choice((0, 0, 1, 2))):
        content = mutate_text(content, generator)
    (folder / "model.gguf").write_bytes(content)


def _read_gguf(folder: Path) -> None:
    path = folder / "model.gguf"
    with Checkpoint.open(path) as checkpoint:
        for name, info in checkpoint.tensors.items():
            if info.weights:
                checkpoint.read_float32(name)
    convert_tokenizer(path)


def _prepare_config(folder: Path) -> list[Any]:
    scalings: list[Any] = [
        None,
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ]
    more = {"tie_word_embeddings": False, "sliding_window": 32, "use_sliding_window": False, "layer_types": None}
    return [{**CONFIG, **more, "model_type": kind, "rope_scaling": s} for kind in ARCHITECTURES for s in scalings]


def _mutate_config(folder: Path, seed: Any, generator: random.Random) -> None:
    (folder / "config.json").write_bytes(_mutated(seed, generator))


def _read_config(folder: Path) -> None:
    read_config(Fields(read_model_files(folder).config, "config.json"))


def _prepare_tokenizer(folder: Path) -> list[Any]:
    (folder / "config.json").write_text("{}")
    token = {"content": "<x>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    seeds = []
    for tokenizer in (byte_level(), sentence_piece()):
        added = {str(tokenizer.get_vocab_size()): {**token, "special": True}}
        seeds.append(
            {
                "tokenizer.json": json.loads(tokenizer.to_str()),
                "tokenizer_config.json": {
                    "added_tokens_decoder": added,
                    "bos_token": "<s>",
                    "eos_token": {"content": "</s>"},
                    "extra_special_tokens": ["<y>"],
                    "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
                },
                "special_tokens_map.json": {"bos_token": "<s>", "additional_special_tokens": ["<z>"]},
                "added_tokens.json": {"<x>": tokenizer.get_vocab_size()},
            }
        )
    return seeds


def _mutate_tokenizer(folder: Path, seed: Mapping[str, Any], generator: random.Random) -> None:
    changed = generator.choice(sorted(seed))
    for name, value in seed.items():
        is_changed = name == changed or not generator.randrange(6)
        if name == "tokenizer_config.json" and generator.randrange(2):
            value = {key: item for key, item in value.items() if key != "added_tokens_decoder"}
        (folder / name).write_bytes(_mutated(value, generator) if is_changed else to_text(value))


def _read_tokenizer(folder: Path) -> None:
    tokenizer = read_model_files(folder).tokenizer
    if tokenizer is not None:
        ids = tokenizer.encode("Once upon <x> a time, naïve <y>", add_special_tokens=False).ids
        tokenizer.decode(ids)


def _prepare_generation(folder: Path) -> list[Any]:
    (folder / "config.json").write_text("{}")
    common = {
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "pad_token_id": 0,
        "max_length": 64,
        "transformers_version": "5",
    }
    sampling = {"do_sample": True, "temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.1, "typical_p": 1.0}
    limits = {"max_new_tokens": 9, "min_new_tokens": 2, "min_length": 3, "stop_strings": ["x"], "num_beams": 1}
    others = {"repetition_penalty": 1.1, "suppress_tokens": [], "bad_words_ids": None, "no_repeat_ngram_size": 0}
    return [common | sampling, common | limits | others, common | sampling | limits | others]


def _mutate_generation(folder: Path, seed: Any, generator: random.Random) -> None:
    (folder / "generation_config.json").write_bytes(_mutated(seed, generator))


def _read_generation(folder: Path) -> None:
    read = read_model_files(folder).generation_config
    resolve_options({}, Fields(read, "generation_config.json"), (2,), prompt_tokens=5)


def _prepare_imported(folder: Path) -> list[Any]:
    seeds = []
    for number, source in enumerate(SOURCES.values()):
        place = folder / f"source-{number}"
        write_source(place, *source)
        config = json.loads((place / "config.json").read_text())
        seeds.append((config, *_split(place / "model.safetensors")))
    return seeds


def _mutate_imported(folder: Path, seed: tuple[Any, Any, bytes], generator: random.Random) -> None:
    config, header, data = seed
    part = generator.randrange(3)
    quantization = config["quantization_config"]
    if part:
        config = {**config, "quantization_config": mutate_json(quantization, generator)}
    (folder / "config.json").write_bytes(to_text(config))
    text = _mutated(header, generator) if part != 1 else to_text(header)
    _join(folder / "model.safetensors", text, data, generator)


def _read_imported(folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint:
        checkpoint.check_integers()
        for name in list(checkpoint.imported)[:2]:
            checkpoint.read_float32(name)


def _prepare_points(folder: Path) -> list[Any]:
    model = {"model": "a", "method": "m", "file_bits": 3.5, "kl": {"mean": 0.02, "maximum": 1.0}}
    return [{"models": [model, {**model, "file_bits": 4}], "reference": None, "window": 512}]


def _mutate_points(folder: Path, seed: Any, generator: random.Random) -> None:
    (folder / "points.json").write_bytes(_mutated(seed, generator))


def _read_points(folder: Path) -> None:
    read_points(read_json(folder / "points.json"), "points")


TARGETS: Mapping[str, Target] = {
    "safetensors": Target(_prepare_safetensors, _mutate_header, _read_safetensors),
    "specs": Target(_prepare_specs, _mutate_specs, _read_specs),
    "folder": Target(_prepare_folder, _mutate_folder, _read_folder),
    "gguf": Target(_prepare_gguf, _mutate_gguf, _read_gguf),
    "config": Target(_prepare_config, _mutate_config, _read_config),
    "tokenizer": Target(_prepare_tokenizer, _mutate_tokenizer, _read_tokenizer),
    "generation": Target(_prepare_generation, _mutate_generation, _read_generation),
    "points": Target(_prepare_points, _mutate_points, _read_points),
    "imported": Target(_prepare_imported, _mutate_imported, _read_imported),
}
