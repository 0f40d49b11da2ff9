"""What `/health` and `/v1/telemetry` show: sensed, concluded, decided. Times are ages."""

import time
from typing import Any

import msgspec

from engine.types import EngineLoad
from server.condition import Status
from server.cost_model import Costs
from server.engine_client import EngineClient
from server.gate import Decision
from server.telemetry.poller import Poller
from server.telemetry.samples import DeviceKind, DeviceSample


class Sensors(msgspec.Struct, frozen=True):
    source: str  # whose sensors decide on admission
    unavailable: dict[str, str]  # sensor to why it says nothing


class Health(msgspec.Struct, frozen=True):
    status: str  # "ok", "degraded", "draining", "engine stale" or "engine dead"
    heartbeat_age_s: float
    reasons: list[str]
    telemetry: Sensors


class ConditionReport(msgspec.Struct, frozen=True):
    status: Status
    factor: float  # share of the limits that holds
    reasons: tuple[str, ...]
    recovers_in_s: float | None


class LimitsReport(msgspec.Struct, frozen=True):
    max_sequences: int
    max_queue: int
    max_ttft_s: float
    kv_blocks: int


class PromisesReport(msgspec.Struct, frozen=True):
    open: int
    kept_share: float


class TelemetryReport(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that admission knew and did of late."""

    source: str
    samples: dict[DeviceKind, dict[str, Any]]  # the fields of DeviceSample
    why_no_gpu: str | None
    num_samples: int
    cpu_s: float  # that telemetry has taken
    condition: ConditionReport
    health: Health
    load: EngineLoad
    limits: LimitsReport
    costs: Costs
    promises: PromisesReport
    decisions: list[Decision]  # newest first


def health(client: EngineClient, poller: Poller) -> Health:
    now_s = time.monotonic()
    condition = client.gate.condition
    reasons = list(condition.reasons)
    if poller.is_blind(now_s):
        reasons.append("no telemetry: admission by the engine's load alone")
    if client.parked_since_s is not None:
        reasons.append("a setting is being applied: requests wait for its core")
    status: str = client.engine_state()
    if status == "ok" and (client.draining or condition.status == "draining"):
        status = "draining"
    elif status == "ok" and reasons:
        status = "degraded"
    return Health(
        status,
        round(client.heartbeat_age_s, 3),
        ["shutting down", *reasons] if client.draining else reasons,
        Sensors(poller.source, poller.unavailable(now_s)),
    )


def report(client: EngineClient, poller: Poller) -> TelemetryReport:
    now_s = time.monotonic()
    gate, readings = client.gate, poller.latest
    condition, limits = gate.condition, gate.limits
    recovers_at_s = condition.recovers_at_s
    return TelemetryReport(
        source=poller.source,
        samples={
            sample.kind: _with_ages(sample, now_s)
            for sample in (readings.host, readings.gpu)
            if sample is not None
        },
        why_no_gpu=readings.why_no_gpu,
        num_samples=readings.num_samples,
        cpu_s=round(readings.cpu_s, 6),
        condition=ConditionReport(
            condition.status,
            condition.factor,
            condition.reasons,
            None if recovers_at_s is None else round(recovers_at_s - now_s, 3),
        ),
        health=health(client, poller),
        load=client.load,
        limits=LimitsReport(
            limits.max_sequences, limits.max_queue, limits.max_ttft_s, limits.num_blocks
        ),
        costs=gate.costs.costs,
        promises=PromisesReport(gate.num_promised, round(gate.kept_share, 3)),
        decisions=gate.decisions(),
    )


def _with_ages(sample: DeviceSample, now_s: float) -> dict[str, Any]:
    fields = {name: getattr(sample, name) for name in sample.__struct_fields__}
    fields["age_s"] = round(now_s - fields.pop("taken_at_s"), 3)
    fields["xids"] = [
        {"code": xid.code, "age_s": round(now_s - xid.seen_at_s, 3)} for xid in sample.xids
    ]
    return fields
