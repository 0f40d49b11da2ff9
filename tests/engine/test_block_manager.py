"""The block manager against a plain model of itself, after every operation."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engine.block_manager import ROOT_DIGEST, BlockManager, block_digest

BLOCK_SIZE = 2


def digests_of(token_ids: list[int]) -> list[bytes]:
    digests = [ROOT_DIGEST]
    for start in range(0, len(token_ids) - BLOCK_SIZE + 1, BLOCK_SIZE):
        digests.append(block_digest(digests[-1], token_ids[start : start + BLOCK_SIZE]))
    return digests[1:]


class BlockManagerMachine(RuleBasedStateMachine):
    """Sequences come with random text of a tiny alphabet, share what they find, and leave."""

    @initialize(num_blocks=st.integers(1, 12), num_kept_blocks=st.integers(1, 12))
    def create(self, num_blocks: int, num_kept_blocks: int) -> None:
        self.blocks = BlockManager(num_blocks, BLOCK_SIZE, num_kept_blocks)
        self.held: list[tuple[list[int], list[int]]] = []  # (token_ids, block_ids)
        self.text_of: dict[int, tuple[int, ...]] = {}  # what a published block was computed for

    @rule(token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=10), publishes=st.booleans())
    def arrive(self, token_ids: list[int], publishes: bool) -> None:
        digests = digests_of(token_ids)
        prefix = self.blocks.find_prefix(digests, len(digests))
        for index, block_id in enumerate(prefix):
            text = tuple(token_ids[: (index + 1) * BLOCK_SIZE])
            assert self.text_of[block_id] == text, "a block of another text was found"
        count = self.blocks.num_blocks_for(len(token_ids)) - len(prefix)
        free_before = self.blocks.num_free
        num_taken = count + self.blocks.num_free_among(prefix)
        if num_taken > free_before:
            return
        self.blocks.share(prefix)
        fresh = self.blocks.allocate(count)
        assert self.blocks.num_free == free_before - num_taken
        for block_id in fresh:
            self.text_of.pop(block_id, None)
        block_ids = [*prefix, *fresh]
        self.held.append((token_ids, block_ids))
        if publishes:
            for index in range(len(prefix), len(digests)):
                self.blocks.publish(block_ids[index], digests[index])
                self.text_of[block_ids[index]] = tuple(token_ids[: (index + 1) * BLOCK_SIZE])
            found = self.blocks.find_prefix(digests, len(digests))
            assert len(found) == len(digests), "a published text is not found"

    @rule(choice=st.integers(0, 100))
    def leave(self, choice: int) -> None:
        if self.held:
            _, block_ids = self.held.pop(choice % len(self.held))
            self.blocks.release(block_ids)

    @invariant()
    def everything_adds_up(self) -> None:
        self.blocks.check_integrity([block_ids for _, block_ids in self.held])
        distinct = {block_id for _, block_ids in self.held for block_id in block_ids}
        assert self.blocks.num_held == len(distinct)
        assert self.blocks.num_free == self.blocks.num_blocks - len(distinct)


TestBlockManager = BlockManagerMachine.TestCase
TestBlockManager.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


def publish_text(blocks: BlockManager, token_ids: list[int]) -> list[int]:
    block_ids = blocks.allocate(len(token_ids) // BLOCK_SIZE)
    for block_id, digest in zip(block_ids, digests_of(token_ids), strict=True):
        blocks.publish(block_id, digest)
    return block_ids


def test_the_least_recently_held_text_is_overwritten_first() -> None:
    blocks = BlockManager(2, BLOCK_SIZE)
    old, new = publish_text(blocks, [1, 1]), publish_text(blocks, [2, 2])
    blocks.release(old)
    blocks.release(new)
    assert blocks.allocate(1) == old
    assert blocks.find_prefix(digests_of([1, 1]), 1) == []
    assert blocks.find_prefix(digests_of([2, 2]), 1) == new


def test_blocks_without_text_are_taken_before_cached_ones() -> None:
    blocks = BlockManager(3, BLOCK_SIZE)
    cached = publish_text(blocks, [1, 1])
    blocks.release(cached)
    assert not set(blocks.allocate(2)) & set(cached)
    assert blocks.find_prefix(digests_of([1, 1]), 1) == cached


def test_a_sequence_loses_its_last_block_before_its_first() -> None:
    blocks = BlockManager(3, BLOCK_SIZE)
    block_ids = publish_text(blocks, [1, 1, 2, 2, 3, 3])
    blocks.release(block_ids)
    assert blocks.allocate(1) == block_ids[-1:]
    assert blocks.find_prefix(digests_of([1, 1, 2, 2, 3, 3]), 3) == block_ids[:2]


def test_equal_tokens_after_different_beginnings_are_different_blocks() -> None:
    blocks = BlockManager(4, BLOCK_SIZE)
    publish_text(blocks, [1, 1, 5, 5])
    first = publish_text(blocks, [2, 2])
    assert blocks.find_prefix(digests_of([2, 2, 5, 5]), 2) == first


def test_a_shared_block_stays_held_until_its_last_holder_leaves() -> None:
    blocks = BlockManager(1, BLOCK_SIZE)
    block_ids = publish_text(blocks, [1, 1])
    blocks.share(block_ids)
    blocks.release(block_ids)
    assert (blocks.num_free, blocks.num_held) == (0, 1)
    blocks.release(block_ids)
    assert (blocks.num_free, blocks.num_held) == (1, 0)


def test_integrity_check_sees_a_lost_holder() -> None:
    blocks = BlockManager(2, BLOCK_SIZE)
    block_ids = blocks.allocate(1)
    with pytest.raises(AssertionError, match="holders"):
        blocks.check_integrity([])
    with pytest.raises(AssertionError, match="holders"):
        blocks.check_integrity([block_ids, block_ids])


def test_text_that_nobody_holds_goes_before_memory_is_taken_beyond_what_it_may_keep() -> None:
    blocks = BlockManager(8, BLOCK_SIZE, num_kept_blocks=3)
    digests = digests_of([0, 0, 0, 0, 0, 0])
    held = blocks.allocate(3)
    for block_id, digest in zip(held, digests, strict=True):
        blocks.publish(block_id, digest)
    blocks.release(held)
    assert blocks.num_free == 8
    assert set(blocks.allocate(2)) == set(held[1:])  # used before, the end of the text first
    assert blocks.find_prefix(digests, 3) == held[:1]
    assert blocks.allocate(1) == held[:1]
    # Those who run get all there is.
    assert set(blocks.allocate(5)) == set(range(8)) - set(held)
    assert blocks.num_free == 0
