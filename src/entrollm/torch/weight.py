"""A coded matrix as a torch module whose buffers are its stored entries; state_dict names them as the file does."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from entrollm.format import layout
from entrollm.format.spec import TensorSpec
from entrollm.torch import operators
from entrollm.torch.backend import Backend, default_backend, open_on, storage_device
from entrollm.torch.matrix import Matrix, ScaledMatrix
from entrollm.torch.parameter import CodedParameter, Transposed

# Attributes that belong to one object and are made anew in its copies.
_NOT_COPIED = ("number", "_opened", "_opened_from")


class CodedWeight(CodedParameter):
    """A coded matrix in the place of a parameter.

    As the weight of `functional.linear`, or transposed as the right operand of a matrix product, it multiplies. As that
    of `functional.embedding`, its rows are looked up, as with an index in brackets. Other torch functions, and the
    methods of tensors, get it decoded. Layers other than nn.Linear and nn.Embedding therefore work with it too. It is
    for inference only: gradients pass through products to their input, and the matrix itself has none. The one change
    in place that it takes is a multiplication with a number, or a division.

    Args:
        name: the tensor's name in the checkpoint.
        spec: the matrix's spec.
        entries: its stored entries by suffix, as in `entrollm.format.layout`.
        dtype: the type of the parameter that it replaces.
        device: where it multiplies.
    """

    anchor: Tensor
    number: int
    _opened: Matrix | None
    _opened_from: tuple[Any, ...]

    def __init__(
        self, name: str, spec: TensorSpec, entries: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.name = name
        self.spec = spec
        self.backend: Backend = default_backend.get()
        # What the model has multiplied the matrix with after loading it.
        self.factor = 1.0
        # Whether other processes hold the rest of the matrix, or all of it.
        self.is_part = False
        for suffix, entry in entries.items():
            self.register_buffer(suffix[1:], entry)
        # An empty tensor with the type and the device of the weights. It follows every move of the model.
        self.register_buffer("anchor", torch.empty(0, dtype=dtype, device=device), persistent=False)
        # Transformers gives random values to modules that lack this attribute.
        self._is_hf_initialized = True
        self._begin()

    @property
    def shape(self) -> torch.Size:
        """(out_features, in_features)."""
        return torch.Size((self.spec.rows, self.spec.columns))

    @property
    def out_features(self) -> int:
        """Rows of the matrix."""
        return self.spec.rows

    @property
    def device(self) -> torch.device:
        """The device that it multiplies on."""
        return self.anchor.device

    @property
    def is_offloaded(self) -> bool:
        """Whether its entries are elsewhere until accelerate brings them for a call."""
        return any(entry is not None and entry.is_meta for entry in self._buffers.values())

    @property
    def dtype(self) -> torch.dtype:
        """The type of rows that are looked up."""
        return self.anchor.dtype

    def names(self) -> list[str]:
        """Its name in the checkpoint."""
        return [self.name]

    @property
    def T(self) -> Transposed:  # noqa: N802 - the name that tensors give it
        """The matrix with its axes exchanged."""
        return Transposed(self)

    def t(self) -> Transposed:
        """The matrix with its axes exchanged."""
        return Transposed(self)

    def transpose(self, first: int, second: int) -> Transposed | CodedWeight:
        """The matrix with two of its axes exchanged."""
        return self if first % 2 == second % 2 else Transposed(self)

    def mul_(self, factor: float) -> CodedWeight:
        """Multiply the matrix with a number, for as long as it is loaded.

        Raises:
            UnsupportedError: the factor is a tensor of several values.
        """
        if isinstance(factor, Tensor) and factor.numel() != 1:
            self.refuse_change("mul_")
        self.factor *= float(factor)
        self._opened = None
        return self

    def div_(self, divisor: float) -> CodedWeight:
        """Divide the matrix by a number, for as long as it is loaded.

        Raises:
            UnsupportedError: the divisor is a tensor of several values.
        """
        return self.mul_(1 / divisor)

    __imul__ = mul_
    __itruediv__ = div_

    def __getitem__(self, index: Any) -> Tensor:
        """Decode the rows of an index, or all of the matrix where the index is not over rows alone."""
        is_ids = isinstance(index, Tensor) and not index.dtype.is_floating_point and index.dtype != torch.bool
        if is_ids or isinstance(index, int | slice):
            return self.rows(torch.arange(self.spec.rows, device=self.device)[index])
        return self.dequantize()[index]

    def __len__(self) -> int:
        return self.spec.rows

    def entries(self) -> dict[str, Tensor]:
        """The stored entries by suffix, in the order of layout.SUFFIXES."""
        named = ((suffix, self._buffers.get(suffix[1:])) for suffix in layout.SUFFIXES)
        return {suffix: entry for suffix, entry in named if entry is not None}

    def matrix(self) -> Matrix:
        """The matrix, opened on its device; opened again after a move.

        Raises:
            FormatError: the entries do not match the spec.
            UnsupportedError: packages that its device needs are missing.
        """
        if self._opened is None or not self._is_current():
            opened = open_on(self.name, self.spec, self.entries(), self.device, self.backend)
            self._opened = opened if self.factor == 1 else ScaledMatrix(opened, self.factor)
            if self.backend != "plain":
                device = storage_device(self.device)
                self._set_entries(lambda entry: entry.to(device))
            self._opened_from = (*self._buffers.values(),)
        return self._opened

    @property
    def opened(self) -> Matrix | None:
        """The matrix if it is open, whether or not it has moved since."""
        return self._opened

    def _is_current(self) -> bool:
        """Whether the opened matrix was made from these very tensors."""
        return all(map(operator.is_, self._buffers.values(), self._opened_from))

    def fill(self, spec: TensorSpec, entries: Mapping[str, Tensor]) -> None:
        """Take the spec and the entries of the matrix, or of a part of it."""
        self.spec = spec
        for suffix, entry in entries.items():
            self.register_buffer(suffix[1:], entry)
        self._opened = None

    def replace_entries(self, entries: Mapping[str, Tensor]) -> None:
        """Hold the same stored entries in other memory, such as a file's memory map."""
        for suffix, entry in entries.items():
            self._buffers[suffix[1:]] = entry

    def set_backend(self, backend: Backend) -> None:
        """Choose how it multiplies."""
        self.backend = backend
        self._opened = None

    def forward(self, x: Tensor) -> Tensor:
        """Multiply: (..., in_features) -> (..., out_features) in the type of x."""
        return operators.product(x, self)

    def rows(self, ids: Tensor) -> Tensor:
        """Look up rows: integers (...) -> (..., in_features)."""
        flat = ids.reshape(-1)
        is_observed = operators.is_observed(flat)
        args = (self.number, self.spec.columns, self.dtype)
        found = operators.rows(flat, *args) if is_observed else operators.look_up(flat, self, self.dtype)
        return found.reshape(*ids.shape, self.spec.columns)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Decode all weights: (out_features, in_features)."""
        return self.matrix().dequantize(self.dtype if dtype is None else dtype)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a torch function that is given a coded matrix in the place of a tensor."""
        if len(args) > 1 and isinstance(args[1], CodedWeight):
            if func is functional.linear:
                bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
                product = args[1](args[0])
                return product if bias is None else product + bias
            if func is functional.embedding and not any(args[3:4]):
                return args[1].rows(args[0])
        return super().__torch_function__(func, types, args, kwargs)

    def extra_repr(self) -> str:
        """What print(model) says about it."""
        return f"{self.spec.rows} x {self.spec.columns}, {self.spec.grid_name}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CodedWeight:
        """Follow a move of the model; stored entries keep their types."""
        before = self.device
        self._buffers["anchor"] = fn(self.anchor)
        if self.device != before:
            device = storage_device(self.device)
            self._set_entries(
                lambda entry: torch.empty_like(entry, device=device) if entry.is_meta else entry.to(device)
            )
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
        self._opened = None
        self._opened_from = ()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in _NOT_COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._begin()
