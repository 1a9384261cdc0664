"""LoRA on whole models: replicated layers, tied embeddings, weighted combination."""

import copy
import warnings

import pytest
import torch
from torch import nn

from peft import LoraConfig, PeftModel, get_peft_model
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


def test_failing_injection_takes_replication_back():
    base = llama()
    with pytest.raises(ValueError):
        get_peft_model(base, LoraConfig(target_modules=["nothing"], layer_replication=[(0, 2), (0, 2)]))
    assert len(base.model.layers) == 2 and base.config.num_hidden_layers == 2


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
