"""Loading tiny models end to end: both dialects alike, memory planned, every mistake one line."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from engine.checkpoint.safetensors import read_file  # noqa: E402  (after the skip without torch)
from engine.config import ConfigError, EngineConfig  # noqa: E402
from engine.loader import LoadedModel, load_model  # noqa: E402
from tests.engine.oracle import CoreDriver, load_unquantized, make_checkpoint  # noqa: E402

VOCAB_SIZE = 257  # the oracle's byte tokenizer, and one id more
SHAPE: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 512,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "qwen2": lambda: transformers.Qwen2Config(
        **{**SHAPE, "head_dim": 16}, tie_word_embeddings=True
    ),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SHAPE, query_pre_attn_scalar=32, sliding_window=8
    ),
}

# Names of llama.cpp's converter.
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _gguf_name(name: str, family: str) -> str:
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{GGUF_NAMES[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    if family == "gemma3" and part == "post_attention_layernorm":
        return f"blk.{layer}.post_attention_norm.{kind}"
    return f"blk.{layer}.{GGUF_NAMES[part]}.{kind}"


def _gguf_values(name: str, values: NDArray[np.float32], family: str) -> NDArray[np.float32]:
    """What the converter makes of a tensor beside its name."""
    heads = {"q_proj": 4, "k_proj": 2}
    part = name.split(".")[-2]
    if family == "llama" and part in heads:
        rows = values.shape[0]
        halves = values.reshape(heads[part], 2, rows // heads[part] // 2, -1)
        return halves.swapaxes(1, 2).reshape(values.shape)
    if family == "gemma3" and part.endswith("norm"):
        return values + 1
    return values


def _convert(folder: Path, path: Path, family: str) -> None:
    """Write the folder's model as a GGUF file of float32 tensors."""
    head_dim = 16 if family == "qwen2" else 32
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(2)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_context_length(512)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1_000_000.0 if family == "gemma3" else 10_000.0)
    if family == "gemma3":
        writer.add_sliding_window(8)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokens = [*tokenizer["model"]["vocab"], "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(5)
    for tensor in read_file(folder / "model.safetensors").values():
        values = _gguf_values(tensor.name, tensor.floats(), family)
        writer.add_tensor(_gguf_name(tensor.name, family), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("family", CONFIGS)
def test_a_gguf_computes_what_its_folder_does(family: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "hf", CONFIGS[family](), seed=3)
    _convert(tmp_path / "hf", tmp_path / "tiny.gguf", family)
    token_ids = np.random.default_rng(4).integers(0, VOCAB_SIZE, 30).tolist()
    logits = []
    for model in (tmp_path / "hf", tmp_path / "tiny.gguf"):
        loaded = load_unquantized(model, max_sequences=1, max_step_tokens=32, max_model_len=64)
        driver = CoreDriver(loaded, max_sequences=1, max_len=64, max_tokens=32)
        logits.append(driver.logits(token_ids, [30]))
    assert logits[0].std() > 0.1
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-5)
    assert loaded.eos_token_ids[0] == 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in the Hugging Face layout."""
    path: Path = tmp_path_factory.mktemp("tiny-llama")
    make_checkpoint(path, CONFIGS["llama"](), seed=1)
    return path


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder, to be spoilt."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def _load(model: Path, **options: Any) -> LoadedModel:
    options = {"num_threads": 1, "max_sequences": 2, **options}
    return load_model(EngineConfig(model=str(model), **options))


def test_a_loaded_model_says_what_it_is(folder: Path) -> None:
    loaded = _load(folder)
    assert loaded.name == folder.name
    assert loaded.tokenizer.encode("ab", add_bos=False, parse_special=False) != []
    assert loaded.chat_template is None
    assert (loaded.max_model_len, loaded.max_model_len_reason) == (512, "the model's own")
    assert loaded.num_kv_blocks * loaded.core.block_size == 2 * 512
    assert loaded.num_blocks_reason == "2 sequences of full length"
    assert loaded.num_kept_blocks == loaded.num_kv_blocks
    assert loaded.formats == "int4 (0), int8 (16), bf16 (0)"
    assert loaded.weights_bytes > 0
    assert loaded.num_threads == 1


def test_text_of_ended_requests_keeps_what_it_is_given(folder: Path) -> None:
    block_bytes = _load(folder).core.kv_bytes_per_block
    given = _load(folder, kv_memory_bytes=64 * block_bytes)
    assert given.num_kept_blocks == given.num_kv_blocks == 64
    less = _load(folder, kv_memory_bytes=64 * block_bytes, prefix_cache_bytes=8 * block_bytes)
    assert (less.num_kept_blocks, less.num_kv_blocks) == (8, 64)


def test_generation_config_gives_defaults_and_more_ends(broken: Path) -> None:
    (broken / "generation_config.json").write_text(
        json.dumps({"temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [7, 9]})
    )
    loaded = _load(broken)
    defaults = loaded.generation_defaults
    assert (defaults.temperature, defaults.top_k, defaults.top_p) == (0.6, 20, 0.95)
    assert (defaults.min_p, defaults.repetition_penalty) == (None, None)
    assert {7, 9} <= set(loaded.eos_token_ids)
    (broken / "generation_config.json").write_text('{"temperature": "warm"}')
    with pytest.raises(ConfigError, match=r"generation_config\.json: temperature is 'warm'"):
        _load(broken)


def test_the_fingerprint_tells_weights_and_settings_apart(folder: Path, broken: Path) -> None:
    first = _load(folder).fingerprint
    assert _load(broken).fingerprint == first  # the same content elsewhere
    assert _load(folder, quantization="none").fingerprint != first
    path = broken / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    assert _load(broken).fingerprint != first


def test_kv_memory_is_what_the_user_gives(folder: Path) -> None:
    loaded = _load(folder)
    block_bytes, block_size = loaded.core.kv_block_bytes("bf16"), loaded.core.block_size
    small = _load(folder, kv_memory_bytes=3 * block_bytes + 1)
    assert small.num_kv_blocks == 3
    assert small.max_model_len == 3 * block_size
    assert small.max_model_len_reason == "what the KV cache holds"
    needed = -(-100 // block_size) * block_bytes
    with pytest.raises(ConfigError, match=f"sequence of 100 needs --kv-memory {needed} "):
        _load(folder, kv_memory_bytes=needed - 1, max_model_len=100, kv_dtype="bf16")
    assert _load(folder, kv_memory_bytes=needed, max_model_len=100).max_model_len == 100
    with pytest.raises(ConfigError, match="needs --kv-memory"):
        _load(folder, kv_memory_bytes=1)
    with pytest.raises(ConfigError, match="are available"):
        _load(folder, kv_memory_bytes=1 << 60)


def test_the_kv_dtype_is_bf16_unless_asked_or_the_given_memory_is_too_small(folder: Path) -> None:
    loaded = _load(folder)
    assert (loaded.kv_dtype, loaded.kv_dtype_reason) == ("bf16", "lossless by default")
    asked = _load(folder, kv_dtype="int8")
    assert (asked.kv_dtype, asked.kv_dtype_reason) == ("int8", "--kv-dtype")
    assert asked.core.kv_dtype == "int8"
    assert asked.fingerprint != loaded.fingerprint
    full_blocks = 512 // loaded.core.block_size
    bf16_bytes, int8_bytes = (full_blocks * loaded.core.kv_block_bytes(d) for d in ("bf16", "int8"))
    for memory_bytes, dtype in (
        (bf16_bytes, "bf16"),
        (bf16_bytes - 1, "int8"),
        (int8_bytes, "int8"),
        (int8_bytes - 1, "bf16"),  # neither holds it: precision first
    ):
        assert _load(folder, kv_memory_bytes=memory_bytes).kv_dtype == dtype
    kept = _load(folder, kv_memory_bytes=bf16_bytes - 1, kv_dtype="bf16")
    assert (kept.kv_dtype, kept.num_kv_blocks) == ("bf16", full_blocks - 1)
    with pytest.raises(ConfigError, match="--kv-dtype fp8: choose auto, bf16 or int8"):
        _load(folder, kv_dtype="fp8")


def test_settings_that_cannot_work_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="--device cuda: this build computes on the CPU"):
        _load(folder, device="cuda")
    with pytest.raises(ConfigError, match="--max-model-len 513: the model was made for 512"):
        _load(folder, max_model_len=513)
    with pytest.raises(ConfigError, match="isa sse9: this machine has portable"):
        _load(folder, isa="sse9")
    assert _load(folder, isa="portable").isa == "portable"


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _break_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"architectures": ')


def _ask_for_more_layers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))


def _widen(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))


def _drop_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_truncate, r"model\.safetensors: truncated: tensor "),
        (_break_config, r"config\.json: cannot be read"),
        (_ask_for_more_layers, r"tensor model\.layers\.2\.\S+ is missing"),
        (_widen, r"tensor model\.layers\.0\.mlp\.\w+_proj\.weight has shape"),
        (_drop_tokenizer, r"tokenizer\.json"),
    ],
)
def test_a_spoilt_checkpoint_is_one_line_that_names_what_is_wrong(
    broken: Path, spoil: Any, message: str
) -> None:
    spoil(broken)
    with pytest.raises(ConfigError, match=message) as caught:
        _load(broken)
    assert "\n" not in str(caught.value)
