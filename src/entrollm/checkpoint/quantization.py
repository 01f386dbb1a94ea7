"""How a checkpoint says that its weights are quantized, and what is refused because nothing says it.

transformers looks for `quantization_config` in config.json and in the configuration of the text part; older versions of
compressed-tensors wrote `compression_config`, and MLX writes `quantization`.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from entrollm.checkpoint.fp8 import FP8_DTYPES
from entrollm.checkpoint.imported import find_format
from entrollm.checkpoint.imported.float4_layers import quark_weight
from entrollm.checkpoint.imported.formats import refuse_rotations
from entrollm.errors import FormatError, UnsupportedError
from entrollm.files.safetensors import Entry

KEY = "quantization_config"
_KEYS = (KEY, "compression_config", "quantization")
_FP8_METHODS = ("fp8", "fbgemm_fp8")
_QUARK_FP8 = ("fp8_e4m3", "fp8_e5m2")
_READ = (
    "bf16, f16, f32, fp8, GPTQ, AWQ, AutoRound, compressed-tensors (integers, fp8, fp4), ModelOpt or Quark (fp8, fp4), "
    "bitsandbytes (8 bits), HQQ, MXFP4, or GGUF"
)
# Files in which quantizers describe their work beside config.json.
_OTHER_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "quantization_config.json")
_INTEGERS = frozenset({"I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"})
# Integers that models store beside their weights, by the end of the name: positions, indices, counters and masks.
_BUFFERS = (
    "position_ids",
    "token_type_ids",
    "input_ids",
    "relative_position_index",
    "num_batches_tracked",
    "mask",
    "attn.bias",
    "attention.bias",
)


# What models compute when they are made, in floats; some checkpoints store it.
_COMPUTED = ("rotary_emb.inv_freq", "masked_bias")


def is_buffer(name: str, dtype: str) -> bool:
    """Whether a tensor is no weight but a buffer, such as positions or a mask, which transformers may drop."""
    return name.endswith(_COMPUTED) or (dtype in _INTEGERS | {"BOOL"} and name.endswith(_BUFFERS))


def find_description(config_path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with its description of quantization, if it has one, under `quantization_config` at the top.

    Raises:
        FormatError: it is not an object, or there are two that differ.
        UnsupportedError: it describes weights that are not read; the message names them.
    """
    found: dict[str, Any] = {}
    cleaned = dict(config)
    for section in ("", *config):
        values = config[section] if section else config
        if not isinstance(values, dict):
            continue
        keys = [key for key in _KEYS if values.get(key) is not None and (key != "quantization" or _is_mlx(values[key]))]
        found |= {f"{section}.{key}".removeprefix("."): values[key] for key in keys}
        left = {key: value for key, value in (values if section else cleaned).items() if key not in keys}
        if not section:
            cleaned = left
        elif section in cleaned:
            cleaned[section] = left
    for place, description in found.items():
        if not isinstance(description, dict):
            raise FormatError(f"{config_path}: {place} must be an object, found {type(description).__name__}")
        first = next(iter(found))
        # MLX writes its description twice.
        if description != found[first]:
            raise FormatError(
                f"{config_path}: {first} and {place} describe the weights differently; remove one of them"
            )
        _check_method(config_path, description)
    return cleaned | ({KEY: next(iter(found.values()))} if found else {})


def check_fp8(path: Path, config: Mapping[str, Any], entries: Mapping[str, Entry], scaled: Mapping[str, str]) -> None:
    """Refuse fp8 weights whose scale is missing or has a name that is not known.

    Without any description of quantization and without scales, values are what they are.

    Args:
        path: the checkpoint, for errors.
        config: its config.json.
        entries: its tensors.
        scaled: those fp8 weights that have scales.
    Raises:
        FormatError: there is one.
    """
    scales: dict[str, list[str]] = {}
    for name in entries:
        if "scale" in name.rpartition(".")[2]:
            scales.setdefault(name.rpartition(".")[0], []).append(name)
    for name, entry in entries.items():
        if entry.dtype not in FP8_DTYPES or name in scaled:
            continue
        beside = scales.get(name.rpartition(".")[0], []) + scales.get(name, [])
        if beside or config.get(KEY) is not None:
            found = f"found {', '.join(beside)}" if beside else "found no scale"
            raise FormatError(
                f"{path}: {name!r} is {entry.dtype} and needs its scale in {name}_scale_inv or {name}_scale, {found}; "
                "without it, the values are wrong by a factor"
            )


def check_integers(path: Path, entries: Mapping[str, tuple[str, tuple[int, ...]]], kept: tuple[str, ...]) -> None:
    """Refuse integers where weights belong, which no description of quantization has accounted for.

    Args:
        path: the checkpoint, for errors.
        entries: type and shape of the tensors that are not read as packed matrices.
        kept: globs of tensors that the user wants as they are.
    Raises:
        UnsupportedError: there is one; the message names it.
    """
    for name, (dtype, shape) in entries.items():
        is_weight = name.endswith("weight") or (len(shape) > 1 and not name.endswith(_BUFFERS))
        if dtype not in _INTEGERS or not is_weight or any(fnmatchcase(name, pattern) for pattern in kept):
            continue
        beside = [other for other in _OTHER_FILES if (path / other).is_file()]
        hint = f" {beside[0]} may tell: put what it says into config.json, as {KEY}, or" if beside else ""
        raise UnsupportedError(
            f"{path}: tensor {name!r} holds integers ({dtype}, shape {list(shape)}) where weights belong, and "
            f"config.json does not say how they are packed;{hint} use the original checkpoint, or one in {_READ}; "
            f"--keep {name!r} copies it as it is"
        )


def _is_mlx(description: object) -> bool:
    """Whether a `quantization` is MLX's; other tools use the word for other things."""
    return isinstance(description, dict) and {"bits", "group_size"} <= description.keys()


def _check_method(config_path: Path, description: dict[str, Any]) -> None:
    """Refuse checkpoints that are quantized in a way that is not read."""
    method = description.get("quant_method")
    if method == "entrollm":
        raise UnsupportedError(
            f"{config_path.parent} is compressed already; `entrollm export` writes a checkpoint of it"
        )
    # "GGUF" stands for the blocks of a GGUF file, which no folder has.
    if (
        find_format(description) not in (None, "GGUF")
        or method in _FP8_METHODS
        or (method == "compressed-tensors" and _stores_fp8(description))
        or (method == "modelopt" and description.get("quant_algo") == "FP8")
        or (method == "quark" and quark_weight(description).get("dtype") in _QUARK_FP8)
    ):
        refuse_rotations(config_path, description)
        return
    raise UnsupportedError(
        f"{config_path}: the weights are quantized by {_name(description)}, which is not supported; use the original "
        f"checkpoint, or one in {_READ}"
    )


def _name(description: Mapping[str, Any]) -> str:
    """What a description is of, as its users call it."""
    method = description.get("quant_method", description.get("method"))
    if method is None and _is_mlx(description):
        return f"MLX ({description['bits']!r:.20} bits)"
    if method == "compressed-tensors":
        groups = description.get("config_groups")
        schemes = [g.get("weights") for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
        kinds = {f"{s.get('num_bits')}-bit {s.get('type')}" for s in schemes if isinstance(s, dict)}
        listed = f" ({', '.join(sorted(kinds)):.60})" if kinds else ""
        return f"'compressed-tensors' in the format {description.get('format')!r:.40}{listed}"
    if method == "modelopt":
        return f"'modelopt' with quant_algo {description.get('quant_algo')!r:.40}"
    if method == "quark":
        kind = quark_weight(description).get("dtype", "types that differ between layers")
        return f"'quark' ({kind!s:.40})"
    if method is None:
        return f"a method that it does not name (its keys: {', '.join(map(str, description)) or 'none'!s:.80})"
    return f"{method!r:.80}"


def _stores_fp8(description: Mapping[str, Any]) -> bool:
    groups = description.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        return bool(description.get("format") == "float-quantized")
    schemes = [group.get("weights") if isinstance(group, dict) else None for group in groups.values()]
    return all(
        isinstance(scheme, dict) and scheme.get("type") == "float" and scheme.get("num_bits") == 8 for scheme in schemes
    )
