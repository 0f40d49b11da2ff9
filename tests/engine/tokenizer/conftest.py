"""The tokenizer that several of this folder's tests share; trained once."""

import pytest
import tokenizers
from tokenizers import pre_tokenizers

from tests.engine.tokenizer.trained import train_byte_level


@pytest.fixture(scope="session")
def digits_reference() -> tokenizers.Tokenizer:
    """A byte-level tokenizer like SmolLM2's: digits one by one, then GPT-2's pattern."""
    return train_byte_level(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    )
