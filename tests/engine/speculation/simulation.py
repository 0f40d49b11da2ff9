"""A world with planted costs and acceptance, in which the policy runs on a clock of its own.

A drafter's token is right with the probability that its bucket stands for; the world knows which
are right, and what an optimal choice would have yielded.
"""

from collections.abc import Callable
from collections.abc import Sequence as Row
from dataclasses import dataclass, field

import numpy as np

from engine.sequence import Sequence
from engine.speculation.candidates import Candidate
from engine.speculation.costs import Costs
from engine.speculation.drafter import Draft
from engine.speculation.policy import SpeculationPolicy
from engine.types import SamplingParams, Submit

MAX_TOKENS = 512
RIGHT, WRONG, OTHER = 1, 2, 3  # ids: what the target emits, and what it does not


def sequence(seq_id: int) -> Sequence:
    return Sequence(Submit(seq_id, (1,), SamplingParams(max_tokens=9), 0.0), frozenset())


@dataclass
class Clock:
    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


class PlantedDrafter:
    """Drafts tokens of random buckets; bucket b is right with probability `truth[b]`."""

    def __init__(
        self,
        clock: Clock,
        name: str = "mtp",
        *,
        max_drafts: int = 4,
        truth: Row[float] = (0.1, 0.4, 0.8),
        shares: Row[float] = (0.4, 0.3, 0.3),  # of the buckets among the drafted tokens
        run_s: Callable[[int], float] = lambda m: 0.0003,  # of one token for m sequences
        is_free: bool = False,
        proposes: float = 1.0,  # share of the calls in which it has a draft at all
        priors: Row[float] | None = None,
        seed: int = 0,
    ) -> None:
        self.name, self.max_drafts, self.is_free = name, max_drafts, is_free
        self.truth, self.shares, self.proposes = list(truth), list(shares), proposes
        self.priors = tuple(priors or [0.5] * len(self.truth))
        self.position_priors = (0.5,) * max_drafts
        self.num_calls = 0
        self.run_s, self._clock = run_s, clock
        self._generator = np.random.default_rng(seed)

    def propose(self, sequences: Row[Sequence], max_drafts: Row[int]) -> list[Draft]:
        self.num_calls += 1
        draws = self._generator
        drafts = []
        for most in max_drafts:
            count = most if draws.random() < self.proposes else 0
            buckets = draws.choice(len(self.truth), size=count, p=self.shares).tolist()
            right = [draws.random() < self.truth[bucket] for bucket in buckets]
            drafts.append(Draft(self.name, [RIGHT if ok else WRONG for ok in right], buckets))
        for depth in range(max(max_drafts)):
            self._clock.now_s += self.run_s(sum(most > depth for most in max_drafts))
        return drafts


@dataclass
class World:
    """Sequences that never end, and what a step really takes."""

    step_s: Callable[[int], float]
    clock: Clock
    drafters: list[PlantedDrafter]
    num_sequences: int = 1
    noise: float = 0.05  # of a step's time, as a share
    num_other_tokens: int = 0
    seed: int = 1
    seed_factor: float = 1.0  # how much slower the machine was when steps were calibrated,
    call_seed_factor: float = 1.0  # and when a drafter's calls were
    num_emitted: int = 0
    depths: list[int] = field(default_factory=list)  # of the model drafter, by step
    num_verified: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._generator = np.random.default_rng(self.seed)
        costs = Costs(MAX_TOKENS, 64)
        for size in (1, 2, 4, 8, 16, 32, 64, 128):
            costs.step.seed(size, self.step_s(size) * self.seed_factor)
        for drafter in self.drafters if self.call_seed_factor != 1.0 else ():
            cost = costs.drafter(drafter.name, drafter.max_drafts)
            for depth in range(1, drafter.max_drafts + 1):
                cost.curve(depth).seed(1, depth * drafter.run_s(1) * self.call_seed_factor)
        self.policy = SpeculationPolicy(self.drafters, costs, clock=self.clock)
        self.resize(self.num_sequences)

    def resize(self, num_sequences: int) -> None:
        self.candidates = [Candidate(sequence(i), 99) for i in range(num_sequences)]

    def run(self, num_steps: int) -> float:
        """Run steps and return the emitted tokens per second in them."""
        began_s, num_before = self.clock.now_s, self.num_emitted
        for _ in range(num_steps):
            self._step()
        return (self.num_emitted - num_before) / (self.clock.now_s - began_s)

    def _step(self) -> None:
        drafts = self.policy.draft(self.candidates, self.num_other_tokens)
        num_drafted = sum(len(draft.token_ids) for draft in drafts)
        num_tokens = len(drafts) + num_drafted + self.num_other_tokens
        # Times are skewed, with a stall now and then: one in a hundred, so that runs compare.
        factor = 1.0 + self.noise * float(self._generator.exponential())
        if len(self.num_verified) % 100 == 50:
            factor *= 5.0
        step_s = self.step_s(num_tokens) * factor
        self.clock.now_s += step_s
        for candidate, draft in zip(self.candidates, drafts, strict=True):
            seq_id = candidate.sequence.seq_id
            emitted = self._emit(seq_id, draft)
            self.num_emitted += len(emitted)
            self.policy.observe(seq_id, len(draft.token_ids), emitted)
        self.policy.observe_step(num_tokens, step_s)
        self.num_verified.append(num_drafted)
        self.depths += [planner.depth for planner in self.policy.models.planners.values()]

    def _emit(self, seq_id: int, draft: Draft) -> list[int]:
        """What the target says: the accepted tokens and one more, which is always RIGHT."""
        emitted = []
        for token_id in draft.token_ids:
            if token_id == WRONG:
                break
            emitted.append(RIGHT)
        return [*emitted, RIGHT]


def best_fixed_rate(world: World, drafter: PlantedDrafter, noise: float = 0.05) -> float:
    """Tokens per second of the best constant depth, every drafted token verified."""
    mean = float(np.dot(drafter.truth, drafter.shares))
    count = len(world.candidates)
    rates = []
    for depth in range(drafter.max_drafts + 1):
        emitted = count * sum(mean**k for k in range(depth + 1))
        # As World._step: the mean of the noise, and the stalls.
        step_s = world.step_s(count * (1 + depth) + world.num_other_tokens)
        seconds = step_s * (1.0 + noise) * 1.04 + depth * drafter.run_s(count)
        rates.append(emitted / seconds)
    return max(rates)
