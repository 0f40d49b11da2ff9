"""Decides whether a request may enter, from numbers alone; called by the engine client."""

import math

import msgspec


class Limits(msgspec.Struct, frozen=True):
    max_sequences: int  # that the engine runs at once
    max_queue: int  # that may wait beyond those

    @property
    def capacity(self) -> int:
        return self.max_sequences + self.max_queue


class Admit(msgspec.Struct, frozen=True):
    pass


class Reject(msgspec.Struct, frozen=True):
    status: int
    retry_after_s: int | None


def admit(num_open: int, num_new: int, mean_duration_s: float, limits: Limits) -> Admit | Reject:
    """Admit `num_new` sequences beside `num_open` ones.

    A request that would not fit an idle server is a 400; one that finds the queue full is a 429
    with the time after which about as many sequences have ended.
    """
    if num_new > limits.capacity:
        return Reject(400, None)
    if num_open + num_new <= limits.capacity:
        return Admit()
    num_rounds = (num_open + num_new - limits.capacity) / limits.max_sequences
    return Reject(429, max(1, min(60, math.ceil(mean_duration_s * num_rounds))))
