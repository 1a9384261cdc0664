# SPDX-License-Identifier: Apache-2.0
"""get_layer_status and get_model_status."""

import pytest
import torch
from torch import nn

import peft
from peft import LoraConfig, VeraConfig, get_layer_status, get_model_status, get_peft_model, inject_adapter_in_model


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0, self.lin1, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.emb = nn.Embedding(10, 8)

    def forward(self, x):
        return self.head(self.lin1(self.lin0(x)))


@pytest.fixture
def model():
    config = LoraConfig(target_modules=["lin0"], modules_to_save=["head"], trainable_token_indices={"emb": [1, 2]})
    model = get_peft_model(Net(), config)
    model.add_adapter("b", LoraConfig(target_modules=["lin1"]))
    return model


def test_layer_status(model):
    status = {s.name: s for s in model.get_layer_status()}
    assert list(status) == ["model.lin0", "model.lin1", "model.head", "model.emb.token_adapter"]
    kinds = [s.module_type for s in status.values()]
    assert kinds == ["lora.Linear", "lora.Linear", "ModulesToSaveWrapper", "TrainableTokensLayer"]
    assert all(s.enabled and s.merged_adapters == [] and s.quantization_backend is None for s in status.values())
    assert all(s.active_adapters == ["default"] for s in status.values())
    assert [s.requires_grad for s in status.values()] == [
        {"default": True},
        {"b": False},
        {"default": True},
        {"default": True},
    ]
    assert [s.devices for s in status.values()] == [{n: ["cpu"]} for n in ("default", "b", "default", "default")]
    model.base_model.model.lin0.lora_A["default"].weight.requires_grad = False
    assert model.get_layer_status()[0].requires_grad == {"default": "irregular"}
    assert get_layer_status(model) == model.get_layer_status()


def test_model_status(model):
    status = model.get_model_status()
    assert (status.base_model_type, status.adapter_model_type) == ("Net", "LoraModel")
    assert status.peft_types == {"default": "LORA", "b": "LORA"}
    assert (status.trainable_params, status.total_params) == (162, 532)
    assert status.num_adapter_layers == 4 and status.enabled is True and status.merged_adapters == []
    assert status.active_adapters == ["default"] and status.available_adapters == ["b", "default"]
    assert status.requires_grad == {"default": True, "b": False}
    assert status.devices == {"default": ["cpu"], "b": ["cpu"]}


def test_irregular_states(model):
    model.base_model.model.lin0.enable_adapters(False)
    assert model.get_model_status().enabled == "irregular"
    assert model.get_model_status().requires_grad["default"] == "irregular"
    model.set_adapter("default")
    model.base_model.set_adapter(["default", "b"])
    assert model.get_model_status().active_adapters == "irregular"  # the head only has one of them
    two = get_peft_model(Net(), LoraConfig(target_modules=["lin0", "lin1"]))
    two.base_model.model.lin0.merge()
    assert two.get_model_status().merged_adapters == "irregular"
    two.base_model.model.lin1.merge()
    assert two.get_model_status().merged_adapters == ["default"]


def test_other_models(model):
    plain = get_model_status(inject_adapter_in_model(LoraConfig(target_modules=["lin0"]), Net()))
    assert (plain.base_model_type, plain.adapter_model_type, plain.peft_types) == ("other", "None", {})
    assert (plain.trainable_params, plain.num_adapter_layers) == (128, 1)
    assert get_layer_status(model.base_model)[0].name == "model.lin0"
    for empty in (Net(), get_peft_model(Net(), LoraConfig(target_modules="dummy-target-modules"))):
        with pytest.raises(ValueError, match="No adapter layers found"):
            get_layer_status(empty)
    mixed = get_peft_model(Net(), LoraConfig(target_modules=["lin0"]), mixed=True)
    for function in (mixed.get_layer_status, mixed.get_model_status):
        with pytest.raises(TypeError, match="PeftMixedModel"):
            function()
    frozen = get_peft_model(Net(), VeraConfig(target_modules=["lin0"], r=2, inference_mode=True)).get_layer_status()[0]
    assert frozen.module_type == "vera.Linear" and frozen.requires_grad == {"default": False}


def test_prompt_models_and_transformers_models():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=1, intermediate_size=16, num_attention_heads=2, vocab_size=20
    )
    base = transformers.LlamaForCausalLM(config)
    prompt = get_peft_model(base, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    for function in (prompt.get_layer_status, prompt.get_model_status):
        with pytest.raises(TypeError, match="prefix tuning and adaption prompt"):
            function()
    plain = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), transformers.LlamaForCausalLM(config))
    assert get_model_status(plain).base_model_type == "LlamaForCausalLM"


def test_counts_of_packed_parameters():
    class Params4bit(nn.Parameter):
        quant_storage = torch.uint8

    model = nn.Module()
    model.weight = Params4bit(torch.zeros(4, 1, dtype=torch.uint8), requires_grad=False)
    assert peft.status.count_parameters(model) == (0, 8)
    model.shard = nn.Parameter(torch.empty(0))
    model.shard.ds_numel = 5  # partitioned by ZeRO-3
    assert peft.status.count_parameters(model) == (5, 13)
