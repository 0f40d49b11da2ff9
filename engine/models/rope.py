"""Inverse frequencies of rotary embeddings, with the scalings that extend a model's context.

The families call it with the parameters in the words of config.json; computed in float32, in the
order of operations of transformers, so that positions far out agree with it.
"""

import math

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.models.settings import Settings

_Frequencies = NDArray[np.float32]


class RopeTable(msgspec.Struct, frozen=True):
    """One table of inverse frequencies, and the factor on cos and sin that goes with it."""

    inv_freq: tuple[float, ...]  # (head_dim / 2,)
    attention_factor: float = 1.0
    max_position: int | None = None  # what the scaling extends the context to, where it says so


def rope_table(head_dim: int, theta: float, parameters: Settings, max_position: int) -> RopeTable:
    """Compute the table of `parameters` (rope_type and what that type needs).

    `max_position` stands in for an absent original_max_position_embeddings. Raises
    CheckpointError for a scaling that is not known.
    """
    rope_type = parameters.text("rope_type", parameters.text("type", "default"))
    if parameters.number("partial_rotary_factor", 1.0) != 1.0:
        raise parameters.error("partial_rotary_factor", "other than 1 is not supported")
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    wavelengths = np.float32(theta) ** exponents
    plain = np.float32(1.0) / wavelengths
    if rope_type == "default":
        return _table(plain)
    if rope_type == "linear":
        return _table(plain / np.float32(_factor(parameters)))
    if rope_type == "llama3":
        return _table(_llama3(plain, parameters, max_position))
    if rope_type == "yarn":
        return _yarn(wavelengths, head_dim, theta, parameters, max_position)
    raise parameters.error(
        "rope_type", f"{rope_type} is not supported; known are default, linear, llama3 and yarn"
    )


def divided_table(head_dim: int, theta: float, factors: NDArray[np.float32]) -> RopeTable:
    """The plain table divided by factors from the file: how GGUF stores llama3's scaling."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return _table(np.float32(1.0) / (np.float32(theta) ** exponents) / factors)


def _table(inv_freq: _Frequencies) -> RopeTable:
    return RopeTable(tuple(inv_freq.astype(np.float32).tolist()))


def _factor(parameters: Settings) -> float:
    factor = parameters.number("factor")
    if factor <= 0:
        raise parameters.error("factor", f"is {factor}; it must be positive")
    return factor


def _llama3(plain: _Frequencies, parameters: Settings, max_position: int) -> _Frequencies:
    factor = np.float32(_factor(parameters))
    low = parameters.number("low_freq_factor")
    high = parameters.number("high_freq_factor")
    if high <= low:
        raise parameters.error("high_freq_factor", "must be above low_freq_factor")
    context = parameters.count("original_max_position_embeddings", max_position)
    wavelengths = np.float32(2 * math.pi) / plain
    smooth = (np.float32(context) / wavelengths - np.float32(low)) / np.float32(high - low)
    blended = (1 - smooth) * plain / factor + smooth * plain
    long_or_medium = np.where(wavelengths > context / low, plain / factor, blended)
    return np.where(wavelengths < context / high, plain, long_or_medium).astype(np.float32)


def _yarn(
    wavelengths: _Frequencies,
    head_dim: int,
    theta: float,
    parameters: Settings,
    max_position: int,
) -> RopeTable:
    """YaRN (arXiv 2309.00071): interpolate low frequencies, keep high ones, blend between."""
    context = parameters.count("original_max_position_embeddings", max_position)
    factor = _factor(parameters) if parameters.has("factor") else max_position / context

    def correction_dim(num_rotations: float) -> float:
        rotations = context / (num_rotations * 2 * math.pi)
        return head_dim * math.log(rotations) / (2 * math.log(theta))

    low = correction_dim(parameters.number("beta_fast", 32.0))
    high = correction_dim(parameters.number("beta_slow", 1.0))
    if parameters.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # the ramp must have a width
    dims = np.arange(head_dim // 2, dtype=np.float32)
    interpolated = np.clip((dims - np.float32(low)) / np.float32(high - low), 0, 1)
    kept = 1 - interpolated
    inv_freq = (1 / (np.float32(factor) * wavelengths)) * (1 - kept) + (1 / wavelengths) * kept
    return RopeTable(
        tuple(inv_freq.astype(np.float32).tolist()),
        _yarn_attention_factor(parameters, factor),
        max(max_position, int(context * factor)),
    )


def _yarn_attention_factor(parameters: Settings, factor: float) -> float:
    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if parameters.has("attention_factor"):
        return parameters.number("attention_factor")
    scale, scale_all = parameters.number("mscale", 0.0), parameters.number("mscale_all_dim", 0.0)
    return magnitude(scale) / magnitude(scale_all) if scale and scale_all else magnitude(1.0)
