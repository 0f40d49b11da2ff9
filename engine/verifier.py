"""What the sampled rows of a step mean for a sequence: its new token, its logprobs, its end.

The scheduler's commit calls it once per sequence that has rows. It sees ids and samples only.
"""

from engine.batch import SampledRows
from engine.sequence import Sequence
from engine.types import FinishReason, TokenEvent

INVALID_LOGITS = "the model gave no usable probabilities for this sequence"


def accept_rows(
    seq: Sequence, rows: SampledRows, first_row: int, end_row: int, max_model_len: int
) -> TokenEvent | None:
    """Append what rows first_row … end_row - 1 yield to `seq` and return its event, if any.

    The tokens that the rows belong to already count as computed. The last row is a sample where
    the sequence has caught up with its tokens; the others belong to tokens of the prompt.
    """
    caught_up = seq.num_computed_tokens == len(seq.token_ids)
    if seq.needs_prompt_logprobs:
        end_of_prompt_row = end_row - 1 if caught_up else end_row
        if not _read_prompt_logprobs(seq, rows, first_row, end_of_prompt_row):
            return seq.event(finish_reason="error", error=INVALID_LOGITS)
    if not caught_up:
        return None
    row = end_row - 1
    token_id = rows.token_ids[row]
    if token_id < 0:
        return seq.event(finish_reason="error", error=INVALID_LOGITS)
    seq.token_ids.append(token_id)
    num_logprobs = seq.params.num_logprobs
    logprobs = None
    if num_logprobs is not None:
        logprobs = (rows.logprobs_of(row, token_id, num_logprobs),)
    return seq.event((token_id,), _finish_reason(seq, token_id, max_model_len), logprobs)


def _finish_reason(seq: Sequence, token_id: int, max_model_len: int) -> FinishReason | None:
    if token_id in seq.stop_ids:
        return "stop"
    num_tokens = len(seq.token_ids)
    if num_tokens - seq.num_prompt_tokens >= seq.params.max_tokens or num_tokens >= max_model_len:
        return "length"
    return None


def _read_prompt_logprobs(seq: Sequence, rows: SampledRows, first_row: int, end_row: int) -> bool:
    """Collect the logprobs of one chunk of the prompt; false where the core had none to give."""
    num_logprobs = seq.params.num_prompt_logprobs
    assert num_logprobs is not None
    for row in range(first_row, end_row):
        if rows.token_ids[row] < 0:
            return False
        token_id = seq.token_ids[len(seq.prompt_logprobs)]
        seq.prompt_logprobs.append(rows.logprobs_of(row, token_id, num_logprobs))
    seq.needs_prompt_logprobs = len(seq.prompt_logprobs) < seq.num_prompt_tokens
    return True
