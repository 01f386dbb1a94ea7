"""What is seen of a model's matrices while its layers run: sums over their inputs and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from entrollm.calibrate.network import Matrix
from entrollm.calibrate.sums import Moments, Squares
from entrollm.calibrate.watch import Streams

# A member of a stack with as many tokens as this share of its inputs is trusted as much as all members together.
_POOLED_SHARE = 0.5


@dataclass
class Seen:
    """What is known of a matrix.

    Attributes:
        matrix: the matrix.
        group: the name under which the moments of its columns' side are added up.
        squares: of the gradients, by piece.
        is_looked_up: whether its rows are looked up.
    """

    matrix: Matrix
    group: str
    squares: dict[str, Squares] = field(default_factory=dict)
    is_looked_up: bool = False


class Watcher:
    """Adds up the inputs of products, and the gradients of their outputs if there are any.

    Attributes:
        seen: the matrices by the name of their first piece.
        moments: sums over the inputs of the products, or over the gradients of the outputs where matrices are
            transposed, by group.
        tokens: how many are in each sum.
        windows: how many the next products are about.
        streams: what the outputs are added to.
    """

    def __init__(self, adds_inputs: bool) -> None:
        self.seen: dict[str, Seen] = {}
        self.moments: dict[str, Moments] = {}
        self.tokens: dict[str, int] = {}
        self.windows = 1
        self.streams = Streams()
        self._adds_inputs = adds_inputs
        self._last: tuple[Tensor, str] | None = None

    def product(self, matrix: Matrix, x: Tensor, is_transposed: bool, multiply: Callable[[], Tensor]) -> Tensor:
        """See one product."""
        y = multiply()
        name = matrix.pieces[0].name
        if name not in self.seen:
            shares = self._last is not None and self._last[0] is x and not is_transposed
            group = self._last[1] if shares and self._last is not None else name
            self.seen[name] = Seen(matrix, group)
        seen = self.seen[name]
        self._last = x, seen.group
        inputs = x.detach().reshape(-1, x.shape[-1])
        if self._adds_inputs and not is_transposed and seen.group == name:
            self._add(name, inputs)
        if y.requires_grad:
            y.register_hook(partial(self._gradient, seen, inputs, is_transposed))  # type: ignore[no-untyped-call]
        self.streams.product(name, y)
        return y

    def add(self, first: Tensor, second: Tensor, total: Tensor) -> None:
        """See an addition."""
        self.streams.add(first, second, total)

    def look_up(self, matrix: Matrix, ids: Tensor, rows: Tensor) -> None:
        """See rows that are looked up."""
        if not rows.requires_grad:
            return
        name = matrix.pieces[0].name
        seen = self.seen.setdefault(name, Seen(matrix, name))
        seen.is_looked_up = True
        rows.register_hook(partial(self._look_up_gradient, seen, ids))  # type: ignore[no-untyped-call]

    def names(self) -> list[str]:
        """The checkpoint's matrices that were seen, in order."""
        return [piece.name for seen in self.seen.values() for piece in seen.matrix.pieces]

    def forget(self) -> None:
        """Let go of what was seen last."""
        self._last = None
        self.streams.leave()

    def _add(self, group: str, x: Tensor) -> None:
        self.moments.setdefault(group, Moments()).add(x)
        self.tokens[group] = self.tokens.get(group, 0) + len(x)

    def _gradient(self, seen: Seen, inputs: Tensor, is_transposed: bool, gradient: Tensor) -> None:
        outputs = gradient.detach().reshape(-1, gradient.shape[-1])
        columns, rows = (outputs, inputs) if is_transposed else (inputs, outputs)
        if is_transposed:
            self._add(seen.group, outputs)
        is_shared = bool(seen.matrix.stack)  # its tokens come from any window
        self._add_gradient(seen, self._by_window(columns, is_shared), self._by_window(rows, is_shared))

    def _add_gradient(self, seen: Seen, x: Tensor, dy: Tensor) -> None:
        """Add the gradients dy^T x of windows, whose shapes are (windows, n, rows) and (windows, n, columns)."""
        for piece in seen.matrix.pieces:
            seen.squares.setdefault(piece.name, Squares()).add_products(x, dy[..., piece.begin : piece.end])

    def _look_up_gradient(self, seen: Seen, ids: Tensor, gradient: Tensor) -> None:
        name = seen.matrix.pieces[0].name
        squares = seen.squares.setdefault(name, Squares())
        rows = gradient.detach().reshape(-1, gradient.shape[-1])
        is_shared = len(ids) != self.windows  # positions, which all windows have
        flat = ids.expand(gradient.shape[:-1]).reshape(-1)
        for window, found in zip(self._by_window(flat, is_shared), self._by_window(rows, is_shared), strict=True):
            unique, places = torch.unique(window, return_inverse=True)
            squares.add(found.new_zeros(len(unique), found.shape[1]).index_add_(0, places, found))

    def _by_window(self, rows: Tensor, is_shared: bool = False) -> Tensor:
        """The rows of each window, shape (windows, ...), or all as one window if they belong to none."""
        windows = 1 if is_shared or len(rows) % self.windows else self.windows
        return rows.reshape(windows, -1, *rows.shape[1:])


class Pools:
    """Statistics of the members of stacks, each drawn to those of all members as far as it has few tokens."""

    def __init__(self, seen: Iterable[Seen], totals: Mapping[str, Tensor], tokens: Mapping[str, int]) -> None:
        self._totals, self._tokens = totals, tokens
        self._pooled: dict[str, list[Any]] = {}
        for found in seen:
            if not found.matrix.stack:
                continue
            # Sums of moments, tokens, sums of squares by place among the pieces.
            pool = self._pooled.setdefault(found.matrix.stack, [None, 0, {}])
            if found.group in totals:
                pool[0] = totals[found.group].clone() if pool[0] is None else pool[0] + totals[found.group]
                pool[1] += tokens[found.group]
            for place, piece in enumerate(found.matrix.pieces):
                squares = found.squares.get(piece.name)
                if squares is not None and squares.columns is not None:
                    known = pool[2].get(place)
                    pool[2][place] = squares.columns.clone() if known is None else known + squares.columns

    def of(self, seen: Seen, name: str) -> tuple[Tensor | None, Tensor | None, float]:
        """The sum of G^T G and of x x^T, each up to a factor, and the sum of all squares of G."""
        squares, moments = seen.squares.get(name), self._totals.get(seen.group)
        columns = None if squares is None else squares.columns
        total = 0.0 if squares is None or columns is None else squares.total
        if not seen.matrix.stack:
            return columns, moments, total
        pooled, tokens, by_place = self._pooled[seen.matrix.stack]
        place = next(at for at, piece in enumerate(seen.matrix.pieces) if piece.name == name)
        own = self._tokens.get(seen.group, 0)
        trust = own / (own + _POOLED_SHARE * seen.matrix.shape[1])
        if columns is None and place in by_place:
            # As much as half a token would have given.
            total = 0.5 * float(torch.trace(by_place[place])) / max(1, tokens)
        return _blend(columns, by_place.get(place), trust), _blend(moments, pooled, trust), total


def _blend(own: Tensor | None, pooled: Tensor | None, trust: float) -> Tensor | None:
    """A mean of two sums, each divided by its trace."""
    parts = [(part, weight) for part, weight in ((own, trust), (pooled, 1 - trust)) if part is not None]
    scaled = [part * (weight / trace) for part, weight in parts if (trace := float(torch.trace(part))) > 0]
    return sum(scaled[1:], scaled[0]) if scaled else (pooled if own is None else own)
