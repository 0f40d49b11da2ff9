"""A scheduler's sequences: those that wait and those that run, and the lanes that these have."""

from bisect import insort

from engine.sequence import Sequence, SequenceStatus


class Queues:
    """Both queues are in order of rank; whoever runs has a lane."""

    def __init__(self, num_lanes: int) -> None:
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.by_id: dict[int, Sequence] = {}  # of both
        self.free_lanes = list(range(num_lanes - 1, -1, -1))
        self._num_lanes = num_lanes

    @property
    def is_catching_up(self) -> bool:
        """Whether a sequence waits, or still lacks more than its next token."""
        return bool(self.waiting) or any(
            len(seq.token_ids) - seq.num_computed_tokens > 1 for seq in self.running
        )

    @property
    def first_running(self) -> Sequence | None:
        """The running sequence of the first rank."""
        return self.running[0] if self.running else None

    @property
    def longest_end(self) -> int:
        """Tokens that the longest sequence may come to have."""
        return max(
            (seq.num_prompt_tokens + seq.params.max_tokens for seq in self.by_id.values()),
            default=0,
        )

    def add(self, seq: Sequence) -> None:
        """Let a new sequence wait for its turn."""
        assert seq.seq_id not in self.by_id, f"sequence {seq.seq_id} submitted twice"
        self.by_id[seq.seq_id] = seq
        insort(self.waiting, seq, key=_by_rank)

    def start(self, index: int) -> Sequence:
        """Give a lane to the waiting sequence of this index, which runs from now on."""
        seq = self.waiting.pop(index)
        seq.lane = self.free_lanes.pop()
        seq.num_starts += 1
        seq.status = SequenceStatus.RUNNING
        insort(self.running, seq, key=_by_rank)
        return seq

    def suspend(self, seq: Sequence) -> None:
        """Let a running sequence wait again."""
        self._stop(seq)
        seq.status = SequenceStatus.WAITING
        insort(self.waiting, seq, key=_by_rank)

    def remove(self, seq: Sequence) -> None:
        """Forget a sequence, whatever it does."""
        if seq.status is SequenceStatus.RUNNING:
            self._stop(seq)
        else:
            self.waiting.remove(seq)
        del self.by_id[seq.seq_id]

    def take_waiting(self) -> list[Sequence]:
        """Give up the sequences that wait."""
        taken, self.waiting = self.waiting, []
        for seq in taken:
            del self.by_id[seq.seq_id]
        return taken

    def check_integrity(self) -> None:
        """Raise AssertionError where lanes and queues do not add up."""
        lanes = [seq.lane for seq in self.running] + self.free_lanes
        assert sorted(lanes) == list(range(self._num_lanes)), "lanes lost or used twice"
        queued = self.waiting + self.running
        assert {id(seq) for seq in queued} == {id(seq) for seq in self.by_id.values()}
        for queue in (self.waiting, self.running):
            assert queue == sorted(queue, key=_by_rank), "a queue is out of order"
        for seq in self.waiting:
            assert not seq.block_ids, f"waiting {seq.seq_id} holds blocks"
            assert seq.lane < 0, f"waiting {seq.seq_id} has a lane"

    def _stop(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.free_lanes.append(seq.lane)
        seq.lane = -1


def _by_rank(seq: Sequence) -> tuple[float, int]:
    return seq.rank
