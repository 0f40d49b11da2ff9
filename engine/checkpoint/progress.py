"""How long downloads and loading show themselves: a bar on a terminal, plain lines elsewhere.

Sources and the loader report through it; the programs that start them choose the kind.
"""

import sys
import time
from typing import Protocol, TextIO


class Progress(Protocol):
    """Receives what happens. One piece of work at a time, between start and finish."""

    def start(self, what: str, total_bytes: int | None) -> None: ...

    def advance(self, num_bytes: int) -> None:
        """That many bytes more are done."""

    def finish(self) -> None: ...

    def note(self, message: str) -> None:
        """One line, outside any piece of work."""


class SilentProgress:
    """Shows nothing."""

    def start(self, what: str, total_bytes: int | None) -> None:
        pass

    def advance(self, num_bytes: int) -> None:
        pass

    def finish(self) -> None:
        pass

    def note(self, message: str) -> None:
        pass


class StreamProgress:
    """A bar that redraws itself, or, where the stream is no terminal, a line at each quarter."""

    _BAR_WIDTH = 30
    _REDRAW_S = 0.1

    def __init__(self, stream: TextIO, *, is_terminal: bool | None = None) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty() if is_terminal is None else is_terminal
        self._what = ""
        self._done = 0
        self._total: int | None = None
        self._shown_quarter = 0
        self._drawn_at_s = 0.0

    def start(self, what: str, total_bytes: int | None) -> None:
        self._what, self._total, self._done = what, total_bytes or None, 0
        self._shown_quarter, self._drawn_at_s = 0, 0.0
        if not self._is_terminal:
            self.note(what + (f" ({_megabytes(self._total)})" if self._total else ""))

    def advance(self, num_bytes: int) -> None:
        self._done += num_bytes
        if not self._is_terminal:
            self._show_quarters()
        elif time.monotonic() - self._drawn_at_s >= self._REDRAW_S:
            self._draw()

    def finish(self) -> None:
        if self._is_terminal:
            self._draw()
            self._stream.write("\n")
            self._stream.flush()

    def note(self, message: str) -> None:
        print(message, file=self._stream, flush=True)

    def _show_quarters(self) -> None:
        if not self._total:
            return
        quarter = min(4, self._done * 4 // self._total)
        if quarter > self._shown_quarter:
            self._shown_quarter = quarter
            self.note(f"{self._what}: {quarter * 25} % of {_megabytes(self._total)}")

    def _draw(self) -> None:
        self._drawn_at_s = time.monotonic()
        text = f"\r{self._what}: {_megabytes(self._done)}"
        if self._total:
            share = min(1.0, self._done / self._total)
            filled = round(share * self._BAR_WIDTH)
            bar = "#" * filled + "." * (self._BAR_WIDTH - filled)
            text = f"\r{self._what}: [{bar}] {share:4.0%} of {_megabytes(self._total)}"
        self._stream.write(text)
        self._stream.flush()


def stderr_progress() -> Progress:
    """The kind that fits the process's standard error."""
    return StreamProgress(sys.stderr)


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"
