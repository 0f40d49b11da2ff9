"""The decisions of speculation as pure functions: what to verify, and how deep to draft.

Both maximise expected emitted tokens per second. `times_s` is the time of a step by its number of
drafted tokens; a survival is the probability that a drafted token and all before it are accepted,
which is also what it adds to the tokens that a step is expected to emit.
"""

from dataclasses import dataclass

import numpy as np

from engine.speculation.cost_curve import FloatArray

# Verifying must promise this much more than not verifying: estimates are not exact, and a server
# must not be slower for drafting.
MIN_GAIN = 0.01


@dataclass(frozen=True, slots=True)
class Choice:
    """How many tokens of each draft to verify, and what that promises."""

    counts: list[int]
    num_verified: int
    expected_emitted: float
    expected_rate: float  # emitted tokens per second
    plain_rate: float  # without drafts, for comparison


def choose_counts(
    survivals: FloatArray,  # (drafts, K), 0 where a draft is shorter
    base_emitted: float,
    times_s: FloatArray,
    *,
    num_forced: int = 0,
    sunk_s: float = 0.0,
) -> Choice:
    """Choose the drafted tokens whose verification pays, most likely ones first.

    Without these the step emits base_emitted and has num_forced drafted tokens. Every number is
    looked at, since costs have plateaus. sunk_s was spent on drafting: it makes the step as a
    whole longer, so that one more token costs relatively less.
    """
    num_drafts, width = survivals.shape
    num_forced = min(num_forced, len(times_s) - 1)
    if width == 0:
        rate = base_emitted / float(times_s[num_forced])
        return Choice([0] * num_drafts, 0, base_emitted, rate, rate)
    if num_drafts == 1:
        return _choose_count(survivals[0].tolist(), base_emitted, times_s, num_forced, sunk_s)
    flat = survivals.ravel()
    # Stable: of equal survivals the earlier position comes first, and a draft's never rise.
    order = np.argsort(-flat, kind="stable")
    num_usable = min(int(np.count_nonzero(flat)), len(times_s) - 1 - num_forced)
    emitted = np.empty(num_usable + 1)
    emitted[0] = base_emitted
    np.cumsum(flat[order[:num_usable]], out=emitted[1:])
    emitted[1:] += base_emitted
    rates = emitted / (times_s[num_forced : num_forced + num_usable + 1] + sunk_s)
    best = int(rates.argmax())
    if rates[best] <= (1.0 + MIN_GAIN) * rates[0]:
        best = 0
    owners = order[:best] // width
    return Choice(
        np.bincount(owners, minlength=num_drafts).tolist(),
        best,
        float(emitted[best]),
        float(rates[best]),
        base_emitted / float(times_s[num_forced]),
    )


def _choose_count(
    survivals: list[float], base_emitted: float, times_s: FloatArray, num_forced: int, sunk_s: float
) -> Choice:
    """The same for one draft: on a few numbers, NumPy takes longer than the choice may."""
    seconds = times_s[num_forced : num_forced + len(survivals) + 1].tolist()
    base_rate = base_emitted / (seconds[0] + sunk_s)
    best, best_emitted, best_rate = 0, base_emitted, base_rate
    emitted = base_emitted
    for count, (survival, step_s) in enumerate(zip(survivals, seconds[1:], strict=False), 1):
        if survival == 0.0:
            break
        emitted += survival
        rate = emitted / (step_s + sunk_s)
        if rate > best_rate:
            best, best_emitted, best_rate = count, emitted, rate
    if best_rate <= (1.0 + MIN_GAIN) * base_rate:
        best, best_emitted, best_rate = 0, base_emitted, base_rate
    return Choice([best], best, best_emitted, best_rate, base_emitted / seconds[0])


def rates_by_depth(
    profiles: FloatArray,  # (P, K): survivals of recent drafts of full depth
    num_sequences: int,
    base_emitted: float,
    num_other_drafted: int,
    times_s: FloatArray,
    draft_times_s: FloatArray,  # (K + 1,) for num_sequences
    first_depth: int = 1,
) -> FloatArray:
    """Expected emitted tokens per second if `num_sequences` are drafted for, by depth 0 … K; 0
    for those between 0 and first_depth.

    Recent drafts stand for those to come: groups of num_sequences of them are put through the
    choice of what to verify, because that is what makes a deep draft pay: of a draft that looks
    bad nothing is verified.
    """
    num_profiles, max_depth = profiles.shape
    if num_sequences > num_profiles:
        profiles = np.resize(profiles, (num_sequences, max_depth))
        num_profiles = num_sequences
    num_groups = num_profiles // num_sequences
    groups = profiles[: num_groups * num_sequences].reshape(num_groups, num_sequences, max_depth)
    rates = np.zeros(max_depth + 1)
    first = min(num_other_drafted, len(times_s) - 1)
    rates[0] = base_emitted / times_s[first]
    room = len(times_s) - 1 - first
    for depth in range(first_depth, max_depth + 1):
        num_usable = min(num_sequences * depth, room)
        drafted = groups[:, :, :depth].reshape(num_groups, -1)
        seconds = times_s[first : first + num_usable + 1] + draft_times_s[depth]
        rates[depth] = rate_of_groups(drafted, base_emitted, seconds)
    return rates


def rate_of_groups(
    survivals: FloatArray,  # (G, drafted tokens)
    base_emitted: float,
    seconds: FloatArray,  # (verified tokens + 1,), or (G, verified tokens + 1)
) -> float:
    """Expected emitted tokens per second if of each group is verified what pays."""
    num_groups, num_usable = len(survivals), seconds.shape[-1] - 1
    emitted = np.full((num_groups, num_usable + 1), float(base_emitted))
    best_first = -np.sort(-survivals, axis=1)[:, :num_usable]
    emitted[:, 1:] += np.cumsum(best_first, axis=1)
    seconds = np.broadcast_to(seconds, emitted.shape)
    chosen = np.arange(num_groups), (emitted / seconds).argmax(axis=1)
    return float(emitted[chosen].sum() / seconds[chosen].sum())


def keep_or_change(rates: FloatArray, current: int, margin: float) -> int:
    """Return the depth of the highest rate, or the current one unless that is clearly better.

    Depth 0 is returned to without a margin: where it is a close call, a draft costs time for
    nothing.
    """
    best = int(rates.argmax())
    current = min(current, len(rates) - 1)
    is_better = best == 0 or rates[best] > (1.0 + margin) * rates[current]
    return best if is_better else current
