"""Reference models from transformers, and a driver of the core that returns all logits.

The family tests and the test of the default model compare the two. The driver fills the core's
buffers by itself, so that a mistake of the scheduler cannot hide one of the forward pass.
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fulcrum_core
import gguf
import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from engine.config import EngineConfig
from engine.loader import LoadedModel, load_model

Logits = NDArray[np.float32]

# The core's threads have just run on the same cores and may still be spinning there.
torch.set_num_threads(1)


def make_checkpoint(folder: Path, config: Any, seed: int) -> Any:
    """Save a random model of `config` in the Hugging Face layout; return it in float32.

    Weights are exact in bf16 and of a size that makes attention sharp and logits spread, as
    transformers' own initialization would not.
    """
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, None, None
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            offset = 0.0 if "Gemma" in type(model).__name__ else 1.0
            values = offset + 0.2 * noise
        elif name.endswith("bias"):
            values = 0.3 * noise
        else:
            values = 1.3 * noise / parameter.shape[-1] ** 0.5
        parameter.data = values.bfloat16().float()
    # A copy: the conversion would round the model's rope frequencies as well.
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(_byte_tokenizer()))
    return model


def _byte_tokenizer() -> dict[str, Any]:
    """One token per byte, in the spelling of byte-level BPE."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(0x100 + index) for index, byte in enumerate(others)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    return {
        "model": {"type": "BPE", "vocab": {letters[i]: i for i in range(256)}, "merges": []},
        "pre_tokenizer": level,
        "decoder": level,
        "added_tokens": [],
    }


class _Bf16Cache(transformers.DynamicCache):  # type: ignore[misc]
    """Rounds keys and values as the engine's cache stores them."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        keys, values = key_states.bfloat16().float(), value_states.bfloat16().float()
        return super().update(keys, values, *args, **kwargs)


def reference_logits(model: Any, token_ids: Sequence[int], *, bf16_cache: bool = False) -> Logits:
    """Logits (T, V) of transformers in float32, optionally with the KV cache in bf16."""
    with torch.inference_mode():
        cache = _Bf16Cache() if bf16_cache else None
        output = model(
            input_ids=torch.tensor([list(token_ids)]),
            past_key_values=cache,
            use_cache=bf16_cache,
        )
    logits: Logits = output.logits[0].float().numpy()
    return logits


class CoreDriver:
    """Runs sequences through a loaded model, each in KV blocks of its own, in a shuffled order."""

    def __init__(
        self, loaded: LoadedModel, *, max_sequences: int, max_len: int, max_tokens: int
    ) -> None:
        self._core = loaded.core
        self._block_size = loaded.core.block_size
        blocks_per_sequence = -(-max_len // self._block_size)
        blocks = np.random.default_rng(1).permutation(max_sequences * blocks_per_sequence)
        self._blocks = blocks.reshape(max_sequences, -1).astype(np.int32)
        assert blocks.size <= loaded.num_kv_blocks
        self._buffers = _buffers(
            max_sequences, max_tokens, blocks_per_sequence, loaded.spec.vocab_size
        )
        self._core.bind(**self._buffers)

    def logits(self, token_ids: Sequence[int], chunks: Sequence[int]) -> Logits:
        """Logits (T, V) at all positions, computed in chunks of the given sizes."""
        assert sum(chunks) == len(token_ids)
        rows = []
        position = 0
        for size in chunks:
            self._step([(0, position, token_ids[position : position + size])], all_rows=True)
            rows.append(self._buffers["logits"][:size].copy())
            position += size
        return np.concatenate(rows)

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        """Greedy continuations of all prompts, decoded together."""
        texts: list[list[int]] = []
        for lane, prompt in enumerate(prompts):
            self._step([(lane, 0, prompt)], all_rows=False)
            texts.append([int(self._buffers["sampled_ids"][0])])
        for _ in range(num_tokens - 1):
            entries = [
                (lane, len(prompt) + len(text) - 1, text[-1:])
                for lane, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
            ]
            self._step(entries, all_rows=False)
            for lane, text in enumerate(texts):
                text.append(int(self._buffers["sampled_ids"][lane]))
        return texts

    def _step(self, entries: Sequence[tuple[int, int, Sequence[int]]], *, all_rows: bool) -> None:
        """Compute a step of (lane, first position, new token ids) entries."""
        buffers = self._buffers
        first = 0
        for index, (lane, start, token_ids) in enumerate(entries):
            rows = slice(first, first + len(token_ids))
            positions = np.arange(start, start + len(token_ids))
            blocks = self._blocks[lane][positions // self._block_size]
            buffers["token_ids"][rows] = token_ids
            buffers["positions"][rows] = positions
            buffers["slot_mapping"][rows] = blocks * self._block_size + positions % self._block_size
            buffers["seq_lens"][index] = start + len(token_ids)
            buffers["block_table"][index] = self._blocks[lane]
            first = rows.stop
            buffers["query_start"][index + 1] = first
        last_rows = buffers["query_start"][1 : len(entries) + 1] - 1
        logits_rows = np.arange(first) if all_rows else last_rows
        buffers["logits_rows"][: len(logits_rows)] = logits_rows
        self._core.step(first, len(entries), len(logits_rows))


def _buffers(
    max_sequences: int, max_tokens: int, blocks_per_sequence: int, vocab_size: int
) -> dict[str, NDArray[Any]]:
    """What Model.bind takes, set to greedy sampling; see engine/step_buffers.py."""
    int32 = (
        "token_ids positions slot_mapping logits_rows target_ids top_k num_logprobs "
        "noise_position history_start history_output_start history_end sampled_ids"
    )
    float32 = (
        "temperature top_p min_p repetition_penalty presence_penalty frequency_penalty "
        "sampled_logprobs"
    )
    buffers: dict[str, NDArray[Any]] = {
        **{name: np.zeros(max_tokens, np.int32) for name in int32.split()},
        **{name: np.zeros(max_tokens, np.float32) for name in float32.split()},
        "query_start": np.zeros(max_sequences + 1, np.int32),
        "seq_lens": np.zeros(max_sequences, np.int32),
        "block_table": np.zeros((max_sequences, blocks_per_sequence), np.int32),
        "seed": np.zeros(max_tokens, np.uint64),
        "bias_start": np.zeros(max_tokens + 1, np.int32),
        "history_ids": np.zeros(1, np.int32),
        "bias_ids": np.zeros(1, np.int32),
        "bias_values": np.zeros(1, np.float32),
        "top_ids": np.zeros((max_tokens, 20), np.int32),
        "top_logprobs": np.zeros((max_tokens, 20), np.float32),
        "logits": np.zeros((max_tokens, vocab_size), np.float32),
    }
    for name, value in (("target_ids", -1), ("num_logprobs", -1), ("repetition_penalty", 1)):
        buffers[name][:] = value
    buffers["top_p"][:] = 1
    return buffers


def unrounded_isa() -> str:
    """The best here that multiplies activations as they are: AVX512-BF16 and AMX round them."""
    best = fulcrum_core.detect_isa()
    return "avx512" if best in ("avx512-bf16", "amx") else best


def load_unquantized(model: Path | str, **options: Any) -> LoadedModel:
    """Load in bf16, as the engine would."""
    return load_model(EngineConfig(model=str(model), quantization="none", **options))


def llama_from_gguf(path: Path) -> Any:
    """The transformers model of a GGUF file of the llama architecture, dequantized to float32."""
    reader = gguf.GGUFReader(str(path))

    def field(name: str) -> Any:
        return reader.fields[f"llama.{name}"].contents()

    heads, kv_heads = field("attention.head_count"), field("attention.head_count_kv")
    weights: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        if tensor.name.endswith("attn_q.weight"):
            values = _without_interleaving(values, heads)
        elif tensor.name.endswith("attn_k.weight"):
            values = _without_interleaving(values, kv_heads)
        weights[_hf_name(tensor.name)] = values
    config = transformers.LlamaConfig(
        num_hidden_layers=field("block_count"),
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=field("vocab_size"),
        max_position_embeddings=field("context_length"),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("rope.freq_base")},
        tie_word_embeddings="lm_head.weight" not in weights,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    # The rotary embedding computes its frequencies when it is made: not on the meta device.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval()


def _hf_name(gguf_name: str) -> str:
    outer = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    if gguf_name in outer:
        return outer[gguf_name]
    inner = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    _, layer, name, _ = gguf_name.split(".")
    return f"model.layers.{layer}.{inner[name]}.weight"


def _without_interleaving(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo the converter's row order: pairs that rotate together lie side by side in the file."""
    size = rows.shape[0] // heads
    return rows.view(heads, size // 2, 2, -1).transpose(1, 2).reshape(rows.shape)


def worst_greedy_gap(logits: Logits, chosen: Sequence[int]) -> float:
    """How far the chosen ids (T,) lie below the reference's best at most; 0: all agree."""
    best = logits.max(axis=1)
    return float((best - logits[np.arange(len(chosen)), list(chosen)]).max())
