"""A plan's memory against what the machine has: what is short, what would free it, and how many
sequences fit. The preview puts it together.
"""

import math
from typing import Any, Literal, Protocol

import fulcrum_core
import msgspec
from msgspec.structs import replace

from engine.config import EngineConfig
from engine.ledger import DeploymentPlan, kv_token_bytes, mib
from engine.loader import ModelHeaders


class Plans(Protocol):
    """What is asked of the planner."""

    headers: ModelHeaders

    def plan(self, config: EngineConfig) -> DeploymentPlan: ...


class Remedy(msgspec.Struct, frozen=True):
    """A change that frees memory."""

    setting: dict[str, Any]
    frees_bytes: int
    text: str


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """The ledger against what the machine has."""

    components: dict[str, int]  # bytes by name
    total_bytes: int
    available_bytes: int  # with what the running model would give back
    fits: bool
    short_bytes: int
    remedies: list[Remedy]


class Routes(msgspec.Struct, frozen=True):
    """How many sequences of a length fit at once."""

    sequence_tokens: int
    count: int
    limited_by: Literal["kv", "max_sequences"]


def look_at_memory(
    planner: Plans, config: EngineConfig, plan: DeploymentPlan, available_bytes: int
) -> Memory:
    """Hold the plan's ledger against what there is."""
    ledger = plan.ledger
    short = max(0, ledger.total_bytes - available_bytes)
    return Memory(
        components=ledger.components(),
        total_bytes=ledger.total_bytes,
        available_bytes=available_bytes,
        fits=short == 0,
        short_bytes=short,
        remedies=_remedies(planner, config, plan) if short else [],
    )


def _remedies(planner: Plans, config: EngineConfig, plan: DeploymentPlan) -> list[Remedy]:
    """Changes that would free memory, the one that frees most first."""
    spec, ledger, context = planner.headers.checkpoint.spec, plan.ledger, plan.context
    found: list[Remedy] = []
    for quantization in ("int8", "int4"):
        smaller = planner.plan(replace(config, quantization=quantization)).ledger
        found.append(
            _remedy(
                {"quantization": quantization},
                ledger.weights_bytes - smaller.weights_bytes,
                f"weights in {quantization}",
            )
        )
    if context.kv_dtype == "bf16":
        share = kv_token_bytes(spec, "int8") / kv_token_bytes(spec, "bf16")
        kv_bytes = math.ceil(ledger.kv_bytes * share)
        found.append(
            _remedy(
                {"kv_dtype": "int8", "kv_memory": kv_bytes},
                ledger.kv_bytes - kv_bytes,
                "KV int8 for as many tokens",
            )
        )
    if ledger.draft_bytes:
        found.append(_remedy({"speculation": "off"}, ledger.draft_bytes, "no drafting model"))
    for length in (32768, 8192, 4096, 2048):
        if length < context.max_model_len:
            blocks = -(-length // fulcrum_core.BLOCK_SIZE)
            old_blocks = -(-context.max_model_len // fulcrum_core.BLOCK_SIZE)
            kv_bytes = max(blocks, context.num_kv_blocks * blocks // old_blocks)
            kv_bytes *= ledger.kv_bytes // context.num_kv_blocks
            found.append(
                _remedy(
                    {"max_model_len": length, "kv_memory": kv_bytes},
                    ledger.kv_bytes - kv_bytes,
                    f"context of {length} tokens for as many sequences",
                )
            )
    found = [remedy for remedy in found if remedy.frees_bytes > 0]
    return sorted(found, key=lambda remedy: -remedy.frees_bytes)


def shortage_text(memory: Memory) -> str:
    """One line: how much is short and what would free it."""
    ways = ", ".join(remedy.text for remedy in memory.remedies) or "nothing frees that much here"
    return (
        f"needs {mib(memory.total_bytes)}, {mib(memory.short_bytes)} more than the "
        f"{mib(memory.available_bytes)} there are: {ways}"
    )


def _remedy(setting: dict[str, Any], frees_bytes: int, what: str) -> Remedy:
    return Remedy(setting, frees_bytes, f"{what} frees {mib(frees_bytes)}")


def routes(config: EngineConfig, plan: DeploymentPlan, sequence_tokens: int) -> Routes:
    """How many sequences of this length run at once."""
    blocks = max(1, -(-sequence_tokens // fulcrum_core.BLOCK_SIZE))
    by_memory = plan.context.num_kv_blocks // blocks
    if sequence_tokens > plan.context.max_model_len:
        return Routes(sequence_tokens, 0, "kv")
    if by_memory < config.max_sequences:
        return Routes(sequence_tokens, by_memory, "kv")
    return Routes(sequence_tokens, config.max_sequences, "max_sequences")
