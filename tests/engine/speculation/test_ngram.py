"""Prompt lookup against a plain search over the whole text, and the reuse of its lanes."""

import random
import time

import fulcrum_core
import numpy as np
import pytest

from engine.sequence import Sequence
from engine.speculation.ngram import NgramDrafter
from engine.types import SamplingParams, Submit

MAX_MATCH = 8


def lookup(text: list[int], num_drafts: int) -> tuple[list[int], int]:
    """What cpp/ngram.h must find: the newest of the longest matches, and its continuation."""
    for length in range(min(MAX_MATCH, len(text) - 1), 0, -1):
        for end in range(len(text) - 1, length - 1, -1):
            if text[end - length : end] == text[-length:]:
                draft: list[int] = []
                for i in range(end, end + num_drafts):
                    draft.append(text[i] if i < len(text) else draft[i - len(text)])
                return draft, length
    return [], 0


class Lookup:
    """The core's index over a table of its own."""

    def __init__(self, num_lanes: int = 1, max_len: int = 512, num_drafts: int = 6) -> None:
        self.tokens = np.zeros((num_lanes, max_len), np.int32)
        self.index = fulcrum_core.NgramIndex(num_lanes, MAX_MATCH)
        self.num_drafts = num_drafts

    def __call__(
        self, texts: dict[int, list[int]], owners: dict[int, int] | None = None
    ) -> list[tuple[list[int], int]]:
        for lane, text in texts.items():
            self.tokens[lane, : len(text)] = text
        count = len(texts)
        ids = np.zeros((count, self.num_drafts), np.int32)
        num_drafts, lengths = np.zeros(count, np.int32), np.zeros(count, np.int32)
        self.index.propose(
            self.tokens,
            np.array(list(texts), np.int32),
            np.array([(owners or {}).get(lane, lane) for lane in texts], np.int64),
            np.array([len(text) for text in texts.values()], np.int32),
            np.full(count, self.num_drafts, np.int32),
            ids,
            num_drafts,
            lengths,
        )
        return [
            (row[:number].tolist(), int(length))
            for row, number, length in zip(ids, num_drafts, lengths, strict=True)
        ]


@pytest.mark.parametrize("vocab_size", [2, 5, 40, 50_000])
def test_finds_the_newest_longest_match_while_texts_grow(vocab_size: int) -> None:
    generator = random.Random(vocab_size)
    find = Lookup(num_lanes=3, max_len=400)
    texts = {lane: [generator.randrange(vocab_size) for _ in range(lane)] for lane in range(3)}
    for _ in range(120):
        for text in texts.values():
            if generator.random() < 0.3 and len(text) > 8:  # repeat a passage
                start = generator.randrange(len(text) - 4)
                text += text[start : start + 4]
            text += [generator.randrange(vocab_size) for _ in range(generator.randrange(1, 4))]
            del text[398:]
        assert find(texts) == [lookup(text, 6) for text in texts.values()]


def test_a_lane_of_another_sequence_starts_anew() -> None:
    find = Lookup()
    find({0: [1, 2, 3, 4, 1, 2]}, {0: 7})
    assert find({0: [9, 8, 7, 6, 5, 9, 8]}, {0: 8}) == [([7, 6, 5, 9, 8, 7], 2)]
    # Longer than the former text, and with its tokens at the end only.
    assert find({0: [5, 5, 6, 7, 1, 2, 3, 1, 2]}, {0: 9}) == [([3, 1, 2, 3, 1, 2], 2)]


def test_a_text_that_shrinks_or_changes_starts_anew() -> None:
    find = Lookup()
    find({0: [1, 2, 3, 4, 5, 1, 2]})
    assert find({0: [1, 2, 1]}) == [([2, 1, 2, 1, 2, 1], 1)]
    assert find({0: [4, 5, 6, 4, 5]}) == [([6, 4, 5, 6, 4, 5], 2)]


def test_memory_follows_the_texts_that_the_lanes_hold() -> None:
    find = Lookup(num_lanes=2, max_len=8192)
    find({0: list(range(8000)), 1: [1, 2]})
    assert find.index.num_bytes < 40 * 8000
    find({0: [1, 2, 3], 1: [1, 2]}, {0: 5})
    assert find.index.num_bytes < 4096


def test_nothing_is_written_outside_the_table_it_is_given() -> None:
    find = Lookup(max_len=8)
    with pytest.raises(IndexError):
        find.index.propose(
            find.tokens,
            *(np.array([value], dtype) for value, dtype in ((1, np.int32), (0, np.int64))),
            *(np.array([value], np.int32) for value in (4, 4)),
            np.zeros((1, 4), np.int32),
            *(np.zeros(1, np.int32) for _ in range(2)),
        )


def sequence(seq_id: int, lane: int, token_ids: list[int]) -> Sequence:
    message = Submit(seq_id, tuple(token_ids), SamplingParams(max_tokens=8), 0.0)
    seq = Sequence(message, frozenset())
    seq.lane = lane
    return seq


def test_drafter_gives_no_more_than_asked_and_a_bucket_for_each_token() -> None:
    tokens = np.zeros((4, 64), np.int32)
    texts = {3: [1, 2, 3, 4, 1, 2], 1: [1, 2, 3, 4], 0: [7, 7, 7]}
    for lane, text in texts.items():
        tokens[lane, : len(text)] = text
    drafter = NgramDrafter(tokens, max_drafts=5)
    sequences = [sequence(lane, lane, text) for lane, text in texts.items()]
    drafts = drafter.propose(sequences, [3, 5, 99])
    assert [draft.token_ids for draft in drafts] == [[3, 4, 1], [], [7] * 5]
    for draft in drafts:
        assert len(draft.buckets) == len(draft.token_ids)
        assert all(0 <= bucket < len(drafter.priors) for bucket in draft.buckets)
    # A longer match promises more.
    assert drafter.priors[drafts[0].buckets[0]] > 0.4
    assert len(drafter.position_priors) == drafter.max_drafts


def test_costs_little_at_8000_tokens() -> None:
    """The limit is 20 µs a sequence; the test allows a busy machine ten times that."""
    generator = random.Random(0)
    # Frequencies as in a language: a few tokens make up most of the text.
    text = [int(generator.paretovariate(0.6)) % 49_152 for _ in range(8192)]
    tokens = np.array([text], np.int32).repeat(8, axis=0)
    drafter = NgramDrafter(tokens)
    sequences = [sequence(lane, lane, text[:7900]) for lane in range(8)]
    times_s = []
    for length in range(7900, 8000):
        for seq in sequences:
            seq.token_ids.append(text[length])
        began_s = time.perf_counter()
        drafter.propose(sequences, [8] * 8)
        times_s.append((time.perf_counter() - began_s) / 8)
    assert sorted(times_s)[len(times_s) // 2] < 200e-6
