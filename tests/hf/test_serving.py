"""Several sequences in one step of a model of transformers, against the model's own logits; and a server of it."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import transformers

from entrollm import CompressOptions, compress, load
from entrollm.engine.batch import SequenceCache, SequenceStep
from entrollm.engine.files import ModelFiles
from entrollm.engine.weights import Floats
from entrollm.errors import UnsupportedError
from entrollm.hf import arena
from entrollm.hf.arena import ArenaCache
from entrollm.hf.runners import attention_windows
from entrollm.hf.serving import TransformersEngine, TransformersModel
from entrollm.serve.api import Settings
from entrollm.serve.server import LoadOptions, open_models
from tests.serve.running import Running
from tests.support.paths import TINY_LLAMA

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
# Name: class of the configuration, and options.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral, one window": ("MistralConfig", {"sliding_window": 6}),
    "gemma 3, windows and all": (
        "Gemma3TextConfig",
        {"head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gemma 2, capped scores": ("Gemma2Config", {"head_dim": 8, "sliding_window": 7}),
    "qwen 3 moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    ),
    "granite, scaled logits": ("GraniteConfig", {"logits_scaling": 3.0}),
    "deepseek, latent attention": (
        "DeepseekV3Config",
        {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6}
        | {"first_k_dense_replace": 2, "num_key_value_heads": 4},
    ),
    "lfm 2, convolutions": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}),
    "mamba": ("MambaConfig", {"state_size": 4}),
}
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16}
LONG_ROPE |= {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
WHOLE = ["lfm 2, convolutions", "mamba"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def made(kind: str, device: str = "cpu") -> Any:
    """A small model with random weights."""
    name, options = KINDS[kind]
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**{**SMALL, **options}))
    return model.eval().to(device)


def served(model: Any) -> TransformersModel:
    return TransformersModel(ModelFiles(config={}), model)


def tokens(count: int, seed: int = 0) -> list[int]:
    found: list[int] = np.random.default_rng(seed).integers(3, 128, count).tolist()
    return found


def expected(model: Any, ids: Sequence[int]) -> Floats:
    """The logits after the last token, without any cache."""
    with torch.inference_mode():
        logits: Floats = (
            model(torch.tensor([list(ids)], device=model.device), use_cache=False).logits[0, -1].float().cpu().numpy()
        )
    return logits


def step(model: TransformersModel, *parts: tuple[Sequence[int], SequenceCache]) -> Floats:
    return model.step([SequenceStep(np.array(ids), cache) for ids, cache in parts])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", sorted(set(KINDS) - set(WHOLE)))
def test_sequences_of_different_lengths(kind: str, device: str) -> None:
    model = made(kind, device)
    ours = served(model)
    assert ours.runs_together and ours.reads_pieces
    sequences = [tokens(count, seed) for seed, count in enumerate((19, 7, 12))]
    first, second, third = caches = [ours.new_cache() for _ in sequences]
    step(ours, (sequences[0][:11], first), (sequences[1][:4], second))
    for at in range(3):  # streams beside a prompt that is read in pieces
        step(
            ours,
            (sequences[0][11 + at : 12 + at], first),
            (sequences[2][4 * at : 4 * at + 4], third),
            (sequences[1][4 + at : 5 + at], second),
        )
    sequences[2].append(9)
    sequences[1].append(8)
    logits = step(ours, (sequences[1][-1:], second), (sequences[0][14:], first), (sequences[2][-1:], third))
    for row, index in zip(logits, (1, 0, 2), strict=True):
        np.testing.assert_allclose(row, expected(model, sequences[index]), atol=2e-4)
    assert [cache.length for cache in caches] == [19, 8, 13]


@pytest.mark.parametrize("device", DEVICES)
def test_rotations_that_depend_on_the_length(device: str) -> None:
    """A call of transformers has the frequencies of its longest sequence: each runs alone, and anew at the limit."""
    torch.manual_seed(3)
    config = transformers.Phi3Config(
        **SMALL, original_max_position_embeddings=16, rope_parameters=dict(LONG_ROPE), initializer_range=0.3
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval().to(device)
    ours = served(model)
    assert not ours.runs_together and not ours.reads_pieces
    sequences = [tokens(18), tokens(7, 1)]
    first, second = caches = [ours.new_cache() for _ in sequences]
    step(ours, (sequences[0][:14], first), (sequences[1][:3], second))
    for at in range(4):  # the first one grows to 18 tokens
        found = step(ours, *((ids[-4 + at :][:1], cache) for ids, cache in zip(sequences, caches, strict=True)))
        for row, ids in zip(found, sequences, strict=True):
            np.testing.assert_allclose(row, expected(model, ids[: len(ids) - 3 + at]), atol=2e-4)
    assert [cache.length for cache in caches] == [18, 7]
    seen: list[tuple[int, Floats]] = []
    third = ours.new_cache()
    for part in (sequences[0][:14], sequences[0][14:]):
        ours.step([SequenceStep(np.array(part), third, False, lambda *each: seen.append(each))])
    assert [(start, len(hidden)) for start, hidden in seen] == [(0, 14), (0, 18)]


@pytest.mark.parametrize("rope", [{"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, LONG_ROPE])
def test_such_rotations_are_found(rope: dict[str, Any]) -> None:
    assert attention_windows(transformers.LlamaConfig(**SMALL)) == [None, None]
    assert attention_windows(transformers.LlamaConfig(**SMALL, rope_parameters=dict(rope))) is None
    config = transformers.LlamaConfig(**SMALL)
    config.rope_parameters = {"full_attention": dict(rope)}  # by the type of layer
    assert attention_windows(config) is None


def test_buffers_that_do_not_fit_leave_all_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("llama")
    ours, ids = served(model), tokens(600)
    cache = ours.new_cache()
    step(ours, (ids[:510], cache))
    allocate, made_so_far = arena._zeros, []

    def failing(like: torch.Tensor, rows: int, capacity: int) -> torch.Tensor:
        made_so_far.append(rows)
        if len(made_so_far) % 4 == 0:
            raise torch.OutOfMemoryError("out of memory")  # of the last buffer
        return allocate(like, rows, capacity)

    others = [ours.new_cache() for _ in range(4)]
    with monkeypatch.context() as patch:
        patch.setattr(arena, "_zeros", failing)
        with pytest.raises(torch.OutOfMemoryError):
            step(ours, (ids[510:], cache))
        with pytest.raises(torch.OutOfMemoryError):
            step(ours, *((ids[:3], other) for other in others))
    np.testing.assert_allclose(step(ours, (ids[510:511], cache))[0], expected(model, ids[:511]), atol=2e-4)
    found = step(ours, (ids[511:], cache), *((ids[:5], ours.new_cache()) for _ in range(4)))
    for row, count in zip(found, (600, 5, 5, 5, 5), strict=True):
        np.testing.assert_allclose(row, expected(model, ids[:count]), atol=2e-4)


def test_beginnings_are_kept() -> None:
    model = made("mistral, one window")
    ours, ids = served(model), tokens(30)
    cache = ours.new_cache()
    step(ours, (ids[:20], cache))
    other = [*ids[:15], *tokens(4, 1)]
    assert cache.shared(other) == 15
    fork = cache.fork(15)
    found = step(ours, (other[15:], fork), (ids[20:], cache))
    np.testing.assert_allclose(found[0], expected(model, other), atol=2e-4)
    np.testing.assert_allclose(found[1], expected(model, ids), atol=2e-4)
    assert cache.reuse(other) == 15
    np.testing.assert_allclose(step(ours, (other[15:], cache))[0], found[0], atol=2e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", WHOLE)
def test_prompts_that_come_as_a_whole(kind: str, device: str) -> None:
    model = made(kind, device)
    ours, sequences = served(model), [tokens(12), tokens(7, 1)]
    assert not ours.reads_pieces
    first, second = (ours.new_cache() for _ in sequences)
    step(ours, (sequences[0][:11], first), (sequences[1][:5], second))
    step(ours, (sequences[1][5:6], second))
    found = step(ours, (sequences[0][11:], first), (sequences[1][6:], second))
    for row, ids in zip(found, sequences, strict=True):
        np.testing.assert_allclose(row, expected(model, ids), atol=2e-4)
    assert first.shared(tokens(20)) == first.fork(0).length == 0
    assert first.reuse(tokens(12)) == first.length == 0
    np.testing.assert_allclose(step(ours, (sequences[1], first))[0], found[1], atol=2e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_buffers_grow(device: str) -> None:
    """More rows and more tokens than there was room for at first, in the middle of sequences."""
    model = made("gemma 3, windows and all", device)
    ours = served(model)
    long, short = tokens(1030), [tokens(5, seed) for seed in range(4)]
    caches = [ours.new_cache() for _ in range(5)]
    step(ours, (long[:510], caches[0]))
    for at in range(4):
        step(ours, (long[510 + at : 511 + at], caches[0]), (short[at][:4], caches[1 + at]))
    step(ours, (long[514:1029], caches[0]))
    found = step(
        ours, (long[-1:], caches[0]), *((ids[4:], cache) for ids, cache in zip(short, caches[1:], strict=True))
    )
    for row, ids in zip(found, (long, *short), strict=True):
        np.testing.assert_allclose(row, expected(model, ids), atol=2e-4)


def test_rows_are_given_back() -> None:
    ours = served(made("llama"))
    rows = set()
    for _ in range(6):
        cache = ours.new_cache()
        step(ours, (tokens(3), cache))
        assert isinstance(cache, ArenaCache)
        rows.add(cache.row)
        del cache
        gc.collect()
    assert len(rows) <= 2


@pytest.mark.parametrize(("kind", "has_logits"), [("llama", True), ("granite, scaled logits", False), ("mamba", True)])
def test_hidden_states(kind: str, has_logits: bool) -> None:
    model = made(kind)
    ours, ids = served(model), tokens(9)
    cache = ours.new_cache()
    seen: list[tuple[int, Floats]] = []
    parts = [ids] if kind in WHOLE else [ids[:6], ids[6:]]
    for part in parts:
        logits = ours.step([SequenceStep(np.array(part), cache, False, lambda *each: seen.append(each))])
        assert logits.shape == (0, 128)
    expected_shapes = [(start, (len(part), 32)) for start, part in zip((0, 6), parts, strict=False)]
    assert [(start, hidden.shape) for start, hidden in seen] == expected_shapes
    assert ours.gives_prompt_logits == has_logits
    if has_logits:
        logits = ours.logits_of(np.concatenate([hidden for _, hidden in seen]))
        np.testing.assert_allclose(logits[-1], expected(model, ids), atol=2e-4)


def test_models_that_are_not_served(tmp_path: Path) -> None:
    model = transformers.AutoModel.from_config(transformers.LlamaConfig(**SMALL))
    with pytest.raises(UnsupportedError, match="LlamaModel has no output head"):
        served(model)
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(UnsupportedError, match="transformers does not read"):
        TransformersEngine("cpu").context_length(tmp_path)
    with pytest.raises(ValueError, match="is not a compressed model"):
        TransformersEngine("cpu").load(tmp_path)


def test_a_server(tmp_path: Path) -> None:
    """It answers as the engine of this package does, text, vectors and log-probabilities alike."""
    folder = tmp_path / "tiny"
    compress(TINY_LLAMA, folder, CompressOptions(bits=4))
    catalog = open_models([str(folder)], LoadOptions(slots=2, context_length=512, engine=TransformersEngine("cpu")))
    running = Running(catalog, Settings(), None)
    try:
        with httpx.Client(base_url=running.url, timeout=60) as client:
            prompts = ["The king", "The king was", "A ship"]
            body = {"prompt": prompts, "max_tokens": 8, "temperature": 0, "logprobs": 0}
            choices = client.post("/v1/completions", json=body).json()["choices"]
            model = load(folder)
            for prompt, choice in zip(prompts, choices, strict=True):
                assert choice["text"] == model.generate(prompt, max_tokens=8, temperature=0.0).text
            body = {"prompt": "The king was", "echo": True, "max_tokens": 0, "logprobs": 0}
            echoed = client.post("/v1/completions", json=body).json()["choices"][0]
            logits = model.logits(model.encode("The king was")).astype(np.float64)
            ids = model.encode("The king was")
            wanted = [row[token] - np.log(np.exp(row).sum()) for row, token in zip(logits, ids[1:], strict=False)]
            np.testing.assert_allclose(echoed["logprobs"]["token_logprobs"][1:], wanted, atol=1e-2)
            vector = client.post("/v1/embeddings", json={"input": "The king"}).json()["data"][0]["embedding"]
            assert abs(sum(number**2 for number in vector) - 1) < 1e-4
    finally:
        running.stop()
