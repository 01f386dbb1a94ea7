"""What the tests of files have in common."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def file(folder: Path) -> Path:
    """The one file of the test's folder."""
    return folder / "model.safetensors"
