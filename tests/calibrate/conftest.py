"""Calibration is tested on the engine's checkpoints, with exact products."""

from collections.abc import Iterator

import pytest

from entrollm.calibrate import products
from tests.engine.conftest import checkpoint

__all__ = ["checkpoint", "exact_products"]


@pytest.fixture(autouse=True, scope="package")
def exact_products() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_HAS_BFLOAT16", False)
        yield
