"""What every model has beside the part that runs: its tokenizer, its chat template, and answers in the making."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Unpack

import numpy as np
from tokenizers import Tokenizer

from entrollm.checkpoint.panics import encode
from entrollm.engine.answer import AnswerText
from entrollm.engine.batch import SequenceCache, SequenceStep
from entrollm.engine.detokenize import Detokenizer
from entrollm.engine.files import ModelFiles
from entrollm.engine.options import GenerateKeywords, resolve_options
from entrollm.engine.weights import Floats, Ids
from entrollm.errors import UnsupportedError
from entrollm.models.config_fields import Fields

if TYPE_CHECKING:
    from entrollm.engine.chat import ChatTemplate, Message


@dataclass(frozen=True)
class TextShape:
    """What texts and answers depend on.

    Attributes:
        vocab_size: logits per token.
        hidden_size: features of a hidden state.
        context_length: tokens of prompt and answer together.
        bos_token_id: the token that starts a text, if any.
        eos_token_ids: the tokens that end one, unless generation_config.json names others.
    """

    vocab_size: int
    hidden_size: int
    context_length: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]


class TextModel(ABC):
    """A causal language model that runs several sequences in one step, whatever runs it.

    Args:
        files: the model folder's small files.
        shape: what texts and answers depend on.
    Raises:
        FormatError: the chat template is malformed.
    """

    def __init__(self, files: ModelFiles, shape: TextShape) -> None:
        self._shape = shape
        self._tokenizer = files.tokenizer
        self._no_tokenizer = files.no_tokenizer
        self._special_tokens = files.special_tokens
        self._generation_config = Fields(files.generation_config, "generation_config.json")
        self._template: ChatTemplate | None = None
        if files.chat_template is not None:
            # Here, since few callers lay out a dialogue.
            from entrollm.engine.chat import ChatTemplate

            self._template = ChatTemplate(files.chat_template, "chat template", files.special_tokens)
        self._template_text = files.chat_template

    @abstractmethod
    def new_cache(self) -> SequenceCache:
        """An empty cache for one sequence."""

    @abstractmethod
    def step(self, steps: Sequence[SequenceStep]) -> Floats:
        """Run the model on the next tokens of several sequences, and add them to their caches.

        Args:
            steps: at least one, each with a cache of its own, from new_cache().
        Returns:
            float32 (n, vocab_size): the logits after the last token of each step with needs_logits, in their order.
        """

    @abstractmethod
    def logits_of(self, hidden: Floats) -> Floats:
        """The logits of the hidden states that a step's `observe` is given; gives_prompt_logits must hold.

        Args:
            hidden: float32 (n, hidden_size).
        Returns:
            float32 (n, vocab_size).
        """

    @property
    def gives_prompt_logits(self) -> bool:
        """Whether logits_of can be asked."""
        return True

    @property
    def reads_pieces(self) -> bool:
        """Whether a prompt may come in several steps."""
        return True

    @property
    def least_piece(self) -> int:
        """Tokens of a piece of a prompt, fewer of which would take as long."""
        return 1

    @property
    def shape(self) -> TextShape:
        """What texts and answers depend on."""
        return self._shape

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, or None for a model without tokenizer.json."""
        return self._tokenizer

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """The text of bos_token, eos_token and so on, as far as the model names them."""
        return self._special_tokens

    @property
    def has_chat_template(self) -> bool:
        """Whether the model has a chat template, which chat needs."""
        return self._template is not None

    @property
    def chat_template(self) -> str | None:
        """The source of the chat template, or None for a model without one."""
        return self._template_text

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        return self._generation_config.token_ids("eos_token_id") or self._shape.eos_token_ids

    def new_answer(
        self,
        prompt_ids: Sequence[int],
        *,
        continues_text: bool,
        context_length: int | None = None,
        shown_tokens: Collection[int] = (),
        **options: Unpack[GenerateKeywords],
    ) -> AnswerText:
        """What chooses the tokens of an answer and makes its text, for callers that run `step` themselves.

        Args:
            prompt_ids: token ids, at least one.
            continues_text: whether the answer is a continuation of the prompt's text, and not a text of its own.
            context_length: tokens of prompt and answer together; by default the model's.
            shown_tokens: special tokens that the text shows.
            options: as for generate.
        Raises:
            TypeError, ValueError, UnsupportedError: as for generate.
        """
        ids = self._checked_list(prompt_ids)
        context_length = context_length or self._shape.context_length
        if len(ids) >= context_length:
            raise ValueError(f"the prompt has {len(ids)} tokens and leaves no room in a context of {context_length}")
        resolved = resolve_options(options, self._generation_config, self._shape.eos_token_ids, len(ids))
        detokenizer = None
        if self._tokenizer is not None:
            detokenizer = Detokenizer(self._tokenizer, ids if continues_text else [], shown_tokens)
        return AnswerText(resolved, self._shape.vocab_size, ids, context_length - len(ids), detokenizer)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of `text`, with the special tokens that tokenizer.json adds; the start token for "".

        Raises:
            ValueError: the model has no tokenizer, `text` is empty and there is no start token, or it holds lone
                surrogates, as text that was read from bytes other than UTF-8 does.
        """
        ids = self._encode(text, add_special_tokens=add_special_tokens)
        start = next(iter(self._generation_config.token_ids("bos_token_id")), self._shape.bos_token_id)
        if not ids and start is None:
            raise ValueError("the prompt is empty, and the model names no start token to begin with; give a prompt")
        if not ids and start is not None:
            ids = [start]
        return self._checked_list(ids)

    def encode_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: object
    ) -> list[int]:
        """The token ids of a dialogue laid out by the chat template.

        Args:
            messages: each with a "role" and a "content".
            add_generation_prompt: end with the beginning of an answer.
            variables: more names for the template, such as enable_thinking.
        Raises:
            UnsupportedError: the model has no chat template.
            ValueError: the model has no tokenizer, or the template refuses the messages.
        """
        text = self.render_chat(messages, add_generation_prompt=add_generation_prompt, **variables)
        return self._checked_list(self._encode(text, add_special_tokens=False))

    def render_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: object
    ) -> str:
        """The text of a dialogue laid out by the chat template, special tokens included.

        Args:
            messages, add_generation_prompt, variables: as for encode_chat.
        Raises:
            UnsupportedError: the model has no chat template.
            ValueError: the template refuses the messages.
        """
        if self._template is None:
            raise UnsupportedError("this model has no chat template; use generate with a prompt of your own")
        return self._template.render(messages, add_generation_prompt=add_generation_prompt, **variables)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if self._tokenizer is None:
            raise ValueError(self._no_tokenizer)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            # Bytes that are not UTF-8 reach Python as lone surrogates, which are no characters.
            raise ValueError(
                f"the text is not valid Unicode at character {error.start}; it may come from input that is not UTF-8"
            ) from None
        return encode(self._tokenizer, text, add_special_tokens=add_special_tokens)

    def _checked(self, ids: Sequence[int] | Ids) -> Ids:
        array = np.asarray(ids)
        if array.ndim != 1 or len(array) == 0:
            raise ValueError(f"token ids should be a non-empty one-dimensional sequence, got shape {array.shape}")
        if not np.issubdtype(array.dtype, np.integer):
            raise TypeError(f"token ids should be integers, got {array.dtype}")
        if array.min() < 0 or array.max() >= self._shape.vocab_size:
            wrong = next(int(i) for i in array if not 0 <= i < self._shape.vocab_size)
            raise ValueError(f"token id {wrong} is outside the vocabulary of {self._shape.vocab_size}")
        return array.astype(np.int64)

    def _checked_list(self, ids: Sequence[int]) -> list[int]:
        return [int(token_id) for token_id in self._checked(ids)]
