"""Which drafters a model has, decided at load, and the policy over them for one engine.

The loader makes a `Speculation`; the engine asks it for what its steps need.
"""

import time
from collections.abc import Mapping

import fulcrum_core
import msgspec
import numpy as np

from engine.batch import Batch
from engine.config import SpeculationMode
from engine.lanes import Float32Array
from engine.speculation.chain import ChainDrafter
from engine.speculation.costs import Costs
from engine.speculation.drafter import Drafter
from engine.speculation.ngram import NgramDrafter
from engine.speculation.policy import SpeculationPolicy

NGRAM_DRAFTS = 8  # K at most, of each
MTP_DRAFTS = 4
# Hidden states kept of each sequence: what a module can catch up with, and how much of a prompt it
# sees.
HIDDEN_WINDOW = 64
_CALIBRATION_S = 1.0  # at most
_CALIBRATED_TOKENS = (1, 2, 4, 8, 5, 3, 6, 16, 12, 32, 24, 64, 48)  # the most telling first
_CALIBRATION_ROUNDS = 3


class Speculation(msgspec.Struct, frozen=True, kw_only=True):
    """The drafters that a model has, and the reason for each that it has not."""

    mode: SpeculationMode = "off"
    hidden_size: int = 0
    mtp: fulcrum_core.Model | None = None
    unavailable: Mapping[str, str] = {}

    def hidden_states(self, num_lanes: int) -> Float32Array | None:
        """Memory for the states that the batch keeps, (num_lanes * W, D); None: nobody reads."""
        if self.mtp is None:
            return None
        return np.zeros((num_lanes * HIDDEN_WINDOW, self.hidden_size), np.float32)

    def policy(
        self, batch: Batch, hidden: Float32Array | None, *, max_step_tokens: int
    ) -> SpeculationPolicy:
        """The policy for an engine with this batch, whose hidden states are kept in `hidden`."""
        lanes = batch.lanes
        drafters: list[Drafter] = []
        if self.mode in ("auto", "ngram"):
            drafters.append(NgramDrafter(lanes.tokens, NGRAM_DRAFTS))
        if self.mtp is not None:
            drafters.append(
                ChainDrafter(
                    "mtp",
                    self.mtp,
                    lanes,
                    max_drafts=MTP_DRAFTS,
                    max_step_tokens=max_step_tokens,
                    hidden=hidden,
                )
            )
        costs = Costs(max_step_tokens, len(lanes.tokens))
        return SpeculationPolicy(drafters, costs, unavailable=self.unavailable)


OFF = Speculation()


def calibrate(batch: Batch, costs: Costs, max_step_tokens: int) -> None:
    """Time steps of several sizes before anybody is served, and seed the cost of a step."""
    began_s = time.monotonic()
    best_s: dict[int, float] = {}
    for _ in range(_CALIBRATION_ROUNDS):
        for num_tokens in _CALIBRATED_TOKENS:
            if num_tokens > max_step_tokens or time.monotonic() - began_s > _CALIBRATION_S:
                continue
            step_s = batch.time_probe(num_tokens)
            best_s[num_tokens] = min(step_s, best_s.get(num_tokens, step_s))
    for num_tokens, step_s in best_s.items():
        costs.step.seed(num_tokens, step_s)
