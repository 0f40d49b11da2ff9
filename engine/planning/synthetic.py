"""A core with made-up weights of a model's shapes and formats: as fast as the model, without
reading it. The calibration times it."""

import math

import fulcrum_core
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from engine.checkpoint.tensor import BLOCK_TYPES
from engine.config import KvDtype
from engine.models.core_config import core_config
from engine.models.spec import ModelSpec
from engine.models.weights import PlannedTensor, WeightPlan

# Block types that become a format without rounding; others are made from bf16.
_SOURCE_TYPES = {"int8": "Q8_0", "int4": "Q4_0"}
_SCALE_OF_TYPE = {"Q8_0": 74.0, "Q4_0": 4.6}  # standard deviation of random quants
_NOISE_BYTES = 1 << 20


def synthetic_core(
    spec: ModelSpec,
    plan: WeightPlan,
    isa: str,
    num_threads: int,
    *,
    num_layers: int,
    num_kv_blocks: int,
    kv_dtype: KvDtype,
) -> fulcrum_core.Model:
    """Make a core of the model's first `num_layers` layers."""
    cut = replace(
        spec,
        num_layers=num_layers,
        layer_windows=spec.layer_windows[:num_layers],
        layer_rope_index=spec.layer_rope_index[:num_layers],
    )
    core = fulcrum_core.Model(core_config(cut), num_threads, isa)
    noise = np.random.default_rng(1).integers(0, 256, _NOISE_BYTES, dtype=np.uint8)
    cache: dict[tuple[str, tuple[int, ...]], NDArray[np.uint8]] = {}
    for item in plan.tensors:
        slot = item.slot
        if slot.layer >= num_layers:
            continue
        if item.format is None:
            fill = np.zeros if slot.slot.endswith("bias") else np.ones
            core.load_vector(slot.slot, slot.layer, fill(slot.shape, np.float32))
            continue
        block_type = _source_type(item)
        key = (block_type, slot.shape)
        if key not in cache:
            cache[key] = _weights(noise, block_type, slot.shape)
        rows, cols = slot.shape
        core.load_matrix(slot.slot, slot.layer, block_type, cache[key], rows, cols, item.format)
    core.finalize()
    core.allocate_kv(num_kv_blocks, kv_dtype)
    return core


def _source_type(item: PlannedTensor) -> str:
    block_type = _SOURCE_TYPES.get(item.format or "", "BF16")
    num_values = BLOCK_TYPES[block_type].num_values
    return "BF16" if item.slot.shape[1] % num_values else block_type


def _weights(
    noise: NDArray[np.uint8], block_type: str, shape: tuple[int, ...]
) -> NDArray[np.uint8]:
    """Random blocks whose products keep activations at about their size."""
    num_values = math.prod(shape)
    scale = 1.0 / math.sqrt(shape[1])
    if block_type == "BF16":
        centred = (noise[: 1 << 18].astype(np.float32) - 127.5) * (scale / 74.0)
        halves = (centred.view(np.uint32) >> 16).astype(np.uint16)
        return np.resize(halves, num_values).view(np.uint8)
    num_bytes = BLOCK_TYPES[block_type].num_bytes
    blocks = noise[: len(noise) // num_bytes * num_bytes].reshape(-1, num_bytes).copy()
    half = np.float16(scale / _SCALE_OF_TYPE[block_type])
    blocks[:, :2] = np.frombuffer(half.tobytes(), np.uint8)
    num_blocks = num_values // BLOCK_TYPES[block_type].num_values
    return np.resize(blocks, (num_blocks, num_bytes)).reshape(-1)
