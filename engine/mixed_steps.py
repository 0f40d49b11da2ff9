"""How many tokens of prompts a step computes beside sequences that decode.

The scheduler plans by it, and the server's forecasts follow it.
"""

# Of both kinds, as long as no more prompts wait than that.
USUAL_MIXED_TOKENS = 128
MIN_MIXED_CHUNK = 40
# Steps in which the prompts that are there now are to be computed, as far as gaps between tokens
# allow it.
DRAIN_STEPS = 3


def mixed_chunk(
    num_open: float, num_decoding: float, num_drafted: float, num_prompt_tokens: float
) -> int:
    """Tokens of prompts that a step may compute beside num_decoding sequences that decode.

    num_drafted drafts are verified with them, num_open sequences are there in all, and
    num_prompt_tokens are still to be computed of their prompts.
    """
    usual = min(16 + 3 * num_open, USUAL_MIXED_TOKENS - num_decoding)
    most = 16 + 3 * num_open + 2 * num_drafted
    return max(round(min(max(usual, num_prompt_tokens / DRAIN_STEPS), most)), MIN_MIXED_CHUNK)
