"""Which drafters a model has, decided at load, and the policy over them for one engine.

The loader makes a `Speculation`; the engine asks it for what its steps need.
"""

from collections.abc import Mapping

import fulcrum_core
import msgspec
import numpy as np

from engine.batch import Batch
from engine.config import SpeculationMode
from engine.lanes import Float32Array
from engine.speculation.chain import ChainDrafter
from engine.speculation.costs import Costs
from engine.speculation.draft_model import DraftModel
from engine.speculation.drafter import Drafter
from engine.speculation.ngram import NgramDrafter
from engine.speculation.policy import SpeculationPolicy

NGRAM_DRAFTS = 8  # K at most, of each
MTP_DRAFTS = 4
MODEL_DRAFTS = 5
# Hidden states kept of each sequence: what a module can catch up with, and how much of a prompt it
# sees.
HIDDEN_WINDOW = 64


class Speculation(msgspec.Struct, frozen=True, kw_only=True):
    """The drafters that a model has, and the reason for each that it has not."""

    mode: SpeculationMode = "off"
    hidden_size: int = 0
    mtp: fulcrum_core.Model | None = None
    mtp_acceptance: tuple[float, ...] = ()  # by position, as measured when it was trained
    mtp_chains_normed: bool = False
    draft: DraftModel | None = None
    num_kv_blocks: int = 0
    unavailable: Mapping[str, str] = {}

    @property
    def drafters(self) -> tuple[str, ...]:
        """Names of the drafters that there are."""
        has = {
            "ngram": self.mode in ("auto", "ngram"),
            "mtp": self.mtp is not None,
            "draft": self.draft is not None,
        }
        return tuple(name for name, is_there in has.items() if is_there)

    def memory_bytes(self, num_lanes: int) -> int:
        """What the drafters have allocated, the hidden states kept for them included."""
        num_bytes = 0
        if self.mtp is not None:
            num_bytes += hidden_states_bytes(num_lanes, self.hidden_size, self.mtp_chains_normed)
        for model in (self.mtp, None if self.draft is None else self.draft.core):
            if model is not None:
                num_bytes += model.weights_bytes + model.activation_bytes
                num_bytes += self.num_kv_blocks * model.kv_bytes_per_block
        return num_bytes

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
        if self.draft is not None:
            drafters.append(
                ChainDrafter(
                    "draft",
                    self.draft.core,
                    lanes,
                    max_drafts=MODEL_DRAFTS,
                    max_step_tokens=max_step_tokens,
                    position_priors=(),
                    num_ids=self.draft.num_shared_ids,
                )
            )
        costs = Costs(max_step_tokens, len(lanes.tokens))
        return SpeculationPolicy(drafters, costs, unavailable=self.unavailable)


OFF = Speculation()


def hidden_states_bytes(num_lanes: int, hidden_size: int, chains_normed: bool) -> int:
    """Bytes of `Speculation.hidden_states`, and of the states that a chain goes on from."""
    return num_lanes * (HIDDEN_WINDOW + chains_normed) * hidden_size * 4
