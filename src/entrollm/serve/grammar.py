"""Answers of a form: schemas and grammars compiled by llguidance to masks over the vocabulary."""

from __future__ import annotations

import copy
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray
from tokenizers import Tokenizer

from entrollm.serve.errors import ApiError, bad_request

_MAX_GRAMMAR_BYTES = 64 << 10
# Models may indent, but not fill an answer with white space.
_WHITE_SPACE = r"(\n? {0,32})?"
# llguidance recurses as deeply as rules refer to each other: thousands of times in a grammar of that length. The worst
# that were found need between 8 and 32 MB.
_STACK_BYTES = 64 << 20
_stack_lock = threading.Lock()
# Integers that round to -2**63 end llguidance 1.9 in an endless recursion where an enum or a const has them.
_LEAST_INTEGERS = re.compile(r"-92233720368547\d{5}(?!\d)")


class Grammars:
    """Compiles grammars for one model.

    Args:
        tokenizer: the model's.
        vocab_size: logits per token.
        end_tokens: token ids that end an answer, at least one.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_tokens: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_tokens = [token for token in end_tokens if token < vocab_size]
        self._lock = threading.Lock()
        self._compiled: LLTokenizer | None = None

    def json_schema(self, schema: Mapping[str, Any], field: str) -> TokenGrammar:
        """The grammar of JSON values of a schema.

        Args:
            schema: a JSON schema; what llguidance does not implement is refused.
            field: of the request, for errors.
        Raises:
            ApiError: the schema is too long, invalid, or uses what is not implemented.
        """
        options: Any = {"whitespace_flexible": True, "whitespace_pattern": _WHITE_SPACE}
        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)
        except ValueError as error:  # texts and numbers that it cannot read
            raise bad_request(f"{field}: {error}", field) from None
        return self._compile(grammar, field)

    def lark(self, grammar: str, field: str) -> TokenGrammar:
        """The grammar of a Lark grammar; see json_schema."""
        return self._compile(LLMatcher.grammar_from_lark(grammar), field)

    def regex(self, pattern: str, field: str) -> TokenGrammar:
        """The grammar of texts that match a regular expression as a whole; see json_schema."""
        return self._compile(LLMatcher.grammar_from_regex(pattern), field)

    def choice(self, texts: Sequence[str], field: str) -> TokenGrammar:
        """The grammar of one of some texts; see json_schema."""
        return self.lark(f"start: {' | '.join(map(json.dumps, texts))}", field)

    def _compile(self, grammar: str, field: str) -> TokenGrammar:
        if len(grammar) > _MAX_GRAMMAR_BYTES:
            raise bad_request(f"{field} is longer than {_MAX_GRAMMAR_BYTES} bytes", field)
        if found := _LEAST_INTEGERS.search(grammar):
            raise bad_request(
                f"{field} has the number {found.group()}, which is not supported; use -2**53 or more", field
            )
        vocabulary = self._vocabulary()
        matcher = _with_large_stack(lambda: LLMatcher(vocabulary, grammar, log_level=0))
        if matcher.is_error():
            raise bad_request(f"{field}: {matcher.get_error().splitlines()[0][:300]}", field)
        return TokenGrammar(matcher, self._vocab_size)

    def _vocabulary(self) -> LLTokenizer:
        """The vocabulary as llguidance needs it, made when it is first used."""
        with self._lock:
            if self._compiled is None:
                size = max(self._vocab_size, self._tokenizer.get_vocab_size(with_added_tokens=True))
                self._compiled = LLTokenizer(self._tokenizer.to_str(), n_vocab=size, eos_token=self._end_tokens)
            return self._compiled


def _with_large_stack(work: Callable[[], LLMatcher]) -> LLMatcher:
    """Work in a thread of its own. An overflow of the stack would end the process.

    Raises:
        ApiError: no such thread can be started.
    """
    done: Future[LLMatcher] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # reported to the thread that waits
            done.set_exception(error)

    with _stack_lock:
        earlier = threading.stack_size(_STACK_BYTES)
        try:
            threading.Thread(target=run, daemon=True).start()
        except RuntimeError as error:
            raise ApiError(503, f"no memory for the grammar: {error}; try again later", retry_after_s=10) from None
        finally:
            threading.stack_size(earlier)
    return done.result()


class GrammarError(ValueError):
    """A grammar became too complex while an answer was made."""


class TokenGrammar:
    """How far an answer has come in its grammar; see `Constraint` of the engine."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def copy(self) -> TokenGrammar:
        """The same grammar for another answer."""
        return TokenGrammar(self._matcher.deep_copy(), self._vocab_size)

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow the tokens so far."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next, end tokens included: bool (vocab_size,).

        Raises:
            GrammarError: the grammar became too complex.
        """
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        return np.unpackbits(packed, count=self._vocab_size, bitorder="little").view(np.bool_)

    def accept(self, token: int) -> None:
        """Go on after a token that was allowed.

        Raises:
            GrammarError: the grammar became too complex.
        """
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(f"the grammar of the answer failed: {self._matcher.get_error()[:300]}")


class Postponed:
    """A grammar that begins to hold behind some tokens; see `Constraint` of the engine.

    Args:
        grammar: holds from then on.
        trigger: the tokens, at least one. Until they have come, an answer cannot end.
        vocab_size: logits per token.
        end_tokens: token ids that end an answer.
    """

    def __init__(
        self, grammar: TokenGrammar, trigger: Sequence[int], vocab_size: int, end_tokens: Sequence[int]
    ) -> None:
        self._grammar = grammar
        self._trigger = list(trigger)
        self._last: list[int] = []
        self._has_begun = False
        self._before = np.ones(vocab_size, dtype=np.bool_)
        self._before[[token for token in end_tokens if token < vocab_size]] = False

    def copy(self) -> Postponed:
        """The same for another answer."""
        twin = copy.copy(self)
        twin._grammar = self._grammar.copy()
        return twin

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow the tokens so far."""
        return self._has_begun and self._grammar.is_complete

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next, end tokens included: bool (vocab_size,)."""
        return self._grammar.allowed() if self._has_begun else self._before

    def accept(self, token: int) -> None:
        """Go on after a token that was allowed."""
        if self._has_begun:
            self._grammar.accept(token)
            return
        self._last = [*self._last, token][-len(self._trigger) :]
        self._has_begun = self._last == self._trigger


# What an answer must look like.
AnswerForm = TokenGrammar | Postponed
