"""The policy's state as others see it: frozen, for `GET /v1/speculation` and the metrics."""

import msgspec

from engine.speculation.policy import SpeculationPolicy


class DrafterReport(msgspec.Struct, frozen=True, kw_only=True):
    """One drafter: whether it can be used, why it is used or not, and what came of it."""

    name: str
    qualifies: bool
    status: str  # a sentence: what is done with it now, and why
    max_drafts: int = 0
    depth: int | None = None  # drafts asked for now; None: as many as it has, at no cost
    num_drafts: int = 0  # that were verified, as the two below
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    drafted_by_position: tuple[int, ...] = ()
    accepted_by_position: tuple[int, ...] = ()
    # Recent, each given that those before it were accepted; drafts that were not verified count.
    acceptance_by_position: tuple[float, ...] = ()
    draft_s: tuple[tuple[int, float], ...] = ()  # (sequences, seconds) of a call at that depth


class SpeculationReport(msgspec.Struct, frozen=True, kw_only=True):
    """What qualifies, what is chosen now and why, and what that rests on."""

    drafters: tuple[DrafterReport, ...]
    choice: str  # a sentence on the last decision
    num_sequences: int  # that the last decision was about
    num_verified: int  # drafted tokens that it put into the step
    expected_tokens_per_s: float
    expected_plain_tokens_per_s: float  # without drafts
    estimated_speedup: float  # recent mean of their quotient
    measured_speedup: float  # recent steps against those without drafts for as many sequences
    tokens_per_step: float  # measured, for each sequence, recent mean
    depth_histogram: tuple[int, ...]  # sequences' steps by drafted tokens verified, from 0 on
    step_s: tuple[tuple[int, float], ...]  # (tokens, seconds)


def report(policy: SpeculationPolicy) -> SpeculationReport:
    """Describe the policy at this moment; called on the engine thread."""
    choice = policy.last_choice
    tally = policy.tally
    return SpeculationReport(
        drafters=(
            *(_describe(policy, name) for name in policy.drafters),
            *(
                DrafterReport(name=name, qualifies=False, status=reason)
                for name, reason in policy.unavailable.items()
            ),
        ),
        choice=_explain(policy),
        num_sequences=policy.last_load[0],
        num_verified=choice.num_verified if choice else 0,
        expected_tokens_per_s=choice.expected_rate if choice else 0.0,
        expected_plain_tokens_per_s=choice.plain_rate if choice else 0.0,
        estimated_speedup=tally.estimated_speedup,
        measured_speedup=policy.meter.speedup(),
        tokens_per_step=tally.tokens_per_step,
        depth_histogram=tuple(tally.depth_histogram),
        step_s=tuple(policy.costs.step.points()),
    )


def _describe(policy: SpeculationPolicy, name: str) -> DrafterReport:
    drafter = policy.drafters[name]
    counts = policy.tally.drafters[name]
    planner = policy.models.planners.get(name)
    depth = None if planner is None else planner.depth
    curve = None if planner is None else planner.cost.curve(planner.depth or drafter.max_drafts)
    return DrafterReport(
        name=name,
        qualifies=True,
        status=_status(policy, name),
        max_drafts=drafter.max_drafts,
        depth=depth,
        num_drafts=counts.num_drafts,
        num_drafted_tokens=counts.num_drafted_tokens,
        num_accepted_tokens=counts.num_accepted_tokens,
        drafted_by_position=tuple(counts.drafted_by_position),
        accepted_by_position=tuple(counts.accepted_by_position),
        acceptance_by_position=tuple(policy.acceptance[name].by_position()),
        draft_s=tuple(curve.points()) if curve is not None else (),
    )


def _status(policy: SpeculationPolicy, name: str) -> str:
    planner = policy.models.planners.get(name)
    if planner is None:
        return "asked in every step, since a draft costs nothing; verified where that pays"
    if not planner.rates.any():
        return "not asked yet"
    best = int(planner.rates.argmax())
    plain, promised = float(planner.rates[0]), float(planner.rates[planner.depth])
    if planner.depth == 0:
        rest = max(planner.rates[1:], default=0.0)
        return (
            f"not asked: the best depth promises {rest / plain:.2f} times the tokens per second "
            "of no drafts; a few sequences are probed now and then"
        )
    if name != policy.models.current:
        return f"not asked: {policy.models.current} promises more"
    kept = "" if best == planner.depth else f"; {best} would be about as good"
    return (
        f"asked for {planner.depth} where no better draft is at hand: that promises "
        f"{promised / plain:.2f} times the tokens per second of no drafts{kept}"
    )


def _explain(policy: SpeculationPolicy) -> str:
    choice = policy.last_choice
    if not policy.drafters:
        return "no drafter can be used"
    if not policy.costs.step.is_known:
        return "nothing is drafted before the time of a step is known"
    if choice is None:
        return "no sequence that may draft has been decoded yet"
    num_sequences, _ = policy.last_load
    sequences = f"{num_sequences} sequence{'' if num_sequences == 1 else 's'}"
    if choice.num_verified == 0:
        return f"no draft was worth verifying for {sequences}"
    gain = choice.expected_rate / choice.plain_rate
    return (
        f"{choice.num_verified} drafted tokens verified for {sequences}: expected to emit "
        f"{choice.expected_emitted:.1f} tokens, {gain:.2f} times the tokens per second of no drafts"
    )
