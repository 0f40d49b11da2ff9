"""How far the device can be relied on: a pure function of its samples, with hysteresis.

The gate calls `next_condition` twice a second. Getting worse takes effect at once, getting better
only after a calm time, so that noise around a threshold changes nothing.
"""

from typing import Literal

import msgspec

from server.telemetry.samples import DeviceSample, Xid

Status = Literal["ok", "derated", "draining"]

CALM_S = 10.0  # without a reason before a derated device gets its full share again
FAULT_CALM_S = 60.0  # likewise after a fault of the hardware

# Free memory under which others have taken too much, and the one that ends it.
_LOW_MEMORY_SHARE = 0.02
_LOW_MEMORY_BYTES = 256 << 20
_MEMORY_RELEASE = 1.5
_MEMORY_PRESSURE = 0.2  # share of the time in which everything waits for memory
_QUOTA_THROTTLED = 0.5  # of the CPU time that the control group wants
_RELEASE = 0.5  # of both shares above
_HOT_MARGIN_C = 2.0
_HOT_RELEASE_C = 7.0

# The driver's own advice for these is to drain the node or to reset the device: uncorrectable
# memory errors, NVLink and GSP failures, a device that has fallen off the bus. Others (13, 31,
# 43, ...) are errors of the application that caused them.
FATAL_XIDS = frozenset({48, 62, 64, 74, 79, 92, 95, 119, 120, 140, 143, 144, 145, 154})
# A GPU at its power cap does what it was built for: that is no reason.
_THROTTLED = frozenset(
    {
        "hardware slowdown",
        "software thermal slowdown",
        "hardware thermal slowdown",
        "power brake",
    }
)


class Condition(msgspec.Struct, frozen=True, kw_only=True):
    """What admission knows of the device; `factor` is the share of the limits that holds."""

    status: Status = "ok"
    factor: float = 1.0
    reasons: tuple[str, ...] = ()
    recovers_at_s: float | None = None  # the reasons are over; it gets better then, if they stay so
    num_ecc_uncorrected: int | None = None  # at the last look
    last_xid_at_s: float = 0.0


def next_condition(last: Condition, sample: DeviceSample | None, now_s: float) -> Condition:
    """The condition after one more look; a missing or stale sample gives no reason."""
    fatal = [] if sample is None else _fatal_xids(last, sample)
    faults = [] if sample is None else _faults(last, sample)
    faults += [f"XID {xid.code}" for xid in fatal]
    reasons = dict.fromkeys(faults, 0.0) or _derating(last, sample)
    seen = Condition(
        factor=min(reasons.values(), default=1.0),
        reasons=tuple(reasons),
        num_ecc_uncorrected=last.num_ecc_uncorrected
        if sample is None or sample.num_ecc_uncorrected is None
        else sample.num_ecc_uncorrected,
        last_xid_at_s=max((xid.seen_at_s for xid in fatal), default=last.last_xid_at_s),
    )
    if seen.factor <= last.factor:
        return msgspec.structs.replace(seen, status=_status(seen.factor))
    recovers_at_s = last.recovers_at_s
    if recovers_at_s is None:
        recovers_at_s = now_s + (CALM_S if last.factor else FAULT_CALM_S)
    if now_s >= recovers_at_s:
        return msgspec.structs.replace(seen, status=_status(seen.factor))
    return msgspec.structs.replace(
        seen,
        status=last.status,
        factor=last.factor,
        reasons=last.reasons,
        recovers_at_s=recovers_at_s,
    )


def _status(factor: float) -> Status:
    return "ok" if factor >= 1 else "derated" if factor > 0 else "draining"


def _fatal_xids(last: Condition, sample: DeviceSample) -> list[Xid]:
    return [
        xid for xid in sample.xids if xid.code in FATAL_XIDS and xid.seen_at_s > last.last_xid_at_s
    ]


def _faults(last: Condition, sample: DeviceSample) -> list[str]:
    faults = [] if sample.fault is None else [f"device {sample.fault}"]
    before, now = last.num_ecc_uncorrected, sample.num_ecc_uncorrected
    if before is not None and now is not None and now > before:
        faults.append("uncorrectable memory errors")
    return faults


def _derating(last: Condition, sample: DeviceSample | None) -> dict[str, float]:
    """Reasons to rely on a part of the device only, and on how much of it."""
    if sample is None:
        return {}
    reasons: dict[str, float] = {}

    def over(name: str, value: float | None, threshold: float, release: float) -> bool:
        """Whether `value` is past its threshold, the milder one once it has been past it."""
        if value is None:
            return False
        return value > (release if name in last.reasons else threshold)

    free, total = sample.memory_free_bytes, sample.memory_total_bytes
    if free is not None and total is not None:
        low = min(_LOW_MEMORY_BYTES, _LOW_MEMORY_SHARE * total)
        # A server that fills the device itself, as it was told to, has nobody to wait for: others
        # count where there would be room without them. Unless known otherwise all is theirs.
        others = sample.memory_others_bytes
        is_theirs = others is None or free + others > low * _MEMORY_RELEASE
        if is_theirs and over("memory taken by others", -free, -low, -low * _MEMORY_RELEASE):
            reasons["memory taken by others"] = 0.25 if free < low / 4 else 0.5
    full = sample.pressure.get("memory full")
    if over("memory pressure", full, _MEMORY_PRESSURE, _MEMORY_PRESSURE * _RELEASE):
        reasons["memory pressure"] = 0.5
    quota = sample.cpu_quota_throttled
    if over("CPU quota used up", quota, _QUOTA_THROTTLED, _QUOTA_THROTTLED * _RELEASE):
        reasons["CPU quota used up"] = 0.75
    if sample.temperature_c is not None and sample.temperature_limit_c is not None:
        over_limit_c = sample.temperature_c - sample.temperature_limit_c
        if over("temperature near its limit", over_limit_c, -_HOT_MARGIN_C, -_HOT_RELEASE_C):
            reasons["temperature near its limit"] = 0.75
    throttled = [name for name in sample.throttle_reasons if name in _THROTTLED]
    if throttled:
        reasons[f"clocks throttled: {', '.join(throttled)}"] = _clock_factor(sample)
    return reasons


def _clock_factor(sample: DeviceSample) -> float:
    """Share of the full clock in quarters, rounded down; a half where it is not known."""
    if not sample.clock_mhz or not sample.max_clock_mhz:
        return 0.5
    return min(0.75, max(0.25, int(4 * sample.clock_mhz / sample.max_clock_mhz) / 4))
