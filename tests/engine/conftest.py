"""Checkpoints that several tests share, each written once."""

from collections.abc import Callable
from pathlib import Path

import pytest

from entrollm import CompressOptions, compress
from tests.engine.architectures import ARCHITECTURES


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from an architecture's name to the folder of its checkpoint."""
    folders: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in folders:
            folders[name] = ARCHITECTURES[name](tmp_path_factory.mktemp(name))
        return folders[name]

    return get


@pytest.fixture(scope="session")
def coded_folder(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str], Path]) -> Callable[[str], Path]:
    """A function from an architecture's name to the folder of its checkpoint compressed to 4 bits."""
    folders: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name) / "coded"
            compress(checkpoint(name), folders[name], CompressOptions(bits=4))
        return folders[name]

    return get
