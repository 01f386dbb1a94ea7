"""Measure what a model's matrices see of a text, for calibrated quantization."""

from entrollm.calibrate.calibration import DEFAULT_WINDOWS, WINDOW_TOKENS, CalibrationText, calibrate, held_out
from entrollm.calibrate.compare import compare
from entrollm.calibrate.follow import follow
from entrollm.calibrate.joined import check_windows
from entrollm.calibrate.measure import measure
from entrollm.calibrate.sample import sample_windows
from entrollm.calibrate.store import StoredStatistics
from entrollm.calibrate.text import calibration_windows
from entrollm.calibrate.tune import Tuner, TuneResult, check_predicts

__all__ = [
    "DEFAULT_WINDOWS",
    "WINDOW_TOKENS",
    "CalibrationText",
    "StoredStatistics",
    "TuneResult",
    "Tuner",
    "calibrate",
    "calibration_windows",
    "check_predicts",
    "check_windows",
    "compare",
    "follow",
    "held_out",
    "measure",
    "sample_windows",
]
