"""Which sequences a drafter that runs a model is asked for, and how deep it drafts for them.

Such a drafter costs time before it is known what it proposes: it is asked where its usual
acceptance promises more than the draft that a free drafter already gave, and now and then for a
few sequences where it does not, so that a change is noticed.
"""

from dataclasses import dataclass, field

import numpy as np

from engine.speculation.acceptance import Acceptance
from engine.speculation.candidates import StepDrafts
from engine.speculation.costs import Costs
from engine.speculation.depth import MARGIN, DepthPlanner
from engine.speculation.drafter import Chain, Drafter
from engine.speculation.single_stream import SingleStep

PROBE_SEQUENCES = 2
VERIFY_EVERY = 4  # probes


@dataclass(slots=True)
class Ask:
    """A call of a drafter: candidates by index, drafts for each, and whose are verified anyway."""

    name: str
    indices: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    verified: set[int] = field(default_factory=set)
    num_probed: int = 0  # of them, for the sake of knowing only


class ModelDrafters:
    """The planners of all drafters that run a model, and which of these is in use."""

    def __init__(
        self, drafters: list[Drafter], acceptance: dict[str, Acceptance], costs: Costs
    ) -> None:
        self._chains = {drafter.name: drafter for drafter in drafters if isinstance(drafter, Chain)}
        self.planners = {
            drafter.name: DepthPlanner(
                acceptance[drafter.name], costs, ends_early=drafter.name in self._chains
            )
            for drafter in drafters
        }
        self.current: str | None = next(iter(self.planners), None)
        self._acceptance = acceptance
        self._costs = costs
        # Of a step of one sequence, as of its last plan: what a draft of depth 1 … K is worth, and
        # what one of depth 0 … K takes.
        self._single: dict[str, tuple[list[float], list[float]]] = {}
        self._num_probes = 0

    def remove(self, name: str) -> None:
        """Forget a drafter that cannot be asked any more."""
        self.planners.pop(name, None)
        if self.current == name:
            self.current = next(iter(self.planners), None)

    def assign(self, step: StepDrafts, rate: float, *, may_probe: bool) -> list[Ask]:
        """Decide whom to ask for what; `rate` is the tokens per second that are usual now."""
        auto = step.with_drafter("auto")
        token_price = step.token_price(rate)
        asks: dict[str, Ask] = {}
        wanted_of: dict[str, list[int]] = {}
        for name, planner in self.planners.items():
            named = step.with_drafter(name)
            is_due = planner.is_due(step.base_tokens)
            wanted: list[int] = []
            if is_due or (planner.depth and name == self.current):
                wanted = self._where_better(step, name, auto, rate, token_price)
            wanted_of[name] = wanted
            if is_due and (wanted or named):
                self._plan(planner, step, wanted + named, token_price)
            asks[name] = Ask(name)
            for index in named:
                depth = planner.depth
                if step.candidates[index].num_drafts is not None:
                    depth = planner.max_drafts
                _add(asks[name], step, index, depth)
        current = self._choose_current()
        for index in wanted_of[current]:
            _add(asks[current], step, index, self.planners[current].depth)
        if may_probe:
            self._probe(step, asks)
        return [ask for ask in asks.values() if ask.indices]

    def assign_single(self, step: SingleStep, *, may_probe: bool) -> Ask | None:
        """The same for a step of one sequence, after the free drafters: whom to ask, if any."""
        wanted = step.candidate.drafter
        due = [
            one for one in self.planners.values() if one.is_due(1) or one.name not in self._single
        ]
        for planner in due:
            self._plan_single(planner, step)
        if due:
            self._choose_current()
        asked = self.current if wanted == "auto" else wanted
        if asked is None or asked not in self.planners:
            return None
        if may_probe:
            probe = self._probe_single(step)
            if probe is not None:
                return probe
        planner = self.planners[asked]
        depth = step.limit(planner.depth)
        if depth <= 0 or (step.count and self._promise(planner, depth, step) <= step.value):
            return None
        return Ask(asked, [0], [depth])

    def _plan_single(self, planner: DepthPlanner, step: SingleStep) -> None:
        odds = self._acceptance[planner.name].odds([step.seq_id])
        alone = StepDrafts([step.candidate], 0, self._costs.step.times_s(), planner.max_drafts)
        planner.plan(odds, 1.0, alone, 0)
        price = step.token_price
        self.set_confidence(planner.name, 1, step.rate, price)
        gains, times_s = planner.mean_gains(price), planner.draft_times_s(1)
        self._single[planner.name] = (gains.tolist(), times_s.tolist())

    def _promise(self, planner: DepthPlanner, depth: int, step: SingleStep) -> float:
        """What asking is worth, in tokens."""
        gains, times_s = self._single[planner.name]
        odds = self._acceptance[planner.name].odds_of(step.seq_id)
        return odds * gains[depth - 1] - step.rate * times_s[depth]

    def _probe_single(self, step: SingleStep) -> Ask | None:
        wanted = step.candidate.drafter
        idle = [
            name
            for name, planner in self.planners.items()
            if wanted in ("auto", name)
            and (name != self.current or planner.depth < planner.max_drafts)
        ]
        if not idle:
            return None
        name = idle[self._num_probes % len(idle)]
        self._num_probes += 1
        depth = step.limit(self.planners[name].max_drafts)
        if depth <= 0:
            return None
        verified = {0} if self._num_probes % VERIFY_EVERY == 0 else set[int]()
        return Ask(name, [0], [depth], verified, num_probed=1)

    def draft_s(self, name: str, measured_s: float) -> float:
        """Seconds of a drafter's last call, as far as drafting took them."""
        chain = self._chains.get(name)
        return measured_s if chain is None else chain.draft_s

    def set_confidence(self, name: str, num_sequences: int, rate: float, price: float) -> None:
        """Have a drafter end its chains where going on would not pay; see `DepthPlanner`."""
        chain = self._chains.get(name)
        if chain is not None:
            planner = self.planners[name]
            chain.min_confidence = planner.least_confidence(num_sequences, rate, price)

    def _where_better(
        self, step: StepDrafts, name: str, auto: list[int], rate: float, token_price: float
    ) -> list[int]:
        """Those of `auto` that have no draft, or a worse one than the drafter promises."""
        if not auto or not step.has_drafts:
            return auto
        planner = self.planners[name]
        gains = planner.mean_gains(token_price)
        draft_times_s = planner.draft_times_s(len(auto))[1:]
        odds = self._acceptance[name].odds([step.seq_ids[index] for index in auto])
        values = (np.outer(odds, gains) - draft_times_s * (rate / len(auto))).max(axis=1)
        free_values = np.maximum(step.survivals[auto] - token_price, 0.0).sum(axis=1)
        is_wanted = (free_values == 0.0) | (values > free_values)
        return [auto[row] for row in np.flatnonzero(is_wanted).tolist()]

    def _plan(
        self, planner: DepthPlanner, step: StepDrafts, asked: list[int], token_price: float
    ) -> None:
        others = step.survivals.copy()
        others[asked] = 0.0
        paying = others[others > token_price]
        emitted = len(step.candidates) + float(paying.sum())
        odds = self._acceptance[planner.name].odds([step.seq_ids[index] for index in asked])
        planner.plan(odds, emitted, step, len(paying))

    def _choose_current(self) -> str:
        """The drafter whose planned rate is highest, the one in use unless clearly beaten."""
        assert self.current is not None
        rates = {name: planner.rates[planner.depth] for name, planner in self.planners.items()}
        best = max(rates, key=lambda name: rates[name])
        if rates[best] > (1.0 + MARGIN) * rates[self.current]:
            self.current = best
        return self.current

    def _probe(self, step: StepDrafts, asks: dict[str, Ask]) -> None:
        """Have some sequences drafted for at full depth where that is not done anyway.

        Mostly it is enough to see whether the next token would have been right. Every so often
        the drafts are verified as well: that shows the later ones, and what such a step takes.
        """
        idle = [
            name
            for name, planner in self.planners.items()
            if name != self.current or planner.depth < planner.max_drafts
        ]
        if not idle:
            return
        name = idle[self._num_probes % len(idle)]
        planner = self.planners[name]
        asking = step.with_drafter("auto") + step.with_drafter(name)
        if not asking:
            self._num_probes += 1
            return
        count = min(PROBE_SEQUENCES, len(asking))
        is_verified = self._num_probes % VERIFY_EVERY == VERIFY_EVERY - 1
        # What verification takes is seen in a step that does nothing else.
        is_verified = is_verified and step.is_decoding_only
        first = self._num_probes * PROBE_SEQUENCES
        self._num_probes += 1
        for offset in range(count):
            index = asking[(first + offset) % len(asking)]
            for ask in asks.values():
                if index in ask.indices:
                    position = ask.indices.index(index)
                    del ask.indices[position], ask.depths[position]
            _add(asks[name], step, index, planner.max_drafts)
            if is_verified:
                asks[name].verified.add(index)
        asks[name].num_probed = min(count, len(asks[name].indices))


def _add(ask: Ask, step: StepDrafts, index: int, depth: int) -> None:
    (limit,) = step.limits([index], depth)
    if limit > 0:
        ask.indices.append(index)
        ask.depths.append(limit)
