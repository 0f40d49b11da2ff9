"""A model without some of its layers, and which ones it can spare, as the core measures it."""

import math
from collections.abc import Callable, Mapping, Sequence

import fulcrum_core
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from engine.checkpoint.tensor import StoredTensor
from engine.models.core_config import core_config
from engine.models.spec import ModelSpec
from engine.models.weights import load_weights, plan_weights
from tools.evaluate import WindowScorer

Tensors = Mapping[str, StoredTensor]


def require_equal_layers(spec: ModelSpec) -> None:
    """Raise ValueError where layers differ in kind: their order would say which is which."""
    if len(set(spec.layer_windows)) > 1 or len(set(spec.layer_rope_index)) > 1:
        raise ValueError(
            f"the {spec.family} model has layers of several kinds in a fixed order; none can be "
            "dropped"
        )


def kept_spec(spec: ModelSpec, kept: Sequence[int]) -> ModelSpec:
    """The spec of a model that has only these layers."""
    return replace(
        spec,
        num_layers=len(kept),
        layer_windows=spec.layer_windows[: len(kept)],
        layer_rope_index=spec.layer_rope_index[: len(kept)],
    )


def kept_tensors(spec: ModelSpec, tensors: Tensors, kept: Sequence[int]) -> dict[str, StoredTensor]:
    """Its tensors, the layers numbered anew. Tensors that are no weights of the model stay out."""
    found = {}
    for slot, name in spec.tensor_names.items():
        if "{layer}" in name:
            for new, old in enumerate(kept):
                found[name.format(layer=new)] = tensors[name.format(layer=old)]
        elif name in tensors and not (slot == "output" and spec.tied_embeddings):
            found[name] = tensors[name]
    return found


class LayerMeter:
    """Measures what a model without some layers loses on a text."""

    def __init__(
        self,
        spec: ModelSpec,
        tensors: Tensors,
        windows: NDArray[np.int32],  # (windows, context)
        *,
        isa: str,
        num_threads: int,
    ) -> None:
        self._spec = spec
        self._tensors = tensors
        self._windows = windows
        self._isa = isa
        self._num_threads = num_threads

    def perplexity(self, kept: Sequence[int]) -> float:
        """Perplexity of the text with these layers only."""
        spec = kept_spec(self._spec, kept)
        plan = plan_weights(spec, kept_tensors(self._spec, self._tensors, kept), "auto", "pruned")
        core = fulcrum_core.Model(core_config(spec), self._num_threads, self._isa)
        load_weights(core, spec, plan, lambda: None, num_threads=self._num_threads)
        core.finalize()
        scorer = WindowScorer(core, self._windows.shape[1], 1)
        scores = [
            scorer.score(self._windows[begin : begin + scorer.batch_size])
            for begin in range(0, len(self._windows), scorer.batch_size)
        ]
        # One without its most important layer may be as bad as a float can say.
        return math.exp(min(700.0, -float(np.concatenate(scores).mean())))


def choose_layers(
    num_layers: int,
    num_dropped: int,
    perplexity: Callable[[Sequence[int]], float],
    report: Callable[[str], None],
) -> list[int]:
    """The layers to keep: one after the other, the one is dropped whose loss hurts least.

    All are tried for each: what a layer is worth depends on those that are left.
    """
    kept = list(range(num_layers))
    report(f"{num_layers} layers: perplexity {perplexity(kept):.3f}")
    for _ in range(num_dropped):
        losses = {layer: perplexity([other for other in kept if other != layer]) for layer in kept}
        spared = min(losses, key=lambda layer: losses[layer])
        kept.remove(spared)
        report(
            f"{len(kept)} layers: perplexity {losses[spared]:.3f} without layer {spared}; "
            f"the others {min((v for k, v in losses.items() if k != spared), default=0):.3f} to "
            f"{max(losses.values()):.3g}"
        )
    return kept
