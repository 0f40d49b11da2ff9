"""From the answers of bench.speculate to its figures: by mode and task group, and by load."""

from collections.abc import Mapping, Sequence

import msgspec

from bench.client import Outcome

ALL = "all"


class Answer(msgspec.Struct, frozen=True):
    """What one prompt gave in one mode."""

    question_id: int
    group: str
    mode: str
    outcome: Outcome


class GroupFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One mode over the prompts of one group, pooled."""

    num_prompts: int
    output_tokens: int
    tokens_per_step: float
    decode_tokens_per_s: float
    speedup: float  # of decoding, against off
    num_drafted: int
    num_accepted: int
    # Share of the steps in which the token at this position was drafted and accepted.
    accepted_by_position: list[float]


class ModeSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One mode: its groups, and all of them together under "all"."""

    mode: str
    groups: dict[str, GroupFigures]
    different_texts: list[int]  # question ids


class SweepLevel(msgspec.Struct, frozen=True, kw_only=True):
    """Several streams at once: output tokens per second over whole requests, by mode and round."""

    streams: int
    num_prompts: int
    tokens_per_s: dict[str, list[float]]
    ratio: float  # auto against off, all rounds together
    tokens_per_step: float  # of auto
    different_texts: list[int]

    @classmethod
    def of(cls, streams: int, rounds: Mapping[str, Sequence[Sequence[Answer]]]) -> "SweepLevel":
        """Reduce the rounds of "off" and "auto"."""
        tokens_per_s = {
            mode: [_output_tokens(answers) / _wall_s(answers) for answers in of_mode]
            for mode, of_mode in rounds.items()
        }
        wall_s = {mode: sum(map(_wall_s, of_mode)) for mode, of_mode in rounds.items()}
        auto = [answer for answers in rounds["auto"] for answer in answers]
        expected = {answer.question_id: answer.outcome.text for answer in rounds["off"][0]}
        return cls(
            streams=streams,
            num_prompts=len(expected),
            tokens_per_s=tokens_per_s,
            ratio=wall_s["off"] / wall_s["auto"],
            tokens_per_step=_output_tokens(auto) / _total(auto, "num_steps"),
            different_texts=_different(auto, expected),
        )


def _output_tokens(answers: Sequence[Answer]) -> int:
    return sum(answer.outcome.output_tokens for answer in answers)


def _wall_s(answers: Sequence[Answer]) -> float:
    outcomes = [answer.outcome for answer in answers]
    return max(outcome.sent_at_s + outcome.end_to_end_s for outcome in outcomes) - min(
        outcome.sent_at_s for outcome in outcomes
    )


def _total(answers: Sequence[Answer], name: str) -> int:
    return sum((answer.outcome.fulcrum or {}).get(name, 0) for answer in answers)


def _different(answers: Sequence[Answer], expected: Mapping[int, str]) -> list[int]:
    return sorted(
        {
            answer.question_id
            for answer in answers
            if answer.outcome.text != expected[answer.question_id]
        }
    )


def _decode_rate(answers: Sequence[Answer]) -> float:
    """Tokens per second after the first chunk, over the answers that have more than one."""
    longer = [a.outcome for a in answers if len(a.outcome.chunk_times_s) > 1]
    seconds = sum(outcome.chunk_times_s[-1] - outcome.first_chunk_s for outcome in longer)
    tokens = sum(outcome.output_tokens - 1 for outcome in longer)
    return tokens / seconds if seconds else 0.0


def _figures(answers: Sequence[Answer], off_rate: float) -> GroupFigures:
    num_steps = _total(answers, "num_steps")
    accepted: list[int] = []
    for answer in answers:
        for position, count in enumerate(
            (answer.outcome.fulcrum or {}).get("accepted_by_position", [])
        ):
            if position == len(accepted):
                accepted.append(0)
            accepted[position] += count
    rate = _decode_rate(answers)
    return GroupFigures(
        num_prompts=len(answers),
        output_tokens=_output_tokens(answers),
        tokens_per_step=_output_tokens(answers) / max(num_steps, 1),
        decode_tokens_per_s=rate,
        speedup=rate / off_rate if off_rate else 0.0,
        num_drafted=_total(answers, "drafted_tokens"),
        num_accepted=_total(answers, "accepted_tokens"),
        accepted_by_position=[count / max(num_steps, 1) for count in accepted],
    )


def summarize(answers: Sequence[Answer], modes: Sequence[str]) -> list[ModeSummary]:
    """Pool the answers by mode and group; `off` is among the modes."""
    groups = [*dict.fromkeys(answer.group for answer in answers), ALL]
    of = {
        (mode, group): [a for a in answers if a.mode == mode and group in (a.group, ALL)]
        for mode in modes
        for group in groups
    }
    expected = {answer.question_id: answer.outcome.text for answer in of["off", ALL]}
    off_rates = {group: _decode_rate(of["off", group]) for group in groups}
    return [
        ModeSummary(
            mode=mode,
            groups={group: _figures(of[mode, group], off_rates[group]) for group in groups},
            different_texts=_different(of[mode, ALL], expected),
        )
        for mode in modes
    ]


def _lay_out(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def table(summaries: Sequence[ModeSummary]) -> str:
    """Lay out the modes as text, one line for each group."""
    rows = [
        ["mode", "group", "prompts", "tok/step", "tok/s", "speed-up", "accepted", "by position, %"]
    ]
    for summary in summaries:
        for group, figures in summary.groups.items():
            share = figures.num_accepted / figures.num_drafted if figures.num_drafted else None
            rows.append(
                [
                    summary.mode,
                    group,
                    str(figures.num_prompts),
                    f"{figures.tokens_per_step:.2f}",
                    f"{figures.decode_tokens_per_s:.1f}",
                    f"{figures.speedup:.2f}",
                    "-" if share is None else f"{share:.2f}",
                    " ".join(f"{100 * value:.0f}" for value in figures.accepted_by_position) or "-",
                ]
            )
    lines = [_lay_out(rows)]
    for summary in summaries[1:]:
        count = len(summary.different_texts)
        total = summary.groups[ALL].num_prompts
        lines.append(f"{summary.mode}: {total - count} of {total} texts equal to off")
    return "\n".join(lines)


def sweep_table(levels: Sequence[SweepLevel]) -> str:
    """Lay out the load sweep as text, one line for each number of streams."""
    rows = [["streams", "prompts", "off tok/s", "auto tok/s", "auto/off", "tok/step", "different"]]
    for level in levels:
        rows.append(
            [
                str(level.streams),
                str(level.num_prompts),
                *(
                    " ".join(f"{rate:.0f}" for rate in level.tokens_per_s[mode])
                    for mode in ("off", "auto")
                ),
                f"{level.ratio:.3f}",
                f"{level.tokens_per_step:.2f}",
                str(len(level.different_texts)),
            ]
        )
    return _lay_out(rows)
