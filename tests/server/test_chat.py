"""`/v1/chat/completions` as the openai package and a plain client see it."""

import json
from itertools import chain, repeat
from typing import Any

import openai
import pytest

from tests.server.fake_engine import (
    EOS,
    MODEL,
    TEXT,
    FakeEngine,
    Served,
    ToyTokenizer,
    ids_of,
    run,
    serve,
    toy_model,
)

MESSAGES: Any = [{"role": "user", "content": "hi"}]
CHAT: dict[str, Any] = {"model": MODEL, "messages": MESSAGES}


def says(text: str) -> FakeEngine:
    """An engine whose answer is `text`, slow enough that each token is an event of its own."""
    return FakeEngine(lambda submit: chain(ids_of(text), repeat(EOS)), step_s=0.002)


async def events_of(served: Served, body: dict[str, Any], path: str) -> list[str]:
    async with served.http.post(f"{served.url}{path}", json=body | {"stream": True}) as response:
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("text/event-stream")
        events = (await response.text()).split("\n\n")
    assert events[-1] == ""
    assert all(event.startswith("data: ") for event in events[:-1])
    return [event.removeprefix("data: ") for event in events[:-1]]


async def chunks_of(
    served: Served, body: dict[str, Any], path: str = "/v1/chat/completions"
) -> list[dict[str, Any]]:
    events = await events_of(served, body, path)
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def test_an_answer_has_openais_shape() -> None:
    async def main() -> None:
        async with serve(says("Hi there")) as served:
            status, answer = await served.post("/v1/chat/completions", CHAT)
            assert status == 200
            assert answer.pop("id").startswith("chatcmpl-")
            assert isinstance(answer.pop("created"), int)
            message = {"role": "assistant", "content": "Hi there", "refusal": None}
            assert answer == {
                "object": "chat.completion",
                "model": MODEL,
                "system_fingerprint": "fp_toy",
                "choices": [
                    {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
                ],
                "usage": {
                    "prompt_tokens": 11,
                    "completion_tokens": 9,
                    "total_tokens": 20,
                    "prompt_tokens_details": {"cached_tokens": 0},
                },
            }

    run(main())


def test_a_stream_is_role_then_text_then_reason_then_done() -> None:
    async def main() -> None:
        async with serve(says("é!")) as served:
            chunks = await chunks_of(served, CHAT)
            assert len({(c["id"], c["created"], c["system_fingerprint"]) for c in chunks}) == 1
            assert all(c["object"] == "chat.completion.chunk" for c in chunks)
            assert all("usage" not in c for c in chunks)
            choices = [c["choices"][0] for c in chunks]
            assert [choice["delta"] for choice in choices] == [
                {"role": "assistant", "content": "", "refusal": None},
                {"content": "é"},
                {"content": "!"},
                {},
            ]
            assert [c["finish_reason"] for c in choices] == [None, None, None, "stop"]

    run(main())


def test_usage_is_a_last_chunk_only_when_asked_for() -> None:
    async def main() -> None:
        async with serve(says("ab")) as served:
            served.engine.num_cached_tokens = 4
            body = CHAT | {"stream_options": {"include_usage": True}}
            *chunks, last = await chunks_of(served, body)
            assert all(c["usage"] is None for c in chunks)
            assert last["choices"] == []
            assert last["usage"]["total_tokens"] == 14
            assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}

    run(main())


def test_the_openai_package_reads_answers_and_streams() -> None:
    async def main() -> None:
        async with serve() as served:
            settings: Any = {"model": MODEL, "messages": MESSAGES, "max_tokens": 40}
            create = served.openai.chat.completions.create
            whole = await create(**settings, logprobs=True, top_logprobs=3, n=3)
            assert [choice.index for choice in whole.choices] == [0, 1, 2]
            for choice in whole.choices:
                logprobs = choice.logprobs.content
                assert len(logprobs) == 40
                assert (
                    bytes(chain.from_iterable(e.bytes for e in logprobs)).decode(errors="replace")
                    == choice.message.content
                )
                assert all(len(e.top_logprobs) == 3 for e in logprobs)
            assert whole.usage.completion_tokens == 120
            assert whole.usage.prompt_tokens == 11
            texts = ["", "", ""]
            async for chunk in await create(**settings, n=3, stream=True):
                (choice,) = chunk.choices
                texts[choice.index] += choice.delta.content or ""
            assert texts == [choice.message.content for choice in whole.choices]

    run(main())


def test_streamed_logprobs_are_those_of_the_whole_answer() -> None:
    async def main() -> None:
        async with serve(FakeEngine(step_s=0.001)) as served:
            body = CHAT | {"max_tokens": 20, "logprobs": True, "top_logprobs": 2, "stop": "🙂 X"}
            _, whole = await served.post("/v1/chat/completions", body)
            entries = []
            for chunk in await chunks_of(served, body):
                if chunk["choices"][0]["logprobs"]:
                    entries += chunk["choices"][0]["logprobs"]["content"]
            assert entries == whole["choices"][0]["logprobs"]["content"]
            assert len(entries) == 20

    run(main())


@pytest.mark.parametrize("stop", ["wörld", ["zzz", "rl", "d"], "o w", "🙂", "Hello"])
def test_a_stop_ends_the_sequence_and_never_leaks(stop: Any) -> None:
    async def main() -> None:
        async with serve(FakeEngine(step_s=0.001)) as served:
            body = CHAT | {"stop": stop}
            stops = [stop] if isinstance(stop, str) else stop
            expected = TEXT[: min(TEXT.find(s) for s in stops if s in TEXT)]
            chunks = await chunks_of(served, body | {"logprobs": True})
            text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
            assert text == expected
            assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
            shown = [c["choices"][0]["logprobs"] for c in chunks]
            tokens = [e["bytes"] for item in shown if item for e in item["content"]]
            assert bytes(chain.from_iterable(tokens)).decode() == expected
            await served.wait_idle()
            (stopped,) = served.engine.submits
            assert served.engine.aborted == [stopped.seq_id]
            _, whole = await served.post("/v1/chat/completions", body)
            assert whole["choices"][0]["message"]["content"] == expected
            first = min((s for s in stops if s in TEXT), key=lambda s: TEXT.find(s) + len(s))
            used = len((expected + first).encode())
            assert whole["usage"]["completion_tokens"] == used

    run(main())


def test_content_may_be_text_parts_and_developer_is_system() -> None:
    async def main() -> None:
        async with serve(says("x")) as served:
            parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
            messages = [
                {"role": "developer", "content": "be brief"},
                {"role": "user", "content": parts, "name": "me"},
                # As a client sends back what it was answered.
                {"role": "assistant", "content": "a", "refusal": None, "tool_calls": None},
                {"role": "user", "content": "b"},
            ]
            status, _ = await served.post("/v1/chat/completions", CHAT | {"messages": messages})
            assert status == 200
            text = ToyTokenizer().decode(list(served.engine.submits[0].prompt_ids))
            assert text == "system: be briefuser: one\ntwoassistant: auser: b"

    run(main())


def test_what_the_template_refuses_is_a_400_with_its_message() -> None:
    async def main() -> None:
        async with serve() as served:
            body = CHAT | {"messages": [{"role": "assistant", "content": "x"}]}
            status, answer = await served.post("/v1/chat/completions", body)
            assert status == 400
            assert "the user must begin" in answer["error"]["message"]

    run(main())


def test_a_model_without_template_refuses_chat_but_completes() -> None:
    async def main() -> None:
        async with serve(says("x"), toy_model(chat_template=None)) as served:
            with pytest.raises(openai.BadRequestError) as caught:
                await served.openai.chat.completions.create(model=MODEL, messages=MESSAGES)
            assert caught.value.code == "no_chat_template"
            await served.openai.completions.create(model=MODEL, prompt="x")

    run(main())


def test_without_max_tokens_the_context_is_the_limit() -> None:
    async def main() -> None:
        async with serve(model=toy_model(max_model_len=64)) as served:
            _, answer = await served.post("/v1/chat/completions", CHAT)
            assert answer["usage"]["total_tokens"] == 64
            assert answer["choices"][0]["finish_reason"] == "length"
            for name in ("max_tokens", "max_completion_tokens"):
                _, answer = await served.post("/v1/chat/completions", CHAT | {name: 5})
                assert answer["usage"]["completion_tokens"] == 5

    run(main())


@pytest.mark.parametrize(
    "messages",
    [[{"role": "user", "content": "x" * 100}], [{"role": "user", "content": "x" * 5000}]],
)
def test_what_does_not_fit_the_context_says_so(messages: Any) -> None:
    async def main() -> None:
        async with serve(model=toy_model(max_model_len=64)) as served:
            with pytest.raises(openai.BadRequestError) as caught:
                await served.openai.chat.completions.create(model=MODEL, messages=messages)
            assert caught.value.code == "context_length_exceeded"
            with pytest.raises(openai.BadRequestError) as caught:
                await served.openai.chat.completions.create(
                    model=MODEL, messages=MESSAGES, max_tokens=60
                )
            assert caught.value.code == "context_length_exceeded"

    run(main())


def test_an_error_before_the_first_token_is_a_500_and_a_later_one_an_event() -> None:
    async def main() -> None:
        async with serve(FakeEngine(step_s=0.001)) as served:
            for stream in (False, True):
                served.engine.fail_after = 0
                with pytest.raises(openai.InternalServerError):
                    await served.openai.chat.completions.create(
                        model=MODEL, messages=MESSAGES, stream=stream
                    )
            served.engine.fail_after = 5
            events = await events_of(served, CHAT | {"n": 2}, "/v1/chat/completions")
            assert "[DONE]" not in events
            assert set(json.loads(events[-1])) == {"error"}
            with pytest.raises(openai.APIError, match="planted"):
                async for _ in await served.openai.chat.completions.create(
                    model=MODEL, messages=MESSAGES, stream=True
                ):
                    pass

    run(main())


def test_what_a_request_cost_is_told_where_it_is_asked_for() -> None:
    async def main() -> None:
        async with serve(says("Hi there")) as served:
            _, answer = await served.post("/v1/chat/completions", CHAT)
            assert "fulcrum" not in answer["usage"]
            body = CHAT | {"fulcrum": {"usage": True}}
            for path, request in (
                ("/v1/chat/completions", body),
                ("/v1/completions", {"model": MODEL, "prompt": "hi", "fulcrum": {"usage": True}}),
            ):
                _, answer = await served.post(path, request)
                whole = answer["usage"]["fulcrum"]
                chunks = await chunks_of(
                    served, request | {"stream_options": {"include_usage": True}}, path
                )
                streamed = chunks[-1]["usage"]["fulcrum"]
                for costs in (whole, streamed):
                    assert costs["queue_ms"] >= 0
                    assert costs["prefill_ms"] >= 0
                    assert 8 * 2 <= costs["decode_ms"] < 2000  # eight more steps of 2 ms
                    assert costs["cached_tokens"] == 0
            status, answer = await served.post(
                "/v1/chat/completions", CHAT | {"fulcrum": {"cost": True}}
            )
            assert (status, answer["error"]["param"]) == (400, "fulcrum.cost")

    run(main())
