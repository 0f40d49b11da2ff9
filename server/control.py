"""The control plane's endpoints: what qualifies, what a setting would do, and applying it.

The work is done by the engine's planner and applier, on threads; the event loop only waits for
them. `set_up` adds the routes to an app that has an optimizer.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from aiohttp import web
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.config import ConfigError
from engine.deployment import Deployment
from engine.loader import read_headers
from engine.planning.applier import Applier, SwitchableEngine
from engine.planning.apply_types import ApplyBusy, ApplyRequest
from engine.planning.gains import Gains
from engine.planning.observer import Observer
from engine.planning.preview import Planner
from engine.planning.proposal import SETTINGS as SETTING_NAMES
from engine.planning.proposal import Proposal, settings_of
from engine.planning.qualification import qualify
from engine.planning.quality import QualityMeasurer
from engine.planning.receipts import ReceiptLog
from engine.types import EngineLoad
from server import protocol
from server.admin import check_admin
from server.errors import ApiError
from server.http import CLIENT, METRICS, MODEL, json_response, read_body

T = TypeVar("T")

_PREVIEW = msgspec.json.Decoder(Proposal)
_APPLY = msgspec.json.Decoder(ApplyRequest)
_STOP_WAIT_S = 10.0


class Optimizer:
    """The planner and the applier of the model that is served, made when first asked for."""

    def __init__(
        self,
        deployment: Deployment,
        receipts: Path,
        *,
        measurer: QualityMeasurer | None = None,
        build: Callable[..., Deployment] | None = None,
    ) -> None:
        self.observer = Observer()
        # Until the applier has it: a reference left here would keep the memory of a replaced core.
        self._first: Deployment | None = deployment
        self._receipts = ReceiptLog(receipts)
        self._measurer = measurer
        self._build = {} if build is None else {"build": build}
        self._engine: SwitchableEngine | None = None
        self._on_change: Callable[[Deployment, int], None] = lambda deployment, length: None
        self._lock = threading.Lock()
        self._applier: Applier | None = None

    @property
    def deployment(self) -> Deployment:
        """What serves now."""
        with self._lock:
            if self._first is not None:
                return self._first
        return self.applier().deployment

    def attach(self, engine: SwitchableEngine) -> None:
        """Give it the engine of the first deployment, before anything else is asked."""
        self._engine = engine

    def on_change(self, callback: Callable[[Deployment, int], None]) -> None:
        self._on_change = callback

    def applier(self) -> Applier:
        """Reads the model's headers once; call in a thread."""
        with self._lock:
            if self._applier is None:
                assert self._engine is not None, "attach was not called"
                assert self._first is not None
                planner = Planner(read_headers(self._first.config))
                self._applier = Applier(
                    planner,
                    self._first,
                    self._receipts,
                    observer=self.observer,
                    on_change=self._on_change,
                    measurer=self._measurer,
                    **self._build,
                )
                self._applier.attach(self._engine)
                self._first = None
            return self._applier

    def stop(self) -> None:
        """Wait for an apply, and end what runs in the background; call in a thread."""
        if self._applier is not None:
            self._applier.wait(_STOP_WAIT_S)
            self._applier.stop()


OPTIMIZER = web.AppKey("OPTIMIZER", Optimizer)


def set_up(app: web.Application, optimizer: Optimizer) -> None:
    """Add the endpoints, the memory metrics, and the way back from an apply to the app."""
    app[OPTIMIZER] = optimizer
    app[METRICS].registry.register(_MemoryCollector(optimizer, app[MODEL].name))
    app.cleanup_ctx.append(_follow_changes)
    app.add_routes(
        [
            web.get("/v1/optimizations", optimizations),
            web.post("/v1/optimizations/preview", preview),
            web.post("/v1/optimizations/apply", apply),
            web.get("/v1/optimizations/apply/{id}", apply_status),
        ]
    )


async def optimizations(request: web.Request) -> web.Response:
    """Techniques with evidence and gains, today's setting and memory, levels and receipts."""
    optimizer = request.app[OPTIMIZER]
    load = request.app[CLIENT].load
    return json_response(await asyncio.to_thread(_overview, optimizer, load))


async def preview(request: web.Request) -> web.Response:
    """What a proposal would do, beside what today's setting does."""
    check_admin(request)
    proposal = protocol.decode(_PREVIEW, await read_body(request))
    optimizer, client = request.app[OPTIMIZER], request.app[CLIENT]
    # A micro-benchmark would slow down those who are served, and they would spoil its result.
    measure = client.load.num_running == 0

    def look() -> dict[str, Any]:
        applier = optimizer.applier()
        load_only = Proposal(
            concurrency=proposal.concurrency,
            prompt_tokens=proposal.prompt_tokens,
            output_tokens=proposal.output_tokens,
        )
        return {
            "today": applier.preview(load_only, measure=measure),
            "proposed": applier.preview(proposal, measure=measure),
        }

    return json_response(await _in_thread(look))


async def apply(request: web.Request) -> web.Response:
    """Begin to apply a proposal; 409 while another one is applied."""
    check_admin(request)
    body = protocol.decode(_APPLY, await read_body(request))
    optimizer = request.app[OPTIMIZER]
    measure = request.app[CLIENT].load.num_running == 0
    try:
        status = await _in_thread(lambda: optimizer.applier().start(body, measure=measure))
    except ApplyBusy as error:
        raise ApiError(409, f"{error}.", code="apply_under_way") from None
    return json_response(status, 202)


async def apply_status(request: web.Request) -> web.Response:
    """How far an apply is, and its receipt at the end."""
    optimizer, apply_id = request.app[OPTIMIZER], request.match_info["id"]
    status = await asyncio.to_thread(lambda: optimizer.applier().status(apply_id))
    if status is None:
        raise ApiError(404, f"There is no apply '{apply_id:.40}'.", code="unknown_apply")
    return json_response(status)


async def _in_thread(function: Callable[[], T]) -> T:
    """Run what may raise a ConfigError, which is the request's mistake."""
    try:
        return await asyncio.to_thread(function)
    except ConfigError as error:
        message = str(error).removeprefix("--")
        name = message.split(" ")[0].split(":")[0].replace("-", "_")
        param = name if name in SETTING_NAMES else None
        raise ApiError(400, message, param=param, code="invalid_setting") from None


def _overview(optimizer: Optimizer, load: EngineLoad) -> dict[str, Any]:
    applier = optimizer.applier()
    deployment = applier.deployment
    config, loaded = deployment.config, deployment.loaded
    latest = applier.latest()
    gains = Gains(load, applier.speculation_report(), applier.receipts.latest())
    return {
        "model": loaded.name,
        "today": {
            "setting": settings_of(config),
            "formats": loaded.formats,
            "isa": loaded.isa,
            "threads": loaded.num_threads,
            "memory": deployment.measured().components(),
        },
        "techniques": [
            msgspec.structs.replace(row, gained=gains.of(row, settings_of(config)))
            for row in qualify(applier.planner.headers, config, loaded.kv_dtype)
        ],
        "levels": applier.planner.levels(config),
        "max_position": loaded.spec.max_position,
        "available_bytes": applier.available_bytes(),
        "apply": latest,
        "receipts": applier.latest_receipts(),
    }


async def _follow_changes(app: web.Application) -> AsyncIterator[None]:
    """Let requests ask for what the deployment of the moment can do."""
    loop = asyncio.get_running_loop()
    optimizer = app[OPTIMIZER]

    def adopt(deployment: Deployment, max_model_len: int) -> None:
        model, client = app[MODEL], app[CLIENT]
        gate, loaded = client.gate, deployment.loaded
        if loaded.core is not None:
            client.parked_since_s = None
        elif client.parked_since_s is None:
            client.parked_since_s = time.monotonic()
        model.max_model_len = max_model_len
        model.fingerprint = loaded.fingerprint
        model.drafters = loaded.speculation.drafters
        model.num_kv_blocks = loaded.num_kv_blocks
        gate.limits = msgspec.structs.replace(
            gate.limits,
            max_sequences=deployment.config.max_sequences,
            max_step_tokens=deployment.config.max_step_tokens,
            num_blocks=loaded.num_kv_blocks,
        )

    def on_change(deployment: Deployment, max_model_len: int) -> None:
        loop.call_soon_threadsafe(adopt, deployment, max_model_len)

    optimizer.on_change(on_change)
    yield
    await asyncio.to_thread(optimizer.stop)


class _MemoryCollector(Collector):
    """The ledger as metrics: what was planned, and what is allocated."""

    def __init__(self, optimizer: Optimizer, model_name: str) -> None:
        self._optimizer = optimizer
        self._model_name = model_name

    def collect(self) -> Iterable[Metric]:
        deployment = self._optimizer.deployment
        if deployment.loaded.core is None:
            return  # between two cores that memory did not hold at once
        for name, help_text, ledger in (
            (
                "memory_planned_bytes",
                "Memory by the ledger, by component.",
                deployment.loaded.ledger,
            ),
            ("memory_bytes", "Memory allocated, by component.", deployment.measured()),
        ):
            gauge = GaugeMetricFamily(
                f"fulcrum_{name}", help_text, labels=["model_name", "component"]
            )
            for component, num_bytes in ledger.components().items():
                gauge.add_metric([self._model_name, component], num_bytes)
            yield gauge
