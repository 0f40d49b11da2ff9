"""What `/health` and `/v1/telemetry` show: sensed, concluded, decided."""

import time
from typing import Any

from server.engine_client import EngineClient
from server.telemetry.poller import Poller


def health(client: EngineClient, poller: Poller) -> dict[str, Any]:
    """`status` is "ok", "degraded", "draining", "engine stale" or "engine dead"."""
    now_s = time.monotonic()
    condition = client.gate.condition
    unavailable = poller.unavailable(now_s)
    reasons = list(condition.reasons)
    if poller.is_blind(now_s):
        reasons.append("no telemetry: admission by the engine's load alone")
    status: str = client.engine_state()
    if status == "ok" and (client.draining or condition.status == "draining"):
        status = "draining"
    elif status == "ok" and reasons:
        status = "degraded"
    return {
        "status": status,
        "heartbeat_age_s": round(client.heartbeat_age_s, 3),
        "reasons": ["shutting down", *reasons] if client.draining else reasons,
        "telemetry": {"source": poller.source, "unavailable": unavailable},
    }


def report(client: EngineClient, poller: Poller) -> dict[str, Any]:
    """Everything that admission knew and did of late; times are ages in seconds."""
    now_s = time.monotonic()
    gate, readings, costs = client.gate, poller.latest, client.gate.costs.costs
    condition = gate.condition
    recovers_at_s = condition.recovers_at_s
    samples: dict[str, Any] = {}
    for sample in (readings.host, readings.gpu):
        if sample is not None:
            fields = {name: getattr(sample, name) for name in sample.__struct_fields__}
            age_s = now_s - fields.pop("taken_at_s")
            xids = [
                {"code": xid.code, "age_s": round(now_s - xid.seen_at_s, 3)}
                for xid in fields.pop("xids")
            ]
            samples[sample.kind] = {"age_s": round(age_s, 3), **fields, "xids": xids}
    return {
        "source": poller.source,
        "samples": samples,
        "why_no_gpu": readings.why_no_gpu,
        "num_samples": readings.num_samples,
        "cpu_s": round(readings.cpu_s, 6),
        "condition": {
            "status": condition.status,
            "factor": condition.factor,
            "reasons": condition.reasons,
            "recovers_in_s": None if recovers_at_s is None else round(recovers_at_s - now_s, 3),
        },
        "health": health(client, poller),
        "load": client.load,
        "limits": {
            "max_sequences": gate.limits.max_sequences,
            "max_queue": gate.limits.max_queue,
            "max_ttft_s": gate.limits.max_ttft_s,
            "kv_blocks": gate.limits.num_blocks,
        },
        "costs": costs,
        "promises": {"open": gate.num_promised, "kept_share": round(gate.kept_share, 3)},
        "decisions": gate.decisions(),
    }
