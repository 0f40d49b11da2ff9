"""Priorities in the queue: who goes first, who is preempted, and that nobody starves."""

from engine.types import PRIORITY_STEP_S
from tests.engine.test_scheduler import Bench


def order_of_first_tokens(bench: Bench) -> list[int]:
    """Run to the end; ids in the order in which they got their first token."""
    order: list[int] = []
    while bench.scheduler.has_work:
        bench.step()
        order += [
            seq_id for seq_id, events in bench.events.items() if events and seq_id not in order
        ]
    return order


def test_the_queue_is_in_order_of_priority_then_of_arrival() -> None:
    bench = Bench(max_sequences=1)
    for priority in (2, 0, -1, 2, 0):
        bench.submit([priority + 5, 1, 2], priority=priority)
    assert order_of_first_tokens(bench) == [2, 1, 4, 0, 3]


def test_a_sequence_of_low_priority_is_preempted_first_and_keeps_its_text() -> None:
    bench = Bench(num_blocks=12, max_sequences=3)
    low = bench.submit(range(1, 14), priority=5, max_tokens=20, ignore_eos=True)
    bench.step()
    high = bench.submit(range(20, 33), priority=0, max_tokens=20, ignore_eos=True)
    while not bench.finish_reason(high):
        bench.step()
    assert not bench.finish_reason(low)  # though it came first
    bench.run()
    assert bench.scheduler.load().num_preemptions > 0
    bench.assert_texts()


def test_low_priority_does_not_starve_under_an_endless_stream_of_high() -> None:
    bench = Bench(max_sequences=1)
    low = bench.submit([1, 2, 3], priority=10, arrived_at_s=0.0)
    now_s = 0.0
    while not bench.events[low]:
        # Every second two of them come, and one is computed.
        bench.submit([int(now_s) % 40, 4, 5], priority=0, arrived_at_s=now_s, max_tokens=1)
        bench.submit([int(now_s) % 40, 6, 5], priority=0, arrived_at_s=now_s, max_tokens=1)
        bench.step()
        now_s += 1.0
        assert now_s < 10 * PRIORITY_STEP_S * 3
    # Only those that came within ten steps of priority have gone before it.
    assert now_s >= 10 * PRIORITY_STEP_S
