"""Every endpoint of a server with the real model, through the openai package where it has one."""

import math
import time

import httpx
import pytest
from openai import NotFoundError

from tests.server_process import ServerProcess

MODEL = "smollm2-135m"
QUESTION = [{"role": "user", "content": "How many days are in a week?"}]


def test_chat_answers_the_question(server: ServerProcess) -> None:
    answer = server.client().chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=32
    )
    choice = answer.choices[0]
    assert answer.object == "chat.completion"
    assert choice.message.role == "assistant"
    assert "7 days" in choice.message.content
    assert choice.finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.system_fingerprint


def test_completion_continues_the_prompt(server: ServerProcess) -> None:
    answer = server.client().completions.create(
        model=MODEL, prompt="The capital of France is", temperature=0, max_tokens=8
    )
    assert answer.object == "text_completion"
    assert "Paris" in answer.choices[0].text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 8


def test_default_length_of_a_completion_is_16_tokens(server: ServerProcess) -> None:
    answer = server.client().completions.create(
        model=MODEL, prompt="Once upon a time", temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage.completion_tokens == 16


def test_choices_of_a_list_of_prompts_are_numbered_in_order(server: ServerProcess) -> None:
    client = server.client()
    prompts = ["The sky is", "Two plus two is"]
    both = client.completions.create(
        model=MODEL, prompt=prompts, n=2, temperature=0, max_tokens=6
    ).choices
    assert [choice.index for choice in both] == [0, 1, 2, 3]
    for index, prompt in enumerate(prompts):
        alone = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=6)
        assert both[2 * index].text == both[2 * index + 1].text == alone.choices[0].text


def test_token_ids_as_prompt_are_the_text_that_they_stand_for(server: ServerProcess) -> None:
    client = server.client()
    prompt = "Water boils at"
    ids = httpx.post(f"{server.url}/tokenize", json={"model": MODEL, "prompt": prompt}).json()
    settings = {"model": MODEL, "temperature": 0, "max_tokens": 8}
    from_text = client.completions.create(prompt=prompt, **settings).choices[0].text
    assert client.completions.create(prompt=ids["tokens"], **settings).choices[0].text == from_text
    listed = client.completions.create(prompt=[ids["tokens"]] * 2, **settings)
    assert [choice.text for choice in listed.choices] == [from_text] * 2


def test_echo_returns_the_prompt_before_the_text(server: ServerProcess) -> None:
    client = server.client()
    prompt = "Water boils at"
    settings = {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 4}
    plain = client.completions.create(**settings).choices[0].text
    echoed = client.completions.create(echo=True, logprobs=2, **settings).choices[0]
    assert echoed.text == prompt + plain
    values = echoed.logprobs.token_logprobs
    assert values[0] is None
    assert all(value <= 0 for value in values[1:])
    assert "".join(echoed.logprobs.tokens) == echoed.text
    assert echoed.logprobs.text_offset[0] == 0


def test_logprobs_rank_the_greedy_token_first(server: ServerProcess) -> None:
    answer = server.client().chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        temperature=0,
        max_tokens=6,
        logprobs=True,
        top_logprobs=5,
    )
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens
    for entry in entries:
        ranked = [top.logprob for top in entry.top_logprobs]
        assert len(ranked) == 5
        assert ranked == sorted(ranked, reverse=True)
        assert entry.top_logprobs[0].token == entry.token
        assert entry.logprob == pytest.approx(ranked[0])
        assert sum(map(math.exp, ranked)) <= 1 + 1e-4
    spelled = bytes(byte for entry in entries for byte in entry.bytes or [])
    assert spelled.decode() == answer.choices[0].message.content


def test_echo_with_logprobs_and_penalties_scores_the_prompt(server: ServerProcess) -> None:
    prompt = "The capital of France is"
    answer = server.client().completions.create(
        model=MODEL,
        prompt=prompt,
        echo=True,
        logprobs=1,
        max_tokens=4,
        temperature=0,
        frequency_penalty=0.5,
        extra_body={"repetition_penalty": 1.1},
    )
    choice = answer.choices[0]
    assert choice.text.startswith(prompt)
    assert choice.logprobs.token_logprobs[0] is None
    assert all(logprob < 0 for logprob in choice.logprobs.token_logprobs[1:])
    assert len(choice.logprobs.tokens) == answer.usage.total_tokens


def test_seed_makes_sampling_repeatable_and_choices_differ(server: ServerProcess) -> None:
    def sample(seed: int) -> list[str]:
        answer = server.client().completions.create(
            model=MODEL,
            prompt="My favourite animal is",
            temperature=1.0,
            seed=seed,
            n=3,
            max_tokens=16,
        )
        return [choice.text for choice in answer.choices]

    first = sample(1)
    assert first == sample(1)
    assert len(set(first)) == 3
    assert first != sample(2)


def test_logit_bias_decides_the_token(server: ServerProcess) -> None:
    url = f"{server.url}/tokenize"
    wanted = httpx.post(url, json={"model": MODEL, "prompt": " Rome"}).json()["tokens"][0]
    answer = server.client().completions.create(
        model=MODEL,
        prompt="The capital of France is",
        logit_bias={str(wanted): 100},
        temperature=0,
        max_tokens=2,
    )
    assert answer.choices[0].text == " Rome Rome"


def test_stop_string_across_tokens_is_never_in_the_text(server: ServerProcess) -> None:
    client = server.client()
    settings = {"model": MODEL, "prompt": "Count: 1, 2, 3, 4,", "temperature": 0, "max_tokens": 24}
    whole = client.completions.create(**settings).choices[0].text
    # From the middle of one word to the middle of another: no token boundary on either side.
    stop = whole[7:11]
    stopped = client.completions.create(stop=stop, **settings).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole[: whole.index(stop)]
    chunks = list(client.completions.create(stop=stop, stream=True, **settings))
    assert "".join(chunk.choices[0].text for chunk in chunks) == stopped.text


def test_cached_prompt_tokens_are_reported(server: ServerProcess) -> None:
    client = server.client()
    prompt = "A prompt about nothing else in these tests. " * 12
    settings = {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 8}
    first = client.completions.create(**settings)
    second = client.completions.create(**settings)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert 0.5 * second.usage.prompt_tokens < cached < second.usage.prompt_tokens
    assert second.choices[0].text == first.choices[0].text


def test_models_lists_the_served_model(server: ServerProcess) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(NotFoundError):
        client.models.retrieve("another")


@pytest.mark.parametrize("text", ["Hello world", "naïve café 🤖👩‍👩‍👧 日本語\t\n  x", "<|im_end|>"])
def test_detokenize_undoes_tokenize(server: ServerProcess, text: str) -> None:
    body = {"model": MODEL, "prompt": text}
    ids = httpx.post(f"{server.url}/tokenize", json=body).json()["tokens"]
    answer = httpx.post(f"{server.url}/detokenize", json={"model": MODEL, "tokens": ids}).json()
    assert answer["prompt"] == text


def test_special_tokens_in_user_text_are_text(server: ServerProcess) -> None:
    url = f"{server.url}/tokenize"
    plain = httpx.post(url, json={"model": MODEL, "prompt": "<|im_end|>"}).json()["tokens"]
    assert len(plain) > 1
    message = {"role": "user", "content": "<|im_end|>"}
    chat = httpx.post(url, json={"model": MODEL, "messages": [message]}).json()["tokens"]
    assert any(chat[i : i + len(plain)] == plain for i in range(len(chat)))


def test_version_and_health_and_metrics_answer(server: ServerProcess) -> None:
    assert httpx.get(f"{server.url}/version").json()["version"]
    assert httpx.get(f"{server.url}/health").status_code == 200
    before = server.metrics()
    server.client().completions.create(model=MODEL, prompt="a b c", max_tokens=5, temperature=0)
    after = server.wait_idle()
    prompt_tokens = "fulcrum_prompt_tokens_total"
    assert after[prompt_tokens] > before[prompt_tokens]
    assert after["fulcrum_generated_tokens_total"] > before["fulcrum_generated_tokens_total"]
    text = httpx.get(f"{server.url}/metrics").text
    samples = [line for line in text.splitlines() if line.startswith("fulcrum_")]
    assert samples
    assert all(f'model_name="{MODEL}"' in line for line in samples)
    names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE fulcrum")}
    assert names <= {line.split()[2] for line in text.splitlines() if line.startswith("# HELP")}


def test_health_answers_within_50_ms_under_load(server: ServerProcess) -> None:
    streams = [
        server.client().completions.create(
            model=MODEL,
            prompt=f"{index} is a number that",
            max_tokens=96,
            n=4,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        for index in range(8)
    ]
    times = []
    with httpx.Client() as client:
        client.get(f"{server.url}/health")
        for _ in range(20):
            started_s = time.perf_counter()
            assert client.get(f"{server.url}/health").status_code == 200
            times.append(time.perf_counter() - started_s)
            time.sleep(0.02)
    for stream in streams:
        stream.close()
    server.wait_idle()
    # The median: the test process itself may lose the CPU to the model's threads.
    assert sorted(times)[len(times) // 2] < 0.05
