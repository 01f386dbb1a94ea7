"""Whatever a quantized checkpoint holds, reading it gives weights or a named error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.errors import EntroLLMError
from tests.checkpoint.imported import (
    test_autoround,
    test_awq,
    test_bitsandbytes,
    test_compressed_tensors,
    test_fp8,
    test_gptq,
    test_hqq,
)
from tests.support.float4_sources import pack_stack
from tests.support.quantized_sources import Arrays, Packer, change_tensors, write_source

LAYER = "model.layers.0.mlp.down_proj."
SOURCES: dict[str, tuple[dict[str, Any], Packer]] = {
    "GPTQ": (test_gptq.config(4, 32), test_gptq.packer(4, 32, act_order=True)),
    "GPTQ, 3 bits": (test_gptq.config(3, 64), test_gptq.packer(3, 64, index=False)),
    "AWQ": (test_awq.CONFIG, test_awq.pack),
    "packed": (test_compressed_tensors.config("pack-quantized"), test_compressed_tensors.CASES["groups, zeros"][1]),
    "int8": (test_compressed_tensors.config("int-quantized"), test_compressed_tensors.CASES["rows, zeros"][1]),
    "bitsandbytes": (test_bitsandbytes.CONFIG, test_bitsandbytes.pack),
    "HQQ": (test_hqq.CONFIG, test_hqq.packer(4, 64)),
    "MXFP4": ({"quant_method": "mxfp4"}, pack_stack),
    "AutoRound": test_autoround.CASES["gptq"],
}
DTYPES = [np.uint8, np.int8, np.int32, np.int64, np.float16, np.float32, np.bool_]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("damage")
            write_source(made[name], *SOURCES[name])
        return made[name]

    return get


def read_all(folder: Path) -> None:
    """Reads every packed matrix, or meets a named error."""
    try:
        with Checkpoint.open(folder) as checkpoint:
            for name in checkpoint.imported:
                if name.startswith(LAYER):
                    assert checkpoint.read_float32(name).shape == checkpoint.tensors[name].shape
    except EntroLLMError as error:
        assert str(error)


@st.composite
def arrays(draw: st.DrawFn, like: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Another type, another shape, or other values."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = list(like.shape)
    if shape and draw(st.booleans()):
        shape[draw(st.integers(0, len(shape) - 1))] += draw(st.integers(-3, 3))
    if draw(st.integers(0, 4)) == 0:
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
    dtype = draw(st.sampled_from(DTYPES)) if draw(st.integers(0, 2)) == 0 else like.dtype
    size = int(np.prod([max(0, length) for length in shape])) * np.dtype(dtype).itemsize
    octets = generator.integers(0, 2 if dtype == np.bool_ else 256, size).astype(np.uint8)
    return octets.view(dtype).reshape([max(0, length) for length in shape])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("source", SOURCES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_other_parts(source: str, folders: Callable[[str], Path], data: st.DataObject) -> None:
    folder = folders(source)
    file = folder / "model.safetensors"
    content = file.read_bytes()

    def change(tensors: Arrays) -> None:
        parts = sorted(name for name in tensors if name.startswith(LAYER))
        for name in data.draw(st.lists(st.sampled_from(parts), min_size=1, max_size=2, unique=True)):
            if data.draw(st.integers(0, 5)) == 0:
                del tensors[name]
            else:
                tensors[name] = data.draw(arrays(tensors[name]))

    try:
        change_tensors(folder, change)
        read_all(folder)
    finally:
        file.write_bytes(content)


@pytest.mark.parametrize("source", [*SOURCES, "fp8"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=st.sampled_from([None, True, -1, 0, 3, 2**70, 0.5, "", "x", [], [1], {}, {"a": None}, {"a": {"b": 1}}]))
def test_other_options(source: str, folders: Callable[[str], Path], value: Any) -> None:
    SOURCES.setdefault("fp8", (test_fp8.BLOCKS, test_fp8.packer("blocks")))
    folder = folders(source)
    config = folder / "config.json"
    content = config.read_text()
    fields = json.loads(content)
    try:
        for key in fields["quantization_config"]:
            changed = fields["quantization_config"] | {key: value}
            config.write_text(json.dumps(fields | {"quantization_config": changed}))
            read_all(folder)
    finally:
        config.write_text(content)
