"""A model to run: configuration, weights and tokenizer together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Union, Unpack

import numpy as np

from entrollm import errors
from entrollm.engine.batch import SequenceStep
from entrollm.engine.cache import Cache
from entrollm.engine.cache_file import restore_cache, save_cache
from entrollm.engine.decoder import Decoder
from entrollm.engine.detokenize import Detokenizer
from entrollm.engine.files import ModelFiles
from entrollm.engine.generate import Generation, GenerationResult
from entrollm.engine.head_drafter import HeadDrafter
from entrollm.engine.options import GenerateKeywords, resolve_options
from entrollm.engine.speculate import Drafter, ModelDrafter, NgramDrafter, Speculation
from entrollm.engine.text_model import TextModel, TextShape
from entrollm.engine.weights import Floats, Ids, Weights
from entrollm.errors import UnsupportedError
from entrollm.models import read_config
from entrollm.models.config import ModelConfig
from entrollm.models.config_fields import Fields

if TYPE_CHECKING:
    from entrollm.engine.chat import Message

Prompt = str | Sequence[int]
Speculate = Union[Literal["ngram", "mtp"], "Model"]
_OTHER_WAY = errors.Message("transformers may run it, with the plugin entrollm.hf for a compressed folder")


class Model(TextModel):
    """A causal language model that runs on the CPU.

    Args:
        files: the model folder's small files.
        weights: its tensors.
        cache_type: how caches hold keys and values.
        fingerprint: gives what differs between models, for caches in files; None if nothing does.
    Raises:
        FormatError: config.json or the chat template is malformed, or a tensor is missing or of another shape.
        UnsupportedError: the model type, or an option of it, is not implemented, or its attention does not read keys
            and values of this type.
    """

    def __init__(
        self,
        files: ModelFiles,
        weights: Weights,
        cache_type: str = "f32",
        fingerprint: Callable[[], str] | None = None,
    ) -> None:
        self._fingerprint = fingerprint
        try:
            self._config = read_config(Fields(files.config, "config.json"))
            super().__init__(files, shape_of(self._config))
            self._decoder = Decoder(self._config, weights, cache_type)
        except UnsupportedError as error:
            if "entrollm.hf" in str(error):
                raise
            raise UnsupportedError(error.message, hint=_OTHER_WAY) from None

    @property
    def config(self) -> ModelConfig:
        """The shape and options of the architecture."""
        return self._config

    def new_cache(self) -> Cache:
        """An empty cache, to pass to successive generations that share a beginning."""
        return self._decoder.new_cache()

    def prefill(self, prompt: Prompt, cache: Cache) -> int:
        """Run the model on a prompt, all but its last token, so that a stream with this cache begins at once.

        Args:
            prompt: as for generate.
            cache: from new_cache(); what it shares with the prompt is not computed again.
        Returns:
            The number of tokens that were computed.
        Raises:
            TypeError, ValueError: the prompt is invalid, or fills the context.
        """
        ids = self.encode(prompt) if isinstance(prompt, str) else self._checked_list(prompt)
        if len(ids) >= self._config.context_length:
            raise ValueError(
                f"the prompt has {len(ids)} tokens and leaves no room for an answer: the model's context is "
                f"{self._config.context_length} tokens; shorten the prompt"
            )
        cache.claim()
        known = cache.reuse(ids)
        left = np.array(ids[known:-1], dtype=np.int64)
        if len(left):
            self._decoder.forward(left, cache, last=1)
        return len(left)

    def save_cache(self, cache: Cache, path: str | Path) -> None:
        """Write what a cache holds to a file, which is replaced when it is complete.

        Raises:
            UnsupportedError: nothing tells this model from others.
            OSError: the file cannot be written.
        """
        save_cache(Path(path), cache, self._known())

    def restore_cache(self, path: str | Path) -> Cache:
        """The cache that save_cache has written.

        Raises:
            FormatError: the file is no cache, or one of another model or type.
            CorruptStreamError: its bytes are damaged.
            UnsupportedError: nothing tells this model from others.
            OSError: it cannot be read.
        """
        cache = self.new_cache()
        restore_cache(Path(path), cache, self._known(), self._config.vocab_size)
        return cache

    def _known(self) -> str:
        if self._fingerprint is None:
            raise UnsupportedError("this model was not loaded from files, so nothing tells its caches from others")
        return self._fingerprint()

    def logits(self, ids: Sequence[int] | Ids, *, last: int | None = None, cache: Cache | None = None) -> Floats:
        """Return the logits of the token after each prefix of `ids`, as raw ids: no token is added.

        Args:
            ids: integers (n,), n >= 1.
            last: return only the logits after the `last` longest prefixes, which saves the rest of the output head.
            cache: from new_cache(); what it shares with the ids is not computed again, as far as no logits are wanted
                there. It holds the ids afterwards.
        Returns:
            float32 (n, vocab_size), or (last, vocab_size).
        Raises:
            TypeError: the ids are not integers.
            ValueError: there are none, they are not one-dimensional, one is outside the vocabulary, or last is not
                between 1 and n.
        """
        checked = self._checked(ids)
        wanted = len(checked) if last is None else last
        if not 1 <= wanted <= len(checked):
            raise ValueError(f"last should be between 1 and the number of token ids, {len(checked)}, got {last}")
        if cache is None:
            cache = self._decoder.new_cache()
        else:
            cache.claim()
        known = cache.reuse(checked[: len(checked) - wanted + 1].tolist())
        return self._decoder.forward(checked[known:], cache, last=wanted)

    def step(self, steps: Sequence[SequenceStep]) -> Floats:
        """Run the model on the next tokens of several sequences at once; see Decoder.step.

        Raises:
            TypeError: ids are not integers.
            ValueError: there are no steps, two of them share a cache, or ids are as for logits.
        """
        if not steps:
            raise ValueError("a step should have at least one sequence")
        if len({id(step.cache) for step in steps}) < len(steps):
            raise ValueError("two sequences of a step share a cache; give each one of its own, from new_cache()")
        return self._decoder.step([replace(step, ids=self._checked(step.ids)) for step in steps])

    def logits_of(self, hidden: Floats) -> Floats:
        """The logits of the hidden states that a step's `observe` is given; see TextModel."""
        return self._decoder.logits(hidden)

    def generate(
        self,
        prompt: Prompt,
        *,
        on_text: Callable[[str], object] | None = None,
        speculate: Speculate | None = None,
        **options: Unpack[GenerateKeywords],
    ) -> GenerationResult:
        """Continue a prompt.

        Args:
            prompt: text, encoded as tokenizer.json says (which may add a start token), or raw token ids.
            on_text: called with each piece of text as it is made.
            speculate: what guesses the next tokens, which this model then checks several at a time: "ngram" looks up
                how the text so far goes on elsewhere; "mtp" asks the multi-token head of this model, if it has one; a
                smaller model with the same tokenizer says what it would say.
                The tokens are the same as without, also where they are sampled, as far as a pass of several tokens
                gives each the bits that it has alone: coded matrices and native attention do. Where parts run in numpy
                or matrices are not coded, a sum can be rounded otherwise, and a token whose logit is nearly another's
                can become the other. Where guesses do not pay, there are none. None for no guesses.
            options: see GenerateKeywords; what is left out comes from generation_config.json.
        Raises:
            TypeError, ValueError: an option or the prompt is invalid, or the prompt fills the context.
            UnsupportedError: generation_config.json asks for something that is not implemented, or the smaller model
                has another vocabulary, or layers whose state cannot go back, or this one has no multi-token head.
        """
        return _run(self.stream(prompt, speculate=speculate, **options), on_text)

    def stream(
        self,
        prompt: Prompt,
        *,
        cache: Cache | None = None,
        speculate: Speculate | None = None,
        **options: Unpack[GenerateKeywords],
    ) -> Generation:
        """Like generate, but returns an iterator over the pieces of text; nothing runs until it is iterated.

        Args:
            prompt, speculate, options: as for generate.
            cache: from new_cache(); what it shares with the prompt is not computed again. A stream that goes on after
                another one has used its cache raises ValueError.
        """
        ids = self.encode(prompt) if isinstance(prompt, str) else self._checked_list(prompt)
        return self._generation(ids, ids, cache, speculate, options)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        on_text: Callable[[str], object] | None = None,
        speculate: Speculate | None = None,
        **options: Unpack[GenerateKeywords],
    ) -> GenerationResult:
        """Answer a dialogue laid out by the model's chat template.

        Args:
            messages: each with a "role" and a "content".
            on_text, speculate, options: as for generate.
        Raises:
            TypeError, ValueError: the messages are malformed or the template refuses them, or as for generate.
            UnsupportedError: the model has no chat template, or as for generate.
        """
        return _run(self.stream_chat(messages, speculate=speculate, **options), on_text)

    def stream_chat(
        self,
        messages: Sequence[Message],
        *,
        cache: Cache | None = None,
        speculate: Speculate | None = None,
        **options: Unpack[GenerateKeywords],
    ) -> Generation:
        """Like chat, but returns an iterator over the pieces of text; nothing runs until it is iterated."""
        # The answer is a text of its own, not a continuation: its first space, if any, is the tokenizer's.
        return self._generation(self.encode_chat(messages), [], cache, speculate, options)

    def speculation(self, cache: Cache, pending: Sequence[int], speculate: Speculate) -> Speculation:
        """What makes the tokens of one answer by guesses, for callers that run `step` themselves.

        Args:
            cache: of the answer's sequence, from new_cache().
            pending: the tokens that follow those in the cache, at least one.
            speculate: as for generate, but not "mtp"; a smaller model must have passed check_draft.
        Raises:
            ValueError: it is "mtp", whose head needs the hidden states of the caller's steps.
        """
        if speculate == "mtp":
            raise ValueError("the multi-token head guesses for generate and stream alone")

        def forward(ids: Sequence[int], /, *, last: int) -> Floats:
            return self._decoder.forward(np.array(ids, dtype=np.int64), cache, last=last)

        return Speculation(self._new_drafter(speculate), [*cache.ids, *pending], self._decoder, cache, forward)

    def _generation(
        self,
        ids: list[int],
        context: list[int],
        cache: Cache | None,
        speculate: Speculate | None,
        keywords: GenerateKeywords,
    ) -> Generation:
        options = resolve_options(keywords, self._generation_config, self._config.eos_token_ids, len(ids))
        detokenizer = Detokenizer(self._tokenizer, context) if self._tokenizer else None
        return Generation(self._decoder, ids, options, detokenizer, cache, self._drafter(speculate))

    def _drafter(self, speculate: Speculate | None) -> Drafter | None:
        if speculate is None:
            return None
        if isinstance(speculate, Model):
            check_draft(self, speculate)
        elif speculate not in ("ngram", "mtp"):
            raise ValueError(f"speculate should be 'ngram', 'mtp' or a model, got {speculate!r}")
        return self._new_drafter(speculate)

    def _new_drafter(self, speculate: Speculate) -> Drafter:
        if isinstance(speculate, Model):
            return ModelDrafter(speculate._decoder, self._config.vocab_size)
        if speculate == "mtp":
            return HeadDrafter(self._decoder.token_head())
        return NgramDrafter()


def shape_of(config: ModelConfig) -> TextShape:
    """What texts and answers of a model of this configuration depend on."""
    return TextShape(
        config.vocab_size, config.hidden_size, config.context_length, config.bos_token_id, config.eos_token_ids
    )


def _run(generation: Generation, on_text: Callable[[str], object] | None) -> GenerationResult:
    for piece in generation:
        if on_text is not None:
            on_text(piece)
    return generation.result


def check_draft(model: Model, draft: Model) -> None:
    """Check that a smaller model can guess for another one.

    Raises:
        UnsupportedError: it has another vocabulary, or there is no tokenizer to tell by, or its layers keep states.
    """
    if draft.new_cache().has_states:
        raise UnsupportedError(
            f"the draft model is a {draft.config.model_type}, whose layers keep a state that cannot take guesses back; "
            "give another one"
        )
    if model.tokenizer is None or draft.tokenizer is None:
        which = "the model" if model.tokenizer is None else "the draft model"
        raise UnsupportedError(
            f"{which} has no tokenizer.json, so that nothing tells whether both have the same tokens"
        )
    ours, theirs = (each.tokenizer.get_vocab() for each in (model, draft) if each.tokenizer is not None)
    if ours != theirs:
        text, token = min(ours.items() ^ theirs.items(), key=lambda item: item[1])
        raise UnsupportedError(
            f"the draft model has {len(theirs)} tokens and the model {len(ours)}, and token {token}, {text!r}, is one "
            "of only one of them; give a draft model with the same tokenizer"
        )
