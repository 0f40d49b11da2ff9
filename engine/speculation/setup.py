"""Which drafters a model has, decided at load, and the policy over them for one engine.

The loader makes a `Speculation`; the engine asks it for what its steps need.
"""

from collections.abc import Callable, Generator, Mapping
from collections.abc import Sequence as Row
from functools import partial

import fulcrum_core
import msgspec
import numpy as np

from engine.batch import Batch
from engine.config import SpeculationMode
from engine.lanes import Float32Array
from engine.speculation.chain import ChainDrafter
from engine.speculation.cost_curve import CostCurve
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
CALIBRATION_S = 1.0  # at most, of steps and drafts that are timed
_DRAFTS_SHARE = 0.2  # of these, for drafts
# The most telling first. Beyond the largest, and so where prompts share the step, a row would look
# free: it has to reach what such a step holds.
_CALIBRATED_TOKENS = (1, 2, 4, 8, 32, 128, 192, 64, 16, 5, 3, 6, 12, 24, 48)
_CALIBRATED_SEQUENCES = (1, 4, 16, 64)
MOST_CALIBRATED_TOKENS = max(_CALIBRATED_TOKENS)
# Small ones are what most steps are, and the ones that a short disturbance distorts.
_SMALL_SIZE = 8
_SMALL_SIZE_ROUNDS = 3


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


def calibration(
    batch: Batch, policy: SpeculationPolicy, most_tokens: int, blocks: Row[int], time_s: float
) -> Generator[None]:
    """Time steps and drafts of several sizes and seed what they cost; yields after each size.

    It goes on only between two steps. `blocks` of the caches are written to and hold
    `most_tokens`; it takes about `time_s` at most, what others do in between not counted.
    """
    sizes = [size for size in _CALIBRATED_TOKENS if size <= most_tokens]
    left_s = time_s * (1.0 - _DRAFTS_SHARE)
    left_s = yield from _seed_best(
        policy.costs.step, partial(batch.time_probe, block_ids=blocks), sizes, left_s
    )
    left_s += time_s * _DRAFTS_SHARE
    most_sequences = min(len(batch.lanes.tokens), len(blocks))
    counts = [count for count in _CALIBRATED_SEQUENCES if count <= most_sequences]
    for drafter in tuple(policy.drafters.values()):
        if not isinstance(drafter, ChainDrafter):
            continue
        cost = policy.costs.drafter(drafter.name, drafter.max_drafts)
        for num_drafts in range(1, drafter.max_drafts + 1):
            probe = partial(drafter.time_probe, num_drafts=num_drafts, blocks=blocks)
            left_s = yield from _seed_best(cost.curve(num_drafts), probe, counts, left_s)


def _seed_best(
    curve: CostCurve, probe: Callable[[int], float], sizes: Row[int], left_s: float
) -> Generator[None, None, float]:
    """Seed the least of a few times of each size that the time is enough for; what is left of it.

    The first run of all meets cold caches.
    """
    best_s: dict[int, float] = {}
    if sizes and left_s > 0.0:
        left_s -= probe(sizes[0])
    for size in sizes:
        # One of twice the size takes twice the time at most.
        less = [one for one in best_s if one <= size]
        most_s = best_s[max(less)] * size / max(less) if less else 0.0
        if most_s < left_s:
            times_s = [probe(size) for _ in range(_SMALL_SIZE_ROUNDS if size <= _SMALL_SIZE else 1)]
            best_s[size] = min(times_s)
            left_s -= sum(times_s)
            curve.seed(size, best_s[size])
            yield
    return left_s
