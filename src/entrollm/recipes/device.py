"""Where calibration and rounding compute."""

from __future__ import annotations

from entrollm.arrays import HOST, Device
from entrollm.recipes.options import DeviceName
from entrollm.torch.device import TorchDevice


def open_device(name: DeviceName) -> Device:
    """The device of a name.

    Raises:
        UnsupportedError: torch finds no GPU.
    """
    if name == "cpu":
        return HOST
    return TorchDevice(name)
