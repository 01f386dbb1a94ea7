"""The HTML page: complete, escaped, and without anything from elsewhere."""

import re

import pytest

from entrollm.report import Column, ModelSection, RatePoint, Table, render_page
from entrollm.report.curve import HEIGHT, WIDTH, lay_out_curve

NASTY = "<script>alert('&')</script>"


def points(*pairs: tuple[float, float]) -> list[RatePoint]:
    return [RatePoint(f"at {bits}", "measured", bits, kl) for bits, kl in pairs]


def page(name: str = "model") -> str:
    table = Table(f"text of {name}", (Column("tensor", "left"), Column("bits")), ((name, "3.5"), ("other", "4")))
    return render_page(
        name, f"about {name}", table, points((3.5, 0.1)), [ModelSection(name, [("made by", name)], table)]
    )


def test_page_holds_all_that_it_is_given() -> None:
    html = page()
    assert html.count("<table>") == 2
    assert "<dt>made by</dt><dd>model</dd>" in html
    assert '<td class="left">other</td><td class="right">4</td>' in html
    assert html.count("<circle") == 1


def test_names_are_escaped() -> None:
    html = page(NASTY)
    assert NASTY not in html
    assert html.count("&lt;script&gt;") >= 5
    assert html.count("<script>") == 1


def test_page_refers_to_nothing_outside() -> None:
    assert set(re.findall(r'(?:href|src)="([^"]*)"', page())) == {"data:,"}
    assert "http" not in re.sub(r'http-equiv="', "", page())


def test_curve_places_points_by_bits_and_by_the_logarithm_of_the_divergence() -> None:
    curve = lay_out_curve(points((4.5, 0.01), (2.5, 1.0), (3.5, 0.1)))
    assert curve is not None
    assert [mark.label for mark in curve.marks] == ["at 2.5", "at 3.5", "at 4.5"]
    low, middle, high = curve.marks
    assert middle.x == pytest.approx((low.x + high.x) / 2)
    assert middle.y == pytest.approx((low.y + high.y) / 2)
    assert low.y < high.y
    assert [tick.label for tick in curve.y_ticks] == ["0.01", "0.1", "1"]
    assert [tick.label for tick in curve.x_ticks] == ["2", "3", "4", "5"]


def test_one_point_is_inside_the_picture_and_none_is_no_picture() -> None:
    curve = lay_out_curve(points((4.0, 0.1)))
    assert curve is not None
    (mark,) = curve.marks
    assert 0 < mark.x < WIDTH
    assert 0 < mark.y < HEIGHT
    assert lay_out_curve(points((4.0, 0.0))) is None
    assert "<svg" not in render_page("a", "b", Table("c", (), ()), [], [])
