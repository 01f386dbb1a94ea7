"""`entrollm compare`: compare models with their original, in one table and one rate-distortion plot."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from entrollm.cli.console import ThreadsOption, json_safe, message, print_json, write_text
from entrollm.cli.measured import BosOption, MaxWindowsOption, TextOption, TextOptions, WindowOption, measure
from entrollm.cli.options import check_new_file
from entrollm.errors import FormatError
from entrollm.system import naming

EXAMPLES = (
    ("entrollm compare MODEL A B C --text wiki.txt", "one table"),
    ("entrollm compare MODEL A B C --text wiki.txt --plot curve.png", "and a plot of KL over size"),
    ("entrollm compare MODEL A B --text wiki.txt --json results.json", "keep the figures in a file"),
    ("entrollm compare MODEL A --text wiki.txt --add results.json --plot curve.png", "draw earlier points too"),
)


def command(
    original: Annotated[
        str, typer.Argument(metavar="ORIGINAL", help="The original: a folder or a Hub id.", show_default=False)
    ],
    models: Annotated[
        list[str], typer.Argument(metavar="OUT...", help="Models to compare, compressed or not.", show_default=False)
    ],
    text: TextOption,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write all figures to FILE; - prints them in place of the table."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot", metavar="FILE", help="Draw KL over file bits to FILE (.png, .svg or .pdf); needs matplotlib."
        ),
    ] = None,
    add: Annotated[
        list[Path] | None,
        typer.Option(
            "--add", metavar="FILE", help="Draw the figures of FILE too: an earlier --json, or another tool's."
        ),
    ] = None,
    window: WindowOption = None,
    max_windows: MaxWindowsOption = None,
    bos: BosOption = False,
    threads: ThreadsOption = None,
) -> None:
    """Compare models with their original: file size, KL divergence, top-1 agreement, perplexity.

    The text is read as `entrollm eval` reads it; the original reads each window once for all models.

    An --add file holds an object with "models", a list of objects with "model", "file_bits", "kl": {"mean": ...} and
    optionally "method", which names the curve. --json writes such a file.
    """
    from entrollm.engine.load import load
    from entrollm.report import check_plotting, draw_rate_distortion, read_points

    if add and plot is None:
        raise ValueError("--add goes with --plot FILE, which draws its figures")
    earlier = [point for path in add or [] for point in read_points(read_json(path), path.stem)]
    if plot is not None:
        check_plotting(plot)
        check_new_file("--plot", plot)
    to_stdout = str(json_file) == "-"
    if json_file is not None and not to_stdout:
        check_new_file("--json", json_file)
    loader = partial(load, threads=threads)
    measured = measure(models, original, TextOptions(text, window, max_windows, bos), loader, to_stdout)
    result = json_safe(measured.to_json())
    if to_stdout:
        print_json(result)
    else:
        measured.print_table()
        if json_file is not None:
            write_text(json_file, json.dumps(result, indent=2, allow_nan=False) + "\n")
    if plot is not None:
        points = [*read_points(result, "measured"), *earlier]
        with naming(plot):
            hidden = draw_rate_distortion(plot, points, f"{Path(original).name} on {text.name}")
        if hidden:
            message(f"{plot} has no place for a KL of 0: {', '.join(hidden)}")


def read_json(path: Path) -> object:
    """Read a file of figures.

    Raises:
        FormatError: it is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not valid JSON: {error}") from None
