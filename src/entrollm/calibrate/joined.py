"""What several processes have seen of a model, each on its windows, as one of them would have seen it on all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from entrollm.calibrate.lockstep import UnwalkableError
from entrollm.calibrate.network import Network
from entrollm.calibrate.seen import Seen, Watcher
from entrollm.calibrate.sums import Moments, Squares
from entrollm.calibrate.watch import Stream
from entrollm.processes import Group


@dataclass(frozen=True)
class _Sight:
    """What one process has seen.

    Attributes:
        matrices: by name: the group, whether rows are looked up, and the pieces with gradients.
        moments: the groups with moments, and the columns of each.
        tokens, streams: those of the watcher.
    """

    matrices: dict[str, tuple[str, bool, list[str]]]
    moments: dict[str, int]
    tokens: dict[str, int]
    streams: dict[str, Stream]


def check_windows(windows: int, group: Group) -> None:
    """Refuse more processes than windows.

    Raises:
        ValueError: some would have nothing to do.
    """
    if windows < group.size:
        raise ValueError(
            f"calibration on {windows} windows can be shared by {windows} processes at most, found {group.size}; "
            "start fewer"
        )


class _UnwalkableElsewhereError(UnwalkableError):
    """Another process has told that it cannot walk the model."""


def tell_unwalkable(error: UnwalkableError, group: Group) -> None:
    """Tell the processes that have arrived at `join` that this one cannot walk the model."""
    if not isinstance(error, _UnwalkableElsewhereError):
        group.gather(str(error))


def join(watcher: Watcher, network: Network, group: Group) -> None:
    """Give a watcher the sums over all processes, and the matrices that only others have seen, such as experts.

    Args:
        watcher: of the same products in every process.
        network: holds the matrices that were seen.
        group: the processes.
    """
    if group.size == 1:
        return
    answers: list[_Sight | str] = group.gather(_sight(watcher))
    for reason in answers:
        if isinstance(reason, str):
            raise _UnwalkableElsewhereError(reason)
    sights = [answer for answer in answers if isinstance(answer, _Sight)]
    loaded = {matrix.pieces[0].name: matrix for matrix in network.matrices.values()}
    for sight in sights:
        for name, (place, is_looked_up, _) in sight.matrices.items():
            watcher.seen.setdefault(name, Seen(loaded[name], place)).is_looked_up |= is_looked_up
        for name, stream in sight.streams.items():
            watcher.streams.found.setdefault(name, stream)
    # In the same order in every process.
    zeros = partial(torch.zeros, dtype=torch.float64, device=network.place)
    pieces = {piece: name for sight in sights for name, (*_, found) in sight.matrices.items() for piece in found}
    for piece, name in pieces.items():
        squares = watcher.seen[name].squares.setdefault(piece, Squares())
        if squares.columns is None:
            squares.columns = zeros(loaded[name].shape[1], loaded[name].shape[1])
        group.sum(squares.columns)
    for place, columns in {place: columns for sight in sights for place, columns in sight.moments.items()}.items():
        if place not in watcher.moments:
            watcher.moments[place] = Moments(zeros(columns, columns))
        group.sum(watcher.moments[place].total())
    for place in {place: None for sight in sights for place in sight.tokens}:
        watcher.tokens[place] = sum(sight.tokens.get(place, 0) for sight in sights)


def _sight(watcher: Watcher) -> _Sight:
    def pieces(seen: Seen) -> list[str]:
        return [piece for piece, squares in seen.squares.items() if squares.columns is not None]

    return _Sight(
        {name: (seen.group, seen.is_looked_up, pieces(seen)) for name, seen in watcher.seen.items()},
        {place: len(moments.total()) for place, moments in watcher.moments.items()},
        watcher.tokens,
        watcher.streams.found,
    )
