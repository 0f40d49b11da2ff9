"""Who was told to come again, and when: so that coming again then succeeds.

Under overload, refused requests that all return after a guessed time meet the same overload. The
gate therefore gives each refused request a time of its own on a schedule of the engine's work, and
knows it again by a digest of who sent it and what. One `Promises` lives on the event loop.
"""

import hashlib
import heapq
from collections import Counter, deque

_LOAD_SHARE = 0.7  # of the engine's time that is promised; newcomers and errors get the rest
_MAX_AHEAD_S = 600.0
_MAX_PROMISES = 4096
_EARLY_S = 0.05  # a client's clock and the network are not exact
_LATE_S = 5.0
_LATE_SHARE = 0.25  # of the time to wait: clients add jitter in proportion
_KEPT_WEIGHT = 0.05


def digest(sender: str, body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=16, key=sender.encode()[:64]).digest()


class _Promise:
    __slots__ = (
        "due_s",
        "expires_s",
        "is_counted",
        "is_settled",
        "key",
        "num_sequences",
        "priority",
    )

    def __init__(
        self, key: bytes, due_s: float, expires_s: float, num_sequences: int, priority: int
    ) -> None:
        self.key = key
        self.due_s = due_s
        self.expires_s = expires_s
        self.num_sequences = num_sequences
        self.priority = priority
        self.is_counted = False  # among those that are due
        self.is_settled = False


class Promises:
    """Times promised to refused requests, by digest; equal requests have one each."""

    def __init__(self) -> None:
        self._by_key: dict[bytes, deque[_Promise]] = {}
        self._coming: list[tuple[float, int, _Promise]] = []  # a heap by due time
        self._due: list[tuple[float, int, _Promise]] = []  # a heap by expiry
        self._count = 0
        self._num_open = 0
        self._num_due: Counter[int] = Counter()  # sequences, by priority
        self._schedule_end_s = 0.0
        self.kept_share = 1.0  # of the clients that came again

    @property
    def num_open(self) -> int:
        return self._num_open

    def num_due(self, now_s: float, horizon_s: float, priority: int = 0) -> int:
        """Sequences of at least this priority that may come within the horizon, or are late."""
        while self._coming and self._coming[0][0] <= now_s + horizon_s:
            _, order, promise = heapq.heappop(self._coming)
            if not promise.is_settled:
                promise.is_counted = True
                self._num_due[promise.priority] += promise.num_sequences
                heapq.heappush(self._due, (promise.expires_s, order, promise))
        while self._due and self._due[0][0] <= now_s:
            promise = heapq.heappop(self._due)[2]
            if not promise.is_settled:
                self._settle(promise, was_kept=False)
        return sum(count for other, count in self._num_due.items() if other <= priority)

    def is_due(self, key: bytes, now_s: float) -> bool:
        """Whether a request with this digest was told to come about now."""
        promises = self._by_key.get(key)
        return promises is not None and promises[0].due_s <= now_s + _EARLY_S

    def make(
        self,
        key: bytes,
        work_s: float,
        num_sequences: int,
        earliest_s: float,
        now_s: float,
        priority: int = 0,
    ) -> float:
        """Seconds after which a refused request should come again."""
        # No overbooking for those who kept away: others may not, and newcomers take idle lanes.
        self._schedule_end_s = max(self._schedule_end_s, now_s) + work_s / _LOAD_SHARE
        due_s = max(self._schedule_end_s, now_s + earliest_s)
        if due_s - now_s > _MAX_AHEAD_S or self._num_open >= _MAX_PROMISES:
            self._schedule_end_s = min(self._schedule_end_s, now_s + _MAX_AHEAD_S)
            return min(due_s - now_s, _MAX_AHEAD_S)
        expires_s = due_s + max(_LATE_S, _LATE_SHARE * (due_s - now_s))
        promise = _Promise(key, due_s, expires_s, num_sequences, priority)
        self._by_key.setdefault(key, deque()).append(promise)
        self._count += 1
        self._num_open += 1
        heapq.heappush(self._coming, (due_s, self._count, promise))
        return due_s - now_s

    def keep(self, key: bytes) -> None:
        """The request has come and was let in, or is about to be told another time."""
        self._settle(self._by_key[key][0], was_kept=True)

    def _settle(self, promise: _Promise, *, was_kept: bool) -> None:
        promise.is_settled = True
        if promise.is_counted:
            self._num_due[promise.priority] -= promise.num_sequences
        promises = self._by_key[promise.key]
        promises.remove(promise)
        if not promises:
            del self._by_key[promise.key]
        self._num_open -= 1
        self.kept_share += _KEPT_WEIGHT * (was_kept - self.kept_share)
