"""What loads and runs the models of a server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from entrollm.engine.batch import SequenceCache
from entrollm.engine.cache import Cache, check_cache_type
from entrollm.engine.files import read_json
from entrollm.engine.load import load
from entrollm.engine.memory import Memory
from entrollm.engine.model import Model, Speculate, check_draft
from entrollm.engine.speculate import Speculation
from entrollm.engine.text_model import TextModel
from entrollm.models import read_config
from entrollm.models.config_fields import Fields

# Makes what guesses the tokens of one answer, from the cache of its sequence and the tokens that the cache lacks.
Guesses = Callable[[SequenceCache, Sequence[int]], Speculation]


class Engine(Protocol):
    """Runs models of one kind on one device."""

    def context_length(self, path: Path) -> int:
        """Tokens that a model takes, read before it is loaded.

        Raises:
            FormatError: config.json is missing or malformed.
            UnsupportedError: the engine does not run the model.
        """

    def load(self, path: Path) -> TextModel:
        """Load the model in a folder.

        Raises:
            FormatError: the folder is malformed or damaged.
            UnsupportedError: the engine does not run the model.
        """

    def guesses(self, model: TextModel) -> Guesses | None:
        """What guesses tokens of answers that run alone; None if nothing does.

        Args:
            model: from load().
        Raises:
            UnsupportedError: what the engine guesses with does not fit the model.
        """


@dataclass(frozen=True)
class CpuEngine:
    """The engine of this package; see `entrollm.load`, and `Model.generate` for `speculate`."""

    threads: int | None = None
    memory: Memory = "auto"
    check: bool = True
    cache_type: str = "f32"
    speculate: Speculate | None = None

    def context_length(self, path: Path) -> int:
        """See Engine."""
        config = read_config(Fields(read_json(path / "config.json") or {}, "config.json"))
        check_cache_type(self.cache_type, config)
        return config.context_length

    def load(self, path: Path) -> TextModel:
        """See Engine."""
        return load(path, threads=self.threads, memory=self.memory, check=self.check, cache_type=self.cache_type)

    def guesses(self, model: TextModel) -> Guesses | None:
        """See Engine."""
        speculate = self.speculate
        if speculate is None:
            return None
        assert isinstance(model, Model)  # load() has made it
        if isinstance(speculate, Model):
            check_draft(model, speculate)

        def guess(cache: SequenceCache, pending: Sequence[int]) -> Speculation:
            assert isinstance(cache, Cache)  # likewise
            return model.speculation(cache, pending, speculate)

        return guess
