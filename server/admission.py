"""Decides whether a request may enter: a pure function of load, device condition and limits.

The gate calls it before a long prompt is encoded, and when the length of any is known.
"""

from collections.abc import Sequence
from typing import Literal

import msgspec

from server.condition import Condition
from server.cost_model import Costs
from server.errors import MAX_RETRY_AFTER_S
from server.forecast import Ask, Forecast, Limits, OpenSequence, Outlook

Reason = Literal[
    "too_many_sequences",  # would not fit an idle server
    "queue_full",
    "ttft_too_late",  # the first token is predicted after --max-ttft-s
    "deadline_too_short",  # the answer is predicted after the request's own timeout
    "memory_derated",  # would fit the whole device, but not what is left of it
    "device_draining",
]

# While others were told to come again soon, those that were not leave them this share of the
# queue at most.
_MAX_KEPT_SHARE = 0.5
# Of the latest time to the first token, what may be predicted: forecasts are right on average.
_SHARE = 0.8
# Those who were told to come get in unless a forecast was far off, since those who were not leave
# them a queue that is short enough.
_PROMISED_SHARE = 0.9
_NEWCOMER_SHARE = 0.6
# Who comes again finds the first token predicted for this share of its latest time: predictions
# are not exact, and at the limit itself every other one would be refused again.
_COMFORTABLE_SHARE = 0.75


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is open, and how many sequences were told to come again about now."""

    sequences: Sequence[OpenSequence] = ()
    num_reserved: int = 0  # places of requests whose prompts are being encoded
    num_due: int = 0

    @property
    def num_open(self) -> int:
        return len(self.sequences) + self.num_reserved


class Admit(msgspec.Struct, frozen=True):
    forecast: Forecast


class Reject(msgspec.Struct, frozen=True):
    """`retry_after_s` is the earliest time at which it could fit; None: it never will."""

    status: int
    reason: Reason
    retry_after_s: float | None
    forecast: Forecast | None = None


def admit(
    ask: Ask, load: Load, costs: Costs, condition: Condition, limits: Limits
) -> Admit | Reject:
    """Admit `ask` beside `load`, or say why not and when to come again."""
    if ask.num_sequences > limits.capacity:
        return Reject(400, "too_many_sequences", None)
    if condition.status == "draining":
        return Reject(503, "device_draining", None)
    limits = limits.scaled(condition.factor)
    outlook = Outlook(ask.rank_s, load.sequences, costs, limits)
    seen = outlook.forecast(ask)
    if ask.num_sequences > limits.capacity or (
        limits.num_blocks and seen.most_blocks > limits.num_blocks
    ):
        return Reject(503, "memory_derated", None, seen)
    refusal = _refuse_place(ask, load, costs, limits, seen)
    refusal = refusal or _refuse_ttft(ask, load, costs, limits, seen, outlook)
    return refusal or _refuse_deadline(ask, seen) or Admit(seen)


def _refuse_place(
    ask: Ask, load: Load, costs: Costs, limits: Limits, seen: Forecast
) -> Reject | None:
    num_free = limits.capacity - load.num_open
    num_kept = 0
    if not ask.is_promised:
        num_kept = min(load.num_due, int(limits.max_queue * _MAX_KEPT_SHARE))
    num_missing = ask.num_sequences - (num_free - num_kept)
    if num_missing <= 0:
        return None
    # A place is free when a sequence has ended: at full concurrency, one after each share of work.
    rate_s = costs.mean_output_tokens * costs.decode_s(limits.max_sequences) / limits.max_sequences
    return Reject(429, "queue_full", min(MAX_RETRY_AFTER_S, num_missing * rate_s), seen)


def _refuse_ttft(
    ask: Ask, load: Load, costs: Costs, limits: Limits, seen: Forecast, outlook: Outlook
) -> Reject | None:
    # An empty server takes what it is asked for: waiting would make nothing better.
    if not load.num_open:
        return None
    ttft_s = seen.ttft_s
    # A lane that nobody waits for is not kept idle for those who may come.
    if load.num_due and not ask.is_promised and not seen.starts_now:
        coming = OpenSequence(
            ask.rank_s, round(costs.mean_prompt_tokens), 0, round(costs.mean_output_tokens) or 1
        )
        outlook.put_ahead(coming, min(load.num_due, limits.capacity))
        ttft_s = outlook.forecast(ask).ttft_s
    share = _PROMISED_SHARE if ask.is_promised else _NEWCOMER_SHARE if load.num_due else _SHARE
    latest_s = limits.max_ttft_s * share
    if ttft_s <= latest_s:
        return None
    late_s = ttft_s - latest_s * _COMFORTABLE_SHARE
    return Reject(429, "ttft_too_late", min(MAX_RETRY_AFTER_S, late_s), seen)


def _refuse_deadline(ask: Ask, seen: Forecast) -> Reject | None:
    if ask.timeout_s is None or seen.end_s <= ask.timeout_s:
        return None
    late_s = seen.end_s - ask.timeout_s
    is_hopeless = seen.idle_end_s > ask.timeout_s
    return Reject(
        429, "deadline_too_short", None if is_hopeless else min(MAX_RETRY_AFTER_S, late_s), seen
    )


def num_to_shed(load: Load, condition: Condition, limits: Limits) -> int:
    """How many sequences are open beyond what a derated device can be asked for."""
    if condition.status != "derated":
        # A draining device may finish what runs; nothing says that it cannot. And an operator who
        # lowers the limits of a sound one is patient with those who are in.
        return 0
    return max(0, load.num_open - limits.scaled(condition.factor).capacity)
