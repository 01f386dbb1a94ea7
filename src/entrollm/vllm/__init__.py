"""EntroLLM for vLLM, which calls `register` in each of its processes, as a plugin of the group vllm.general_plugins."""

from __future__ import annotations


def register() -> None:
    """Register the quantization method "entrollm"."""
    from entrollm.vllm import quantization  # noqa: F401 (registers it; vLLM is imported by then)
