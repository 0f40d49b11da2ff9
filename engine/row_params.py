"""The sampling parameters of a step's rows, copied from their lanes into the core's buffers.

The batch calls it once a step. What does not change from step to step is copied only where other
rows are sampled than in the step before.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.lanes import Float32Array, Int32Array, Lanes

Buffers = dict[str, NDArray[Any]]


class RowParams:
    """Remembers whose parameters the buffers hold."""

    def __init__(self, lanes: Lanes, max_model_len: int) -> None:
        self._lanes = lanes
        self._max_model_len = max_model_len
        # Whose parameters the row buffers hold; None: they must be written in any case.
        self._written_lanes: NDArray[np.intp] | None = None
        self._penalised: Int32Array = np.zeros(0, np.int32)
        self._any_bias = False
        self._has_old_bias = False  # bias_start holds ranges of an earlier step

    def forget(self) -> None:
        """Let the next step write them in any case: a lane or the buffers have changed."""
        self._written_lanes = None

    def fill(
        self, buffers: Buffers, row_lanes: NDArray[np.intp], samples: NDArray[np.bool_] | None
    ) -> bool:
        """Write those of a lane for each row; whether `buffers` has new arrays, to be bound.

        `samples` marks the rows that are samples; None: all are.
        """
        written = self._written_lanes
        # Mostly it is the same array: comparing them takes as long as a few of the copies.
        if written is not row_lanes and (written is None or not np.array_equal(written, row_lanes)):
            self._copy(buffers, row_lanes, samples)
        return self._fill_ranges(buffers, row_lanes)

    def fill_few(self, buffers: Buffers, few_lanes: NDArray[np.intp], num_rows: int) -> bool:
        """The same for a few samples of one lane: `few_lanes` is its number, more than often
        enough, and the same array each time."""
        if self._written_lanes is not few_lanes:
            self._copy(buffers, few_lanes, None)
        return self._fill_ranges(buffers, few_lanes[:num_rows])

    def _fill_ranges(self, buffers: Buffers, row_lanes: NDArray[np.intp]) -> bool:
        """Write what of the parameters changes from step to step: how far the history reaches."""
        num_rows = len(row_lanes)
        history_end = buffers["history_end"][:num_rows]
        np.multiply(
            self._penalised[:num_rows], buffers["noise_position"][:num_rows], out=history_end
        )
        history_end += buffers["history_start"][:num_rows]
        if self._any_bias:
            return self._fill_bias(buffers, row_lanes)
        if self._has_old_bias:
            buffers["bias_start"].fill(0)
            self._has_old_bias = False
        return False

    def _copy(
        self, buffers: Buffers, row_lanes: NDArray[np.intp], samples: NDArray[np.bool_] | None
    ) -> None:
        lanes = self._lanes
        num_rows = len(row_lanes)
        self._written_lanes = None
        for name, values in lanes.params.items():
            buffers[name][:num_rows] = values[row_lanes]
        num_logprobs = lanes.num_logprobs[row_lanes]
        if samples is not None:
            num_prompt_logprobs = lanes.num_prompt_logprobs[row_lanes]
            num_logprobs = np.where(samples, num_logprobs, num_prompt_logprobs)
        buffers["num_logprobs"][:num_rows] = num_logprobs
        penalised = lanes.is_penalised[row_lanes]
        if samples is not None:
            penalised = penalised * samples  # the prompt's rows sample nothing
        start = penalised * (row_lanes * self._max_model_len)
        output_start = start + penalised * lanes.num_prompt_tokens[row_lanes]
        buffers["history_start"][:num_rows] = start
        buffers["history_output_start"][:num_rows] = output_start
        self._penalised = penalised
        self._any_bias = bool(lanes.is_biased[row_lanes].any())
        if samples is None:
            self._written_lanes = row_lanes

    def _fill_bias(self, buffers: Buffers, row_lanes: NDArray[np.intp]) -> bool:
        self._has_old_bias = True
        noise_position = buffers["noise_position"]
        ids: list[Int32Array] = []
        values: list[Float32Array] = []
        bias_start = buffers["bias_start"]
        end = 0
        for row, lane in enumerate(row_lanes.tolist()):
            if self._lanes.is_biased[lane]:
                row_ids, row_values = self._lanes.bias[lane].at(noise_position[row])
                ids.append(row_ids)
                values.append(row_values)
                end += len(row_ids)
            bias_start[row + 1] = end
        has_outgrown = end > len(buffers["bias_ids"])
        if has_outgrown:
            buffers["bias_ids"] = np.zeros(2 * end, np.int32)
            buffers["bias_values"] = np.zeros(2 * end, np.float32)
        if ids:
            np.concatenate(ids, out=buffers["bias_ids"][:end])
            np.concatenate(values, out=buffers["bias_values"][:end])
        return has_outgrown
