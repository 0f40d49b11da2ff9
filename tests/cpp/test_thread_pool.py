"""How the core's threads share a processor with others: they offer it between their units."""

import hashlib
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable

import fulcrum_core
import pytest

NUM_ROUNDS = 3
NUM_WAKE_UPS = 25
SLEEP_S = 0.002


def wake_up_delay_s(work: Callable[[], object]) -> float:
    """How late a thread that preempts nobody wakes up on a processor that does `work`: median."""
    here = min(os.sched_getaffinity(0))
    has_ended = threading.Event()
    delays_s: list[float] = []

    def keep_busy() -> None:
        os.sched_setaffinity(0, {here})
        while not has_ended.is_set():
            work()

    def wake_up() -> None:
        os.sched_setaffinity(0, {here})
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        for _ in range(NUM_WAKE_UPS):
            began_s = time.perf_counter()
            time.sleep(SLEEP_S)
            delays_s.append(time.perf_counter() - began_s - SLEEP_S)
        has_ended.set()

    threads = [threading.Thread(target=target) for target in (keep_busy, wake_up)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statistics.median(delays_s)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's scheduling policies")
def test_others_on_a_processor_get_their_turn_between_the_units_of_a_long_job() -> None:
    pool = fulcrum_core.ThreadPool(1)
    bench = fulcrum_core.LinearBench("portable", "int8", 64, 64, 1, 1)
    beside_hash_s, beside_pool_s = [], []
    for _ in range(NUM_ROUNDS):
        # It takes about 20 ms and gives nobody a turn.
        beside_hash_s.append(
            wake_up_delay_s(lambda: hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000))
        )
        beside_pool_s.append(wake_up_delay_s(lambda: bench.time_gemm(pool, 1, 10_000)))
    usual_s = statistics.median(beside_hash_s)
    if usual_s < 5e-4:
        pytest.skip("here a thread that wakes up gets its turn at once")
    assert min(beside_pool_s) < usual_s / 2, (beside_hash_s, beside_pool_s)
