"""Stacks: tensors of three axes, such as fused experts, which are coded matrix by matrix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.errors import FormatError
from entrollm.format import layout
from entrollm.quantize.select import TensorPlan


def split_stacks(checkpoint: Checkpoint, plans: Mapping[str, TensorPlan]) -> dict[str, TensorPlan]:
    """Split the stacks that are to be coded into their matrices, each with the plan of its stack.

    Args:
        checkpoint: the model; its `tensors` list the matrices afterwards.
        plans: the plans of its tensors.
    Returns:
        the plans of its tensors afterwards.
    Raises:
        UnsupportedError: a stack has a type that cannot be read by matrix.
    """
    names = {}
    for name, plan in plans.items():
        shape = checkpoint.tensors[name].shape
        if not plan.is_kept and len(shape) == 3:
            names[name] = [layout.member_name(name, index) for index in range(shape[0])]
    checkpoint.split(names)
    return {member: plan for name, plan in plans.items() for member in names.get(name, [name])}


def is_transposed(members: Iterable[str]) -> bool:
    """Whether the coded matrices of a stack are the transposes of its matrices."""
    return all(layout.transposed_member(name) for name in members)


def find_stacks(names: Iterable[str]) -> dict[str, list[str]]:
    """The stacks that coded matrices, or their transposes, belong to.

    Args:
        names: the names of all coded matrices of a folder.
    Returns:
        the names of the matrices of each stack, in order, by the name of the stack.
    Raises:
        FormatError: a member of a stack is missing, or is there twice, or some are transposed and others are not.
    """
    found: dict[str, dict[int, str]] = {}
    for name in names:
        member = layout.stack_member(name) or layout.transposed_member(name)
        if member is None:
            continue
        other = found.setdefault(member[0], {}).setdefault(member[1], name)
        if other != name:
            raise FormatError(f"{name} and {other} are both matrix {member[1]} of {member[0]}")
    for stack, members in found.items():
        if len({layout.transposed_member(name) is None for name in members.values()}) > 1:
            own, other = (
                next(name for name in members.values() if (layout.transposed_member(name) is None) is is_own)
                for is_own in (True, False)
            )
            raise FormatError(
                f"{own} and {other} are matrices of {stack}, of which one is transposed; expected all or none to be; "
                "compress the model again"
            )
        first_missing = next(index for index in range(len(members) + 1) if index not in members)
        if first_missing < len(members):
            missing = layout.member_name(stack, first_missing, is_transposed=is_transposed(members.values()))
            raise FormatError(f"{missing} is missing, though {stack} has later matrices")
    return {stack: [members[index] for index in sorted(members)] for stack, members in found.items()}
