"""bench.speculate against a server that fakes how much each mode gains, and its texts."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from bench import speculate
from tests.bench.background import serving

STEP_S = 0.01
NUM_TOKENS = 8
TOKENS_PER_STEP = {"off": 1, "ngram": 2, "mtp": 1, "auto": 4}


class FakeServer:
    """Streams NUM_TOKENS tokens, as many in a step as the mode that is asked for makes."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.wrong_modes: set[str] = set()
        self.gives_stats = True
        self.in_flight = 0
        self.most_in_flight = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self.stream(request, body)
        finally:
            self.in_flight -= 1

    async def stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        mode = body["fulcrum"]["speculation"]
        size = TOKENS_PER_STEP[mode]
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)

        async def send(chunk: dict[str, Any]) -> None:
            await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")

        word = "wrong " if mode in self.wrong_modes else "x "
        await send({"choices": [{"delta": {"content": word}}]})
        num_steps, left = 1, NUM_TOKENS - 1
        while left > 0:
            await asyncio.sleep(STEP_S)
            await send({"choices": [{"delta": {"content": word * min(size, left)}}]})
            left -= size
            num_steps += 1
        usage: dict[str, Any] = {"prompt_tokens": 5, "completion_tokens": NUM_TOKENS}
        if self.gives_stats:
            usage["fulcrum"] = {
                "num_steps": num_steps,
                "drafted_tokens": 2 * (size - 1) * num_steps,
                "accepted_tokens": (size - 1) * num_steps,
                "accepted_by_position": [num_steps] * (size - 1),
            }
        await send({"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", fake.handle)
    with serving(app) as fake.url:
        yield fake


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = [
        {"question_id": i, "category": category, "turns": [f"prompt {i}", "and then?"]}
        for i, category in enumerate(["writing", "qa", "qa", "roleplay", "qa"])
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def measure(
    server: FakeServer, prompts: Path, tmp_path: Path, *options: str
) -> tuple[int, dict[str, Any]]:
    path = tmp_path / "figures.json"
    arguments = ["--url", server.url, "--model", "m", "--prompts", str(prompts)]
    code = speculate.main([*arguments, "--json", str(path), "--warm-up", "0", *options])
    return code, json.loads(path.read_text()) if path.exists() else {}


def test_reports_what_each_mode_gains_in_each_group(
    server: FakeServer, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, document = measure(server, prompts, tmp_path)
    assert code == 0
    modes = {mode["mode"]: mode for mode in document["modes"]}
    assert list(modes) == ["off", "ngram", "mtp", "auto"]
    assert list(modes["auto"]["groups"]) == ["mt_bench", "qa", "all"]
    assert [group["num_prompts"] for group in modes["auto"]["groups"].values()] == [2, 3, 5]
    for mode, group in ((mode, group) for mode in modes for group in ("mt_bench", "qa", "all")):
        figures = modes[mode]["groups"][group]
        size = TOKENS_PER_STEP[mode]
        num_steps = 1 + -(-(NUM_TOKENS - 1) // size)
        assert figures["tokens_per_step"] == pytest.approx(NUM_TOKENS / num_steps)
        assert figures["speedup"] == pytest.approx((NUM_TOKENS - 1) / (num_steps - 1), rel=0.3)
        assert figures["accepted_by_position"] == [1.0] * (size - 1)
        assert modes[mode]["different_texts"] == []
    output = capsys.readouterr().out
    assert "auto: 5 of 5 texts equal to off" in output


def test_modes_take_turns_and_each_goes_first(
    server: FakeServer, prompts: Path, tmp_path: Path
) -> None:
    measure(server, prompts, tmp_path, "--modes", "ngram,auto", "--per-group", "2")
    asked = [
        (body["messages"][0]["content"], body["fulcrum"]["speculation"]) for body in server.bodies
    ]
    # Groups take turns as well; of two turns the first is asked.
    assert asked == [
        *(("prompt 0", mode) for mode in ("off", "ngram", "auto")),
        *(("prompt 1", mode) for mode in ("ngram", "auto", "off")),
        *(("prompt 3", mode) for mode in ("auto", "off", "ngram")),
        *(("prompt 2", mode) for mode in ("off", "ngram", "auto")),
    ]
    assert all(body["fulcrum"]["usage"] for body in server.bodies)


def test_several_streams_ask_every_prompt_in_every_mode(
    server: FakeServer, prompts: Path, tmp_path: Path
) -> None:
    code, document = measure(server, prompts, tmp_path, "--modes", "auto", "--streams", "2")
    assert code == 0
    assert server.most_in_flight == 2
    asked = [
        (body["fulcrum"]["speculation"], body["messages"][0]["content"]) for body in server.bodies
    ]
    assert sorted(asked) == [(mode, f"prompt {i}") for mode in ("auto", "off") for i in range(5)]
    assert document["modes"][1]["groups"]["all"]["num_prompts"] == 5


def test_a_text_that_differs_is_named_and_is_exit_code_1(
    server: FakeServer, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.wrong_modes = {"mtp"}
    code, document = measure(server, prompts, tmp_path)
    assert code == 1
    different = {mode["mode"]: mode["different_texts"] for mode in document["modes"]}
    assert different == {"off": [], "ngram": [], "mtp": [0, 1, 2, 3, 4], "auto": []}
    captured = capsys.readouterr()
    assert "mtp: 0 of 5 texts equal to off" in captured.out
    assert "texts differ" in captured.err


def test_the_sweep_compares_off_and_auto_under_load_and_all_is_drawn(
    server: FakeServer, prompts: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "chart.png"
    options = ("--modes", "auto", "--sweep", "1,4", "--plot", str(plot))
    code, document = measure(server, prompts, tmp_path, *options)
    assert code == 0
    assert server.most_in_flight == 4
    assert [level["streams"] for level in document["sweep"]] == [1, 4]
    for level in document["sweep"]:
        assert level["ratio"] > 1.5
        assert level["tokens_per_step"] == pytest.approx(8 / 3)
        assert [len(rates) for rates in level["tokens_per_s"].values()] == [2, 2]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_server_without_statistics_is_exit_code_2(
    server: FakeServer, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.gives_stats = False
    code, _ = measure(server, prompts, tmp_path)
    assert code == 2
    assert "no statistics" in capsys.readouterr().err


def test_prompts_that_cannot_be_read_are_exit_code_2(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    assert measure(server, empty, tmp_path)[0] == 2
    assert "holds no prompts" in capsys.readouterr().err
    assert measure(server, tmp_path / "missing.jsonl", tmp_path)[0] == 2
