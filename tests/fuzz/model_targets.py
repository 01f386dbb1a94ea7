"""Models whose configuration does not fit their tensors: refused by name when they are loaded, or they run."""

from __future__ import annotations

import json
import random
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from entrollm.checkpoint.names import text_names
from entrollm.engine.decoder import Decoder
from entrollm.models import read_config
from entrollm.models.config_fields import Fields
from tests.engine.architectures import ARCHITECTURES
from tests.engine.dense import DenseWeights, read_tensors
from tests.fuzz.mutate import mutate_json
from tests.fuzz.target import Target

# One of each kind of part.
_KINDS = ("phi3-longrope", "gemma3", "gpt2", "gpt_oss", "deepseek_v3", "qwen3_5", "lfm2", "nemotron_h")


class UncheckedError(Exception):
    """An error that no check raised: NumPy or Python found what a check should have named."""


class _Models:
    """The configurations of some architectures, and their tensors."""

    def __init__(self) -> None:
        self._tensors: dict[str, dict[str, Any]] = {}

    def prepare(self, folder: Path) -> list[Any]:
        seeds = []
        for name in _KINDS:
            place = folder / name
            place.mkdir()
            ARCHITECTURES[name](place)
            tensors = read_tensors(place)
            self._tensors[name] = {key: tensors[theirs] for key, theirs in text_names(tensors).items()}
            seeds.append((name, json.loads((place / "config.json").read_text())))
        return seeds

    def mutate(self, folder: Path, seed: tuple[str, Any], generator: random.Random) -> None:
        """Change the configuration, and seldom leave out, transpose or reshape a tensor."""
        name, config = seed
        changed = generator.choice(sorted(self._tensors[name])) if not generator.randrange(4) else None
        if changed is None or generator.randrange(2):
            config = mutate_json(config, generator)
        how = generator.choice(("none", "transposed", "flat", "longer", "shorter", "scalar"))
        (folder / "model.json").write_text(json.dumps([name, config, changed, how]))

    def read(self, folder: Path) -> None:
        name, config, changed, how = json.loads((folder / "model.json").read_text())
        tensors = dict(self._tensors[name])
        if changed is not None:
            array = tensors.pop(changed)
            if how != "none":
                tensors[changed] = _reshaped(array, how)
        try:
            decoder = Decoder(read_config(Fields(config, "config.json")), DenseWeights(tensors))
            cache = decoder.new_cache()
            for ids in ([1, 2, 3], [4]):
                decoder.forward(np.array(ids), cache)
        except ValueError as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            if "/entrollm/" in last.filename and (last.line or "").startswith("raise"):
                raise
            raise UncheckedError(f"{error} at {last.filename}:{last.lineno}") from error


def _reshaped(array: Any, how: str) -> Any:
    """A tensor of another shape; those of the weights that stand in for files stay matrices."""
    if how == "transposed":
        return np.ascontiguousarray(array.T)
    if how == "flat" and array.ndim != 2:
        return array.reshape(-1)
    if how == "scalar" and array.ndim != 2:
        return array.reshape(-1)[0].reshape(())
    if how == "longer":
        return np.concatenate([array, array[:1]])
    return array[:-1]


_MODELS = _Models()
MODEL_TARGETS: Mapping[str, Target] = {"models": Target(_MODELS.prepare, _MODELS.mutate, _MODELS.read)}
