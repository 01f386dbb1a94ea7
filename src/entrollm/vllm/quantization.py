"""The quantization method for vLLM: coded matrices in the place of the weights of linear layers and embeddings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import WeightsMapper

from entrollm.errors import UnsupportedError
from entrollm.format import layout
from entrollm.format.reader import CompressedModel
from entrollm.torch.entries import to_tensor
from entrollm.torch.joined_weights import JoinedWeights
from entrollm.torch.weight import CodedWeight

_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|tok_embeddings|wte|word_embeddings)\.weight$")


@register_quantization_config(layout.QUANT_METHOD)
class EntroVllmConfig(QuantizationConfig):  # type: ignore[misc]
    """What vLLM makes of the `quantization_config` of a compressed folder."""

    def __init__(self) -> None:
        super().__init__()
        self._stored: CompressedModel | None = None
        self._claimed: set[str] = set()

    def get_name(self) -> str:
        """The method's name."""
        return layout.QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Types of activations."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Without the CUDA kernels, which need 80, layers are slow but right."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Files with the method's settings: none, since each matrix has its spec in the weight files."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> EntroVllmConfig:
        """Take the settings of config.json, of which none matters here."""
        return cls()

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """Keep vLLM from loading the entries of coded matrices, which layers open themselves."""
        return WeightsMapper(orig_to_new_suffix={f".weight{suffix}": None for suffix in layout.SUFFIXES})

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a layer multiplies: by coded matrices if the folder has them.

        Raises:
            UnsupportedError: only some of a layer's matrices are coded, or it is a layer of experts.
        """
        stored = self._folder()
        if isinstance(layer, LinearBase | VocabParallelEmbedding):
            names = self._names(layer, prefix)
            coded = [name for name in names if name in stored.specs]
            if coded and len(coded) < len(names):
                kept = next(name for name in names if name not in coded)
                raise UnsupportedError(
                    f"{kept} is kept in its type, and {coded[0]}, which vLLM multiplies with in one layer, is coded"
                )
            if coded:
                self._claimed.update(names)
                return EntroVllmMethod(self, stored, names)
            return _DenseLinear(self) if isinstance(layer, LinearBase) else _DenseEmbedding(self)
        if any(name.startswith(f"{prefix}.") for name in stored.specs) and _holds_experts(layer):
            raise UnsupportedError(f"{prefix}: coded experts run in transformers, not in vLLM")
        return None

    def _folder(self) -> CompressedModel:
        """The compressed folder, opened once.

        Raises:
            UnsupportedError: the model is not a folder, or is split among processes.
        """
        if self._stored is None:
            if get_tensor_model_parallel_world_size() > 1:
                raise UnsupportedError("EntroLLM's plugin for vLLM runs on one device; leave tensor_parallel_size at 1")
            path = Path(get_current_vllm_config().model_config.model)
            if not path.is_dir():
                raise UnsupportedError(f"{path}: give vLLM the folder of a compressed model, such as of `hf download`")
            self._stored = CompressedModel.open(path)
        return self._stored

    def _names(self, layer: nn.Module, prefix: str) -> list[str]:
        """The checkpoint's matrices of a layer: several where vLLM has joined them."""
        parent, _, name = prefix.rpartition(".")
        unpacked = self.packed_modules_mapping.get(name, [name])
        names = [f"{parent}.{each}.weight" if parent else f"{each}.weight" for each in unpacked]
        stored = self._folder()
        is_tied = isinstance(layer, ParallelLMHead) and names[0] not in (*stored.specs, *stored.plain)
        if is_tied or (not prefix and isinstance(layer, VocabParallelEmbedding)):
            # vLLM does not tell the name of an embedding.
            found = [each for each in stored.specs if _EMBEDDING.search(each)]
            return found if len(found) == 1 else names
        return names

    def check_claimed(self) -> None:
        """Check that each coded matrix has its layer, since vLLM does not load their entries.

        Raises:
            UnsupportedError: there are matrices that no layer has asked for.
        """
        left = sorted(set(self._folder().specs) - self._claimed)
        if left:
            raise UnsupportedError(
                f"{left[0]} and {len(left) - 1} other coded matrices have no layer in vLLM that EntroLLM knows; run "
                "this model in transformers"
            )


class EntroVllmMethod(LinearMethodBase):  # type: ignore[misc]
    """Multiplies by coded matrices, which may have codes of their own, one below the other.

    Args:
        config: knows which matrices have layers.
        stored: the folder.
        names: the matrices.
    """

    def __init__(self, config: EntroVllmConfig, stored: CompressedModel, names: list[str]) -> None:
        self._config = config
        self._stored = stored
        self._names = names

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Open the matrices; a vocabulary may have fewer rows than vLLM makes room for.

        Raises:
            UnsupportedError: they have other shapes than the layer.
        """
        device = torch.empty(0).device  # which vLLM has made the default
        weights = []
        for name in self._names:
            spec = self._stored.specs[name]
            entries = {suffix: to_tensor(array) for suffix, array in self._stored.entries(name).items()}
            weights.append(CodedWeight(name, spec, entries, params_dtype, device))
        joined = JoinedWeights(weights)
        if any(weight.spec.columns != input_size for weight in weights) or joined.out_features > output_size:
            shapes = [(weight.spec.rows, weight.spec.columns) for weight in weights]
            raise UnsupportedError(f"{self._names}: vLLM wants ({output_size}, {input_size}), the folder has {shapes}")
        # No parameter of the layer: vLLM must neither load nor move it.
        layer.entrollm_weights = joined  # type: ignore[assignment]

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Write the matrices in the device's layout.

        Raises:
            UnsupportedError: another matrix has no layer.
        """
        self._config.check_claimed()
        _weights(layer).matrix()

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply: (..., in_features) -> (..., out_features) in the type of x."""
        product = _weights(layer).multiply(x)
        return product if bias is None else product + bias

    def embedding(self, layer: nn.Module, input_: Tensor) -> Tensor:
        """Look up rows: integers (...) -> (..., in_features)."""
        return _weights(layer).weights[0].rows(input_)

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """Let a head multiply by the matrix of the embedding."""
        layer.entrollm_weights = _weights(embed_tokens)  # type: ignore[assignment]
        return layer


class _DenseLinear(UnquantizedLinearMethod):  # type: ignore[misc]
    """Multiplies by a matrix that is not coded.

    Where no layer has asked for a coded matrix, such layers alone notice that their weights have not been loaded.
    """

    def __init__(self, config: EntroVllmConfig) -> None:
        super().__init__()
        self._config = config

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """See check_claimed."""
        self._config.check_claimed()
        super().process_weights_after_loading(layer)


class _DenseEmbedding(UnquantizedEmbeddingMethod):  # type: ignore[misc]
    """The same for embeddings and heads."""

    def __init__(self, config: EntroVllmConfig) -> None:
        super().__init__()
        self._config = config

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """See check_claimed."""
        self._config.check_claimed()
        super().process_weights_after_loading(layer)


def _weights(layer: nn.Module) -> JoinedWeights:
    found: JoinedWeights = layer.entrollm_weights  # type: ignore[assignment]
    return found


def _holds_experts(layer: nn.Module) -> bool:
    return "expert" in type(layer).__name__.lower() or "moe" in type(layer).__name__.lower()
