"""How much time may go into drafts that are not expected to pay, so that a change is noticed."""

TIME_SHARE = 0.005  # of all step time, at most
MAX_CREDIT_S = 0.03


class ProbeCredit:
    """Grows with the time of steps; the policy pays from it for each probe."""

    def __init__(self) -> None:
        self._credit_s = MAX_CREDIT_S  # at first much is to be learned

    @property
    def is_left(self) -> bool:
        return self._credit_s > 0.0

    def earn(self, step_s: float) -> None:
        """Take in the time of a step."""
        self._credit_s = min(self._credit_s + TIME_SHARE * step_s, MAX_CREDIT_S)

    def pay(self, spent_s: float) -> None:
        """Charge what a probe took, not what it was expected to: that may be far too much, and
        probes are what shows it."""
        self._credit_s = max(self._credit_s - max(0.0, spent_s), -MAX_CREDIT_S)
