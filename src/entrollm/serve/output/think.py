"""Reasoning that stands before the answer between two markers, such as <think> and </think>."""

from __future__ import annotations

from dataclasses import dataclass

from entrollm.serve.output.items import Item, Parser, Reasoning, overlap


@dataclass(frozen=True)
class Markers:
    """What reasoning stands between.

    Attributes:
        name: what the option calls it.
        opening, closing: the markers.
        opening_token: the special token that the opening begins with, if it is more than one.
    """

    name: str
    opening: str
    closing: str
    opening_token: str = ""


class Plain:
    """Text that is nothing but text; see Parser."""

    def push(self, text: str) -> list[Item]:
        """Pass the text on."""
        return [text] if text else []

    def finish(self) -> list[Item]:
        """Nothing is held back."""
        return []


class Think:
    """Splits off the reasoning at the beginning of an answer; see Parser.

    White space around the reasoning is left out.

    Args:
        markers: what it stands between.
        answer: reads what follows.
        is_open: whether the prompt ends with the opening marker.
    """

    def __init__(self, markers: Markers, answer: Parser, *, is_open: bool) -> None:
        self._opening = markers.opening
        self._closing = markers.closing
        self._answer = answer
        self._state = "reasoning" if is_open else "start"
        self._held = ""
        self._has_reasoned = False

    def push(self, text: str) -> list[Item]:
        """Add text and return what is complete now, in order."""
        self._held += text
        found: list[Item] = []
        if self._state == "start":
            inside = self._held.lstrip()
            if self._opening.startswith(inside):  # "" as well: what comes next decides
                return []
            if inside.startswith(self._opening):
                self._held, self._state = inside[len(self._opening) :], "reasoning"
            else:
                self._state = "answer"
        if self._state == "reasoning":
            found += self._reasoning()
        if self._state == "gap":
            self._held = self._held.lstrip()
            if self._held:
                self._state = "answer"
        if self._state == "answer":
            held, self._held = self._held, ""
            found += self._answer.push(held)
        return found

    def finish(self) -> list[Item]:
        """Return what was held back."""
        held, self._held = self._held, ""
        if self._state == "reasoning":
            return [Reasoning(held)] if held.strip() else []
        return (self._answer.push(held) if self._state == "start" else []) + self._answer.finish()

    def _reasoning(self) -> list[Item]:
        if not self._has_reasoned:
            self._held = self._held.lstrip()
        end = self._held.find(self._closing)
        if end >= 0:
            text, self._held = self._held[:end].rstrip(), self._held[end + len(self._closing) :]
            self._state = "gap"
        else:
            cut = len(self._held) - overlap(self._held, (self._closing,))
            cut = len(self._held[:cut].rstrip())
            text, self._held = self._held[:cut], self._held[cut:]
        self._has_reasoned |= bool(text)
        return [Reasoning(text)] if text else []
