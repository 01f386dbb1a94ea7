"""What loads and runs the models of a server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from entrollm.engine.files import read_json
from entrollm.engine.load import load
from entrollm.engine.memory import Memory
from entrollm.engine.text_model import TextModel
from entrollm.models import read_config
from entrollm.models.config_fields import Fields


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


@dataclass(frozen=True)
class CpuEngine:
    """The engine of this package; see `entrollm.load`."""

    threads: int | None = None
    memory: Memory = "auto"
    check: bool = True

    def context_length(self, path: Path) -> int:
        """See Engine."""
        return read_config(Fields(read_json(path / "config.json") or {}, "config.json")).context_length

    def load(self, path: Path) -> TextModel:
        """See Engine."""
        return load(path, threads=self.threads, memory=self.memory, check=self.check)
