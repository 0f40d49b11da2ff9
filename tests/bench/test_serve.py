"""bench.serve against a server that fakes known timings, counts and failures."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from bench import serve
from bench.client import Outcome
from bench.prompts import PromptSource
from bench.summary import percentile, summarize
from tests.bench.background import serving

FIRST_TOKEN_S = 0.10
GAP_S = 0.03


class FakeServer:
    """Streams `max_tokens` tokens with fixed delays, `tokens_per_chunk` in each chunk."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.authorizations: list[str | None] = []
        self.peers: list[tuple[str, int]] = []
        self.gives_usage = True
        self.refuses_stream_options = False
        self.tokens_per_chunk = 1
        self.failing_requests: set[int] = set()
        self.breaks_streams = False
        self.in_flight = 0
        self.most_in_flight = 0
        self.url = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.authorizations.append(request.headers.get("Authorization"))
        assert request.transport is not None
        self.peers.append(request.transport.get_extra_info("peername"))
        if self.refuses_stream_options and "stream_options" in body:
            return web.json_response({"error": {"message": "unknown field"}}, status=400)
        self.bodies.append(body)
        if len(self.bodies) in self.failing_requests:
            return web.json_response({"error": {"message": "queue full"}}, status=429)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self.stream(request, body)
        finally:
            self.in_flight -= 1

    async def stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        chat = request.path.endswith("/chat/completions")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)

        async def send(chunk: dict[str, Any]) -> None:
            await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")

        if chat:  # a role without text is no token
            await send({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        await asyncio.sleep(FIRST_TOKEN_S)
        for index in range(0, body["max_tokens"], self.tokens_per_chunk):
            if index:
                await asyncio.sleep(GAP_S)
            text = "x " * self.tokens_per_chunk
            await send({"choices": [{"delta": {"content": text}} if chat else {"text": text}]})
        if self.breaks_streams:
            return response
        await send({"choices": [{"text": "", "delta": {}, "finish_reason": "length"}]})
        if self.gives_usage:
            prompt = body["messages"][0]["content"] if chat else body["prompt"]
            # Two tokens a word, and ten of a template.
            usage = {
                "prompt_tokens": 10 + 2 * len(prompt.split()),
                "completion_tokens": body["max_tokens"],
                "prompt_tokens_details": {"cached_tokens": 4},
            }
            await send({"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    app = web.Application()
    app.router.add_post("/v1/completions", fake.handle)
    app.router.add_post("/v1/chat/completions", fake.handle)
    with serving(app) as fake.url:
        yield fake


def measure(server: FakeServer, tmp_path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    path = tmp_path / "figures.json"
    code = serve.main(["--url", server.url, "--model", "m", "--json", str(path), *options])
    return code, json.loads(path.read_text())


SMALL = ("--concurrency", "1", "--requests-per-level", "2", "--warm-up", "0")


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_reports_the_timings_that_the_server_has(
    server: FakeServer, tmp_path: Path, endpoint: str
) -> None:
    code, document = measure(
        server, tmp_path, *SMALL, "--output-tokens", "5", "--endpoint", endpoint
    )
    assert code == 0
    level = document["levels"][0]
    assert level["num_requests"] == 2
    assert level["output_tokens"] == 10
    assert level["ttft"]["p50_ms"] == pytest.approx(1e3 * FIRST_TOKEN_S, abs=25)
    assert level["itl"]["p50_ms"] == pytest.approx(1e3 * GAP_S, abs=10)
    assert level["tpot"]["p50_ms"] == pytest.approx(1e3 * GAP_S, abs=10)
    seconds = FIRST_TOKEN_S + 4 * GAP_S
    assert level["end_to_end"]["p50_ms"] == pytest.approx(1e3 * seconds, abs=60)
    assert level["output_tokens_per_s"] == pytest.approx(5 / seconds, rel=0.25)
    assert level["mean_cached_tokens"] == 4


def test_keeps_the_wanted_number_of_requests_in_flight(server: FakeServer, tmp_path: Path) -> None:
    code, document = measure(
        server, tmp_path, "--concurrency", "3", "--output-tokens", "3", "--warm-up", "0"
    )
    assert code == 0
    assert server.most_in_flight == 3
    level = document["levels"][0]
    assert level["num_requests"] == 12
    assert level["output_tokens_per_s"] == pytest.approx(
        3 * 3 / (FIRST_TOKEN_S + 2 * GAP_S), rel=0.3
    )


def test_a_chunk_of_several_tokens_is_one_gap_but_counts_in_tpot(
    server: FakeServer, tmp_path: Path
) -> None:
    server.tokens_per_chunk = 2
    _, document = measure(server, tmp_path, *SMALL, "--output-tokens", "6")
    level = document["levels"][0]
    assert level["output_tokens"] == 12
    assert level["itl"]["p50_ms"] == pytest.approx(1e3 * GAP_S, abs=10)
    assert level["tpot"]["p50_ms"] == pytest.approx(1e3 * 2 * GAP_S / 5, abs=6)


def test_prompts_have_about_the_wanted_tokens_whatever_a_word_costs(
    server: FakeServer, tmp_path: Path
) -> None:
    options = (*SMALL, "--output-tokens", "1", "--prompt-tokens", "90")
    _, document = measure(server, tmp_path, *options)
    assert document["levels"][0]["mean_prompt_tokens"] == pytest.approx(90, abs=2)


def test_counts_chunks_where_the_server_gives_no_usage(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.gives_usage = False
    server.refuses_stream_options = True
    code, document = measure(server, tmp_path, *SMALL, "--output-tokens", "4")
    assert code == 0
    level = document["levels"][0]
    assert (level["output_tokens"], level["tokens_from_usage"]) == (8, False)
    assert level["mean_prompt_tokens"] is None
    assert all("stream_options" not in body for body in server.bodies)
    assert "counted as chunks" in capsys.readouterr().out


def test_sends_fields_beyond_openais_only_when_asked(server: FakeServer, tmp_path: Path) -> None:
    measure(server, tmp_path, *SMALL, "--output-tokens", "1")
    known = {"model", "prompt", "max_tokens", "temperature", "stream", "stream_options"}
    assert all(set(body) == known for body in server.bodies)
    server.bodies.clear()
    measure(
        server,
        tmp_path,
        *SMALL,
        *("--output-tokens", "1", "--ignore-eos", "--api-key", "secret", "--extra", '{"top_k": 3}'),
    )
    assert all(body["ignore_eos"] is True and body["top_k"] == 3 for body in server.bodies)
    assert server.authorizations[-1] == "Bearer secret"


def test_failed_requests_are_counted_named_and_kept_out_of_the_figures(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.failing_requests = {3}  # after the two probes: the first of the level
    code, document = measure(server, tmp_path, *SMALL, "--output-tokens", "2")
    level = document["levels"][0]
    assert code == 1
    assert (level["num_errors"], level["output_tokens"]) == (1, 2)
    assert "HTTP 429" in level["errors"][0]
    assert "queue full" in capsys.readouterr().err


def test_a_stream_that_ends_early_is_an_error(server: FakeServer, tmp_path: Path) -> None:
    server.breaks_streams = True
    code, document = measure(server, tmp_path, *SMALL, "--output-tokens", "2")
    assert code == 1
    assert document["levels"][0]["num_errors"] == 2


def test_every_request_has_a_connection_of_its_own(server: FakeServer, tmp_path: Path) -> None:
    code, _ = measure(server, tmp_path, *SMALL, "--output-tokens", "1")
    assert code == 0
    assert len(set(server.peers)) == len(server.peers) == 4


def test_a_server_that_is_not_there_is_exit_code_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert serve.main(["--url", "http://127.0.0.1:9/v1", "--model", "m"]) == 2
    assert "does not answer" in capsys.readouterr().err


def test_prompts_are_the_same_for_a_seed_and_begin_differently(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("one two three four five")
    for text in (None, path):
        prompts = [PromptSource(text, 0).prompt(index, 20) for index in range(50)]
        assert prompts == [PromptSource(text, 0).prompt(index, 20) for index in range(50)]
        assert prompts[0] != PromptSource(text, 1).prompt(0, 20)
        assert {len(prompt.split()) for prompt in prompts} == {20}
        assert len({prompt.split()[0] for prompt in prompts}) == 50


def test_contexts_are_measured_with_one_stream_each_and_drawn_beside_the_levels(
    server: FakeServer, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "chart.png"
    code, document = measure(
        server,
        tmp_path,
        *("--concurrency", "1,2", "--requests-per-level", "2", "--output-tokens", "2"),
        *("--contexts", "50,400", "--plot", str(plot)),
    )
    assert code == 0
    assert [level["concurrency"] for level in document["levels"]] == [1, 2]
    contexts = document["contexts"]
    assert [level["concurrency"] for level in contexts] == [1, 1]
    assert [level["mean_prompt_tokens"] for level in contexts] == pytest.approx([50, 400], abs=2)
    prompts = [body["prompt"] for body in server.bodies]
    assert len(set(prompts)) == len(prompts), "a prompt that was sent before may be cached"
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_percentiles_are_interpolated() -> None:
    assert percentile([5.0], 0.99) == 5.0
    assert percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert percentile([float(i) for i in range(101)], 0.99) == 99.0


def test_wall_time_runs_from_the_first_request_to_the_last_end() -> None:
    outcomes = [
        Outcome(sent_at_s=10.0, end_to_end_s=2.0, chunk_times_s=(1.0, 2.0), output_tokens=2),
        Outcome(sent_at_s=11.0, end_to_end_s=4.0, chunk_times_s=(1.0, 4.0), output_tokens=8),
    ]
    level = summarize(2, outcomes)
    assert level.wall_s == 5.0
    assert level.output_tokens_per_s == 2.0
