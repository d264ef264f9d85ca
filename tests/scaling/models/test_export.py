import json
import warnings

import msgspec
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny import make_spec

from scaling.data.prepare import prepare
from scaling.data.shards import manifest_hash
from scaling.data.sources.registry import DataConfig
from scaling.data.tokenizer import ByteTokenizer
from scaling.errors import UserError
from scaling.export.huggingface import export_hf
from scaling.export.tokenizer import byte_tokenizer
from scaling.flops import CONVENTIONS, count_parameters, train_flops
from scaling.io import write_json
from scaling.model_config import ModelConfig
from scaling.models.registry import build_model
from scaling.run.directory import RunDirectory
from scaling.run.record import Code, Device, RunRecord
from scaling.spec import Placement, as_dict

UNTIED = ModelConfig(layers=3, width=32, heads=4, vocabulary=256, context=24, ffn_multiple=8)
TIED = msgspec.structs.replace(UNTIED, tied=True)


@pytest.fixture(params=[UNTIED, TIED], ids=["untied", "tied"])
def run(request, tmp_path, tiny_shards):
    return make_run(tmp_path, request.param, tiny_shards)


@pytest.fixture
def untied_run(tmp_path, tiny_shards):
    return make_run(tmp_path, UNTIED, tiny_shards)


def make_run(folder, shape, data, status="finished"):
    """A run directory as training leaves it, with weights large enough that a mistake shows."""
    spec = make_spec(shape=shape, manifest=manifest_hash(data))
    directory = RunDirectory(folder / "runs" / spec.id)
    directory.create(spec, Placement(data=str(data)))
    model = build_model(shape)
    model.initialise(1)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():  # norms too: at 1 they could be exchanged without notice
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    save_file({name: value.detach() for name, value in model.named_parameters()}, directory.weights_file)
    parameters = {name: value for name, value in as_dict(count_parameters(shape)).items() if name != "tied"}
    record = RunRecord(
        spec=spec,
        status=status,
        validation_loss=2.0 if status == "finished" else None,
        train_loss=2.1,
        tokens=spec.budget.tokens,
        flops={name: train_flops(shape, spec.budget.tokens, name) for name in CONVENTIONS},
        parameters={**parameters, "total": count_parameters(shape).total},
        groups={},
        bytes_per_token=0.5,
        seconds=3.0,
        tokens_per_second=1.0,
        mfu=None,
        device=Device(name="a laptop", kind="cpu"),
        code=Code(commit="abc", dirty=False, versions={"torch": "2"}),
        manifest=manifest_hash(data),
        attempts=1,
        finished_at=0.0,
        reason=None if status == "finished" else "loss inf at step 3",
    )
    write_json(directory.record_file, record)
    return directory


def ours(directory):
    model = build_model(directory.record().spec.model)
    model.load_state_dict(load_file(directory.weights_file), strict=False)
    return model


def tokens():
    return torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(3))


def llama_logits(folder, tokens):
    """Llama's forward pass in float64, written out from the exported files alone.

    Source: the published architecture (arXiv:2302.13971) in the layout that transformers' LlamaForCausalLM documents:
    rotary pairs are channels i and i + head_dim / 2.
    """
    config = json.loads((folder / "config.json").read_text())
    weights = {}
    for file in folder.glob("*.safetensors"):
        weights |= load_file(file)
    weights = {name: weight.double() for name, weight in weights.items()}
    heads, size, length = config["num_attention_heads"], config["head_dim"], tokens.shape[1]

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * weights[f"{name}.weight"]

    def turn(x):
        angles = torch.outer(
            torch.arange(length).double(), config["rope_theta"] ** (-torch.arange(0, size, 2).double() / size)
        )
        pairs = torch.complex(x[..., : size // 2], x[..., size // 2 :]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([pairs.real, pairs.imag], -1)

    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        h = norm(x, f"{name}.input_layernorm")
        q, k, v = (
            (h @ weights[f"{name}.self_attn.{letter}_proj.weight"].T).unflatten(-1, (heads, size)).transpose(1, 2)
            for letter in "qkv"
        )
        scores = turn(q) @ turn(k).mT / size**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)
        x = x + mixed @ weights[f"{name}.self_attn.o_proj.weight"].T
        h = norm(x, f"{name}.post_attention_layernorm")
        gated = F.silu(h @ weights[f"{name}.mlp.gate_proj.weight"].T) * (h @ weights[f"{name}.mlp.up_proj.weight"].T)
        x = x + gated @ weights[f"{name}.mlp.down_proj.weight"].T
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return norm(x, "model.norm") @ weights[head].T


def test_the_exported_files_are_a_llama_with_the_same_logits(run, tmp_path):
    export_hf(run.path, tmp_path / "hub")
    expected = ours(run)(tokens())
    # Our forward is fp32 and the written-out one float64.
    torch.testing.assert_close(llama_logits(tmp_path / "hub", tokens()).float(), expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.5


def test_transformers_gives_the_same_logits_and_generates(run, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that library's own deprecations are not ours
        import transformers

        export_hf(run.path, tmp_path / "hub", shard_bytes=20_000)
        model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hub", output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        with torch.no_grad():
            torch.testing.assert_close(model(tokens()).logits, ours(run)(tokens()), atol=1e-4, rtol=1e-4)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hub")
        text = "12 plus größer"
        given = tokenizer(text, return_tensors="pt")
        assert given["input_ids"][0].tolist() == ByteTokenizer().encode([text])[0][:-1].tolist()
        assert tokenizer.decode(given["input_ids"][0]) == text
        generated = model.generate(given["input_ids"][:, :5], max_new_tokens=8, do_sample=False)
        assert generated.shape[1] <= 13
        # Greedy decoding with its cache is the argmax of our own forward pass.
        assert generated[0, 5] == ours(run)(given["input_ids"][:, :5])[0, -1].argmax()


def test_a_large_model_is_cut_into_files_with_an_index(untied_run, tmp_path):
    export_hf(untied_run.path, tmp_path / "one")
    written = export_hf(untied_run.path, tmp_path / "many", shard_bytes=20_000)
    shards = [path for path in written if path.suffix == ".safetensors"]
    assert len(shards) > 3
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in whole.values())
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "many" / file)[name], whole[name])
    for path in shards:  # 20 kB, or one weight alone
        weights = load_file(path)
        assert len(weights) == 1 or sum(weight.nbytes for weight in weights.values()) <= 20_000


def test_a_second_export_replaces_the_first(untied_run, tmp_path):
    export_hf(untied_run.path, tmp_path / "hub", shard_bytes=20_000)
    written = export_hf(untied_run.path, tmp_path / "hub")
    assert sorted(path.name for path in written) == sorted(path.name for path in (tmp_path / "hub").iterdir())
    assert [path.name for path in (tmp_path / "hub").glob("model*")] == ["model.safetensors"]


def test_the_byte_tokenizer_file_encodes_as_the_shards_do():
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(byte_tokenizer()))
    text = "".join(map(chr, range(1, 0x800))) + "三 \U0001f600\r\n\t  x"
    assert tokenizer.encode(text).ids == ByteTokenizer().encode([text])[0][:-1].tolist()
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.get_vocab_size() == 256


def test_the_tokenizer_is_exported_without_truncation_or_padding(tmp_path):
    pytest.importorskip("tokenizers")
    vocabulary = {"</s>": 0, "a": 1, "b": 2}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content = {
        "version": "1.0",
        "truncation": {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        "added_tokens": [{"id": 0, "content": "</s>", **flags}],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "b"},
    }
    (tmp_path / "mine.json").write_text(json.dumps(content))
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text("a b " * number)
    config = DataConfig(source="text", path=str(tmp_path / "*.txt"), tokenizer=str(tmp_path / "mine.json"))
    prepare(config, tmp_path / "shards", progress=False)
    directory = make_run(tmp_path, UNTIED, tmp_path / "shards")
    export_hf(directory.path, tmp_path / "hub")
    exported = json.loads((tmp_path / "hub" / "tokenizer.json").read_text())
    assert exported["truncation"] is None
    assert exported["model"]["vocab"] == vocabulary
    assert json.loads((tmp_path / "hub" / "tokenizer_config.json").read_text())["eos_token"] == "</s>"
    assert json.loads((tmp_path / "hub" / "config.json").read_text())["eos_token_id"] == 0


def test_the_card_states_loss_and_bits_per_byte(untied_run, tmp_path):
    export_hf(untied_run.path, tmp_path / "hub")
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "2.0000 nats per token, 5.7708 bits per byte" in card  # 2 / ln 2 / 0.5
    assert untied_run.path.name in card
    assert "AdamW, peak learning rate 0.01" in card


def test_export_without_data_has_no_tokenizer(untied_run, tmp_path):
    spec = untied_run.spec()
    untied_run.create(spec, Placement(data=str(tmp_path / "gone")))
    export_hf(untied_run.path, tmp_path / "hub")
    assert not list((tmp_path / "hub").glob("tokenizer*"))
    assert "There is no tokenizer" in (tmp_path / "hub" / "README.md").read_text()


def test_a_run_that_cannot_be_exported_is_refused(tmp_path, tiny_shards, tiny_text):
    with pytest.raises(UserError, match="there is no such directory"):
        export_hf(tmp_path / "nowhere", tmp_path / "hub")
    directory = make_run(tmp_path, UNTIED, tiny_shards)
    with pytest.raises(UserError, match="own directory"):
        export_hf(directory.path, directory.path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds thesis\.tex"):
        export_hf(directory.path, tmp_path / "taken")
    other = tmp_path / "other"
    prepare(DataConfig(source="text", path=str(tiny_text), validation_fraction=0.5), other, progress=False)
    with pytest.raises(UserError, match="not those that run"):
        export_hf(directory.path, tmp_path / "hub", data=other)
    directory.record_file.unlink()
    with pytest.raises(UserError, match="its state is planned"):
        export_hf(directory.path, tmp_path / "hub")
    make_run(tmp_path, UNTIED, tiny_shards, status="diverged")
    with pytest.raises(UserError, match=r"it diverged \(loss inf at step 3\)"):
        export_hf(directory.path, tmp_path / "hub")
    assert not (tmp_path / "hub").exists()


def test_weights_of_another_shape_are_refused_by_name(untied_run, tmp_path):
    weights = load_file(untied_run.weights_file)
    weights["blocks.1.attention.key.weight"] = torch.zeros(16, 32)
    save_file(weights, untied_run.weights_file)
    with pytest.raises(UserError, match=r"blocks\.1\.attention\.key\.weight is 16x32 and .* 32x32"):
        export_hf(untied_run.path, tmp_path / "hub")
    untied_run.weights_file.write_bytes(untied_run.weights_file.read_bytes()[:-9])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        export_hf(untied_run.path, tmp_path / "hub")
    untied_run.weights_file.unlink()
    with pytest.raises(UserError, match="the weights are gone"):
        export_hf(untied_run.path, tmp_path / "hub")
