"""Calibration is tested on the engine's checkpoints."""

from tests.engine.conftest import checkpoint

__all__ = ["checkpoint"]
