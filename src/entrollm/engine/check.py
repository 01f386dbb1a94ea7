"""Whether the engine runs a checkpoint, told from its configuration and the shapes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.checkpoint.names import text_names
from entrollm.engine.decoder import Decoder
from entrollm.engine.weights import Embedding, Fetch, Floats, Ids, Linear, stacked_matrix
from entrollm.errors import EntroLLMError
from entrollm.models import read_config
from entrollm.models.config_fields import Fields
from entrollm.threads import start_pool


def why_not_run(path: Path) -> str | None:
    """Say why `entrollm run` cannot load a checkpoint, before it is compressed; None if it can.

    Raises:
        FormatError, UnsupportedError, ValueError: it is not a checkpoint that is read at all.
    """
    with Checkpoint.open(path) as checkpoint:
        try:
            names = text_names(checkpoint.tensors)
            shapes = {name: checkpoint.tensors[theirs].shape for name, theirs in names.items()}
            Decoder(read_config(Fields(checkpoint.config, "config.json")), _Shapes(shapes))
        except EntroLLMError as error:
            return str(error)
    return None


class _Shapes:
    """The shapes of a model's tensors in place of its weights."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self.pool = start_pool(1)

    def __contains__(self, name: str, /) -> bool:
        return name in self._shapes or stacked_matrix(name, self._shapes.get) is not None

    def linear(self, *names: str) -> Linear:
        return _Matrix(self._shape(names[0]))

    def embedding(self, name: str, /) -> Embedding:
        return _Matrix(self._shape(name))

    def tensor(self, name: str, /) -> Floats:
        zeros: Floats = np.broadcast_to(np.float32(0), self._shapes[name])
        return zeros

    def fetcher(self, experts: Sequence[Sequence[str]], /) -> Fetch | None:
        return None

    def _shape(self, name: str) -> tuple[int, ...]:
        stacked = None if name in self._shapes else stacked_matrix(name, self._shapes.get)
        return self._shapes[name] if stacked is None else self._shapes[stacked[0]][1:]


class _Matrix:
    """A matrix without values; it is never multiplied with."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        # A tensor that is not a matrix fails the check of its shape.
        self.shape: tuple[int, int] = shape  # type: ignore[assignment]

    def __call__(self, x: Floats, /) -> Floats:
        raise TypeError("this matrix has a shape and no values")

    def rows(self, ids: Ids, /) -> Floats:
        raise TypeError("this matrix has a shape and no values")
