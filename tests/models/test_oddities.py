"""Oddities of the published library's core that no other test looks at; none of them is here."""

import json
import warnings

import pytest
import torch
from tests.methods.bases import base, inputs
from tests.methods.test_contract import CASES, adapted, perturb
from tests.models import prompt_models
from torch import nn

import peft
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.lin0, self.lin1 = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.lin1(self.lin0(x).tanh())


def tuned(**kwargs) -> PeftModel:
    return perturb(get_peft_model(Net(), LoraConfig(**{"r": 2, "target_modules": ["lin0"]} | kwargs)), size=0.3).eval()


@pytest.mark.parametrize("name", sorted({name for name, _ in CASES}))
@pytest.mark.filterwarnings("ignore")
def test_adapter_names_are_never_ignored(name):
    """A mixed batch has rows of the base model, whatever the method."""
    kind = next(k for n, k in CASES if n == name)
    model, x = adapted(name, kind), inputs(kind)
    want, plain = model(x), base(kind)(x)
    got = model(x, adapter_names=["default", "__base__", "default", "__base__"])
    torch.testing.assert_close(got[1::2], plain[1::2], rtol=1e-4, atol=1e-5)
    if name != "lily":  # its router averages over the batch
        torch.testing.assert_close(got[::2], want[::2], rtol=1e-4, atol=1e-5)


def test_missing_trained_module_is_reported_as_missing(tmp_path):
    from safetensors.torch import load_file, save_file

    model = tuned(modules_to_save=["lin1"])
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    save_file({k: v for k, v in state.items() if "lin1" not in k}, tmp_path / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match="lin1"):
        loaded = PeftModel.from_pretrained(Net(), tmp_path)
    with pytest.warns(UserWarning, match="lin1"):
        report = loaded.load_adapter(tmp_path, "second")
    assert any("lin1" in k for k in report.missing_keys)


def test_lora_bias_saves_without_a_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuned(lora_bias=True).save_pretrained(tmp_path)


def test_a_resized_embedding_that_is_trained_is_stored_once(tmp_path):
    model = prompt_models.base("llama")
    model.config.name_or_path = "some/model"
    model.resize_token_embeddings(53)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    model = get_peft_model(model, config)
    keys = [k for k in get_peft_model_state_dict(model, save_embedding_layers=True) if "embed" in k]
    assert keys == ["base_model.model.model.embed_tokens.weight"]


def test_token_rows_and_a_copy_of_one_embedding_are_refused():
    model = Net()
    config = LoraConfig(target_modules=["lin0"], modules_to_save=["emb"], trainable_token_indices={"emb": [1, 2]})
    with pytest.raises(ValueError, match="emb"):
        get_peft_model(model, config)
    assert type(model.emb) is nn.Embedding and type(model.lin0) is nn.Linear


def test_tied_copies_say_their_sizes():
    from tests.methods.test_lora_model import llama

    model = llama(tie_word_embeddings=True)
    shape = model.lm_head.in_features, model.lm_head.out_features
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, config)
    head = model.base_model.model.lm_head
    assert (head.in_features, head.out_features) == shape


def test_loaded_biases_do_not_train(tmp_path):
    tuned(bias="lora_only").save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Net(), tmp_path)
    assert [n for n, p in loaded.named_parameters() if p.requires_grad] == []
    loaded = PeftModel.from_pretrained(Net(), tmp_path, is_trainable=True)
    assert sorted(n.rpartition(".")[2] for n, p in loaded.named_parameters() if p.requires_grad) == [
        "bias",
        "weight",
        "weight",
    ]


@pytest.mark.parametrize("name", sorted({name for name, _ in CASES}))
@pytest.mark.filterwarnings("ignore")
def test_input_casting_can_be_switched_off_for_every_method(name):
    kind = next(k for n, k in CASES if n == name)
    model = adapted(name, kind)
    want = model(inputs(kind))
    with peft.helpers.disable_input_dtype_casting(model):
        torch.testing.assert_close(model(inputs(kind)), want)


def test_lists_in_files_are_ordered(tmp_path):
    for i, names in enumerate((["lin0", "lin1", "emb"], ["emb", "lin1", "lin0"])):
        get_peft_model(Net(), LoraConfig(target_modules=names)).save_pretrained(tmp_path / str(i))
    written = [json.loads((tmp_path / str(i) / "adapter_config.json").read_text())["target_modules"] for i in range(2)]
    assert written[0] == written[1] == ["emb", "lin0", "lin1"]


def test_merged_adapters_stay_merged_after_a_disabled_call():
    model = tuned()
    want = model(X)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(model(X), Net()(X))
    layer = model.base_model.model.lin0
    torch.testing.assert_close(model(X), want)
    assert layer.merged_adapters in (["default"], [])
    layer.unmerge() if layer.merged else None
    assert torch.equal(layer.base_layer.weight, Net().lin0.weight)


def test_merging_again_says_what_is_merged():
    model = tuned()
    model.add_adapter("second", LoraConfig(target_modules=["lin1"]))
    model.merge_adapter()
    model.merge_adapter(["second"])
    assert [layer.merged_adapters for layer in model.base_model.layers()] == [["default"], ["second"]]


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_trained_heads_are_off_while_a_prompt_is_disabled(method):
    model = prompt_models.adapted("bert_cls", method, "SEQ_CLS")
    perturb(model, size=0.5)
    call = {"input_ids": prompt_models.IDS, "attention_mask": prompt_models.MASK}
    want = prompt_models.base("bert_cls")(**call).logits
    with model.disable_adapter():
        torch.testing.assert_close(model(**call).logits, want)
    assert not torch.allclose(model(**call).logits, want)


# ---- optimizers


def test_optimizers_know_layers_by_their_type_not_their_name():
    model = nn.ModuleDict({"lora_B": nn.Linear(8, 8), "emb": nn.Embedding(5, 8)})
    config = LoraConfig(r=2, target_modules=["lora_B", "emb"], use_dora=True)
    model = get_peft_model(model, config)
    optimizer = peft.optimizers.create_loraplus_optimizer(model, torch.optim.SGD, lr=1.0, loraplus_lr_ratio=4.0)
    names = {id(p): n for n, p in model.named_parameters()}
    rates = {
        names[id(p)].removeprefix("base_model.model."): g["lr"] for g in optimizer.param_groups for p in g["params"]
    }
    assert rates["lora_B.lora_A.default.weight"] == 1.0 and rates["lora_B.lora_B.default.weight"] == 4.0
    embedding = {v for k, v in rates.items() if k.startswith("emb.lora_embedding")}
    assert embedding == {1e-6} and len(rates) == 6


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"target_modules": ["emb", "lin0"]}])
def test_lorafa_trains_whatever_else_the_adapter_has(options):
    model = tuned(**options)
    optimizer = peft.optimizers.create_lorafa_optimizer(model, r=2, lora_alpha=8, lr=0.1)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.clone() for n, p in model.named_parameters()}
    model(model.base_model.model.emb(torch.arange(3))).square().sum().backward()
    next(p for n, p in model.named_parameters() if "lin0.lora_B" in n).grad = None  # a missing gradient is no error
    optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    without = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert changed <= trained and trained - without - changed <= {n for n in trained if "embedding_A" in n}
