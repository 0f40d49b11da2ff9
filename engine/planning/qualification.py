"""Which techniques a model and this machine qualify for, each with its evidence.

Judged from the files' headers and the device alone, so that it can be asked before anything is
loaded. `GET /v1/optimizations` and `tools.preview` show it.
"""

from collections import Counter
from typing import Any, Literal, get_args

import fulcrum_core
import msgspec

from engine.checkpoint.tensor import CheckpointError
from engine.config import EngineConfig, KvDtype, Quantization
from engine.ledger import kv_token_bytes, mib, plan_deployment, planned_weights_bytes
from engine.loader import ModelHeaders
from engine.machine import physical_cores
from engine.planning.draft_candidates import find_candidate
from engine.speculation.load import choose_head

# Drafters that this build holds, by technique; the others are judged but cannot be chosen.
BUILT_DRAFTERS = frozenset(("ngram", "mtp", "draft"))
_LEVEL_MEANING: dict[Quantization, str] = {
    "auto": "each matrix at about its own size in the file",
    "none": "bf16",
    "fp8": "8-bit floats (e4m3), a scale a channel",
    "int8": "8 bits, a scale for 32 weights",
    "int8-channel": "8 bits, a scale a channel",
    "int4": "4 bits, a scale and a minimum for 32 weights",
    "int4-g64": "4 bits, a scale and a minimum for 64 weights",
    "int4-g128": "4 bits, a scale and a minimum for 128 weights",
    "int4-sym": "4 bits, a scale for 32 weights",
    "int4-sym-g64": "4 bits, a scale for 64 weights",
    "int4-sym-g128": "4 bits, a scale for 128 weights",
}
_MTP_MARKS = (".mtp.", "mtp.", "nextn", ".eh_proj", "multi_token")


class Technique(msgspec.Struct, frozen=True, kw_only=True):
    """One technique on this model and machine."""

    name: str
    kind: Literal["weights", "kv", "speculation", "cache", "hardware"]
    qualified: bool
    enabled: bool
    evidence: str
    needs: str | None = None  # what would make it qualify
    gained: str | None = None  # so far, measured
    setting: dict[str, Any] | None = None  # the proposal that turns it on


def qualify(headers: ModelHeaders, config: EngineConfig, kv_dtype: KvDtype) -> list[Technique]:
    """Judge every technique. `config` and `kv_dtype` say what is enabled today."""
    return [
        *_weight_levels(headers, config),
        *_kv_dtypes(headers, kv_dtype),
        *_speculation(headers, config),
        Technique(
            name="prefix cache",
            kind="cache",
            qualified=True,
            enabled=True,
            evidence="full KV blocks are found again by the digest of their text",
        ),
        *_hardware(headers),
    ]


def _weight_levels(headers: ModelHeaders, config: EngineConfig) -> list[Technique]:
    checkpoint = headers.checkpoint
    stored = Counter(tensor.block_type for tensor in checkpoint.tensors.values())
    types = ", ".join(f"{name} ({count})" for name, count in stored.most_common(4))
    rows = []
    for level, meaning in _LEVEL_MEANING.items():
        changed = msgspec.structs.replace(config, quantization=level)
        plan = plan_deployment(
            changed,
            checkpoint.spec,
            checkpoint.tensors,
            source=str(headers.resolved.path),
            isa=headers.isa,
            num_threads=headers.num_threads,
            available_bytes=1 << 60,
        )
        rows.append(
            Technique(
                name="weights bf16" if level == "none" else f"weights {level}",
                kind="weights",
                qualified=True,
                enabled=config.quantization == level,
                evidence=f"{meaning}; the file has {types}; {plan.weights.formats}, "
                f"{mib(plan.ledger.weights_bytes)}",
                setting={"quantization": level},
            )
        )
    return rows


def _kv_dtypes(headers: ModelHeaders, enabled: KvDtype) -> list[Technique]:
    notes = {"bf16": "lossless by default", "int8": "a scale per token and head"}
    return [
        Technique(
            name=f"KV {dtype}",
            kind="kv",
            qualified=True,
            enabled=dtype == enabled,
            evidence=f"{kv_token_bytes(headers.checkpoint.spec, dtype) / 1024:.1f} KiB a token; "
            f"{notes.get(dtype, dtype)}",
            setting={"kv_dtype": dtype},
        )
        for dtype in get_args(KvDtype)
    ]


def _speculation(headers: ModelHeaders, config: EngineConfig) -> list[Technique]:
    rows = []
    for name, (has_parts, evidence, needs) in {
        "ngram": (True, "needs nothing of the model: drafts come from the text itself", None),
        "mtp": _mtp(headers, config),
        "draft": _draft_model(headers),
    }.items():
        built = name in BUILT_DRAFTERS
        if has_parts and not built:
            needs = "a build with this drafter"
        rows.append(
            Technique(
                name=f"speculation {name}",
                kind="speculation",
                qualified=has_parts and built,
                enabled=has_parts
                and built
                and config.speculation in ("auto", name)
                and (name != "draft" or headers.draft is not None),
                evidence=evidence if built else f"{evidence}; this build has no such drafter",
                needs=needs,
                setting={"speculation": name} if has_parts and built and not needs else None,
            )
        )
    return rows


def _mtp(headers: ModelHeaders, config: EngineConfig) -> tuple[bool, str, str | None]:
    checkpoint = headers.checkpoint
    wanted = msgspec.structs.replace(config, speculation="auto")
    try:
        found = choose_head(wanted, checkpoint.spec, checkpoint.tensors)
    except CheckpointError as error:  # the checkpoint's own module is not whole
        return False, str(error), "a head trained for this model"
    if found is not None:
        per_step = found.tokens_per_step
        gain = "" if per_step is None else f": {per_step:.2f} tokens per step when trained"
        return True, found.origin + gain, None
    names = [n for n in headers.checkpoint.tensors if any(mark in n for mark in _MTP_MARKS)]
    if names:
        evidence = f"the checkpoint's own module ({names[0]}) is of a kind that is not read"
        return False, evidence, "a head trained for this model"
    evidence = "the files hold no multi-token prediction module, and no head was trained for it"
    return False, evidence, "a head trained for this model"


def _draft_model(headers: ModelHeaders) -> tuple[bool, str, str | None]:
    """The drafting model that was given, or one that might be, among those in the cache folder."""
    path = headers.resolved.path
    if headers.draft is not None:
        weights = headers.draft.weights
        evidence = f"{headers.draft.name} has the same vocabulary; {weights.formats}"
        return True, f"{evidence}, {mib(planned_weights_bytes(weights, headers.isa))}", None
    found, evidence = find_candidate(path)
    return (
        found,
        evidence,
        "--draft-model, a model of at most half the size with the same vocabulary",
    )


def _hardware(headers: ModelHeaders) -> list[Technique]:
    best = fulcrum_core.detect_isa()
    cores = physical_cores()
    rows = [
        Technique(
            name=f"threads {headers.num_threads}",
            kind="hardware",
            qualified=headers.num_threads <= cores,
            enabled=True,
            evidence=f"{cores} physical cores are left to this process",
            needs=None if headers.num_threads <= cores else f"--threads {cores}",
        )
    ]
    order = fulcrum_core.isas()
    for isa in order:
        has_it = order.index(isa) <= order.index(best)
        rows.append(
            Technique(
                name=f"ISA {isa}",
                kind="hardware",
                qualified=has_it,
                enabled=isa == headers.isa,
                evidence="detected" if has_it else f"this processor offers {best} at most",
                needs=None if has_it else f"a processor with {isa}",
            )
        )
    return rows
