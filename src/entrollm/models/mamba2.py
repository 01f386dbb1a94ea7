"""What the config.json files of models with Mamba-2 layers have in common."""

from __future__ import annotations

import math

from entrollm.models.config_fields import Fields


def read_time_limits(fields: Fields, key: str = "time_step_limit") -> tuple[float, float] | None:
    """The least and the greatest step in time; None if there are no limits.

    JSON has no infinity: Python writes Infinity, and transformers an object that names the float.

    Raises:
        FormatError: they are not two numbers in order.
    """
    value = fields.raw(key)
    if value is None:
        return None
    if isinstance(value, list) and len(value) == 2:
        limits = [_number(item) for item in value]
        if limits[0] is not None and limits[1] is not None and 0 <= limits[0] <= limits[1]:
            return None if limits[0] == 0 and limits[1] == math.inf else (limits[0], limits[1])
    raise fields.error(key, "two numbers in order")


def _number(value: object) -> float | None:
    if isinstance(value, dict):
        value = value.get("__float__")
    if value in ("Infinity", "inf", math.inf):
        return math.inf
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and value == value else None
