"""Text with blocks in it that may be calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

from entrollm.serve.output.items import Functions, Item, Parser, ToolCall, overlap

_CLOSING = {"(": ")", "[": "]", "{": "}"}
# An answer of nothing but openings would be read again from each of them.
_MOST_REREAD = 1 << 20


class End(Protocol):
    """Looks for the end of one block."""

    def feed(self, text: str) -> int | None:
        """The length of the block that ends in `text`, which grows from call to call; `None` if it goes on."""


class Marker:
    """A block that ends with a marker."""

    def __init__(self, *markers: str) -> None:
        self._markers = markers
        self._longest = max(map(len, markers))
        self._seen = 0

    def feed(self, text: str) -> int | None:
        """See End."""
        start = max(0, self._seen - self._longest + 1)
        ends = [at + len(marker) for marker in self._markers if (at := text.find(marker, start)) >= 0]
        self._seen = len(text)
        return min(ends, default=None)


class Brackets:
    """A block that ends where its first bracket closes, or where a bracket closes that was not opened.

    Args:
        quotes: the characters that strings are written in.
    """

    def __init__(self, quotes: str) -> None:
        self._quotes = quotes
        self._open: list[str] = []
        self._quote = ""
        self._is_escaped = False
        self._seen = 0

    def feed(self, text: str) -> int | None:
        """See End."""
        for position in range(self._seen, len(text)):
            if self._ends(text[position]):
                return position + 1
        self._seen = len(text)
        return None

    def _ends(self, character: str) -> bool:
        if self._quote:
            if self._is_escaped:
                self._is_escaped = False
            elif character == "\\":
                self._is_escaped = True
            elif character == self._quote:
                self._quote = ""
        elif character in self._quotes and self._open:
            self._quote = character
        elif character in _CLOSING:
            self._open.append(_CLOSING[character])
        elif character in ")]}":
            return not self._open or self._open.pop() != character or not self._open
        return False


class BlockFormat(ABC):
    """Where the blocks of a format are.

    Attributes:
        openings: markers, each of which opens a block anywhere.
        first: characters that open a block at the beginning of the answer or behind a call; often "".
        separators: characters that may stand between two blocks.
    """

    openings: tuple[str, ...]
    first = ""
    separators = " \n\t\r"

    def parser(self, functions: Functions) -> Parser:
        """See CallFormat."""
        return BlockParser(self, functions)

    @abstractmethod
    def end(self, opening: str) -> End:
        """Looks for the end of a block that begins with `opening`."""

    @abstractmethod
    def calls(self, block: str, functions: Functions) -> list[ToolCall] | None:
        """The calls of a block, or of one that was cut off at its end; `None` if it is not made of calls."""


class BlockParser:
    """Splits text into calls and what is around them; see Parser.

    White space before a call is left out. A block that is not made of calls is text, and what follows its opening may
    be a block, unless much of the answer was in such blocks already.

    Args:
        form: where blocks are.
        functions: those that may be called.
    """

    def __init__(self, form: BlockFormat, functions: Functions) -> None:
        self._form = form
        self._functions = functions
        self._held = ""  # begins with the block that `_end` looks for the end of
        self._end: End | None = None
        self._opening = ""
        self._before = ""  # what stands before the block and is left out if it is one of calls
        self._is_first = True
        self._has_called = False
        self._reread = 0  # characters of blocks that were not made of calls

    def push(self, text: str) -> list[Item]:
        """Add text and return what is complete now, in order."""
        self._held += text
        found: list[Item] = []
        while self._held and (self._end is not None or self._open(found)):
            assert self._end is not None
            length = self._end.feed(self._held)
            if length is None:
                break
            self._close(length, found)
        return [item for item in found if item != ""]

    def finish(self) -> list[Item]:
        """Return what was held back; a block that only lacks its end is a call."""
        found: list[Item] = []
        while self._end is not None:
            self._close(len(self._held), found)
            found += self.push("")
        if not self._has_called or self._held.strip(self._form.separators):
            found.append(self._held)
        self._held = ""
        return [item for item in found if item != ""]

    def _open(self, found: list[Item]) -> bool:
        """Pass on what cannot belong to a block, and say whether one begins with what is left."""
        form = self._form
        inside = self._held.lstrip(form.separators)
        if self._is_first and not inside:
            return False  # what comes next decides
        starts = [(at, marker) for marker in form.openings if (at := self._held.find(marker)) >= 0]
        if self._reread > _MOST_REREAD:
            starts = []
        elif self._is_first and inside[0] in form.first:
            starts.append((len(self._held) - len(inside), inside[0]))
        if starts:
            start, self._opening = min(starts)
            before, self._held = self._held[:start], self._held[start:]
            is_between = self._is_first and not before.strip(form.separators)
            text = "" if is_between else before.rstrip()
            found.append(text)
            self._before, self._end = before[len(text) :], form.end(self._opening)
            return True
        # The end may be the beginning of a marker, with the white space before it.
        cut = len(self._held) - (overlap(self._held, form.openings) if form.openings else 0)
        cut = len(self._held[:cut].rstrip())
        if cut:
            self._is_first = False
        found.append(self._held[:cut])
        self._held = self._held[cut:]
        return False

    def _close(self, length: int, found: list[Item]) -> None:
        """Pass on the calls of the block, or its opening if it is not made of calls."""
        calls = self._form.calls(self._held[:length], self._functions)
        if calls is None:
            self._reread += length
            found.append(self._before + self._opening)
            self._held = self._held[len(self._opening) :]
            self._is_first = False
        else:
            found += calls
            self._held = self._held[length:]
            self._is_first = self._has_called = True
        self._before, self._end = "", None
