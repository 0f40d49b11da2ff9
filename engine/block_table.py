"""The block table of a step, kept from one step to the next while its sequences are the same."""

from collections.abc import Sequence as Row

import numpy as np
from numpy.typing import NDArray

from engine.lanes import Int32Array, Lanes
from engine.sequence import Sequence


class BlockTable:
    """Remembers whose blocks the core's table holds: mostly those of the step before.

    Writing all anew takes long enough for NumPy to release the interpreter's lock, which another
    thread may then keep for milliseconds.
    """

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self._sequences: list[Sequence] = []
        self._num_blocks: list[int] = []
        self._row_lanes: NDArray[np.intp] = np.zeros(0, np.intp)

    def forget(self) -> None:
        """Let the next step write it in any case: a lane or the table has changed."""
        self._sequences = []

    def fill(self, table: Int32Array, entries: Row[tuple[Sequence, int]]) -> NDArray[np.intp]:
        """Write the blocks of each entry's sequence, which its lane has; return the lanes."""
        sequences = [seq for seq, _ in entries]
        if sequences == self._sequences:
            for row, num_written in enumerate(self._num_blocks):
                block_ids = sequences[row].block_ids
                num_blocks = len(block_ids)
                if num_blocks != num_written:
                    table[row, num_written:num_blocks] = block_ids[num_written:]
                    self._num_blocks[row] = num_blocks
            return self._row_lanes
        self._sequences = sequences
        self._num_blocks = [len(seq.block_ids) for seq in sequences]
        self._row_lanes = np.array([seq.lane for seq in sequences], np.intp)
        num_columns = max(self._num_blocks)
        table[: len(sequences), :num_columns] = self._lanes.blocks[self._row_lanes, :num_columns]
        return self._row_lanes
