"""The sampler of the core against exact distributions computed in float64.

Every draw is a function of (seed, position, token id), so these tests are deterministic: a
chi-square that passes once passes always.
"""

from typing import Any

import fulcrum_core
import numpy as np
import pytest
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def sample(
    logits: Any, num_samples: int = 1, *, seed: int = 1, first_position: int = 0, **options: Any
) -> dict[str, Any]:
    rows = np.atleast_2d(np.asarray(logits, np.float32))
    positions = np.arange(first_position, first_position + num_samples, dtype=np.int32)
    seeds = np.full(num_samples, seed, np.uint64)
    return fulcrum_core.sample_rows(rows, seeds, positions, **options)


def kept_probs(
    logits: Any,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    history_ids: tuple[int, ...] = (),
    output_start: int = 0,
    bias_ids: tuple[int, ...] = (),
    bias_values: tuple[float, ...] = (),
) -> Floats:
    """The distribution that the sampler must draw from, by sorting and in float64."""
    x = np.asarray(logits, np.float32).astype(np.float64)
    for token in set(history_ids):
        x[token] = x[token] / repetition_penalty if x[token] > 0 else x[token] * repetition_penalty
    output = history_ids[output_start:]
    for token in set(output):
        x[token] -= presence_penalty + frequency_penalty * output.count(token)
    for token, value in zip(bias_ids, bias_values, strict=True):
        x[token] += value
    with np.errstate(invalid="ignore"):
        weights = np.exp((x - x.max()) / temperature)
    order = np.lexsort((np.arange(len(x)), -weights))
    if top_k:
        weights[order[top_k:]] = 0
    cumulative = np.cumsum(weights[order])
    num_kept = int(np.searchsorted(cumulative, top_p * cumulative[-1] * (1 - 1e-12))) + 1
    if top_p < 1:
        weights[order[num_kept:]] = 0
    weights[weights < min_p * weights.max()] = 0
    return weights / weights.sum()


def assert_drawn_from(probs: Floats, ids: NDArray[np.int32]) -> None:
    """Pearson's chi-square, rare tokens pooled; fails beyond 4.5 standard deviations."""
    counts = np.bincount(ids, minlength=len(probs)).astype(np.float64)
    assert counts[probs == 0].sum() == 0, "drew a token that truncation removes"
    expected = probs * len(ids)
    rare = expected < 10
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = max(len(expected) - 1, 1)
    chi_square = ((observed - expected) ** 2 / expected).sum()
    # Wilson and Hilferty: the cube root of chi-square over its freedom is nearly normal.
    deviation = (chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))
    assert deviation / np.sqrt(2 / (9 * freedom)) < 4.5


def random_logits(vocab_size: int, scale: float = 2.0, seed: int = 0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).normal(size=vocab_size) * scale).astype(np.float32)


HISTORY: dict[str, Any] = {"history_ids": (0, 1, 2, 3, 4, 3, 5, 3, 5), "output_start": 4}
BIAS: dict[str, Any] = {"bias_ids": (2, 7, 9), "bias_values": (1.5, -np.inf, -0.7)}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 5},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"min_p": 0.15},
    {"top_k": 6, "top_p": 0.7},
    {"top_k": 8, "top_p": 0.95, "min_p": 0.1, "temperature": 1.7},
    {"top_p": 0.8, "min_p": 0.2},
    {"repetition_penalty": 1.4, **HISTORY},
    {"presence_penalty": 0.8, **HISTORY},
    {"frequency_penalty": 0.6, **HISTORY},
    {
        "repetition_penalty": 0.8,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.3,
        "temperature": 0.8,
        "top_p": 0.9,
        **HISTORY,
        **BIAS,
    },
    BIAS,
    {"top_k": 4, "top_p": 0.8, **BIAS},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_samples_follow_the_exact_distribution(options: dict[str, Any]) -> None:
    logits = random_logits(12)
    ids = sample(logits, 200_000, **options)["ids"]
    assert_drawn_from(kept_probs(logits, **options), ids)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_samples_follow_the_distribution_over_many_blocks(options: dict[str, Any]) -> None:
    """1,203 tokens: several blocks of values, the last one cut short."""
    logits = random_logits(1203, scale=2.5)
    logits[1200] = 9.0
    ids = sample(logits, 20_000, **options)["ids"]
    assert_drawn_from(kept_probs(logits, **options), ids)


@pytest.mark.parametrize("options", [{}, {"top_k": 1900}, {"top_p": 0.9}], ids=str)
@pytest.mark.parametrize("depth", [7.5, 10.0])
def test_many_unlikely_tokens_keep_their_share(options: dict[str, Any], depth: float) -> None:
    """Whole blocks of tokens far below the best one, which together weigh as much as it does."""
    num_peaks = round(1792 * np.exp(-depth)) + 1
    logits = np.full(2048, -depth)
    logits[256 : 256 + num_peaks] = 0
    ids = sample(logits, 20_000, **options)["ids"]
    assert_drawn_from(kept_probs(logits, **options), ids)


@pytest.mark.parametrize("axis", ["positions", "seeds", "large seeds"])
def test_noise_is_uniform_over_ids(axis: str) -> None:
    num_samples, vocab_size = 200_000, 100
    counter = np.arange(num_samples)
    seeds = {"positions": counter * 0 + 7, "seeds": counter, "large seeds": counter << 40}[axis]
    positions = counter if axis == "positions" else counter * 0 + 5
    ids = fulcrum_core.sample_rows(
        np.zeros((1, vocab_size), np.float32), seeds.astype(np.uint64), positions.astype(np.int32)
    )["ids"]
    assert_drawn_from(np.full(vocab_size, 1 / vocab_size), ids)
    pairs = (ids[:-1] % 10) * 10 + ids[1:] % 10  # neighbours must not know of each other
    assert_drawn_from(np.full(100, 0.01), pairs)


def test_noise_is_uniform_over_a_large_vocabulary() -> None:
    ids = sample(np.zeros(49152), 8_000)["ids"]
    for pooled, num_bins in ((ids // 512, 96), (ids % 96, 96), ((ids ^ (ids >> 8)) % 64, 64)):
        assert_drawn_from(np.full(num_bins, 1 / num_bins), pooled)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.83])
def test_equal_tokens_are_cut_at_the_exact_id_by_top_p(top_p: float) -> None:
    size = 1024
    ids = sample(np.zeros(size), 16_000, top_p=top_p)["ids"]
    num_kept = int(np.ceil(np.float64(np.float32(top_p)) * size))
    assert np.array_equal(np.unique(ids), np.arange(num_kept))


@pytest.mark.parametrize("top_k", [1, 17, 500])
def test_equal_tokens_are_cut_at_the_exact_id_by_top_k(top_k: int) -> None:
    ids = sample(np.full(1024, -3.0), 10_000, top_k=top_k)["ids"]
    assert np.array_equal(np.unique(ids), np.arange(top_k))


@pytest.mark.parametrize("options", [{"top_p": 0.4}, {"top_p": 0.77}, {"top_k": 431}], ids=str)
def test_a_nearly_flat_row_is_cut_at_the_exact_token(options: dict[str, Any]) -> None:
    """Hundreds of candidates of almost the same weight: none too few, none too many."""
    logits = np.random.default_rng(8).permutation(600) * np.float32(1e-3)
    ids = sample(logits, 20_000, **options)["ids"]
    assert np.array_equal(np.unique(ids), np.flatnonzero(kept_probs(logits, **options)))


def test_the_kept_set_is_exact_for_random_options() -> None:
    rng = np.random.default_rng(3)
    for case in range(60):
        vocab_size = int(rng.integers(2, 1500))
        logits = random_logits(vocab_size, float(rng.uniform(0.1, 8)), seed=case)
        logits[rng.random(vocab_size) < 0.2] = -np.inf
        logits[rng.integers(vocab_size)] = 0.5
        options: dict[str, Any] = {
            "temperature": float(rng.uniform(0.3, 3)),
            "top_k": int(rng.choice([0, 1, 3, 40, 400])),
            "top_p": float(np.float32(rng.choice([1.0, 0.99, 0.6, 0.05]))),
            "min_p": float(rng.choice([0.0, 0.02, 0.3])),
        }
        num_samples = 2000
        probs = kept_probs(logits, **options)
        counts = np.bincount(
            sample(logits, num_samples, seed=case, **options)["ids"], minlength=vocab_size
        )
        assert counts[probs == 0].sum() == 0, options
        assert counts[probs * num_samples > 25].min(initial=1) > 0, options


@pytest.mark.parametrize("vocab_size", [1, 2, 15, 16, 17, 255, 256, 257, 1000, 49152])
def test_greedy_takes_the_largest_logit_and_the_lowest_id_of_equals(vocab_size: int) -> None:
    rng = np.random.default_rng(vocab_size)
    rows = rng.integers(-3, 4, size=(40, vocab_size)).astype(np.float32)  # full of ties
    rows = np.concatenate([rows, rng.normal(size=(40, vocab_size)).astype(np.float32)])
    ids = sample(rows, len(rows), temperature=0.0)["ids"]
    assert np.array_equal(ids, rows.argmax(axis=1))


def test_greedy_applies_penalties_as_transformers_and_openai_define_them() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    rng = np.random.default_rng(5)
    processor = transformers.RepetitionPenaltyLogitsProcessor(1.3)
    for case in range(100):
        logits = random_logits(300, seed=case)
        history = rng.choice(logits.argsort()[-40:], size=60).astype(np.int32)
        result = sample(
            logits,
            temperature=0.0,
            repetition_penalty=1.3,
            presence_penalty=0.4,
            frequency_penalty=0.2,
            history_ids=history,
            output_start=25,
        )
        expected = processor(
            torch.tensor(history[None], dtype=torch.long), torch.tensor(logits)[None]
        )
        counts = np.bincount(history[25:], minlength=300)
        penalized = expected[0].numpy() - 0.4 * (counts > 0) - 0.2 * counts
        assert result["ids"][0] == penalized.argmax()


def test_penalties_leave_nothing_behind_for_the_next_row() -> None:
    logits = random_logits(50)
    options: dict[str, Any] = {"temperature": 0.0, "frequency_penalty": 0.3, "output_start": 0}
    history = np.full(3, logits.argmax(), np.int32)
    ids = sample(logits, 5, history_ids=history, **options)["ids"]
    assert len(set(ids.tolist())) == 1


@pytest.mark.parametrize("vocab_size", [5, 300, 49152])
def test_logprobs_are_of_the_raw_logits(vocab_size: int) -> None:
    logits = random_logits(vocab_size, 4.0)
    exact = logits.astype(np.float64) - logits.max()
    exact -= np.log(np.exp(exact).sum())
    result = sample(
        logits,
        50,
        temperature=0.7,
        top_p=0.9,
        num_logprobs=20,
        bias_ids=[3],
        bias_values=[4.0],
        repetition_penalty=1.5,
        history_ids=[1, 2],
    )
    np.testing.assert_allclose(result["logprobs"], exact[result["ids"]], atol=2e-6, rtol=2e-7)
    num_top = min(20, vocab_size)
    expected_ids = np.lexsort((np.arange(vocab_size), -exact))[:num_top]
    assert np.array_equal(result["top_ids"][0, :num_top], expected_ids)
    np.testing.assert_allclose(
        result["top_logprobs"][0, :num_top], exact[expected_ids], atol=2e-6, rtol=2e-7
    )


def test_alternatives_with_equal_logits_are_ordered_by_id() -> None:
    logits = np.zeros(1000, np.float32)
    logits[[900, 17, 400]] = 2.0
    top_ids = sample(logits, num_logprobs=6, temperature=0.0)["top_ids"][0]
    assert top_ids[:6].tolist() == [17, 400, 900, 0, 1, 2]


def test_a_target_id_is_reported_and_not_sampled() -> None:
    logits = random_logits(300)
    result = sample(logits, 3, target_id=123, num_logprobs=2)
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum())
    assert result["ids"].tolist() == [123] * 3
    np.testing.assert_allclose(result["logprobs"], exact[123], atol=2e-6)
    assert result["top_ids"][0, 0] == logits.argmax()
    without_alternatives = sample(logits, target_id=123)
    assert without_alternatives["logprobs"][0] == result["logprobs"][0]


def test_logprobs_do_not_change_the_sample() -> None:
    logits = random_logits(3000)
    options = {"temperature": 0.9, "top_p": 0.9}
    plain = sample(logits, 300, **options)["ids"]
    assert np.array_equal(plain, sample(logits, 300, num_logprobs=5, **options)["ids"])


def test_a_row_depends_on_its_seed_and_position_alone() -> None:
    rows = np.stack([random_logits(700, seed=i) for i in range(32)])
    together = sample(rows, 32, seed=2**63 + 5, top_p=0.9)["ids"]
    for i in range(32):
        alone = sample(rows[i], 1, seed=2**63 + 5, first_position=i, top_p=0.9)["ids"]
        assert alone[0] == together[i]
    other_seed = sample(rows, 32, seed=6, top_p=0.9)["ids"]
    other_position = sample(rows, 32, seed=2**63 + 5, first_position=1, top_p=0.9)["ids"]
    assert (other_seed != together).any()
    assert (other_position != together).any()


def test_a_sample_survives_truncation_that_keeps_it() -> None:
    """The noise belongs to the token: removing others leaves the winner where it is kept."""
    logits = random_logits(500)
    free = sample(logits, 2000)["ids"]
    cut = sample(logits, 2000, top_k=50)["ids"]
    kept = np.isin(free, logits.argsort()[-50:])
    assert kept.sum() > 100
    assert np.array_equal(free[kept], cut[kept])


@pytest.mark.parametrize("where", [0, 5, 255, 256, 299])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_logit_that_is_no_number_is_an_error(
    where: int, value: float, temperature: float
) -> None:
    logits = random_logits(300)
    logits[where] = value
    result = sample(logits, temperature=temperature, num_logprobs=3)
    assert result["ids"].tolist() == [-1]
    assert result["errors"] == ["a logit is NaN or infinite"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_any_allowed_token_is_an_error(temperature: float) -> None:
    assert sample(np.full(40, -np.inf), temperature=temperature)["errors"] == [
        "every token is banned"
    ]
    banned = sample(
        np.zeros(3), temperature=temperature, bias_ids=[0, 1, 2], bias_values=[-np.inf] * 3
    )
    assert banned["errors"] == ["every token is banned"]


@pytest.mark.parametrize(
    "options",
    [
        {"target_id": 40},
        {"bias_ids": [40], "bias_values": [1.0]},
        {"bias_ids": [-1], "bias_values": [1.0]},
        {"history_ids": [40], "presence_penalty": 1.0},
    ],
    ids=str,
)
def test_an_id_outside_the_vocabulary_is_an_error(options: dict[str, Any]) -> None:
    assert sample(np.zeros(40), **options)["errors"] == ["a token id lies outside the vocabulary"]


def test_extreme_logits_and_temperatures_are_sampled() -> None:
    extreme = np.array([3e38, -3e38, 3e38, 0, -np.inf], np.float32)
    ids = sample(extreme, 4000)["ids"]
    assert_drawn_from(np.array([0.5, 0, 0.5, 0, 0]), ids)
    logits = random_logits(300)
    for temperature in (1e-38, 1e-6, 1e-3):
        assert set(sample(logits, 50, temperature=temperature)["ids"]) == {logits.argmax()}
    flat = sample(random_logits(10), 50_000, temperature=1e30)["ids"]
    assert_drawn_from(np.full(10, 0.1), flat)
    assert sample(logits, 50, top_p=0.0)["ids"].tolist() == [logits.argmax()] * 50
    assert sample(logits, 50, min_p=1.0)["ids"].tolist() == [logits.argmax()] * 50
    almost_one = float(np.nextafter(np.float32(1), np.float32(0)))
    everything = sample(random_logits(10, 0.5), 50_000, top_p=almost_one)["ids"]
    assert_drawn_from(kept_probs(random_logits(10, 0.5)), everything)
    assert np.array_equal(
        sample(logits, 500, top_k=10_000)["ids"], sample(logits, 500, top_k=0)["ids"]
    )


def test_a_single_allowed_token_is_always_drawn() -> None:
    logits = np.full(600, -np.inf)
    logits[411] = -80.0
    for options in ({}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.1}, {"temperature": 0.0}):
        assert set(sample(logits, 20, **options)["ids"]) == {411}
