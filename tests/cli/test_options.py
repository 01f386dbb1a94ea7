"""Values of options as the command line reads them."""

from pathlib import Path

import pytest

from entrollm import CompressOptions
from entrollm.cli.options import check_new_file, parse_bits
from entrollm.quantize import BitsOverride


def test_options_are_parsed_in_order_and_keep_wins() -> None:
    default, widths = parse_bits(["model.layers.0.*=8", "4", "a=b*=3"])
    assert default == 4
    overrides = CompressOptions(bits=default, overrides=widths, keep=["lm_head*"]).coding().overrides
    assert overrides == (
        BitsOverride("model.layers.0.*", 8),
        BitsOverride("a=b*", 3),
        BitsOverride("lm_head*", None),
    )


def test_a_glob_that_is_given_again_wins_over_those_between() -> None:
    assert list(parse_bits(["a*=4", "ab*=8", "a*=2"])[1].items()) == [("ab*", 8), ("a*", 2)]


def test_no_bare_number_leaves_the_default_open() -> None:
    assert parse_bits([]) == (None, {})


def test_a_link_is_judged_by_the_folder_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "none" / "a.json")
    with pytest.raises(ValueError, match=r"--json .*link: there is no folder .*none; make it"):
        check_new_file("--json", tmp_path / "link")
    (tmp_path / "none").mkdir()
    check_new_file("--json", tmp_path / "link")


@pytest.mark.parametrize(
    "option", ["four", "lm_head*", "lm_head*=", "", "-4", "4.5", "٤", "9" * 5000, "a=" + "9" * 5000]
)
def test_a_value_that_is_no_number_is_refused(option: str) -> None:
    with pytest.raises(ValueError, match="takes N or GLOB=N"):
        parse_bits([option])


def test_a_number_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="bits must be 2 to 8, found 16"):
        CompressOptions(overrides=parse_bits(["lm_head*=16"])[1])
