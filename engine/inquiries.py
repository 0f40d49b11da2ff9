"""What others ask of the engine thread's own objects: answered by it, between two steps."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from engine.runner import Runner

T = TypeVar("T")


class Inquiries:
    """Anybody asks, the engine thread answers; after the end nobody is left waiting."""

    def __init__(self) -> None:
        self._open: deque[tuple[Future[Any], Callable[[Runner], Any]]] = deque()
        self._lock = threading.Lock()
        self._has_ended = False

    def ask(self, question: Callable[[Runner], T]) -> Future[T]:
        """Queue a question to the runner that serves; after the end the future is cancelled."""
        answer: Future[T] = Future()
        with self._lock:
            if self._has_ended:
                answer.cancel()
            else:
                self._open.append((answer, question))
        return answer

    def answer(self, runner: Runner) -> None:
        """Answer whatever was asked; called on the engine thread."""
        while self._open:
            answer, question = self._open.popleft()
            # One who has gone away has cancelled it.
            if answer.set_running_or_notify_cancel():
                try:
                    answer.set_result(question(runner))
                except Exception as error:
                    answer.set_exception(error)

    def end(self) -> None:
        """Refuse what was asked and what will be."""
        with self._lock:
            self._has_ended = True
            for answer, _ in self._open:
                answer.cancel()
