"""The plugin's tests share the models of the torch layers' tests."""

from tests.torch.conftest import _one_thread, coded, coded_untied

__all__ = ["_one_thread", "coded", "coded_untied"]
