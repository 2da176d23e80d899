"""Text from tokens as they come, stop strings across token boundaries: equal to doing it at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.tokenizer.detokenizer import IncrementalDetokenizer
from cluster.tokenizer.stop_matcher import StopMatcher
from cluster.tokenizer.token_bytes import byte_fallback_bytes, byte_level_bytes


def detokenize(pieces: list[bytes], skipped: frozenset[int] = frozenset()) -> list[str]:
    detokenizer = IncrementalDetokenizer(pieces.__getitem__, skipped)
    return [detokenizer.push(index) for index in range(len(pieces))] + [detokenizer.flush()]


@given(st.lists(st.binary(max_size=5), max_size=30))
def test_any_bytes_in_any_pieces_give_the_text_of_all_at_once(pieces: list[bytes]) -> None:
    assert "".join(detokenize(pieces)) == b"".join(pieces).decode("utf-8", errors="replace")


@given(st.text(max_size=30), st.data())
def test_a_cut_character_waits_for_its_rest(text: str, data: st.DataObject) -> None:
    whole = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=10)))
    pieces = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    deltas = detokenize(pieces)
    assert "".join(deltas) == text
    shown = ""
    for delta in deltas:
        shown += delta
        assert text.startswith(shown)  # nothing is ever taken back


def test_a_character_cut_at_the_end_is_replaced_by_flush_only() -> None:
    assert detokenize([b"a", "é".encode()[:1]]) == ["a", "", "\ufffd"]


def test_skipped_tokens_give_nothing_and_do_not_break_a_character() -> None:
    first, second = "é".encode()[:1], "é".encode()[1:]
    assert detokenize([first, b"<end>", second], frozenset({1})) == ["", "", "é", ""]


def test_bytes_of_tokens() -> None:
    assert byte_level_bytes("Ġhi") == b" hi"
    assert byte_level_bytes("Ċ") == b"\n"
    assert byte_level_bytes("é") == b"\xe9"  # one byte of the alphabet, not the character
    assert byte_level_bytes("<a b>") == b"<a b>"  # a space is outside of the alphabet: added as text
    assert byte_fallback_bytes("▁hi") == b" hi"
    assert byte_fallback_bytes("<0xE9>") == b"\xe9"
    assert byte_fallback_bytes("é") == "é".encode()


def matched_text(matcher: StopMatcher, pieces: list[str]) -> str:
    return "".join([matcher.push(piece) for piece in pieces] + [matcher.flush()])


STOPS = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3, unique=True).map(tuple)


@given(st.lists(st.text("abc", max_size=4), max_size=12), STOPS, st.booleans())
def test_stops_do_not_depend_on_how_the_text_is_cut(pieces: list[str], stops: tuple[str, ...], include: bool) -> None:
    text = "".join(pieces)
    ends = [start + len(stop) for stop in stops if (start := text.find(stop)) >= 0]
    matcher = StopMatcher(stops, include_stop=include)
    shown = matched_text(matcher, pieces)
    if not ends:
        assert (shown, matcher.matched) == (text, None)
        return
    end = min(ends)
    longest = max((stop for stop in stops if text[:end].endswith(stop)), key=len)
    assert matcher.matched == longest
    assert shown == (text[:end] if include else text[: end - len(longest)])


@given(st.lists(st.text("abc", max_size=4), max_size=12), STOPS)
def test_exactly_the_possible_start_of_a_stop_is_held_back(pieces: list[str], stops: tuple[str, ...]) -> None:
    matcher = StopMatcher(stops)
    text = shown = ""
    for piece in pieces:
        text += piece
        shown += matcher.push(piece)
        if matcher.matched is None:
            starts = [stop[:length] for stop in stops for length in range(len(stop))]
            longest = max((start for start in starts if text.endswith(start)), key=len)
            assert shown + longest == text


def test_text_is_held_back_no_longer_than_needed() -> None:
    matcher = StopMatcher(("###",))
    assert [matcher.push(piece) for piece in ("a#", "#", "b#", "##", "tail")] == ["a", "", "##b", "", ""]
    assert matcher.matched == "###"
    assert matcher.flush() == ""


def test_an_empty_stop_string_is_a_programming_error() -> None:
    with pytest.raises(AssertionError):
        StopMatcher(("",))
