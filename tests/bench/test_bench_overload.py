"""What bench.overload counts, and its own small client against a whole server."""

import asyncio
import os
import sys
from typing import Any

import pytest

from bench.client import Outcome, Target
from bench.load_loops import Stretch
from bench.loopback import LoopbackClient
from bench.overload import goodput_shares, summarize, waiting_for_turns
from server.connection import CONNECTIONS
from tests.server.fake_engine import MODEL, FakeEngine, run, serve, wait_for


def outcome(sent_at_s: float, times_s: list[float], **changes: Any) -> Outcome:
    fields: dict[str, Any] = {
        "sent_at_s": sent_at_s,
        "end_to_end_s": times_s[-1] if times_s else 0.1,
        "chunk_times_s": tuple(times_s),
        "output_tokens": 2 * len(times_s),
    }
    return Outcome(**(fields | changes))


def stretch(goodput_tok_s: float) -> Stretch:
    """Ten seconds of that many output tokens each."""
    one = outcome(0.0, [5.0], output_tokens=round(10 * goodput_tok_s))
    return Stretch(0.0, 10.0, [one], rss_bytes=[0])


def test_tokens_count_where_they_arrive_within_the_window_of_complete_answers() -> None:
    seen = Stretch(10.0, 12.0, [outcome(9.0, [0.5, 1.5, 2.5, 3.5])])  # at 9.5, 10.5, 11.5, 12.5
    assert seen.goodput_tok_s == 2.0  # two of four chunks with two tokens each, in two seconds
    seen.retries.append(outcome(10.0, [1.0]))
    assert seen.goodput_tok_s == 3.0
    seen.first.append(outcome(10.0, [1.0], error="broken"))
    assert seen.goodput_tok_s == 3.0


def test_each_overload_is_held_against_its_neighbours_and_the_median_counts() -> None:
    baselines = [stretch(tok_s) for tok_s in (100, 120, 80, 100)]
    overloads = [stretch(tok_s) for tok_s in (110, 50, 81)]
    assert goodput_shares(baselines, overloads) == pytest.approx([1.0, 0.5, 0.9])
    seen = summarize({}, baselines, overloads)
    assert seen["goodput_share"] == pytest.approx(0.9)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's scheduling policies")
def test_clients_preempt_nobody_while_they_load_a_server_and_not_beyond() -> None:
    before = os.sched_getscheduler(0)
    assert before != os.SCHED_BATCH
    with waiting_for_turns():
        assert os.sched_getscheduler(0) == os.SCHED_BATCH
    assert os.sched_getscheduler(0) == before


def test_the_small_client_reads_streams_and_refusals_on_connections_that_it_keeps() -> None:
    async def main() -> None:
        engine = FakeEngine(max_sequences=1)
        async with serve(engine, max_sequences=1, max_queue=0) as served:
            target = Target(url=f"{served.url}/v1", model=MODEL, max_tokens=5)
            client = LoopbackClient(target, served.port)
            for _ in range(2):
                answer = await client.complete("hi")
                assert (answer.status, answer.error, answer.output_tokens) == (200, None, 5)
                assert answer.text.startswith("Hello")
                assert 0 < answer.first_chunk_s <= answer.end_to_end_s
                await served.wait_idle()
            engine.hold()
            running = asyncio.create_task(client.complete("hi"))
            await wait_for(lambda: len(engine.submits) == 3)
            refused = await client.complete("hello")
            assert refused.status == 429
            assert refused.retry_after_s is not None
            assert refused.error is not None
            assert "queue_full" in refused.error
            engine.hold(False)
            assert (await running).error is None
            assert len(served.app[CONNECTIONS]) == 2
            client.close()

    run(main())


def test_a_connection_that_breaks_is_an_error_and_no_hang() -> None:
    async def main() -> None:
        async def drop(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            writer.close()

        server = await asyncio.start_server(drop, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        client = LoopbackClient(Target(url=f"http://127.0.0.1:{port}/v1", model=MODEL), port)
        async with asyncio.timeout(5):
            assert (await client.complete("hi")).error == "the stream ended without data: [DONE]"
        server.close()

    run(main())
