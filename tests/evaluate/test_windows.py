"""Cutting a text into windows."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from entrollm.cli.console import describe_error
from entrollm.evaluate import Protocol, cut_windows, read_text
from tests.support.paths import EXAMPLES


def number_tokenizer() -> Tokenizer:
    """A tokenizer of the words '0' .. '99', which puts a special token first if it may."""
    tokenizer = Tokenizer(WordLevel({str(number): number for number in range(100)}, unk_token="0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="0 $A", special_tokens=[("0", 0)])
    return tokenizer


def numbers(count: int) -> str:
    return " ".join(str(number) for number in range(1, count + 1))


def test_windows_do_not_overlap_and_the_remainder_is_dropped() -> None:
    windows = cut_windows(number_tokenizer(), numbers(11), Protocol(window=4))
    assert windows.ids.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert windows.text_tokens == 11
    assert windows.text_bytes == len(numbers(11))


def test_bytes_are_counted_in_utf_8() -> None:
    assert cut_windows(number_tokenizer(), "1 2 é", Protocol(window=2)).text_bytes == 6


def test_the_number_of_windows_can_be_limited() -> None:
    windows = cut_windows(number_tokenizer(), numbers(11), Protocol(window=2, max_windows=3))
    assert windows.ids.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert windows.text_tokens == 11


def test_a_start_token_takes_the_place_of_one_token() -> None:
    windows = cut_windows(number_tokenizer(), numbers(7), Protocol(window=4, bos_id=99))
    assert windows.ids.tolist() == [[99, 1, 2, 3], [99, 4, 5, 6]]


def test_a_text_of_one_window_is_enough() -> None:
    assert cut_windows(number_tokenizer(), numbers(4), Protocol(window=4)).ids.shape == (1, 4)


@pytest.mark.parametrize("count", [0, 3])
def test_a_text_too_short_is_refused_with_the_numbers(count: int) -> None:
    with pytest.raises(ValueError, match=f"the text has {count} tokens, and one window takes 4") as raised:
        cut_windows(number_tokenizer(), numbers(count), Protocol(window=4))
    assert str(raised.value).endswith("; use a longer text or a smaller window")
    assert describe_error(raised.value).endswith("; use a longer text or a smaller --window")


def test_a_window_of_one_token_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 tokens, found 1"):
        Protocol(window=1)


def test_no_windows_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 window must be evaluated, found 0"):
        Protocol(max_windows=0)


def test_the_example_text_has_the_stated_tokens() -> None:
    tokenizer = Tokenizer.from_file(str(EXAMPLES / "tiny-llama" / "tokenizer.json"))
    windows = cut_windows(tokenizer, read_text(EXAMPLES / "wikitext-2-test.txt"), Protocol())
    assert (windows.text_tokens, windows.text_bytes, windows.ids.shape) == (344_745, 1_256_449, (673, 512))
    assert windows.ids.dtype == np.int64


def test_line_ends_are_kept(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes("a\r\nä".encode())
    assert read_text(tmp_path / "x.txt") == "a\r\nä"


def test_a_text_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"x\.txt is not UTF-8 text"):
        read_text(tmp_path / "x.txt")
