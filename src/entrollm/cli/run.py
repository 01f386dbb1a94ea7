"""`entrollm run`: continue a prompt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from entrollm.cli.console import (
    CacheTypeOption,
    CheckOption,
    JsonOption,
    MemoryOption,
    ThreadsOption,
    message,
    print_json,
)
from entrollm.cli.options import check_new_file, read_memory
from entrollm.cli.speculation import DraftOption, SpeculateOption, open_speculation
from entrollm.cli.streams import write_stdout

if TYPE_CHECKING:
    from entrollm.engine.cache import Cache
    from entrollm.engine.generate import GenerationResult
    from entrollm.engine.model import Model

EXAMPLES = (
    ('entrollm run OUT -p "Once upon a time"', "the likeliest text"),
    ('entrollm run OUT -p "Once" --temperature 0.8 --seed 1', "a sampled one"),
    ("entrollm run OUT < prompt.txt --max-tokens 500", "prompt from a file"),
    ("entrollm run OUT < code.txt --speculate ngram", "faster where the answer repeats the prompt"),
    ('entrollm run OUT -p "Q: 2+2?" --stop "Q:" --json', "for scripts"),
)

# Shared with `entrollm chat`. What is left out comes from the model's generation_config.json.
ModelArgument = Annotated[
    str, typer.Argument(metavar="OUT", help="Model folder or Hub id, compressed or not.", show_default=False)
]
MaxTokensOption = Annotated[
    int | None, typer.Option("--max-tokens", "-n", min=1, metavar="N", help="At most N new tokens; by default 256.")
]
TemperatureOption = Annotated[
    float | None, typer.Option("--temperature", metavar="T", help="0 takes the likeliest token; higher is more random.")
]
TopKOption = Annotated[int | None, typer.Option("--top-k", metavar="K", help="Sample among the K likeliest tokens.")]
TopPOption = Annotated[
    float | None, typer.Option("--top-p", metavar="P", help="Sample among the likeliest tokens of total probability P.")
]
MinPOption = Annotated[
    float | None, typer.Option("--min-p", metavar="P", help="Drop tokens less likely than P times the likeliest.")
]
RepetitionPenaltyOption = Annotated[
    float | None, typer.Option("--repetition-penalty", metavar="X", help="Above 1 makes used tokens less likely.")
]
SeedOption = Annotated[int | None, typer.Option("--seed", metavar="N", help="Makes sampling reproducible.")]
StopOption = Annotated[
    list[str] | None, typer.Option("--stop", metavar="TEXT", help="End before this text; can be repeated.")
]


def command(
    model: ModelArgument,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="Text to continue; by default standard input."),
    ] = None,
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    repetition_penalty: RepetitionPenaltyOption = None,
    seed: SeedOption = None,
    stop: StopOption = None,
    speculate: SpeculateOption = None,
    draft: DraftOption = None,
    threads: ThreadsOption = None,
    memory: MemoryOption = "auto",
    cache_type: CacheTypeOption = "f32",
    cache: Annotated[
        Path | None,
        typer.Option(
            "--cache",
            metavar="FILE",
            help="Keep the prompt's keys and values in FILE, and start from what it holds of the prompt.",
        ),
    ] = None,
    check: CheckOption = True,
    json_output: JsonOption = False,
) -> None:
    """Continue a prompt, printing text as it is generated.

    The text goes to standard output, the speed to standard error. Options that
    are left out come from the model's generation_config.json; without one, the
    likeliest token is taken. --top-k, --top-p or --min-p turn sampling on.
    """
    from entrollm.checkpoint.resolve import resolve
    from entrollm.engine.files import why_no_tokenizer
    from entrollm.engine.load import load
    from entrollm.errors import UnsupportedError

    text = _read_prompt(prompt)
    form = read_memory(memory)
    guesses = open_speculation(speculate, draft, threads=threads, memory=form, check=check)
    path = resolve(model)
    loaded = load(path, threads=threads, memory=form, check=check, cache_type=cache_type)
    if loaded.tokenizer is None:
        raise UnsupportedError(why_no_tokenizer(path, "a prompt"))
    known = None if cache is None else _opened(loaded, cache)
    # What the options and the prompt have wrong comes out here, before the prompt is run.
    stream = loaded.stream(
        text,
        cache=known,
        speculate=guesses,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
    )
    if cache is not None and known is not None:
        _prefill(loaded, text, known, cache)
    try:
        for piece in stream:
            if not json_output:
                write_stdout(piece)
    finally:
        if not json_output:
            write_stdout("\n")
    if json_output:
        print_json({"model": model, "prompt": text, **result_to_json(stream.result)})
    message(describe_speed(stream.result))


def _opened(model: Model, file: Path) -> Cache:
    """What a file holds of a prompt, or an empty cache."""
    if file.exists() and not file.is_file():
        raise ValueError(f"--cache {file} is not a file; name another one")
    return model.restore_cache(file) if file.exists() else model.new_cache()


def _prefill(model: Model, prompt: str, cache: Cache, file: Path) -> None:
    """Run a prompt; the file that keeps it is made, or grows with its prompt."""
    held, ids = list(cache.ids), model.encode(prompt)
    is_kept = held != ids[: len(held)]
    if not is_kept and held != ids[:-1]:
        check_new_file("--cache", file)
    computed = model.prefill(prompt, cache)
    message(f"{file}: {cache.length - computed} of {cache.length + 1} prompt tokens were known")
    if is_kept:
        message(f"{file} holds another prompt and stays as it is; delete it, or name another file")
    elif computed:
        model.save_cache(cache, file)


def result_to_json(result: GenerationResult) -> dict[str, Any]:
    """The fields of a result, as --json prints them."""
    return {
        "text": result.text,
        "token_ids": list(result.token_ids),
        "finish_reason": result.finish_reason,
        "prompt_tokens": result.prompt_tokens,
        "prefill_s": result.prefill_s,
        "decode_s": result.decode_s,
        "tokens_per_second": result.tokens_per_second,
        "guessed_tokens": result.guessed_tokens,
        "right_tokens": result.right_tokens,
    }


def describe_speed(result: GenerationResult) -> str:
    """One line on how much was generated, how fast and why it ended."""
    reasons = {
        "stop": "the model ended the text",
        "length": "--max-tokens reached",
        "context": "the model's context is full",
        "unfinished": "interrupted",
    }
    guesses = f"; {result.right_tokens} of {result.guessed_tokens} guesses right" if result.guessed_tokens else ""
    return (
        f"{len(result.token_ids)} tokens at {result.tokens_per_second:.1f} tokens/s after {result.prefill_s:.2f} s "
        f"for {result.prompt_tokens} prompt tokens{guesses}; {reasons[result.finish_reason]}"
    )


def _read_prompt(prompt: str | None) -> str:
    if prompt is not None:
        return prompt
    if sys.stdin.isatty():
        raise ValueError("there is no prompt: give one with -p TEXT, or pipe text in")
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8 text: {error}") from None
    if not text:
        raise ValueError("there is no prompt: standard input is empty; give a text with -p TEXT, or pipe it in")
    return text
