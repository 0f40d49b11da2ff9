"""`/v1/completions`: shapes of the prompt, choices, echo, log probabilities, sampling fields."""

import json
from itertools import chain, cycle, repeat
from typing import Any

import pytest

from engine.types import SamplingParams, Submit
from server.served import GenerationDefaults
from tests.server.fake_engine import (
    BOS,
    EOS,
    MODEL,
    TEXT,
    WORD_IDS,
    FakeEngine,
    Served,
    ids_of,
    run,
    serve,
    toy_model,
)

PATH = "/v1/completions"
TEXT_REQUEST: dict[str, Any] = {"model": MODEL, "prompt": "hi"}


def echoing() -> FakeEngine:
    """An engine that continues with the prompt itself, so that answers tell prompts apart."""
    return FakeEngine(lambda submit: cycle([i for i in submit.prompt_ids if i < 256]))


async def complete(served: Served, **fields: Any) -> dict[str, Any]:
    status, answer = await served.post(PATH, TEXT_REQUEST | fields)
    assert status == 200, answer
    return dict(answer)


async def submitted(served: Served, **fields: Any) -> SamplingParams:
    await complete(served, **{"max_tokens": 1} | fields)
    return served.engine.submits[-1].params


def test_an_answer_has_openais_shape() -> None:
    async def main() -> None:
        async with serve(FakeEngine(lambda submit: chain(ids_of("ab"), repeat(EOS)))) as served:
            answer = await complete(served)
            assert answer.pop("id").startswith("cmpl-")
            assert isinstance(answer.pop("created"), int)
            assert answer == {
                "object": "text_completion",
                "model": MODEL,
                "system_fingerprint": "fp_toy",
                "choices": [{"index": 0, "text": "ab", "logprobs": None, "finish_reason": "stop"}],
                "usage": {
                    "prompt_tokens": 3,
                    "completion_tokens": 3,
                    "total_tokens": 6,
                    "prompt_tokens_details": {"cached_tokens": 0},
                },
            }

    run(main())


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("ab", ["abab"]),
        (["ab", "c"], ["abab", "cccc"]),
        (ids_of("xy"), ["xyxy"]),
        ([ids_of("xy"), ids_of("z")], ["xyxy", "zzzz"]),
    ],
)
def test_prompts_come_in_four_shapes_and_choices_in_their_order(
    prompt: Any, texts: list[str]
) -> None:
    async def main() -> None:
        async with serve(echoing()) as served:
            answer = await complete(served, prompt=prompt, n=2, max_tokens=4)
            assert [c["text"] for c in answer["choices"]] == [t for t in texts for _ in range(2)]
            assert [c["index"] for c in answer["choices"]] == list(range(2 * len(texts)))
            prompts = {submit.prompt_ids for submit in served.engine.submits}
            assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))
            assert answer["usage"]["completion_tokens"] == 8 * len(texts)

    run(main())


def test_text_gets_a_beginning_of_sequence_and_ids_do_not() -> None:
    async def main() -> None:
        async with serve(echoing()) as served:
            await complete(served, prompt="a")
            await complete(served, prompt=[97])
            prompts = [submit.prompt_ids for submit in served.engine.submits]
            assert prompts == [(BOS, 97), (97,)]

    run(main())


def test_default_length_is_16_tokens_or_what_fits() -> None:
    async def main() -> None:
        async with serve() as served:
            assert (await complete(served))["usage"]["completion_tokens"] == 16
        async with serve(model=toy_model(max_model_len=10)) as served:
            assert (await complete(served))["usage"]["completion_tokens"] == 7

    run(main())


@pytest.mark.parametrize("prompt", ["é!", [*ids_of("é!"), WORD_IDS[" world"]]])
def test_echo_puts_the_prompt_before_the_text(prompt: Any) -> None:
    async def main() -> None:
        async with serve() as served:
            prompt_text = "é!" if isinstance(prompt, str) else "é! world"
            answer = await complete(served, prompt=prompt, echo=True, logprobs=2, max_tokens=3, n=2)
            for choice in answer["choices"]:
                assert choice["text"] == prompt_text + TEXT[:3]
                logprobs = choice["logprobs"]
                num_prompt = len(served.engine.submits[0].prompt_ids)
                assert all(len(values) == num_prompt + 3 for values in logprobs.values())
                assert logprobs["token_logprobs"][0] is None
                assert logprobs["top_logprobs"][0] is None
                assert all(len(top) == 2 for top in logprobs["top_logprobs"][1:])
                assert logprobs["text_offset"][-3:] == [len(prompt_text) + i for i in range(3)]
            plain = await complete(served, prompt=prompt, echo=True, max_tokens=3)
            assert plain["choices"][0]["text"] == prompt_text + TEXT[:3]

    run(main())


def test_max_tokens_0_scores_the_prompt_only() -> None:
    async def main() -> None:
        async with serve() as served:
            answer = await complete(served, echo=True, logprobs=1, max_tokens=0)
            choice = answer["choices"][0]
            assert choice["text"] == "hi"
            assert choice["logprobs"]["tokens"] == ["<s>", "h", "i"]
            assert choice["finish_reason"] == "length"
            assert answer["usage"]["completion_tokens"] == 0
            status, _ = await served.post(PATH, TEXT_REQUEST | {"max_tokens": 0})
            assert status == 400

    run(main())


def test_stream_and_whole_answer_say_the_same() -> None:
    async def main() -> None:
        async with serve(FakeEngine(step_s=0.001)) as served:
            body = TEXT_REQUEST | {
                "prompt": ["ab", "c"],
                "echo": True,
                "logprobs": 1,
                "max_tokens": 12,
                "n": 2,
            }
            _, whole = await served.post(PATH, body)
            async with served.http.post(served.url + PATH, json=body | {"stream": True}) as got:
                events = (await got.text()).split("\n\n")
            assert events[-2:] == ["data: [DONE]", ""]
            texts, tokens, reasons = [""] * 4, [[] for _ in range(4)], [[] for _ in range(4)]
            for event in events[:-2]:
                chunk = json.loads(event.removeprefix("data: "))
                assert chunk["object"] == "text_completion"
                (choice,) = chunk["choices"]
                texts[choice["index"]] += choice["text"]
                tokens[choice["index"]] += (choice["logprobs"] or {"tokens": []})["tokens"]
                reasons[choice["index"]].append(choice["finish_reason"])
            assert texts == [choice["text"] for choice in whole["choices"]]
            assert tokens == [choice["logprobs"]["tokens"] for choice in whole["choices"]]
            assert all(r[-1] == "length" and set(r[:-1]) == {None} for r in reasons)

    run(main())


def test_usage_chunk_of_a_stream_has_no_choices() -> None:
    async def main() -> None:
        async with serve() as served:
            stream = await served.openai.completions.create(
                model=MODEL, prompt="a", stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in stream]
            assert chunks[-1].choices == []
            assert chunks[-1].usage.completion_tokens == 16
            assert all(chunk.usage is None for chunk in chunks[:-1])

    run(main())


def test_every_sampling_field_reaches_the_engine() -> None:
    async def main() -> None:
        async with serve() as served:
            params = await submitted(
                served,
                max_tokens=9,
                temperature=0.5,
                top_p=0.9,
                top_k=40,
                min_p=0.1,
                repetition_penalty=1.1,
                presence_penalty=0.5,
                frequency_penalty=-0.5,
                logit_bias={"97": 5, "98": -100},
                seed=7,
                stop_token_ids=[98],
                ignore_eos=True,
                min_tokens=2,
                logprobs=3,
            )
            assert params == SamplingParams(
                max_tokens=9,
                min_tokens=2,
                temperature=0.5,
                top_k=40,
                top_p=0.9,
                min_p=0.1,
                repetition_penalty=1.1,
                presence_penalty=0.5,
                frequency_penalty=-0.5,
                logit_bias=((97, 5.0), (98, -100.0)),
                seed=7,
                stop_token_ids=(98,),
                ignore_eos=True,
                num_logprobs=3,
            )

    run(main())


def test_what_a_request_leaves_open_is_the_models_own_then_openais() -> None:
    async def main() -> None:
        async with serve() as served:
            params = await submitted(served)
            assert (params.temperature, params.top_p, params.top_k) == (1.0, 1.0, 0)
            assert params.num_logprobs is None
        defaults = GenerationDefaults(temperature=0.6, top_k=20, min_p=0.05)
        async with serve(model=toy_model(defaults=defaults)) as served:
            params = await submitted(served)
            assert (params.temperature, params.top_k, params.min_p) == (0.6, 20, 0.05)
            params = await submitted(served, temperature=0, top_k=-1)
            assert (params.temperature, params.top_k) == (0.0, 0)

    run(main())


def test_seeds_differ_between_choices_but_not_between_alone_and_listed() -> None:
    async def main() -> None:
        async with serve() as served:

            async def seeds(**fields: Any) -> list[int]:
                before = len(served.engine.submits)
                await complete(served, **fields)
                return [submit.params.seed for submit in served.engine.submits[before:]]

            alone = await seeds(n=3, seed=5)
            assert len(set(alone)) == 3
            assert alone[0] == 5
            assert await seeds(prompt=["a", "b"], n=3, seed=5) == alone * 2
            assert len({*await seeds(n=3), *await seeds(n=3)}) == 6
            assert (await seeds(seed=-1))[0] == 2**64 - 1

    run(main())


def test_a_half_character_token_has_its_bytes_as_name() -> None:
    async def main() -> None:
        def script(submit: Submit) -> Any:
            return iter(ids_of("é"))

        async with serve(FakeEngine(script)) as served:
            answer = await complete(served, logprobs=0, max_tokens=2)
            logprobs = answer["choices"][0]["logprobs"]
            assert logprobs["tokens"] == ["bytes:\\xc3", "bytes:\\xa9"]
            assert logprobs["text_offset"] == [0, 0]
            assert logprobs["top_logprobs"] is None

    run(main())


def test_ids_that_the_model_has_no_embedding_for_are_refused_as_text_too() -> None:
    async def main() -> None:
        async with serve(model=toy_model(vocab_size=ord("z"))) as served:
            for prompt in ("zz", [ord("z")], [[ord("a")], [ord("z")]]):
                status, answer = await served.post(PATH, TEXT_REQUEST | {"prompt": prompt})
                assert (status, answer["error"]["param"]) == (400, "prompt"), answer

    run(main())
