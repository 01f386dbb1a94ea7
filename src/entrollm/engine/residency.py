"""Which experts of a mapped file are in memory, for models that are larger than it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from entrollm.format.reader import CompressedModel
from entrollm.report.numbers import format_bytes


class Residency:
    """Reads experts ahead of their products, and gives up those that were not used for longest.

    Everything else in the file is read for each token, and stays in memory. The experts that one layer has just chosen
    are never given up: a pass of many tokens, such as a prompt's, may choose more than there is room for, and then more
    than the budget is held until the next layer chooses. Threads may run the model side by side.

    Args:
        model: the folder.
        budget_bytes: of the file, what may be in memory.
    """

    def __init__(self, model: CompressedModel, budget_bytes: int) -> None:
        self._model = model
        self._budget_bytes = budget_bytes
        self._sizes: dict[tuple[str, ...], int] = {}
        self._resident: OrderedDict[tuple[str, ...], int] = OrderedDict()
        self._resident_bytes = 0
        self._room = 0
        self._lock = threading.Lock()

    def fetcher(self, experts: Sequence[tuple[str, ...]]) -> Callable[[Iterable[int]], None]:
        """What is to be told which of some experts are about to be used.

        Args:
            experts: the stored names of each one's tensors.
        """
        for names in experts:
            self._sizes[names] = sum(self._model.tensor_bytes(name) for name in names)
        return lambda numbers: self._use([experts[number] for number in numbers])

    def check(self) -> None:
        """Find out what is left for experts, once all are known.

        Raises:
            ValueError: there are none, or the budget does not hold even the largest four beside all other tensors.
        """
        if not self._sizes:
            raise ValueError(
                "a size of --memory is for models with experts, of which a token reads a part; this one has none: use "
                "file, and the system reads what it needs"
            )
        others = self._model.file_bytes() - sum(self._sizes.values())
        least = others + 4 * max(self._sizes.values())
        if self._budget_bytes < least:
            raise ValueError(
                f"{format_bytes(self._budget_bytes)} of memory are too little: the tensors that every token reads take "
                f"{format_bytes(others)}, and four experts up to {format_bytes(least - others)}"
            )
        self._room = self._budget_bytes - others

    def _use(self, experts: Sequence[tuple[str, ...]]) -> None:
        with self._lock:
            self._use_locked(experts)

    def _use_locked(self, experts: Sequence[tuple[str, ...]]) -> None:
        for names in experts:
            if names in self._resident:
                self._resident.move_to_end(names)
                continue
            for name in names:
                self._model.prefetch(name)
            self._resident[names] = self._sizes[names]
            self._resident_bytes += self._sizes[names]
        # Those in use are the last ones; a prompt may use more of them than there is room for.
        while self._resident_bytes > self._room and len(self._resident) > len(experts):
            names, size = self._resident.popitem(last=False)
            self._resident_bytes -= size
            for name in names:
                self._model.release(name)
