"""One stream: what becomes visible, and when."""

from collections.abc import Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from engine.types import TokenEvent
from server.stream import Stream
from tests.server.fake_engine import END, EOS, WORD_IDS, ToyDetokenizer, ToyTokenizer, entry, ids_of


def make_stream(*stops: str, **options: Any) -> Stream:
    detokenizer = ToyDetokenizer(ToyTokenizer())
    return Stream(0, 1, detokenizer, stops=stops, num_prompt_tokens=1, **options)


def feed(
    stream: Stream, ids: Sequence[int], reason: Any = None, step: int = 1
) -> list[tuple[str, list[int]]]:
    """Text and the logprobs' ids after each event of `step` tokens."""
    seen = []
    for begin in range(0, len(ids), step):
        part = tuple(ids[begin : begin + step])
        last = begin + step >= len(ids)
        logprobs = tuple(entry(token_id, 0) for token_id in part)
        stream.push(TokenEvent(1, part, reason if last else None, logprobs))
        delta = stream.take()
        seen.append((delta.text, [e.token_id for _, e in delta.logprobs]))
        if stream.finish_reason is not None:
            break
    return seen


def test_half_a_character_is_never_shown() -> None:
    texts = [text for text, _ in feed(make_stream(), ids_of("aé🙂b"))]
    assert texts == ["a", "", "é", "", "", "", "🙂", "b"]


def test_logprobs_of_a_character_in_pieces_come_with_the_character() -> None:
    ids = ids_of("é")
    assert feed(make_stream(), ids) == [("", []), ("é", ids)]


def test_broken_bytes_at_the_end_become_replacement_characters() -> None:
    seen = feed(make_stream(), ids_of("é")[:1], "length")
    assert seen == [("\ufffd", ids_of("é")[:1])]


def test_the_id_that_ends_a_sequence_has_neither_text_nor_logprob() -> None:
    stream = make_stream()
    assert feed(stream, [*ids_of("ab"), EOS], "stop")[-1] == ("", [])
    assert stream.num_tokens == 3
    assert stream.finish_reason == "stop"


def test_a_stop_across_tokens_is_shown_neither_as_text_nor_as_logprobs() -> None:
    stream = make_stream("STOP")
    ids = [*ids_of("a"), WORD_IDS["STO"], WORD_IDS["P"], *ids_of("b")]
    assert feed(stream, ids) == [("a", ids_of("a")), ("", []), ("", [])]
    assert stream.finish_reason == "stop"
    assert stream.num_tokens == 3


def test_text_that_was_no_stop_after_all_is_shown_with_its_logprobs() -> None:
    ids = [WORD_IDS["STO"], *ids_of("x")]
    assert feed(make_stream("STOP"), ids) == [("", []), ("STOx", ids)]


def test_text_held_back_is_shown_at_the_end() -> None:
    ids = [WORD_IDS["STO"], EOS]
    assert feed(make_stream("STOP"), ids, "stop")[-1] == ("STO", [WORD_IDS["STO"]])


def test_a_stop_inside_one_token_hides_that_tokens_logprob() -> None:
    ids = [WORD_IDS["Hello"]]
    assert feed(make_stream("ll"), ids) == [("He", [])]


def test_half_of_a_stop_character_does_not_leak_through_logprobs() -> None:
    assert feed(make_stream("é"), ids_of("aé"))[1:] == [("", []), ("", [])]


def test_stop_strings_wait_for_min_tokens() -> None:
    stream = make_stream("a", min_tokens=3)
    assert "".join(text for text, _ in feed(stream, ids_of("aabac"))) == "aab"


def test_control_tokens_are_not_text() -> None:
    assert "".join(text for text, _ in feed(make_stream(), [*ids_of("a"), END, 98])) == "ab"


def test_offsets_are_positions_in_the_text() -> None:
    stream = make_stream()
    ids = (*ids_of("é"), WORD_IDS[" world"], *ids_of("x"))
    stream.push(TokenEvent(1, ids, "length", tuple(entry(i, 0) for i in ids)))
    assert [offset for offset, _ in stream.take().logprobs] == [0, 0, 1, 7]


@given(
    st.text("abP STO🙂é", max_size=20),
    st.lists(st.text("abPSTO🙂", min_size=1, max_size=4), max_size=4),
    st.integers(1, 6),
)
def test_text_is_the_same_however_many_tokens_a_step_has(
    text: str, stops: list[str], step: int
) -> None:
    one, many = make_stream(*stops), make_stream(*stops)
    ids = [*ids_of(text), EOS]
    shown = "".join(part for part, _ in feed(one, ids, "stop"))
    assert "".join(part for part, _ in feed(many, ids, "stop", step)) == shown
    assert one.num_tokens == many.num_tokens
    assert not any(stop in shown for stop in stops)
