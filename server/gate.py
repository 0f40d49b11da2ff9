"""The state around the pure decision: device condition, costs, promises, and what was decided.

The engine client asks the gate for every request; the watchdog lets it look at the device. It
lives on the event loop.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Literal

import msgspec

from engine.types import rank_s
from server.admission import Load, Reason, Reject, admit
from server.condition import FAULT_CALM_S, Condition, next_condition
from server.cost_model import CostModel
from server.errors import ApiError
from server.forecast import Ask, Forecast, Limits
from server.metrics import Metrics
from server.promises import Promises, digest
from server.standing import Standing
from server.telemetry.samples import DeviceSample

_NUM_DECISIONS = 32
_DUE_HORIZON_S = 5.0
# After a restart or when a step comes back: nobody can know, so not too long.
_UNKNOWN_RETRY_S = 10.0
_UNKNOWN_COSTS_RETRY_S = 1.0  # before the first step
_OVERLOAD_S = 1.0  # after a refusal for want of room the next one is likely
_NO_ROOM: frozenset[Reason] = frozenset({"queue_full", "ttft_too_late"})

# What is decided without the load: the engine or the server is at its end, or a request that was
# admitted has to go.
Refusal = Reason | Literal["engine_stale", "engine_dead", "applying", "shutting_down", "shed"]
Verdict = Refusal | Literal["admitted", "deadline_expired"]

_MESSAGES: dict[Refusal, str] = {
    "queue_full": "The queue is full. Try again later.",
    "ttft_too_late": "The server is busy: the first token would come too late. Try again later.",
    "deadline_too_short": "The answer cannot be complete within the request's 'timeout'.",
    "memory_derated": "The device has less memory than the request needs at the moment.",
    "device_draining": "The device has a fault and takes no new requests.",
    "engine_stale": "The engine does not come back from a step and takes no new requests.",
    "engine_dead": "The engine has stopped.",
    "applying": "A setting is being applied, which takes long. Try again later.",
    "shutting_down": "The server is shutting down.",
    "shed": "The request had to make room for others of higher priority. Try again later.",
}
_CODES: dict[Refusal, str] = {"engine_dead": "engine_stopped"}


class Arrival(msgspec.Struct, frozen=True, kw_only=True):
    """A request before it is admitted. `is_retry` is what its sender says of it, if anything."""

    sender: str = ""
    body: bytes = b""
    arrived_at_s: float = 0.0
    priority: int = 0
    timeout_s: float | None = None
    is_retry: bool | None = None

    @property
    def rank_s(self) -> float:
        return rank_s(self.arrived_at_s, self.priority)

    def ask(self, num_sequences: int) -> Ask:
        """What is known before the prompts are encoded."""
        return Ask(rank_s=self.rank_s, num_sequences=num_sequences, priority=self.priority)

    def left_s(self, now_s: float) -> float | None:
        return None if self.timeout_s is None else self.arrived_at_s + self.timeout_s - now_s


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What was decided of a request, for /v1/telemetry; of the request itself only sizes."""

    age_s: float
    admitted: bool
    reason: Verdict
    num_sequences: int
    num_prompt_tokens: int
    priority: int
    was_promised: bool
    predicted_ttft_s: float | None = None
    retry_after_s: float | None = None


class Gate:
    def __init__(
        self,
        limits: Limits,
        metrics: Metrics,
        sample: Callable[[float], DeviceSample | None] = lambda now_s: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits
        self.costs = CostModel()
        self.condition = Condition()
        self._metrics = metrics
        self._sample = sample
        self._clock = clock
        self._promises = Promises()
        self._decisions: deque[Decision] = deque(maxlen=_NUM_DECISIONS)
        self._standing: Standing | None = None
        self._no_room_at_s = -math.inf  # the last refusal for want of room

    def look(self) -> None:
        """Bring the condition up to date with the device; called now and then."""
        now_s = self._clock()
        self.condition = next_condition(self.condition, self._sample(now_s), now_s)

    @property
    def is_overloaded(self) -> bool:
        """Whether there was no room for somebody of late."""
        return self._clock() - self._no_room_at_s < _OVERLOAD_S

    def note_end(self, num_open: int) -> None:
        """A sequence has ended, and so many are left."""
        if self._standing is not None and not self._standing.outlasts_end(num_open):
            self._standing = None

    def is_promised(self, arrival: Arrival) -> bool:
        """Whether the request was told to come again about now."""
        return self._promises.is_due(self._key(arrival), self._clock(), arrival.is_retry)

    def decide(
        self, arrival: Arrival, ask: Ask, load: Callable[[], Load], *, is_final: bool
    ) -> Forecast:
        """Let a request in, or raise the 400, 429 or 503 that refuses it.

        An admission is final with the prompt's length; before that, refusals are.
        `load` is called unless the last refusal holds for this one too.
        """
        now_s = self._clock()
        key = self._key(arrival)
        is_promised = self._promises.is_due(key, now_s, arrival.is_retry)
        if not is_final and not is_promised:
            standing = self._standing_refusal(arrival, ask, now_s)
            if standing is not None:
                raise self._refuse(standing, arrival, key, ask, now_s)
        horizon_s = min(_DUE_HORIZON_S, self.limits.max_ttft_s / 2)
        num_due = self._promises.num_due(now_s, horizon_s, ask.priority)
        # How long the answer may become, and so when it could end, is known with the prompt only.
        timeout_s = arrival.left_s(now_s) if is_final else None
        ask = msgspec.structs.replace(ask, is_promised=is_promised, timeout_s=timeout_s)
        num_due = round(num_due * self._promises.kept_share)
        decision = admit(
            ask,
            msgspec.structs.replace(load(), num_due=num_due),
            self.costs.costs,
            self.condition,
            self.limits,
        )
        if isinstance(decision, Reject):
            if decision.reason in _NO_ROOM:
                self._no_room_at_s = now_s
                if not is_promised:
                    self._standing = Standing(
                        refusal=decision,
                        rank_s=ask.rank_s,
                        num_sequences=ask.num_sequences,
                        num_bytes=len(arrival.body) if is_final else 0,
                        condition=self.condition,
                        limits=self.limits,
                        since_s=now_s,
                    )
            raise self._refuse(decision, arrival, key, ask, now_s)
        if is_final:
            self._promises.come(key, now_s, arrival.is_retry)
            self._note(ask, now_s, decision.forecast, "admitted", None)
        return decision.forecast

    def refuse(self, reason: Refusal, arrival: Arrival, num_sequences: int) -> ApiError:
        """The 503 of a server whose engine takes nothing at the moment, or never again."""
        ask = arrival.ask(num_sequences)
        self._note(ask, self._clock(), None, reason, _UNKNOWN_RETRY_S)
        return self._error(503, reason, ask, _UNKNOWN_RETRY_S)

    def shed(self, arrival: Arrival, num_sequences: int, work_s: float) -> ApiError:
        """The 429 of an admitted request that has to make room."""
        now_s, self._standing = self._clock(), None
        key = digest(arrival.sender, arrival.body)
        retry_after_s = self._promises.make(
            key, work_s, num_sequences, 1.0, now_s, arrival.priority
        )
        ask = arrival.ask(num_sequences)
        self._note(ask, now_s, None, "shed", retry_after_s)
        return self._error(429, "shed", ask, retry_after_s)

    def note_expired(self, arrival: Arrival, num_sequences: int) -> None:
        """An admitted request has come to the end of its own time; it was not refused."""
        self._note(arrival.ask(num_sequences), self._clock(), None, "deadline_expired", None)

    def decisions(self) -> list[Decision]:
        """The latest decisions, newest first, with their age."""
        now_s = self._clock()
        return [
            msgspec.structs.replace(decision, age_s=round(now_s - decision.age_s, 3))
            for decision in reversed(self._decisions)
        ]

    @property
    def num_promised(self) -> int:
        return self._promises.num_open

    @property
    def kept_share(self) -> float:
        return self._promises.kept_share

    def _key(self, arrival: Arrival) -> bytes:
        """What the request is known by; with nobody promised anything, nobody needs to be."""
        return digest(arrival.sender, arrival.body) if self._promises.num_open else b""

    def _standing_refusal(self, arrival: Arrival, ask: Ask, now_s: float) -> Reject | None:
        last = self._standing
        if last is None or last.condition is not self.condition or last.limits is not self.limits:
            return None
        num_bytes = len(arrival.body)
        return last.refusal if last.covers(ask, num_bytes, now_s) else None

    def _refuse(
        self, decision: Reject, arrival: Arrival, key: bytes, ask: Ask, now_s: float
    ) -> ApiError:
        retry_after_s = self._retry_after_s(decision, arrival, key, ask, now_s)
        self._note(ask, now_s, decision.forecast, decision.reason, retry_after_s)
        return self._error(decision.status, decision.reason, ask, retry_after_s)

    def _retry_after_s(
        self, decision: Reject, arrival: Arrival, key: bytes, ask: Ask, now_s: float
    ) -> float | None:
        if decision.reason == "device_draining":
            recovers_at_s = self.condition.recovers_at_s
            return FAULT_CALM_S if recovers_at_s is None else max(1.0, recovers_at_s - now_s)
        if decision.reason == "memory_derated":
            return _UNKNOWN_RETRY_S
        if decision.reason not in _NO_ROOM:
            return decision.retry_after_s
        assert decision.forecast is not None
        return self._promises.make(
            key or digest(arrival.sender, arrival.body),
            decision.forecast.work_s,
            ask.num_sequences,
            decision.retry_after_s or _UNKNOWN_COSTS_RETRY_S,
            now_s,
            ask.priority,
            is_retry=arrival.is_retry,
        )

    def _error(
        self, status: int, reason: Refusal, ask: Ask, retry_after_s: float | None
    ) -> ApiError:
        if reason == "too_many_sequences":
            return ApiError(
                400,
                f"The request asks for {ask.num_sequences} sequences; this server takes at most "
                f"{self.limits.capacity} at once.",
                param="n",
            )
        message = _MESSAGES[reason]
        if reason == "device_draining":
            message = f"{message} ({', '.join(self.condition.reasons)})"
        return ApiError(
            status,
            message,
            param="timeout" if reason == "deadline_too_short" else None,
            code=_CODES.get(reason, reason),
            retry_after_s=retry_after_s,
            is_final=retry_after_s is None,
        )

    def _note(
        self,
        ask: Ask,
        now_s: float,
        forecast: Forecast | None,
        reason: Verdict,
        retry_after_s: float | None,
    ) -> None:
        self._metrics.observe_decision(reason, ask.num_sequences)
        self._decisions.append(
            Decision(
                age_s=now_s,  # the time itself, until it is shown
                admitted=reason == "admitted",
                reason=reason,
                num_sequences=ask.num_sequences,
                num_prompt_tokens=ask.num_prompt_tokens,
                priority=ask.priority,
                was_promised=ask.is_promised,
                predicted_ttft_s=None if forecast is None else round(forecast.ttft_s, 4),
                retry_after_s=None if retry_after_s is None else round(retry_after_s, 3),
            )
        )
