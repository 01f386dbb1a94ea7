"""Damaged folders, wrong options and missing packages: each has its own error."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AutoQuantizationConfig

import entrollm.hf
from entrollm.compress.options import Method
from entrollm.errors import CorruptStreamError, FormatError, UnsupportedError
from entrollm.format import layout
from entrollm.format.reader import CompressedModel
from entrollm.hf import EntroConfig, check
from entrollm.hf.names import find_parameters
from entrollm.hf.serving import TransformersEngine
from entrollm.torch import backend
from tests.support.folders import change_entries, change_header, change_spec, read_entry
from tests.torch.models import ids

MATRIX = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def copy(coded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(coded, tmp_path / "copy"))


@pytest.fixture(params=[entrollm.hf.load, AutoModelForCausalLM.from_pretrained], ids=["load", "from_pretrained"])
def load(request: pytest.FixtureRequest) -> Callable[[Path], Any]:
    """Both ways in."""
    found: Callable[[Path], Any] = request.param
    return found


def shard_of(folder: Path, name: str = MATRIX + layout.CODED) -> Path:
    index = json.loads((folder / layout.INDEX_NAME).read_text())
    return folder / index["weight_map"][name]


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def test_truncated_shard(copy: Path, load: Callable[[Path], Any]) -> None:
    shard = shard_of(copy)
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(FormatError, match=shard.name):
        load(copy)


def test_missing_shard(copy: Path) -> None:
    shard_of(copy).unlink()
    with pytest.raises(FormatError, match="is missing, though the index names it"):
        entrollm.hf.load(copy)


def test_missing_entry(copy: Path, load: Callable[[Path], Any]) -> None:
    change_entries(shard_of(copy), {MATRIX + layout.CODED: None})
    index = json.loads((copy / layout.INDEX_NAME).read_text())
    del index["weight_map"][MATRIX + layout.CODED]
    (copy / layout.INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(FormatError, match=MATRIX):
        load(copy)


def test_wrong_spec(copy: Path, load: Callable[[Path], Any]) -> None:
    change_spec(shard_of(copy), MATRIX, shape=[128, 4096])
    with pytest.raises(FormatError, match=r"up_proj\.weight"):
        load(copy)


@pytest.mark.parametrize("version", [0, 3, "1", None])
def test_other_version_in_the_configuration(copy: Path, load: Callable[[Path], Any], version: Any) -> None:
    change_config(copy, version=version)
    with pytest.raises(UnsupportedError, match="format version"):
        load(copy)


def test_other_version_in_a_shard(copy: Path, load: Callable[[Path], Any]) -> None:
    change_header(shard_of(copy), lambda header: header["__metadata__"].update({layout.VERSION_KEY: "3"}))
    with pytest.raises(UnsupportedError, match="format version '3'"):
        load(copy)


def test_unknown_field(copy: Path, load: Callable[[Path], Any]) -> None:
    change_config(copy, group_size=128)
    with pytest.raises(FormatError, match="quantization_config has the unknown field 'group_size'"):
        load(copy)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("bits", 9, "bits must be 2 to 8, found 9"),
        ("bits", "4", "bits must be 2 to 8, found '4'"),
        ("prefer", "quality", "prefer must be one of size, speed, fixed, found 'quality'"),
        ("granularity", "group", "granularity must be one of tensor, row"),
        ("method", "awq", "method must be one of paper, ecsq, feedback, light, gptq, imported, lossless, found 'awq'"),
        ("method", "imported", "an imported model has a source"),
        ("bits_per_weight", 3.0, "give one of bits, bpw and size"),
        ("trellis", True, "trellis is for the smallest files at a size such as bpw=4.5: leave out bits=4"),
    ],
)
def test_field_with_a_wrong_value(coded: Path, field: str, value: Any, message: str) -> None:
    stored = json.loads((coded / "config.json").read_text())["quantization_config"]
    with pytest.raises(FormatError, match=message):
        EntroConfig.from_dict(stored | {field: value})


def test_damaged_block_is_named_when_it_is_used(copy: Path) -> None:
    shard = shard_of(copy)
    with CompressedModel.open(copy) as stored:
        begin = (stored.specs[MATRIX].parts or (0, 0, 0))[0]
    coded = read_entry(shard, MATRIX + layout.CODED, np.uint8)
    coded[begin : begin + 2] = 255
    change_entries(shard, {MATRIX + layout.CODED: ("U8", coded)})
    for way in ("auto", "plain"):
        model = entrollm.hf.load(copy, check=False)
        entrollm.hf.set_backend(model, way)
        with pytest.raises(CorruptStreamError, match=rf"{MATRIX}: .*the file is damaged, compress or fetch it again"):
            model(ids())


def test_ordinary_checkpoint(coded: Path) -> None:
    with pytest.raises(ValueError, match="is not a compressed model"):
        entrollm.hf.load(coded.parent / "source")


def test_unknown_architecture(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text()) | {"architectures": ["NewModel"]}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="has no architecture 'NewModel'; pass auto_class="):
        entrollm.hf.load(copy)
    assert entrollm.hf.load(copy, auto_class=transformers.AutoModelForCausalLM).can_generate()


def test_configuration_round_trip(coded: Path) -> None:
    configs = [
        EntroConfig(),
        EntroConfig(bits=8, granularity="row", prefer="speed", processor="arm"),
        EntroConfig(bpw=2.5, keep="*embed*"),
        EntroConfig(size="1.9GB", overrides={"lm_head*": 8, "*.0.*": None}),
        EntroConfig(bpw=2.5, trellis=True),
    ]
    for config in configs:
        stored = json.loads(json.dumps(config.to_dict()))
        assert AutoQuantizationConfig.from_dict(stored) == config
        assert EntroConfig.from_dict(stored).options() == config.options() or config == EntroConfig()
    assert len({config.to_json_string() for config in configs}) == len(configs)
    for method in get_args(Method):
        calibrated = {
            "quant_method": "entrollm",
            "version": 2,
            "method": method,
            "bits_per_weight": 3.0,
            "prefer": "size",
        }
        assert EntroConfig.from_dict(calibrated).to_dict() == calibrated
        assert EntroConfig.from_dict({**calibrated, "processor": "arm"}).to_dict() == calibrated


def test_wrong_options() -> None:
    with pytest.raises(ValueError, match="give one of bits, bpw and size"):
        EntroConfig(bits=4, bpw=3.0)
    with pytest.raises(ValueError, match="bits per weight must be above 0"):
        EntroConfig(bpw=-1)
    with pytest.raises(ValueError, match="threads must be at least 1"):
        EntroConfig(threads=0)
    with pytest.raises(ValueError, match="is not a valid file size"):
        EntroConfig(size="big")
    with pytest.raises(ValueError, match="bits must be 2 to 8"):
        EntroConfig(overrides={"*": 9})


def test_wrong_device(coded: Path) -> None:
    for device in ("nonsense", "cuda:x"):
        for load in (
            lambda name: entrollm.hf.load(coded, device=name),
            lambda name: TransformersEngine(name).load(coded),
        ):
            with pytest.raises(ValueError, match=f"device is '{device}', which torch does not know"):
                load(device)
    with pytest.raises(ValueError, match="device is 'meta', where tensors have no numbers"):
        TransformersEngine("meta").load(coded)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"device is .cuda:1., but torch .* finds no GPU here"):
            entrollm.hf.load(coded, device="cuda:1")


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({"torch": "2.13.0+cpu", "accelerate": "1.1.0"}, r"needs transformers 5\.23 or newer, which is missing"),
        ({"torch": "2.13.0", "transformers": "5.9.0"}, r"needs transformers 5\.23 or newer, found 5\.9\.0"),
        ({"torch": "2.5.1"}, r"needs torch 2\.6 or newer, found 2\.5\.1; run: pip install 'entrollm\[hf\]'"),
    ],
)
def test_missing_packages(versions: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    check.check_packages()
    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ImportError, match=message):
        check.check_packages()


def test_missing_cuda_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"pip install 'entrollm\[cuda\]'"):
        backend.check_cuda_packages()


def test_missing_cuda_packages_are_found_before_loading(coded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("entrollm.hf.quantizer.uses_cuda_kernels", lambda device: device.type == "cuda")
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    for places in ("auto", {"": 0}, {"model": "cuda:1", "lm_head": "disk"}):
        with pytest.raises(UnsupportedError, match="the package cuda-core, which is missing"):
            AutoModelForCausalLM.from_pretrained(coded, device_map=places)
    model = entrollm.hf.load(coded, device="cpu", backend="plain")
    assert model.model.layers[0].mlp.up_proj.weight.backend == "plain"
    assert backend.default_backend.get() == "auto"


def test_old_gpu_falls_back_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    backend._is_capable.cache_clear()
    with pytest.warns(UserWarning, match=r"compute capability 7\.5, and the kernels of EntroLLM need 8\.0"):
        assert not backend.uses_cuda_kernels(torch.device("cuda", 0))
    assert not backend.uses_cuda_kernels(torch.device("cuda", 0))
    backend._is_capable.cache_clear()


def test_cuda_kernels_get_the_matrix_and_its_device(coded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels' package is given, without a GPU."""
    asked: list[tuple[Any, torch.device, bool]] = []
    monkeypatch.setattr(backend, "open_cuda", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(backend, "check_cuda_packages", lambda: None)
    monkeypatch.setattr(backend, "uses_cuda_kernels", lambda device: device.type == "cuda")
    model = entrollm.hf.load(coded)
    weight = model.model.layers[0].mlp.up_proj.weight
    device = torch.device("cuda", 1)
    for name in ("auto", "fast"):
        backend.open_on(weight.name, weight.spec, weight.entries(), device, name)
    assert [(matrix.name, found, makes_flat) for matrix, found, makes_flat in asked] == [
        (MATRIX, device, False),
        (MATRIX, device, True),
    ]
    with CompressedModel.open(coded) as stored:
        assert asked[0][0].spec == stored.specs[MATRIX]


def test_kept_experts_that_are_transposed() -> None:
    config = transformers.GptOssConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    name = "model.layers.0.mlp.experts.down_proj.0.T"
    with pytest.raises(UnsupportedError, match=rf"{name} is a matrix of an expert that is kept .*entrollm export"):
        find_parameters(model, {}, [name], lambda a, b: False)
