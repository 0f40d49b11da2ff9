"""The blocks of the KV cache: who holds them, which are free, and what text a free one still has.

Only the scheduler calls it. A full block is known by a digest of its tokens and of everything
before them, so that a sequence with the same beginning can share it; a block that nobody holds
keeps its text until the space is needed, least recently used first. The system gives a block its
memory when it is first written, so those never used cost nothing yet.
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence

ROOT_DIGEST = b""


def block_digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Name a full block by the digest of the block before it and its own token ids.

    The hash is cryptographic: two texts that meet in one digest would read each other's keys
    and values, and prompts come from strangers.
    """
    return hashlib.blake2b(parent + array("i", token_ids).tobytes(), digest_size=32).digest()


class BlockManager:
    """Blocks 0 … num_blocks - 1, each free or held by one or more sequences.

    Once `num_kept_blocks` have been used, text that nobody holds makes room before a block that
    was never used does.
    """

    def __init__(
        self, num_blocks: int, block_size: int, num_kept_blocks: int | None = None
    ) -> None:
        self.num_blocks = num_blocks
        self._num_kept_blocks = (
            num_blocks if num_kept_blocks is None else min(num_blocks, num_kept_blocks)
        )
        self._num_used = 0  # ever: blocks from this number on have no memory yet
        self.block_size = block_size
        self._num_holders = [0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks
        self._block_of_digest: dict[bytes, int] = {}
        # Free blocks that were used: without text, and with one, least recently held first.
        self._blank: list[int] = []
        self._cached: dict[int, None] = {}

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._cached) + self.num_blocks - self._num_used

    @property
    def num_held(self) -> int:
        return self.num_blocks - self.num_free

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def find_prefix(self, digests: Sequence[bytes], max_blocks: int) -> list[int]:
        """Return the blocks that hold the longest known beginning, at most `max_blocks`."""
        found: list[int] = []
        for index in range(min(max_blocks, len(digests))):
            block_id = self._block_of_digest.get(digests[index])
            if block_id is None:
                break
            found.append(block_id)
        return found

    def num_free_among(self, block_ids: Iterable[int]) -> int:
        """Count those that nobody holds: sharing them takes them out of the free blocks."""
        return sum(1 for block_id in block_ids if not self._num_holders[block_id])

    def share(self, block_ids: Iterable[int]) -> None:
        """Add a holder to blocks that `find_prefix` returned."""
        for block_id in block_ids:
            if not self._num_holders[block_id]:
                del self._cached[block_id]
            self._num_holders[block_id] += 1

    def allocate(self, count: int) -> list[int]:
        """Hand out `count` free blocks; the caller has checked that there are as many."""
        assert count <= self.num_free, "allocation beyond the free blocks"
        taken: list[int] = []
        for _ in range(count):
            block_id = self._take()
            self._num_holders[block_id] = 1
            taken.append(block_id)
        return taken

    def publish(self, block_id: int, digest: bytes) -> None:
        """Make a full, computed block findable. Of two with the same text the first stays known."""
        if digest not in self._block_of_digest and self._digests[block_id] is None:
            self._digests[block_id] = digest
            self._block_of_digest[digest] = block_id

    def release(self, block_ids: Sequence[int]) -> None:
        """Drop one holder of each block of a sequence, given in the order of its text."""
        # Last block first: without its predecessor a block cannot be found, so it goes sooner.
        for block_id in reversed(block_ids):
            self._num_holders[block_id] -= 1
            assert self._num_holders[block_id] >= 0, f"block {block_id} released twice"
            if self._num_holders[block_id]:
                continue
            if self._digests[block_id] is None:
                self._blank.append(block_id)
            else:
                self._cached[block_id] = None

    def check_integrity(self, held: Iterable[Sequence[int]]) -> None:
        """Compare every count with `held`, the block ids of each sequence that has some.

        Raises AssertionError naming what does not add up: free + held = total, a block's
        holders are the sequences that list it, and a digest leads to the block that bears it.
        """
        holders = Counter(block_id for block_ids in held for block_id in block_ids)
        for block_id, count in enumerate(self._num_holders):
            assert count == holders[block_id], (
                f"block {block_id} counts {count} holders, {holders[block_id]} sequences list it"
            )
        free = [*self._blank, *self._cached, *range(self._num_used, self.num_blocks)]
        assert len(set(free)) == len(free), "a block is free twice"
        assert not holders.keys() & set(free), "a held block is among the free ones"
        assert len(free) + len(holders) == self.num_blocks, (
            f"{len(free)} free + {len(holders)} held blocks are not {self.num_blocks}"
        )
        for block_id in self._blank:
            assert self._digests[block_id] is None, f"blank block {block_id} has a digest"
        known = {
            digest: block_id for block_id, digest in enumerate(self._digests) if digest is not None
        }
        assert known == self._block_of_digest, "digests and blocks disagree"

    def _take(self) -> int:
        if self._blank:
            return self._blank.pop()
        num_used = self._num_used
        if num_used < (self._num_kept_blocks if self._cached else self.num_blocks):
            self._num_used += 1
            return num_used
        block_id = next(iter(self._cached))
        del self._cached[block_id]
        self._forget(block_id)
        return block_id

    def _forget(self, block_id: int) -> None:
        digest = self._digests[block_id]
        assert digest is not None
        del self._block_of_digest[digest]
        self._digests[block_id] = None
