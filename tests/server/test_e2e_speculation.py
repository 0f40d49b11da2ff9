"""Speculation as a client sees it: a real server with drafters, the real model."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import BadRequestError
from prometheus_client.parser import text_string_to_metric_families

from tests.server_process import ServerProcess

MODEL = "smollm2-135m"
# Its answer repeats it: both drafters have something to say.
TEXT = "The lighthouse keeper wrote one line in the log each night. " * 6
NUM_TOKENS = 48


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory, default_model_path: Path) -> Iterator[Any]:
    log_path = tmp_path_factory.mktemp("speculation") / "server.log"
    process = ServerProcess(["--model", MODEL], log_path)
    try:
        process.wait_ready()
        yield process
    finally:
        process.kill()


def _complete(server: ServerProcess, speculation: str, **options: Any) -> Any:
    fulcrum = {"usage": True, "speculation": speculation}
    body = {"fulcrum": fulcrum, **options.pop("extra_body", {})}
    settings = {"temperature": 0, "max_tokens": NUM_TOKENS, **options}
    return server.client().completions.create(model=MODEL, prompt=TEXT, extra_body=body, **settings)


def test_usage_tells_what_was_drafted_and_accepted(drafting: ServerProcess) -> None:
    answer = _complete(drafting, "ngram")
    usage, num_tokens = answer.usage.model_dump()["fulcrum"], answer.usage.completion_tokens
    assert usage["drafted_tokens"] >= usage["accepted_tokens"] > 0
    assert usage["drafters"] == {"ngram": usage["accepted_tokens"]}
    assert sum(usage["accepted_by_position"]) == usage["accepted_tokens"]
    # Every step gives its accepted drafts and one token more; the last one may be cut.
    assert num_tokens <= usage["num_steps"] + usage["accepted_tokens"] <= num_tokens + 1


def test_a_request_may_opt_out_and_gets_the_same_text(drafting: ServerProcess) -> None:
    plain = _complete(drafting, "off")
    usage = plain.usage.model_dump()["fulcrum"]
    assert (usage["drafted_tokens"], usage["accepted_tokens"], usage["drafters"]) == (0, 0, {})
    assert usage["num_steps"] == plain.usage.completion_tokens
    for speculation in ("auto", "ngram", "mtp"):
        assert _complete(drafting, speculation).choices[0].text == plain.choices[0].text


def test_usage_is_right_where_a_stop_string_ends_the_answer(drafting: ServerProcess) -> None:
    answer = _complete(drafting, "ngram", stop=["keeper wrote"])
    usage = answer.usage.model_dump()["fulcrum"]
    assert answer.choices[0].finish_reason == "stop"
    assert usage["num_steps"] > 0
    assert usage["num_steps"] + usage["accepted_tokens"] >= answer.usage.completion_tokens


def test_speculation_is_explained(drafting: ServerProcess) -> None:
    _complete(drafting, "ngram")
    report = httpx.get(f"{drafting.url}/v1/speculation", timeout=10).json()
    drafters = {entry["name"]: entry for entry in report["drafters"]}
    qualifies = {name: entry["qualifies"] for name, entry in drafters.items()}
    assert qualifies == {"ngram": True, "mtp": True, "draft": False}
    assert "--draft-model" in drafters["draft"]["status"]
    assert drafters["ngram"]["num_accepted_tokens"] > 0
    assert report["step_s"]
    assert "speculation auto: ngram, mtp" in drafting.log


def test_qualification_and_memory_tell_of_the_drafters(drafting: ServerProcess) -> None:
    overview = httpx.get(f"{drafting.url}/v1/optimizations", timeout=30).json()
    rows = {row["name"]: row for row in overview["techniques"]}
    assert rows["speculation mtp"]["qualified"]
    assert rows["speculation mtp"]["enabled"]
    assert overview["today"]["memory"]["draft"] > 10e6


def test_a_drafter_that_is_not_there_is_a_400(tmp_path: Path) -> None:
    server = ServerProcess(["--model", MODEL, "--speculation", "ngram"], tmp_path / "log")
    try:
        server.wait_ready()
        with pytest.raises(BadRequestError, match="'mtp' does not draft on this server") as caught:
            _complete(server, "mtp")
        report = httpx.get(f"{server.url}/v1/speculation", timeout=10).json()
    finally:
        server.kill()
    assert caught.value.code == "unavailable_drafter"
    assert caught.value.param == "fulcrum.speculation"
    qualifies = {entry["name"]: entry["qualifies"] for entry in report["drafters"]}
    assert qualifies == {"ngram": True, "mtp": False, "draft": False}
    (mtp,) = (entry for entry in report["drafters"] if entry["name"] == "mtp")
    assert mtp["status"] == "--speculation ngram"


def test_metrics_count_what_was_drafted_and_accepted(drafting: ServerProcess) -> None:
    usage = _complete(drafting, "ngram", max_tokens=48).usage.model_extra["fulcrum"]
    assert usage["accepted_tokens"] > 0
    families = text_string_to_metric_families(httpx.get(f"{drafting.url}/metrics").text)
    metrics = {family.name: family for family in families}

    def total(name: str, drafter: str) -> float:
        samples = metrics[f"fulcrum_speculation_{name}"].samples
        return sum(one.value for one in samples if one.labels.get("drafter") == drafter)

    assert total("drafts", "ngram") > 0
    assert total("drafted_tokens", "ngram") >= total("accepted_tokens", "ngram") >= 1
    assert total("accepted_tokens", "ngram") >= usage["accepted_tokens"]
    depths = metrics["fulcrum_speculation_verified_drafts"].samples
    buckets = [one.value for one in depths if one.name.endswith("_bucket")]
    assert buckets == sorted(buckets)
    assert buckets[0] < buckets[-1], "no step verified a draft"
    (speedup,) = metrics["fulcrum_speculation_measured_speedup"].samples
    # A step emits nine tokens at most, and takes no less time for them than for one.
    assert 0.1 < speedup.value < 9.0


def test_every_metric_of_the_dashboard_is_served(drafting: ServerProcess) -> None:
    _complete(drafting, "ngram")
    dashboard = httpx.get(f"{drafting.url}/page/grafana.json").json()
    text = httpx.get(f"{drafting.url}/metrics").text
    # A sensor that this machine has not is described and has no sample.
    served = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE):
        parts = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
        served |= {name + part for part in parts}
    expressions = [one["expr"] for panel in dashboard["panels"] for one in panel["targets"]]
    named = {name for text in expressions for name in re.findall(r"fulcrum_\w+", text)}
    assert named <= served, named - served
    assert "fulcrum_speculation_measured_speedup" in named
    places = {tuple(panel["gridPos"].values()) for panel in dashboard["panels"]}
    ids = {panel["id"] for panel in dashboard["panels"]}
    assert len(places) == len(ids) == len(dashboard["panels"])
