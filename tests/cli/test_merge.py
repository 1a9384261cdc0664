"""`peft merge`: files in, files out, numbers as the formula says."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft.cli import main
from peft.cli.errors import CliError
from peft.cli.tensor_files import read_header, rewrite

Q, V, EMBED = "model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.v_proj", "model.embed_tokens"


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def factors(module: str, n_in: int, n_out: int, r: int = 4) -> dict[str, torch.Tensor]:
    return {f"{module}.lora_A.weight": torch.randn(r, n_in), f"{module}.lora_B.weight": torch.randn(n_out, r)}


def merge(adapter: Path, base: Path, out: Path) -> int:
    return main(["merge", str(adapter), "--base", str(base), "--out", str(out)])


def change(tensors, module, scaling):
    return scaling * tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]


def test_shards_patterns_and_other_files(model_folder, write_adapter, tmp_path, capsys):
    tensors = {}
    for i in range(2):
        tensors |= factors(Q.format(i), 32, 32, r=2 if i else 4) | factors(V.format(i), 32, 16)
    adapter = write_adapter(
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True}, tensors
    )
    before = {path.name: path.read_bytes() for path in model_folder.iterdir()}
    out = tmp_path / "deep" / "merged"
    assert merge(adapter, model_folder, out) == 0
    assert "4 weights merged" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == set(before)
    assert {path.name: path.read_bytes() for path in model_folder.iterdir()} == before
    old, new = read_folder(model_folder), read_folder(out)
    assert list(old) == list(new)
    for name, value in old.items():
        module = name.removesuffix(".weight")
        if f"{module}.lora_A.weight" in tensors:
            r = tensors[f"{module}.lora_A.weight"].shape[0]
            value = value + change(tensors, module, (3 if "v_proj" in name else 8) / r**0.5)
            torch.testing.assert_close(new[name], value, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(new[name], value), name
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == json.loads(before["model.safetensors.index.json"])["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in new.values())
    assert oct(out.stat().st_mode & 0o777) == oct(tmp_path.joinpath("deep").stat().st_mode & 0o777)


def test_same_as_the_library(model_folder, tmp_path):
    """A trained-like adapter of the library, merged on files and merged in memory."""
    from transformers import AutoModelForCausalLM

    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "v_proj", "o_proj"],
        r=4,
        rank_pattern={"q_proj": 2},
        modules_to_save=["norm"],
        bias="lora_only",
        lora_bias=True,
    )
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.manual_seed(len(name))
            parameter.data.normal_(std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    assert merge(tmp_path / "adapter", model_folder, tmp_path / "out") == 0
    merged = model.merge_and_unload().eval()
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(fresh(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4)
    expected = merged.state_dict()
    for name, value in fresh.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5, msg=name)


METHODS = {
    "adalora": {"init_r": 4, "total_step": 10},
    "adamss": {"r": 8, "num_subspaces": 3},
    "boft": {"boft_block_size": 4},
    "beft": {"target_modules": ["v_proj"]},
    "c3a": {"block_size": 8, "target_modules": ["q_proj"]},
    "deft": {"r": 4},
    "delora": {},
    "fourierft": {"n_frequency": 50},
    "glora": {},
    "gralora": {"r": 4},
    "hira": {"r": 4},
    "hra": {},
    "ia3": {"target_modules": ["v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "ln_tuning": {"target_modules": ["input_layernorm"]},
    "loha": {},
    "lokr": {},
    "lora": {"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]},
    "miss": {"r": 4},
    "oft": {"oft_block_size": 8},
    "osf": {},
    "peanut": {"r": 4},
    "psoft": {"r": 8},
    "pvera": {"r": 8},
    "road": {"group_size": 16},
    "shira": {"r": 4, "random_seed": 1},
    "randlora": {"r": 4},
    "supertuning": {},
    "tinylora": {},
    "trainable_tokens": {"target_modules": ["embed_tokens"], "token_indices": [7, 2, 3]},
    "unilora": {"save_indices": True},
    "vblora": {"vector_length": 16, "num_vectors": 8},
    "vera": {"r": 8},
    "waveft": {"n_frequency": 50},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore")
def test_every_kind_of_method_merges_as_the_library_does(model_folder, tmp_path, method):
    from transformers import AutoModelForCausalLM

    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel, PeftType, get_peft_model

    options = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], **METHODS[method]}
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method.upper())](**options)
    torch.manual_seed(3)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "adapter")
    assert merge(tmp_path / "adapter", model_folder, tmp_path / "out") == 0
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    expected = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    changed, old = 0, read_folder(model_folder)
    for name, value in read_folder(tmp_path / "out").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)
        changed += not torch.equal(value, old[name])
    assert changed >= 1 + (method != "trainable_tokens")


def test_rows_of_tied_embeddings_are_those_of_both_ends(model_folder, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    from peft import TrainableTokensConfig, get_peft_model

    config = AutoConfig.from_pretrained(model_folder, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "tied")
    model = get_peft_model(model, TrainableTokensConfig(token_indices=[4, 9], task_type="CAUSAL_LM"))
    delta = model.get_input_embeddings().trainable_tokens_delta["default"].data.normal_()
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)  # published files name the output layer besides
    save_file(tensors | {"base_model.model.lm_head.token_adapter.trainable_tokens_delta": delta.clone()}, file)
    assert merge(tmp_path / "adapter", tmp_path / "tied", tmp_path / "out") == 0
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(fresh.lm_head.weight[[4, 9]], delta)
    assert fresh.lm_head.weight is fresh.get_input_embeddings().weight


def test_a_trained_norm_is_merged_with_its_bias(write_adapter, tmp_path):
    base, tensors = tmp_path / "base", {"norm.weight": torch.randn(6), "norm.bias": torch.randn(6)}
    base.mkdir()
    save_file(tensors, base / "model.safetensors")
    trained = {key.replace("norm", "norm.ln_tuning_layers"): value + 1 for key, value in tensors.items()}
    adapter = write_adapter({"peft_type": "LN_TUNING", "target_modules": ["norm"]}, trained)
    assert merge(adapter, base, tmp_path / "out") == 0
    for name, value in read_folder(tmp_path / "out").items():
        assert torch.equal(value, tensors[name] + 1), name


def test_miss_that_reads_the_base_weight(model_folder, tmp_path):
    """Its class says that it does not; a stand-in without values must not be merged."""
    from transformers import AutoModelForCausalLM

    from peft import MissConfig, get_peft_model

    config = MissConfig(r=8, init_weights="bat", target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    assert merge(tmp_path / "adapter", model_folder, tmp_path / "out") == 0
    expected, found = model.merge_and_unload().state_dict(), read_folder(tmp_path / "out")
    for i in range(2):
        torch.testing.assert_close(found[Q.format(i) + ".weight"], expected[Q.format(i) + ".weight"])


def test_rounds_once_into_bfloat16(write_adapter, tmp_path):
    base, weight = tmp_path / "base", torch.randn(20, 12).bfloat16()
    base.mkdir()
    save_file({"q_proj.weight": weight, "other": torch.arange(5)}, base / "model.safetensors")
    tensors = factors("q_proj", 12, 20)
    assert merge(write_adapter({}, tensors), base, tmp_path / "out") == 0
    new = read_folder(tmp_path / "out")
    assert torch.equal(new["q_proj.weight"], (weight.float() + change(tensors, "q_proj", 2.0)).bfloat16())
    assert torch.equal(new["other"], torch.arange(5))


@pytest.mark.parametrize("square", [False, True])
def test_conv1d_orientation(write_adapter, tmp_path, square):
    """GPT-2 stores [in, out]; its files lack the first part of the module path."""
    base, n_out = tmp_path / "base", 12 if square else 20
    base.mkdir()
    weight = torch.randn(12, n_out)
    save_file({"h.0.attn.c_attn.weight": weight}, base / "model.safetensors")
    (base / "config.json").write_text('{"model_type": "gpt2"}')
    tensors = factors("transformer.h.0.attn.c_attn", 12, n_out)
    assert merge(write_adapter({"fan_in_fan_out": square}, tensors), base, tmp_path / "out") == 0
    expected = weight + change(tensors, "transformer.h.0.attn.c_attn", 2.0).T
    torch.testing.assert_close(read_folder(tmp_path / "out")["h.0.attn.c_attn.weight"], expected)


def test_embedding_and_convolution(write_adapter, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    weights = {"embed_tokens.weight": torch.randn(30, 8), "conv.weight": torch.randn(6, 5, 3, 3)}
    save_file(weights, base / "model.safetensors")
    A, B = torch.randn(4, 30), torch.randn(8, 4)
    cA, cB = torch.randn(4, 5, 3, 3), torch.randn(6, 4, 1, 1)
    tensors = {"embed_tokens.lora_embedding_A": A, "embed_tokens.lora_embedding_B": B, "conv.lora_A.weight": cA,
               "conv.lora_B.weight": cB}  # fmt: skip
    assert merge(write_adapter({}, tensors), base, tmp_path / "out") == 0
    new = read_folder(tmp_path / "out")
    torch.testing.assert_close(new["embed_tokens.weight"], weights["embed_tokens.weight"] + 2 * (B @ A).T)
    delta = 2 * torch.einsum("or,rikl->oikl", cB[:, :, 0, 0], cA)
    torch.testing.assert_close(new["conv.weight"], weights["conv.weight"] + delta)


@pytest.mark.parametrize("transposed", [False, True])
def test_dora(write_adapter, tmp_path, transposed):
    base = tmp_path / "base"
    base.mkdir()
    weight, m = torch.randn(20, 12), torch.rand(20) + 0.5
    save_file({"q_proj.weight": weight.T.contiguous() if transposed else weight}, base / "model.safetensors")
    tensors = factors("q_proj", 12, 20)
    adapter = write_adapter({"use_dora": True}, tensors | {"q_proj.lora_magnitude_vector": m})
    assert merge(adapter, base, tmp_path / "out") == 0
    new = weight + change(tensors, "q_proj", 2.0)
    new = m[:, None] * new / new.norm(dim=1, keepdim=True)
    found = read_folder(tmp_path / "out")["q_proj.weight"]
    torch.testing.assert_close(found.T if transposed else found, new)


def test_whole_modules_biases_and_token_rows(model_folder, write_adapter, tmp_path, capsys):
    old = read_folder(model_folder)
    q, rows = Q.format(0), torch.randn(2, 32)
    tensors = factors(q, 32, 32) | {
        f"{q}.lora_B.bias": torch.randn(32),
        f"{V.format(0)}.base_layer.bias": torch.randn(16),
        "model.norm.weight": torch.randn(32),
        f"{EMBED}.token_adapter.trainable_tokens_delta": rows,
        f"{EMBED}.original_module.weight": torch.randn(2, 32),  # a further copy counts for nothing
        "score.weight": torch.randn(3, 32),
    }
    config = {
        "modules_to_save": ["norm", "score"],
        "trainable_token_indices": {"embed_tokens": [5, 2]},
        "lora_bias": True,
    }
    adapter = write_adapter(config, tensors)
    assert merge(adapter, model_folder, tmp_path / "out") == 0
    assert "1 tensors added" in capsys.readouterr().out
    new = read_folder(tmp_path / "out")
    torch.testing.assert_close(new[f"{q}.bias"], old[f"{q}.bias"] + 2 * tensors[f"{q}.lora_B.bias"])
    assert torch.equal(new[f"{V.format(0)}.bias"], tensors[f"{V.format(0)}.base_layer.bias"])
    assert torch.equal(new["model.norm.weight"], tensors["model.norm.weight"])
    assert torch.equal(new["score.weight"], tensors["score.weight"])
    expected = old[f"{EMBED}.weight"].clone()
    expected[[5, 2]] = rows
    assert torch.equal(new[f"{EMBED}.weight"], expected)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert "score.weight" in index["weight_map"]


def test_tensors_of_any_type_are_added_to_a_model_of_one_file(write_adapter, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    weight = torch.randn(3, 5)
    save_file({"norm.weight": weight, "other": weight.clone()}, base / "model.safetensors")
    tensors = {"norm.weight": weight + 1, "score.weight": weight + 2, "score.calls": torch.tensor(7)}
    assert merge(write_adapter({"modules_to_save": ["norm", "score"]}, tensors), base, tmp_path / "out") == 0
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {"other", *tensors}
    assert index["metadata"]["total_size"] == 3 * weight.nbytes + 8
    for name, value in {"other": weight, **tensors}.items():
        assert torch.equal(load_file(tmp_path / "out" / index["weight_map"][name])[name], value)
    assert not (tmp_path / "out" / "model.safetensors").exists()  # it would be read instead of the index


BAD = [
    ({"peft_type": "LILY"}, {}, "this adapter is lily"),
    ({"peft_type": "FROD"}, {}, "this adapter is frod"),
    ({"alora_invocation_tokens": [1]}, {}, "alora_invocation_tokens"),
    ({"init_lora_weights": "pissa"}, {}, "init_lora_weights='pissa'"),
    ({"target_parameters": ["w"]}, {}, "target_parameters"),
    ({}, factors("model.layers.7.self_attn.q_proj", 32, 32), "did you mean 'model.layers."),
    ({}, factors(Q.format(0), 32, 31), "do not fit"),
    (
        {},
        {f"{Q.format(0)}.lora_A.weight": torch.randn(4, 32)},
        "the file lacks base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",
    ),
    ({}, {"model.norm.weight": torch.randn(31)}, "resize the base model"),
    ({}, {"unknown.weight": torch.randn(3)}, "unknown.weight is not in"),
    ({}, {f"{Q.format(0)}.lora_A.weight": torch.full((4, 32), float("nan"))}, "not finite"),
    ({}, {f"{EMBED}.token_adapter.trainable_tokens_delta": torch.randn(2, 32)}, "trainable_token_indices"),
    (
        {},
        factors(Q.format(0), 32, 32) | {f"{Q.format(0)}.lora_magnitude_vector": torch.ones(32)},
        "no place for base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
    ),
    (
        {"trainable_token_indices": {"embed_tokens": [1, 99]}},
        {f"{EMBED}.token_adapter.trainable_tokens_delta": torch.randn(2, 32)},
        "rows [1, 99] of width 32, the base has [28, 32]",
    ),
    (
        {"trainable_token_indices": {"embed_tokenz": [1]}},
        {"model.embed_tokenz.token_adapter.trainable_tokens_delta": torch.randn(1, 32)},
        "model.embed_tokenz is not in",
    ),
    ({}, {}, "nothing to merge"),
    ({"peft_type": "UNILORA"}, {"base_model.unilora_theta_d": torch.ones(8)}, "tensors that all layers share"),
]


@pytest.mark.parametrize(("config", "tensors", "message"), BAD, ids=[case[2] for case in BAD])
def test_errors_write_nothing(model_folder, write_adapter, tmp_path, capsys, config, tensors, message):
    adapter = write_adapter(config, tensors)
    there = set(tmp_path.iterdir())
    assert merge(adapter, model_folder, tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == there


def test_tied_models_are_refused(model_folder, write_adapter, tmp_path, capsys):
    """Merging into a shared weight would change the other end of the model."""
    base = tmp_path / "tied"
    base.mkdir()
    tensors = {k: v for k, v in read_folder(model_folder).items() if k != "lm_head.weight"}
    save_file(tensors, base / "model.safetensors")
    (base / "config.json").write_text('{"tie_word_embeddings": true}')
    vocab = tensors[f"{EMBED}.weight"].shape[0]
    assert merge(write_adapter({}, factors("lm_head", 32, vocab), "a"), base, tmp_path / "out") == 2
    assert "shares with the input embedding" in capsys.readouterr().err
    embed = {f"{EMBED}.lora_embedding_A": torch.randn(4, vocab), f"{EMBED}.lora_embedding_B": torch.randn(32, 4)}
    assert merge(write_adapter({}, embed, "b"), base, tmp_path / "out") == 2
    assert "ensure_weight_tying" in capsys.readouterr().err
    assert merge(write_adapter({"ensure_weight_tying": True}, embed, "c"), base, tmp_path / "out") == 0


@pytest.mark.parametrize("what", ["missing", "cut", "bin", "shard"])
def test_broken_base(model_folder, write_adapter, tmp_path, capsys, what):
    adapter, base = write_adapter({}, factors(Q.format(0), 32, 32)), tmp_path / "b"
    messages = {"missing": "no such folder", "cut": "cut off", "bin": "has to be converted", "shard": "not there"}
    if what != "missing":
        base.mkdir()
        (base / "pytorch_model.bin").write_bytes(b"x")
    if what == "cut":
        tensors = read_folder(model_folder)
        save_file(tensors, base / "model.safetensors")
        os.truncate(base / "model.safetensors", (base / "model.safetensors").stat().st_size - 5)
    if what == "shard":
        (base / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x.safetensors"}}')
    assert merge(adapter, base, tmp_path / "out") == 2
    assert messages[what] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\0" * 5, "damaged or cut off: its header does not fit in the file"),
        (struct.pack("<Q", 99) + b"{}", "damaged or cut off: its header does not fit in the file"),
        (struct.pack("<Q", 4) + b"{bad", "damaged: its header is not valid JSON"),
        ({"q_proj.weight": torch.ones(32, 32, dtype=torch.int8)}, "q_proj.weight is stored as I8, quantised weights"),
    ],
)
def test_files_that_cannot_be_merged_into(write_adapter, tmp_path, capsys, content, message):
    base, adapter = tmp_path / "base", write_adapter({}, factors("q_proj", 32, 32))
    base.mkdir()
    if isinstance(content, dict):
        save_file(content, base / "model.safetensors")
    else:
        (base / "model.safetensors").write_bytes(content)
    assert merge(adapter, base, tmp_path / "out") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_tensor_of_another_size_is_not_written(tmp_path):
    save_file({"a": torch.ones(3), "b": torch.ones(2)}, tmp_path / "x.safetensors")
    shard = read_header(tmp_path / "x.safetensors")
    with pytest.raises(CliError, match=r"y: a ends at byte \d+, \d+ was meant"):
        rewrite(shard, tmp_path / "y", {"a": lambda: [torch.ones(4)]}, lambda: None)


def test_folders_without_weights_are_copied(model_folder, write_adapter, tmp_path, capsys):
    base = shutil.copytree(model_folder, tmp_path / "base")
    for name in ("assets/deep/logo.svg", "onnx/model.onnx", ".cache/x"):
        (base / name).parent.mkdir(parents=True)
        (base / name).write_text("x")
    adapter = write_adapter({}, factors(Q.format(0), 32, 32))
    assert merge(adapter, base, base / "merged") == 2
    assert "must not be inside the base folder" in capsys.readouterr().err
    assert merge(adapter, base, tmp_path / "out") == 0
    assert (tmp_path / "out" / "assets" / "deep" / "logo.svg").read_text() == "x"
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} == {"assets"}


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", "{bad", "config.json: damaged, not valid JSON"),
        ("config.json", "[]", "config.json: expected a JSON object, got list"),
        ("model.safetensors.index.json", "{bad", "index.json: damaged, not valid JSON"),
        ("model.safetensors.index.json", '{"metadata": {}}', "has no 'weight_map'"),
    ],
)
def test_damaged_json_of_the_base(model_folder, write_adapter, tmp_path, capsys, file, text, message):
    base = shutil.copytree(model_folder, tmp_path / "base")
    (base / file).write_text(text)
    assert merge(write_adapter({}, factors(Q.format(0), 32, 32)), base, tmp_path / "out") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_out_must_be_new_and_failure_leaves_nothing(model_folder, write_adapter, tmp_path, capsys, monkeypatch):
    adapter = write_adapter({}, factors(Q.format(0), 32, 32))
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    assert merge(adapter, model_folder, taken) == 2
    assert "not empty" in capsys.readouterr().err
    assert merge(adapter, model_folder, taken / "file" / "out") == 2
    assert f"{taken / 'file'} is a file" in capsys.readouterr().err
    monkeypatch.setattr(
        "peft.cli.merge_files._copy_other_files", lambda *a: (_ for _ in ()).throw(OSError("disk full"))
    )
    there = set(tmp_path.iterdir())
    assert merge(adapter, model_folder, tmp_path / "out") == 2
    assert capsys.readouterr().err == "peft merge: disk full\n"
    assert set(tmp_path.iterdir()) == there


def test_base_named_by_the_adapter(model_folder, write_adapter, tmp_path, capsys):
    tensors = factors(Q.format(0), 32, 32)
    adapter = write_adapter({"base_model_name_or_path": str(model_folder)}, tensors)
    assert main(["merge", str(adapter), "--out", str(tmp_path / "out")]) == 0
    nameless = write_adapter({}, tensors, "nameless")
    assert main(["merge", str(nameless), "--out", str(tmp_path / "out2")]) == 2
    assert "--base FOLDER is needed" in capsys.readouterr().err


MEASURE = """
import gc, re, sys, torch
from peft.cli import main
torch.set_num_threads(1)
from peft import PeftModel
from peft.cli import merge_files, adapter_files, tensor_files
import torch.fx.experimental.symbolic_shapes  # torch imports it to draw on the meta device
import tqdm
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
torch.ones(1024, 8) @ torch.ones(8, 1024)
gc.collect()
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from what is used now
before = peak()
assert main(["merge", *sys.argv[1:]]) == 0
print("EXTRA", peak() - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux")
@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "ia3 inputs", "adalora", "hra"])
def test_memory_does_not_grow_with_the_model(write_adapter, tmp_path, kind):
    """Extra memory stays below twice the largest tensor (here 64 MiB), though the shard has three of them."""
    base, r = tmp_path / "base", 4
    base.mkdir()
    weight = torch.full((8192, 4096), float(kind[:3] in ("ia3", "hra")), dtype=torch.bfloat16)
    tensors = {f"layers.{i}.q_proj.weight": weight.clone() for i in range(3)}
    save_file(tensors, base / "model.safetensors")
    config, parts = {
        "lora": ({}, {"lora_A.weight": torch.ones(r, 4096), "lora_B.weight": torch.ones(8192, r)}),
        "ia3": ({"peft_type": "IA3", "feedforward_modules": []}, {"ia3_l": torch.full((8192, 1), 8.0)}),
        "ia3 inputs": ({"peft_type": "IA3", "feedforward_modules": ["q_proj"]}, {"ia3_l": torch.full((1, 4096), 8.0)}),
        "adalora": (
            {"peft_type": "ADALORA", "init_r": r, "total_step": 10},
            {"lora_A": torch.ones(r, 4096), "lora_E": torch.full((r, 1), 4.0), "lora_B": torch.ones(8192, r)},
        ),
        "hra": ({"peft_type": "HRA", "r": 2}, {"hra_u": torch.eye(4096, 2)}),
    }["lora" if kind == "dora" else kind]
    if kind == "dora":
        config, parts = {"use_dora": True}, parts | {"lora_magnitude_vector": torch.ones(8192)}
    changes = {f"layers.{i}.q_proj.{name}": part.clone() for i in range(3) for name, part in parts.items()}
    adapter, out = write_adapter(config, changes), tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(adapter), "--base", str(base), "--out", str(out)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    extra = int(done.stdout.split("EXTRA")[1])
    assert extra <= 2 * weight.nbytes, f"{extra / 2**20:.0f} MiB"
    new = load_file(out / "model.safetensors")
    expected = torch.full(
        (8192, 4096), {"dora": 1 / 64, "adalora": 32.0, "hra": 1.0}.get(kind, 8.0), dtype=torch.bfloat16
    )
    if kind == "hra":  # reflections of the first two inputs
        expected[:, :2] = -1.0
    assert torch.equal(new["layers.2.q_proj.weight"], expected)
