"""One sequence as its client sees it: token ids in, text and log probabilities out.

A `Stream` lives on the event loop. `Generation` feeds it the engine's events and takes what has
become visible since the last time; text waits while a stop string could still match or a UTF-8
character is incomplete.
"""

import time
from collections import deque

from engine.tokenizer.protocol import Detokenizer
from engine.types import DraftSummary, TokenEvent, TokenLogprobs
from server.stop_strings import StopMatcher


class Delta:
    """What became visible of one choice since it was last taken.

    Deltas that nobody took yet grow instead of queueing, so that a slow reader costs no more
    than the text itself.
    """

    __slots__ = ("finish_reason", "first", "index", "logprobs", "pieces", "prompt_logprobs")

    def __init__(self, index: int, first: bool) -> None:
        self.index = index
        self.first = first  # nothing of this choice was taken before
        self.pieces: list[str] = []
        self.logprobs: list[tuple[int, TokenLogprobs]] = []  # with the token's offset in the text
        self.prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
        self.finish_reason: str | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def num_logprobs(self) -> int:
        """Positions with log probabilities: most of the work of rendering a delta."""
        return len(self.logprobs) + len(self.prompt_logprobs)


class Stream:
    """State of one choice. `hide_output` is for prompts that are scored only (max_tokens 0)."""

    def __init__(
        self,
        index: int,
        seq_id: int,
        detokenizer: Detokenizer,
        *,
        stops: tuple[str, ...] = (),
        min_tokens: int = 0,
        num_prompt_tokens: int,
        hide_output: bool = False,
    ) -> None:
        self.index = index
        self.seq_id = seq_id
        self.num_prompt_tokens = num_prompt_tokens
        self.num_cached_tokens = 0
        self.drafts: DraftSummary | None = None
        self.num_tokens = 0  # generated, the one that ended the sequence included
        self.num_events = 0  # steps of the engine that gave something
        self.max_tokens = 1
        self.ignore_eos = False
        self.finish_reason: str | None = None
        self.submitted_s = 0.0
        self.last_token_s: float | None = None
        self.queued_s = 0.0  # until its first step
        self.first_token_s: float | None = None
        self.newest_token_s: float | None = None
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stops) if stops else None
        self._min_tokens = min_tokens
        self._hide_output = hide_output
        self._delta: Delta | None = None
        self._taken_before = False
        # Log probabilities are shown with the text they belong to: those without a piece of text
        # yet (half a character), then those whose text is held back.
        self._unplaced: list[TokenLogprobs] = []
        self._placed: deque[tuple[int, int, TokenLogprobs]] = deque()  # begin, end, entry
        self._num_chars_in = 0
        self._num_chars_out = 0

    @property
    def has_delta(self) -> bool:
        return self._delta is not None

    def take(self) -> Delta:
        """What is visible since the last call."""
        delta = self._delta or Delta(self.index, not self._taken_before)
        self._delta = None
        self._taken_before = True
        return delta

    def push(self, event: TokenEvent) -> None:
        """Apply one step's event; sets `finish_reason` when the sequence or a stop ends it."""
        if self._delta is None:
            self._delta = Delta(self.index, not self._taken_before)
        self.num_events += 1
        if event.prompt_logprobs is not None:
            self._delta.prompt_logprobs = event.prompt_logprobs
        self.num_cached_tokens = max(self.num_cached_tokens, event.num_cached_tokens)
        if event.drafts is not None:
            self.drafts = event.drafts
        self._note_times(event)
        if not self._hide_output:
            self._push_tokens(event)
        if event.finish_reason is not None and self.finish_reason is None:
            self._finish(event.finish_reason)

    def cut(self, reason: str) -> None:
        """End here, though the engine would go on; what was held back is shown."""
        if self._delta is None:
            self._delta = Delta(self.index, not self._taken_before)
        self._finish(reason)

    def _note_times(self, event: TokenEvent) -> None:
        if event.queued_s is not None:
            self.queued_s = event.queued_s
        if event.token_ids:
            self.newest_token_s = time.monotonic()
            if self.first_token_s is None:
                self.first_token_s = self.newest_token_s

    def _push_tokens(self, event: TokenEvent) -> None:
        # The id that ended the sequence has no text and, as with OpenAI's, no log probability.
        ended_by_id = event.finish_reason == "stop"
        num_text_ids = len(event.token_ids) - ended_by_id
        for position in range(num_text_ids):
            self.num_tokens += 1
            if event.logprobs is not None:
                self._unplaced.append(event.logprobs[position])
            piece = self._detokenizer.push(event.token_ids[position])
            if piece and self._show(piece):
                return
        self.num_tokens += ended_by_id

    def _show(self, piece: str) -> bool:
        """Pass text on; true where a stop string ended it."""
        if self._unplaced:
            self._place(piece)
        self._num_chars_in += len(piece)
        if self._matcher is None:
            self._emit(piece)
            return False
        if self.num_tokens < self._min_tokens:
            self._emit(piece)  # like end-of-sequence ids, stop strings count from here on
            return False
        text, stopped = self._matcher.push(piece)
        self._emit(text)
        if stopped:
            self._placed.clear()
            self._set_finished("stop")
        return stopped

    def _emit(self, text: str) -> None:
        assert self._delta is not None
        if text:
            self._delta.pieces.append(text)
            self._num_chars_out += len(text)
        placed = self._placed
        while placed and placed[0][1] <= self._num_chars_out:
            begin, _, entry = placed.popleft()
            self._delta.logprobs.append((begin, entry))

    def _place(self, piece: str) -> None:
        begin = self._num_chars_in
        self._placed.extend((begin, begin + len(piece), entry) for entry in self._unplaced)
        self._unplaced.clear()

    def _finish(self, reason: str) -> None:
        rest = self._detokenizer.flush()
        if rest and self._show(rest):
            return
        if self._matcher is not None:
            self._emit(self._matcher.flush())
        self._place("")
        self._emit("")
        self._set_finished(reason)

    def _set_finished(self, reason: str) -> None:
        assert self._delta is not None
        self.finish_reason = reason
        self._delta.finish_reason = reason
