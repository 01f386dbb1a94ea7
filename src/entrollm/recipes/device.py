"""Where calibration and rounding compute."""

from __future__ import annotations

from entrollm.arrays import Device, shared_host
from entrollm.processes import ALONE, Group
from entrollm.recipes.options import DeviceName
from entrollm.torch.device import TorchDevice


def open_device(name: DeviceName, group: Group = ALONE) -> Device:
    """The device of a name, with which a group of processes computes.

    Raises:
        UnsupportedError: torch finds no GPU.
    """
    if name == "cpu":
        return shared_host(group)
    return TorchDevice(name, group)
