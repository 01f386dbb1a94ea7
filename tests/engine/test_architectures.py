"""Every architecture against transformers, and against itself computed another way."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from entrollm.engine import decoder as decoder_module
from entrollm.engine.decoder import Decoder
from entrollm.engine.files import ModelFiles
from entrollm.engine.load import load
from entrollm.engine.model import Model
from entrollm.engine.weights import Floats
from entrollm.errors import FormatError
from entrollm.models import read_config
from entrollm.models.config_fields import Fields
from tests.engine.architectures import (
    ARCHITECTURES,
    compare_with_transformers,
    load_reference,
    random_ids,
    reference_greedy,
    reference_logits,
    relative_difference,
)
from tests.engine.dense import DenseWeights, load_dense, read_tensors
from tests.support.paths import TINY_LLAMA

Checkpoint = Callable[[str], Path]

# One of each way in which the computation of a later token can depend on earlier ones.
CACHE_KINDS = [
    "llama",
    "mistral-window",
    "phi3-longrope",
    "qwen2-window",
    "qwen3",
    "gemma3",
    "gemma2",
    "cohere2",
    "mixtral",
    "gpt_oss",
    "deepseek_v3",
    "qwen3_5",
    "lfm2",
    "nemotron_h",
]


def load_decoder(folder: Path) -> Decoder:
    config = read_config(Fields(json.loads((folder / "config.json").read_text()), "config.json"))
    return Decoder(config, DenseWeights(read_tensors(folder)))


def forward(decoder: Decoder, ids: list[int]) -> Floats:
    return decoder.forward(np.array(ids), decoder.new_cache())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_transformers(name: str, checkpoint: Checkpoint) -> None:
    folder = checkpoint(name)
    assert len(list(folder.glob("*.safetensors"))) > 1
    compare_with_transformers(load_dense(folder), folder, tolerance=1e-4)


@pytest.mark.parametrize("name", CACHE_KINDS)
def test_token_by_token_equals_batch_and_recomputation(name: str, checkpoint: Checkpoint) -> None:
    decoder = load_decoder(checkpoint(name))
    ids = random_ids(45)
    cache = decoder.new_cache()
    for end in range(1, len(ids) + 1):
        step = decoder.forward(np.array(ids[end - 1 : end]), cache)
        assert relative_difference(step[0], forward(decoder, ids[:end])[-1]) < 1e-5, end
    assert cache.ids == ids


@pytest.mark.parametrize("name", CACHE_KINDS)
def test_any_split_of_a_prompt_gives_the_same_logits(
    name: str, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = load_decoder(checkpoint(name))
    ids = random_ids(60)
    expected = forward(decoder, ids)
    cache = decoder.new_cache()
    decoder.forward(np.array(ids[:11]), cache)
    split = decoder.forward(np.array(ids[11:]), cache)
    assert split.shape == (49, expected.shape[1])
    assert relative_difference(split, expected[11:]) < 1e-5
    # Passes of 8 tokens.
    monkeypatch.setattr(decoder_module, "_TOKENS_PER_PASS", 8)
    assert relative_difference(forward(decoder, ids), expected) < 1e-5
    last = decoder.forward(np.array(ids), decoder.new_cache(), last=1)
    assert last.shape == (1, expected.shape[1])
    assert relative_difference(last[0], expected[-1]) < 1e-5


@pytest.mark.parametrize("name", ["mistral-window", "phi3-longrope"])
def test_long_generation_equals_recomputation(name: str, checkpoint: Checkpoint) -> None:
    """Long enough for the cache to grow and for a window to move within it."""
    decoder = load_decoder(checkpoint(name))
    ids = random_ids(700)
    expected = forward(decoder, ids)
    cache = decoder.new_cache()
    decoder.forward(np.array(ids[:40]), cache)
    steps = [decoder.forward(np.array([token_id]), cache)[0] for token_id in ids[40:]]
    assert relative_difference(np.stack(steps), expected[40:]) < 2e-5


def test_a_window_bounds_the_cache(checkpoint: Checkpoint) -> None:
    decoder = load_decoder(checkpoint("mistral-window"))
    cache = decoder.new_cache()
    for token_id in random_ids(1500):
        decoder.forward(np.array([token_id]), cache)
    assert all(layer.capacity <= 300 for layer in cache.layers)


@pytest.mark.parametrize("name", CACHE_KINDS)
def test_a_reused_cache_changes_nothing(name: str, checkpoint: Checkpoint) -> None:
    decoder = load_decoder(checkpoint(name))
    first = random_ids(50)
    cache = decoder.new_cache()
    for token_id in first:  # one at a time, so that a window has moved on
        decoder.forward(np.array([token_id]), cache)
    for kept, length in ((46, 52), (20, 30), (3, 4), (0, 5)):
        second = first[:kept] + random_ids(length - kept, seed=kept + 1)
        reused = cache.reuse(second)
        assert reused <= length - 1
        logits = decoder.forward(np.array(second[reused:]), cache)
        assert relative_difference(logits[-1], forward(decoder, second)[-1]) < 1e-5
        first = second


def test_reuse_keeps_the_common_beginning(checkpoint: Checkpoint) -> None:
    decoder = load_decoder(checkpoint("llama"))
    cache = decoder.new_cache()
    decoder.forward(np.array([1, 2, 3, 4]), cache)
    assert cache.reuse([1, 2, 9, 4]) == 2
    assert cache.ids == [1, 2]
    assert cache.reuse([1, 2]) == 1, "the last token is always computed"


def test_older_config_forms_mean_the_same(checkpoint: Checkpoint) -> None:
    for name, rope_type in (("llama-llama3-rope", "llama3"), ("phi3-longrope", "su"), ("phi3-partial", "yarn")):
        values = json.loads((checkpoint(name) / "config.json").read_text())
        new = read_config(Fields(values, "config.json"))
        rope = values.pop("rope_parameters")
        values["rope_theta"] = rope.pop("rope_theta")
        if "partial_rotary_factor" in rope:
            values["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        del rope["rope_type"]
        values["rope_scaling"] = {**rope, "type": rope_type}
        old = read_config(Fields(values, "config.json"))
        assert old.rope.frequencies.tobytes() == new.rope.frequencies.tobytes()
        assert (old.rope.scale, old.rope.switch_length) == (new.rope.scale, new.rope.switch_length)


def test_yarn_stretches_the_context(checkpoint: Checkpoint) -> None:
    values = json.loads((checkpoint("qwen2-yarn") / "config.json").read_text())
    assert read_config(Fields(values, "config.json")).context_length == 256
    values["max_position_embeddings"] = 64
    assert read_config(Fields(values, "config.json")).context_length == 256


def test_example_equals_transformers() -> None:
    model, reference = load_dense(TINY_LLAMA), load_reference(TINY_LLAMA)
    text = "The history of the world is"
    ids = model.encode(text)
    assert relative_difference(model.logits(ids), reference_logits(reference, ids)) < 1e-4
    result = model.generate(text, max_tokens=64)
    assert list(result.token_ids) == reference_greedy(reference, ids, 64)


@pytest.mark.parametrize("name", ["gpt2", "nemotron_h"])
def test_a_head_of_its_own_beside_an_embedding_of_another_name(name: str, tmp_path: Path) -> None:
    """transformers uses it, whatever tie_word_embeddings says."""
    ARCHITECTURES[name](tmp_path)
    tensors = {}
    for file in tmp_path.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (tmp_path / "model.safetensors.index.json").unlink()
    shape = tensors["lm_head.weight" if name == "nemotron_h" else "transformer.wte.weight"].shape
    head = np.random.default_rng(3).standard_normal(shape) / shape[1] ** 0.5
    save_file({**tensors, "lm_head.weight": head.astype(np.float32)}, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = random_ids(20)
    expected = reference_logits(load_reference(tmp_path), ids)
    assert relative_difference(load(tmp_path, threads=1).logits(ids), expected) < 2e-3


def test_a_missing_head_is_refused_unless_it_is_the_embedding(checkpoint: Checkpoint) -> None:
    tensors = read_tensors(checkpoint("llama"))
    config = json.loads((checkpoint("llama") / "config.json").read_text())
    del tensors["lm_head.weight"]
    with pytest.raises(FormatError, match=r"lm_head\.weight: the tensor is missing.*base model without an output head"):
        Model(ModelFiles(config), DenseWeights(tensors))
    tied = Model(ModelFiles({**config, "tie_word_embeddings": True}), DenseWeights(tensors)).logits([1, 2, 3])
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    assert np.array_equal(tied, Model(ModelFiles(config), DenseWeights(tensors)).logits([1, 2, 3]))
