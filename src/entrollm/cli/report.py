"""`entrollm report`: what compression did to a model, as one HTML page."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from entrollm.cli.console import ThreadsOption, message, progress_bar, stdout, write_text
from entrollm.cli.measured import BosOption, MaxWindowsOption, TextOption, TextOptions, WindowOption, measure
from entrollm.cli.options import check_new_file

if TYPE_CHECKING:
    from entrollm.compress.describe import ModelReport
    from entrollm.report import ModelSection

EXAMPLES = (
    ("entrollm report OUT --against MODEL --text wiki.txt", "write report.html"),
    ("entrollm report A B C --against MODEL --text wiki.txt --html abc.html", "several models and their curve"),
    ("entrollm report OUT --against MODEL --text wiki.txt --max-windows 20 --no-speed", "a quick look"),
)

_PROMPT, _TOKENS, _ROUNDS = 128, 32, 3


def command(
    models: Annotated[
        list[Path], typer.Argument(metavar="OUT...", help="Folders made by `entrollm compress`.", show_default=False)
    ],
    against: Annotated[str, typer.Option("--against", metavar="MODEL", help="The original.", show_default=False)],
    text: TextOption,
    html: Annotated[Path, typer.Option("--html", metavar="FILE", help="The page to write.")] = Path("report.html"),
    window: WindowOption = None,
    max_windows: MaxWindowsOption = None,
    bos: BosOption = False,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Time each model on this machine.")] = True,
    threads: ThreadsOption = None,
) -> None:
    """Write one HTML page on compressed models: size, divergence, perplexity, speed here, and every matrix.

    The page needs no network and no other file. Tables sort by the column that is clicked. The text is read as
    `entrollm eval` reads it.
    """
    from entrollm.engine.load import load
    from entrollm.report import read_points, render_page

    check_new_file("--html", html)
    described = [_describe(model, threads) for model in models]  # refuses what is not compressed before it measures
    measured = measure(
        [str(model) for model in models],
        against,
        TextOptions(text, window, max_windows, bos),
        partial(load, threads=threads),
        False,
    )
    sections = [
        _section(model, report, _speed(model, threads) if speed else None)
        for model, report in zip(models, described, strict=True)
    ]
    table = measured.table()
    page = render_page(
        f"{Path(against).name}, compressed",
        f"Measured on {table.title}. KL is the divergence of each model from the original, in nats per token.",
        table,
        read_points(measured.to_json(), "measured"),
        sections,
    )
    write_text(html, page)
    stdout.print(table.to_rich())
    message(f"wrote {html}")


def _describe(model: Path, threads: int | None) -> ModelReport:
    from entrollm.compress.describe import describe
    from entrollm.format.reader import CompressedModel
    from entrollm.threads import start_pool

    with CompressedModel.open(model, check=False) as opened, progress_bar("decoding", "weights") as update:
        return describe(opened, start_pool(threads), update)


def _speed(model: Path, threads: int | None) -> str:
    from entrollm.engine.benchmark import measure_speeds

    (found,) = measure_speeds(model, ["auto"], threads, prompt=_PROMPT, tokens=_TOKENS, rounds=_ROUNDS)
    rates = found.token_rates
    return (
        f"{found.token_rate:.1f} tokens/s ({min(rates):.1f} to {max(rates):.1f}), "
        f"{found.prompt_rate:.0f} of a prompt, first token after {found.first_token_s:.2f} s"
    )


def _section(model: Path, report: ModelReport, speed: str | None) -> ModelSection:
    from entrollm import _core
    from entrollm.cli.inspect import tensor_table, totals
    from entrollm.format.reader import read_config
    from entrollm.report import ModelSection

    quantization: dict[str, Any] = read_config(model)["quantization_config"]
    made = ", ".join(
        f"{key.replace('_', ' ')} {value}"
        for key, value in quantization.items()
        if key not in ("quant_method", "version")
    )
    facts = [("made by", made), *totals(report)]
    if speed is not None:
        facts.append((f"speed here ({_core.isa()})", speed))
    return ModelSection(model.name, facts, tensor_table(str(model), report))
