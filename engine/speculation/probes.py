"""How often to look where drafts do not pay, so that a change is noticed: drafts that are verified
though they promise too little, and steps under load that are not looked at at all."""

TIME_SHARE = 0.005  # of all step time, at most, for probes
MAX_CREDIT_S = 0.03
# Under load, after so many steps in which nothing paid, only every fourth step is looked at.
REST_AFTER = 32
REST_TOKENS = 4
LOOK_EVERY = 4


class ProbeCredit:
    """Grows with the time of steps; the policy pays from it for each probe."""

    def __init__(self) -> None:
        self._credit_s = MAX_CREDIT_S  # at first much is to be learned
        self._plain_s: float | None = None  # what the coming step would take without its probe

    @property
    def is_left(self) -> bool:
        return self._credit_s > 0.0

    def begin_step(self) -> None:
        """No probe is in the coming step yet."""
        self._plain_s = None

    def owe(self, plain_s: float) -> None:
        """A probe is: what the step takes beyond `plain_s` is its price."""
        self._plain_s = plain_s

    def end_step(self, step_s: float) -> None:
        """Take in the time of a step: pay for its probe, and earn."""
        if self._plain_s is not None:
            self.pay(step_s - self._plain_s)
        self._credit_s = min(self._credit_s + TIME_SHARE * step_s, MAX_CREDIT_S)

    def pay(self, spent_s: float) -> None:
        """Charge what a probe took, not what it was expected to: that may be far too much, and
        probes are what shows it."""
        self._credit_s = max(self._credit_s - max(0.0, spent_s), -MAX_CREDIT_S)


class Rest:
    """From drafting, under a load where that has not paid lately."""

    def __init__(self) -> None:
        self._num_calls = 0
        self._num_unpaid = 0  # steps in a row in which nothing was verified
        self._tokens = 0  # of the last of them, without drafts

    def is_on(self, base_tokens: int) -> bool:
        """Whether this step, of base_tokens without drafts, is not worth a look."""
        self._num_calls += 1
        if self._num_unpaid < REST_AFTER or base_tokens < REST_TOKENS:
            return False
        is_alike = abs(base_tokens - self._tokens) <= REST_TOKENS // 2
        return is_alike and self._num_calls % LOOK_EVERY != 0

    def observe(self, base_tokens: int, num_verified: int) -> None:
        """Take in how many drafts a step's choice verifies."""
        self._num_unpaid = 0 if num_verified else self._num_unpaid + 1
        self._tokens = base_tokens
