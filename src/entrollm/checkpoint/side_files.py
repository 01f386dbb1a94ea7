"""The files of a model folder besides its weights, which a derived model must carry.

Everything travels that is not listed here: configurations of the model, its processors and its generation, tokenizers,
chat templates, code, licences, model cards, and the same in subfolders. Left behind are:

- weights, in the formats of `WEIGHT_SUFFIXES`, and indices of weights; those in a folder that modules.json names, as
  sentence-transformers has them, travel, since they are no part of the main model;
- descriptions of how the weights were quantized, which the output no longer is, and checksums of files that change
  (`_STALE`);
- hidden files and folders, folders of training runs (`_LEFT_FOLDERS`), and folders that are links.
"""

from __future__ import annotations

import json
import os
from fnmatch import fnmatchcase
from pathlib import Path

from entrollm.errors import FormatError
from entrollm.format.checksums import CHECKSUMS_NAME

WEIGHT_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".gguf",
    ".ggml",
    ".npz",
    ".npy",
    ".tflite",
    ".pkl",
    ".pickle",
    ".mlmodel",
    ".mlpackage",
    ".nemo",
    ".tar",
    ".zip",
    ".index.json",
)
_STALE = frozenset(
    {"quantize_config.json", "quant_config.json", "hf_quant_config.json", "quantization_config.json", CHECKSUMS_NAME}
)
_LEFT_FOLDERS = ("checkpoint-*", "global_step*", "runs")
# What a tokenizer consists of, where it is taken from another folder than the rest.
_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model")
_TEMPLATES = ("chat_template*", "additional_chat_templates/*")


def side_files(folder: Path) -> tuple[Path, ...]:
    """The files that a derived model must carry, config.json among them, as paths below `folder`; none of a GGUF file.

    Raises:
        FormatError: one of them is a link that leads out of the folder, or modules.json is malformed.
    """
    if not folder.is_dir():
        return ()
    modules = _module_folders(folder)
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if _is_searched(Path(place) / name))
        for name in names:
            file = Path(place) / name
            is_weight = name.endswith(WEIGHT_SUFFIXES) and file.relative_to(folder).parts[0] not in modules
            if not name.startswith(".") and not is_weight and name not in _STALE:
                _check_link(folder, file)
                if file.is_file():
                    found.append(file)
    return tuple(sorted(found))


def tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """Those of the side files that belong to the tokenizer, its chat templates and the settings of generation.

    Raises:
        FormatError: one of them is a link that leads out of the folder.
    """
    patterns = (*_TOKENIZER, *_TEMPLATES, "generation_config.json")
    files = ((file, file.relative_to(folder).as_posix()) for file in side_files(folder))
    return tuple(file for file, name in files if any(fnmatchcase(name, pattern) for pattern in patterns))


def _module_folders(folder: Path) -> frozenset[str]:
    """The subfolders in which sentence-transformers keeps layers after the main model."""
    path = folder / "modules.json"
    if not path.is_file():
        return frozenset()
    try:
        modules = json.loads(path.read_bytes())
        return frozenset(module["path"] for module in modules if module["path"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FormatError(f"{path}: expected a list of modules, each with a path: {error}") from None


def _is_searched(folder: Path) -> bool:
    name = folder.name
    is_left = name.startswith(".") or any(fnmatchcase(name, pattern) for pattern in _LEFT_FOLDERS)
    return not is_left and not folder.is_symlink()


def _check_link(folder: Path, file: Path) -> None:
    """Refuse a link out of the folder; the Hub's cache may link from snapshots/<revision> to its own blobs."""
    if not file.is_symlink():
        return
    target = file.resolve()
    allowed = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        allowed.append(folder.resolve().parent.parent / "blobs")
    if not any(target.is_relative_to(root) for root in allowed):
        raise FormatError(f"{file} is a link to {target}, outside of the checkpoint; put the file in its place")
