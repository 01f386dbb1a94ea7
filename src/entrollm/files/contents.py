"""Folders that hold something else than a model as it is read here: refused by name, and with a way out."""

from __future__ import annotations

from pathlib import Path

from entrollm.errors import FormatError, UnsupportedError

_ADAPTER = (
    "an adapter (LoRA), which is not a whole model; merge it into the model that it was trained on, with "
    "peft's merge_and_unload and save_pretrained, and use that"
)
_PICKLES = (".bin", ".pth", ".pt", ".ckpt")
_OTHERS = {".h5": "TensorFlow", ".msgpack": "Flax", ".onnx": "ONNX", ".tflite": "TensorFlow Lite"}
_LFS_POINTER = b"version https://git-lfs"
# Files that an error lists; more are counted.
_LISTED = 4


def check_contents(folder: Path, start: str, *, has_safetensors: bool = False) -> None:
    """Refuse what a folder without config.json or without weights holds in place of them, if it is known.

    Args:
        folder: the folder.
        start: the beginning of the message, up to "holds".
        has_safetensors: whether its pickles and such are not what its user means.
    Raises:
        UnsupportedError: it holds something that is not read.
        ValueError: it holds GGUF files, which are models of their own.
    """
    present = sorted(file.name for file in folder.iterdir())
    gguf = [name for name in present if name.lower().endswith(".gguf")]
    if gguf and not has_safetensors:
        raise ValueError(f"{start} holds GGUF files; name the file, such as {folder / gguf[0]}")
    held = _whole(present) or (None if has_safetensors else _weights(present))
    if held is not None:
        raise UnsupportedError(f"{start} holds {held}")


def check_names(folder: Path, expected: tuple[str, str]) -> None:
    """Refuse safetensors files that have other names than those expected.

    Raises:
        FormatError: there are some; the message says what to do.
    """
    present = sorted(file.name for file in folder.glob("*.safetensors"))
    if not present:
        return
    found = f"{folder} has neither {expected[0]} nor {expected[1]}, only {', '.join(present[:_LISTED])}"
    found += f" and {len(present) - _LISTED} more" if len(present) > _LISTED else ""
    if len(present) == 1 and "-of-" not in present[0]:
        raise FormatError(f"{found}; if that is the whole model, rename it to {expected[0]}")
    raise FormatError(f"{found}; fetch the index as well")


def check_is_file(path: Path) -> None:
    """Refuse what is in a file's place: a folder, a pipe, which would be waited for without end, or a Git LFS pointer.

    Raises:
        FormatError: there is one. A path where nothing is passes.
    """
    if not path.exists():
        return
    if not path.is_file():
        raise FormatError(f"{path} is not a file that holds data; fetch the file again")
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise FormatError(f"{path} is a Git LFS pointer in place of the file; fetch it with: git lfs pull")


def _whole(present: list[str]) -> str | None:
    """What the folder is as a whole."""
    if "adapter_config.json" in present or any(name.startswith("adapter_model.") for name in present):
        return _ADAPTER
    if "model_index.json" in present:
        return "a pipeline of diffusers; name the folder of one of its models, such as its text_encoder"
    consolidated = [name for name in present if name.startswith("consolidated") and not name.endswith(".json")]
    if not consolidated:
        return None
    return (
        f"{consolidated[0]}, weights in the layout of their maker's own tools; use the checkpoint in the layout of "
        "transformers, or convert them to safetensors in that layout"
    )


def _weights(present: list[str]) -> str | None:
    """The weights that are not read."""
    pickles = [name for name in present if name.endswith(_PICKLES)]
    if pickles:
        return (
            f"PyTorch pickles ({pickles[0]}), which can run code when they are read; convert them to safetensors: load "
            "with transformers and call save_pretrained"
        )
    for name in present:
        kind = _OTHERS.get(Path(name).suffix)
        if kind is not None:
            return f"{name}, weights of {kind}, which are not read; use the checkpoint in safetensors"
    return None
