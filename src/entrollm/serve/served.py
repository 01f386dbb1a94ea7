"""A loaded model, with what answers to its requests need."""

from __future__ import annotations

import json
from collections.abc import Sequence

from entrollm.checkpoint.panics import decode, encode
from entrollm.engine.text_model import TextModel
from entrollm.errors import EntroLLMError, UnsupportedError
from entrollm.serve.engines import Guesses
from entrollm.serve.errors import bad_request
from entrollm.serve.grammar import AnswerForm, Grammars, Postponed, TokenGrammar
from entrollm.serve.output.choose import OutputFormat
from entrollm.serve.output.harmony import Harmony
from entrollm.serve.output.items import Functions
from entrollm.serve.pace import Pace
from entrollm.serve.slots import Slots
from entrollm.serve.token_text import TokenText

# Enough of a prompt's end for a marker and the white space around it.
_LAST_TOKENS = 12


class ServedModel:
    """A model with the slots in which its sequences run.

    Attributes:
        name: what requests call it.
        model: the model; only the scheduler's thread runs it.
        context_length: tokens of prompt and answer together.
        slots: the caches.
        output: how it writes calls and reasoning.
        guesses: what guesses tokens of an answer that runs alone; None if nothing does.
        tokenizer: the model's.
        pace: how much of a prompt is read in one step.
        token_text: the text of single tokens.
        grammars: compiles grammars.

    Raises:
        FormatError: its generation_config.json is malformed.
        UnsupportedError: the model has no tokenizer, or generation_config.json asks for what is not implemented.
    """

    def __init__(
        self,
        name: str,
        model: TextModel,
        context_length: int,
        slots: Slots,
        output: OutputFormat,
        guesses: Guesses | None = None,
    ) -> None:
        if model.tokenizer is None:
            raise UnsupportedError(f"{name} has no tokenizer.json, which serving needs")
        try:
            model.new_answer([0], continues_text=False, max_tokens=1)  # what no answer could be made with
        except EntroLLMError as error:
            raise type(error)(f"{name}/{error}") from None
        self.name = name
        self.model = model
        self.context_length = min(context_length, model.shape.context_length)
        self.slots = slots
        self.output = output
        self.guesses = guesses
        self.tokenizer = model.tokenizer
        self.pace = Pace(model.least_piece)
        self.token_text = TokenText(self.tokenizer)
        self.grammars = Grammars(self.tokenizer, model.shape.vocab_size, model.end_token_ids)
        added = self.tokenizer.get_added_tokens_decoder()
        self._special = {token: entry.content for token, entry in added.items() if entry.special}

    def shown_tokens(self, *, with_calls: bool) -> frozenset[int]:
        """The special tokens that mark reasoning and, with `with_calls`, calls."""
        marks = self.output.marks(with_calls=with_calls)
        return frozenset(token for token, text in self._special.items() if text in marks)

    def call_grammar(self, functions: Functions, *, several: bool) -> TokenGrammar:
        """The grammar of an answer that calls one or more of `functions`.

        Raises:
            ApiError: a schema is invalid, or uses what is not implemented.
            ValueError: the model writes no calls that are known here.
        """
        if self.output.calls is None:
            raise ValueError(f"{self.name} writes no calls that are known here")
        return self.grammars.lark(self.output.calls.grammar(functions, self._mark, several=several), "tools")

    def begins_in_reasoning(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt ends with the marker behind which the model reasons."""
        if self.output.reasoning is None:
            return False
        end = decode(self.tokenizer, list(prompt[-_LAST_TOKENS:]), skip_special_tokens=False).rstrip()
        return end.endswith(self.output.reasoning.opening.rstrip())

    def after_reasoning(self, grammar: TokenGrammar, prompt: Sequence[int]) -> AnswerForm:
        """A grammar that holds from the end of the reasoning on, if an answer to `prompt` begins with it.

        Raises:
            ApiError: there is no telling where the reasoning ends.
        """
        if isinstance(self.output.calls, Harmony):
            marker = "<|channel|>final<|message|>"
        elif self.output.reasoning is not None and self.begins_in_reasoning(prompt):
            marker = self.output.reasoning.closing
            if self.tokenizer.token_to_id(marker) is None:
                raise bad_request(f"{self.name} reasons first, and {marker} is not a token that a grammar could follow")
        else:
            return grammar
        trigger = encode(self.tokenizer, marker, add_special_tokens=False)
        return Postponed(grammar, trigger, self.model.shape.vocab_size, self.model.end_token_ids)

    def _mark(self, marker: str) -> str:
        """A marker in a Lark grammar: as a token if it is a special one, else as text."""
        token = self.tokenizer.token_to_id(marker)
        return f"<[{token}]>" if token in self._special else json.dumps(marker)
