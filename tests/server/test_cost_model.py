"""What the server learns of steps and answers, and how forecasts use it."""

import random

import pytest

from server.cost_model import CostModel, Costs
from server.forecast import Ask, Limits, OpenSequence, forecast


def learnt(base_s: float, token_s: float, noise: float = 0.0, steps: int = 400) -> CostModel:
    draw = random.Random(1)
    model = CostModel()
    for _ in range(steps):
        num_tokens = draw.choice([1, 2, 8, 8, 8, 64, 128, 512])
        step_s = (base_s + token_s * num_tokens) * (1 + draw.uniform(-noise, noise))
        model.observe_step(num_tokens, step_s)
    return model


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 8, 64, 100, 128, 300, 512])
def test_a_step_is_predicted_from_noisy_ones(num_tokens: int) -> None:
    costs = learnt(0.004, 0.0005, noise=0.3).costs
    assert costs.step_s(num_tokens) == pytest.approx(0.004 + 0.0005 * num_tokens, rel=0.2)


def test_predictions_follow_when_the_machine_slows_down() -> None:
    model = learnt(0.004, 0.0005)
    for _ in range(300):
        model.observe_step(8, 0.024)
    assert model.costs.step_s(8) == pytest.approx(0.024, rel=0.1)


def test_stalls_count_by_the_time_that_they_take() -> None:
    model = learnt(0.004, 0.0005)
    draw = random.Random(3)
    for _ in range(400):
        model.observe_step(8, 0.050 if draw.random() < 0.25 else 0.010)
    assert model.costs.step_s(8) == pytest.approx(0.020, rel=0.3)


def test_one_step_that_hung_changes_little() -> None:
    model = learnt(0.004, 0.0005)
    before_s = model.costs.step_s(8)
    model.observe_step(8, 30.0)
    assert model.costs.step_s(8) < 1.2 * before_s


def test_more_tokens_never_cost_less() -> None:
    model = CostModel()
    for num_tokens, step_s in ((1, 0.01), (8, 0.005), (64, 0.008), (512, 0.02)):
        model.observe_step(num_tokens, step_s)
    times = [model.costs.step_s(num_tokens) for num_tokens in range(1, 1000)]
    assert times == sorted(times)


def test_answers_and_prompts_are_learnt() -> None:
    model = CostModel()
    for _ in range(200):
        model.observe_end(30)
        model.observe_first_token(100, 75, 0.0, 0.1)
    assert model.costs.mean_output_tokens == pytest.approx(30, rel=0.05)
    assert model.costs.mean_prompt_tokens == pytest.approx(100, rel=0.05)
    assert model.costs.uncached_share == pytest.approx(0.25, rel=0.05)


def test_forecasts_that_are_wrong_are_corrected() -> None:
    model = learnt(0.004, 0.0005)
    limits = Limits(max_sequences=8, max_queue=64)
    for _ in range(200):
        ask = Ask(rank_s=0.0, prompt_lengths=(200,), max_tokens=10)
        predicted_s = forecast(ask, (), model.costs, limits).ttft_s
        model.observe_first_token(200, 0, predicted_s / model.costs.ttft_scale, 0.3)
    assert predicted_s == pytest.approx(0.3, rel=0.1)


def test_another_setting_is_learnt_anew_from_its_first_step() -> None:
    model = learnt(0.004, 0.0005)
    before = model.costs
    model.renew()
    assert model.costs.step_points == before.step_points
    assert model.costs.ttft_scale == 1.0
    model.observe_step(8, 0.1)
    assert model.costs.step_s(8) == pytest.approx(0.1)
    assert 0.1 < model.costs.step_s(16) <= 0.2  # nothing of the former points is left


def test_what_was_timed_before_serving_is_known_at_once_and_corrected_by_all_steps() -> None:
    model = CostModel()
    timed = [(1, 0.004), (8, 0.006), (128, 0.050)]
    model.renew(timed)
    for num_tokens, step_s in timed:
        assert model.costs.step_s(num_tokens) == pytest.approx(step_s)
    for _ in range(1500):
        model.observe_step(8, 0.012)  # the machine is half as fast as it was
    assert model.costs.step_s(128) == pytest.approx(0.1, rel=0.2)
    model.renew(timed)
    assert model.costs.step_s(128) == pytest.approx(0.050)


@pytest.mark.parametrize("slow_tokens", [64, 512])
def test_a_slow_step_of_long_ago_is_no_price_for_ever(slow_tokens: int) -> None:
    """Neither for larger steps, though a larger one never costs less, nor where it was the last."""
    model = learnt(0.004, 0.0001, steps=50)
    for _ in range(20):
        model.observe_step(slow_tokens, 10.0)
    for _ in range(3000):
        model.observe_step(8, 0.0048)
        model.observe_step(200, 0.024)
    assert model.costs.step_s(200) == pytest.approx(0.024, rel=0.1)
    assert model.costs.step_s(512) < 0.15


def test_accepted_drafts_end_a_sequence_in_fewer_and_dearer_steps() -> None:
    model = CostModel()
    limits = Limits(max_sequences=2, max_queue=64)
    for _ in range(300):
        model.observe_step(2, 0.010)
        model.observe_step(8, 0.016)
        model.observe_decode(2, 4, 8)  # three drafts each, of which one is accepted
    running = [OpenSequence(0.0, 10, 90 + seq, 100, True) for seq in (0, 1)]
    ask = Ask(rank_s=1.0, prompt_lengths=(1,), max_tokens=100, ignore_eos=True)
    costs = model.costs
    assert costs.verified_per_step == pytest.approx(4, rel=0.05)
    assert costs.decode_s(2) == pytest.approx(0.008, rel=0.1)
    seen = forecast(ask, running, costs, limits)
    # 9 tokens are left of the one that ends first: 4.5 steps of 8 tokens and a few of prompts.
    assert 4.5 * 0.016 <= seen.ttft_s < 7 * 0.016 + 0.03
    assert seen.end_s - seen.ttft_s == pytest.approx(99 * costs.decode_s(2))


def test_a_full_server_is_predicted_from_how_far_its_sequences_are() -> None:
    costs = Costs(step_points=((1.0, 0.01), (512.0, 0.01)))
    limits = Limits(max_sequences=2, max_queue=64)

    def running(num_output_tokens: int) -> OpenSequence:
        return OpenSequence(0.0, 10, num_output_tokens, 100, True)

    ask = Ask(rank_s=1.0, prompt_lengths=(10,), max_tokens=100, ignore_eos=True)
    # A lane is free when the sequence with 90 of its 100 tokens ends: what is left of this step,
    # 10 steps, and one of its own.
    seen = forecast(ask, [running(50), running(90)], costs, limits)
    assert seen.ttft_s == pytest.approx(0.115)
    assert seen.end_s == pytest.approx(0.115 + 99 * 0.01)
    assert not seen.starts_now
    # One more in the queue takes that lane, and then the next one is free after 50.
    queued = OpenSequence(0.5, 10, 0, 100, True)
    seen = forecast(ask, [running(50), running(90), queued], costs, limits)
    assert seen.ttft_s == pytest.approx(0.515)
