"""Which drafters a model has, decided at load, and the policy over them for one engine.

The loader makes a `Speculation`; the engine asks it for what its steps need.
"""

import time
from collections.abc import Mapping
from collections.abc import Sequence as Row

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
CALIBRATION_S = 1.0  # at most, before anybody is served
SERVING_CALIBRATION_S = 0.15  # at most, while others wait: about what a chunk of a prompt takes
# The most telling first. Beyond the largest, and so where prompts share the step, a row would look
# free: it has to reach what such a step holds.
_CALIBRATED_TOKENS = (1, 2, 4, 8, 32, 128, 192, 64, 16, 5, 3, 6, 12, 24, 48)
MOST_CALIBRATED_TOKENS = max(_CALIBRATED_TOKENS)
_CALIBRATION_ROUNDS = 3


class Speculation(msgspec.Struct, frozen=True, kw_only=True):
    """The drafters that a model has, and the reason for each that it has not."""

    mode: SpeculationMode = "off"
    hidden_size: int = 0
    mtp: fulcrum_core.Model | None = None
    mtp_acceptance: tuple[float, ...] = ()  # by position, as measured when it was trained
    num_kv_blocks: int = 0
    unavailable: Mapping[str, str] = {}

    @property
    def drafters(self) -> tuple[str, ...]:
        """Names of the drafters that there are."""
        names = ["ngram"] if self.mode in ("auto", "ngram") else []
        return (*names, "mtp") if self.mtp is not None else tuple(names)

    def memory_bytes(self, num_lanes: int) -> int:
        """What the drafters have allocated, the hidden states kept for them included."""
        if self.mtp is None:
            return 0
        kv_bytes = self.num_kv_blocks * self.mtp.kv_bytes_per_block
        hidden_bytes = hidden_states_bytes(num_lanes, self.hidden_size)
        return self.mtp.weights_bytes + kv_bytes + self.mtp.activation_bytes + hidden_bytes

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
                    position_priors=self.mtp_acceptance,
                    hidden=hidden,
                )
            )
        costs = Costs(max_step_tokens, len(lanes.tokens))
        return SpeculationPolicy(drafters, costs, unavailable=self.unavailable)


OFF = Speculation()


def hidden_states_bytes(num_lanes: int, hidden_size: int) -> int:
    """Bytes of `Speculation.hidden_states`."""
    return num_lanes * HIDDEN_WINDOW * hidden_size * 4


def calibrate(
    batch: Batch, costs: Costs, most_tokens: int, blocks: Row[int], time_s: float
) -> None:
    """Time steps of several sizes between two steps, and seed the cost of a step.

    `blocks` of the cache are written to and hold `most_tokens`; it takes about `time_s` at most.
    """
    ends_at_s = time.monotonic() + time_s
    best_s: dict[int, float] = {}
    for _ in range(_CALIBRATION_ROUNDS):
        for num_tokens in _CALIBRATED_TOKENS:
            # A step of twice the tokens takes twice the time at most.
            less = [n for n in best_s if n <= num_tokens]
            most_s = best_s[max(less)] * num_tokens / max(less) if less else 0.0
            if num_tokens > most_tokens or time.monotonic() + most_s > ends_at_s:
                continue
            step_s = batch.time_probe(num_tokens, blocks)
            best_s[num_tokens] = min(step_s, best_s.get(num_tokens, step_s))
    for num_tokens, step_s in best_s.items():
        costs.step.seed(num_tokens, step_s)
