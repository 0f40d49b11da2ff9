"""With drafts the engine samples from the exact distribution, whatever the sampler's options.

bench.distribution does the same with 200,000 samples of each.
"""

import pytest
from msgspec.structs import replace

from bench.distribution import OPTIONS, fit, sample
from bench.exact_model import TinyModel

NUM_SAMPLES = 6000


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return TinyModel()


@pytest.mark.parametrize("option", OPTIONS)
def test_answers_follow_the_exact_distribution(model: TinyModel, option: str) -> None:
    params = OPTIONS[option]
    counts, policy = sample(model, params, NUM_SAMPLES)
    result = fit(counts, model.probs(params), policy)
    assert result.num_accepted > 0.1 * result.num_drafted > 500
    assert result.p_value > 1e-4


def test_another_distribution_is_told_apart(model: TinyModel) -> None:
    counts, policy = sample(model, OPTIONS["temperature"], NUM_SAMPLES)
    warmer = replace(OPTIONS["temperature"], temperature=0.8)
    assert fit(counts, model.probs(warmer), policy).p_value < 1e-6
