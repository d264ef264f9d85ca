"""Exported mixtures are the published architectures: written out from their files alone, and loaded by transformers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import msgspec
import pytest
import torch
import torch.nn.functional as F
from running import finish, place
from safetensors.torch import load_file, save_file
from tiny import make_spec

from scaling.data.shards import manifest_hash
from scaling.errors import UserError
from scaling.export.huggingface import export_hf
from scaling.io import file_sha256, write_json
from scaling.model_config import MLAConfig, ModelConfig, MoEConfig
from scaling.models.registry import build_model
from scaling.run.directory import RunDirectory

MOONLIGHT = ModelConfig(
    layers=3, width=32, heads=2, vocabulary=256, context=16, ffn_multiple=16, family="moonlight-moe",
    moe=MoEConfig(num_experts=6, top_k=2, num_shared_experts=2, dense_layers=1, granularity=2, bias_update_rate=0.05),
    mla=MLAConfig(kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=12, v_head_dim=10),
)  # fmt: skip
QUERY_RANK = msgspec.structs.replace(
    MOONLIGHT,
    mla=MLAConfig(kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=12, v_head_dim=10, q_lora_rank=20),
    tied=True,
)
MIXTRAL = ModelConfig(
    layers=2, width=32, heads=2, vocabulary=256, context=16, ffn_multiple=16, family="mixtral-moe",
    moe=MoEConfig(num_experts=4, top_k=2, score="topk-softmax", bias_update_rate=0.0),
)  # fmt: skip
SHAPES = {"moonlight": MOONLIGHT, "query-rank": QUERY_RANK, "mixtral": MIXTRAL}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def run(request: pytest.FixtureRequest, tmp_path: Path, tiny_shards: Path) -> Path:
    return trained(request.param, tmp_path, tiny_shards)


def trained(shape: ModelConfig, folder: Path, shards: Path) -> Path:
    """A run of a few steps, so that biases are not zero, with weights then made large enough for a mistake to show."""
    path = place(make_spec(shape=shape, steps=4, manifest=manifest_hash(shards)), folder / "runs", shards, every=1e9)
    record = finish(path)
    weights = load_file(path / "weights.safetensors")
    generator = torch.Generator().manual_seed(2)
    for name, value in weights.items():
        if "bias" not in name:
            weights[name] = value + 0.2 * torch.randn(value.shape, generator=generator)
    save_file(weights, path / "weights.safetensors", metadata={"format": "pt"})
    record = msgspec.structs.replace(record, weights_sha256=file_sha256(path / "weights.safetensors"))
    write_json(path / "record.json", record)
    return path


def our_logits(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = build_model(RunDirectory(path).spec().model)
    model.load_state_dict(load_file(path / "weights.safetensors"), strict=False)
    with torch.no_grad():
        logits: torch.Tensor = model(tokens)
    return logits


def some_tokens() -> torch.Tensor:
    return torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(3))


def written_out(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """The forward pass of the exported files in float64, by the names and the order that their architectures document.

    Sources: DeepSeek-V2 and V3 (arXiv:2405.04434, 2412.19437; rotary pairs are neighbours), Mixtral (arXiv:2401.04088).
    """
    config = json.loads((folder / "config.json").read_text())
    weights = {name: w.double() for file in folder.glob("*.safetensors") for name, w in load_file(file).items()}
    length, heads, deepseek = tokens.shape[1], config["num_attention_heads"], config["model_type"] == "deepseek_v3"
    future = torch.ones(length, length).triu(1).bool()

    def norm(x: torch.Tensor, name: str, epsilon: float) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + epsilon).sqrt() * weights[f"{name}.weight"]

    def turn(x: torch.Tensor) -> torch.Tensor:
        size = x.shape[-1]
        frequencies = config["rope_theta"] ** (-torch.arange(0, size, 2).double() / size)
        angles = torch.outer(torch.arange(length).double(), frequencies)
        pairs = (x[..., 0::2], x[..., 1::2]) if deepseek else x.chunk(2, dim=-1)
        turned = torch.complex(*(p.contiguous() for p in pairs)) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([turned.real, turned.imag], -1)  # equally for query and key, so their products are right

    def swiglu(x: torch.Tensor, gate: str, up: str, down: str) -> torch.Tensor:
        return (F.silu(x @ weights[f"{gate}.weight"].T) * (x @ weights[f"{up}.weight"].T)) @ weights[f"{down}.weight"].T

    def project(x: torch.Tensor, name: str) -> torch.Tensor:
        return (x @ weights[f"{name}.weight"].T).unflatten(-1, (heads, -1)).transpose(1, 2)

    def attention(x: torch.Tensor, at: str) -> torch.Tensor:
        if deepseek:
            plain, rank = config["qk_nope_head_dim"], config["kv_lora_rank"]
            if config["q_lora_rank"]:
                low = norm(x @ weights[f"{at}.q_a_proj.weight"].T, f"{at}.q_a_layernorm", 1e-6)
                q = project(low, f"{at}.q_b_proj")
            else:
                q = project(x, f"{at}.q_proj")
            q = torch.cat([q[..., :plain], turn(q[..., plain:])], -1)
            both = x @ weights[f"{at}.kv_a_proj_with_mqa.weight"].T
            kv = project(norm(both[..., :rank], f"{at}.kv_a_layernorm", 1e-6), f"{at}.kv_b_proj")
            shared = turn(both[:, None, :, rank:]).expand(-1, heads, -1, -1)
            k, v = torch.cat([kv[..., :plain], shared], -1), kv[..., plain:]
        else:
            q, k, v = (project(x, f"{at}.{letter}_proj") for letter in "qkv")
            q, k = turn(q), turn(k)
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(future, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2) @ weights[f"{at}.o_proj.weight"].T

    def experts(x: torch.Tensor, at: str) -> torch.Tensor:
        out = torch.zeros_like(x)
        logits = x @ weights[f"{at}.gate.weight"].T
        for at_token in [(b, t) for b in range(x.shape[0]) for t in range(length)]:
            if deepseek:
                scores = logits[at_token].sigmoid()
                chosen = (scores + weights[f"{at}.gate.e_score_correction_bias"]).topk(config["num_experts_per_tok"])[1]
                gates = scores[chosen] / scores[chosen].sum() * config["routed_scaling_factor"]
                names = "gate_proj", "up_proj", "down_proj"
                out[at_token] += swiglu(x[at_token], *(f"{at}.shared_experts.{name}" for name in names))
            else:
                top, chosen = logits[at_token].topk(config["num_experts_per_tok"])
                gates, names = top.softmax(-1), ("w1", "w3", "w2")
            for gate, expert in zip(gates, chosen.tolist(), strict=True):
                out[at_token] += gate * swiglu(x[at_token], *(f"{at}.experts.{expert}.{name}" for name in names))
        return out

    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        name, epsilon = f"model.layers.{layer}", config["rms_norm_eps"]
        x = x + attention(norm(x, f"{name}.input_layernorm", epsilon), f"{name}.self_attn")
        h = norm(x, f"{name}.post_attention_layernorm", epsilon)
        if deepseek and layer < config["first_k_dense_replace"]:
            x = x + swiglu(h, *(f"{name}.mlp.{part}_proj" for part in ("gate", "up", "down")))
        else:
            x = x + experts(h, f"{name}.mlp" if deepseek else f"{name}.block_sparse_moe")
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return norm(x, "model.norm", config["rms_norm_eps"]) @ weights[head].T


def test_exported_files_give_the_same_logits(run: Path, tmp_path: Path) -> None:
    export_hf(run, tmp_path / "hub")
    expected = our_logits(run, some_tokens())
    torch.testing.assert_close(written_out(tmp_path / "hub", some_tokens()).float(), expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.5


def test_transformers_gives_the_same_logits_and_generates(run: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that library's own deprecations are not ours
        import transformers

        export_hf(run, tmp_path / "hub", shard_bytes=20_000)
        model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hub", output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        with torch.no_grad():
            theirs = model(some_tokens()).logits
        torch.testing.assert_close(theirs, our_logits(run, some_tokens()), atol=1e-4, rtol=1e-4)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hub")
        written = model.generate(**tokenizer("12 plus", return_tensors="pt"), max_new_tokens=8, do_sample=False)
        assert len(tokenizer.decode(written[0])) > len("12 plus")


def test_fields_that_only_vllm_needs_are_written(tmp_path: Path, tiny_shards: Path) -> None:
    export_hf(trained(MOONLIGHT, tmp_path, tiny_shards), tmp_path / "hub")
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config["scoring_func"] == "sigmoid"
    assert config["topk_method"] == "noaux_tc"
    (file,) = (tmp_path / "hub").glob("*.safetensors")
    biases = [value for name, value in load_file(file).items() if name.endswith("e_score_correction_bias")]
    assert len(biases) == 2
    assert all(bias.dtype == torch.float32 and bias.any() for bias in biases)


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        (MOONLIGHT, "Train with sigmoid and num_shared_experts = 1 or more"),
        (MIXTRAL, "MixtralForCausalLM has no num_shared_experts = 1, bias_update_rate = 0.1"),
    ],
    ids=["moonlight", "mixtral"],
)
def test_a_model_without_counterpart_is_refused_before_writing(
    shape: ModelConfig, sentence: str, tmp_path: Path, tiny_shards: Path
) -> None:
    assert shape.moe is not None
    changes = {"num_shared_experts": 0} if shape is MOONLIGHT else {"num_shared_experts": 1, "bias_update_rate": 0.1}
    odd = msgspec.structs.replace(shape, moe=msgspec.structs.replace(shape.moe, **changes))
    path = trained(odd, tmp_path, tiny_shards)
    with pytest.raises(UserError, match=sentence):
        export_hf(path, tmp_path / "hub")
    assert not (tmp_path / "hub").exists()
