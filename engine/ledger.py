"""What a deployment takes of the memory, by component, from the files' headers and the settings.

One ledger for all who ask: the loader refuses by it before it loads, the preview and apply decide
by it, the metrics and receipts compare it with what is allocated. It calls the functions that the
core allocates by, so prediction and allocation cannot drift apart.
"""

import os
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Row
from pathlib import Path

import fulcrum_core
import msgspec

from engine.checkpoint.tensor import StoredTensor
from engine.config import ConfigError, EngineConfig, KvDtype
from engine.context_plan import ContextPlan, plan_context, wanted_model_len
from engine.machine import available_memory_bytes
from engine.models.core_config import core_config
from engine.models.spec import ModelSpec
from engine.models.weights import WeightPlan, plan_weights

# The process without a model: interpreter, libraries, thread stacks, the server's own objects.
PROCESS_BYTES = 41 << 20
# The tokenizer's tables, for each entry of the vocabulary.
VOCABULARY_ENTRY_BYTES = 270
MIB = 1 << 20


class Ledger(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes by component."""

    weights_bytes: int
    kv_bytes: int
    activation_bytes: int  # the core's state of a step
    draft_bytes: int = 0  # a drafter's own weights and state
    runtime_bytes: int = 0  # process, libraries and tokenizer

    @property
    def total_bytes(self) -> int:
        return sum(self.components().values())

    def components(self) -> dict[str, int]:
        """Bytes by the component's name."""
        return {
            "weights": self.weights_bytes,
            "kv": self.kv_bytes,
            "activations": self.activation_bytes,
            "draft": self.draft_bytes,
            "runtime": self.runtime_bytes,
        }


class DrafterMemory(msgspec.Struct, frozen=True):
    """What a drafter will allocate, by what is decided of the context."""

    fixed_bytes: Callable[[int], int]  # by max_model_len: weights and the state of a step
    kv_block_bytes: Callable[[KvDtype], int]  # beside each block of the target's KV cache


class DeploymentPlan(msgspec.Struct, frozen=True):
    """All that is decided before the first weight is read."""

    weights: WeightPlan
    context: ContextPlan
    ledger: Ledger


def plan_deployment(
    config: EngineConfig,
    spec: ModelSpec,
    tensors: Mapping[str, StoredTensor],
    *,
    source: str,
    isa: str,
    num_threads: int,
    available_bytes: int | None = None,
    drafters: Row[DrafterMemory] = (),
) -> DeploymentPlan:
    """Plan weights, context and memory; raises ConfigError where a setting cannot work.

    `available_bytes` is what everything together may take; None: what the machine has left. What
    is given may be more than there is, to see what a setting would need.
    """
    weights = plan_weights(spec, tensors, config.quantization, source)
    weights_bytes = planned_weights_bytes(weights, isa)
    shape = core_config(spec)
    available = available_memory_bytes() if available_bytes is None else available_bytes
    wanted_len, _ = wanted_model_len(config, spec.max_position)

    def activation_bytes(max_model_len: int) -> int:
        max_tokens = config.max_step_tokens
        return step_bytes(shape, isa, num_threads, max_tokens, max_model_len=max_model_len)

    activations = activation_bytes(wanted_len)
    draft_fixed_bytes = sum(drafter.fixed_bytes(wanted_len) for drafter in drafters)
    left = available - weights_bytes - activations - draft_fixed_bytes
    if left <= 0:
        used = (weights_bytes, activations, draft_fixed_bytes)
        raise ConfigError(_short_of_memory(config, weights, *used, available))
    context = plan_context(
        config,
        spec.max_position,
        fulcrum_core.BLOCK_SIZE,
        lambda dtype: fulcrum_core.kv_block_bytes(shape, dtype),
        left,
        weights_bytes,
        lambda dtype: sum(drafter.kv_block_bytes(dtype) for drafter in drafters),
    )
    draft_bytes = sum(
        drafter.fixed_bytes(context.max_model_len)
        + context.num_kv_blocks * drafter.kv_block_bytes(context.kv_dtype)
        for drafter in drafters
    )
    ledger = Ledger(
        weights_bytes=weights_bytes,
        kv_bytes=context.num_kv_blocks * fulcrum_core.kv_block_bytes(shape, context.kv_dtype),
        activation_bytes=activation_bytes(context.max_model_len),
        draft_bytes=draft_bytes,
        runtime_bytes=PROCESS_BYTES + spec.vocab_size * VOCABULARY_ENTRY_BYTES,
    )
    return DeploymentPlan(weights, context, ledger)


def planned_weights_bytes(plan: WeightPlan, isa: str) -> int:
    """Bytes of the packed matrices and of the vectors in float32."""
    num_bytes = 0
    for item in plan.tensors:
        if item.format is None:
            num_bytes += item.tensor.num_values * 4
        else:
            num_bytes += fulcrum_core.packed_bytes(isa, item.format, *item.slot.shape)
    return num_bytes


def kv_token_bytes(spec: ModelSpec, dtype: KvDtype) -> float:
    """Bytes of one token's keys and values in all layers."""
    return fulcrum_core.kv_block_bytes(core_config(spec), dtype) / fulcrum_core.BLOCK_SIZE


def measured_ledger(core: fulcrum_core.Model, num_kv_blocks: int) -> Ledger:
    """What a loaded core has allocated; the runtime is what `anonymous_memory_bytes` is beyond."""
    return Ledger(
        weights_bytes=core.weights_bytes,
        kv_bytes=num_kv_blocks * core.kv_bytes_per_block,
        activation_bytes=core.activation_bytes,
    )


def anonymous_memory_bytes() -> int | None:
    """Memory of this process that is not backed by files; None where the system does not tell."""
    try:
        lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return None


def mib(num_bytes: float) -> str:
    """A size as people read it."""
    if abs(num_bytes) >= 1024 * MIB:
        return f"{num_bytes / (1024 * MIB):.2f} GiB"
    return f"{num_bytes / MIB:.1f} MiB"


def step_bytes(
    shape: fulcrum_core.Config, isa: str, num_threads: int, max_tokens: int, *, max_model_len: int
) -> int:
    """Bytes of a model's state of a step."""
    max_blocks = -(-max_model_len // fulcrum_core.BLOCK_SIZE)
    return fulcrum_core.activation_bytes(shape, isa, num_threads, max_tokens, max_blocks)


def _short_of_memory(
    config: EngineConfig,
    weights: WeightPlan,
    weights_bytes: int,
    activations: int,
    draft_bytes: int,
    available: int,
) -> str:
    needed = weights_bytes + activations + draft_bytes
    drafting = f" and {mib(draft_bytes)} of drafters" if draft_bytes else ""
    lower = ", a lower --max-step-tokens" if draft_bytes else " or a lower --max-step-tokens"
    return (
        f"--model {config.model}: weights of {mib(weights_bytes)} ({weights.formats}), "
        f"{mib(activations)} of activations{drafting} are {mib(needed - available)} more than the "
        f"{mib(available)} available; take a smaller model, --quantization int4{lower}"
        + (" or --speculation ngram" if draft_bytes else "")
    )
