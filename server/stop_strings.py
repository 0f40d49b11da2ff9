"""Finds stop strings in text that arrives in pieces; used by `stream.py`, one per stream."""

MAX_STOP_CHARS = 1024


class StopMatcher:
    """Holds text back while a stop string could still match, so that none of it leaks.

    The match that ends first wins, and of those the longest: the result does not depend on how
    the text was cut into pieces. Time is linear in the text (Knuth, Morris and Pratt 1977).
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._failures = [_failure_table(stop) for stop in stops]
        self._matched = [0] * len(stops)  # characters of each stop that the text ends with
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """Text that can be shown, and whether a stop string was met right after it."""
        for position, char in enumerate(piece):
            num_matched = self._advance(char)
            if num_matched:
                text = self._held + piece[: position + 1]
                self._held = ""
                return text[: len(text) - num_matched], True
        text = self._held + piece
        cut = len(text) - max(self._matched)
        self._held = text[cut:]
        return text[:cut], False

    def flush(self) -> str:
        """What was held back, once no more text will come."""
        held, self._held = self._held, ""
        return held

    def _advance(self, char: str) -> int:
        """Length of the longest stop string that ends with `char`, else 0."""
        longest = 0
        for index, stop in enumerate(self._stops):
            matched = self._matched[index]
            while matched and stop[matched] != char:
                matched = self._failures[index][matched - 1]
            matched += stop[matched] == char
            if matched == len(stop):
                longest = max(longest, matched)
            self._matched[index] = matched
        return longest


def _failure_table(stop: str) -> list[int]:
    """For each prefix, the length of its longest proper suffix that is a prefix too."""
    table = [0] * len(stop)
    matched = 0
    for index in range(1, len(stop)):
        while matched and stop[matched] != stop[index]:
            matched = table[matched - 1]
        matched += stop[matched] == stop[index]
        table[index] = matched
    return table
