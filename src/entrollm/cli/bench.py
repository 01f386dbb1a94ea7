"""`entrollm bench`: how fast a compressed model runs here."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from entrollm.cli.console import JsonOption, ThreadsOption, print_json, stdout
from entrollm.cli.token_bytes import read_token_bytes

if TYPE_CHECKING:
    from entrollm.engine.benchmark import ModelSpeed
    from entrollm.engine.code_speeds import CodeSpeed
    from entrollm.report import Table

EXAMPLES = (
    ("entrollm bench OUT", "tokens per second from the file and from memory"),
    ("entrollm bench OUT --threads 1 --tokens 128", "with one thread, over more tokens"),
    ("entrollm bench OUT --codes", "the products of a token, beside the paper's codes of the same weights"),
    ("ENTROLLM_ISA=avx2 entrollm bench OUT", "as on a processor without AVX-512"),
)

_PROMPT_TOKENS, _TOKENS = 256, 48


def command(
    model: Annotated[Path, typer.Argument(metavar="OUT", help="A folder made by `entrollm compress`.")],
    memory: Annotated[
        list[str] | None,
        typer.Option(
            metavar="auto|file|fast",
            help="A choice of --memory to time; give it more than once for several. By default file and fast.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        int | None, typer.Option("--prompt-tokens", min=1, help="Tokens of the long prompt; by default 256.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=2, help="Tokens to make one after the other; by default 48.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often to time each choice; they take turns.")] = 5,
    codes: Annotated[
        bool,
        typer.Option(
            "--codes",
            help="Time only the products of a token: with integers of 8 and of 4 bits as in the paper, plain and with "
            "Huffman codes, made of this model's weights, and with this model from the file and flat in memory.",
        ),
    ] = False,
    threads: ThreadsOption = None,
    json_output: JsonOption = False,
) -> None:
    """Time a model on this machine: its first token, a long prompt, and tokens one after the other.

    Prompts are random tokens, since speed does not depend on what they say. Rates are the median of all rounds, with
    the slowest and the fastest. Nothing else should be running.

    With --codes, the paper's integers span the weights of a matrix, one grid for each, so they are not as close to the
    model as its own. Large models are timed by a part of their matrices. A token takes longer than its products.
    """
    from entrollm import _core
    from entrollm.engine.benchmark import measure_speeds
    from entrollm.engine.memory import check_memory
    from entrollm.threads import default_threads

    threads = threads or default_threads()
    if codes:
        others = {"--memory": memory, "--prompt-tokens": prompt, "--tokens": tokens}
        if given := [name for name, value in others.items() if value is not None]:
            raise ValueError(f"{', '.join(given)} cannot be given with --codes, which times products alone")
        _bench_codes(model, threads, rounds, json_output)
        return
    prompt, tokens = prompt or _PROMPT_TOKENS, tokens or _TOKENS
    choices = [check_memory(choice) for choice in memory or ("file", "fast")]
    speeds = measure_speeds(model, choices, threads, prompt=prompt, tokens=tokens, rounds=rounds)
    if json_output:
        facts = [asdict(speed) for speed in speeds]
        print_json({"isa": _core.isa(), "threads": threads, "prompt_tokens": prompt, "speeds": facts})
        return
    stdout.print(_table(f"{model}: {_core.isa()}, {threads} thread{'s'[: threads > 1]}", prompt, speeds).to_rich())


def _bench_codes(folder: Path, threads: int, rounds: int, json_output: bool) -> None:
    from entrollm import _core
    from entrollm.engine.code_speeds import measure_codes
    from entrollm.format.reader import CompressedModel

    model = CompressedModel.open(folder)
    sizes = {name: spec.rows * spec.columns for name, spec in model.specs.items()}
    read = read_token_bytes(model.config, sizes)
    weights = sum(sizes.values()) if read is None else read.weight_bytes
    counts = sorted({1, threads})
    speeds = measure_codes(folder, counts, rounds=rounds)
    if json_output:
        facts = [asdict(speed) for speed in speeds]
        print_json({"isa": _core.isa(), "threads": counts, "weights_per_token": weights, "codes": facts})
        return
    stdout.print(_codes_table(f"{folder}: {_core.isa()}, products of a token", counts, weights, speeds).to_rich())


def _codes_table(title: str, counts: list[int], weights: int, speeds: list[CodeSpeed]) -> Table:
    from entrollm.report import Column, Table

    columns = [Column("code", "left"), Column("bits")]
    for count in counts:
        columns += [Column(f"tokens/s, {count} thread{'s'[: count > 1]}"), Column("over uint8")]
    rows = []
    for speed in speeds:
        cells = [speed.code, f"{speed.bits:.2f}"]
        for rate, plain in zip(speed.rates, speeds[0].rates, strict=True):
            cells += [f"{rate / weights:.1f}", f"{rate / plain:.2f}"]
        rows.append(tuple(cells))
    return Table(title, tuple(columns), tuple(rows))


def _table(title: str, prompt: int, speeds: list[ModelSpeed]) -> Table:
    from entrollm.report import Column, Table

    columns = (
        Column("--memory", "left"),
        Column("first token"),
        Column(f"prompt of {prompt}, tokens/s"),
        Column("tokens/s"),
        Column("slowest, fastest"),
    )
    rows = [
        (
            str(speed.memory),
            f"{speed.first_token_s:.2f} s",
            f"{speed.prompt_rate:.0f}",
            f"{speed.token_rate:.1f}",
            f"{min(speed.token_rates):.1f}, {max(speed.token_rates):.1f}",
        )
        for speed in speeds
    ]
    return Table(title, columns, tuple(rows))
