"""Modules trained in full, and token wrappers: state, switching, mixed batches, errors, unloading."""

import copy
import pickle

import pytest
import torch
from torch import nn

from peft import IA3Config, LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.core.wrappers import (
    ModulesToSaveWrapper,
    TrainableTokensWrapper,
    _set_adapter,
    _set_trainable,
    check_additional_trainable_modules,
    find_places,
    set_additional_trainable_modules,
)
from peft.tuners.lora import LoraModel


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(12, 6)
        self.lin0 = nn.Linear(6, 6)
        self.lin1 = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.lin1(torch.tanh(self.lin0(self.emb(x)))))


def lora(**kwargs) -> LoraConfig:
    return LoraConfig(target_modules=["lin0"], **kwargs)


def on(model: nn.Module) -> list[str]:
    return [n for n, p in model.named_parameters() if p.requires_grad]


def shake(model: nn.Module, names: str = "") -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and names in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)


X = torch.arange(12).view(4, 3)


def test_only_the_copy_trains_and_the_output_follows_the_switch():
    base = Net()
    before = base(X)
    model = LoraModel(base, lora(modules_to_save=["head"]), "default")
    torch.testing.assert_close(model(X), before)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n}
    assert trainable == {"model.head.modules_to_save.default.weight", "model.head.modules_to_save.default.bias"}
    shake(model, "head")
    changed = model(X)
    assert (changed - before).abs().max() > 0.01
    model.disable_adapter_layers()
    torch.testing.assert_close(model(X), before, rtol=0, atol=0)
    assert not any(p.requires_grad for p in model.parameters())
    model.enable_adapter_layers()
    torch.testing.assert_close(model(X), changed, rtol=0, atol=0)
    assert {n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n} == trainable


def test_second_adapter_is_inactive_until_set():
    model = LoraModel(Net(), lora(modules_to_save=["head"]), "a")
    model.add("b", lora(modules_to_save=["head", "lin1"]))
    head, lin1 = model.model.head, model.model.lin1
    assert head.active_adapter == "a" and head.adapter_names == ["a", "b"]
    assert lin1.active_adapter == [] and lin1.active_adapters == []
    assert not any(p.requires_grad for p in head.modules_to_save["b"].parameters())
    model.set_adapter("b")
    assert head.active_adapter == lin1.active_adapter == "b"
    assert all(p.requires_grad for p in lin1.modules_to_save["b"].parameters())
    assert not any(p.requires_grad for p in head.modules_to_save["a"].parameters())
    model.delete_adapter("b")
    assert head.active_adapter == "a" and head.adapter_names == ["a"] and lin1.adapter_names == []
    model(X)


def test_inference_mode_freezes_the_copy():
    model = LoraModel(Net(), lora(modules_to_save=["head"], inference_mode=True), "default")
    assert not any(p.requires_grad for p in model.parameters())


def test_two_adapters_of_one_module_are_refused_before_anything_switches():
    model = LoraModel(Net(), lora(modules_to_save=["head"]), "a")
    model.add("b", lora(modules_to_save=["head"]))
    with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
        model.set_adapter(["a", "b"])
    assert model.active_adapters == ["a"]
    with pytest.raises(ValueError, match="Only one adapter"):
        model.model.head.set_adapter(["a", "b"])


def test_layer_level_switching():
    model = LoraModel(Net(), lora(modules_to_save=["head"]), "a")
    model.add("b", lora())
    head = model.model.head
    head.set_adapter([])
    assert head.active_adapters == []
    torch.testing.assert_close(head(torch.ones(1, 6)), head.original_module(torch.ones(1, 6)))
    head.set_adapter("b")  # known to the model, without a copy here
    assert head.active_adapters == []
    with pytest.raises(ValueError, match="not found"):
        head.set_adapter("c")
    head.set_adapter(["a", "b"])
    assert head.active_adapter == "a" and head.modules_to_save["a"].weight.requires_grad
    head.enable_adapters(False)
    assert head.disable_adapters and not head.modules_to_save["a"].weight.requires_grad
    model.set_adapter("a")
    assert head._local is None


def test_attributes_come_from_the_active_copy():
    model = LoraModel(Net(), lora(modules_to_save=["head"]), "a")
    head = model.model.head
    assert head.weight is head.modules_to_save["a"].weight and head.in_features == 6
    model.disable_adapter_layers()
    assert head.weight is head.original_module.weight
    with pytest.raises(AttributeError):
        _ = head.nothing


def test_mixed_batch_rows():
    model = LoraModel(Net(), lora(modules_to_save=["head"]), "a")
    model.add("b", lora(modules_to_save=["head"]))
    head = model.model.head
    for name in ("a", "b"):
        head.modules_to_save[name].weight.data.normal_()
    x = torch.randn(4, 6)
    names = ["b", "__base__", "a", "b"]
    out = head(x, adapter_names=names)
    for i, name in enumerate(names):
        module = head.original_module if name == "__base__" else head.modules_to_save[name]
        torch.testing.assert_close(out[i], module(x[i]))
    model.switch.call.adapter_names = tuple(names)
    torch.testing.assert_close(head(x), out)
    model.switch.call.clear()
    with pytest.raises(ValueError, match="same as the number of inputs"):
        head(x, adapter_names=["a"])
    wrapper = ModulesToSaveWrapper(nn.LayerNorm(6), "a")
    with pytest.raises(TypeError, match="Mixed batching"):
        wrapper(x, adapter_names=names)


def test_names_match_at_dots_only():
    model = nn.ModuleDict(
        {"in1": nn.Linear(2, 2), "lin1": nn.Linear(2, 2), "sub": nn.ModuleDict({"in1": nn.Linear(2, 2)})}
    )
    assert [p.key for p in find_places(model, ["in1"])] == ["in1", "sub.in1"]
    assert [p.key for p in find_places(model, ["sub.in1"])] == ["sub.in1"]


@pytest.mark.parametrize("module", [nn.ModuleList([nn.Linear(2, 2)]), nn.ModuleDict({"x": nn.Linear(2, 2)})])
def test_containers_are_refused(module):
    with pytest.raises(TypeError, match="modules_to_save cannot be applied"):
        ModulesToSaveWrapper(module, "default")


def test_refusals_leave_the_model_alone():
    base = Net()
    base.norm = nn.LayerNorm(6)
    base.part = nn.ModuleDict({"emb2": nn.Embedding(12, 6)})
    keys, flags = list(base.state_dict()), [p.requires_grad for p in base.parameters()]
    for config, error, said in [
        (lora(trainable_token_indices={"nope": [1]}), ValueError, r"could not find modules \['nope'\]"),
        (lora(trainable_token_indices={"emb": [99]}, modules_to_save=["head"]), IndexError, r"\[99\] are out of range"),
        (lora(trainable_token_indices={"lin0": [1]}), TypeError, r"Linear \('lin0'\).* out of target_modules"),
        (lora(trainable_token_indices={"norm": [1]}), TypeError, r"LayerNorm \('norm'\). Name an embedding"),
        (lora(trainable_token_indices={"emb": [1]}, modules_to_save=["emb"]), ValueError, "'emb' in modules_to_save"),
    ]:
        with pytest.raises(error, match=said):
            LoraModel(base, config, "default")
        assert list(base.state_dict()) == keys
        assert [p.requires_grad for p in base.parameters()] == flags


def test_adapter_name_that_is_a_module_to_save():
    with pytest.raises(ValueError, match="conflicts with the adapter"):
        LoraModel(Net(), lora(modules_to_save=["default"]), "default")


def test_one_module_under_two_names_keeps_one_copy():
    model = Net()
    model.alias = model.head
    tuner = LoraModel(model, lora(modules_to_save=["head", "alias"]), "default")
    assert tuner.model.head is tuner.model.alias
    assert sum("modules_to_save" in n for n, _ in tuner.named_parameters()) == 2


def test_state_dict_maps():
    model = LoraModel(Net(), lora(modules_to_save=["head"], trainable_token_indices={"emb": [1, 2]}), "a")
    model.add("b", lora())
    head, emb = model.model.head, model.model.emb
    assert head.adapter_state_dict_load_map("a") == {
        "weight": "modules_to_save.a.weight",
        "bias": "modules_to_save.a.bias",
    }
    key = "token_adapter.trainable_tokens_delta"
    assert emb.adapter_state_dict_load_map("a") == {key: f"{key}.a"}
    assert emb.adapter_state_dict("a", emb.state_dict())[key].shape == (2, 6)
    assert head.adapter_state_dict_load_map("b") == emb.adapter_state_dict_load_map("b") == {}


def test_adapters_with_and_without_tokens_save_side_by_side():
    model = get_peft_model(Net(), lora(trainable_token_indices={"emb": [1, 2]}), "a")
    model.add_adapter("b", lora())
    model.add_adapter("c", lora(trainable_token_indices={"emb": [2, 5]}))
    tokens = "base_model.model.emb.token_adapter.trainable_tokens_delta"
    assert tokens in get_peft_model_state_dict(model, adapter_name="a")
    assert tokens not in get_peft_model_state_dict(model, adapter_name="b")
    assert get_peft_model_state_dict(model, adapter_name="c")[tokens].shape == (2, 6)
    model.set_adapter("b")
    assert model.base_model.model.emb.active_adapters == []
    model(X)


@pytest.mark.parametrize("merge", [True, False])
def test_unloading_gives_the_trained_modules(merge):
    model = LoraModel(Net(), lora(modules_to_save=["head"], trainable_token_indices={"emb": [1, 2]}), "a")
    shake(model)
    out = model(X)
    trained, emb = model.model.head.modules_to_save["a"], model.model.emb.original_module
    base = model.merge_and_unload() if merge else model.unload()
    assert base.head is trained and base.emb is emb
    assert not any(isinstance(m, (ModulesToSaveWrapper, TrainableTokensWrapper)) for m in base.modules())
    if merge:
        torch.testing.assert_close(base(X), out)


def test_copies_survive_deepcopy_pickle_and_half():
    model = LoraModel(Net(), lora(modules_to_save=["head"], trainable_token_indices={"emb": [1, 2]}), "a")
    shake(model)
    out = model(X)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(clone(X), out, rtol=0, atol=0)
        clone.disable_adapter_layers()
        assert clone.model.head.disable_adapters and not model.model.head.disable_adapters
    assert model.to(torch.bfloat16)(X).dtype == torch.bfloat16


def test_plain_functions_work_without_a_tuner():
    model = Net()
    model.register_module("absent", None)
    _set_trainable(model, "a", ["head", "absent"], inference_mode=False)
    for name in ("b", "c"):  # a wrapper keeps its active adapter, whatever is asked for
        _set_trainable(model, name, ["head"], inference_mode=False, activate_adapter=name == "c")
    assert model.head.active_adapter == "a" and model.head.adapter_names == ["a", "b", "c"]
    assert on(model.head.modules_to_save) == ["a.weight", "a.bias"]
    _set_adapter(model, "b")
    assert model.head.active_adapter == "b" and model.head.modules_to_save["b"].weight.requires_grad
    _set_adapter(model, ["other"])
    assert model.head.active_adapters == []
    with pytest.raises(ValueError, match="at least one adapter"):
        _set_adapter(model, [])
    with pytest.raises(ValueError, match="could not find"):
        _set_trainable(model, "a", ["nope"], False, strict_module_check=True)
    _set_trainable(model, "d", ["lin1"], inference_mode=False)  # a new one begins with the adapter that it is made for
    assert model.lin1.active_adapter == "d" and on(model.lin1.modules_to_save) == ["d.weight", "d.bias"]
    assert model.head.active_adapters == []


def test_additional_modules_can_be_checked_ahead():
    model, config = Net(), lora(modules_to_save=["nothing"], trainable_token_indices={"emb": [0]})
    check_additional_trainable_modules(model, config)
    set_additional_trainable_modules(model, config, {}, "a", activate_adapter=False)
    assert isinstance(model.emb, TrainableTokensWrapper) and model.emb.active_adapters == []
    assert isinstance(model.head, nn.Linear)


def test_other_methods_share_the_wrappers():
    config = IA3Config(target_modules=["lin0"], feedforward_modules=[], modules_to_save=["head"])
    model = get_peft_model(Net(), config)
    assert isinstance(model.base_model.model.head, ModulesToSaveWrapper)
    assert model.base_model.model.head.switch is model.base_model.switch
    keys = set(get_peft_model_state_dict(model))
    assert {"base_model.model.head.weight", "base_model.model.head.bias"} <= keys


def test_wrapped_forward_compiles_without_graph_break():
    model = LoraModel(Net(), lora(modules_to_save=["head"], trainable_token_indices={"emb": [1, 2]}), "a")
    shake(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), model(X))


def test_tokens_of_a_module_inside_one_that_is_saved():
    """The copy that is used would not have them."""
    model = nn.ModuleDict({"body": nn.Sequential(nn.Embedding(12, 6)), "lin0": nn.Linear(6, 6)})
    with pytest.raises(ValueError, match=r"'body\.0' is in trainable_token_indices and 'body' in modules_to_save"):
        LoraModel(model, lora(trainable_token_indices={"body.0": [1]}, modules_to_save=["body"]), "default")
    model = LoraModel(model, lora(trainable_token_indices={"body.0": [1]}), "a")
    with pytest.raises(ValueError, match=r"'body\.0' is in trainable_token_indices already, so it cannot be in m"):
        model.add("b", lora(modules_to_save=["body.0"]))
    with pytest.raises(ValueError, match=r"Target module 'body\.0' is trained in full or has trainable tokens already"):
        model.add("b", LoraConfig(target_modules=["0"]))


@pytest.mark.parametrize("safe_merge", [False, True])
def test_the_tokens_of_the_named_adapter_are_merged(safe_merge):
    model = LoraModel(Net(), lora(trainable_token_indices={"emb": [1, 2]}, init_lora_weights=False), "a")
    model.add("b", lora(trainable_token_indices={"emb": [1, 2]}, init_lora_weights=False))
    model.set_adapter("b")
    shake(model, "tokens")
    out = model(X)
    model.set_adapter("a")
    assert (model(X) - out).abs().max() > 1e-3
    torch.testing.assert_close(model.merge_and_unload(safe_merge=safe_merge, adapter_names=["b"])(X), out)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_tokens_of_an_offloaded_embedding_are_merged(safe_merge):
    hooks = pytest.importorskip("accelerate.hooks")
    base = Net()
    weights = {"weight": base.emb.weight.detach().clone()}
    hooks.add_hook_to_module(base.emb, hooks.AlignDevicesHook("cpu", offload=True, weights_map=weights))
    model = LoraModel(base, lora(trainable_token_indices={"emb": [1, 2]}), "a")
    shake(model, "tokens")
    out = model(X)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert merged.emb.weight.is_meta
    torch.testing.assert_close(merged(X), out)


def test_unloading_takes_merged_adapters_out_again():
    base = Net()
    before = {k: v.clone() for k, v in base.state_dict().items()}
    model = LoraModel(base, lora(trainable_token_indices={"emb": [1, 2]}, init_lora_weights=False), "a")
    shake(model, "tokens")
    model.merge_adapter()
    assert not torch.equal(base.emb.original_module.weight, before["emb.weight"])
    unloaded = model.unload().state_dict()
    assert unloaded.keys() == before.keys() and all(torch.equal(unloaded[k], v) for k, v in before.items())


@pytest.mark.parametrize("options", [{"modules_to_save": ["emb"]}, {"trainable_token_indices": {"emb": [1]}}])
def test_one_wrapper_is_switched_and_loses_an_adapter(options):
    model = LoraModel(Net(), lora(**options), "a")
    for name in ("b", "c"):
        model.add(name, lora(**options))
    emb = model.model.emb
    emb.set_adapter("b")
    assert emb.active_adapters == ["b"] and {n.split(".")[-2 if "save" in n else -1] for n in on(emb)} == {"b"}
    with pytest.raises(ValueError, match=r"Adapter x not found in \['a', 'b', 'c'\]"):
        emb.set_adapter("x")
    emb.delete_adapter("b", ["c"])
    assert emb.active_adapters == ["c"] and emb._get_available_adapters() == {"a", "c"}
    emb.delete_adapter("a", None)
    assert emb.active_adapters == ["c"] and emb.adapter_names == ["c"]


def test_merged_tokens_are_taken_out_when_the_wrapper_is_switched():
    model = LoraModel(Net(), lora(trainable_token_indices={"emb": [1]}), "a")
    emb, before = model.model.emb, model.model.emb.original_module.weight.clone()
    shake(model, "tokens")
    emb.token_adapter.merge()
    assert not torch.equal(emb.original_module.weight, before)
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        emb.set_adapter([])
    assert torch.equal(emb.original_module.weight, before) and not emb.token_adapter.merged


def test_tying_needs_the_embedding_in_modules_to_save():
    config = lora(modules_to_save=["lin1"])
    config.modules_to_tie = {"head"}
    base = Net()
    with pytest.raises(RuntimeError, match="Cannot tie 'head': the input embedding 'embed_tokens' is not in"):
        LoraModel(base, config, "a")
    assert type(base.lin1) is nn.Linear and type(base.lin0) is nn.Linear
