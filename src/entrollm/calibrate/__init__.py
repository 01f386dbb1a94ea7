"""Measure what a model's matrices see of a text, for calibrated quantization."""

from entrollm.calibrate.run import DEFAULT_WINDOWS, calibrate
from entrollm.calibrate.sample import sample_windows
from entrollm.calibrate.text import calibration_windows
from entrollm.calibrate.walk import measure

__all__ = ["DEFAULT_WINDOWS", "calibrate", "calibration_windows", "measure", "sample_windows"]
