"""From config.json and GGUF metadata to specs: windows, tables, flags, and clear refusals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.checkpoint.tensor import CheckpointError, StoredTensor
from engine.models import spec_from_config
from engine.models.gemma3 import FAMILY as GEMMA3
from engine.models.llama import FAMILY as LLAMA
from engine.models.settings import Settings
from engine.models.spec import ModelSpec

SHAPE: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


def _spec(architecture: str, **values: Any) -> ModelSpec:
    model_types = {"Mistral": "mistral", "Qwen2": "qwen2", "Qwen3": "qwen3", "Llama": "llama"}
    model_type = next((t for n, t in model_types.items() if architecture.startswith(n)), "")
    config = {"architectures": [architecture], "model_type": model_type, **SHAPE, **values}
    return spec_from_config(config, {}, "config.json")


def _tensor(name: str, shape: tuple[int, ...]) -> StoredTensor:
    data = np.zeros(int(np.prod(shape)) * 4, np.uint8)
    return StoredTensor(name, shape, "F32", data, Path("x.gguf"))


def test_a_llama_config_maps_to_its_spec() -> None:
    spec = _spec("LlamaForCausalLM", rope_theta=1e5, eos_token_id=[2, 7], bos_token_id=1)
    assert spec.head_dim == 16
    assert spec.attention_scale == 0.25
    assert spec.activation == "silu"
    assert spec.layer_windows == (0, 0, 0, 0)
    assert spec.rope_inv_freq[0][1] == pytest.approx(1e5 ** (-1 / 8))
    assert (spec.bos_token_id, spec.eos_token_ids) == (1, (2, 7))
    assert (spec.tied_embeddings, spec.has_interleaved_rope) == (False, False)
    shapes = {slot.tensor_name: slot.shape for slot in spec.tensor_slots()}
    assert shapes["model.layers.3.self_attn.k_proj.weight"] == (32, 64)
    assert shapes["lm_head.weight"] == (100, 64)
    assert len(shapes) == 3 + 4 * 9


@pytest.mark.parametrize(
    ("architecture", "values", "windows"),
    [
        ("LlamaForCausalLM", {"sliding_window": 8}, (0, 0, 0, 0)),
        ("MistralForCausalLM", {"sliding_window": 8}, (8, 8, 8, 8)),
        ("MistralForCausalLM", {"sliding_window": None}, (0, 0, 0, 0)),
        ("MistralForCausalLM", {}, (4096,) * 4),
        ("Qwen2ForCausalLM", {"sliding_window": 8, "max_window_layers": 1}, (0, 0, 0, 0)),
        (
            "Qwen2ForCausalLM",
            {"sliding_window": 8, "max_window_layers": 1, "use_sliding_window": True},
            (0, 8, 8, 8),
        ),
        (
            "Qwen3ForCausalLM",
            {
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (8, 0, 8, 0),
        ),
        ("Gemma3ForCausalLM", {"sliding_window": 8, "sliding_window_pattern": 2}, (8, 0, 8, 0)),
    ],
)
def test_windows_are_those_of_the_config(
    architecture: str, values: dict[str, Any], windows: tuple[int, ...]
) -> None:
    assert _spec(architecture, **values).layer_windows == windows


def test_gemma_has_two_rope_tables_and_scaled_embeddings() -> None:
    older = _spec(
        "Gemma3ForCausalLM",
        head_dim=16,
        query_pre_attn_scalar=25,
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        sliding_window_pattern=2,
    )
    assert older.embedding_scale == 8.0
    assert older.attention_scale == 0.2
    assert older.activation == "gelu_tanh"
    assert older.norm_offset == 1.0
    assert older.tied_embeddings
    assert older.layer_rope_index == (1, 0, 1, 0)
    assert older.rope_inv_freq[0][:2] == pytest.approx((1 / 8, 1e6 ** (-1 / 8) / 8))
    assert older.rope_inv_freq[1][:2] == pytest.approx((1.0, 1e4 ** (-1 / 8)))
    newer = _spec(
        "Gemma3ForCausalLM",
        head_dim=16,
        query_pre_attn_scalar=25,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    assert newer == older


@pytest.mark.parametrize(
    ("prefix", "head"),
    [
        ("language_model.model.", "language_model.lm_head.weight"),
        ("model.language_model.", "lm_head.weight"),
    ],
)
def test_the_text_part_of_a_gemma_that_sees_images_is_found(prefix: str, head: str) -> None:
    embedding = prefix + "embed_tokens.weight"
    text_config = {**SHAPE, "model_type": "gemma3_text"}
    del text_config["num_attention_heads"], text_config["num_key_value_heads"]
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text_config}
    tensors = {embedding: _tensor(embedding, (100, 64))}
    spec = spec_from_config(config, tensors, "config.json")
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (8, 4, 256)
    names = {slot.tensor_name for slot in spec.tensor_slots()}
    assert {embedding, prefix + "layers.3.self_attn.q_norm.weight", prefix + "norm.weight"} < names
    assert spec.ignores(head)
    assert spec.ignores("vision_tower.vision_model.embeddings.patch_embedding.weight")
    assert not spec.ignores(prefix + "layers.4.mlp.up_proj.weight")


@pytest.mark.parametrize(
    ("architecture", "values", "message"),
    [
        ("LlamaForCausalLM", {"attention_bias": True}, "attention_bias is true"),
        ("LlamaForCausalLM", {"mlp_bias": True}, "mlp_bias is true"),
        ("LlamaForCausalLM", {"hidden_act": "relu"}, "hidden_act relu is not supported"),
        ("LlamaForCausalLM", {"hidden_size": None}, "hidden_size is missing"),
        ("LlamaForCausalLM", {"hidden_size": "64"}, "hidden_size is '64', not an integer"),
        ("LlamaForCausalLM", {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ("LlamaForCausalLM", {"num_key_value_heads": 3}, "cannot share 3 KV heads"),
        ("LlamaForCausalLM", {"head_dim": 15}, "head size 15 is odd"),
        ("LlamaForCausalLM", {"rope_scaling": {"type": "dynamic"}}, "dynamic is not supported"),
        ("LlamaForCausalLM", {"rope_scaling": "linear"}, "not an object"),
        ("LlamaForCausalLM", {"eos_token_id": "</s>"}, "not token ids"),
        ("LlamaForCausalLM", {"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ("Gemma3ForCausalLM", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional"),
        ("Gemma3ForCausalLM", {"layer_types": ["full_attention"]}, "each of the 4 layers"),
        ("Qwen3MoeForCausalLM", {}, "architecture Qwen3MoeForCausalLM is not supported"),
    ],
)
def test_what_is_not_supported_is_refused(
    architecture: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        _spec(architecture, **values)
    assert "\n" not in str(caught.value)


LLAMA_METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 4,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.context_length": 128,
    "llama.rope.freq_base": 1e5,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.eot_token_id": 3,
}


def _gguf_spec(*tensors: StoredTensor, **values: Any) -> ModelSpec:
    metadata = {**LLAMA_METADATA, **{key.replace("__", "."): v for key, v in values.items()}}
    embedding = _tensor("token_embd.weight", (100, 64))
    by_name = {tensor.name: tensor for tensor in (embedding, *tensors)}
    return LLAMA.spec_from_gguf(Settings(metadata, "x.gguf"), by_name)


def test_a_llama_gguf_maps_to_its_spec() -> None:
    spec = _gguf_spec()
    assert (spec.num_layers, spec.num_kv_heads, spec.head_dim, spec.vocab_size) == (4, 2, 16, 100)
    assert spec.eos_token_ids == (2, 3)
    assert spec.has_interleaved_rope
    assert spec.tied_embeddings
    assert not _gguf_spec(_tensor("output.weight", (100, 64))).tied_embeddings
    assert _gguf_spec(llama__attention__head_count_kv=[2, 2, 2, 2]).num_kv_heads == 2


def test_rope_scaling_of_a_gguf_is_applied() -> None:
    plain = np.array(_gguf_spec().rope_inv_freq[0])
    linear = _gguf_spec(llama__rope__scaling__type="linear", llama__rope__scaling__factor=4.0)
    np.testing.assert_allclose(linear.rope_inv_freq[0], plain / 4, rtol=1e-6)
    older = _gguf_spec(llama__rope__scale_linear=4.0)
    assert older.rope_inv_freq == linear.rope_inv_freq
    factors = np.arange(1, 9, dtype=np.float32)
    tensor = StoredTensor("rope_freqs.weight", (8,), "F32", factors.view(np.uint8), Path("x"))
    divided = _gguf_spec(tensor)
    np.testing.assert_allclose(divided.rope_inv_freq[0], plain / factors, rtol=1e-6)
    assert divided.ignores("rope_freqs.weight")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"llama__attention__head_count_kv": [2, 1, 2, 1]}, "differs between layers"),
        ({"llama__expert_count": 8}, "mixtures of experts"),
        ({"llama__rope__dimension_count": 8}, "rope.dimension_count differs from the head size"),
        ({"llama__block_count": None}, "block_count is missing"),
        ({"llama__rope__scaling__type": "longrope"}, "longrope is not supported"),
    ],
)
def test_what_a_gguf_has_and_is_not_supported_is_refused(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        _gguf_spec(**values)


def test_a_gemma_gguf_has_windows_in_five_layers_of_six() -> None:
    metadata = {
        key.replace("llama.", "gemma3."): value for key, value in LLAMA_METADATA.items()
    } | {
        "general.architecture": "gemma3",
        "gemma3.block_count": 7,
        "gemma3.attention.sliding_window": 512,
    }
    embedding = _tensor("token_embd.weight", (100, 64))
    tensors = {embedding.name: embedding}
    spec = GEMMA3.spec_from_gguf(Settings(metadata, "x.gguf"), tensors)
    assert spec.layer_windows == (512,) * 5 + (0, 512)
    assert spec.layer_rope_index == (1,) * 5 + (0, 1)
    assert spec.rope_inv_freq[1][1] == pytest.approx(1e4 ** (-1 / 8))
    assert (spec.norm_offset, spec.embedding_scale) == (0.0, 8.0)
    metadata["gemma3.attention.sliding_window_pattern"] = [True, False] * 3 + [True]
    spec = GEMMA3.spec_from_gguf(Settings(metadata, "x.gguf"), tensors)
    assert spec.layer_windows == (512, 0) * 3 + (512,)
