# SPDX-License-Identifier: Apache-2.0
"""get_peft_model: arguments, warnings, published numbers, failures that change nothing; the lazy public names."""

import copy
import importlib.util
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import peft
from peft import IA3Config, LoraConfig, PeftMixedModel, PeftModel, PrefixTuningConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, get_peft_config, inject_adapter_in_model


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lin0, self.lin1, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.head(self.norm(self.lin1(torch.relu(self.lin0(x)))))


def snapshot(model, config):
    modules = [(n, type(m)) for n, m in model.named_modules()]
    tensors = {n: (t.clone(), t.requires_grad) for n, t in model.named_parameters()}
    return modules, tensors, "peft_config" in vars(model), copy.deepcopy(vars(config))


def assert_unchanged(model, config, before):
    modules, tensors, had_config, values = before
    assert [(n, type(m)) for n, m in model.named_modules()] == modules
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, tensors[name][0]), name
        assert parameter.requires_grad == tensors[name][1], name
    assert ("peft_config" in vars(model)) == had_config
    assert vars(config) == values


@pytest.mark.parametrize(
    ("r", "line"),
    [
        (16, "trainable params: 8,388,608 || all params: 6,746,804,224 || trainable%: 0.1243"),
        (8, "trainable params: 4,194,304 || all params: 6,742,609,920 || trainable%: 0.0622"),
    ],
)
def test_trainable_parameters_of_llama_7b(capsys, r, line):
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        base = transformers.LlamaForCausalLM(transformers.LlamaConfig())
    config = LoraConfig(r=r, target_modules=["q_proj", "v_proj"], lora_alpha=32, lora_dropout=0.05, bias="none")
    get_peft_model(base, config).print_trainable_parameters()
    assert capsys.readouterr().out == line + "\n"


def test_classes_by_task():
    transformers = pytest.importorskip("transformers")
    tiny = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=20
    )
    base = transformers.BertForSequenceClassification(tiny)
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"]))
    assert type(model).__name__ == "PeftModelForSequenceClassification"
    assert isinstance(model, peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING["SEQ_CLS"])
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert "base_model.model.classifier.modules_to_save.default.weight" in trained
    assert "base_model.model.classifier.weight" in peft.get_peft_model_state_dict(model)
    assert type(get_peft_model(Net(), LoraConfig(target_modules=["lin0"]))) is PeftModel
    assert type(get_peft_model(Net(), LoraConfig(target_modules=["lin0"]), mixed=True)) is PeftMixedModel


def test_prompt_methods_need_a_task():
    with pytest.raises(KeyError, match="task_type"):
        get_peft_model(Net(), PrefixTuningConfig(num_virtual_tokens=2))


def test_base_model_name_and_revision():
    model, config = Net(), LoraConfig(target_modules=["lin0"], base_model_name_or_path="old", revision="r1")
    model.name_or_path = "new"
    with pytest.warns(UserWarning, match="renamed from 'old' to 'new'"), pytest.warns(UserWarning, match="overwriting"):
        get_peft_model(model, config, revision="r2")
    assert (config.base_model_name_or_path, config.revision) == ("new", "r2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(Net(), LoraConfig(target_modules=["lin0"], revision="r"), revision="r")


def test_warnings_for_second_wrap_and_for_the_name():
    model = Net()
    get_peft_model(model, LoraConfig(target_modules=["lin0"]))
    with pytest.warns(UserWarning, match="second time"), pytest.warns(UserWarning, match="multiple adapters"):
        get_peft_model(model, LoraConfig(target_modules=["lin0"]), adapter_name="other")
    with pytest.warns(UserWarning, match="should not be contained in the prefix"):
        get_peft_model(Net(), LoraConfig(target_modules=["lin0"]), adapter_name="lora")
    clean = Net()
    get_peft_model(clean, LoraConfig(target_modules=["lin0"])).unload()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(clean, LoraConfig(target_modules=["lin0"]))


@pytest.mark.parametrize(
    ("make", "name", "error"),
    [
        (lambda: LoraConfig(target_modules=["nothing"]), "default", ValueError),
        (lambda: LoraConfig(target_modules=["lin0"]), "a.b", KeyError),
        (lambda: LoraConfig(target_modules=["lin0"]), "", KeyError),
        (lambda: LoraConfig(target_modules=["lin0"]), "__base__", ValueError),
        (lambda: LoraConfig(), "default", ValueError),
        (lambda: LoraConfig(target_modules=["lin0", "norm"]), "default", ValueError),
        (lambda: LoraConfig(target_modules=["lin0"], bias="some"), "default", NotImplementedError),
        (lambda: LoraConfig(target_modules=["lin0"], modules_to_save=["lin1", "lin0"]), "default", ValueError),
        (lambda: IA3Config(target_modules=["norm"], feedforward_modules=[]), "default", ValueError),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_failing_calls_change_nothing(make, name, error):
    model, config = Net(), make()
    before = snapshot(model, config)
    with pytest.raises(error):
        get_peft_model(model, config, adapter_name=name)
    assert_unchanged(model, config, before)


def test_wrong_argument_types_are_named():
    with pytest.raises(TypeError, match="PeftConfig"):
        get_peft_model(Net(), {"peft_type": "LORA"})
    with pytest.raises(TypeError, match="lora_alpha"):
        LoraConfig(lora_aplha=3)


def test_autocast_and_low_memory():
    model = get_peft_model(Net().to(torch.bfloat16), LoraConfig(target_modules=["lin0"]))
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    half = get_peft_model(Net().to(torch.bfloat16), LoraConfig(target_modules=["lin0"]), autocast_adapter_dtype=False)
    assert {p.dtype for n, p in half.named_parameters() if "lora_" in n} == {torch.bfloat16}
    mixed = get_peft_model(Net().to(torch.bfloat16), LoraConfig(target_modules=["lin0"]), mixed=True)
    assert {p.dtype for n, p in mixed.named_parameters() if "lora_" in n} == {torch.float32}
    meta = get_peft_model(Net(), LoraConfig(target_modules=["lin0"]), low_cpu_mem_usage=True)
    assert {p.device.type for n, p in meta.named_parameters() if "lora_" in n} == {"meta"}
    assert meta.base_model.model.lin1.weight.device.type == "cpu"


def test_config_from_dict_and_injection():
    config = get_peft_config({"peft_type": "LORA", "r": 3, "target_modules": ["lin0"]})
    assert isinstance(config, LoraConfig) and config.r == 3
    with pytest.raises(KeyError):
        get_peft_config({"r": 3})
    model = Net()
    assert inject_adapter_in_model(config, model) is model
    assert list(model.peft_config) == ["default"]
    assert model.lin0.lora_A["default"].weight.shape == (3, 8)
    with pytest.raises(ValueError, match="shared between layers"):
        inject_adapter_in_model(peft.VeraConfig(target_modules=["lin0"]), Net())
    with pytest.raises(ValueError, match="prompt"):
        inject_adapter_in_model(PrefixTuningConfig(num_virtual_tokens=2), Net())


def test_import_is_lazy():
    code = (
        "import sys, torch; before = set(sys.modules); "
        "from peft import get_peft_model, LoraConfig, TaskType; LoraConfig(r=4); "
        "print(len(set(sys.modules) - before), 'transformers' in sys.modules, 'accelerate' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert int(out[0]) <= 150 and out[1:] == ["False", "False"], out


def test_public_names():
    assert peft.__version__.startswith("0.21.2") and peft.__inlay_version__ in peft.__version__
    assert {"LoraConfig", "PeftModel", "get_peft_model"} <= set(peft.__all__) <= set(dir(peft))
    for name in ("utils", "tuners", "mapping", "peft_model", "mixed_model", "config", "auto", "helpers", "functional"):
        assert getattr(peft, name).__name__ == f"peft.{name}"
    with pytest.raises(AttributeError, match="Nope"):
        _ = peft.Nope
    assert peft.LoraConfig is peft.tuners.LoraConfig is PEFT_TYPE_TO_CONFIG_MAPPING["LORA"]
    assert peft.peft_model.PeftModelForCausalLM is peft.PeftModelForCausalLM
    from peft.mapping_func import get_peft_model as again

    assert again is get_peft_model


def test_stub_for_type_checkers_names_the_same_objects():
    import re
    from pathlib import Path

    text = Path(peft.__file__).with_suffix(".pyi").read_text()
    listed = {name: module for module, name in re.findall(r"from (\.[\w.]+) import \(?\s*(\w+) as", text)}
    assert set(peft.__all__) <= set(listed)
    for name in set(peft.__all__):
        module = "peft" + listed[name]
        if importlib.util.find_spec(module) is not None and hasattr(peft, name):
            assert getattr(importlib.import_module(module), name) is getattr(peft, name), name
