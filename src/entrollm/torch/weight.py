"""A coded matrix as a torch module: its stored entries are buffers, which state_dict names as the file does."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from entrollm.format import layout
from entrollm.format.spec import TensorSpec
from entrollm.torch import operators
from entrollm.torch.backend import Backend, Matrix, default_backend, open_on, resting_place
from entrollm.torch.joined import JoinedWeights

# Attributes that belong to one object and are made anew in copies of it.
_OWN = ("number", "group", "_opened", "_opened_from")


class CodedWeight(nn.Module):
    """A coded matrix in the place of a parameter.

    Torch functions that get it as their weight multiply with it, look rows up in it, or get it decoded, so that layers
    which are no nn.Linear or nn.Embedding work with it too. Inference only: gradients pass through products to their
    input, and the matrix has none.

    Args:
        name: the tensor's name in the checkpoint.
        spec: what it is.
        entries: its stored entries by suffix of container.layout.
        dtype: the type of the parameter that it replaces.
        device: where the entries are.
    """

    anchor: Tensor
    number: int
    group: operators.Place | None
    _opened: Matrix | None
    _opened_from: tuple[Any, ...]

    def __init__(
        self, name: str, spec: TensorSpec, entries: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.name = name
        self.spec = spec
        self.backend: Backend = default_backend.get()
        # Whether another process has other rows or columns of the matrix, or all of it.
        self.is_part = False
        for suffix, entry in entries.items():
            self.register_buffer(suffix[1:], entry)
        # An empty tensor that has the type and the device of the weights, and follows all moves of the model.
        self.register_buffer("anchor", torch.empty(0, dtype=dtype, device=device), persistent=False)
        # What transformers asks before it gives weights random values.
        self._is_hf_initialized = True
        self._begin()

    @property
    def shape(self) -> torch.Size:
        """(out_features, in_features)."""
        return torch.Size((self.spec.rows, self.spec.columns))

    @property
    def device(self) -> torch.device:
        """Where it multiplies."""
        return self.anchor.device

    @property
    def is_offloaded(self) -> bool:
        """Whether its entries are elsewhere until accelerate brings them for a call."""
        return any(entry is not None and entry.is_meta for entry in self._buffers.values())

    @property
    def dtype(self) -> torch.dtype:
        """The type of its rows when they are looked up."""
        return self.anchor.dtype

    def entries(self) -> dict[str, Tensor]:
        """The stored entries by suffix, in the order of layout.SUFFIXES."""
        named = ((suffix, self._buffers.get(suffix[1:])) for suffix in layout.SUFFIXES)
        return {suffix: entry for suffix, entry in named if entry is not None}

    def matrix(self) -> Matrix:
        """The matrix, opened on its device; opened again when it has been moved.

        Raises:
            FormatError: the entries do not match the spec.
            UnsupportedError: its device needs packages that are missing.
        """
        if self._opened is None or not self._is_current():
            self._opened = open_on(self.name, self.spec, self.entries(), self.device, self.backend)
            if self.backend == "auto":
                place = resting_place(self.device)
                self._set_entries(lambda entry: entry.to(place))
            self._opened_from = (*self._buffers.values(),)
        return self._opened

    def _is_current(self) -> bool:
        """Whether the opened matrix was made from these very tensors."""
        return all(map(operator.is_, self._buffers.values(), self._opened_from))

    def fill(self, spec: TensorSpec, entries: Mapping[str, Tensor]) -> None:
        """Take the entries of a matrix, or of a part of it, and their spec."""
        self.spec = spec
        for suffix, entry in entries.items():
            self.register_buffer(suffix[1:], entry)
        self._opened = None

    def replace_entries(self, entries: Mapping[str, Tensor]) -> None:
        """Hold the same stored entries elsewhere, such as in a file's memory map."""
        for suffix, entry in entries.items():
            self._buffers[suffix[1:]] = entry

    def set_backend(self, backend: Backend) -> None:
        """Choose how it multiplies."""
        self.backend = backend
        self._opened = None

    def place(self) -> operators.Place:
        """Its place in the group that it multiplies with in compiled code, or in one of its own."""
        if self.group is not None and operators.is_known(self.group[0]):
            return self.group
        return self.number, 0, (self.spec.rows,)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply: (..., in_features) -> (..., out_features) in the type of x."""
        return operators.product(x, self, self.spec.rows)

    def rows(self, ids: Tensor) -> Tensor:
        """Look up: integers (...) -> (..., in_features)."""
        flat = ids.reshape(-1)
        is_observed = operators.is_observed(flat)
        args = (self.number, self.spec.columns, self.dtype)
        found = operators.rows(flat, *args) if is_observed else operators.look_up(flat, self, self.dtype)
        return found.reshape(*ids.shape, self.spec.columns)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """All weights: (out_features, in_features)."""
        return self.matrix().dequantize(self.dtype if dtype is None else dtype)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Serve torch functions that are given a coded matrix in the place of a tensor."""
        kwargs = kwargs or {}
        if len(args) > 1 and isinstance(args[1], CodedWeight):
            if func is functional.linear:
                bias = args[2] if len(args) > 2 else kwargs.get("bias")
                product = args[1](args[0])
                return product if bias is None else product + bias
            if func is functional.embedding and not any(args[3:4]):
                return args[1].rows(args[0])
        return _with_decoded(func, args, kwargs)

    def extra_repr(self) -> str:
        """What print(model) says of it."""
        return f"{self.spec.rows} x {self.spec.columns}, {self.spec.grid_name}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CodedWeight:
        """Follow a move of the model; stored entries keep their types."""
        before = self.device
        self._buffers["anchor"] = fn(self.anchor)
        if self.device != before:
            place = resting_place(self.device)
            self._set_entries(lambda entry: torch.empty_like(entry, device=place) if entry.is_meta else entry.to(place))
            self._opened = None
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._opened = None

    def _set_entries(self, change: Callable[[Tensor], Tensor]) -> None:
        for suffix, entry in self.entries().items():
            self._buffers[suffix[1:]] = change(entry)

    def _begin(self) -> None:
        self.number = operators.register(self)
        self.group = None
        self._opened = None
        self._opened_from = ()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in _OWN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._begin()


def _with_decoded(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a torch function with coded weights decoded."""
    decoded = [arg.dequantize() if isinstance(arg, CodedWeight | CodedStack) else arg for arg in args]
    named = {key: arg.dequantize() if isinstance(arg, CodedWeight | CodedStack) else arg for key, arg in kwargs.items()}
    return func(*decoded, **named)


class CodedStack(nn.Module):
    """Coded matrices in the place of a three-dimensional parameter, such as the fused weights of experts.

    Matrix `i` of the parameter is `stack[i]`; it may be stored in parts that lie one below the other.
    """

    def __init__(self, matrices: Sequence[Sequence[CodedWeight]]) -> None:
        super().__init__()
        for index, parts in enumerate(matrices):
            self.add_module(str(index), nn.ModuleList(parts))
        self._joined: dict[int, JoinedWeights] = {}

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Serve torch functions that are given a stack in the place of a tensor: decoded, all of it."""
        return _with_decoded(func, args, kwargs or {})

    def multiply(self, index: int, x: Tensor) -> Tensor:
        """Multiply with one matrix: (n, in_features) -> (n, out_features)."""
        if index not in self._joined:
            self._joined[index] = JoinedWeights(self.parts(index))
        joined = self._joined[index]
        return joined.multiply(x) if joined.are_together() else torch.cat([part(x) for part in joined.weights], dim=-1)

    def __getitem__(self, index: int | Tensor) -> Tensor:
        """One matrix, decoded: (out_features, in_features)."""
        return torch.cat([part.dequantize() for part in self.parts(int(index))])

    def dequantize(self) -> Tensor:
        """All matrices: (matrices, out_features, in_features)."""
        return torch.stack([self[index] for index in range(len(self))])

    def __len__(self) -> int:
        return len(self._modules)

    @property
    def out_features(self) -> int:
        """Rows of each matrix."""
        return self.shape[1]

    @property
    def in_features(self) -> int:
        """Columns of each matrix."""
        return self.shape[2]

    @property
    def shape(self) -> torch.Size:
        """(matrices, out_features, in_features)."""
        parts = self.parts(0)
        return torch.Size((len(self), sum(part.spec.rows for part in parts), parts[0].spec.columns))

    @property
    def device(self) -> torch.device:
        """Where it multiplies."""
        return self.parts(0)[0].device

    @property
    def dtype(self) -> torch.dtype:
        """The type of its matrices when they are decoded."""
        return self.parts(0)[0].dtype

    def parts(self, index: int) -> list[CodedWeight]:
        """The coded matrices that lie one below the other in one matrix."""
        parts = self._modules[str(index)]
        assert isinstance(parts, nn.ModuleList)
        return [part for part in parts if isinstance(part, CodedWeight)]
