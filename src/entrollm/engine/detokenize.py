"""Turning tokens into text while they arrive."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tokenizers import Tokenizer

from entrollm.checkpoint.panics import decode

_REPLACEMENT = "\ufffd"
# Enough of the prompt for a decoder that treats the first token of a text differently.
_CONTEXT_TOKENS = 6


class Detokenizer:
    """Decodes tokens piece by piece; the pieces add up to the text of all of them.

    A piece never ends within a UTF-8 character: tokens that do wait for the next one. Each step decodes a few tokens
    together with those before, because what a token's text is can depend on its neighbours (a space, mostly).

    Args:
        tokenizer: special tokens are left out of the text.
        context: the tokens before the first, if the text continues theirs.
        shown: special tokens that are in the text all the same.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = (), shown: Collection[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._hidden: frozenset[int] | None = None
        if shown:
            added = tokenizer.get_added_tokens_decoder()
            self._hidden = frozenset(token for token, entry in added.items() if entry.special).difference(shown)
        self._ids = list(context[-_CONTEXT_TOKENS:])
        if self._decode(self._ids).endswith(_REPLACEMENT):
            self._ids = []  # the prompt ends within a character, which is then the answer's
        self._before = 0  # tokens from here on are decoded again as neighbours
        self._done = len(self._ids)  # tokens up to here are in the text already

    def push(self, token_id: int) -> str:
        """Add a token and return the text that is complete now, often ""."""
        self._ids.append(token_id)
        return self._advance(final=False)

    def finish(self) -> str:
        """Return what is left; U+FFFD stands for bytes that never became a character."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        old = self._decode(self._ids[self._before : self._done])
        new = self._decode(self._ids[self._before :])
        if len(new) <= len(old) or (new.endswith(_REPLACEMENT) and not final):
            return ""
        self._before, self._done = self._done, len(self._ids)
        return new[len(old) :]

    def _decode(self, ids: list[int]) -> str:
        hidden = self._hidden
        if hidden is None:
            return decode(self._tokenizer, ids, skip_special_tokens=True)
        return decode(self._tokenizer, [token for token in ids if token not in hidden], skip_special_tokens=False)


class StopFinder:
    """Passes text on until one of the stop strings appears, which is left out.

    Text that may turn out to be the beginning of a stop string is held back.

    Attributes:
        stopped: a stop string has appeared; no more text will be passed on.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Add text and return what can be passed on."""
        if self.stopped or not self._stops:
            return "" if self.stopped else text
        held = self._held + text
        found = [position for position in map(held.find, self._stops) if position >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return held[: min(found)]
        cut = len(held) - max(_overlap(held, stop) for stop in self._stops)
        self._held = held[cut:]
        return held[:cut]

    def finish(self) -> str:
        """Return what was held back."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`, short of all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
