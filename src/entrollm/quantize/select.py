"""Choose what becomes of each tensor of a checkpoint: quantized to a number of bits, or kept in its type."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from entrollm.format import layout
from entrollm.quantize.paper import MAX_BITS, MIN_BITS, Granularity

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Modules that hold fused experts.
_EXPERTS = frozenset({"experts", "block_sparse_moe"})


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """What becomes of one tensor.

    Attributes:
        bits: of its paper grid; None if it keeps its type, or the integers that it has.
        granularity: one grid for the tensor, or one for each row.
        is_imported: whether it keeps the integers that it has.
        is_lossless: whether it is coded bit for bit.
    """

    bits: int | None
    granularity: Granularity = "tensor"
    is_imported: bool = False
    is_lossless: bool = False

    @property
    def is_kept(self) -> bool:
        """Whether the tensor keeps its type."""
        return self.bits is None and not self.is_imported and not self.is_lossless


@dataclass(frozen=True, slots=True)
class BitsOverride:
    """A choice of the user: the tensors whose names match a glob get `bits`; None keeps their type."""

    pattern: str
    bits: int | None


def plan_tensors(
    shapes: Mapping[str, tuple[int, ...]],
    bits: int,
    overrides: Sequence[BitsOverride] = (),
    granularity: Granularity = "tensor",
) -> dict[str, TensorPlan]:
    """Plan every tensor. Matrices (linear layers, embeddings, output head, experts) are quantized, others are kept.

    Args:
        shapes: the shape of each tensor by name, in the order of the checkpoint.
        bits: for matrices that no override matches.
        overrides: globs over whole tensor names, case-sensitive; the last match wins.
        granularity: one grid for each tensor or for each row.
    Returns:
        the plans, in the order of `shapes`.
    Raises:
        ValueError: an override matches no tensor, or gives bits to tensors of which none is a matrix.
    """
    _check_bits(bits)
    chosen = {name: bits if is_quantizable(name, shape) else None for name, shape in shapes.items()}
    for override in overrides:
        if override.bits is not None:
            _check_bits(override.bits)
        matches = [name for name in shapes if fnmatchcase(name, override.pattern)]
        if not matches:
            hint = ""
            if fnmatchcase(_HEAD, override.pattern) and _EMBEDDING in shapes:
                hint = f"; the output head of this model is its embedding, {_EMBEDDING}"
            raise ValueError(f"the pattern {override.pattern!r} matches none of the {len(shapes)} tensors{hint}")
        if override.bits is not None:
            matches = [name for name in matches if is_quantizable(name, shapes[name])]
        if not matches:
            raise ValueError(f"the pattern {override.pattern!r} matches no matrix, and only matrices are quantized")
        chosen.update(dict.fromkeys(matches, override.bits))
    return {name: TensorPlan(tensor_bits, granularity) for name, tensor_bits in chosen.items()}


def is_quantizable(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is a weight matrix (of a linear layer, an embedding or the output head), or a stack of them.

    A matrix whose name is that of one matrix of a stack, or of a transpose, is a weight matrix, too.
    """
    whole = layout.transposed_matrix(name) or name
    is_matrix = whole.endswith("weight") or layout.is_kept_member(name)
    return (len(shape) == 2 and is_matrix) or is_stack(name, shape)


def is_stack(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor holds the fused matrices of experts: three axes, the first over the experts."""
    return len(shape) == 3 and not _EXPERTS.isdisjoint(name.split(".")) and 0 not in shape


def _check_bits(bits: int) -> None:
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits must be {MIN_BITS} to {MAX_BITS}, found {bits}")
