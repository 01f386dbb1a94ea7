"""Load a compressed folder as a model of transformers, with errors instead of warnings."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from torch import nn

from entrollm.checkpoint.resolve import resolve
from entrollm.errors import FormatError
from entrollm.format.reader import CompressedModel
from entrollm.torch.backend import Backend, checks_bytes, default_backend
from entrollm.torch.weight import CodedWeight


def load(
    model: str | Path,
    device: str | int | torch.device | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    auto_class: Any = None,
    backend: Backend = "auto",
    check: bool = True,
    **options: Any,
) -> Any:
    """Load a compressed model.

    Args:
        model: a folder that `entrollm compress` or save_pretrained wrote, or a Hub id of one.
        device: the device for the whole model; `None` for the CPU. For several devices pass device_map="auto" instead.
        dtype: the type of activations and of tensors that are not coded.
        auto_class: the class to load it with, such as transformers.AutoModel; by default the architecture that
            config.json names.
        backend: how to multiply, as in `set_backend`.
        check: compare all bytes with their checksums before they are loaded, as plain from_pretrained does.
        options: further options of from_pretrained.
    Returns:
        the model, in evaluation mode.
    Raises:
        FormatError: the folder is malformed or damaged, or its architecture is unknown to transformers.
        UnsupportedError: it has another version of the format, or its device needs packages that are missing.
        ValueError: it is not a compressed model, or there is no such device.
    """
    _check_backend(backend)
    path = resolve(model)
    with CompressedModel.open(path, check=check) as stored:
        kind = auto_class or _architecture(path, stored.config)
    if device is not None:
        check_device(device)
        options["device_map"] = {"": device}
    token, check_token = default_backend.set(backend), checks_bytes.set(check)
    try:
        return kind.from_pretrained(path, dtype=dtype, **options)
    finally:
        default_backend.reset(token)
        checks_bytes.reset(check_token)


def check_device(device: str | int | torch.device) -> torch.device:
    """The device that is named.

    Raises:
        ValueError: torch knows none of this name, or this machine has no such GPU.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device is {device!r}, which torch does not know: {error}") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but torch {torch.__version__} finds no GPU here")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {device!r}, but torch finds {torch.cuda.device_count()} GPUs here")
    return found


def set_backend(model: nn.Module, backend: Backend) -> None:
    """Choose how a model multiplies with its coded matrices.

    Args:
        model: the model.
        backend: "auto" for the kernels of each device, "fast" for those that take more memory and less time on NVIDIA
            GPUs, "plain" for plain torch operations everywhere.
    Raises:
        ValueError: there is no such back end.
    """
    _check_backend(backend)
    for module in model.modules():
        if isinstance(module, CodedWeight):
            module.set_backend(backend)


def _check_backend(backend: Backend) -> None:
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, found {backend!r}")


def _architecture(path: Path, config: dict[str, Any]) -> Any:
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if not hasattr(found, "from_pretrained"):
        raise FormatError(
            f"{path / 'config.json'}: transformers {transformers.__version__} has no architecture {name!r}; "
            "pass auto_class=, or update transformers"
        )
    return found
