"""Who was told to come again, and when: so that coming again then succeeds.

Under overload, refused requests that all return after a guessed time meet the same overload. The
gate therefore gives each refused request a place of its own on a schedule of the engine's work, and
knows it again by a digest of who sent it and what. One `Promises` lives on the event loop.
"""

import hashlib
import heapq
from collections import Counter

from server.errors import MAX_RETRY_AFTER_S

_LOAD_SHARE = 0.7  # of the engine's time that is promised; newcomers and errors get the rest
_MAX_PROMISES = 4096
_MAX_EQUAL = 1024  # of these, for equal requests: who never waits leaves the others room
_EARLY_S = 0.001  # no more: an equal request that comes by chance would take the place
_LATE_S = 5.0
_LATE_SHARE = 0.25  # of the time to wait: clients add jitter in proportion
# Of the clients that were told to come, those that do: the schedule is overbooked by the others.
_KEPT_WEIGHT = 0.05
_MIN_KEPT_SHARE = 0.05
# Equal requests closer together are two of them: nobody asks again that soon, SDKs wait 0.4 s.
_SAME_AFTER_S = 0.3


def digest(sender: str, body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=16, key=sender.encode()[:64]).digest()


class _Promise:
    """A place on the schedule, from `due_s` on."""

    __slots__ = (
        "due_s",
        "expires_s",
        "is_ahead",
        "is_counted",
        "is_second",
        "is_settled",
        "key",
        "num_sequences",
        "priority",
        "work_s",
    )

    def __init__(
        self,
        key: bytes,
        due_s: float,
        expires_s: float,
        work_s: float,
        num_sequences: int,
        priority: int,
    ) -> None:
        self.key = key
        self.due_s = due_s
        self.expires_s = expires_s
        self.work_s = work_s
        self.num_sequences = num_sequences
        self.priority = priority
        self.is_ahead = True  # not due yet
        self.is_counted = False  # among those that are due soon
        self.is_second = False  # its client came in time, and was refused again
        self.is_settled = False


class _Same:
    """The promises of equal requests, and what is known of their clients."""

    __slots__ = ("asked_s", "promises", "says_so")

    def __init__(self) -> None:
        self.promises: list[_Promise] = []
        self.asked_s = 0.0  # when the last one was refused
        self.says_so = False  # who asks again has been seen to say so


_Heap = list[tuple[float, int, _Promise]]


class Promises:
    """Times promised to refused requests, by digest; equal requests have one each."""

    def __init__(self) -> None:
        self._by_key: dict[bytes, _Same] = {}
        self._coming: _Heap = []  # by due time, those not counted yet
        self._ahead: _Heap = []  # by due time, those not due yet
        self._expiring: _Heap = []  # by expiry
        self._order = 0
        self._num_open = 0
        self._num_due: Counter[int] = Counter()  # sequences, by priority
        self._ahead_s = 0.0  # work of those not due yet
        self.kept_share = 1.0  # of the clients that came again

    @property
    def num_open(self) -> int:
        return self._num_open

    def num_due(self, now_s: float, horizon_s: float, priority: int = 0) -> int:
        """Sequences of at least this priority that may come within the horizon, or are late."""
        self._advance(now_s)
        while self._coming and self._coming[0][0] <= now_s + horizon_s:
            promise = heapq.heappop(self._coming)[2]
            if not promise.is_settled:
                promise.is_counted = True
                self._num_due[promise.priority] += promise.num_sequences
        return sum(count for other, count in self._num_due.items() if other <= priority)

    def is_due(self, key: bytes, now_s: float, is_retry: bool | None = None) -> bool:
        """Whether a request with this digest was promised to be let in about now.

        `is_retry` is what its client says, None where it says nothing.
        """
        self._advance(now_s)
        promise = self._asked_before(key, now_s, is_retry)
        return promise is not None and promise.due_s <= now_s + _EARLY_S

    def make(
        self,
        key: bytes,
        work_s: float,
        num_sequences: int,
        earliest_s: float,
        now_s: float,
        priority: int = 0,
        *,
        is_retry: bool | None = None,
    ) -> float:
        """Seconds after which a refused request should come again.

        One that asks again before it is its turn keeps its place.
        """
        self._advance(now_s)
        promise = self._asked_before(key, now_s, is_retry)
        if promise is not None and promise.due_s <= now_s + _EARLY_S:
            # It came as it was told, and there was no room: its turn is as soon as there is.
            self._settle(promise, was_kept=True)
            promise = self._add(key, now_s, earliest_s, work_s, num_sequences, priority)
            promise.is_second = True
        elif promise is None:
            share = max(_MIN_KEPT_SHARE, self.kept_share) / _LOAD_SHARE
            wait_s = max(earliest_s, (self._ahead_s + work_s) * share)
            if wait_s > MAX_RETRY_AFTER_S or self._is_full(key):
                return min(wait_s, MAX_RETRY_AFTER_S)
            promise = self._add(key, now_s, wait_s, work_s, num_sequences, priority)
        self._by_key[key].asked_s = now_s
        return promise.due_s - now_s

    def come(self, key: bytes, now_s: float, is_retry: bool | None = None) -> None:
        """A request with this digest was let in: if it had a place, others may have that."""
        self._advance(now_s)
        promise = self._asked_before(key, now_s, is_retry)
        if promise is not None:
            self._settle(promise, was_kept=True)

    def _is_full(self, key: bytes) -> bool:
        same = self._by_key.get(key)
        num_equal = 0 if same is None else len(same.promises)
        return self._num_open >= _MAX_PROMISES or num_equal >= _MAX_EQUAL

    def _asked_before(self, key: bytes, now_s: float, is_retry: bool | None) -> _Promise | None:
        """The promise of a request that comes again; None where it seems to be another one."""
        same = self._by_key.get(key)
        if same is None:
            return None
        same.says_so |= bool(is_retry)
        if same.says_so and is_retry is False:
            return None
        first = min(same.promises, key=_due_s)
        is_due = first.due_s <= now_s + _EARLY_S
        return first if is_due or is_retry or now_s - same.asked_s >= _SAME_AFTER_S else None

    def _add(
        self,
        key: bytes,
        now_s: float,
        wait_s: float,
        work_s: float,
        num_sequences: int,
        priority: int,
    ) -> _Promise:
        due_s = now_s + wait_s
        expires_s = due_s + max(_LATE_S, _LATE_SHARE * wait_s)
        promise = _Promise(key, due_s, expires_s, work_s, num_sequences, priority)
        self._by_key.setdefault(key, _Same()).promises.append(promise)
        self._num_open += 1
        self._ahead_s += work_s
        self._push(self._coming, due_s, promise)
        self._push(self._ahead, due_s, promise)
        self._push(self._expiring, expires_s, promise)
        return promise

    def _push(self, heap: _Heap, at_s: float, promise: _Promise) -> None:
        self._order += 1
        heapq.heappush(heap, (at_s, self._order, promise))

    def _advance(self, now_s: float) -> None:
        """Take what is due off the schedule, and give back the places of those who kept away."""
        while self._ahead and self._ahead[0][0] <= now_s:
            self._leave_schedule(heapq.heappop(self._ahead)[2])
        while self._expiring and self._expiring[0][0] <= now_s:
            promise = heapq.heappop(self._expiring)[2]
            if not promise.is_settled:
                self._settle(promise, was_kept=False)

    def _leave_schedule(self, promise: _Promise) -> None:
        if promise.is_ahead:
            promise.is_ahead = False
            self._ahead_s -= promise.work_s

    def _settle(self, promise: _Promise, *, was_kept: bool) -> None:
        promise.is_settled = True
        self._leave_schedule(promise)
        if promise.is_counted:
            self._num_due[promise.priority] -= promise.num_sequences
        same = self._by_key[promise.key]
        same.promises.remove(promise)
        if not same.promises:
            del self._by_key[promise.key]
        self._num_open -= 1
        if not self._num_open:
            self._ahead_s = 0.0  # no rounding errors pile up
        # Who gives up after coming in vain is no reason to overbook, and to refuse still more.
        if not promise.is_second:
            self.kept_share += _KEPT_WEIGHT * (was_kept - self.kept_share)


def _due_s(promise: _Promise) -> float:
    return promise.due_s
