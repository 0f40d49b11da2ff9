"""What drafting adds to speed, from the cost of steps and what drafts promised of late.

The planner makes one `Drafting` for a setting: of drafts that were seen while serving where there
are enough, else of what a head was shipped with; lookup adds nothing until then. The cost model
asks it for the gain.
"""

from collections.abc import Callable
from typing import Literal

import msgspec
import numpy as np

from engine.speculation.cost_curve import FloatArray
from engine.speculation.plan import rate_of_groups
from engine.speculation.profiles import DraftProfiles
from engine.speculation.report import DrafterReport, SpeculationReport

Basis = Literal["measured", "estimated"]
# Seconds of a step by its sequences and its drafted tokens, all sequences together.
StepSeconds = Callable[[float, float], float]

_ENOUGH_ROWS = 200  # of sequences in steps, for what was looked up to count as measured
_PRICE_SPAN = 8  # tokens over which the price of one more is averaged, as the policy does


class Survivals(msgspec.Struct, frozen=True):
    """One drafter's drafts, each standing for as many to come.

    A survival is the probability that a token and all before it are accepted.
    """

    rows: FloatArray  # (drafts, K), 0 where a draft is shorter or there is none
    basis: Basis

    def __post_init__(self) -> None:
        assert self.rows.ndim == 2
        assert len(self.rows)


def alike(by_position: tuple[float, ...], basis: Basis) -> Survivals:
    """Drafts that are all alike, by the acceptance of each position after those before it."""
    return Survivals(np.multiply.accumulate(np.array([by_position]), axis=1), basis)


# How often texts repeat themselves is not known before they are served: until it was measured here,
# lookup is taken to add nothing, and so to cost nothing.
UNMEASURED_NGRAM = alike((0.0,), "estimated")
# Of a model whose drafts were never measured anywhere, as the policy begins with.
UNKNOWN_MODEL = alike((0.5,) * 4, "estimated")
NOTHING = alike((0.0,), "measured")


class ModelDrafts(msgspec.Struct, frozen=True):
    """A drafter that runs a model: its drafts, and what a run of it costs."""

    survivals: Survivals
    run_share: float  # of the time of a step with as many tokens


class Drafting(msgspec.Struct, frozen=True, kw_only=True):
    """The drafters that a setting turns on, put through the policy's own choice."""

    free: Survivals = NOTHING
    models: tuple[ModelDrafts, ...] = ()  # of which the best is asked
    deciding_s: tuple[tuple[int, float], ...] = ()  # (sequences, seconds of a step)

    @property
    def basis(self) -> Basis:
        """Measured where all figures are."""
        used = (self.free, *(model.survivals for model in self.models))
        return "measured" if all(part.basis == "measured" for part in used) else "estimated"

    def gain(self, num_sequences: float, step_s: StepSeconds) -> float:
        """Tokens per second over those without drafts, at the model and depth that give most.

        Where no draft pays the policy asks for none, so that the gain is at least 1.
        """
        count = max(1, round(num_sequences))
        free = _groups(self.free.rows, count)
        width = max(free.shape[2], *(model.survivals.rows.shape[1] for model in self.models), 1)
        times_s = np.array([step_s(count, drafted) for drafted in range(count * width + 1)])
        plain_rate = count / float(times_s[0])
        times_s = times_s + self._deciding(count)
        best = rate_of_groups(free.reshape(len(free), -1), count, times_s[: free[0].size + 1])
        for model in self.models:
            run_s = model.run_share * np.array(
                [step_s(asked, 0) if asked else 0.0 for asked in range(count + 1)]
            )
            best = max(best, *_rates_with_model(free, model.survivals.rows, run_s, times_s))
        return max(1.0, best / plain_rate)

    def _deciding(self, num_sequences: int) -> float:
        """Seconds of a step that go into deciding on drafts."""
        if not self.deciding_s:
            return 0.0
        counts, seconds = zip(*self.deciding_s, strict=True)
        return float(np.interp(num_sequences, counts, seconds))


def _groups(rows: FloatArray, count: int) -> FloatArray:
    """Sequences of a step, (groups, count, K), of rows in an order that is always the same."""
    shuffled = np.random.default_rng(0).permutation(rows)
    num_groups = max(1, len(rows) // count)
    return np.resize(shuffled, (num_groups, count, rows.shape[1]))


def _rates_with_model(
    free: FloatArray,  # (G, B, K): what is there without the model
    profiles: FloatArray,  # (P, depth): the model's drafts
    run_s: FloatArray,  # (B + 1,): of one token deeper, by the number of sequences asked for
    times_s: FloatArray,  # of a step by its drafted tokens
) -> list[float]:
    """Expected tokens per second by the model's depth, from 1 on.

    It is asked where its usual draft promises more, beyond the price of its tokens, than the one
    that is there, as `ModelDrafters` does.
    """
    num_groups, count, num_free = free.shape
    span = min(_PRICE_SPAN, len(times_s) - 1)
    rate = count / times_s[0]
    price = rate * (times_s[span] - times_s[0]) / span
    depths = np.arange(1, profiles.shape[1] + 1)
    gains = np.cumsum(np.maximum(profiles - price, 0.0).mean(axis=0))
    usual = (gains - depths * run_s[count] * rate / count).max()
    at_hand = np.maximum(free - price, 0.0).sum(axis=2)
    is_asked = (at_hand == 0.0) | (at_hand < usual)  # (G, B)
    draft_s = run_s[is_asked.sum(axis=1)]  # (G,), of each token deeper
    own = _groups(profiles, count)
    own = own[np.arange(num_groups) % len(own)]
    rates = []
    for depth in depths.tolist():
        chosen = np.zeros((num_groups, count, max(num_free, depth)))
        chosen[:, :, :num_free] = free
        drafts = np.zeros_like(chosen)
        drafts[:, :, :depth] = own[:, :, :depth]
        is_better = is_asked & (drafts.sum(axis=2) > chosen.sum(axis=2))
        chosen[is_better] = drafts[is_better]
        seconds = times_s[: chosen[0].size + 1] + depth * draft_s[:, None]
        rates.append(rate_of_groups(chosen.reshape(num_groups, -1), count, seconds))
    return rates


class MeasuredDrafts(msgspec.Struct, frozen=True, kw_only=True):
    """What serving has shown of the drafters so far."""

    free: Survivals | None = None
    models: dict[str, Survivals] = {}  # by name
    run_share: dict[str, float] = {}
    deciding_s: tuple[tuple[int, float], ...] = ()

    def renewed(self, newer: "MeasuredDrafts") -> "MeasuredDrafts":
        """With what is known anew in place of the old."""
        return MeasuredDrafts(
            free=newer.free or self.free,
            models=self.models | newer.models,
            run_share=self.run_share | newer.run_share,
            deciding_s=newer.deciding_s or self.deciding_s,
        )


def measured_drafts(report: SpeculationReport, profiles: DraftProfiles) -> MeasuredDrafts:
    """Take from the policy what enough drafts stand behind."""
    run_share: dict[str, float] = {}
    for drafter in report.drafters:
        if drafter.depth is not None:
            share = _run_share(drafter, dict(report.step_s))
            if share is not None:
                run_share[drafter.name] = share
    is_enough = len(profiles.free) >= _ENOUGH_ROWS
    return MeasuredDrafts(
        free=Survivals(profiles.free, "measured") if is_enough else None,
        models={name: Survivals(rows, "measured") for name, rows in profiles.models.items()},
        run_share=run_share,
        deciding_s=profiles.deciding_s,
    )


def _run_share(drafter: DrafterReport, step_s: dict[int, float]) -> float | None:
    depth = drafter.depth or drafter.max_drafts
    shares = [
        seconds / depth / step_s[num_sequences]
        for num_sequences, seconds in drafter.draft_s
        if num_sequences in step_s
    ]
    return sum(shares) / len(shares) if shares else None
