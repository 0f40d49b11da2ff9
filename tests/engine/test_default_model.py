"""The default model against transformers: greedy text from the shipped GGUF in bf16."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("gguf")

from tests.engine.oracle import (
    CoreDriver,
    llama_from_gguf,
    load_unquantized,
    reference_logits,
)

NUM_TOKENS = 64
MAX_GAP = 0.05  # between the reference's top two logits, where the texts may part

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "The three laws of thermodynamics are:\n1.",
    "Dear Sir or Madam,\n\nI am writing to",
    "import numpy as np\n\ndef softmax(x):",
    "Q: What is the largest planet?\nA:",
    "In 1969, Neil Armstrong",
    "La tour Eiffel se trouve à",
    "Die Hauptstadt von Deutschland ist",
    "1, 1, 2, 3, 5, 8, 13,",
    "To bake a loaf of bread, you need",
    '{"name": "Ada Lovelace", "born":',
    "The mitochondria is the",
    "Shakespeare wrote",
    "<html>\n<head>\n<title>",
    "Water boils at",
    "      indented text with   many    spaces",
    "人工智能是",
    "My favourite emoji is 🎉 because",
]


@pytest.mark.timeout(900)  # half a minute alone, ten times that on a busy machine
def test_greedy_text_is_that_of_transformers(default_model_path: Path) -> None:
    """Compared by one forward pass of the reference over the engine's own text.

    At each position the engine must have chosen the reference's best token, or one so close to
    it that rounding the weights to bf16 may decide.
    """
    loaded = load_unquantized(
        "smollm2-135m", num_threads=2, max_model_len=128, max_sequences=len(PROMPTS)
    )
    encode = loaded.tokenizer.encode
    prompts = [encode(prompt, add_bos=True, parse_special=False) for prompt in PROMPTS]
    driver = CoreDriver(loaded, max_sequences=len(prompts), max_len=128, max_tokens=64)
    outputs = driver.generate(prompts, NUM_TOKENS)
    reference = llama_from_gguf(default_model_path)
    num_equal = 0
    for text, prompt, output in zip(PROMPTS, prompts, outputs, strict=True):
        logits = reference_logits(reference, prompt + output)[len(prompt) - 1 : -1]
        gaps = logits.max(axis=1) - logits[np.arange(NUM_TOKENS), output]
        num_equal += int((gaps == 0).sum())
        first = int(gaps.argmax())
        assert gaps[first] <= MAX_GAP, f"{text!r} parts at token {first}"
    assert num_equal > 0.98 * NUM_TOKENS * len(PROMPTS)
