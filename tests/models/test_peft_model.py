# SPDX-License-Identifier: Apache-2.0
"""PeftModel: life cycle of adapters, calls, loading and saving."""

import copy
import json
import pickle
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from peft import IA3Config, LoraConfig, PeftConfig, PeftMixedModel, PeftModel, VeraConfig, get_peft_model

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lin0, self.lin1, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.lin1(torch.relu(self.lin0(x))))


def lora(*targets, **kwargs):
    return LoraConfig(target_modules=list(targets or ("lin0", "lin1")), r=2, init_lora_weights=False, **kwargs)


def peft_model(*names, **kwargs):
    names = names or ("default",)
    model = get_peft_model(Net(), lora(**kwargs), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, lora(**kwargs))
    return model.eval()


def trained(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


def of(model, name):
    return {n for n, _ in model.named_parameters() if f".{name}." in n}


# ---- state
def test_attributes():
    model = peft_model(modules_to_save=["head"])
    assert model.active_adapter == "default" and model.active_adapters == ["default"]
    assert model.peft_type == "LORA" and model.modules_to_save == {"head"}
    assert model.get_base_model() is model.base_model.model and isinstance(model.get_base_model(), Net)
    assert model.prefix == "lora_" and model.targeted_module_names == ["lin0", "lin1"]
    assert model.active_peft_config is model.peft_config["default"]
    assert model.has_active_enabled_adapter and model.base_model_torch_dtype is None
    with pytest.raises(AttributeError, match="Net"):
        _ = model.nothing_like_that
    model.peft_config = {"x": model.active_peft_config}
    assert list(model.base_model.peft_config) == ["x"]


def test_add_and_set_adapter():
    model = peft_model("a", "b")
    assert trained(model) == of(model, "a") and model.active_adapter == "a"
    first = model(X)
    model.set_adapter("b")
    assert trained(model) == of(model, "b")
    assert not torch.allclose(model(X), first)
    model.set_adapter("a", inference_mode=True)
    assert not trained(model) and torch.equal(model(X), first)
    with pytest.raises(ValueError, match=r"Adapter ab not found.*Did you mean 'a'|Adapter ab not found"):
        model.set_adapter("ab")
    with pytest.raises(TypeError):
        model.set_adapter(["a", "b"])
    assert model.active_adapter == "a"
    model.base_model.set_adapter(["a", "b"])
    assert model.active_adapters == ["a", "b"] and model.active_adapter == "a"
    assert trained(model) == of(model, "a") | of(model, "b")


def test_add_adapter_refuses():
    model = peft_model("a")
    names = [n for n, _ in model.named_modules()]
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter("a", lora())
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("b", IA3Config(target_modules=["lin0"], feedforward_modules=[]))
    config = lora("nothing")
    values = copy.deepcopy(vars(config))
    with pytest.raises(ValueError):
        model.add_adapter("b", config)
    assert vars(config) == values
    with pytest.raises(KeyError):
        model.add_adapter("b.c", lora())
    assert list(model.peft_config) == ["a"] and [n for n, _ in model.named_modules()] == names
    with pytest.warns(UserWarning, match="contained in the prefix"):
        model.add_adapter("lora", lora())


def test_delete_adapter_on_disjoint_layers():
    model = get_peft_model(Net(), lora("lin0"), adapter_name="a").eval()
    model.add_adapter("b", lora("lin1"))
    with pytest.warns(UserWarning, match="Setting active adapter to b"):
        model.delete_adapter("a")
    assert model.active_adapter == "b" and model.active_adapters == ["b"]
    assert not of(model, "a")
    with pytest.raises(ValueError, match="a not found"):
        model.delete_adapter("a")


def test_delete_the_last_adapter_and_add_again(tmp_path):
    model = peft_model("a", modules_to_save=["head"])
    base = Net()(X)
    model.delete_adapter("a")
    assert model.active_adapters == [] and not model.peft_config
    assert torch.equal(model(X), base) and isinstance(model.get_base_model(), Net)
    with model.disable_adapter():
        assert torch.equal(model(X), base)
    model.save_pretrained(tmp_path)
    with pytest.raises(KeyError, match="no active adapter"):
        _ = model.active_peft_config
    model.add_adapter("b", lora(modules_to_save=["head"]))
    assert model.active_adapter == "b" and of(model, "b") <= trained(model)
    assert not torch.equal(model(X), base)


def test_deleting_a_merged_adapter_is_refused():
    model = peft_model("a", "b")
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("a")
    model.unmerge_adapter()
    model.delete_adapter("a")


def test_disable_adapter_restores_what_was():
    model = peft_model("a", "b", modules_to_save=["head"])
    base, on = Net()(X), model(X)
    before = trained(model)
    with model.disable_adapter():
        assert torch.equal(model(X), base) and not trained(model)
        with model.disable_adapter():
            assert torch.equal(model(X), base)
        assert torch.equal(model(X), base)
    assert torch.equal(model(X), on) and trained(model) == before
    with pytest.raises(ZeroDivisionError), model.disable_adapter():
        raise ZeroDivisionError
    assert torch.equal(model(X), on) and not model._adapters_disabled
    model.disable_adapter_layers()
    with model.disable_adapter():
        pass
    assert torch.equal(model(X), base)
    model.enable_adapter_layers()
    assert torch.equal(model(X), on)


def test_disable_adapter_keeps_frozen_adapters_frozen():
    model = get_peft_model(Net(), lora(inference_mode=True))
    with model.disable_adapter():
        pass
    assert not trained(model)
    model = peft_model("a")
    model.set_requires_grad("a", False)
    with model.disable_adapter():
        pass
    model.disable_adapter_layers()
    model.enable_adapter_layers()
    assert not trained(model)


def test_active_adapter_of_the_tuner_is_what_was_set_last():
    """A list, until a name is set by itself."""
    model = get_peft_model(Net(), lora())
    seen = [model.base_model.active_adapter]
    model.add_adapter("b", lora())
    for change in (
        lambda: model.set_adapter("b"),
        lambda: model.add_adapter("c", lora()),
        lambda: model.base_model.set_adapter(["b", "c"]),
        lambda: model.delete_adapter("c"),
    ):
        change()
        seen.append(model.base_model.active_adapter)
    assert seen == [["default"], "b", ["b"], ["b", "c"], ["b"]] and model.active_adapter == "b"


def test_disable_adapter_warns_about_mixed_states_and_biases():
    model = peft_model()
    model.base_model.model.lin0.enable_adapters(False)
    with pytest.warns(UserWarning, match="enabled and others that are disabled"), model.disable_adapter():
        pass
    assert not model.base_model.model.lin0.disable_adapters
    model = get_peft_model(Net(), lora(bias="all"))
    with pytest.warns(UserWarning, match="bias"), model.disable_adapter():
        pass


def test_set_requires_grad():
    model = peft_model("a", "b", modules_to_save=["head"])
    model.set_requires_grad(["b", "unknown"])
    assert trained(model) == of(model, "a") | of(model, "b")
    model.set_requires_grad("a", False)
    assert trained(model) == of(model, "b")
    model.set_adapter("a")
    assert trained(model) == of(model, "a")


def test_merge_and_unload():
    model = peft_model("a", "b", modules_to_save=["head"])
    out = model(X)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "base_layer" in n)
    base = model.merge_and_unload()
    assert type(base) is Net and type(base.lin0) is nn.Linear and type(base.head) is nn.Linear
    assert torch.allclose(base(X), out, atol=1e-6) and not hasattr(base, "peft_config")
    model = peft_model("a")
    plain = model.unload()
    assert torch.equal(plain(X), Net()(X))
    assert model.supports_lora_conversion() is False  # nothing is left to convert


def test_copies_and_pickles():
    model = peft_model("a", "b", modules_to_save=["head"])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(X), model(X)) and other.active_adapter == "a"
        other.set_adapter("b")
        assert model.active_adapters == ["a"] and not torch.equal(other(X), model(X))


# ---- calls
def test_mixed_batch():
    model = peft_model("a", "b")
    want = {"__base__": Net()(X)}
    for name in ("a", "b"):
        model.set_adapter(name)
        want[name] = model(X)
    names = ["b", "__base__", "a", "b"]
    with torch.no_grad():
        got = model(X, adapter_names=names)
        assert model.base_model.switch.call.adapter_names is None
    for i, name in enumerate(names):
        assert torch.allclose(got[i], want[name][i], atol=1e-6)
    assert torch.equal(model(X), want["b"])


def test_mixed_batch_refuses_and_leaves_nothing_behind():
    model = peft_model("a", "b")
    want = model(X)
    cases = [
        (["a", "c", "a", "a"], ValueError, "non-existing"),
        (["a"], ValueError, "Length"),
        ("aaaa", TypeError, "list"),
        (["a", "a", "__base", "a"], ValueError, "__base__"),
    ]
    for names, error, text in cases:
        with pytest.raises(error, match=text):
            model(X, adapter_names=names)
        assert torch.equal(model(X), want)
    with pytest.raises(ValueError, match="training mode"):
        model.train()(X, adapter_names=["a"] * 4)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model(X, adapter_names=["a"] * 4)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(X, adapter_names=["a"] * 4), Net()(X))


def test_call_data_is_kept_for_backward_only():
    model = peft_model("a", "b")
    call = model.base_model.switch.call
    model(X, adapter_names=["a"] * 4)
    assert call.adapter_names == ("a",) * 4  # recomputation in backward may need it
    model(X)
    assert call.adapter_names is None


def test_beam_search_with_adapter_names():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        num_hidden_layers=1,
        intermediate_size=16,
        num_attention_heads=2,
        vocab_size=30,
        eos_token_id=None,
    )
    base = transformers.LlamaForCausalLM(config).eval()
    model = get_peft_model(base, lora("q_proj", "v_proj"), adapter_name="a").eval()
    model.add_adapter("b", lora("q_proj", "v_proj"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.mul_(8)
    ids = torch.randint(0, 30, (2, 4), generator=torch.Generator().manual_seed(2))
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3, "pad_token_id": 0}
    got = model.generate(input_ids=ids, adapter_names=["b", "__base__"], **options)
    model.set_adapter("b")
    assert torch.equal(got[0], model.generate(input_ids=ids, **options)[0])
    with model.disable_adapter():
        assert torch.equal(got[1], model.generate(input_ids=ids, **options)[1])


def test_beam_search_of_encoder_decoders():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        vocab_size=30,
        decoder_start_token_id=0,
        eos_token_id=None,
    )
    base = transformers.T5ForConditionalGeneration(config).eval()
    model = get_peft_model(base, lora("q", "v", task_type="SEQ_2_SEQ_LM"), adapter_name="a").eval()
    model.add_adapter("b", lora("q", "v", task_type="SEQ_2_SEQ_LM"))
    ids = torch.randint(1, 30, (2, 4), generator=torch.Generator().manual_seed(2))
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2}
    got = model.generate(input_ids=ids, adapter_names=["b", "__base__"], **options)
    encoder = base.get_encoder()
    assert not encoder._forward_pre_hooks and not encoder._forward_hooks
    model.set_adapter("b")
    assert torch.equal(got[0], model.generate(input_ids=ids, **options)[0])
    with model.disable_adapter():
        assert torch.equal(got[1], model.generate(input_ids=ids, **options)[1])


def test_gradient_checkpointing_is_prepared():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=2, intermediate_size=16, num_attention_heads=2, vocab_size=30
    )
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        base = transformers.LlamaForCausalLM(config)
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": True})
        torch.manual_seed(1)
        model = get_peft_model(base, lora("q_proj", task_type="CAUSAL_LM")).train()
        ids = torch.arange(6)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], atol=1e-7), name


# ---- files
def test_save_and_load(tmp_path):
    model = peft_model("default", "b", modules_to_save=["head"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "head" in name:
                parameter.add_(0.3)
    model.get_base_model().name_or_path = "some/base"
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "b",
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["inference_mode"] is True and config["base_model_name_or_path"] == "some/base"
    assert config["auto_mapping"] == {"base_model_class": "Net", "parent_library": Net.__module__}
    assert model.peft_config["default"].inference_mode is False and model.peft_config["default"].auto_mapping is None
    loaded = PeftModel.from_pretrained(Net(), tmp_path)
    assert torch.equal(loaded(X), model(X)) and not loaded.training and not trained(loaded)
    result = loaded.load_adapter(tmp_path / "b", "b")
    assert result.missing_keys == [] and result.unexpected_keys == [] and loaded.active_adapter == "default"
    for m in (model, loaded):
        m.set_adapter("b")
    assert torch.equal(loaded(X), model(X))
    again = PeftModel.from_pretrained(Net(), tmp_path, subfolder="b", adapter_name="x", is_trainable=True)
    assert trained(again) == of(again, "x") and again.training
    model.save_pretrained(tmp_path / "sel", selected_adapters=["b"], safe_serialization=False)
    assert {p.name for p in (tmp_path / "sel").iterdir()} == {"README.md", "b"}
    assert torch.equal(PeftModel.from_pretrained(Net(), tmp_path / "sel" / "b")(X), model(X))


def test_saving_refuses(tmp_path):
    model = peft_model("a")
    with pytest.raises(ValueError, match="selected_adapters"):
        model.save_pretrained(tmp_path / "x", selected_adapters=["b"])
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="should be a directory"):
        model.save_pretrained(tmp_path / "file")
    other = get_peft_model(Net(), IA3Config(target_modules=["lin0"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="not supported for IA3"):
        other.save_pretrained(tmp_path / "x", path_initial_model_for_weight_conversion=tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"file"}


def test_loading_over_an_existing_adapter_keeps_parameters(tmp_path):
    model = peft_model("a")
    model.save_pretrained(tmp_path)
    want = model(X)
    held = dict(model.named_parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    model.train().load_adapter(tmp_path / "a", "a", is_trainable=True)
    assert model.training and torch.equal(model(X), want)
    assert all(p is held[n] for n, p in model.named_parameters())
    model.load_adapter(tmp_path / "a", "a")
    assert not model.training


def test_missing_keys_are_those_of_the_adapter(tmp_path):
    model = peft_model("b")  # a short name that is part of other names
    model.save_pretrained(tmp_path)
    file = tmp_path / "b" / "adapter_model.safetensors"
    state = load_file(file)
    lost = "base_model.model.lin0.lora_A.weight"
    state["base_model.model.lin0.lora_Q.weight"] = state.pop(lost)
    save_file(state, file)
    said = r"missing adapter keys.*lora_A\.b\.weight.*ignored.*lora_Q.*nearest valid key.*lora_A\.weight"
    with pytest.warns(UserWarning, match=said) as warned:
        result = model.load_adapter(tmp_path / "b", "b")
    assert result.missing_keys == ["base_model.model.lin0.lora_A.b.weight"]
    assert result.unexpected_keys == ["base_model.model.lin0.lora_Q.weight"]
    assert len(warned) == 1
    with pytest.warns(UserWarning, match=said):
        PeftModel.from_pretrained(Net(), tmp_path / "b", adapter_name="b")


@pytest.mark.filterwarnings("ignore")
def test_failing_loads_leave_the_model_alone(tmp_path):
    saved = peft_model("default", modules_to_save=["head"])
    saved.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    good = file.read_bytes()
    state = load_file(file)
    bad_shape = {**state, "base_model.model.lin0.lora_A.weight": torch.zeros(3, 8)}

    def corrupt():
        file.write_bytes(good[: len(good) // 2])

    for damage, error in (
        (lambda: save_file(bad_shape, file), RuntimeError),
        (corrupt, ValueError),
        (file.unlink, ValueError),
    ):
        file.write_bytes(good)
        damage()
        base = Net()
        names = [(n, type(m)) for n, m in base.named_modules()]
        with pytest.raises(error):
            PeftModel.from_pretrained(base, tmp_path)
        assert [(n, type(m)) for n, m in base.named_modules()] == names
        assert all(p.requires_grad for p in base.parameters()) and not hasattr(base, "peft_config")
        assert torch.equal(base(X), Net()(X))
        model = peft_model("a")
        want = model(X)
        with pytest.raises(error):
            model.load_adapter(tmp_path, "new")
        assert list(model.peft_config) == ["a"] and not of(model, "new") and torch.equal(model(X), want)
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes"):
        save_file(bad_shape, file)
        PeftModel.from_pretrained(Net(), tmp_path, ignore_mismatched_sizes=True)


def test_from_pretrained_arguments(tmp_path):
    model = peft_model()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be a PeftConfig"):
        PeftModel.from_pretrained(Net(), tmp_path, config={"r": 2})
    with pytest.raises(ValueError, match="adapter_config.json"):
        PeftModel.from_pretrained(Net(), tmp_path / "nothing")
    config = PeftConfig.from_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Net(), tmp_path, config=config, low_cpu_mem_usage=True)
    assert loaded.active_peft_config is config and torch.equal(loaded(X), model(X))
    vera = get_peft_model(Net(), VeraConfig(target_modules=["lin0"], r=2))
    vera.save_pretrained(tmp_path / "vera")
    with pytest.warns(UserWarning, match="Ephemeral"):
        PeftModel.from_pretrained(Net(), tmp_path / "vera", ephemeral_gpu_offload=True)
    with pytest.raises(ValueError, match="offload_folder"):
        loaded.load_adapter(tmp_path, "other", offload_dir="a", offload_folder="b")
    with pytest.raises(ValueError, match="different peft types"):
        loaded.load_adapter(tmp_path / "vera", "other")


@pytest.mark.parametrize("cls", [PeftModel, PeftMixedModel])
def test_an_object_that_is_not_made_yet_has_no_attributes(cls):
    """As while unpickling: looking for the base model must not go round in circles."""
    with pytest.raises(AttributeError, match="base_model"):
        cls.__new__(cls).anything  # noqa: B018


def test_published_names_of_parts():
    model = peft_model()
    hub, other = model._split_kwargs({"token": 1, "use_auth_token": 2, "device_map": 3})
    assert (hub, other) == ({"token": 1, "use_auth_token": 2}, {"device_map": 3})
    assert PeftMixedModel._split_kwargs({"revision": 1, "x": 2}) == ({"revision": 1}, {"x": 2})
    assert model._get_base_model_class() is Net and model._get_peft_specific_model_tags() == ["lora"]
    model.add_adapter("b", lora())
    with torch.no_grad(), model._enable_peft_forward_hooks(X, adapter_names=["__base__"] * len(X)) as (args, kwargs):
        assert torch.equal(model.get_base_model()(*args, **kwargs), Net()(X))
    assert not torch.equal(model(X), Net()(X))


def test_inputs_of_other_checkpointed_models_get_gradients():
    """Models that do not say whether they recompute activations are taken to do so."""

    class Embedded(Net):
        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(5, 8)

        def get_input_embeddings(self):
            return self.emb

        def forward(self, ids):
            return super().forward(self.emb(ids))

    base = Embedded()
    get_peft_model(base, lora())
    assert not base.emb.weight.requires_grad and base.emb(torch.tensor([1])).requires_grad


def test_models_with_empty_places_load(tmp_path):
    base = Net()
    base.register_module("optional", None)
    get_peft_model(base, lora()).save_pretrained(tmp_path)
    again = Net()
    again.register_module("optional", None)
    assert not PeftModel.from_pretrained(again, tmp_path).training


def test_adapter_next_to_changed_base_weights_warns(tmp_path):
    model = get_peft_model(Net(), LoraConfig(target_modules=["lin0"], r=2, init_lora_weights="pissa"))
    peft_model().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="pissa"):
        model.load_adapter(tmp_path, "other")


def test_changed_base_weights_saved_as_plain_lora(tmp_path):
    for extra in ({}, {"use_rslora": True}, {"rank_pattern": {"lin0": 4}, "alpha_pattern": {"lin1": 3}}):
        config = LoraConfig(target_modules=["lin0", "lin1"], r=2, init_lora_weights="pissa", **extra)
        model = get_peft_model(Net(), config)
        model.save_pretrained(tmp_path / "init")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(0.1)
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "init"))
        written = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
        assert written["r"] == 4 and written["init_lora_weights"] is True and config.r == 2
        loaded = PeftModel.from_pretrained(Net(), tmp_path / "plain")
        assert torch.allclose(loaded(X), model.eval()(X), atol=1e-5)
        with loaded.disable_adapter():
            assert torch.equal(loaded(X), Net()(X))
    model.active_peft_config.use_rslora = True
    with pytest.raises(
        ValueError, match="when using `rank_pattern` or `alpha_pattern` at the same time as `use_rslora="
    ):
        model.save_pretrained(tmp_path / "no", path_initial_model_for_weight_conversion=str(tmp_path / "init"))
    model = get_peft_model(Net(), LoraConfig(target_modules=["head"], r=2, init_lora_weights="pissa"))
    with pytest.raises(ValueError, match=r"init lacks '.*head\.lora_A\.weight': it does not belong to this adapter"):
        model.save_pretrained(tmp_path / "no", path_initial_model_for_weight_conversion=str(tmp_path / "init"))
    assert not (tmp_path / "no").exists()


def test_model_card(tmp_path):
    model = peft_model()
    model.get_base_model().name_or_path = "org/base"
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "library_name: peft" in text and "- lora" in text and "base_model:adapter:org/base" in text
    assert text.count("- PEFT 0.21.2") == 1 and "base_model: ''" not in text
    (tmp_path / "README.md").write_text("---\ntags:\n- mine\n---\n# hello\n### Framework versions\n\n- Torch 1\n")
    model.save_pretrained(tmp_path)
    model.create_or_update_model_card(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "- mine" in text and "- lora" in text and "# hello" in text
    assert text.count("- PEFT 0.21.2") == 1 and text.index("- PEFT") < text.index("- Torch 1")


@pytest.mark.parametrize(("task", "tag"), [(None, False), ("FEATURE_EXTRACTION", False), ("CAUSAL_LM", True)])
def test_model_card_names_task_and_quantisation(tmp_path, task, tag):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        quantization_config={"quant_method": "gptq", "bits": 4},
    )  # fmt: skip
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(target_modules=["q_proj"], task_type=task))
    model.create_or_update_model_card(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert ("pipeline_tag: text-generation" in text) is tag
    assert "The following `gptq` quantization config was used during training:\n- quant_method: gptq\n" in text


def test_push_to_hub_uploads_the_saved_folder(monkeypatch):
    import huggingface_hub

    seen = {}

    def upload(self, *, repo_id, folder_path, **kwargs):
        import os

        seen.update(repo=repo_id, files=sorted(os.listdir(folder_path)))
        return "https://example.org/commit"

    class Repo:
        repo_id = "me/adapter"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, *a, **k: Repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    peft_model().push_to_hub("me/adapter")
    assert seen == {"repo": "me/adapter", "files": ["README.md", "adapter_config.json", "adapter_model.safetensors"]}


def test_calls_trace_without_graph_break():
    model = peft_model("a")
    want = model(X)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(X), want, atol=1e-6)


def test_base_model_with_layers_on_disk(tmp_path):
    transformers, accelerate = pytest.importorskip("transformers"), pytest.importorskip("accelerate")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=2, intermediate_size=16, num_attention_heads=2, vocab_size=20
    )
    base = transformers.LlamaForCausalLM(config).eval()
    model = get_peft_model(copy.deepcopy(base), lora("q_proj", "down_proj", task_type="CAUSAL_LM")).eval()
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(6)[None]
    want = model(input_ids=ids).logits
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places["model.layers.1"] = "disk"
    base = accelerate.dispatch_model(
        base, places, main_device="cpu", offload_dir=tmp_path / "weights", force_hooks=True
    )
    assert base.model.layers[1].mlp.down_proj.weight.device.type == "meta"
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", offload_dir=str(tmp_path / "weights"))
    assert {p.device.type for n, p in loaded.named_parameters() if "lora_" in n} == {"cpu"}
    assert torch.allclose(loaded(input_ids=ids).logits, want, atol=1e-6)
    assert torch.allclose(loaded.merge_and_unload()(input_ids=ids).logits, want, atol=1e-5)


def test_a_layer_called_by_itself_forgets_the_last_mixed_batch():
    model = peft_model("a", "b")
    model(X, adapter_names=["a"] * 4)
    model.set_adapter("b")
    assert model.get_base_model()(X[:2]).shape == (2, 2)
    model(X, adapter_names=["a"] * 4)
    with model.disable_adapter():
        assert torch.equal(model.get_base_model()(X[:2]), Net()(X[:2]))
    model.set_adapter("a")
    want = model(X[:2])
    for merge in (model.merge_adapter, lambda: [layer.merge() for layer in model.base_model.layers()]):
        model(X, adapter_names=["b"] * 4)
        merge()
        torch.testing.assert_close(model.get_base_model()(X[:2]), want)
        model.unmerge_adapter()


def test_merging_a_prompt_says_why_not():
    from transformers import LlamaConfig, LlamaForCausalLM

    from peft import PromptTuningConfig

    base = LlamaForCausalLM(
        LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert not hasattr(model, "merge_and_unload")
    for name in ("merge_and_unload", "merge_adapter", "unmerge_adapter"):
        with pytest.raises(AttributeError, match=f"'{name}'.*prompt_tuning adapters are prompts.*get_base_model"):
            getattr(model, name)
