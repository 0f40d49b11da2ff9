"""tools.evaluate with the real model, against what the engine reports for the same tokens."""

import threading
from pathlib import Path

import numpy as np

from engine.checkpoint.progress import SilentProgress
from engine.config import EngineConfig
from engine.loader import LoadedModel, load_model
from engine.loop import Engine
from engine.runner import EngineSettings
from engine.types import SamplingParams, StepReport, Submit, TokenEvent
from tools.evaluate import WindowScorer, cut_windows, encode_text, summarize

CONTEXT = 96
TEXT = """
The harbour of the old town lies behind a wall of grey stone, which was built in the seventeenth
century to keep out the sea and, as the people say, the tax collector. It did neither. In the
winter of 1703 a storm carried away two of its towers and most of the fishing boats, and the
following year the king's men arrived by land. Today the wall is a place for walking. Visitors
climb the steps beside the lighthouse in the evening, when the boats come in, and watch the gulls
fight over what the fishermen throw away. There are four restaurants, a small museum of the
history of navigation, and a school with one teacher and eleven children.
"""


def prompt_logprobs(model: LoadedModel, prompt_ids: list[int]) -> list[float]:
    """What the engine reports for the prompt's tokens but the first, in chunks of 40."""
    events: list[TokenEvent] = []
    ended = threading.Event()

    def take(report: StepReport) -> None:
        events.extend(report.events)
        if any(event.finish_reason for event in report.events):
            ended.set()

    settings = EngineSettings(
        max_model_len=model.max_model_len,
        num_kv_blocks=model.num_kv_blocks,
        eos_token_ids=model.eos_token_ids,
        max_sequences=1,
        max_step_tokens=40,
    )
    engine = Engine(model.core, settings, take)
    engine.start()
    params = SamplingParams(max_tokens=1, temperature=0, num_prompt_logprobs=0)
    engine.submit(Submit(0, tuple(prompt_ids), params, 0.0))
    assert ended.wait(30)
    assert engine.stop(1.0)
    entries = events[0].prompt_logprobs
    assert entries is not None
    return [entry.logprob for entry in entries[1:] if entry is not None]


def test_scores_are_those_that_the_engine_gives_for_a_prompt(default_model_path: Path) -> None:
    config = EngineConfig(model=str(default_model_path), max_model_len=CONTEXT + 1)
    model = load_model(config, progress=SilentProgress())
    ids, bos = encode_text(model.tokenizer, TEXT)
    windows = cut_windows(ids, CONTEXT, bos)
    assert len(windows) >= 1
    from_engine = [prompt_logprobs(model, window.tolist()) for window in windows]
    scores = WindowScorer(model.core, CONTEXT, 1).score(windows)
    assert np.array_equal(scores, np.array(from_engine))
    # Plain English: a model that is computed wrongly is far above this.
    assert 5 < summarize(scores).perplexity < 40
