"""Streaming text: whole characters, every space, and stop strings."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from entrollm.engine.detokenize import Detokenizer, StopFinder
from tests.engine.tokenizers_for_tests import byte_ids, byte_level, sentence_piece

BYTE_LEVEL = byte_level()
SENTENCE_PIECE = sentence_piece()


def stream(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [*map(detokenizer.push, ids), detokenizer.finish()]


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


@given(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1), max_size=40))
def test_pieces_of_any_byte_level_tokens_add_up(ids: list[int]) -> None:
    assert "".join(stream(Detokenizer(BYTE_LEVEL), ids)) == text_of(BYTE_LEVEL, ids)


@given(st.text(max_size=30))
def test_no_piece_splits_a_character(text: str) -> None:
    text = text.replace("\ufffd", "")
    ids = BYTE_LEVEL.encode(text).ids
    pieces = stream(Detokenizer(BYTE_LEVEL), ids)
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert pieces[-1] == "", "whole characters do not wait for the end"


@given(st.lists(st.one_of(st.integers(259, SENTENCE_PIECE.get_vocab_size() - 1), st.just("日é😀")), max_size=20))
def test_pieces_of_sentence_piece_tokens_add_up(parts: list[int | str]) -> None:
    ids = [i for part in parts for i in (byte_ids(SENTENCE_PIECE, part) if isinstance(part, str) else [part])]
    pieces = stream(Detokenizer(SENTENCE_PIECE), ids)
    assert "".join(pieces) == text_of(SENTENCE_PIECE, ids)
    assert "\ufffd" not in "".join(pieces)


@given(st.integers(0, 8), st.lists(st.integers(259, SENTENCE_PIECE.get_vocab_size() - 1), min_size=1, max_size=20))
def test_a_continuation_keeps_its_first_space(split: int, ids: list[int]) -> None:
    prompt, answer = ids[:split], ids[split:]
    pieces = stream(Detokenizer(SENTENCE_PIECE, context=prompt), answer)
    assert text_of(SENTENCE_PIECE, prompt) + "".join(pieces) == text_of(SENTENCE_PIECE, ids)


def test_first_space_of_continuation_and_of_answer() -> None:
    once, time = (SENTENCE_PIECE.token_to_id(piece) for piece in ("▁Once", "▁time"))
    assert Detokenizer(SENTENCE_PIECE, context=[once]).push(time) == " time"
    assert Detokenizer(SENTENCE_PIECE).push(time) == "time"


def test_special_tokens_do_not_swallow_spaces() -> None:
    names = ("▁Once", "</s>", "▁upon", "</s>", "▁a", "▁time")
    pieces = stream(Detokenizer(SENTENCE_PIECE), [SENTENCE_PIECE.token_to_id(name) for name in names])
    assert "".join(pieces) == "Once upon a time"


def test_a_character_waits_for_its_last_byte() -> None:
    ids = byte_ids(SENTENCE_PIECE, "é日")
    assert stream(Detokenizer(SENTENCE_PIECE), ids) == ["", "é", "", "", "日", ""]


def test_a_prompt_that_ends_within_a_character() -> None:
    ids = byte_ids(SENTENCE_PIECE, "日")
    pieces = stream(Detokenizer(SENTENCE_PIECE, context=ids[:2]), [ids[2], SENTENCE_PIECE.token_to_id("s")])
    assert "".join(pieces).endswith("s")


def test_bytes_that_never_become_a_character() -> None:
    ids = byte_ids(SENTENCE_PIECE, "日")[:2]
    assert stream(Detokenizer(SENTENCE_PIECE), ids) == ["", "", "\ufffd\ufffd"]


def find_stop(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    finder = StopFinder(stops)
    text = "".join(map(finder.push, pieces)) + finder.finish()
    return text, finder.stopped


@given(
    st.lists(st.text("ab\n", max_size=4), max_size=12), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)
)
def test_stop_strings_across_pieces(pieces: list[str], stops: list[str]) -> None:
    """The text ends before the first stop string to be completed."""
    whole = "".join(pieces)
    expected, stopped = whole, False
    prefix = ""
    for piece in pieces:
        prefix += piece
        found = [prefix.find(stop) for stop in stops if stop in prefix]
        if found:
            expected, stopped = prefix[: min(found)], True
            break
    assert find_stop(pieces, stops) == (expected, stopped)


def test_only_a_possible_stop_is_held_back() -> None:
    finder = StopFinder(["\n\n"])
    assert [finder.push("a"), finder.push("b\n"), finder.push("c")] == ["a", "b", "\nc"]
    assert (finder.push("\n"), finder.finish()) == ("", "\n")


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
def test_nothing_gives_nothing(make: Callable[[], Tokenizer]) -> None:
    assert stream(Detokenizer(make()), []) == [""]
