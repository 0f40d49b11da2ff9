"""What drafting adds to speed, from the cost of steps and how often drafts are accepted.

The planner makes one `Drafting` for a setting: of figures measured while serving where there are
enough, else of what a head was shipped with; lookup adds nothing until then. The cost model asks it
for the gain.
"""

import math
from collections.abc import Callable
from typing import Literal

import msgspec

from engine.speculation.report import DrafterReport, SpeculationReport

Basis = Literal["measured", "estimated"]

_ENOUGH_DRAFTED = 200  # tokens, for what was measured to count
_MANY = 16  # sequences


class Acceptance(msgspec.Struct, frozen=True):
    """One drafter's drafts: how often there is one, and the acceptance of each position."""

    coverage: float  # share of a sequence's steps
    by_position: tuple[float, ...]  # each given that those before it were accepted
    basis: Basis

    def expected(self, depth: int) -> float:
        """Tokens that a draft of this depth is expected to add."""
        expected, survival = 0.0, 1.0
        for accepted in self.by_position[:depth]:
            survival *= accepted
            expected += survival
        return expected


# How often texts repeat themselves is not known before they are served: until it was measured here,
# lookup is taken to add nothing, and so to cost nothing.
UNMEASURED_NGRAM = Acceptance(0.0, (), "estimated")
# Of a model whose drafts were never measured anywhere, as the policy begins with.
UNKNOWN_MODEL = Acceptance(1.0, (0.5,) * 4, "estimated")
NOTHING = Acceptance(0.0, (), "measured")


class ModelDrafts(msgspec.Struct, frozen=True):
    """A drafter that runs a model: its drafts, and what a run of it costs."""

    acceptance: Acceptance
    run_share: float  # of the time of a step with as many tokens


class Drafting(msgspec.Struct, frozen=True, kw_only=True):
    """The drafters that a setting turns on."""

    ngram: Acceptance = NOTHING
    models: tuple[ModelDrafts, ...] = ()  # of which the best is asked

    @property
    def basis(self) -> Basis:
        """Measured where all figures are."""
        used = (self.ngram, *(model.acceptance for model in self.models))
        return "measured" if all(part.basis == "measured" for part in used) else "estimated"

    def gain(self, num_sequences: float, step_s: Callable[[float], float]) -> float:
        """Tokens per second over those without drafts, at the depths that give most.

        `step_s` gives the seconds of a step of these sequences by its number of tokens. Where no
        draft pays the policy asks for none, so that the gain is at least 1. A model drafts where
        nothing was looked up.
        """
        plain_s = step_s(num_sequences)
        best = 1.0
        count = max(1, round(num_sequences))
        coverage, rest = self.ngram.coverage, 1.0 - self.ngram.coverage
        run_s = step_s(max(1.0, num_sequences * rest))
        for model in self.models or (ModelDrafts(NOTHING, 0.0),):
            for looked_up in range(len(self.ngram.by_position) + 1):
                for drafted in range(len(model.acceptance.by_position) + 1):
                    emitted = 1.0 + coverage * self.ngram.expected(looked_up)
                    emitted += rest * model.acceptance.expected(drafted)
                    seconds = drafted * model.run_share * run_s
                    for num_found, probability in enumerate(_binomial(count, coverage)):
                        if not probability:
                            continue
                        found = num_found / count
                        verified = found * looked_up + (1.0 - found) * drafted
                        seconds += probability * step_s(num_sequences * (1.0 + verified))
                    best = max(best, emitted * plain_s / seconds)
        return best


def _binomial(count: int, share: float) -> list[float]:
    """How likely each number of `count` sequences is, from 0 on, to have what a share has."""
    if count > _MANY:
        # Nearly always about as many as on average.
        mean = round(count * share)
        return [float(number == mean) for number in range(count + 1)]
    return [math.comb(count, n) * share**n * (1.0 - share) ** (count - n) for n in range(count + 1)]


class MeasuredDrafts(msgspec.Struct, frozen=True):
    """What serving has shown of the drafters so far, by name."""

    acceptance: dict[str, Acceptance] = {}
    run_share: dict[str, float] = {}

    def renewed(self, newer: "MeasuredDrafts") -> "MeasuredDrafts":
        """With what is known anew in place of the old."""
        return MeasuredDrafts(self.acceptance | newer.acceptance, self.run_share | newer.run_share)


def measured_drafts(report: SpeculationReport) -> MeasuredDrafts:
    """Take from the policy's report what enough drafts stand behind."""
    num_steps = sum(report.depth_histogram)
    acceptance: dict[str, Acceptance] = {}
    run_share: dict[str, float] = {}
    for drafter in report.drafters:
        if drafter.depth is not None:
            share = _run_share(drafter, dict(report.step_s))
            if share is not None:
                run_share[drafter.name] = share
        if drafter.num_drafted_tokens >= _ENOUGH_DRAFTED:
            coverage = min(1.0, drafter.num_drafts / num_steps) if drafter.depth is None else 1.0
            acceptance[drafter.name] = Acceptance(
                coverage, drafter.acceptance_by_position, "measured"
            )
    return MeasuredDrafts(acceptance, run_share)


def _run_share(drafter: DrafterReport, step_s: dict[int, float]) -> float | None:
    depth = drafter.depth or drafter.max_drafts
    shares = [
        seconds / depth / step_s[num_sequences]
        for num_sequences, seconds in drafter.draft_s
        if num_sequences in step_s
    ]
    return sum(shares) / len(shares) if shares else None
