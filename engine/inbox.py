"""What other threads tell the engine thread, in order, until it takes no more."""

import threading
from collections import deque

from engine.succession import Change
from engine.types import Abort, FinishReason, Submit

Message = Submit | Abort | Change
Closing = tuple[FinishReason, str | None]  # how whatever comes too late ends, and its error


class Inbox:
    """Anybody posts, the engine thread takes."""

    def __init__(self) -> None:
        self._messages: deque[Message] = deque()
        self._posted = threading.Event()
        # Guards the messages against the end: one is either taken or refused.
        self._lock = threading.Lock()
        self._closed_with: Closing | None = None

    def __bool__(self) -> bool:
        return bool(self._messages)

    def post(self, message: Message) -> Closing | None:
        """Queue a message and wake the thread; says how it ends where it comes too late."""
        with self._lock:
            closed_with = self._closed_with
            if closed_with is None:
                self._messages.append(message)
        self._posted.set()
        return closed_with

    def post_abort(self, message: Abort) -> None:
        """The same for what is no matter after the end."""
        self._messages.append(message)
        self._posted.set()

    def take(self) -> Message | None:
        """The next message, if any."""
        return self._messages.popleft() if self._messages else None

    def wake(self) -> None:
        """Let the thread look around, though there is no message."""
        self._posted.set()

    def wait(self, timeout_s: float) -> None:
        """Wait for the next message or call of `wake`."""
        self._posted.wait(timeout_s)
        # Cleared before messages are taken: one that comes after it sets the event again.
        self._posted.clear()

    def close(self, reason: FinishReason) -> None:
        """Refuse what is posted from now on; what was posted before is still to be taken."""
        with self._lock:
            if self._closed_with is None:
                self._closed_with = (reason, None)

    def end(self, error: str) -> list[Message]:
        """Refuse what is posted from now on as an error, and return what was not taken."""
        with self._lock:
            self._closed_with = ("error", error)
            unread = list(self._messages)
            self._messages.clear()
        return unread
