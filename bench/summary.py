"""From the outcomes of a level of concurrency to the figures that bench.serve prints."""

import math
from collections.abc import Sequence

import msgspec

from bench.client import Outcome


class Quantiles(msgspec.Struct, frozen=True):
    """Median and 99th percentile, in milliseconds; None where there was nothing to measure."""

    p50_ms: float | None
    p99_ms: float | None


class Level(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of one level of concurrency; failed requests count in num_errors only."""

    concurrency: int
    num_requests: int
    num_errors: int
    errors: list[str]  # the first few distinct ones
    wall_s: float
    requests_per_s: float
    output_tokens: int
    output_tokens_per_s: float
    mean_prompt_tokens: float | None
    mean_cached_tokens: float | None
    mean_output_tokens: float
    tokens_from_usage: bool
    ttft: Quantiles
    itl: Quantiles  # between chunks, as the client sees them
    tpot: Quantiles  # per request: (last chunk - first chunk) / (output tokens - 1)
    end_to_end: Quantiles


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which `share` of the sorted values lie, linearly interpolated."""
    ordered = sorted(values)
    rank = share * (len(ordered) - 1)
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def _quantiles(values_s: Sequence[float]) -> Quantiles:
    if not values_s:
        return Quantiles(None, None)
    return Quantiles(1e3 * percentile(values_s, 0.5), 1e3 * percentile(values_s, 0.99))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def summarize(concurrency: int, outcomes: Sequence[Outcome]) -> Level:
    """Reduce the outcomes of a level; its wall time runs from the first request to the last end."""
    good = [outcome for outcome in outcomes if outcome.error is None]
    wall_s = max(outcome.sent_at_s + outcome.end_to_end_s for outcome in outcomes) - min(
        outcome.sent_at_s for outcome in outcomes
    )
    output_tokens = sum(outcome.output_tokens for outcome in good)
    errors = dict.fromkeys(outcome.error for outcome in outcomes if outcome.error is not None)
    return Level(
        concurrency=concurrency,
        num_requests=len(outcomes),
        num_errors=len(outcomes) - len(good),
        errors=list(errors)[:3],
        wall_s=wall_s,
        requests_per_s=len(good) / wall_s,
        output_tokens=output_tokens,
        output_tokens_per_s=output_tokens / wall_s,
        mean_prompt_tokens=_mean([outcome.prompt_tokens for outcome in good]),
        mean_cached_tokens=_mean([outcome.cached_tokens for outcome in good]),
        mean_output_tokens=output_tokens / len(good) if good else 0.0,
        tokens_from_usage=bool(good) and all(o.prompt_tokens is not None for o in good),
        ttft=_quantiles([outcome.first_chunk_s for outcome in good]),
        itl=_quantiles([gap for outcome in good for gap in outcome.gaps_s]),
        tpot=_quantiles([t for o in good if (t := o.time_per_token_s) is not None]),
        end_to_end=_quantiles([outcome.end_to_end_s for outcome in good]),
    )


_COLUMNS = (
    *("concurrency", "requests", "errors", "tok/s", "prompt", "output"),
    *("TTFT_p50", "TTFT_p99", "ITL_p50", "ITL_p99", "TPOT_p50", "E2E_p50", "E2E_p99"),
)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def table(levels: Sequence[Level]) -> str:
    """Lay out the levels as text, one line each; times in milliseconds."""
    rows = [
        [
            str(level.concurrency),
            str(level.num_requests),
            str(level.num_errors),
            _cell(level.output_tokens_per_s),
            _cell(level.mean_prompt_tokens),
            _cell(level.mean_output_tokens),
            _cell(level.ttft.p50_ms),
            _cell(level.ttft.p99_ms),
            _cell(level.itl.p50_ms),
            _cell(level.itl.p99_ms),
            _cell(level.tpot.p50_ms),
            _cell(level.end_to_end.p50_ms),
            _cell(level.end_to_end.p99_ms),
        ]
        for level in levels
    ]
    widths = [max(map(len, column)) for column in zip(_COLUMNS, *rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in [_COLUMNS, *rows]
    )
