"""The text of single tokens, for log-probabilities."""

from __future__ import annotations

from tokenizers import Tokenizer

from entrollm.checkpoint.panics import decode


class TokenText:
    """Decodes one token at a time, special ones included."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}
        added = tokenizer.get_added_tokens_decoder()
        self._special = frozenset(token for token, entry in added.items() if entry.special)

    def is_special(self, token: int) -> bool:
        """Whether texts leave the token out."""
        return token in self._special

    def __call__(self, token: int) -> str:
        """The token's text; U+FFFD stands for a part of a character."""
        if token not in self._known:
            # Decoders may strip a space at the beginning of a text, so a token's text is what its repetition adds.
            once = decode(self._tokenizer, [token], skip_special_tokens=False)
            twice = decode(self._tokenizer, [token, token], skip_special_tokens=False)
            self._known[token] = twice[len(once) :]
        return self._known[token]
