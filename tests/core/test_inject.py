# SPDX-License-Identifier: Apache-2.0
"""What injection says when targets hit nothing, hit twice, or meet a model that was adapted before."""

import warnings

import pytest
import torch
from torch import nn

from peft import (
    C3AConfig,
    DeloraConfig,
    FourierFTConfig,
    LoraConfig,
    LoraModel,
    NoMatchingPeftModuleError,
    OSFConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.core import match
from peft.utils.save_and_load import get_peft_model_state_dict


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4), "key": nn.Linear(4, 4)}) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer["key"](layer["q"](x))
        return x


def targets(**options):
    return sorted(get_peft_model(Net(), LoraConfig(**options)).targeted_module_names)


@pytest.mark.parametrize(
    ("options", "said", "not_said"),
    [
        ({"target_modules": ["kye"]}, "'kye': nearest 'key'", "regex"),
        ({"target_modules": "q"}, "A string is a regex for whole names", "nearest"),
        ({"target_modules": ["q"], "exclude_modules": ["q"]}, "excluded modules", "nearest"),
        ({"target_modules": ["q"], "layers_to_transform": [7]}, "'layers_to_transform': [7]", "nearest"),
        ({"target_modules": []}, "No `target_modules` passed", "nearest"),
        (
            {"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": ["block"]},
            "'layers_to_transform': [0], only those layers were looked at. You also specified 'layers_pattern'",
            "nearest",
        ),
        ({"target_modules": ["q"], "exclude_modules": ".*"}, "All modules were excluded", "not found"),
    ],
)
def test_nothing_matched(options, said, not_said):
    model = Net()
    before = str(model)
    with pytest.raises(NoMatchingPeftModuleError) as error:
        get_peft_model(model, LoraConfig(**options))
    assert said in str(error.value) and not_said not in str(error.value)
    assert str(model) == before and not hasattr(model, "peft_config")
    assert all(p.requires_grad for p in model.parameters())


def test_partly_matched():
    with pytest.warns(UserWarning, match=r"\['kye'\] matched no module. 'kye': nearest 'key'"):
        assert targets(target_modules=["q", "kye"]) == [f"layers.{i}.q" for i in range(3)]


@pytest.mark.parametrize(
    "config, field",
    [
        (LoraConfig(r=2, rank_pattern={"nothing": 4}), "rank_pattern"),
        (C3AConfig(block_size=4, block_size_pattern={"nothing": 2}), "block_size_pattern"),
        (DeloraConfig(r=2, lambda_pattern={"nothing": 2}), "lambda_pattern"),
        (FourierFTConfig(n_frequency=4, n_frequency_pattern={"nothing": 2}), "n_frequency_pattern"),
        (OSFConfig(rank_pattern={r"s\.0": 1}), None),  # a regex that is searched for
    ],
)
def test_pattern_keys_that_match_nothing_are_named(config, field):
    config.target_modules = {"q"}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        get_peft_model(Net(), config)
    found = [str(w.message) for w in said if "did not match any targeted module" in str(w.message)]
    assert len(found) == (field is not None) and all(f"['nothing'] of `{field}`" in text for text in found)


@pytest.mark.parametrize(
    "pattern, first, second",
    [
        ({"layers.0.q": 2, "q": 1}, 1, 1),  # a whole name counts after the others
        ({"layers.0.q": 2}, 2, 4),
        ({r"^layers\.0\.q": 2}, 4, 4),  # nothing stands before the dot
        ({r"(0|1)\.q": 2}, 2, 2),
    ],
)
def test_patterns_of_c3a_and_fourierft_begin_after_a_dot(pattern, first, second):
    model = get_peft_model(Net(), C3AConfig(block_size=4, block_size_pattern=pattern, target_modules=["q"]))
    sizes = [layer.block_size["default"] for layer in model.base_model.layers()]
    assert sizes[:2] == [first, second]
    model = get_peft_model(Net(), FourierFTConfig(n_frequency=4, n_frequency_pattern=pattern, target_modules=["q"]))
    assert [len(layer.fourierft_spectrum["default"]) for layer in model.base_model.layers()][:2] == [first, second]


def test_a_module_and_its_parameter_are_not_both_adapted():
    with pytest.raises(ValueError, match=r"'layers\.0\.q\.weight' belongs to a module that is adapted as a whole"):
        targets(target_modules=["q"], target_parameters=["layers.0.q.weight"])


def test_a_state_dict_chooses_the_modules():
    source = inject_adapter_in_model(LoraConfig(target_modules=r"layers\.[01]\.q"), Net())
    state = get_peft_model_state_dict(source)
    with pytest.warns(RuntimeWarning, match="inconsistency"):
        model = inject_adapter_in_model(LoraConfig(target_modules=["q", "key"]), Net(), state_dict=state)
    found = {n.split(".lora_A")[0] for n, _ in model.named_parameters() if "lora_A" in n}
    assert found == {"layers.0.q", "layers.1.q"}
    foreign = {"zz.lora_A.weight": torch.zeros(1)}
    with pytest.raises(NoMatchingPeftModuleError), pytest.warns(RuntimeWarning):
        inject_adapter_in_model(LoraConfig(target_modules=["q"]), Net(), state_dict=foreign)


def test_wrapping_a_peft_model_shares_its_adapters():
    inner = get_peft_model(Net(), LoraConfig(target_modules=["q"]))
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        outer = get_peft_model(inner, LoraConfig(target_modules=["q"]), "second")
    assert outer.peft_config is inner.peft_config and list(outer.peft_config) == ["default", "second"]


def test_adding_to_a_merged_model_is_said_and_changes_nothing():
    model = get_peft_model(Net(), LoraConfig(target_modules=["q"], init_lora_weights=False))
    x = torch.randn(2, 4)
    expected = model(x)
    model.merge_adapter()
    with pytest.warns(UserWarning, match=r"\['default'\] are merged into the base weights"):
        model.add_adapter("second", LoraConfig(target_modules=["q"], init_lora_weights=False))
    torch.testing.assert_close(model(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.set_adapter("second")
        model.set_adapter("default")
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    ("options", "said", "count"),
    [
        ({"target_modules": ["q"], "exclude_modules": ["nope"]}, r"exclude_modules=\{'nope'\} but no modules were", 3),
        ({"target_modules": ["zz"], "target_parameters": ["q.weight"]}, r"target_modules=\{'zz'\} were set but no", 3),
        ({"target_modules": ["q"], "target_parameters": ["q.w"]}, r"target_parameters=\['q.w'\] were set but no", 3),
    ],
)
def test_options_without_effect_are_named(options, said, count):
    with pytest.warns(UserWarning if "exclude" in said else RuntimeWarning, match=said):
        model = get_peft_model(Net(), LoraConfig(**options))
    assert len(model.base_model.layers()) == count


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        (
            Net(),
            {"target_parameters": ["layers.1.q.bias"]},
            r"'layers\.1\.q\.bias': .*of Linear is 1-d; only 2-d and 3-",
        ),
        (nn.Sequential(nn.Conv2d(2, 2, 3)), {"target_parameters": ["0.weight"]}, r"'0\.weight': .*of Conv2d is 4-d"),
        (
            nn.Sequential(nn.MultiheadAttention(4, 2, kdim=2, vdim=2)),
            {"target_modules": ["0"]},
            "'0': Only same embed for query/key/value is supported",
        ),
        (nn.ParameterList([torch.ones(2, 2)]), {"target_parameters": ["0"]}, "Parameter '0' belongs to the top-level"),
    ],
)
def test_targets_of_other_shapes_are_named(model, options, said):
    before = str(model)
    with pytest.raises(ValueError, match=said):
        get_peft_model(model, LoraConfig(**options))
    assert str(model) == before and not hasattr(model, "peft_config")


def test_a_state_dict_cannot_choose_parameters():
    with pytest.raises(ValueError, match="lora adapter with `target_parameters` cannot be injected from a state_dict"):
        inject_adapter_in_model(LoraConfig(target_parameters=["q.weight"]), Net(), state_dict={})


def test_all_linear_layers_once_more():
    """A second adapter finds them though they are adapter layers by now, but nothing else."""
    model = Net()
    model.emb = nn.Embedding(3, 4)
    model = get_peft_model(model, LoraConfig(target_modules=["emb", "q"]))
    model.add_adapter("b", LoraConfig(target_modules="all-linear"))
    expected = {f"layers.{i}.{name}" for i in range(3) for name in ("q", "key")}
    assert model.peft_config["b"].target_modules == expected
    assert {k for k, layer in model.base_model.named_layers().items() if "b" in layer} == expected


def test_all_linear_leaves_a_head_alone_that_the_model_does_not_tell():
    class Classifier(Net):
        config: dict = {}

        def __init__(self):
            super().__init__()
            self.score = nn.Linear(4, 2)

        def get_output_embeddings(self):
            return None

    for task, heads in (("SEQ_CLS", 0), (None, 1)):
        tuner = LoraModel(Classifier(), LoraConfig(target_modules="all-linear", task_type=task), "default")
        assert len(tuner.layers()) == 6 + heads and ("score" in tuner.targeted_module_names) == bool(heads)


def test_matching_of_single_names():
    config = LoraConfig(target_modules=["q"], exclude_modules=["0.q"])
    excluded = match.check_target_module_exists(config, "0.q")
    assert excluded is match.EXCLUDED and not excluded
    assert match.check_target_module_exists(config, "1.q") is True
    assert not match.check_target_module_exists(LoraConfig(target_parameters=["q.weight"]), "1.q")
    assert match.match_target_against_key(r"\d\.q", "1.q") and not match.match_target_against_key("q", "1.q")
    with pytest.raises(TypeError, match="LoraConfig has neither target_modules nor target_parameters"):
        match.check_target_module_exists(LoraConfig(), "q")


@pytest.mark.parametrize(
    ("targets", "others", "said"),
    [
        ("q", [], "list or set of strings"),
        ([], [], "not empty"),
        (["", "q"], [], "empty string"),
        (["q"], ["q"], "'q'"),
    ],
)
def test_names_that_have_no_shorter_form(targets, others, said):
    with pytest.raises(ValueError, match=said):
        match.find_minimal_target_modules(targets, others)
    assert match.find_minimal_target_modules(["a.q", "b.q", "a.k"], ["b.k"]) == {"q", "a.k"}
