"""GPU tests skip where there is no GPU that the kernels run on."""

from __future__ import annotations

import pytest
import torch

from entrollm.errors import UnsupportedError
from entrollm.torch.cuda.compile import check_installed
from entrollm.torch.cuda.tuning import MIN_CAPABILITY


def _usable_gpus() -> int:
    count = torch.cuda.device_count()
    if any(torch.cuda.get_device_capability(index) < MIN_CAPABILITY for index in range(count)):
        return 0
    try:
        check_installed()
    except UnsupportedError:
        return 0
    return count


@pytest.fixture(scope="session")
def gpu() -> torch.device:
    """A GPU that the kernels run on."""
    if not _usable_gpus():
        pytest.skip("needs a GPU of compute capability 8.0 and the cuda extra")
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def two_gpus() -> None:
    """Two such GPUs."""
    if _usable_gpus() < 2:
        pytest.skip("needs two GPUs of compute capability 8.0 and the cuda extra")
