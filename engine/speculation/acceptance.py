"""How likely a drafted token is to be accepted, learned from what the target emitted.

One `Acceptance` for each drafter: running counts for each bucket of its tokens, which forget, and
a correction for each sequence, since some texts are easier than others. The policy owns them.
"""

from collections.abc import Sequence as Row

import numpy as np
from numpy.typing import NDArray

from engine.speculation.drafter import Draft, Drafter

FloatArray = NDArray[np.float64]

PRIOR_TRIALS = 12.0  # that a prior counts as at first; it is forgotten like them
MEMORY_TRIALS = 120.0  # trials after which an old one counts 1 / e
SEQUENCE_MEMORY_TRIALS = 24.0
SEQUENCE_PRIOR_TRIALS = 6.0
_KEEP = 1.0 - 1.0 / MEMORY_TRIALS
_SEQUENCE_KEEP = 1.0 - 1.0 / SEQUENCE_MEMORY_TRIALS


class _SequenceRecord:
    """What one sequence's drafts met against what was expected of them."""

    __slots__ = ("accepted", "expected_accepted", "expected_rejected", "odds", "rejected")

    def __init__(self) -> None:
        self.accepted = 0.0
        self.rejected = 0.0
        self.expected_accepted = 0.0
        self.expected_rejected = 0.0
        self.odds = 1.0  # multiplies the odds of the bucket's own acceptance

    def observe(self, accepted: bool, expected: float) -> None:
        keep = _SEQUENCE_KEEP
        self.accepted = self.accepted * keep + accepted
        self.rejected = self.rejected * keep + (not accepted)
        self.expected_accepted = self.expected_accepted * keep + expected
        self.expected_rejected = self.expected_rejected * keep + (1.0 - expected)
        prior = SEQUENCE_PRIOR_TRIALS
        self.odds = ((self.accepted + prior) / (self.expected_accepted + prior)) * (
            (self.expected_rejected + prior) / (self.rejected + prior)
        )


class Acceptance:
    """Acceptance of one drafter's tokens, each given that those before it were accepted."""

    def __init__(self, drafter: Drafter) -> None:
        self.name = drafter.name
        self.max_drafts = drafter.max_drafts
        self._accepted = [PRIOR_TRIALS * prior for prior in drafter.priors]
        self._trials = [PRIOR_TRIALS] * len(self._accepted)
        # One entry more than buckets: what pads the rows of shorter drafts is never accepted.
        self._pad = len(self._accepted)
        self._probs = np.array([*drafter.priors, 0.0])
        self._prob_list = [*drafter.priors, 0.0]  # the same, for a single draft
        self._sequences: dict[int, _SequenceRecord] = {}
        # By position, for those who want to see it, and for planning before there is a draft.
        priors = drafter.position_priors[: drafter.max_drafts]
        self._position_accepted = [PRIOR_TRIALS * prior for prior in priors]
        self._position_trials = [PRIOR_TRIALS] * len(priors)

    def observe(self, seq_id: int, draft: Draft, num_matched: int, num_known: int) -> None:
        """Take in that the first `num_matched` of the draft's tokens were what the target emitted.

        num_known tokens were emitted: where the draft goes on, the next one was a mismatch if
        num_matched < num_known, and is not known otherwise.
        """
        record = self._sequences.get(seq_id)
        if record is None:
            record = self._sequences[seq_id] = _SequenceRecord()
        num_trials = min(num_matched + 1, num_known, len(draft.token_ids))
        for position in range(num_trials):
            self._count(record, draft.buckets[position], position, position < num_matched)

    def _count(self, record: _SequenceRecord, bucket: int, position: int, accepted: bool) -> None:
        record.observe(accepted, self._prob_list[bucket])
        self._accepted[bucket] = self._accepted[bucket] * _KEEP + accepted
        self._trials[bucket] = self._trials[bucket] * _KEEP + 1.0
        prob = self._accepted[bucket] / self._trials[bucket]
        self._probs[bucket] = self._prob_list[bucket] = prob
        self._position_accepted[position] = self._position_accepted[position] * _KEEP + accepted
        self._position_trials[position] = self._position_trials[position] * _KEEP + 1.0

    def bucket_rows(self, drafts: Row[Draft], width: int) -> NDArray[np.intp]:
        """The drafts' buckets as rows of one length, the first `width` of each: (drafts, width)."""
        padding = [self._pad] * width
        return np.array([(draft.buckets + padding)[:width] for draft in drafts], np.intp)

    def survivals(self, bucket_rows: NDArray[np.intp], odds: FloatArray) -> FloatArray:
        """Probability that each token and all before it are accepted, same shape as the rows.

        `odds` corrects each row, or, where it is a single one, all of them.
        """
        return _survivals(self._probs[bucket_rows], odds)

    def survivals_of(self, seq_id: int, draft: Draft) -> list[float]:
        """The same for one draft: on so few numbers loops are quicker."""
        odds = self.odds_of(seq_id)
        probs, survivals, survival = self._prob_list, [], 1.0
        for bucket in draft.buckets:
            prob = probs[bucket]
            survival *= prob * odds / (1.0 + prob * (odds - 1.0))
            survivals.append(survival)
        return survivals

    def typical_survivals(self, odds: float) -> FloatArray:
        """Survival by position before there is a draft: (1, max_drafts)."""
        return _survivals(np.array([self.by_position()]), np.array([odds]))

    def odds(self, seq_ids: Row[int]) -> FloatArray:
        """What multiplies each sequence's odds of acceptance; 1 where nothing is known."""
        records = self._sequences
        return np.array([records[seq_id].odds if seq_id in records else 1.0 for seq_id in seq_ids])

    def odds_of(self, seq_id: int) -> float:
        """The same of one sequence."""
        record = self._sequences.get(seq_id)
        return 1.0 if record is None else record.odds

    def by_position(self) -> list[float]:
        """Conditional acceptance by position, over all buckets."""
        return [
            accepted / trials
            for accepted, trials in zip(self._position_accepted, self._position_trials, strict=True)
        ]

    def keep_only(self, seq_ids: set[int]) -> None:
        """Forget sequences that are not among these."""
        self._sequences = {
            seq_id: record for seq_id, record in self._sequences.items() if seq_id in seq_ids
        }


def _survivals(probs: FloatArray, odds: FloatArray) -> FloatArray:
    column = odds[:, None]
    return np.multiply.accumulate(probs * column / (1.0 + probs * (column - 1.0)), axis=1)
