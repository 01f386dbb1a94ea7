"""Where calibration and rounding compute."""

from __future__ import annotations

from entrollm.arrays import HOST, Device
from entrollm.errors import Message, Option, OptionError
from entrollm.recipes.options import DeviceName


def open_device(name: DeviceName) -> Device:
    """The device of a name; torch is imported for "cuda" alone.

    Raises:
        OptionError: torch is not installed.
        UnsupportedError: torch finds no GPU.
    """
    if name == "cpu":
        return HOST
    try:
        from entrollm.torch.device import TorchDevice
    except ImportError as error:
        hint = Message("install torch with: pip install 'entrollm[hf]'")
        raise OptionError(Message("{}: {}", Option("device", name), error), hint=hint) from None
    return TorchDevice(name)
