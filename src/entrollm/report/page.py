"""A report on compressed models as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from entrollm.report.curve import HEIGHT, WIDTH, lay_out_curve
from entrollm.report.rate_distortion import RatePoint
from entrollm.report.table import Table

_TEMPLATE = Path(__file__).with_name("page.html.jinja")


@dataclass(frozen=True)
class ModelSection:
    """What the page says of one model.

    Attributes:
        name: the model.
        facts: how it was made and what it takes, as pairs of a name and a value.
        tensors: its matrices.
    """

    name: str
    facts: Sequence[tuple[str, str]]
    tensors: Table


def render_page(
    title: str, about: str, quality: Table, points: Sequence[RatePoint], models: Sequence[ModelSection]
) -> str:
    """Write the page; everything in it is escaped.

    Args:
        title: the heading.
        about: a sentence on how the figures came about.
        quality: one row for each model, the original first.
        points: one for each compressed model, for the plot.
        models: a section for each compressed model.
    """
    from jinja2 import Environment, StrictUndefined  # what prints tables starts without

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        title=title,
        about=about,
        quality=quality,
        curve=lay_out_curve(points),
        width=WIDTH,
        height=HEIGHT,
        models=models,
    )
