"""Compressed folders in vLLM on the processor, against the engine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entrollm import CompressOptions, compress, load
from entrollm.errors import UnsupportedError
from tests.support.paths import TINY_LLAMA

pytest.importorskip("vllm")

PROMPT = "The history of the city"
# One process, and little memory for keys and values.
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="WARNING")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("example") / "coded"
    # The matrices that vLLM joins have codes of unequal widths.
    compress(TINY_LLAMA, path, CompressOptions(bits=8, overrides={"*.k_proj.*": 4, "*.up_proj.*": 5}))
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Any]:
    import vllm

    import entrollm.vllm

    entrollm.vllm.register()  # which vLLM does itself where the package is installed
    yield vllm.LLM(str(folder), dtype="float32", max_model_len=256, enforce_eager=True, max_logprobs=-1)


def test_it_says_what_the_engine_says(folder: Path, model: Any) -> None:
    import vllm

    engine = load(folder)
    prompt = engine.encode(PROMPT)
    expected = list(engine.generate(prompt, max_tokens=24, temperature=0.0).token_ids)
    params = vllm.SamplingParams(max_tokens=24, temperature=0.0, logprobs=-1)
    answer = model.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0].outputs[0]
    assert list(answer.token_ids) == expected
    logits = engine.logits(prompt)[-1].astype(np.float64)
    wanted = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    found = answer.logprobs[0]
    assert len(found) >= len(wanted)
    np.testing.assert_allclose([found[i].logprob for i in range(len(wanted))], wanted, atol=2e-3)


def test_matrices_without_a_layer(model: Any) -> None:
    from vllm.config import set_current_vllm_config

    from entrollm.vllm.quantization import EntroVllmConfig

    config = EntroVllmConfig.from_config({})
    message = r"model\.embed_tokens\.weight and \d+ other coded matrices have no layer in vLLM"
    with set_current_vllm_config(model.llm_engine.vllm_config), pytest.raises(UnsupportedError, match=message):
        config.check_claimed()


def test_layers_of_other_names_are_not_left_empty(model: Any) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.linear import ReplicatedLinear

    from entrollm.vllm.quantization import EntroVllmConfig

    with set_current_vllm_config(model.llm_engine.vllm_config):
        layer = ReplicatedLinear(8, 8, quant_config=EntroVllmConfig.from_config({}), prefix="language_model.other")
        with pytest.raises(UnsupportedError, match="have no layer in vLLM that EntroLLM knows"):
            layer.quant_method.process_weights_after_loading(layer)


def test_what_is_not_a_folder(model: Any, tmp_path: Path) -> None:
    from vllm.config import get_current_vllm_config, set_current_vllm_config

    from entrollm.vllm.quantization import EntroVllmConfig

    config = model.llm_engine.vllm_config
    with set_current_vllm_config(config):
        get_current_vllm_config().model_config.model = "owner/name"
        with pytest.raises(UnsupportedError, match="owner/name: give vLLM the folder of a compressed model"):
            EntroVllmConfig.from_config({}).get_quant_method(None, "model.norm")  # type: ignore[arg-type]
