"""The control plane over HTTP: who may ask, what is refused, and what the answers hold."""

import asyncio
import re
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from engine.config import EngineConfig
from engine.deployment import Deployment, deploy
from engine.planning import preview
from engine.planning.calibration import Calibration, Timing
from server.control import OPTIMIZER, Optimizer
from server.http import CLIENT, MODEL
from tests.server.fake_engine import FakeEngine, Served, run, serve

KEY = "secret-key"
APPLY = "/v1/optimizations/apply"
PREVIEW = "/v1/optimizations/preview"
CALIBRATION = Calibration(
    decode={1: Timing(0.01, 0.0), 8: Timing(0.02, 0.0)},
    prefill={128: Timing(0.1, 0.0), 512: Timing(0.4, 0.0)},
    context_s_per_token=0.0,
    prefill_context_s=0.0,
    python_s=1e-4,
    load_average=0.0,
    seconds=1.0,
)


@pytest.fixture(scope="module")
def deployment(default_model_path: Path) -> Deployment:
    return deploy(
        EngineConfig(model=str(default_model_path), kv_memory_bytes=256 << 20, num_threads=1)
    )


@pytest.fixture
def optimizer(deployment: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Optimizer:
    monkeypatch.setenv("FULCRUM_CACHE", str(tmp_path))
    monkeypatch.setattr(preview, "calibrate", lambda *args, **options: CALIBRATION)
    made = Optimizer(deployment, tmp_path / "receipts.jsonl")
    made.attach(FakeEngine())  # type: ignore[arg-type]
    return made


async def _status(served: Served, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    method = "GET" if body is None else "POST"
    async with served.http.request(
        method, served.url + path, json=body, headers=headers
    ) as response:
        return response.status, await response.json()


def _code(answer: Any) -> str:
    return str(answer["error"]["code"])


def test_other_origins_and_other_hosts_may_not_change_anything(optimizer: Optimizer) -> None:
    async def scenario() -> None:
        async with serve(optimizer=optimizer) as served:
            own = f"127.0.0.1:{served.port}"
            for path in (APPLY, PREVIEW):
                for headers, code in (
                    ({"Origin": "http://evil.example"}, "cross_origin"),
                    ({"Origin": "null"}, "cross_origin"),
                    ({"Origin": f"http://127.0.0.1:{served.port + 1}"}, "cross_origin"),
                    ({"Sec-Fetch-Site": "cross-site"}, "cross_origin"),
                    ({"Sec-Fetch-Site": "same-site"}, "cross_origin"),
                    ({"Host": "evil.example"}, "admin_only"),
                    ({"X-Forwarded-For": "203.0.113.9"}, "admin_only"),
                    ({"Forwarded": "for=203.0.113.9"}, "admin_only"),
                ):
                    status, answer = await _status(served, path, {}, **headers)
                    assert (status, _code(answer)) == (403, code), headers
                status, _ = await _status(
                    served, path, {"max_sequences": 0}, Origin=f"http://{own}"
                )
                assert status == 400
            async with served.http.post(
                served.url + APPLY, data="{}", headers={"Content-Type": "text/plain"}
            ) as response:
                assert response.status == 415
            assert served.app[OPTIMIZER].applier().latest() is None

    run(scenario())


def test_only_this_machine_may_ask_where_no_key_is_set(
    optimizer: Optimizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aiohttp.web.BaseRequest, "remote", "203.0.113.9")

    async def scenario() -> None:
        async with serve(optimizer=optimizer) as served:
            status, answer = await _status(served, APPLY, {})
            assert (status, _code(answer)) == (403, "admin_only")
        async with serve(optimizer=optimizer, api_key=KEY) as served:
            status, answer = await _status(served, APPLY, {})
            assert (status, _code(answer)) == (401, "invalid_api_key")
            status, answer = await _status(
                served, PREVIEW, {"max_sequences": 0}, Authorization=f"Bearer {KEY}"
            )
            assert status == 400
            status, answer = await _status(
                served, PREVIEW, {}, Authorization=f"Bearer {KEY}", Origin="http://evil.example"
            )
            assert (status, _code(answer)) == (403, "cross_origin")

    run(scenario())


def test_what_cannot_work_is_a_400_that_says_why(optimizer: Optimizer) -> None:
    cases: list[tuple[dict[str, Any], str, str | None]] = [
        ({"quantization": "int3"}, "choose auto", "quantization"),
        ({"kv_dtype": "fp8"}, "choose auto", "kv_dtype"),
        ({"max_model_len": 9000}, "made for 8192", "max_model_len"),
        ({"kv_memory": "lots"}, "is no size", "kv_memory"),
        ({"speed": 1}, "speed", "speed"),
        ({"max_sequences": "8"}, "max_sequences", "max_sequences"),
    ]

    async def scenario() -> None:
        async with serve(optimizer=optimizer) as served:
            for path in (APPLY, PREVIEW):
                for body, message, param in cases:
                    status, answer = await _status(served, path, body)
                    assert status == 400, (body, answer)
                    assert message in answer["error"]["message"]
                    assert answer["error"]["param"] == param, answer
            status, answer = await _status(served, APPLY, {"kv_memory": "900GiB"})
            assert status == 400
            assert "KV int8 for as many tokens frees" in answer["error"]["message"]
            status, answer = await _status(served, f"{APPLY}/apply-9")
            assert (status, _code(answer)) == (404, "unknown_apply")

    run(scenario())


def test_the_overview_and_the_preview_hold_what_the_page_needs(optimizer: Optimizer) -> None:
    async def scenario() -> None:
        async with serve(optimizer=optimizer) as served:
            status, overview = await _status(served, "/v1/optimizations")
            assert status == 200
            assert overview["today"]["setting"]["quantization"] == "auto"
            assert overview["today"]["memory"]["kv"] == overview["today"]["setting"]["kv_memory"]
            assert [level["name"] for level in overview["levels"]] == ["FP16", "INT8", "INT4"]
            assert {"weights int8", "KV int8", "prefix cache"} <= {
                row["name"] for row in overview["techniques"]
            }
            assert (overview["receipts"], overview["apply"]) == ([], None)
            status, answer = await _status(served, PREVIEW, {"quantization": "none"})
            assert status == 200
            today, proposed = answer["today"], answer["proposed"]
            assert (
                proposed["memory"]["components"]["weights"]
                > 2 * (today["memory"]["components"]["weights"])
            )
            assert proposed["speed"]["decode_tokens_per_s"]["low"] > 0
            assert proposed["quality"]["basis"] == "measured"  # it is the reference
            assert today["quality"]["basis"] == "unknown"

    run(scenario())


def test_the_ledger_is_in_the_metrics(optimizer: Optimizer, deployment: Deployment) -> None:
    async def scenario() -> None:
        async with (
            serve(optimizer=optimizer) as served,
            served.http.get(served.url + "/metrics") as response,
        ):
            text = await response.text()
            for name in ("memory_bytes", "memory_planned_bytes"):
                line = re.search(rf'fulcrum_{name}{{component="weights",.*}} (\S+)', text)
                assert line is not None
                assert float(line[1]) == deployment.loaded.weights_bytes

    run(scenario())


def test_the_page_is_for_everybody_and_shut_to_everything_else() -> None:
    async def scenario() -> None:
        async with serve(api_key=KEY) as served:
            async with served.http.get(served.url + "/") as response:
                assert response.status == 200
                policy = response.headers["Content-Security-Policy"]
                assert "default-src 'none'" in policy
                assert "unsafe" not in policy
                assert "http" not in policy
                assert KEY not in await response.text()
            for name, status in (
                ("style.css", 200),
                ("main.js", 200),
                ("grafana.json", 200),
                ("nothing.js", 404),
                ("..%2Fapp.py", 401),
                (".hidden.js", 404),
                ("index.py", 404),
            ):
                async with served.http.get(f"{served.url}/page/{name}") as response:
                    assert response.status == status, name
            status, _ = await _status(served, "/v1/optimizations")
            assert status == 401

    run(scenario())


def test_admission_follows_an_apply(optimizer: Optimizer, deployment: Deployment) -> None:
    loaded = deployment.loaded
    # As it is announced while two cores do not fit at once.
    parked = msgspec.structs.replace(
        loaded, core=None, fingerprint="fp_other", num_kv_blocks=loaded.num_kv_blocks // 2
    )
    config = msgspec.structs.replace(deployment.config, max_sequences=3)
    changed = msgspec.structs.replace(deployment, loaded=parked, config=config)

    async def scenario() -> None:
        async with serve(FakeEngine(step_s=0.001), optimizer=optimizer) as served:
            gate, applier = served.app[CLIENT].gate, optimizer.applier()
            await asyncio.to_thread(applier.announce, deployment, 100)
            assert gate.limits.max_sequences == deployment.config.max_sequences
            await asyncio.to_thread(applier.announce, changed, 100)
            assert gate.limits.max_sequences == 3
            assert gate.limits.num_blocks == served.app[MODEL].num_kv_blocks
            assert gate.limits.num_blocks == parked.num_kv_blocks
            # Those who come now wait for the core, unless it has been away for too long already.
            _, health = await _status(served, "/health")
            assert health["status"] == "degraded"
            assert "applied" in health["reasons"][0]
            body = {"model": served.app[MODEL].name, "prompt": "x", "max_tokens": 1}
            assert (await served.post("/v1/completions", body))[0] == 200
            gate.limits = msgspec.structs.replace(gate.limits, max_ttft_s=0.0)
            status, answer = await served.post("/v1/completions", body)
            assert (status, answer["error"]["code"]) == (503, "applying")
            await asyncio.to_thread(applier.announce, deployment, 100)
            assert (await served.post("/v1/completions", body))[0] == 200
            assert (await _status(served, "/health"))[1]["status"] == "ok"

    run(scenario())


def test_the_description_names_every_route(optimizer: Optimizer) -> None:
    async def scenario() -> None:
        async with serve(optimizer=optimizer) as served:
            _, document = await _status(served, "/openapi.json")
            paths = document["paths"]
            assert {"/v1/chat/completions", APPLY, PREVIEW, "/health"} <= set(paths)
            for path in ("/v1/telemetry", "/v1/speculation", "/health"):
                answer = paths[path]["get"]["responses"]["200"]["content"]["application/json"]
                name = answer["schema"]["$ref"].rpartition("/")[2]
                status, got = await _status(served, path)
                assert status == 200
                assert set(got) == set(document["components"]["schemas"][name]["properties"])
            body = paths[APPLY]["post"]["requestBody"]["content"]["application/json"]["schema"]
            name = body["$ref"].rpartition("/")[2]
            assert "auto_rollback" in document["components"]["schemas"][name]["properties"]
        async with serve() as served:
            _, document = await _status(served, "/openapi.json")
            assert APPLY not in document["paths"]

    run(scenario())
