"""Stop strings in text that comes in pieces."""

from hypothesis import given
from hypothesis import strategies as st

from server.stop_strings import StopMatcher

texts = st.text("ab", max_size=24)
stop_sets = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4)


def cut_at_stop(text: str, stops: list[str]) -> str | None:
    """By definition: before the stop that ends first, of several the longest."""
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            return text[: end - max(map(len, matches))]
    return None


@given(st.lists(texts, max_size=8), stop_sets)
def test_the_cut_does_not_depend_on_the_pieces(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(tuple(stops))
    shown = ""
    expected = cut_at_stop("".join(pieces), stops)
    for piece in pieces:
        text, stopped = matcher.push(piece)
        shown += text
        if stopped:
            assert shown == expected
            return
    assert expected is None
    assert shown + matcher.flush() == "".join(pieces)


@given(st.lists(texts, max_size=8), stop_sets)
def test_text_is_held_back_only_while_a_stop_could_still_match(
    pieces: list[str], stops: list[str]
) -> None:
    matcher = StopMatcher(tuple(stops))
    shown = fed = ""
    for piece in pieces:
        text, stopped = matcher.push(piece)
        if stopped:
            return
        shown += text
        fed += piece
        longest = max(
            (n for stop in stops for n in range(len(stop)) if fed.endswith(stop[:n])), default=0
        )
        assert shown == fed[: len(fed) - longest]


def test_a_stop_that_almost_matches_for_long_is_found_in_the_end() -> None:
    matcher = StopMatcher(("a" * 1000 + "b",))
    shown = "".join(matcher.push("a" * 10)[0] for _ in range(2000))
    assert len(shown) == 19_000
    assert matcher.push("b") == ("", True)
