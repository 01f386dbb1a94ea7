"""Calibration is tested on the engine's checkpoints, with exact products."""

import pytest

from entrollm.calibrate import products
from tests.engine.conftest import checkpoint

__all__ = ["checkpoint", "exact_products"]


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_HAS_BFLOAT16", False)
