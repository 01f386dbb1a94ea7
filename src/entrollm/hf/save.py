"""Save a model with coded matrices as a folder that `entrollm run` and from_pretrained load."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import dot_natural_key, revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from entrollm.compress.target import parse_size
from entrollm.errors import UnsupportedError
from entrollm.format import layout
from entrollm.format.checksums import CHECKSUMS_NAME, checksums_text
from entrollm.format.stored import store_matrix
from entrollm.format.writer import ShardWriter
from entrollm.system import naming, scratch_folder
from entrollm.torch.entries import to_array
from entrollm.torch.weight import CodedWeight

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_CHUNK_BYTES = 1 << 24


def save_pretrained(
    model: Any,
    save_directory: str | Path,
    is_main_process: bool = True,
    *,
    push_to_hub: bool = False,
    max_shard_size: int | str = "50GB",
    **unsupported: Any,
) -> None:
    """Write the model's coded matrices as they are, its other tensors, and its configuration.

    The files are written to a temporary folder inside and moved at the end, config.json last.

    Args:
        model: loaded by from_pretrained.
        save_directory: the folder; files of an earlier model in it are replaced.
        is_main_process: False writes nothing.
        push_to_hub: not supported here; call model.push_to_hub.
        max_shard_size: the largest size of a file, unless a single tensor is larger.
        unsupported: other options of transformers, which are refused unless they are `None`.
    Raises:
        UnsupportedError: an option is not supported, or a tensor is offloaded.
        ValueError: `save_directory` is a file.
    """
    if push_to_hub:
        raise UnsupportedError("save_pretrained does not upload coded models; call model.push_to_hub(repo_id)")
    if given := sorted(name for name, value in unsupported.items() if value is not None):
        raise UnsupportedError(f"save_pretrained of a coded model has no option {given[0]!r}")
    if not is_main_process:
        return
    folder = Path(save_directory)
    if folder.is_file():
        raise ValueError(f"{folder} is a file; name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    with scratch_folder(".entrollm-", folder) as temporary:
        _write(model, temporary, parse_size(str(max_shard_size)))
        _publish(temporary, folder)


def _write(model: Any, folder: Path, shard_bytes: int) -> None:
    coded = {module.name: module for module in model.modules() if isinstance(module, CodedWeight)}
    if any(weight.is_part for weight in coded.values()):
        raise UnsupportedError("this process holds a part of the model only; its folder has all of it, copy that")
    if scaled := next((weight for weight in coded.values() if weight.factor != 1), None):
        raise UnsupportedError(
            f"{scaled.name} was multiplied with {scaled.factor:g} in place since it was loaded, which its file cannot "
            "hold; save the model before its first call, or copy the folder that it was loaded from"
        )
    plain = _plain_tensors(model)
    sizes = {name: sum(entry.nbytes for entry in weight.entries().values()) for name, weight in coded.items()}
    sizes |= {name: tensor.nbytes for name, tensor in plain.items()}
    shards = _share_out(sizes, shard_bytes)
    entries: dict[str, str] = {}
    total = 0
    for index, names in enumerate(shards):
        path = folder / layout.shard_name(index, len(shards))
        with ShardWriter(path) as writer:
            for name in names:
                if name in coded:
                    weight = coded[name]
                    arrays = {suffix: to_array(entry.cpu()) for suffix, entry in weight.entries().items()}
                    writer.add_matrix(store_matrix(name, weight.spec, arrays))
            for name in names:
                if name in plain:
                    writer.add_plain(name, _dtype(name, plain[name]), tuple(plain[name].shape), _chunks(plain[name]))
        entries |= dict.fromkeys((entry.name for entry in writer.entries), path.name)
        total += path.stat().st_size
    if len(shards) > 1:
        index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": entries}, indent=1)
        with naming(folder / layout.INDEX_NAME):
            (folder / layout.INDEX_NAME).write_text(index_text + "\n", encoding="utf-8")
    model.config.dtype = model.dtype
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    # Only headers: tokenizers and configurations are saved by transformers too, after this.
    (folder / CHECKSUMS_NAME).write_text(checksums_text(folder, ()), encoding="utf-8")


def _plain_tensors(model: Any) -> dict[str, Tensor]:
    """All tensors of the model's state except coded matrices, under the names of its checkpoint."""
    owned = {path for path, module in model.named_modules() if isinstance(module, CodedWeight)}
    state = {name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[0] not in owned}
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    state = remove_tied_weights_from_state_dict(state, model)
    stored: Mapping[str, Tensor] = revert_weight_conversion(model, state)
    for name, tensor in stored.items():
        if tensor.is_meta:
            raise UnsupportedError(f"{name} is offloaded; load the model without offloading to save it")
    return dict(stored)


def _share_out(sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    """Share out names to files, in the order of layers. A tensor larger than a file gets one of its own."""
    shards: list[list[str]] = [[]]
    used = 0
    for name in sorted(sizes, key=dot_natural_key):
        if shards[-1] and used + sizes[name] > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += sizes[name]
    return shards


def _dtype(name: str, tensor: Tensor) -> str:
    if tensor.dtype not in _DTYPES:
        raise UnsupportedError(f"{name} is {tensor.dtype}, which safetensors files of this format do not have")
    return _DTYPES[tensor.dtype]


def _chunks(tensor: Tensor) -> Iterable[Any]:
    """Yield the bytes of a tensor."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for part in torch.split(flat, _CHUNK_BYTES):
        yield part.cpu().numpy()


def _publish(source: Path, folder: Path) -> None:
    """Move files into the folder, the configuration last, and remove weights of an earlier model."""
    names = sorted((file.name for file in source.iterdir()), key=lambda name: (name == "config.json", name))
    for name in names:
        (source / name).replace(folder / name)
    for file in folder.glob("model*.safetensors*"):
        if file.name not in names:
            file.unlink()
