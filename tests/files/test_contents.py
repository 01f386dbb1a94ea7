"""Folders that hold something else than a model: named, with a way out."""

from __future__ import annotations

from pathlib import Path

import pytest

import entrollm
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.errors import FormatError, UnsupportedError

CONTENTS = [
    (["adapter_config.json", "adapter_model.safetensors"], r"an adapter \(LoRA\).*merge it into the model"),
    (["adapter_config.json", "adapter_model.bin"], r"an adapter \(LoRA\).*merge it into the model"),
    (["model_index.json"], "a pipeline of diffusers; name the folder of one of its models"),
    (["consolidated.safetensors", "params.json"], "consolidated.safetensors, weights in the layout of their maker's"),
    (["consolidated.00.pth", "params.json"], "consolidated.00.pth, weights in the layout of their maker's own tools"),
    (["pytorch_model.bin"], r"PyTorch pickles \(pytorch_model.bin\).*convert them to safetensors"),
    (["model-Q4_K_M.gguf"], r"GGUF files; name the file, such as .*/model-Q4_K_M.gguf"),
    (["tf_model.h5"], "tf_model.h5, weights of TensorFlow, which are not read"),
    (["flax_model.msgpack"], "flax_model.msgpack, weights of Flax, which are not read"),
    (["model.onnx"], "model.onnx, weights of ONNX, which are not read"),
]


def write(folder: Path, names: list[str], config: bool) -> Path:
    for name in [*names, *(["config.json"] if config else [])]:
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize("config", [False, True])
@pytest.mark.parametrize(("names", "message"), CONTENTS)
def test_what_is_no_model_is_named(names: list[str], message: str, config: bool, tmp_path: Path) -> None:
    folder = write(tmp_path, names, config)
    error = ValueError if "GGUF" in message else UnsupportedError
    for open_folder in (Checkpoint.open, entrollm.load):
        with pytest.raises(error, match=f"holds {message}"):
            open_folder(folder)


@pytest.mark.parametrize(
    ("names", "advice"),
    [
        (["weights.safetensors"], "if that is the whole model, rename it to model.safetensors"),
        (["model-00001-of-00002.safetensors"], "fetch the index as well"),
        ([f"part-{number}.safetensors" for number in range(9)], "and 5 more; fetch the index as well"),
    ],
)
def test_weights_of_other_names_get_the_advice_that_helps(names: list[str], advice: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=f"has neither model.safetensors nor .*{advice}"):
        Checkpoint.open(write(tmp_path, names, config=True))
