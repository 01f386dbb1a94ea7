"""Multi-token heads: their logits against the published formula, and guesses that change no token."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from entrollm.engine.decoder import Decoder
from entrollm.engine.files import read_model_files
from entrollm.engine.head_drafter import HeadDrafter
from entrollm.engine.model import Model
from entrollm.engine.sampling import Sampler, SamplingOptions
from entrollm.engine.weights import Floats
from entrollm.errors import FormatError, UnsupportedError
from tests.engine.architectures import load_reference, random_ids, relative_difference
from tests.engine.dense import DenseWeights, load_dense, read_tensors

# Names of the head's parts in the checkpoint, and of its layer.
_BEHIND = ("model.layers.3.enorm", "model.layers.3.hnorm", "model.layers.3.eh_proj", "model.layers.3.shared_head.norm")
_APART = ("mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.fc", "mtp.norm")
_LAYOUTS = {
    "deepseek_v3": (_BEHIND, "model.layers.3."),
    "glm4_moe": (_BEHIND, "model.layers.3."),
    "glm4_moe_lite": (_BEHIND, "model.layers.3."),
    "qwen3_next": (_APART, "mtp.layers.0."),
    "qwen3_5": (_APART, "mtp.layers.0."),
}
Checkpoint = Callable[[str], Path]


class Reference:
    """A model of transformers, and a head with random weights behind it."""

    def __init__(self, folder: Path) -> None:
        self.model = load_reference(folder)
        self.base = self.model.model
        config = copy.deepcopy(self.model.config)
        if hasattr(config, "linear_num_key_heads"):
            config.layer_types, config.mlp_only_layers = ["full_attention"], []
        # Its layer has experts, as the last layers of the model have.
        config.first_k_dense_replace, config.mlp_layer_types, config.num_hidden_layers = 0, ["sparse"], 1
        layer = self.base.layers[-1] if not hasattr(config, "linear_num_key_heads") else self.base.layers[1]
        torch.manual_seed(4)
        self.block = type(layer)(config, 0).eval()
        hidden, norm = config.hidden_size, type(layer.input_layernorm)
        self.token_norm, self.hidden_norm, self.norm = (norm(hidden, eps=config.rms_norm_eps) for _ in range(3))
        self.projection = torch.nn.Linear(2 * hidden, hidden, bias=False)
        with torch.no_grad():
            for part in (self.block, self.token_norm, self.hidden_norm, self.norm, self.projection):
                for tensor in (*part.parameters(), *part.buffers()):
                    tensor.copy_(torch.randn_like(tensor) / (tensor.shape[-1] ** 0.5 if tensor.dim() > 1 else 2))

    def tensors(self, names: tuple[str, str, str, str], layer: str) -> dict[str, Floats]:
        """The head's weights as a checkpoint has them."""
        parts = (self.token_norm, self.hidden_norm, self.projection, self.norm)
        found = {f"{name}.weight": part.weight for name, part in zip(names, parts, strict=True)}
        found |= {layer + name: tensor for name, tensor in self.block.state_dict().items()}
        return {name: tensor.detach().numpy() for name, tensor in found.items()}

    def logits(self, ids: list[int]) -> Floats:
        """What the head says after each token but the first, of the tokens after the next: float32 (n - 1, vocab)."""
        with torch.no_grad():
            hidden = self.base(torch.tensor([ids])).last_hidden_state[:, :-1]
            tokens = self.base.embed_tokens(torch.tensor([ids[1:]]))
            x = self.projection(torch.cat([self.token_norm(tokens), self.hidden_norm(hidden)], dim=-1))
            count = len(ids) - 1
            places = torch.arange(count)[None]
            mask = torch.full((count, count), -torch.inf).triu(1)[None, None]
            angles = self.base.rotary_emb(x, places)
            x = self.block(x, position_embeddings=angles, attention_mask=mask, position_ids=places)
            logits: Floats = self.model.lm_head(self.norm(x))[0].numpy()
        return logits


def with_head(folder: Path, name: str) -> tuple[Reference, Model]:
    reference = Reference(folder)
    tensors: dict[str, Any] = read_tensors(folder) | reference.tensors(*_LAYOUTS[name])
    return reference, Model(read_model_files(folder), DenseWeights(tensors))


def decoder_of(model: Model) -> Decoder:
    return model._decoder


@pytest.mark.parametrize("name", _LAYOUTS)
def test_logits_are_those_of_the_formula(name: str, checkpoint: Checkpoint) -> None:
    reference, model = with_head(checkpoint(name), name)
    decoder, ids = decoder_of(model), random_ids(30)
    seen: list[Floats] = []
    decoder.forward(np.array(ids), decoder.new_cache(), observe=lambda start, hidden: seen.append(hidden))
    head = decoder.token_head()
    state = head.new_state()
    first = head.logits(head(seen[0][:20], ids[1:21], 0, state))
    then = head.logits(head(seen[0][20:-1], ids[21:], 20, state))
    assert relative_difference(np.concatenate([first, then]), reference.logits(ids)) < 1e-4


@pytest.mark.parametrize("name", ["glm4_moe", "qwen3_5"])
def test_guesses_of_the_head_change_no_token(
    name: str, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = with_head(checkpoint(name), name)
    prompt = random_ids(20, seed=1)
    expected = model.generate(prompt, max_tokens=24).token_ids
    monkeypatch.setattr("entrollm.engine.speculate.Pace.choose", lambda self, kind, most: min(most, 1))
    found = model.generate(prompt, max_tokens=24, speculate="mtp")
    assert found.token_ids == expected
    assert found.guessed_tokens > 8


def test_a_guess_is_what_the_head_says_behind_the_text(checkpoint: Checkpoint) -> None:
    """Also after guesses of several tokens, wrong guesses, and a prompt whose beginning nobody has seen."""
    reference, model = with_head(checkpoint("glm4_moe"), "glm4_moe")
    decoder, ids = decoder_of(model), random_ids(40)
    sampler = Sampler(SamplingOptions(), decoder.config.vocab_size, [])
    drafter, cache = HeadDrafter(decoder.token_head()), decoder.new_cache()
    drafter.extend(ids[:10])
    decoder.forward(np.array(ids[:9]), cache, last=1, observe=drafter.observe)
    for length, wrong in ((10, 3), (13, 0), (14, 2), (14, 1), (20, 0)):
        drafter.extend(ids[len(drafter._ids) : length])
        seen = [*ids[cache.length : length - 1], *[7] * wrong]
        if seen:
            mark = cache.mark()
            decoder.forward(np.array(seen), cache, last=1, observe=drafter.observe)
            cache.rewind(cache.length - wrong, mark)
        guess = drafter.guess(3, sampler.copy).tokens
        assert guess[0] == int(reference.logits(ids[:length])[-1].argmax()), length
        assert len(guess) == 3
    late = HeadDrafter(decoder.token_head())
    late.extend(ids[:30])
    assert late.guess(2, sampler.copy).tokens == []
    decoder.forward(np.array(ids[cache.length : 29]), cache, last=1, observe=late.observe)
    assert len(late.guess(2, sampler.copy).tokens) == 2


def test_models_without_a_head_are_refused(checkpoint: Checkpoint) -> None:
    for name in ("llama", "glm4_moe"):
        with pytest.raises(UnsupportedError, match=r"has no layer that guesses tokens \(a multi-token head\)"):
            load_dense(checkpoint(name)).generate([1], speculate="mtp")
    tensors = read_tensors(checkpoint("glm4_moe")) | {"model.layers.3.eh_proj.weight": np.zeros((96, 192), np.float32)}
    model = Model(read_model_files(checkpoint("glm4_moe")), DenseWeights(tensors))
    with pytest.raises(FormatError, match=r"model\.layers\.3\..*: the tensor is missing"):
        model.generate([1], speculate="mtp")
