"""The options of `run` and `chat` that choose what guesses tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from entrollm.engine.memory import Memory
    from entrollm.engine.model import Speculate

SpeculateOption = Annotated[
    str | None,
    typer.Option(
        "--speculate",
        metavar="ngram|mtp",
        help="Guess that text goes on as it did before (ngram), or what the model's own multi-token head says (mtp), "
        "and check several tokens at once; the text stays the same.",
    ),
]
DraftOption = Annotated[
    str | None,
    typer.Option(
        "--draft",
        metavar="MODEL",
        help="Let a smaller model with the same tokenizer guess tokens, and check several at once; the text stays "
        "the same.",
    ),
]


def open_speculation(
    speculate: str | None, draft: str | None, *, threads: int | None, memory: Memory, check: bool
) -> Speculate | None:
    """What guesses tokens; None if nothing does.

    Args:
        speculate, draft: the options' values.
        threads, memory, check: how the draft model is loaded.
    Raises:
        ValueError: both options are given, or --speculate has a value that there is not.
        EntroLLMError: the draft model does not load.
    """
    if speculate is not None and draft is not None:
        raise ValueError("--speculate and --draft are two ways to guess tokens; give one of them")
    if draft is not None:
        from entrollm.engine.load import load

        # A limit of memory is that of the large model.
        form = memory if isinstance(memory, str) else "auto"
        return load(draft, threads=threads, memory=form, check=check)
    if speculate is None:
        return None
    if speculate == "ngram":
        return "ngram"
    if speculate == "mtp":
        return "mtp"
    raise ValueError(f"--speculate takes ngram or mtp, found {speculate!r}; a model is named by --draft MODEL")
