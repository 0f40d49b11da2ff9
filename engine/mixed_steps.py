"""How many tokens of prompts a step computes beside sequences that decode.

The scheduler plans by it, and the server's forecasts follow it.
"""

import math

# Of both kinds, as long as no more prompts wait than that.
USUAL_MIXED_TOKENS = 128
MIN_MIXED_CHUNK = 40
# Steps in which the prompts that are there are to be computed, as far as gaps between tokens allow.
DRAIN_STEPS = 3


def mixed_chunk(
    num_open: float, num_decoding: float, num_drafted: float, num_prompt_tokens: float
) -> int:
    """Tokens of prompts that a step may compute beside num_decoding sequences that decode.

    num_drafted drafts are verified with these, num_open sequences are there in all, and
    num_prompt_tokens of their prompts are still to be computed.

    A step that decodes waits for the weights' memory, which 16 tokens of a prompt wait for as
    well, and a sequence in it costs as much as 1.5 tokens of a prompt, a draft as much as one
    (int4 weights on AVX-512 VNNI: 2 ms, 0.34 ms and 0.23 ms). The most that is computed beside
    them takes about twice as long as they do, so that gaps between tokens stay within three times
    their median. Less would not do where drafts are accepted: an answer is over after few steps,
    each has to compute a larger part of the next prompt, and requests would queue for that.
    """
    most = 16 + 2.5 * num_open + 2 * num_drafted
    usual = min(16 + 2.5 * num_open, USUAL_MIXED_TOKENS - num_decoding)
    chunk = max(min(max(usual, num_prompt_tokens / DRAIN_STEPS), most), MIN_MIXED_CHUNK)
    # In equal parts: that the last one is smaller would shorten no gap, and larger ones are gaps.
    num_steps = max(1, math.ceil(num_prompt_tokens / chunk))
    return math.ceil(num_prompt_tokens / num_steps)
