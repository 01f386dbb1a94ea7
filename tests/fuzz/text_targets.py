"""Targets without weights: configurations, tokenizers, generation options and the product's own records."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from entrollm.checkpoint.panics import decode, encode
from entrollm.cli.compare import read_json
from entrollm.compress.shard import MatrixRecord, ShardRecord
from entrollm.engine.files import read_json as read_file
from entrollm.engine.files import read_model_files
from entrollm.engine.options import resolve_options
from entrollm.models import ARCHITECTURES, read_config
from entrollm.models.config_fields import Fields
from entrollm.report import read_points
from tests.engine.tokenizers_for_tests import byte_level, sentence_piece
from tests.fuzz.target import Files, Target, mutated, write
from tests.support.quantized_sources import CONFIG

_FILES = Files()


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
    write(folder / "config.json", mutated(seed, generator))


def _read_config(folder: Path) -> None:
    read_config(Fields(read_file(folder / "config.json") or {}, "config.json"))


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
        settings = {**seeds[-1]["tokenizer_config.json"]}
        del settings["added_tokens_decoder"]
        seeds.append({**seeds[-1], "tokenizer_config.json": settings})
    return seeds


def _mutate_tokenizer(folder: Path, seed: Mapping[str, Any], generator: random.Random) -> None:
    changed = generator.choice(sorted(seed))
    for name, value in seed.items():
        is_changed = name == changed or not generator.randrange(6)
        _FILES.write(folder / name, mutated(value, generator) if is_changed else _FILES.text(value))


def _read_tokenizer(folder: Path) -> None:
    tokenizer = read_model_files(folder).tokenizer
    if tokenizer is not None:
        ids = encode(tokenizer, "Once upon <x> a time, naïve <y>", add_special_tokens=False)
        decode(tokenizer, ids, skip_special_tokens=False)


def _prepare_generation(folder: Path) -> list[Any]:
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
    write(folder / "generation_config.json", mutated(seed, generator))


def _read_generation(folder: Path) -> None:
    read = read_file(folder / "generation_config.json") or {}
    resolve_options({}, Fields(read, "generation_config.json"), (2,), prompt_tokens=5)


def _prepare_points(folder: Path) -> list[Any]:
    model = {"model": "a", "method": "m", "file_bits": 3.5, "kl": {"mean": 0.02, "maximum": 1.0}}
    return [{"models": [model, {**model, "file_bits": 4}], "reference": None, "window": 512}]


def _mutate_points(folder: Path, seed: Any, generator: random.Random) -> None:
    write(folder / "points.json", mutated(seed, generator))


def _read_points(folder: Path) -> None:
    read_points(read_json(folder / "points.json"), "points")


def _prepare_record(folder: Path) -> list[Any]:
    matrix = MatrixRecord(weights=64, stored_bytes=99, entropy_bits=2.5, huffman_bits=2.6, relative_error=0.1)
    record = ShardRecord("model.safetensors", 999, 12, ("a.weight", "b"), {"a.weight": matrix, "c.weight": matrix})
    return [json.loads(json.dumps(asdict(record)))]


def _mutate_record(folder: Path, seed: Any, generator: random.Random) -> None:
    write(folder / "model.json", mutated(seed, generator))


def _read_record(folder: Path) -> None:
    ShardRecord.read(folder / "model.json").to_json()


TEXT_TARGETS: Mapping[str, Target] = {
    "config": Target(_prepare_config, _mutate_config, _read_config),
    "tokenizer": Target(_prepare_tokenizer, _mutate_tokenizer, _read_tokenizer),
    "generation": Target(_prepare_generation, _mutate_generation, _read_generation),
    "points": Target(_prepare_points, _mutate_points, _read_points),
    "record": Target(_prepare_record, _mutate_record, _read_record),
}
