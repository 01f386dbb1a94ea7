"""The plugin for transformers: load folders of coded matrices, or code matrices while a checkpoint is loaded."""

from __future__ import annotations

import os
import types
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from entrollm.errors import UnsupportedError
from entrollm.format import layout
from entrollm.format.reader import CompressedModel
from entrollm.hf.config import EntroConfig
from entrollm.hf.experts import serve_experts
from entrollm.hf.live import LiveCoder, QuantizeWhileLoading
from entrollm.hf.names import StoredEntries, StoredParameter, around, find_parameters
from entrollm.hf.parallel import is_parallel, load_parts, mark_local
from entrollm.hf.resize import refuse_resizing
from entrollm.hf.save import save_pretrained
from entrollm.matrix import matrix_of
from entrollm.torch.backend import check_cuda_packages, checks_bytes, default_backend, uses_cuda_kernels
from entrollm.torch.entries import to_tensor
from entrollm.torch.layers import put_weight, watch_inputs
from entrollm.torch.parallel import without_entries
from entrollm.torch.stack import CodedStack
from entrollm.torch.weight import CodedWeight

# The beginning of the names of entries that transformers must not load; no tensor has such a name.
_LEFT_OUT = "entrollm left out "


@register_quantizer(layout.QUANT_METHOD)
class EntroQuantizer(HfQuantizer):
    """The object that transformers calls while it loads a model with an EntroConfig."""

    quantization_config: EntroConfig

    def __init__(self, quantization_config: EntroConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._names: dict[str, str] = {}
        self._files: list[Path] = []
        self._coder: LiveCoder | None = None
        self._is_parallel = False

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Check that the devices are supported, before anything is loaded.

        Raises:
            UnsupportedError: a package is missing.
        """
        if device_map is None or default_backend.get() == "plain":
            return
        devices = device_map.values() if isinstance(device_map, dict) else ["cuda"]
        if torch.cuda.is_available() and any(uses_cuda_kernels(_device(device)) for device in devices):
            check_cuda_packages()

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        self._files = _check_files(checkpoint_files)
        folder = self._files[0].parent
        self._is_parallel = is_parallel(model)
        if self._is_parallel and not self.pre_quantized:
            raise UnsupportedError("tensor parallelism needs a compressed folder; make one with `entrollm compress`")
        if self.pre_quantized:
            self._prepare_stored(model, folder)
        else:
            self._coder = LiveCoder(folder, model, self.quantization_config.options().coding())
        # The entries of a layer must be on one device.
        model._no_split_modules = {*(model._no_split_modules or ()), "EntroLinear", "EntroEmbedding", "CodedWeight"}

    def _prepare_stored(self, model: Any, folder: Path) -> None:
        """Put modules for the folder's matrices into the model, whose entries transformers then loads."""
        check = _checks_bytes()
        with CompressedModel.open(folder, check=check) as stored:
            if check:
                for name in (*stored.specs, *stored.plain):
                    stored.check_checksum(name)
            shapes = {name: (spec.rows, spec.columns) for name, spec in stored.specs.items()}
            make = without_entries if self._is_parallel else _on_meta
            for parameter in find_parameters(model, shapes, stored.plain, stored.are_equal).values():
                dtype = model.get_parameter(parameter.path).dtype
                install(model, parameter, {name: make(stored, name, dtype) for name in parameter.names()})
            if self._is_parallel:
                mark_local(model)
                self._leave_out(model, stored)
        for path, weight in coded_weights(model).items():
            for suffix in weight.entries():
                self._names[weight.name + suffix] = f"{path}{suffix}"

    def _leave_out(self, model: Any, stored: CompressedModel) -> None:
        """Keep transformers from loading entries, and from warning that it does not."""
        entries = [name + suffix for name in stored.specs for suffix in stored.entries(name)]
        self._names = {entry: f"{_LEFT_OUT}{index}" for index, entry in enumerate(entries)}
        ignored = model._keys_to_ignore_on_load_unexpected or set()
        model._keys_to_ignore_on_load_unexpected = {*ignored, f"^{_LEFT_OUT}"}

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter is coded while it is loaded."""
        return self._coder is not None and param_name in self._coder.parameters

    def get_quantize_ops(self) -> QuantizeWhileLoading:
        """The operation that codes a parameter while it is loaded."""
        assert self._coder is not None
        return QuantizeWhileLoading(self._coder, install)

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Expected bytes per element of a parameter once it is coded, for the choice of devices."""
        if self.param_needs_quantization(model, param_name):
            return self.quantization_config.expected_bits() / 8
        return float(param.element_size())

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Give the entries of coded matrices their names in the model."""
        return around(weight_conversions, self._names) if self._names else weight_conversions

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """The type to load a tensor in; stored entries keep theirs."""
        if isinstance(converter, StoredEntries):
            return None
        kept: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return kept

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._coder is not None:
            self._coder.check_complete()
            self._coder.close()
            self._coder = None
        if self._is_parallel:
            with CompressedModel.open(self._files[0].parent) as stored:
                load_parts(model, stored)
        self._open_for_kernels(model)
        watch_inputs(model)
        model.save_pretrained = types.MethodType(save_pretrained, model)
        refuse_resizing(model)
        return model

    def _open_for_kernels(self, model: Any) -> None:
        """Write matrices in the GPU's layout now, one by one, and leave their entries in the files' memory maps."""
        weights = coded_weights(model).values()
        served = [weight for weight in weights if weight.backend != "plain" and uses_cuda_kernels(weight.device)]
        if not served:
            return
        on_host = _map_entries(self._files, self._names)
        for weight in served:
            if not weight.is_part:
                suffixes = [suffix for suffix in weight.entries() if weight.name + suffix in on_host]
                weight.replace_entries({suffix: on_host[weight.name + suffix] for suffix in suffixes})
            weight.matrix()
        torch.cuda.empty_cache()  # of what the layout took in between

    def get_state_dict_and_metadata(self, model: Any) -> Any:
        """Refuse to save in transformers' own way, whose files would lack the specs."""
        raise UnsupportedError("save this model with model.save_pretrained, which from_pretrained has replaced")

    def is_serializable(self) -> bool:
        """Whether save_pretrained works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the matrices can be trained."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Whether torch.compile works."""
        return True


def install(model: Any, parameter: StoredParameter, weights: Mapping[str, CodedWeight]) -> list[str]:
    """Replace a parameter, and parameters that are tied to it, with coded matrices.

    Args:
        model: the model.
        parameter: the parameter.
        weights: its matrices by their name in the checkpoint.
    Returns:
        the names of the parameters that are replaced.
    """
    weight: CodedWeight | CodedStack
    if parameter.is_stack:
        matrices = [[weights[name] for name in parts] for parts in parameter.matrices]
        weight = CodedStack(matrices, is_transposed=parameter.is_transposed)
    else:
        weight = weights[parameter.matrices[0][0]]
    _put(model, parameter.path, weight, owns=True)
    tied = [target for target, source in model.all_tied_weights_keys.items() if source == parameter.path]
    for target in tied:
        del model.all_tied_weights_keys[target]
        _put(model, target, weight, owns=False)
    return [parameter.path, *tied]


def _put(model: Any, path: str, weight: CodedWeight | CodedStack, owns: bool) -> None:
    put_weight(model, path, weight, owns)
    if isinstance(weight, CodedStack):
        serve_experts(model.get_submodule(path.rpartition(".")[0]))


def coded_weights(model: nn.Module) -> dict[str, CodedWeight]:
    """The coded matrices of a model by their path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, CodedWeight)}


def _checks_bytes() -> bool:
    """Whether to compare files with their checksums: as `load` says, or ENTROLLM_CHECK for plain from_pretrained.

    Raises:
        ValueError: the variable is neither 0 nor 1.
    """
    chosen = checks_bytes.get()
    text = os.environ.get("ENTROLLM_CHECK", "1")
    if chosen is None and text not in ("0", "1"):
        raise ValueError(f"ENTROLLM_CHECK should be 0 or 1, found {text!r}")
    return text == "1" if chosen is None else chosen


def _device(name: Any) -> torch.device:
    """The device that a device map names; tensors on disk are loaded to the CPU."""
    if isinstance(name, int):
        return torch.device("cuda", name)
    return torch.device("cpu" if name == "disk" else name)


def _check_files(checkpoint_files: Any) -> list[Path]:
    if not checkpoint_files:
        raise ValueError("a model with coded weights is loaded from a folder or a Hub id, not from a state_dict")
    files = [Path(file) for file in checkpoint_files]
    for file in files:
        if file.suffix != ".safetensors":
            raise UnsupportedError(f"{file}: coded weights are read from safetensors files only")
    return files


def _map_entries(files: Iterable[Path], names: Container[str]) -> dict[str, Tensor]:
    """Map stored entries from their files to memory."""
    entries: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            entries |= {name: opened.get_tensor(name) for name in opened.keys() if name in names}  # noqa: SIM118
    return entries


def _on_meta(stored: CompressedModel, name: str, dtype: torch.dtype) -> CodedWeight:
    """Make a coded weight for transformers to load the entries of; the stored entries are checked here."""
    matrix_of(stored, name)
    entries: dict[str, Tensor] = {}
    for suffix, array in stored.entries(name).items():
        entries[suffix] = torch.empty(array.shape, dtype=to_tensor(array[:0]).dtype, device="meta")
    return CodedWeight(name, stored.specs[name], entries, dtype, torch.device("meta"))
