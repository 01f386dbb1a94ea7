"""What options are refused, in the words of Python and of the command line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

import entrollm
from entrollm import CompressOptions, OptionError
from entrollm.cli.console import describe_error
from entrollm.compress import CodingOptions, Target
from entrollm.quantize import BitsOverride
from tests.support.paths import TINY_LLAMA

SELF: dict[str, Any] = {"calibration": "self"}


@pytest.mark.parametrize(
    ("options", "message", "shown"),
    [
        ({"bits": 9}, "bits must be 2 to 8, found 9", "--bits must be 2 to 8, found 9"),
        ({"bits": "4"}, "bits must be 2 to 8, found '4'", "--bits must be 2 to 8, found '4'"),
        ({"overrides": {"*": 1}}, "bits must be 2 to 8, found 1", "--bits must be 2 to 8, found 1"),
        (
            {"trellis": True, "prefer": "speed"},
            "trellis is for the smallest files at a size such as bpw=4.5: leave out prefer='speed'",
            "--trellis is for the smallest files at a size such as --bpw 4.5: leave out --prefer speed",
        ),
        (
            {"trellis": True, "bits": 4},
            "trellis is for the smallest files at a size such as bpw=4.5: leave out bits=4",
            "--trellis is for the smallest files at a size such as --bpw 4.5: leave out --bits 4",
        ),
        (
            {"trellis": True, "lossless": True},
            "trellis is for the smallest files at a size such as bpw=4.5: leave out lossless",
            "--trellis is for the smallest files at a size such as --bpw 4.5: leave out --lossless",
        ),
        (
            {"trellis": True, "bpw": 3, "calibration": "self", "method": "gptq"},
            "trellis is for the smallest files at a size such as bpw=4.5: leave out method='gptq'",
            "--trellis is for the smallest files at a size such as --bpw 4.5: leave out --method gptq",
        ),
        (
            {"prefer": "quality"},
            "prefer must be one of size, speed, fixed, found 'quality'",
            "--prefer must be one of size, speed, fixed, found 'quality'",
        ),
        (
            {"processor": "sparc"},
            "processor must be one of x86, arm, avx512, found 'sparc'",
            "--target must be one of x86, arm, avx512, found 'sparc'",
        ),
        (
            {"processor": "arm"},
            "processor='arm' goes with prefer='speed'",
            "--target arm goes with --prefer speed",
        ),
        (
            {"bits": 4, "processor": "avx512", "prefer": "fixed"},
            "processor='avx512' goes with prefer='speed'",
            "--target avx512 goes with --prefer speed",
        ),
        (
            {"device": "tpu"},
            "device must be one of cpu, cuda, found 'tpu'",
            "--device must be one of cpu, cuda, found 'tpu'",
        ),
        (
            {"keep": "lm_head*"},
            "keep is a sequence of globs, found the text 'lm_head*'",
            "--keep is a sequence of globs, found the text 'lm_head*'",
        ),
        (
            {"threads": 0},
            "threads must be at least 1, a whole number, found 0",
            "--threads must be at least 1, a whole number, found 0",
        ),
        (
            {"threads": 10**20},
            "threads must be at most 1024, found 100000000000000000000",
            "--threads must be at most 1024, found 100000000000000000000",
        ),
        (
            {"bpw": 3, "method": "gptq"},
            "method='gptq' goes with calibration=FILE or calibration='self'",
            "--method gptq goes with --calibration FILE or --calibration self",
        ),
        (
            {"bpw": 3, "drift": False},
            "drift=False goes with calibration=FILE or calibration='self'",
            "--no-drift goes with --calibration FILE or --calibration self",
        ),
        (
            {"bits": 4, "bpw": 3},
            "give one of bits, bpw and size; they all decide the size",
            "give one of --bits, --bpw and --fit; they all decide the size",
        ),
        (
            {"bpw": 3, "size": "1GB"},
            "give one of bits, bpw and size; they all decide the size",
            "give one of --bits, --bpw and --fit; they all decide the size",
        ),
        (
            {"max_kl": math.nan, **SELF},
            "max_kl must be above 0 and finite, found nan",
            "--max-kl must be above 0 and finite, found nan",
        ),
        (
            {"max_kl": 0.1},
            "max_kl goes with calibration, and without bits, bpw and size",
            "--max-kl goes with --calibration, and without --bits, --bpw and --fit",
        ),
        (
            {"max_kl": 0.1, "bpw": 3, **SELF},
            "max_kl goes with calibration, and without bits, bpw and size",
            "--max-kl goes with --calibration, and without --bits, --bpw and --fit",
        ),
        (
            {"bpw": 3, "tune": True},
            "tune needs a text: add calibration=FILE or calibration='self'",
            "--tune needs a text: add --calibration FILE or --calibration self",
        ),
        (
            {"bpw": 3, "sampled": 9},
            "sampled goes with calibration=FILE or calibration='self'",
            "--sampled goes with --calibration FILE or --calibration self",
        ),
        (
            {"bpw": 3, "seed": 1},
            "seed=1 goes with calibration=FILE or calibration='self'",
            "--seed 1 goes with --calibration FILE or --calibration self",
        ),
        (
            {"bpw": 3, "device": "cuda"},
            "device='cuda' goes with calibration=FILE or calibration='self'",
            "--device cuda goes with --calibration FILE or --calibration self",
        ),
        (
            {"bits": 4, **SELF},
            "calibration goes with a size such as bpw=4.5, and not with bits",
            "--calibration goes with a size such as --bpw 4.5, and not with --bits",
        ),
        ({"granularity": "row"}, "granularity='row' goes with bits", "--granularity row goes with --bits"),
        ({"bpw": 4, "granularity": "row"}, "granularity='row' goes with bits", "--granularity row goes with --bits"),
    ],
)
def test_options_that_are_wrong_or_do_not_go_together_are_refused(
    options: dict[str, Any], message: str, shown: str
) -> None:
    with pytest.raises(OptionError) as raised:
        CompressOptions(**options)
    assert str(raised.value) == message
    assert describe_error(raised.value) == shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lossless": "no"}, "lossless must be True or False, found 'no'"),
        ({"drift": None}, "drift must be True or False, found None"),
        ({"keep": None}, "keep is a sequence of globs, found None"),
        ({"lossless_for": ["a", 5]}, "lossless_for is a sequence of globs, found ['a', 5]"),
        ({"overrides": [("a", 4)]}, "overrides maps globs to widths, found [('a', 4)]"),
        ({"bpw": "3"}, "bpw must be an int or a float, found '3'"),
        ({"max_kl": True, **SELF}, "max_kl must be an int or a float, found True"),
        ({"size": 1.9e9}, "size must be an int, in bytes, or a text such as 1.9GB, found 1900000000.0"),
    ],
)
def test_values_of_another_type_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as raised:
        CompressOptions(**options)
    assert str(raised.value) == message


def test_options_are_compress_options(tmp_path: Path) -> None:
    wrong: Any = {"bpw": 3}
    for call in (lambda: entrollm.compress(TINY_LLAMA, tmp_path / "out", wrong), lambda: entrollm.plan("x", wrong)):
        with pytest.raises(TypeError, match=r"options should be CompressOptions\(\.\.\.\), found dict"):
            call()


@pytest.mark.parametrize("size", [{"bpw": 3.0}, {"size": 10**6}, {"max_kl": 0.1, **SELF}])
def test_widths_beside_a_size_are_refused_when_they_would_be_used(size: dict[str, Any], tmp_path: Path) -> None:
    options = CompressOptions(overrides={"lm_head*": 8}, **size)
    with pytest.raises(OptionError) as raised:
        entrollm.compress(TINY_LLAMA, tmp_path / "out", options)
    assert str(raised.value) == "give one of bits, bpw and size; they all decide the size"
    assert describe_error(raised.value) == "give one of --bits, --bpw and --fit; they all decide the size"


def test_widths_beside_calibration_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"calibration goes with a size such as bpw=4\.5, and not with bits"):
        entrollm.compress(TINY_LLAMA, tmp_path / "out", CompressOptions(overrides={"lm_head*": 8}, **SELF))


@pytest.mark.parametrize(
    ("size", "message"), [({"bpw": -1}, "must be above 0"), ({"size": "big"}, "is not a valid file size")]
)
def test_a_size_that_is_none_is_refused(size: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompressOptions(**size)


def test_options_of_coding_are_those_of_the_user() -> None:
    options = CompressOptions(
        size="1.9GB", overrides={"a*": None}, keep=["b*"], calibration="self", tune=True, tokenizer="folder", threads=3
    )
    assert options.coding() == CodingOptions(
        target=Target(file_bytes=1_900_000_000),
        overrides=(BitsOverride("a*", None), BitsOverride("b*", None)),
        fine_scales=True,
        tokenizer=Path("folder"),
        threads=3,
    )


@pytest.mark.parametrize(
    ("options", "message", "shown"),
    [
        (
            {"bits": 4},
            "a plan is for a size such as bpw=4.5 or size='1.9GB', not for bits",
            "a plan is for a size such as --bpw 4.5 or --fit 1.9GB, not for --bits",
        ),
        (
            {"lossless": True, "base": "other"},
            "a plan compares with no base: leave out base='other'",
            "a plan compares with no base: leave out --base other",
        ),
        (
            {"bpw": 3, **SELF},
            "a plan does not calibrate: leave out calibration",
            "a plan does not calibrate: leave out --calibration",
        ),
    ],
)
def test_what_a_plan_cannot_do_is_refused(options: dict[str, Any], message: str, shown: str) -> None:
    with pytest.raises(OptionError) as raised:
        entrollm.plan(TINY_LLAMA, CompressOptions(**options))
    assert str(raised.value) == message
    assert describe_error(raised.value) == shown
