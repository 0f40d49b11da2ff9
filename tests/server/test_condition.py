"""The device's condition: what makes it worse, and that it gets better only after a calm time."""

import itertools
import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.condition import CALM_S, FAULT_CALM_S, Condition, next_condition
from server.telemetry.samples import DeviceSample, Xid

GIB = 1 << 30
CALM = DeviceSample(
    kind="gpu",
    name="x",
    taken_at_s=0.0,
    memory_used_bytes=8 * GIB,
    memory_total_bytes=16 * GIB,
    clock_mhz=1000.0,
    max_clock_mhz=2000.0,
    temperature_c=60.0,
    temperature_limit_c=90.0,
    num_ecc_uncorrected=0,
)
OK = Condition(num_ecc_uncorrected=0)


def sample(**changes: object) -> DeviceSample:
    return msgspec.structs.replace(CALM, **changes)


@pytest.mark.parametrize(
    ("changes", "status", "factor", "reason"),
    [
        ({}, "ok", 1.0, None),
        ({"throttle_reasons": ("power cap",)}, "ok", 1.0, None),
        ({"throttle_reasons": ("hardware slowdown",)}, "derated", 0.5, "hardware slowdown"),
        ({"memory_used_bytes": 16 * GIB - 10}, "derated", 0.25, "memory taken"),
        ({"memory_used_bytes": 16 * GIB - (200 << 20)}, "derated", 0.5, "memory taken"),
        (
            {"memory_used_bytes": 16 * GIB - 10, "memory_others_bytes": 300 << 20},
            "ok",  # it fills the device itself
            1.0,
            None,
        ),
        (
            {"memory_used_bytes": 16 * GIB - 10, "memory_others_bytes": 400 << 20},
            "derated",
            0.25,
            "memory taken",
        ),
        ({"temperature_c": 89.0}, "derated", 0.75, "temperature"),
        ({"pressure": {"memory full": 0.5}}, "derated", 0.5, "memory pressure"),
        ({"pressure": {"cpu some": 1.0}}, "ok", 1.0, None),
        ({"cpu_quota_throttled": 0.9}, "derated", 0.75, "CPU quota"),
        ({"fault": "lost"}, "draining", 0.0, "device lost"),
        ({"xids": (Xid(79, 1.0),)}, "draining", 0.0, "XID 79"),
        ({"xids": (Xid(13, 1.0),)}, "ok", 1.0, None),
        ({"num_ecc_uncorrected": 1}, "draining", 0.0, "uncorrectable"),
        ({"num_ecc_corrected": 1}, "ok", 1.0, None),
    ],
)
def test_each_reading_has_its_consequence(
    changes: dict[str, object], status: str, factor: float, reason: str | None
) -> None:
    seen = next_condition(OK, sample(**changes), 10.0)
    assert (seen.status, seen.factor) == (status, factor)
    assert any(reason in one for one in seen.reasons) if reason else not seen.reasons


@pytest.mark.parametrize(
    ("bad", "calm_s"),
    [
        (sample(throttle_reasons=("power brake",)), CALM_S),
        (sample(fault="lost"), FAULT_CALM_S),
        (sample(xids=(Xid(79, 1.0),)), FAULT_CALM_S),
    ],
)
@pytest.mark.parametrize("after", [CALM, None])
def test_it_recovers_by_itself_after_a_calm_time(
    bad: DeviceSample, calm_s: float, after: DeviceSample | None
) -> None:
    condition = next_condition(OK, bad, 10.0)
    if after is not None:
        after = msgspec.structs.replace(after, xids=bad.xids)  # the old XID is still listed
    now_s = 10.5
    first = next_condition(condition, after, now_s)
    assert first.status == condition.status
    assert first.reasons == condition.reasons
    assert first.recovers_at_s == pytest.approx(now_s + calm_s)
    almost = next_condition(first, after, now_s + calm_s - 0.1)
    assert almost.status == condition.status
    done = next_condition(almost, after, now_s + calm_s)
    assert (done.status, done.factor, done.reasons) == ("ok", 1.0, ())


def test_missing_samples_change_nothing_of_a_good_condition() -> None:
    assert next_condition(OK, None, 10.0) == OK


def test_a_threshold_has_two_sides() -> None:
    low = next_condition(OK, sample(memory_used_bytes=16 * GIB - (250 << 20)), 1.0)
    assert low.status == "derated"
    between = sample(memory_used_bytes=16 * GIB - (300 << 20))
    assert next_condition(OK, between, 2.0).status == "ok"
    for second in range(2, 100):
        low = next_condition(low, between, float(second))
    assert low.status == "derated"


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    center=st.integers(0, 600),
    noise=st.integers(0, 300),
    heat=st.integers(70, 95),
)
def test_noise_around_thresholds_does_not_make_it_flap(
    seed: int, center: int, noise: int, heat: int
) -> None:
    draw = random.Random(seed)
    condition, history = OK, []
    for tick in range(1200):  # 10 minutes
        free = max(0, center + draw.randint(-noise, noise)) << 20
        reading = sample(
            memory_used_bytes=16 * GIB - free,
            temperature_c=heat + draw.gauss(0, 4),
            throttle_reasons=("hardware slowdown",) if draw.random() < 0.01 else (),
        )
        condition = next_condition(condition, reading, tick / 2)
        history.append((tick / 2, condition.factor))
    rises = [
        later_s for (_, before), (later_s, after) in itertools.pairwise(history) if after > before
    ]
    falls = [
        later_s for (_, before), (later_s, after) in itertools.pairwise(history) if after < before
    ]
    # Between getting worse and getting better lies a calm time, so that it changes rarely.
    for rise_s in rises:
        assert all(not rise_s - CALM_S < fall_s < rise_s for fall_s in falls)
    assert len(rises) <= 600 / CALM_S
