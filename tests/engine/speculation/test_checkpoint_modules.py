"""A checkpoint's own multi-token-prediction module, in every layout of names, against PyTorch.

The reference is transformers' own decoder layer between norms and projection written out here; it
is fed with the drafts of the engine, each of which must be the best token by its logits or next
to it: the engine's module is rounded to 8 bits.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

from engine.batch import Batch  # noqa: E402
from engine.block_manager import BlockManager  # noqa: E402
from engine.checkpoint.tensor import CheckpointError  # noqa: E402
from engine.config import EngineConfig  # noqa: E402
from engine.deployment import deploy  # noqa: E402
from engine.loader import load_model, plan_headers, read_headers  # noqa: E402
from engine.loop import Engine  # noqa: E402
from engine.models import mtp  # noqa: E402
from engine.planning.qualification import qualify  # noqa: E402
from engine.scheduler import Scheduler  # noqa: E402
from engine.sequence import Sequence  # noqa: E402
from engine.speculation import chain  # noqa: E402
from engine.types import SamplingParams, Submit  # noqa: E402
from tests.engine.oracle import make_checkpoint  # noqa: E402
from tests.engine.test_families import llama, qwen2, qwen3  # noqa: E402

NUM_DRAFTS = 4
TOLERANCE = 0.15  # of logits whose standard deviation is about 1.3
NUM_LAYERS = 3

DEEPSEEK = {
    "module": f"model.layers.{NUM_LAYERS}.",
    "layer": f"model.layers.{NUM_LAYERS}.",
    "names": ("enorm", "hnorm", "eh_proj", "shared_head.norm"),
    "config": {"num_nextn_predict_layers": 1},
}
MIMO = {
    "module": "model.mtp_layers.0.",
    "layer": "model.mtp_layers.0.",
    "names": ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm"),
    "config": {
        "num_nextn_predict_layers": 1,
        "architectures": ["MiMoForCausalLM"],
        "model_type": "mimo",
        "attention_bias": True,
    },
}
QWEN3_NEXT = {
    "module": "mtp.",
    "layer": "mtp.layers.0.",
    "names": ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm"),
    "config": {"mtp_num_hidden_layers": 1},
}
# Layout, model, whether the hidden state comes first, whether the chain goes on from the norm.
CASES = {
    "deepseek, llama": (DEEPSEEK, lambda: llama(4, 2, 16, 64, 96), False, False),
    "mimo, qwen2": (MIMO, lambda: qwen2(4, 2, 16, 64, 96), True, True),
    "qwen3-next, qwen3": (QWEN3_NEXT, lambda: qwen3(4, 2, 16, 64, 96), False, True),
}


class Reference:
    """A module of transformers' parts beside its random target."""

    def __init__(self, folder: Path, case: str) -> None:
        self.layout, make_config, self._hidden_first, self._chains_normed = CASES[case]
        self._target = make_checkpoint(folder, make_config(), seed=3)
        config = self._target.config
        layer_type: Any = type(self._target.model.layers[0])
        self._block = layer_type(config, layer_idx=0).eval()
        size = config.hidden_size
        self._parts = [
            torch.nn.RMSNorm(size, config.rms_norm_eps),
            torch.nn.RMSNorm(size, config.rms_norm_eps),
            torch.nn.Linear(2 * size, size, bias=False),
            torch.nn.RMSNorm(size, config.rms_norm_eps),
        ]
        self._randomize()
        self._save(folder)

    def _randomize(self) -> None:
        generator = torch.Generator().manual_seed(4)
        parameters = [*self._block.named_parameters()]
        parameters += [("norm.weight", part.weight) for part in self._parts if part.weight.ndim < 2]
        parameters.append(("fc.weight", self._parts[2].weight))
        for name, parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                values = 1 + 0.2 * noise
            elif name.endswith("bias"):
                values = 0.3 * noise
            else:
                values = 1.3 * noise / parameter.shape[-1] ** 0.5
            parameter.data = values.bfloat16().float()

    def _save(self, folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = safetensors_torch.load_file(path)
        for name, part in zip(self.layout["names"], self._parts, strict=True):
            tensors[f"{self.layout['module']}{name}.weight"] = part.weight.detach().bfloat16()
        for name, parameter in self._block.named_parameters():
            tensors[self.layout["layer"] + name] = parameter.detach().bfloat16()
        if self.layout is DEEPSEEK:  # whose checkpoints repeat what is shared
            shared = tensors["model.embed_tokens.weight"].clone()
            tensors[f"{self.layout['module']}embed_tokens.weight"] = shared
        safetensors_torch.save_file(tensors, path)
        config = json.loads((folder / "config.json").read_text()) | self.layout["config"]
        (folder / "config.json").write_text(json.dumps(config))

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def logits(self, text: list[int], drafts: list[int]) -> list[Any]:
        """The logits (V,) from which each of the drafts was to be taken."""
        target = self._target
        hidden = list(target.model(torch.tensor([text])).last_hidden_state[0, :-1])
        tokens = text[1:]
        rows = []
        for draft in drafts:
            states = self._forward(torch.stack(hidden), torch.tensor(tokens))
            normed = self._parts[3](states)
            rows.append(target.lm_head(normed[-1]).numpy())
            hidden.append((normed if self._chains_normed else states)[-1])
            tokens = [*tokens, draft]
        return rows

    def _forward(self, hidden: Any, tokens: Any) -> Any:
        embedding_norm, hidden_norm, projection, _ = self._parts
        halves = [embedding_norm(self._target.model.embed_tokens(tokens)), hidden_norm(hidden)]
        if self._hidden_first:
            halves.reverse()
        x = projection(torch.cat(halves, dim=-1))[None]
        positions = torch.arange(len(tokens))[None]
        length = len(tokens)
        mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
        output = self._block(
            x,
            attention_mask=mask,
            position_ids=positions,
            position_embeddings=self._target.model.rotary_emb(x, positions),
        )
        return (output[0] if isinstance(output, tuple) else output)[0]


def engine_config(folder: Path, **options: Any) -> EngineConfig:
    settings = {"quantization": "none", "speculation": "auto", "max_sequences": 4, **options}
    return EngineConfig(model=str(folder), max_model_len=128, num_threads=1, **settings)


def drafts_of(folder: Path, prompt: list[int]) -> tuple[list[int], list[int]]:
    """The prompt with the target's next token, and what the module drafts behind it."""
    model = load_model(engine_config(folder))
    hidden = model.speculation.hidden_states(4)
    batch = Batch(
        model.core,
        max_sequences=4,
        max_step_tokens=128,
        max_model_len=128,
        eos_token_ids=frozenset(),
        hidden=hidden,
    )
    blocks = BlockManager(model.num_kv_blocks, model.core.block_size)
    scheduler = Scheduler(blocks, max_sequences=4, max_step_tokens=128, max_model_len=128)
    policy = model.speculation.policy(batch, hidden, max_step_tokens=128)
    params = SamplingParams(max_tokens=50, temperature=0.0)
    seq = Sequence(Submit(0, tuple(prompt), params, 0.0), frozenset())
    scheduler.add(seq)
    plan = scheduler.schedule()
    batch.open_lane(seq)
    model.core.step(*batch.fill(plan.entries))
    scheduler.commit(plan, batch.sampled())
    assert scheduler.draft_room(seq, NUM_DRAFTS) == NUM_DRAFTS
    batch.lanes.write_new_blocks([(seq, 1)])
    (draft,) = policy.drafters["mtp"].propose([seq], [NUM_DRAFTS])
    return seq.token_ids, draft.token_ids


@pytest.mark.parametrize("case", CASES)
def test_drafts_are_those_of_the_reference(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain, "USUAL_CONFIDENCE", 0.0)  # a random module is never sure
    monkeypatch.setattr(mtp, "_FORMAT", "int8")  # what is compared is the layout, not the rounding
    reference = Reference(tmp_path, case)
    num_best = 0
    for seed in range(8):
        prompt = np.random.default_rng(seed).integers(0, 307, 20 + seed).tolist()
        text, drafts = drafts_of(tmp_path, prompt)
        assert len(drafts) == NUM_DRAFTS
        for logits, draft in zip(reference.logits(text, drafts), drafts, strict=True):
            assert logits.max() - logits[draft] < TOLERANCE
            num_best += int(logits.argmax()) == draft
    assert num_best > 0.9 * 8 * NUM_DRAFTS


@pytest.mark.parametrize("case", ["deepseek, llama", "mimo, qwen2"])
def test_its_memory_is_planned_and_it_qualifies(case: str, tmp_path: Path) -> None:
    Reference(tmp_path, case)
    config = engine_config(tmp_path, kv_memory_bytes=1 << 20)
    headers = read_headers(config)
    planned = plan_headers(config, headers).ledger.draft_bytes
    deployment = deploy(config)
    loaded = deployment.loaded
    engine = Engine(loaded.core, deployment.engine_settings, lambda _: None, loaded.speculation)
    assert planned == deployment.measured().draft_bytes > 0
    engine.stop(0.0)
    rows = {row.name: row for row in qualify(headers, config, "bf16")}
    assert rows["speculation mtp"].qualified
    assert "the checkpoint's own module" in rows["speculation mtp"].evidence


def without(folder: Path, *names: str) -> None:
    path = folder / "model.safetensors"
    tensors = safetensors_torch.load_file(path)
    for name in names or [name for name in tensors if name.startswith("model.mtp_layers")]:
        del tensors[name]
    safetensors_torch.save_file(tensors, path)


def test_an_announced_module_that_is_missing_is_an_error_unless_it_is_not_wanted(
    tmp_path: Path,
) -> None:
    Reference(tmp_path, "mimo, qwen2")
    load_model(engine_config(tmp_path, speculation="off"))
    without(tmp_path, "model.mtp_layers.0.input_proj.weight")
    with pytest.raises(CheckpointError, match=r"mtp_layers\.0\.input_proj\.weight of the multi"):
        load_model(engine_config(tmp_path))
    without(tmp_path)
    with pytest.raises(CheckpointError, match=r"announces 1 multi.*hold none; --speculation"):
        load_model(engine_config(tmp_path, speculation="mtp"))
    for speculation in ("off", "ngram"):
        load_model(engine_config(tmp_path, speculation=speculation))
    config = engine_config(tmp_path, speculation="off")
    rows = {row.name: row for row in qualify(read_headers(config), config, "bf16")}
    assert not rows["speculation mtp"].qualified
    assert "hold none" in rows["speculation mtp"].evidence


def test_parts_that_nobody_computes_are_an_error(tmp_path: Path) -> None:
    Reference(tmp_path, "deepseek, llama")
    path = tmp_path / "model.safetensors"
    tensors = safetensors_torch.load_file(path)
    tensors[f"model.layers.{NUM_LAYERS}.mlp.experts.0.up_proj.weight"] = torch.zeros(96, 64)
    safetensors_torch.save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"experts\.0\.up_proj\.weight has no place"):
        load_model(engine_config(tmp_path))
