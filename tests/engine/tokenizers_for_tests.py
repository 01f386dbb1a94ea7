"""Two small tokenizers of the kinds that models use."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

_TEXTS = [
    "Once upon a time, there was a child.",
    "the cat sat on the mat and the dog ran",
    "naïve café £5 日本語 😀 übermut",
]


def byte_level() -> Tokenizer:
    """Byte-level BPE, as in Llama 3, Qwen and SmolLM: any byte can be a token; <s> and </s> are special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    return tokenizer


def sentence_piece() -> Tokenizer:
    """Pieces that begin with their space and single bytes for the rest, as in Llama 2, Mistral and Phi-3."""
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += ["▁", "▁Once", "▁upon", "▁a", "▁time", "▁the", "▁cat", "s", "t", "a", "e", ",", "."]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in ("<unk>", "<s>", "</s>")])
    return tokenizer


def byte_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The bytes of `text` as single tokens of sentence_piece()."""
    return [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
