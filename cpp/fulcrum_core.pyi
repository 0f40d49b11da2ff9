"""Types of the compiled core. Arrays are C-contiguous and owned by the caller."""

from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

def isas() -> list[str]:
    """All instruction sets that there are kernels for; each includes the ones before it."""

def detect_isa() -> str:
    """The best of them that this machine has."""

def dequantize(block_type: str, data: NDArray[np.uint8], num_values: int) -> NDArray[np.float32]:
    """Decode GGUF blocks ("F32", "F16", "BF16", "Q4_0", … "Q6_K", "Q8_0") to float32."""

class Bpe:
    """Byte-pair merging of words that are already cut; see cpp/tokenizer/bpe.h. Any thread may
    call it."""

    def __init__(
        self,
        *,
        byte_ids: NDArray[np.int32],  # (256,), -1: the vocabulary has no such byte
        merges: NDArray[np.int32],  # (M, 3): left, right, merged id; the row is the rank
        char_ids: dict[int, int],  # code point -> id
        per_char: bool,  # start from characters; bytes are the last resort
        unknown_id: int,  # -1: drop what has neither character nor bytes
        fuse_unknown: bool,
        whole_words: dict[bytes, int],  # words that need no merging
    ) -> None: ...
    def encode(self, words: list[str]) -> list[int]:
        """Ids of the words, in order. Releases the GIL while merging."""

class NgramIndex:
    """Prompt lookup over the lanes of a token table; see cpp/ngram.h. One thread drives it."""

    num_bytes: int  # of the index, which follows the texts: about 24 a token
    def __init__(self, num_lanes: int, max_match: int = 8, min_match: int = 1) -> None: ...
    def propose(
        self,
        tokens: NDArray[np.int32],  # (num_lanes, max_model_len)
        lanes: NDArray[np.int32],  # (B,)
        owners: NDArray[np.int64],  # (B,) whose text it is; another one starts the index anew
        lengths: NDArray[np.int32],  # (B,) tokens of the lane that are the text
        max_drafts: NDArray[np.int32],  # (B,) at most K
        draft_ids: NDArray[np.int32],  # out (B, K)
        num_drafts: NDArray[np.int32],  # out (B,) ids written: max_drafts or 0
        match_lengths: NDArray[np.int32],  # out (B,) 0: nothing matches
    ) -> None:
        """Draft what followed the longest, of these the newest, occurrence of each text's end.
        Releases the GIL."""

def sample_rows(
    logits: NDArray[np.float32],
    seeds: NDArray[np.uint64],
    noise_positions: NDArray[np.int32],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    history_ids: ArrayLike = (),
    output_start: int = 0,
    bias_ids: ArrayLike = (),
    bias_values: ArrayLike = (),
    target_id: int = -1,
    num_logprobs: int = -1,
) -> dict[str, Any]:
    """Sample len(seeds) rows, row i from logits[i % len(logits)]: the sampler alone, for tests.
    Returns ids, logprobs (n,), top_ids, top_logprobs (n, 20), errors (a list, "" is none)."""

class Config:
    """Shape of a model and the flags of its family; see cpp/model.h."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    activation: str  # "silu" or "gelu_tanh"
    attention_scale: float  # multiplies q·k
    embedding_scale: float
    layer_windows: list[int]  # per layer, tokens seen; 0: all
    layer_rope_index: list[int]  # per layer, row of rope_inv_freq
    rope_inv_freq: list[list[float]]  # per table, (head_dim / 2,)
    rope_attention_factor: float  # multiplies cos and sin (yarn); 1 otherwise
    reads_hidden: bool  # a multi-token-prediction module; see cpp/model.h
    chains_normed: bool  # it goes on from its own output after the final norm
    def __init__(self) -> None: ...

BLOCK_SIZE: int  # tokens per KV block

def kv_block_bytes(config: Config, dtype: str) -> int:
    """Bytes of a KV block of all layers in "bf16" or "int8", scales included."""

def activation_bytes(
    config: Config, isa: str, num_threads: int, max_tokens: int, max_blocks_per_seq: int
) -> int:
    """Bytes that Model.bind allocates for batches of this size."""

class Model:
    """Weights, KV cache and thread pool. One thread drives it."""

    @overload
    def __init__(self, config: Config, num_threads: int, isa: str) -> None: ...
    @overload
    def __init__(self, config: Config, drafts_for: Model) -> None:
        """A model that takes turns with another one: on its threads, its instruction set."""

    def load_vector(self, slot: str, layer: int, values: NDArray[np.float32]) -> None:
        """Copy a norm's weight or a bias. Slots: final_norm; per layer attention_norm,
        q_norm, k_norm, attention_post_norm, mlp_norm, mlp_post_norm, q_bias, k_bias, v_bias.
        Norm weights are the whole factor (Gemma's 1 + w is the caller's). layer is -1 for
        slots outside the layers."""

    def load_matrix(
        self,
        slot: str,
        layer: int,
        block_type: str,
        data: NDArray[np.uint8],
        num_rows: int,
        num_cols: int,
        format: str,
        interleaved_rope_heads: int = 0,
    ) -> None:
        """Decode, requantize if needed and pack one matrix (num_rows, num_cols), row-major.
        Slots: embedding, output (absent: the embedding is the head); per layer q, k, v,
        attention_output, gate, up, down. format: a name of cpp/formats/formats.h. A positive
        interleaved_rope_heads undoes the row order that llama.cpp's converter gives q and k of
        the llama architecture, so that halves rotate together."""

    def share_embedding(self, owner: Model) -> None:
        """Take another model's embedding, and its head where this one has none loaded."""

    def set_head_ids(self, ids: NDArray[np.int32]) -> None:
        """Before `output` is loaded: the tokens that its rows stand for."""

    def finalize(self) -> None:
        """Check that every slot is filled with the right shape; raises ValueError naming it."""

    def allocate_kv(self, num_blocks: int, dtype: str | None = None) -> None:
        """Allocate the paged cache in "bf16" or "int8"; frees the former one. None keeps the
        former one's dtype, bf16 where there was none."""

    def populate_kv(self, num_blocks: int) -> None:
        """Give the cache's first blocks their memory before prompts have to wait for it."""

    def kv_block_bytes(self, dtype: str) -> int:
        """Bytes of a KV block of all layers in a dtype, scales included."""

    def bind(self, **buffers: NDArray[Any]) -> None:
        """Bind the step's buffers once; see engine/step_buffers.py for names, shapes and types."""

    def step(self, num_tokens: int, num_sequences: int, num_rows: int) -> None:
        """Forward, then sample, over what the bound buffers hold. Releases the GIL."""
    block_size: int  # tokens per KV block
    kv_bytes_per_block: int  # of the allocated cache's dtype
    kv_dtype: str
    weights_bytes: int
    activation_bytes: int  # of the state that bind allocated
    num_threads: int
    isa: str

class Drafter:
    """A model that drafts, over the texts of the engine's lanes; see cpp/draft.h."""

    def __init__(
        self, model: Model, max_tokens: int, max_sequences: int, max_drafts: int
    ) -> None: ...
    def bind(self, **buffers: NDArray[Any]) -> None:
        """Bind, by lane, tokens (lanes, length), blocks (lanes, M), temperature, top_p, min_p,
        top_k, seed, and hidden (lanes * W, D) where the model reads it; by sequence of a call
        lanes, begin, end, start, num_drafts, and for the results num_drafted (B,), draft_ids and
        draft_probs (B, max_drafts)."""

    def propose(self, num_sequences: int, min_confidence: float = 0.0) -> None:
        """Catch up with the texts and draft. Releases the GIL."""

class Linear:
    """One packed matrix and the kernels over it, for tests and benchmarks; see cpp/linear.h."""

    num_tiles: int
    tile_channels: int  # output channels of a tile
    packed_bytes: int
    def __init__(
        self,
        isa: str,
        format: str,
        block_type: str,
        data: NDArray[np.uint8],
        num_rows: int,
        num_cols: int,
    ) -> None: ...
    def dequantize(self) -> NDArray[np.float32]:
        """Decode the packed matrix: (num_rows, num_cols)."""

    def forward(
        self,
        x: NDArray[np.float32],
        out: NDArray[np.float32] | None = None,
        accumulate: bool = False,
        tile_begin: int = 0,
        tile_end: int = -1,
    ) -> NDArray[np.float32]:
        """Multiply x (T, num_cols) by the transposed matrix, on the calling thread. The result is
        `out`, (T, at least num_rows), or a new array; channels outside the tile range stay."""

def quantize_activations(
    isa: str, x: NDArray[np.float32]
) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.float32]]:
    """The int8 form of x (T, K), padded to whole groups: quants, and per group the scales and the
    sums of the quants."""

class ThreadPool:
    """The threads of a model without the model, for bench.kernels; see cpp/thread_pool.h."""

    num_threads: int
    def __init__(self, num_threads: int) -> None: ...

def time_peak(isa: str, kind: str, pool: ThreadPool, num_iterations: int) -> tuple[float, float]:
    """Run the peak loop "int8", "int4" or "bf16" of cpp/cpu/peak.h on every thread: seconds, and
    the operations of all threads together."""

def packed_bytes(isa: str, format: str, num_rows: int, num_cols: int) -> int:
    """Bytes of a packed matrix (num_rows, num_cols)."""

class MemoryBench:
    """Memory to read; the size is rounded up to whole pages."""

    num_bytes: int
    def __init__(self, isa: str, num_bytes: int) -> None: ...
    def time_read(self, pool: ThreadPool, num_calls: int) -> float:
        """Seconds of reading all of it num_calls times."""

class LinearBench:
    """Equal matrices of made-up weights that take turns, and activations for max_tokens rows."""

    def __init__(
        self,
        isa: str,
        format: str,
        num_rows: int,
        num_cols: int,
        num_matrices: int,
        max_tokens: int,
    ) -> None: ...
    def time_gemm(self, pool: ThreadPool, num_tokens: int, num_calls: int) -> float:
        """Seconds of multiplying num_tokens rows by the next num_calls matrices."""

    def time_read(self, pool: ThreadPool, num_calls: int) -> float:
        """Seconds of reading the next num_calls matrices."""
