"""Beginnings that sequences have in common: who computes their blocks, and who waits for them.

Only the scheduler calls it. What a block manager keeps of ended text is found here as well.
"""

from collections.abc import Sequence as Row

from engine.block_manager import ROOT_DIGEST, BlockManager, block_digest
from engine.sequence import Sequence, SequenceStatus


class PrefixSharing:
    """The blocks that running sequences compute, by what they will hold."""

    def __init__(self, blocks: BlockManager) -> None:
        self._blocks = blocks
        self._block_size = blocks.block_size
        # Blocks that a running sequence will have computed and published soon, by digest.
        self._computing: dict[bytes, Sequence] = {}
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0

    def usable(self, seq: Sequence) -> Row[int] | None:
        """Find the cached blocks that `seq` can start from; None: somebody computes more of them.

        Equal prompts that arrive together thus wait for the first of them, instead of each
        computing the same blocks.
        """
        if seq.needs_prompt_logprobs:
            return []
        if seq.awaited_digest is not None and seq.awaited_digest in self._computing:
            return None
        num_tokens = len(seq.token_ids)
        self._extend_digests(seq, num_tokens // self._block_size)
        # The last token is computed in any case: its logits are wanted.
        max_blocks = (num_tokens - 1) // self._block_size
        prefix = self._blocks.find_prefix(seq.block_digests, max_blocks)
        if len(prefix) < max_blocks and seq.block_digests[len(prefix)] in self._computing:
            seq.awaited_digest = seq.block_digests[len(prefix)]
            return None
        seq.awaited_digest = None
        return prefix

    def announce(self, seq: Sequence) -> None:
        """Let others wait for the blocks that `seq`, which has just started, will compute."""
        for digest in seq.block_digests[seq.num_published_blocks :]:
            self._computing.setdefault(digest, seq)

    def publish(self, seq: Sequence) -> None:
        """Let others share the blocks that `seq` has filled."""
        num_full = seq.num_computed_tokens // self._block_size
        self._extend_digests(seq, num_full)
        for index in range(seq.num_published_blocks, num_full):
            digest = seq.block_digests[index]
            self._blocks.publish(seq.block_ids[index], digest)
            if self._computing.get(digest) is seq:
                del self._computing[digest]
        seq.num_published_blocks = num_full

    def withdraw(self, seq: Sequence) -> None:
        """Let nobody wait for `seq` any longer: it stops running."""
        for digest in seq.block_digests[seq.num_published_blocks :]:
            if self._computing.get(digest) is seq:
                del self._computing[digest]

    def count(self, seq: Sequence) -> None:
        """Count what a sequence that starts for the first time looked up and found."""
        if not seq.needs_prompt_logprobs:
            self.num_queried_tokens += seq.num_prompt_tokens
            self.num_hit_tokens += seq.num_cached_tokens

    def continue_counts(self, former: "PrefixSharing") -> None:
        """Go on counting where another one is."""
        self.num_queried_tokens = former.num_queried_tokens
        self.num_hit_tokens = former.num_hit_tokens

    def check_integrity(self) -> None:
        """Raise AssertionError where a block is awaited of a sequence that does not run."""
        for seq in self._computing.values():
            assert seq.status is SequenceStatus.RUNNING, "a block awaits a sequence that left"

    def _extend_digests(self, seq: Sequence, num_blocks: int) -> None:
        digests = seq.block_digests
        size = self._block_size
        for index in range(len(digests), num_blocks):
            parent = digests[-1] if digests else ROOT_DIGEST
            digests.append(block_digest(parent, seq.token_ids[index * size : (index + 1) * size]))
