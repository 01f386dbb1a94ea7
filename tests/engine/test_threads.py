"""How long worker threads stay awake."""

from __future__ import annotations

import pytest

from entrollm import _core
from entrollm.threads import spin_us


def test_the_time_awake_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENTROLLM_SPIN_US", raising=False)
    assert spin_us() == 200
    for text in ("0", "50"):
        monkeypatch.setenv("ENTROLLM_SPIN_US", text)
        assert spin_us() == int(text)
        assert _core.ThreadPool(3, spin_us()).size == 3


@pytest.mark.parametrize("text", ["", "-1", "ten", "1.5", "1000001"])
def test_a_time_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("ENTROLLM_SPIN_US", text)
    with pytest.raises(ValueError, match="ENTROLLM_SPIN_US should be an integer from 0 to 1000000"):
        spin_us()
