"""Endpoints beside generation: models, tokenize, health, metrics, version; keys and ids."""

import time
from typing import Any

import pytest

from tests.server.fake_engine import BOS, END, MODEL, USER, FakeEngine, ids_of, run, serve

TEXT = "/v1/completions"
BODY: dict[str, Any] = {"model": MODEL, "prompt": "hi", "max_tokens": 5}


def test_models_lists_the_one_that_is_served() -> None:
    async def main() -> None:
        async with serve() as served:
            assert [model.id async for model in served.openai.models.list()] == [MODEL]
            assert (await served.openai.models.retrieve(MODEL)).owned_by == "fulcrum"

    run(main())


@pytest.mark.parametrize("text", ["hi", "é" * 3000])
def test_tokenize_and_detokenize_are_inverse(text: str) -> None:
    async def main() -> None:
        async with serve() as served:
            body = {"model": MODEL, "prompt": text}
            status, answer = await served.post("/tokenize", body)
            assert status == 200
            assert answer["tokens"] == [BOS, *ids_of(text)]
            assert answer["count"] == len(answer["tokens"])
            assert answer["max_model_len"] == 4096
            _, plain = await served.post("/tokenize", body | {"add_special_tokens": False})
            assert plain["tokens"] == ids_of(text)
            _, back = await served.post("/detokenize", {"tokens": plain["tokens"]})
            assert back == {"prompt": text}

    run(main())


def test_tokenize_takes_messages_as_chat_does() -> None:
    async def main() -> None:
        async with serve() as served:
            body = {"messages": [{"role": "user", "content": "a"}]}
            _, answer = await served.post("/tokenize", body)
            assert answer["tokens"] == [USER, *ids_of("user: a"), END, USER]
            _, answer = await served.post("/tokenize", body | {"add_generation_prompt": False})
            assert answer["tokens"][-1] == END
            assert (await served.post("/tokenize", {}))[0] == 400
            assert (await served.post("/tokenize", body | {"prompt": "x"}))[0] == 400
            assert (await served.post("/tokenize", {"prompt": "x", "model": "y"}))[0] == 404
            assert (await served.post("/detokenize", {"tokens": [9999]}))[0] == 400

    run(main())


def test_health_fails_when_the_heartbeat_is_old() -> None:
    async def main() -> None:
        async with serve(health_stale_s=5.0) as served:
            for age_s, status in ((0, 200), (4, 200), (6, 503)):
                served.engine.heartbeat_at_s = time.monotonic() - age_s
                async with served.http.get(served.url + "/health") as response:
                    assert response.status == status

    run(main())


def test_metrics_count_what_happened() -> None:
    async def main() -> None:
        async with serve(FakeEngine(step_s=0.001)) as served:
            await served.post(TEXT, BODY)
            await served.post(TEXT, BODY | {"stop": "H"})
            await served.wait_idle()
            async with served.http.get(served.url + "/metrics") as response:
                assert response.content_type == "text/plain"
                lines = (await response.text()).splitlines()
            samples = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
            label = '{model_name="toy"}'
            assert float(samples["fulcrum_prompt_tokens_total" + label]) == 6
            assert float(samples["fulcrum_generated_tokens_total" + label]) >= 6
            for reason, count in (("length", 1), ("stop", 1), ("abort", 0), ("error", 0)):
                name = f'fulcrum_requests_total{{finish_reason="{reason}",model_name="toy"}}'
                assert float(samples[name]) == count, reason
            for name, count in (
                ("time_to_first_token_seconds", 2),
                ("request_duration_seconds", 2),
                ("queue_time_seconds", 2),
            ):
                assert float(samples[f"fulcrum_{name}_count{label}"]) == count
            assert float(samples["fulcrum_inter_token_latency_seconds_count" + label]) >= 4
            assert float(samples["fulcrum_step_tokens_count" + label]) >= 6
            for name in (
                "requests_running",
                "requests_waiting",
                "kv_usage_ratio",
                "prefix_cache_queries_total",
                "prefix_cache_hits_total",
                "preemptions_total",
            ):
                assert f"fulcrum_{name}{label}" in samples
            assert all(name.startswith("fulcrum_") for name in samples)
            described = {line.split()[2] for line in lines if line.startswith("# HELP")}
            typed = {line.split()[2] for line in lines if line.startswith("# TYPE")}
            assert described == typed

    run(main())


def test_the_key_is_asked_for_on_every_path_but_two() -> None:
    async def main() -> None:
        async with serve(api_key="s3cret") as served:
            paths = [("POST", TEXT), ("POST", "/v1/chat/completions"), ("GET", "/v1/models")]
            paths += [("GET", "/v1/models/toy"), ("POST", "/tokenize"), ("POST", "/detokenize")]
            paths += [("GET", "/version"), ("GET", "/nowhere")]
            wrong = ["", "Bearer", "Bearer s3cre", "Bearer s3cret2", "s3cret", "Basic s3cret"]
            for method, path in paths:
                for value in wrong:
                    headers = {"Authorization": value}
                    async with served.http.request(
                        method, served.url + path, headers=headers
                    ) as response:
                        assert response.status == 401, (path, value)
                        error = (await response.json())["error"]
                        assert error["code"] == "invalid_api_key"
            for path in ("/health", "/metrics"):
                async with served.http.get(served.url + path) as response:
                    assert response.status == 200
            headers = {"Authorization": "Bearer s3cret"}
            assert (await served.post(TEXT, BODY, headers=headers))[0] == 200

    run(main())


def test_a_request_id_is_returned_or_made() -> None:
    async def main() -> None:
        async with serve() as served:
            for given, kept in (
                ("my-id-1", True),
                ("x" * 200, False),
                ("a b", False),
                (None, False),
            ):
                headers = {} if given is None else {"x-request-id": given}
                for stream in (False, True):
                    async with served.http.post(
                        served.url + TEXT, json=BODY | {"stream": stream}, headers=headers
                    ) as response:
                        answered = response.headers["x-request-id"]
                        assert (answered == given) == kept
                        assert answered

    run(main())


def test_version_names_the_model_and_its_fingerprint() -> None:
    async def main() -> None:
        async with serve() as served, served.http.get(served.url + "/version") as response:
            answer = await response.json()
            assert answer["model"] == MODEL
            assert answer["system_fingerprint"] == "fp_toy"
            assert answer["version"]

    run(main())
