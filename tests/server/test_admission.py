"""Admission decides from numbers alone."""

from server.admission import Admit, Limits, Reject, admit

LIMITS = Limits(max_sequences=4, max_queue=6)


def test_the_last_place_is_given_and_none_beyond_it() -> None:
    assert admit(9, 1, 1.0, LIMITS) == Admit()
    assert admit(0, 10, 1.0, LIMITS) == Admit()
    assert isinstance(admit(10, 1, 1.0, LIMITS), Reject)
    assert isinstance(admit(9, 2, 1.0, LIMITS), Reject)


def test_what_never_fits_is_not_asked_to_come_again() -> None:
    assert admit(0, 11, 1.0, LIMITS) == Reject(400, None)


def test_the_time_to_wait_grows_with_what_must_end_first() -> None:
    waits = []
    for num_new in (1, 4, 8):
        decision = admit(10, num_new, 2.0, LIMITS)
        assert isinstance(decision, Reject)
        assert decision.status == 429
        waits.append(decision.retry_after_s)
    assert waits == [1, 2, 4]
    assert admit(10, 1, 1e9, LIMITS) == Reject(429, 60)
