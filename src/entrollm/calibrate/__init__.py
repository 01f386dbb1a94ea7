"""Measure what a model's matrices see of a text, for calibrated quantization."""

from entrollm.calibrate.run import calibrate
from entrollm.calibrate.text import calibration_windows
from entrollm.calibrate.walk import measure

__all__ = ["calibrate", "calibration_windows", "measure"]
