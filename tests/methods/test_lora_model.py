"""LoRA on whole models: replicated layers, tied embeddings, weighted combination."""

import copy
import warnings

import pytest
import torch
from torch import nn

from peft import (
    ArrowConfig,
    KasaConfig,
    LoraConfig,
    LoraModel,
    PeftModel,
    VBLoRAModel,
    VeraModel,
    get_peft_model,
    get_peft_model_state_dict,
    registry,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer


class Net(nn.Module):
    def __init__(self, *layers: nn.Module):
        super().__init__()
        for i, layer in enumerate(layers):
            self.add_module(f"lin{i}", layer)

    def forward(self, x):
        for layer in self.children():
            x = layer(x)
        return x


def mlp() -> Net:
    torch.manual_seed(0)
    return Net(nn.Linear(8, 12), nn.Linear(12, 6))


def randomise(model: nn.Module, scale: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(5)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = (torch.randn(p.shape, generator=generator) * scale).to(p)


def layer_of(model: nn.Module, key: str) -> LoraLayer:
    return model.base_model.model.get_submodule(key)


# ---- whole models
def llama(**kwargs):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    options = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 32, **kwargs}
    options |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**options)).eval()


def test_replication_happens_once_shares_weights_and_refuses_to_merge():
    cfg = LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[(0, 2), (1, 2)])
    model = get_peft_model(llama(), cfg)
    layers = model.base_model.model.model.layers
    assert len(layers) == 3 and model.config.num_hidden_layers == 3
    assert layers[1].mlp.up_proj.weight is layers[2].mlp.up_proj.weight
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2]
    model.add_adapter("b", copy.deepcopy(cfg))
    assert len(model.base_model.model.model.layers) == 3
    with pytest.raises(ValueError, match="replicated"):
        model.merge_adapter()
    ids = torch.tensor([[1, 2, 3]])
    assert model(input_ids=ids).logits.shape == (1, 3, 20)


def tiny(kind: str):
    import transformers as tf

    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    sliding = {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True, "sliding_window": 4}
    cls, options = {
        "gpt2": (tf.GPT2LMHeadModel, {"n_embd": 16, "n_head": 2}),
        "bert": (tf.BertForMaskedLM, small),
        "qwen3": (tf.Qwen3ForCausalLM, {**small, **sliding, "num_key_value_heads": 1}),
    }[kind]
    torch.manual_seed(0)
    return cls(cls.config_class(vocab_size=20, num_hidden_layers=2, bos_token_id=1, eos_token_id=2, **options)).eval()


@pytest.mark.parametrize(
    "kind, target, stack",
    [
        ("gpt2", "c_attn", "transformer.h"),
        ("bert", "query", "bert.encoder.layer"),
        ("qwen3", "q_proj", "model.layers"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_replication_finds_the_layers_and_says_how_many_there_are(kind, target, stack):
    base, ids = tiny(kind), torch.tensor([[1, 2, 3]])
    model = get_peft_model(base, LoraConfig(r=2, target_modules=[target], layer_replication=[(0, 2), (0, 1)]))
    config, layers = base.config, base.get_submodule(stack)
    assert len(layers) == config.num_hidden_layers == 3
    assert getattr(config, "layer_types", None) in (None, ["full_attention", "sliding_attention", "full_attention"])
    out = base(input_ids=ids).logits
    randomise(layers[2])
    assert not torch.allclose(base(input_ids=ids).logits, out)  # a copy has adapters of its own
    if kind != "bert":
        assert model.generate(input_ids=ids, max_new_tokens=2, min_new_tokens=2).shape == (1, 5)
    with pytest.raises(ValueError, match=r"replicated with \[\(0, 2\), \(0, 1\)\] already"):
        model.add_adapter("b", LoraConfig(target_modules=[target], layer_replication=[(0, 1)]))


@pytest.mark.parametrize(
    "ranges, first, message",
    [
        ([(0, 3)], False, r"range \(0, 3\) is outside of the model's 2 layers"),
        ([(1, 1)], False, r"range \(1, 1\) is outside"),
        ([(0, 2)], True, "there are adapters already"),
    ],
)
def test_replications_that_make_no_sense(ranges, first, message):
    base = llama()
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"])) if first else None
    cfg = LoraConfig(target_modules=["q_proj"], layer_replication=ranges)
    with pytest.raises(ValueError, match=message):
        model.add_adapter("b", cfg) if model else get_peft_model(base, cfg)
    with pytest.raises(ValueError, match="layers of Net to replicate: .*'layers', 'encoder.layer' or 'h'"):
        get_peft_model(mlp(), LoraConfig(target_modules=["lin0"], layer_replication=[(0, 1)]))


def test_failing_injection_takes_replication_back():
    base = tiny("qwen3")
    with pytest.raises(ValueError):
        get_peft_model(base, LoraConfig(target_modules=["nothing"], layer_replication=[(1, 2), (0, 2)]))
    assert len(base.model.layers) == 2 and base.config.num_hidden_layers == 2
    assert base.config.layer_types == ["full_attention", "sliding_attention"]
    assert [layer.self_attn.layer_idx for layer in base.model.layers] == [0, 1]


def test_tied_embedding_shares_one_set_of_parameters(tmp_path):
    base = llama(tie_word_embeddings=True)
    cfg = LoraConfig(
        r=2, lora_alpha=4, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, cfg)
    model.add_adapter("b", LoraConfig(r=3, target_modules=["embed_tokens"], ensure_weight_tying=True))
    randomise(model)
    core = model.base_model.model
    head, embedding = core.lm_head, core.model.embed_tokens
    for name in ("default", "b"):
        assert head.lora_A[name].weight.data_ptr() == embedding.lora_embedding_B[name].data_ptr()
        assert not list(head.parameters_of(name))
    torch.testing.assert_close(head.get_delta_weight("default"), embedding.get_delta_weight("default"))
    ids = torch.tensor([[1, 2, 3]])
    out = model(input_ids=ids).logits
    out.square().sum().backward()
    assert embedding.lora_embedding_A["default"].grad.abs().sum() > 0
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    from safetensors.torch import load_file

    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert keys["base_model.model.lm_head.lora_A.weight"].shape == (2, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = PeftModel.from_pretrained(llama(tie_word_embeddings=True), tmp_path)
    torch.testing.assert_close(again(input_ids=ids).logits, out)


def test_a_failure_while_tying_leaves_the_tied_layer_as_it_was(monkeypatch):
    def fail(*args):
        raise RuntimeError("no")

    base = llama(tie_word_embeddings=True)
    monkeypatch.setattr("peft.tuners.lora.tied._tie", fail)
    with pytest.raises(RuntimeError, match="no"):
        get_peft_model(base, LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True))
    assert type(base.lm_head) is nn.Linear


def test_tying_needs_the_embedding_among_the_targets():
    cfg = LoraConfig(
        target_modules=["embed_tokens", "q_proj"], exclude_modules=["embed_tokens"], ensure_weight_tying=True
    )
    with pytest.raises(ValueError, match="needs an adapted input embedding to tie 'lm_head' to"):
        get_peft_model(llama(tie_word_embeddings=True), cfg)


def test_tied_layer_without_the_flag_warns():
    with pytest.warns(UserWarning, match="ensure_weight_tying"):
        get_peft_model(llama(tie_word_embeddings=True), LoraConfig(target_modules=["embed_tokens"]))


# ---- weighted combination
def two_adapters(**second):
    model = get_peft_model(mlp(), LoraConfig(r=3, lora_alpha=5, target_modules=["lin0", "lin1"]))
    model.add_adapter("b", LoraConfig(**{"r": 2, "lora_alpha": 7, "target_modules": ["lin0"], **second}))
    randomise(model)
    return model


@pytest.mark.parametrize("kind, rank", [("cat", None), ("svd", 5), ("linear_exact", None)])
@pytest.mark.parametrize("rslora", [False, True])
def test_exact_combinations(kind, rank, rslora):
    model = two_adapters(use_rslora=rslora)
    layers = [layer_of(model, k) for k in ("lin0", "lin1")]
    expected = [
        sum(w * layer.get_delta_weight(n) for n, w in (("default", 0.5), ("b", -2.0)) if n in layer) for layer in layers
    ]
    model.add_weighted_adapter(["default", "b"], [0.5, -2.0], "c", combination_type=kind, svd_rank=rank)
    for layer, delta in zip(layers, expected, strict=True):
        torch.testing.assert_close(layer.get_delta_weight("c"), delta, rtol=1e-4, atol=1e-5)
        assert layer.scaling["c"] == 1.0
        assert not any(p.requires_grad for p in layer.parameters_of("c"))
    assert model.active_adapter == "default"


def test_combination_of_rslora_sources_keeps_its_size():
    model = two_adapters(r=3, use_rslora=True)
    model.add_weighted_adapter(["b"], [1.0], "c", combination_type="linear")
    layer = layer_of(model, "lin0")
    torch.testing.assert_close(layer.get_delta_weight("c"), layer.get_delta_weight("b"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "kwargs, error",
    [
        ({"adapters": ["default", "b"], "weights": [1.0], "combination_type": "cat"}, ValueError),
        ({"adapters": ["default", "nope"], "weights": [1.0, 1.0]}, ValueError),
        ({"adapters": ["default", "b"], "weights": [1.0, 1.0], "combination_type": "linear"}, ValueError),
        ({"adapters": ["default", "b"], "weights": [1.0, 1.0], "combination_type": "catt"}, ValueError),
        ({"adapters": [], "weights": []}, ValueError),
        ({"adapters": ["default", "b"], "weights": [1.0, 1.0], "combination_type": "ties_svd"}, TypeError),
    ],
)
def test_failing_combination_leaves_nothing(kwargs, error):
    model = two_adapters()
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(error):
        model.add_weighted_adapter(adapter_name="c", **kwargs)
    assert set(model.peft_config) == {"default", "b"}
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert model.active_adapters == ["default"]


@pytest.mark.parametrize("options", [{"lora_bias": True}, {"use_dora": True}], ids=str)
def test_a_combination_has_all_that_its_sources_train(options):
    """Biases add with their weights; magnitudes are averaged."""
    model = get_peft_model(mlp(), LoraConfig(r=2, lora_alpha=3, target_modules=["lin0", "lin1"], **options))
    model.add_adapter("b", LoraConfig(r=2, lora_alpha=8, target_modules=["lin1"], **options))
    randomise(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += 2 if "magnitude" in name else 0
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    out = model(x)
    model.add_weighted_adapter(["default"], [1.0], "copy", combination_type="linear")
    model.set_adapter("copy")
    torch.testing.assert_close(model(x), out)
    model.add_weighted_adapter(["b", "default"], [0.5, -1.5], "both", combination_type="cat")
    layer = layer_of(model, "lin1")
    if "lora_bias" in options:
        a, b = (layer.lora_B[n].bias * layer.scaling[n] for n in ("default", "b"))
        torch.testing.assert_close(layer.lora_B["both"].bias, 0.5 * b - 1.5 * a)
        model.add_adapter("plain", LoraConfig(r=2, target_modules=["lin1"]))
        model.add_weighted_adapter(["plain", "b"], [1.0, 1.0], "mixed", combination_type="cat")
        torch.testing.assert_close(layer.lora_B["mixed"].bias, b)
    else:
        m = {n: p.weight for n, p in layer.lora_magnitude_vector.items()}
        torch.testing.assert_close(m["both"], 0.25 * m["b"] + 0.75 * m["default"])


def test_a_layer_that_no_source_adapts_stays_as_it_is():
    """The exclusions are those of the first source, the targets those of all."""
    model = get_peft_model(mlp(), LoraConfig(r=2, target_modules=["lin0"], init_lora_weights=False))
    model.add_adapter("b", LoraConfig(r=2, target_modules=["lin0", "lin1"], exclude_modules=["lin1"]))
    assert type(model.base_model.model.lin1) is nn.Linear
    model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "c", combination_type="cat")
    assert layer_of(model, "lin1").get_delta_weight("c").abs().max() == 0


def test_a_combination_of_tied_layers_is_tied():
    cfg = LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)
    model = get_peft_model(llama(tie_word_embeddings=True), cfg)
    model.add_adapter("b", copy.deepcopy(cfg))
    randomise(model)
    model.add_weighted_adapter(["default", "b"], [0.5, 2.0], "c", combination_type="cat")
    head, embedding = model.base_model.model.lm_head, model.base_model.model.model.embed_tokens
    want = 0.5 * embedding.get_delta_weight("default") + 2 * embedding.get_delta_weight("b")
    torch.testing.assert_close(embedding.get_delta_weight("c"), want)
    torch.testing.assert_close(head.get_delta_weight("c"), want)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target_modules": [], "target_parameters": ["lin1.weight"]}, r"target_parameters, which \['default'\] use"),
        ({"kasa_config": KasaConfig()}, "KaSA and Arrow adapters cannot be combined"),
        ({"arrow_config": ArrowConfig()}, "KaSA and Arrow adapters cannot be combined"),
    ],
)
def test_adapters_that_do_not_combine(options, message):
    model = get_peft_model(mlp(), LoraConfig(**{"r": 2, "target_modules": ["lin0"], **options}))
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(["default"], [1.0], "c")
    assert list(model.peft_config) == ["default"]


def test_a_model_that_is_gptq_as_a_whole_does_not_merge():
    model = get_peft_model(mlp(), LoraConfig(target_modules=["lin0"]))
    model.base_model.model.quantization_method = "gptq"
    with pytest.raises(ValueError, match="gptq quantized"):
        model.merge_adapter()


def test_combining_convolutions_and_embeddings():
    torch.manual_seed(0)
    base = Net(nn.Conv3d(2, 4, 3, padding=1))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["lin0"]))
    model.add_adapter("b", LoraConfig(r=2, target_modules=["lin0"]))
    randomise(model)
    layer = layer_of(model, "lin0")
    expected = layer.get_delta_weight("default") + layer.get_delta_weight("b")
    for kind in ("svd", "cat"):
        model.add_weighted_adapter(
            ["default", "b"], [1.0, 1.0], kind, combination_type=kind, svd_rank=4 if kind == "svd" else None
        )
        torch.testing.assert_close(layer.get_delta_weight(kind), expected, rtol=1e-4, atol=1e-5)


# ---- the base weight, and LoRAs that changed it


def test_base_weight_is_read_and_written_as_it_is_stored():
    from transformers.pytorch_utils import Conv1D

    layer = get_peft_model(
        nn.Sequential(Conv1D(6, 4)), LoraConfig(target_modules=["0"], fan_in_fan_out=True)
    ).base_model.model[0]
    weight = layer.get_base_weight()
    assert weight.shape == (4, 6) and not weight.requires_grad and torch.equal(weight, layer.weight)
    with pytest.raises(ValueError, match=r"stored as \[4, 6\], got a tensor of shape \[6, 4\]"):
        layer.set_base_weight(weight.T)
    layer.set_base_weight(weight + 1)
    assert torch.equal(layer.weight, weight) and not layer.weight.requires_grad
    before = layer.get_base_weight().clone()
    layer.merge()
    with pytest.raises(RuntimeError, match="unmerge_adapter"):
        layer.set_base_weight(weight * 2)
    layer.unmerge()
    assert torch.equal(layer.get_base_weight(), before)


def test_frozen_weight_names():
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Embedding(8, 8)), LoraConfig(target_modules=["0", "1"]))
    assert [layer.frozen_peft_weight_names for layer in model.base_model.layers()] == [{}, {}]
    model.add_adapter("mica", LoraConfig(r=4, target_modules=["0"], init_lora_weights="mica"))
    assert model.base_model.model[0].frozen_peft_weight_names == {"mica": ("lora_B",)}


def test_targets_and_layers_are_published_on_the_tuner():
    assert (
        LoraModel.target_module_mapping["llama"] == ["q_proj", "v_proj"] and len(LoraModel.target_module_mapping) == 40
    )
    assert LoraModel.tuner_layer_cls is LoraLayer
    assert VBLoRAModel.target_module_mapping != VeraModel.target_module_mapping
    for method in registry.methods().values():
        assert getattr(method.tuner, "tuner_layer_cls", None) is method.layer


@pytest.mark.parametrize("kwargs", [None, {}, {"state_dict": "gathered"}], ids=str)
def test_subtract_mutated_init(kwargs):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    want = copy.deepcopy(base)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights="pissa"))
    initial = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    model.add_adapter("initial", LoraConfig(r=2, target_modules=["0", "1"]))
    set_peft_model_state_dict(model, initial, "initial")
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1
    trained = get_peft_model_state_dict(model)
    if kwargs:
        kwargs = {"state_dict": model.state_dict()}
    state = model.base_model.subtract_mutated_init(trained, "initial", kwargs)
    assert {k: tuple(v.shape) for k, v in state.items() if "0.lora" in k} == {
        "base_model.model.0.lora_A.weight": (4, 8),
        "base_model.model.0.lora_B.weight": (6, 4),
    }
    plain = get_peft_model(want, LoraConfig(r=4, lora_alpha=16, target_modules=["0", "1"]))
    set_peft_model_state_dict(plain, state)
    x = torch.randn(3, 8)
    torch.testing.assert_close(plain(x), model(x))
    with pytest.raises(ValueError, match="does not exist"):
        model.base_model.subtract_mutated_init(trained, "nope")
    with pytest.raises(ValueError, match="init_lora_weights=True"):
        model.base_model.subtract_mutated_init(trained, "default")


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_merging_into_float8_weights(dtype, safe_merge):
    """Formed in float32, stopped at the limits of the format, which casting alone does not do."""
    base = Net(nn.Linear(8, 6))
    base.lin0.weight.data = base.lin0.weight.data.to(dtype)
    before = base.lin0.weight.detach().float()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["lin0"], init_lora_weights=False))
    layer = base.lin0
    layer.lora_B["default"].weight.data[0] *= 1e6
    limit = torch.finfo(dtype).max
    want = (before + layer.get_delta_weight("default")).clamp(-limit, limit).to(dtype).float()
    assert (want[0].abs() == limit).any() and not torch.equal(want[1:], before[1:])
    model.merge_adapter(safe_merge=safe_merge)
    assert layer.weight.dtype == dtype and torch.equal(layer.weight.float(), want)
    model.unmerge_adapter()
    assert torch.equal(layer.weight.float(), before)


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload", "merge"])
def test_names_to_merge_are_a_list(call):
    model = get_peft_model(mlp(), LoraConfig(target_modules=["lin0"]))
    owner = model.get_base_model().lin0 if call == "merge" else model
    with pytest.raises(TypeError, match="should be a list of strings, got the str 'default'"):
        getattr(owner, call)(adapter_names="default")


@pytest.mark.parametrize("safe_merge", [False, True])
def test_a_trained_bias_is_not_merged_into_a_layer_without_one(safe_merge):
    with pytest.warns(UserWarning, match="has no bias: merging LoRA weights won't be possible"):
        model = get_peft_model(Net(nn.Linear(8, 6, bias=False)), LoraConfig(target_modules=["lin0"], lora_bias=True))
    before = model.get_base_model().lin0.weight.clone()
    with pytest.raises(RuntimeError, match="Impossible to merge a lora adapter with a bias"):
        model.merge_adapter(safe_merge=safe_merge)
    assert torch.equal(model.get_base_model().lin0.weight, before)


def test_merging_without_a_copy_is_taken_out_by_subtracting():
    model = get_peft_model(mlp().double(), LoraConfig(target_modules=["lin0"], init_lora_weights=False, lora_bias=True))
    layer = model.get_base_model().lin0
    layer.lora_B["default"].bias.data.fill_(3.0)
    before = {k: v.clone() for k, v in layer.base_layer.state_dict().items()}
    layer.merge(keep=False)
    assert not layer._saved_weights
    torch.testing.assert_close(layer.bias, before["bias"] + 3 * layer.scaling["default"])
    layer.unmerge()
    torch.testing.assert_close(layer.base_layer.state_dict(), before)


def test_combined_targets():
    model = get_peft_model(mlp(), LoraConfig(r=2, target_modules="lin0"), "a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=".*1"))
    model.add_adapter("c", LoraConfig(r=2, target_modules=["lin0"]))
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "both")
    assert model.peft_config["both"].target_modules == "(lin0)|(.*1)"
    assert all("both" in layer for layer in model.base_model.layers())
    model.add_adapter("d", LoraConfig(r=2, target_modules=("lin1",)))
    model.add_weighted_adapter(["c", "d"], [1.0, 1.0], "lists")
    assert model.peft_config["lists"].target_modules == {"lin0", "lin1"}
    with pytest.raises(ValueError, match="`target_modules` of type list/set and str"):
        model.add_weighted_adapter(["a", "c"], [1.0, 1.0], "mixed")
    assert "mixed" not in model.peft_config


def test_adapters_that_train_the_same_module_are_not_combined():
    config = LoraConfig(target_modules=["lin0"], modules_to_save=["lin1"])
    model = get_peft_model(mlp(), config, "a")
    model.add_adapter("b", copy.deepcopy(config))
    with pytest.raises(ValueError, match=r"target the same module with modules_to_save: 'lin1'"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "both")
    assert "both" not in model.peft_config


class Float8Linear(nn.Linear):
    """Stored in float8, widened for each call, as layerwise casting does."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


def test_dora_on_float8_weights():
    stored, wide = Net(Float8Linear(8, 6)), Net(nn.Linear(8, 6))
    stored.lin0.weight.data = stored.lin0.weight.data.to(torch.float8_e4m3fn)
    wide.lin0.weight.data, wide.lin0.bias.data = stored.lin0.weight.data.float(), stored.lin0.bias.data.clone()
    config = LoraConfig(r=2, target_modules=["lin0"], use_dora=True, init_lora_weights=False)
    first, second = get_peft_model(stored, config), get_peft_model(wide, config)
    set_peft_model_state_dict(second, get_peft_model_state_dict(first))
    x = torch.randn(3, 8)
    torch.testing.assert_close(first(x), second(x))
    found = [
        torch.autograd.grad(m(x).square().sum(), [p for p in m.parameters() if p.requires_grad])
        for m in (first, second)
    ]
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)
