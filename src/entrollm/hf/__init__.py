"""EntroLLM for transformers: importing this package registers the quantization method "entrollm"."""

from entrollm.hf import check as _check  # noqa: F401 (first, because it reports what is missing)
from entrollm.hf.config import EntroConfig
from entrollm.hf.generation import compile_config, generate
from entrollm.hf.load import load, set_backend
from entrollm.hf.quantizer import EntroQuantizer
from entrollm.torch.layers import EntroEmbedding, EntroLinear
from entrollm.torch.stack import CodedStack
from entrollm.torch.weight import CodedWeight

__all__ = [
    "CodedStack",
    "CodedWeight",
    "EntroConfig",
    "EntroEmbedding",
    "EntroLinear",
    "EntroQuantizer",
    "compile_config",
    "generate",
    "load",
    "set_backend",
]
