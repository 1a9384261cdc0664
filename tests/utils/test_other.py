# SPDX-License-Identifier: Apache-2.0
"""peft.utils.other: names, inputs, preparation for training, FSDP policy."""

import sys
import warnings
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from peft import LoraConfig, get_peft_model
from peft.utils import other
from peft.utils.constants import bloom_model_postprocess_past_key_value, starcoder_model_postprocess_past_key_value

transformers = pytest.importorskip("transformers")


def llama(**options):
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def nested():
    return nn.Sequential(nn.Sequential(nn.Linear(2, 2)))


def test_submodules_by_name():
    model = nested()
    assert other._get_submodules(model, "0.0") == (model[0], model[0][0], "0")
    assert other._get_submodules(model, "0") == (model, model[0], "0")
    assert other._get_submodules_with_grandparent(model, "0.0") == (model[0], model, model[0][0], "0")
    assert other._get_submodules_with_grandparent(model, "0") == (model, model, model[0], "0")
    with pytest.raises(AttributeError, match="has no attribute `7`"):
        other._get_submodules(model, "0.7")
    assert other._is_valid_match("a.b", "b") and other._is_valid_match("b", "b")
    assert not other._is_valid_match("ab", "b")


def test_embedding_and_block_names():
    model = llama()
    assert other._get_input_embeddings_name(model) == "model.embed_tokens"
    assert other._get_input_embeddings_name(nested(), "fallback") == "fallback"
    assert other._get_no_split_modules(model) == {"LlamaDecoderLayer"}
    assert other._get_no_split_modules(nested()) == set()
    assert other._get_module_names_tied_with_embedding(llama(tie_word_embeddings=True)) == ["lm_head"]
    assert other._get_module_names_tied_with_embedding(nested()) == []


def test_transpose_and_storage_id():
    p = nn.Parameter(torch.ones(4, 3))
    assert other.transpose(p, False) is p
    assert isinstance(other.transpose(p, True), nn.Parameter) and other.transpose(p, True).shape == (3, 4)
    x = torch.ones(4, 3)
    device, _, size = other.id_tensor_storage(x)
    assert device.type == "cpu" and size == 48
    assert other.id_tensor_storage(x[1:]) == other.id_tensor_storage(x)
    assert other.id_tensor_storage(x.clone()) != other.id_tensor_storage(x)
    sparse = x.to_sparse()
    assert other.id_tensor_storage(sparse) == (torch.device("cpu"), id(sparse), 48)
    assert other.id_tensor_storage(x.to("meta")) == (torch.device("meta"), 0, 48)


def test_str_to_bool():
    assert [other.str_to_bool(v) for v in ("y", "Yes", "t", "TRUE", "on", "1")] == [1] * 6
    assert [other.str_to_bool(v) for v in ("n", "No", "f", "FALSE", "off", "0")] == [0] * 6
    with pytest.raises(ValueError, match="invalid truth value maybe"):
        other.str_to_bool("maybe")


def test_infer_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert other.infer_device() in ("cpu", "xpu")
    for owner, device in ((torch.xpu, "xpu"), (torch.backends.mps, "mps"), (torch.cuda, "cuda")):
        monkeypatch.setattr(owner, "is_available", lambda: True)
        assert other.infer_device() == device


def test_file_lookup_that_cannot_be_answered(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert other.check_file_exists_on_hf_hub("some/repo", "config.json") is None
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert other.check_file_exists_on_hf_hub("not/a/repo/id", "config.json") is None


def test_batch_size_and_shifted_tokens():
    assert other._get_batch_size(torch.ones(3, 2), torch.ones(4, 2)) == 3
    assert other._get_batch_size(None, torch.ones(4, 2)) == 4
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        other._get_batch_size(None, None)
    ids = torch.tensor([[1, -100, 3], [4, 5, 6]])
    assert other.shift_tokens_right(ids, 9, 7).tolist() == [[7, 1, 9], [7, 4, 5]]
    assert ids.tolist() == [[1, -100, 3], [4, 5, 6]]
    with pytest.raises(ValueError, match="pad_token_id"):
        other.shift_tokens_right(ids, None, 7)


def test_attention_mask_is_that_of_generate():
    model = llama(pad_token_id=0)
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[0, :2] = 0
    arguments = {
        "model_input": torch.randint(0, 20, (2, 5)), "past_key_values": None, "cache_position": torch.arange(5),
        "batch_size": 2, "sequence_length": 5, "position_ids": None,
    }  # fmt: skip
    full = other.create_attention_mask(model, attention_mask=mask, **arguments)
    assert full.shape == (2, 1, 5, 5)
    want = torch.tril(torch.ones(5, 5, dtype=torch.bool))
    assert torch.equal(full[1, 0], want)
    want[:, :2] = False
    assert torch.equal(full[0, 0], want)
    assert other.create_attention_mask(model, attention_mask=None, **arguments) is None


@pytest.mark.parametrize("getter", ["get_max_cache_shape", "get_max_length"])
def test_attention_mask_of_models_that_make_their_own(getter):
    """By the names of their time: a function for static caches, other arguments of the present one."""
    cache = SimpleNamespace(**{getter: lambda: 9})
    given = {"batch_size": 2, "sequence_length": 5, "position_ids": None, "cache_position": torch.arange(5)}
    given |= {"model_input": torch.zeros(2, 5), "past_key_values": cache, "attention_mask": None}
    base = nn.Linear(2, 2)
    base.config, base.dtype, seen = "config", torch.float16, []
    base._prepare_4d_causal_attention_mask_with_cache_position = lambda mask, **more: seen.append(more) or "legacy"
    wrapper = SimpleNamespace(get_base_model=lambda: base)
    assert other.create_attention_mask(wrapper, **given) == "legacy"
    assert (seen[0]["target_length"], seen[0]["dtype"], seen[0]["batch_size"]) == (9, torch.float16, 2)
    del base._prepare_4d_causal_attention_mask_with_cache_position
    base.create_masks_for_generate = lambda config, input_embeds, attention_mask, cache_position, **more: (
        input_embeds.shape, input_embeds.dtype, cache_position.tolist()
    )  # fmt: skip
    assert other.create_attention_mask(wrapper, **given) == ((2, 5, 0), torch.float16, [0, 1, 2, 3, 4])


# ---- old cache layouts


def test_old_cache_layouts():
    x = torch.arange(4 * 2 * 3 * 5 * 6, dtype=torch.float32).reshape(4, 2, 3, 5, 6)
    layers = bloom_model_postprocess_past_key_value(x.split(2))
    assert len(layers) == 2 and layers[0][0].shape == (6, 6, 5) and layers[0][1].shape == (6, 5, 6)
    assert torch.equal(layers[1][1], x[3].reshape(6, 5, 6))
    assert torch.equal(layers[0][0], x[0].transpose(1, 2).reshape(6, 6, 5))  # the published order of keys
    (first,) = starcoder_model_postprocess_past_key_value((x,))
    assert first.shape == (2, 5, 24)
    assert first[1, 2].tolist() == torch.cat([x[i, 1, 0, 2] for i in range(4)]).tolist()


# ---- preparation for training


def dtypes(model):
    return {p.dtype for p in model.parameters()}


@pytest.mark.parametrize("method", ["gptq", "aqlm", "eetq", "hqq", "torchao"])
def test_packed_models_keep_their_dtype(method):
    model = llama().to(torch.bfloat16)
    model.quantization_method = method
    assert other.prepare_model_for_kbit_training(model) is model
    assert dtypes(model) == {torch.bfloat16} and not any(p.requires_grad for p in model.parameters())
    assert model.is_activation_checkpointing if hasattr(model, "is_activation_checkpointing") else True
    assert model(torch.tensor([[1, 2]])).logits.requires_grad  # through the input embeddings


def test_bnb_model_is_cast_and_checkpointed():
    model = llama().to(torch.bfloat16)
    model.is_loaded_in_8bit = True
    other.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    assert dtypes(model) == {torch.float32} and not model.model.layers[0].gradient_checkpointing
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.model.layers[0].gradient_checkpointing


def test_model_without_quantisation_is_only_frozen_and_cast():
    model = llama().to(torch.float16)
    other.prepare_model_for_kbit_training(model)
    assert dtypes(model) == {torch.float32} and not any(p.requires_grad for p in model.parameters())
    assert not model.model.layers[0].gradient_checkpointing


class OldStyle(nn.Module):
    """A model with neither input-grad switch nor arguments for checkpointing."""

    is_loaded_in_4bit = True

    def __init__(self):
        super().__init__()
        self.emb, self.lin, self.enabled = nn.Embedding(3, 2), nn.Linear(2, 2).half(), False

    def get_input_embeddings(self):
        return self.emb

    def gradient_checkpointing_enable(self):
        self.enabled = True

    def forward(self, x):
        return self.emb(x)


def test_a_model_of_its_own_gets_a_dict_of_checkpointing_arguments():
    class Own(OldStyle):
        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs):
            self.enabled = gradient_checkpointing_kwargs

    for given, passed in ((None, {}), ({"use_reentrant": False}, {"use_reentrant": False})):
        model = other.prepare_model_for_kbit_training(Own(), gradient_checkpointing_kwargs=given)
        assert model.enabled == passed


def test_old_style_model():
    model = OldStyle()
    with pytest.warns(FutureWarning, match="gradient_checkpointing_kwargs is not supported"):
        other.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": True})
    assert model.enabled and model(torch.tensor([0])).requires_grad
    model = OldStyle()
    with pytest.warns(FutureWarning):
        other.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    assert not model(torch.tensor([0])).requires_grad


class Params4bit(nn.Parameter):
    pass


def test_4bit_parameters_are_not_cast():
    model = nn.Linear(2, 2)
    model.weight = Params4bit(torch.ones(2, 2, dtype=torch.bfloat16))
    model.bias.data = model.bias.data.half()
    other.prepare_model_for_kbit_training(model)
    assert model.weight.dtype == torch.bfloat16 and model.bias.dtype == torch.float32


def test_mixed_precision_cast():
    model = nn.Linear(2, 2).half()
    model.bias.requires_grad_(False)
    model.packed = nn.Parameter(torch.ones(2, dtype=torch.uint8), requires_grad=False)
    other.cast_mixed_precision_params(model, torch.bfloat16)
    assert model.weight.dtype == torch.float32 and model.bias.dtype == torch.bfloat16
    assert model.packed.dtype == torch.uint8  # integers are packed weights


# ---- FSDP


def wraps(policy, module):
    return policy(module=module, recurse=False, nonwrapped_numel=10)


def test_fsdp_policy(monkeypatch):
    from peft.tuners.prompt_tuning import PromptEmbedding

    monkeypatch.delenv("FSDP_TRANSFORMER_CLS_TO_WRAP", raising=False)
    model = llama()
    for p in model.parameters():
        p.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    policy = other.fsdp_auto_wrap_policy(model)
    assert wraps(policy, model.model.layers[0]) and wraps(policy, model.lm_head)
    assert not wraps(policy, model.model.layers[0].mlp) and not wraps(policy, model.model.embed_tokens)
    encoder = PromptEmbedding.__new__(PromptEmbedding)
    nn.Module.__init__(encoder)
    assert wraps(policy, encoder)
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaMLP")
    policy = other.fsdp_auto_wrap_policy(model)
    assert wraps(policy, model.model.layers[0].mlp) and not wraps(policy, model.model.layers[0])
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaMLP,NoSuchBlock")
    with pytest.raises(TypeError, match="NoSuchBlock"):
        other.fsdp_auto_wrap_policy(model)


# ---- quantisation


def test_quantization_config():
    model = llama()
    model.quantization_method = "gptq"
    model.config.quantization_config = {"bits": 4}
    assert other.get_quantization_config(model, "gptq") == {"bits": 4}
    assert other.get_quantization_config(model, "awq") is None
    assert other.get_quantization_config(nested(), "gptq") is None


def test_gptq_helpers_without_the_package():
    assert not other.is_gptqmodel_quant_linear(None) and not other.is_gptqmodel_awq_layer(nn.Linear(2, 2))
    assert other.get_gptqmodel_quant_linear(None) is None
    assert other.get_gptqmodel_quant_linear({"bits": 4}) is None


def test_layer_class_of_gptq(monkeypatch):
    """Only what the installed version asks for is passed; options may stand in a dict or on an object."""

    def hf_select_quant_linear(bits, group_size, device_map, backend):
        return bits, group_size, device_map, backend

    for name in ("gptqmodel", "gptqmodel.utils", "gptqmodel.utils.importer"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["gptqmodel.utils.importer"].hf_select_quant_linear = hf_select_quant_linear
    monkeypatch.setattr("peft.import_utils.is_gptqmodel_available", lambda: True)
    assert other.get_gptqmodel_quant_linear({"bits": 8}, {"": 0}) == (8, 128, {"": 0}, "auto")
    assert other.get_gptqmodel_quant_linear(SimpleNamespace(group_size=32)) == (4, 32, None, "auto")


def test_freezing_one_adapter():
    model = get_peft_model(nested(), LoraConfig(target_modules=["0.0"]))
    model.add_adapter("default_2", LoraConfig(target_modules=["0.0"]))
    model.requires_grad_(True)
    other._freeze_adapter(model, "default")
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if ".default." in n} and len(frozen) == 2


def test_fsdp_policy_leaves_what_layers_read_in_their_block(monkeypatch):
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaDecoderLayer")
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    dora = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], use_dora=True))
    for tuned, wrapped in ((model, True), (dora, False)):
        policy = other.fsdp_auto_wrap_policy(tuned)
        layer = tuned.get_base_model().model.layers[0].self_attn.q_proj
        assert [wraps(policy, m["default"]) for m in (layer.lora_A, layer.lora_B)] == [wrapped] * 2
