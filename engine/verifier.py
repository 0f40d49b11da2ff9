"""What the sampled rows of a step mean for a sequence: its new tokens, their logprobs, its end.

The scheduler's commit calls it once per sequence that has rows. It sees ids and samples only: who
drafted is no concern of it.
"""

from engine.batch import SampledRows
from engine.sequence import Sequence
from engine.types import FinishReason, TokenEvent, TokenLogprobs

INVALID_LOGITS = "the model gave no usable probabilities for this sequence"


def accept_rows(
    seq: Sequence, rows: SampledRows, first_row: int, end_row: int, max_model_len: int
) -> TokenEvent | None:
    """Append what rows first_row … end_row - 1 yield to `seq` and return its event, if any.

    The tokens that the rows belong to, drafts included, already count as computed. Where the
    sequence has caught up with its tokens, the last 1 + K rows are samples: of the next token and,
    each as if the drafts before it were right, of those after it. The longest prefix of the drafts
    that the samples repeat is emitted with the sample that follows it. Others are rows of the
    prompt.
    """
    num_logprobs = seq.params.num_logprobs
    num_drafts = len(seq.draft_ids)
    if not num_drafts and num_logprobs is None and not seq.needs_prompt_logprobs:
        return _accept_sample(seq, rows.token_ids[end_row - 1], max_model_len)
    caught_up = seq.num_computed_tokens == len(seq.token_ids) + num_drafts
    first_sample = end_row - 1 - num_drafts if caught_up else end_row
    if seq.needs_prompt_logprobs and not _read_prompt_logprobs(seq, rows, first_row, first_sample):
        return seq.event(finish_reason="error", error=INVALID_LOGITS)
    if not caught_up:
        return None
    emitted: list[int] = []
    logprobs: list[TokenLogprobs] = []
    finish_reason: FinishReason | None = None
    for row, draft_id in zip(range(first_sample, end_row), (*seq.draft_ids, -1), strict=True):
        token_id = rows.token_ids[row]
        if token_id < 0:
            # The tokens before it stand; the step that starts from them meets the error again.
            if not emitted:
                return seq.event(finish_reason="error", error=INVALID_LOGITS)
            break
        seq.token_ids.append(token_id)
        emitted.append(token_id)
        if num_logprobs is not None:
            logprobs.append(rows.logprobs_of(row, token_id, num_logprobs))
        finish_reason = _finish_reason(seq, token_id, max_model_len)
        if finish_reason is not None or token_id != draft_id:
            break
    # Rejected drafts stay in the cache beyond this point; the next step overwrites them.
    seq.num_computed_tokens = len(seq.token_ids) - 1
    if seq.draft_stats is not None:
        seq.draft_stats.count_step(sum(map(int.__eq__, emitted, seq.draft_ids)))
    seq.draft_ids = []
    return seq.event(
        tuple(emitted), finish_reason, tuple(logprobs) if num_logprobs is not None else None
    )


def _accept_sample(seq: Sequence, token_id: int, max_model_len: int) -> TokenEvent | None:
    """The same for one row and nothing else, as most sequences have: in a third of the time."""
    token_ids = seq.token_ids
    if seq.num_computed_tokens != len(token_ids):
        return None
    if token_id < 0:
        return seq.event(finish_reason="error", error=INVALID_LOGITS)
    token_ids.append(token_id)
    if seq.draft_stats is not None:
        seq.draft_stats.count_step(0)
    return seq.event((token_id,), _finish_reason(seq, token_id, max_model_len))


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
