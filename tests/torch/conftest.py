"""Models that several tests share, each written once."""

from pathlib import Path

import pytest
import torch

import entrollm.hf  # noqa: F401 (registers the quantization method)
from tests.torch.models import write_coded


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed Llama in several shards; its head is its embedding. The checkpoint lies beside it as `source`."""
    return write_coded(tmp_path_factory.mktemp("llama"), tie_word_embeddings=True)


@pytest.fixture(scope="session")
def coded_untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed Llama with biases and a head of its own."""
    return write_coded(tmp_path_factory.mktemp("untied"), attention_bias=True, mlp_bias=True)
