"""Tied embeddings: detection, ensure_weight_tying, and merging that keeps every module right."""

import types
import warnings

import pytest
import torch

from peft import LoraConfig, VeraConfig, get_peft_model, get_peft_model_state_dict
from peft.core import tied
from peft.core.wrappers import TrainableTokensWrapper

transformers = pytest.importorskip("transformers")
IDS = torch.arange(6)[None]


def llama(tie: bool = True):
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=tie,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def t5():
    config = transformers.T5Config(vocab_size=20, d_model=8, d_ff=8, num_layers=1, num_heads=2, d_kv=4)
    return transformers.T5ForConditionalGeneration(config).eval()


def quiet(model, config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, config)


def shake(model) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)


def test_names_of_tied_modules():
    assert tied._get_module_names_tied_with_embedding(llama()) == ["lm_head"]
    assert tied._get_module_names_tied_with_embedding(llama(False)) == []
    assert tied._get_module_names_tied_with_embedding(t5()) == [
        "decoder.embed_tokens",
        "encoder.embed_tokens",
        "lm_head",
    ]
    assert tied._get_module_names_tied_with_embedding(torch.nn.Linear(2, 2)) == []
    assert tied.embedding_name(llama()) == "model.embed_tokens" and tied.embedding_name(t5()) == "shared"


def test_names_of_tied_modules_in_the_old_form():
    model = llama()
    model._tied_weights_keys = ["lm_head.weight"]
    assert tied._get_module_names_tied_with_embedding(model) == ["lm_head"]


def test_tied_weights_without_known_embedding():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model._tied_weights_keys = {"0.weight": "1.weight"}
    with pytest.raises(ValueError, match="get_input_embeddings"):
        tied._get_module_names_tied_with_embedding(model)


@pytest.mark.parametrize("option", ["target_modules", "modules_to_save"])
def test_adapting_a_tied_layer_warns(option):
    kwargs = {"target_modules": ["q_proj"]} | {option: ["embed_tokens"]}
    with pytest.warns(UserWarning, match="ties lm_head"):
        get_peft_model(llama(), LoraConfig(**kwargs))


def test_ensure_weight_tying_without_effect_warns():
    with pytest.warns(UserWarning, match="no tied modules were found"):
        get_peft_model(llama(False), LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True))
    with pytest.warns(UserWarning, match="no tied modules are part"):
        get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], ensure_weight_tying=True))


@pytest.mark.parametrize("saved", [["embed_tokens", "lm_head"], ["lm_head"], ["embed_tokens"]])
def test_modules_to_save_tied(saved):
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=saved, ensure_weight_tying=True)
    model = quiet(llama(), config)
    assert config.modules_to_tie == {"lm_head"} and "model.embed_tokens" in config.modules_to_save
    base = model.base_model.model
    head = base.lm_head.modules_to_save["default"]
    assert head.weight is base.model.embed_tokens.modules_to_save["default"].weight
    assert (head.in_features, head.out_features) == (8, 20)
    shake(model)
    keys = get_peft_model_state_dict(model)
    assert {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"} <= set(keys)
    out = model(input_ids=IDS).logits
    merged = model.merge_and_unload()
    assert merged.config.tie_word_embeddings and merged.lm_head.weight is merged.model.embed_tokens.weight
    torch.testing.assert_close(merged(input_ids=IDS).logits, out)


def test_targets_to_tie_rewrite_the_configuration():
    model = llama()
    config = LoraConfig(target_modules=["q_proj", "lm_head"])
    tied.add_targets_to_tie(config, ["lm_head"], model)
    assert config.target_modules == {"q_proj", "model.embed_tokens"} and config.target_modules_to_tie == {"lm_head"}
    config = LoraConfig(target_modules=".*(lm_head|q_proj)")
    tied.add_targets_to_tie(config, ["lm_head"], model)
    assert config.target_modules == r"(?:.*(lm_head|q_proj)|^model\.embed_tokens$)"


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_merging_into_tied_weights_is_exact_for_every_module(targets):
    model = quiet(llama(), LoraConfig(target_modules=targets))
    shake(model)
    out = model(input_ids=IDS).logits
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=IDS).logits, out)
    assert merged.config.tie_word_embeddings is False


def test_unloading_ties_again():
    model = quiet(llama(), LoraConfig(target_modules=["lm_head"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
        model.unmerge_adapter()
    base = model.unload()
    assert base.lm_head.weight is base.model.embed_tokens.weight and base.config.tie_word_embeddings


def test_token_indices_follow_the_tie():
    base = llama()
    base.extra = torch.nn.ModuleDict({"lm_head": torch.nn.Linear(8, 20)})  # of that name, but not tied
    model = quiet(base, LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2]))
    base = model.base_model.model
    assert isinstance(base.lm_head, TrainableTokensWrapper) and type(base.extra["lm_head"]) is torch.nn.Linear
    names = [n for n, p in model.named_parameters() if p.requires_grad and "tokens" in n]
    assert names == ["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta.default"]
    assert not any("lm_head" in k for k in get_peft_model_state_dict(model))
    shake(model)
    out = model(input_ids=IDS).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=IDS).logits, out)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight and merged.config.tie_word_embeddings


def test_token_indices_that_differ():
    indices = {"embed_tokens": [1, 2], "lm_head": [3]}
    model = quiet(llama(), LoraConfig(target_modules=["q_proj"], trainable_token_indices=indices))
    tokens = {k for k in get_peft_model_state_dict(model) if "tokens_delta" in k}
    assert len(tokens) == 2
    shake(model)
    out = model(input_ids=IDS).logits
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=IDS).logits, out)
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=indices, ensure_weight_tying=True)
    with pytest.raises(ValueError, match="Cannot tie"):
        quiet(llama(), config)


def test_ensure_tying_of_tokens_in_an_untied_model_warns():
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1], ensure_weight_tying=True)
    with pytest.warns(UserWarning, match="ties no modules"):
        get_peft_model(llama(False), config)


@pytest.mark.parametrize("apart", [False, True], ids=["merged", "unloaded"])
def test_tied_weights_that_accelerate_keeps_elsewhere(apart):
    """They share memory in its map: merging one must leave the other alone, and the configuration must say so."""
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    base = llama()
    plain = base(input_ids=IDS).logits
    accelerate.cpu_offload(base, execution_device="cpu")
    model = quiet(base, LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    out = model(input_ids=IDS).logits
    assert base.lm_head.base_layer.weight.is_meta and (out - plain).abs().max() > 0.1
    if apart:
        torch.testing.assert_close(model.unload()(input_ids=IDS).logits, plain)
        assert base.config.tie_word_embeddings
        return
    with pytest.warns(UserWarning, match="`tie_word_embeddings` was set to False"):
        merged = model.merge_and_unload()
    assert merged.lm_head.weight.is_meta and merged.config.tie_word_embeddings is False
    torch.testing.assert_close(merged(input_ids=IDS).logits, out)


def test_what_is_out_of_reach_stays_as_it_is():
    """Configurations that are dicts, models without embeddings, weights without values."""
    model = torch.nn.Linear(2, 2)
    model.get_input_embeddings = types.MethodType(transformers.PreTrainedModel.get_input_embeddings, model)
    model.base_model_prefix = ""
    assert tied.embedding_name(model) == "embed_tokens" and tied.embedding_name(model, None) is None
    with torch.device("meta"):
        model = llama()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    tied.after_unload(model)
    assert model.config.tie_word_embeddings
    model = llama()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1)
    object.__setattr__(model, "config", {"tie_word_embeddings": True})
    with pytest.warns(UserWarning, match="embeddings of the merged model differ"):
        tied.after_unload(model)
    assert model.config == {"tie_word_embeddings": False}


def test_methods_that_cannot_tie_adapters_say_so():
    tuner = quiet(llama(), VeraConfig(target_modules=["q_proj"])).base_model
    with pytest.warns(UserWarning, match="VeraModel cannot tie the adapters of the targets and of lm_head"):
        tuner._add_targets_to_tie(tuner.peft_config["default"], ["lm_head"])
