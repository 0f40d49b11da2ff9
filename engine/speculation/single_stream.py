"""A step that decodes one sequence and nothing else, while it is decided on.

The policy fills a `SingleStep` where it would fill a `StepDrafts` for many. Most steps of a server
on one machine are of this kind, and Python between them runs from cold caches: so the numbers are
plain ones, a handful of them.
"""

from engine.speculation.candidates import PRICE_SPAN, Candidate
from engine.speculation.drafter import NO_DRAFT, Draft
from engine.speculation.plan import MIN_GAIN, Choice

RATE_MEMORY = 64.0  # steps


class LongRunRate:
    """Expected tokens per second over recent steps: what the time of a step is worth.

    Steps of one sequence differ: some have a long draft that is surely right, most have none. What
    makes all of them together fastest is not the highest rate in each, but to verify whatever
    brings more than its time would have brought elsewhere (Dinkelbach, On Nonlinear Fractional
    Programming, 1967).
    """

    def __init__(self) -> None:
        self._emitted = self._seconds = 0.0

    def observe(self, emitted: float, seconds: float) -> None:
        """Take in what a step is expected to emit, and to take."""
        self._emitted += emitted - self._emitted / RATE_MEMORY
        self._seconds += seconds - self._seconds / RATE_MEMORY

    def per_s(self, plain_s: float) -> float:
        """At least that of steps without drafts, of `plain_s`."""
        plain = 1.0 / plain_s
        return max(plain, self._emitted / self._seconds) if self._seconds else plain


class SingleStep:
    """The best draft so far, by its value: tokens beyond what their verification's time is worth"""

    __slots__ = (
        "candidate",
        "count",
        "draft",
        "emitted",
        "free_draft",
        "rate",
        "seconds",
        "seq_id",
        "sunk_s",
        "value",
    )

    def __init__(self, candidate: Candidate, seconds: list[float], rate: float) -> None:
        """`seconds` is the time of a step by its number of tokens, `rate` the long-run one."""
        self.candidate = candidate
        self.seq_id = candidate.sequence.seq_id
        self.seconds = seconds
        self.rate = rate
        self.draft = NO_DRAFT
        self.free_draft = NO_DRAFT  # the last one that cost nothing
        self.count = 0  # of its tokens, to be verified
        self.emitted = 1.0
        self.value = MIN_GAIN
        self.sunk_s = 0.0  # spent on drafting

    def limit(self, most: int) -> int:
        return min(most, self.candidate.max_drafts, len(self.seconds) - 2)

    @property
    def token_price(self) -> float:
        """What one more token in the step costs, in tokens."""
        seconds = self.seconds
        span = min(PRICE_SPAN, len(seconds) - 2)
        return self.rate * (seconds[1 + span] - seconds[1]) / span if span > 0 else 1.0

    def consider(self, draft: Draft, survivals: list[float]) -> None:
        """Take as much of a draft as pays, where it is worth more than what is there."""
        value, emitted = 0.0, 1.0
        rate, seconds = self.rate, self.seconds
        before_s = seconds[1]
        for count, (survival, step_s) in enumerate(zip(survivals, seconds[2:], strict=False), 1):
            value += survival - rate * (step_s - before_s)
            emitted += survival
            before_s = step_s
            if value > self.value:
                self.draft, self.count, self.value, self.emitted = draft, count, value, emitted

    def force(self, draft: Draft, survivals: list[float], count: int) -> None:
        """Verify so much of a draft whatever it promises."""
        self.draft, self.count, self.emitted = draft, count, 1.0 + sum(survivals[:count])

    @property
    def expected_s(self) -> float:
        return self.seconds[1 + self.count] + self.sunk_s

    def choice(self) -> Choice:
        """What is verified, and what that promises."""
        rate, plain_rate = self.emitted / self.expected_s, 1.0 / self.seconds[1]
        return Choice([self.count], self.count, self.emitted, rate, plain_rate)
