"""Gradients by hand equal those of transformers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from entrollm.arrays import HOST
from entrollm.calibrate import measure, sample_windows
from entrollm.calibrate.arithmetic import rms_norm, rms_norm_gradient
from entrollm.calibrate.backward import LayerGradient, draw_labels
from entrollm.calibrate.layer import LayerWeights, Tensors, causal_mask, rotation
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.engine.files import read_model_files
from entrollm.engine.layers import LayerWalk
from entrollm.engine.linear import DenseWeights
from entrollm.models import read_config
from entrollm.models.config_fields import Fields
from tests.engine.architectures import ARCHITECTURES, load_reference, random_ids

TOKENS = 24
NAMES = ("llama-tied", "llama-bias", "llama-head-dim", "mistral-window", "phi3-partial", "qwen2", "qwen3-window")


def our_gradients(folder: Path, ids: NDArray[np.int64], labels: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
    """Gradients of all layers' matrices, and under "hidden" that of the embedded tokens."""
    config = read_config(Fields(read_model_files(folder).config, "config.json"))
    found: dict[str, NDArray[np.float32]] = {}
    with Checkpoint.open(folder) as checkpoint:
        walk = LayerWalk(config, DenseWeights(checkpoint), ids[None])
        hidden = []
        read = Tensors(checkpoint, HOST).read
        for index in range(config.num_layers):
            hidden.append(walk.hidden[0])
            walk.step(index, DenseWeights(checkpoint))
        last = walk.hidden[0]
        head = checkpoint.read_float32("model.embed_tokens.weight" if config.tied_embeddings else "lm_head.weight")
        norm = checkpoint.read_float32("model.norm.weight")
        probabilities, _ = draw_labels(rms_norm(last, norm, config.norm_eps) @ head.T, np.random.default_rng(0))
        probabilities[np.arange(len(labels)), labels] -= 1
        gradient = rms_norm_gradient(last, norm, config.norm_eps, probabilities @ head)
        tables = rotation(config, len(ids), HOST)
        for index in reversed(range(config.num_layers)):
            weights = LayerWeights(config, read, read, index)
            layer = LayerGradient(weights, tables, causal_mask(len(ids), weights.window))
            gradient = layer(hidden[index], gradient, lambda name, x, dy: found.update({name: dy.T @ x}))
    found["hidden"] = gradient
    return found


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    folder = ARCHITECTURES[name](tmp_path)
    ids, labels = np.array(random_ids(TOKENS)), np.array(random_ids(TOKENS, seed=1))
    found = our_gradients(folder, ids, labels)
    reference = load_reference(folder)
    embedded = reference.get_input_embeddings()(torch.tensor(ids[None])).detach().requires_grad_()
    logits = reference(inputs_embeds=embedded).logits[0]
    torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="sum").backward()
    expected = {key: value.grad.numpy() for key, value in reference.named_parameters() if value.grad is not None}
    expected["hidden"] = embedded.grad[0].numpy()
    assert len(found) > 4
    for key, gradient in found.items():
        np.testing.assert_allclose(gradient, expected[key], atol=2e-4 * float(np.abs(expected[key]).max()), err_msg=key)


def test_labels_are_drawn_from_the_predictions() -> None:
    logits = np.log(np.tile(np.array([[0.7, 0.2, 0.1]], np.float32), (20_000, 1)))
    probabilities, labels = draw_labels(logits, np.random.default_rng(3))
    np.testing.assert_allclose(probabilities[0], [0.7, 0.2, 0.1], rtol=1e-5)
    np.testing.assert_allclose(np.bincount(labels) / len(labels), [0.7, 0.2, 0.1], atol=0.015)


@pytest.mark.parametrize("name", ["llama", "phi3-longrope", "qwen3-window"])
def test_every_matrix_is_measured_whatever_the_architecture(name: str, tmp_path: Path) -> None:
    folder = ARCHITECTURES[name](tmp_path)
    config = read_config(Fields(read_model_files(folder).config, "config.json"))
    (tmp_path / "statistics").mkdir()
    with Checkpoint.open(folder) as checkpoint:
        config = replace(config, bos_token_id=None)
        windows = sample_windows(checkpoint, config, (8, 48))
        statistics = measure(checkpoint, config, windows, tmp_path / "statistics")
        for key, info in checkpoint.tensors.items():
            factor, sensitivity = statistics.factor(key), statistics.sensitivity(key)
            if len(info.shape) != 2:
                assert factor is None
                assert sensitivity is None
                continue
            assert factor is not None
            assert sensitivity is not None
            assert factor.shape == (info.shape[1], info.shape[1])
            assert sensitivity.share > 0
            assert (sensitivity.row_weights is not None) == (key in ("model.embed_tokens.weight", "lm_head.weight"))
