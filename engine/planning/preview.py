"""What a proposed setting would do: memory by component, speed, routes, quality, and what is short.

The server and `tools.preview` make one `Planner` for a model's headers; nothing here loads
weights.
"""

import hashlib
import threading
from typing import Any

import fulcrum_core
import msgspec
from msgspec.structs import replace

from engine.config import EngineConfig
from engine.ledger import DeploymentPlan, Ledger, planned_weights_bytes
from engine.loader import ModelHeaders, plan_headers
from engine.models.mtp import module_weights_bytes
from engine.planning.calibration import (
    Calibration,
    calibrate,
    calibration_key,
    known_calibration,
)
from engine.planning.cost_model import CostModel, Speed
from engine.planning.drafting import (
    NOTHING,
    UNKNOWN_MODEL,
    UNMEASURED_NGRAM,
    Drafting,
    MeasuredDrafts,
    ModelDrafts,
    Survivals,
    alike,
)
from engine.planning.memory import Memory, Routes, look_at_memory, routes
from engine.planning.pace import Pace
from engine.planning.proposal import Proposal, settings_of
from engine.planning.quality import Quality, QualityKey, quality_of, text_digest
from engine.speculation.load import choose_head

_ANY_BYTES = 1 << 60  # plans without regard to what the machine has
_LEVELS = (("FP16", "none"), ("INT8", "int8"), ("INT4", "int4"))  # FP16: two bytes, as bf16
_SAMPLE_BYTES = 64  # of each tensor, for the model's digest


class Preview(msgspec.Struct, frozen=True, kw_only=True):
    """One setting and what it would do."""

    setting: dict[str, Any]
    formats: str
    kv_tokens: int
    memory: Memory
    routes: Routes
    speed: Speed | None
    speed_basis: str
    quality: Quality


class Level(msgspec.Struct, frozen=True):
    """A row of the memory table."""

    name: str
    quantization: str
    memory: dict[str, int]
    total_bytes: int
    formats: str


class Planner:
    """Plans of one model on this machine; any thread may ask."""

    def __init__(self, headers: ModelHeaders) -> None:
        self.headers = headers
        self._digest = _model_digest(headers)
        self._calibrating = threading.Lock()  # two at once would time each other
        # What serving has shown of the drafters so far; whoever serves renews it.
        self.measured_drafts = MeasuredDrafts()

    def plan(self, config: EngineConfig) -> DeploymentPlan:
        """Raises ConfigError where a value cannot work; memory has no say here."""
        return plan_headers(config, self.headers, _ANY_BYTES)

    def levels(self, config: EngineConfig) -> list[Level]:
        """FP16, INT8 and INT4 side by side with the other settings of `config`."""
        rows = []
        for name, quantization in _LEVELS:
            plan = self.plan(replace(config, quantization=quantization))
            ledger = plan.ledger
            rows.append(
                Level(
                    name,
                    quantization,
                    ledger.components(),
                    ledger.total_bytes,
                    plan.weights.formats,
                )
            )
        return rows

    def calibration(self, plan: DeploymentPlan, *, measure: bool) -> Calibration | None:
        """Steps of this plan on this machine: kept ones, else measured in about 5 s if asked."""
        headers = self.headers
        spec = headers.checkpoint.spec
        key = calibration_key(spec, plan, headers.isa, headers.num_threads)
        known = known_calibration(key)
        if known is not None or not measure:
            return known
        with self._calibrating:
            return known_calibration(key) or calibrate(spec, plan, headers.isa, headers.num_threads)

    def cost_model(
        self,
        config: EngineConfig,
        plan: DeploymentPlan,
        *,
        measure: bool,
        pace: Pace | None = None,
    ) -> CostModel | None:
        """Speeds of this plan with the drafters of `config`; None where it was not calibrated.

        What was calibrated before the steps of `pace` is put at that pace.
        """
        calibration = self.calibration(plan, measure=measure)
        if calibration is None:
            return None
        if pace is not None and calibration.at_s < pace.since_s:
            calibration = calibration.at_pace(pace.ratio)
        return CostModel(calibration, self._drafting(config, plan))

    def _drafting(self, config: EngineConfig, plan: DeploymentPlan) -> Drafting | None:
        """What is known of the drafters that `config` turns on; None where there are none."""
        known, headers = self.measured_drafts, self.headers
        checkpoint = headers.checkpoint
        target_bytes = plan.ledger.weights_bytes
        # Of a run that was never timed: as much of a step's time as of the weights that it reads.
        models: list[ModelDrafts] = []
        head = choose_head(config, checkpoint.spec, checkpoint.tensors)
        if head is not None:
            shipped = UNKNOWN_MODEL
            if head.acceptance_by_position:
                shipped = alike(tuple(head.acceptance_by_position), "estimated")
            share = module_weights_bytes(head, checkpoint.spec, headers.isa) / target_bytes
            models.append(_model_drafts("mtp", known, shipped, share))
        if headers.draft is not None and config.drafts_with_model:
            share = planned_weights_bytes(headers.draft.weights, headers.isa) / target_bytes
            models.append(_model_drafts("draft", known, UNKNOWN_MODEL, share))
        has_lookup = config.speculation in ("auto", "ngram")
        if not has_lookup and not models:
            return None
        return Drafting(
            free=(known.free or UNMEASURED_NGRAM) if has_lookup else NOTHING,
            models=tuple(models),
            deciding_s=known.deciding_s,
        )

    def quality_key(self, plan: DeploymentPlan) -> QualityKey:
        """Name what the quality of this plan depends on."""
        return QualityKey(self._digest, _formats_digest(plan), plan.context.kv_dtype)

    def quality(self, config: EngineConfig, plan: DeploymentPlan) -> Quality:
        """Measured, estimated or unknown."""
        reference = self.plan(replace(config, quantization="none"))
        return quality_of(self.quality_key(plan), _formats_digest(reference))

    def preview(
        self,
        today: EngineConfig,
        proposal: Proposal,
        *,
        available_bytes: int,
        measure: bool = True,
        pace: Pace | None = None,
    ) -> Preview:
        """What `proposal` would do; raises ConfigError where a value cannot work."""
        config = proposal.changed(today)
        plan = self.plan(config)
        model = self.cost_model(config, plan, measure=measure, pace=pace)
        speed = None
        basis = "not calibrated"
        if model is not None:
            calibration = model.calibration
            speed = model.speed(
                min(proposal.concurrency, config.max_sequences),
                proposal.prompt_tokens,
                proposal.output_tokens,
            )
            basis = (
                f"micro-benchmarks of {calibration.seconds:.1f} s on this machine "
                f"(load average {calibration.load_average:.1f})"
            )
            if pace is not None and calibration.at_s < pace.since_s:
                basis += f", times {pace.ratio:.2f} as {pace.num_steps} steps of late took"
            if speed.speculation != "off":
                basis += f", acceptance of drafts {speed.speculation}"
        setting = settings_of(config)
        return Preview(
            setting=setting,
            formats=plan.weights.formats,
            kv_tokens=plan.context.num_kv_blocks * fulcrum_core.BLOCK_SIZE,
            memory=look_at_memory(self, config, plan, available_bytes),
            routes=routes(config, plan, proposal.prompt_tokens + proposal.output_tokens),
            speed=speed,
            speed_basis=basis,
            quality=self.quality(config, plan),
        )


def pinned(config: EngineConfig, ledger: Ledger, plan: DeploymentPlan) -> EngineConfig:
    """`config` with what was decided at load written out: today's values for a proposal."""
    return replace(
        config,
        kv_dtype=plan.context.kv_dtype,
        kv_memory_bytes=ledger.kv_bytes,
        max_model_len=plan.context.max_model_len,
    )


def _model_drafts(
    name: str, known: MeasuredDrafts, shipped: Survivals, run_share: float
) -> ModelDrafts:
    return ModelDrafts(known.models.get(name, shipped), known.run_share.get(name, run_share))


def _model_digest(headers: ModelHeaders) -> str:
    """Identify the weights by their headers and a few bytes of each tensor."""
    digest = hashlib.sha256(text_digest().encode())
    for name, tensor in sorted(headers.checkpoint.tensors.items()):
        digest.update(msgspec.json.encode((name, tensor.shape, tensor.block_type)))
        middle = len(tensor.data) // 2
        digest.update(tensor.data[middle : middle + _SAMPLE_BYTES].tobytes())
    return digest.hexdigest()[:16]


def _formats_digest(plan: DeploymentPlan) -> str:
    formats = [(i.slot.slot, i.slot.layer, i.format) for i in plan.weights.tensors]
    return hashlib.sha256(msgspec.json.encode(formats)).hexdigest()[:12]
