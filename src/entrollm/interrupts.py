"""Interrupts while the `entrollm` command imports the package: they end it at once, without a traceback.

`entrollm.__main__` reports those that come later.
"""

import os
import signal
import sys


def _is_command() -> bool:
    """Whether this process was started as the command, by its name or as a module."""
    first = (getattr(sys, "argv", None) or [""])[0]
    if first == "-m":  # while Python looks for the module
        return "entrollm" in sys.orig_argv
    name, _ = os.path.splitext(os.path.basename(first))  # noqa: PTH119, PTH122 (pathlib takes long to import)
    return bool(name == "entrollm")


if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
