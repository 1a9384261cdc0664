# SPDX-License-Identifier: Apache-2.0
"""Old addresses, lazy names, the cost of importing, and the functions of tuners_utils that are no re-exports."""

import importlib
import subprocess
import sys

import pytest
import torch
from torch import nn

import peft
from peft import LoraConfig, get_peft_model
from peft.tuners import tuners_utils
from peft.utils._lazy import lazy_attributes, owners


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_is_cheap():
    out = run(
        "import sys, torch; n = len(sys.modules)\n"
        "from peft import get_peft_model, LoraConfig, TaskType\n"
        "heavy = {'transformers', 'accelerate', 'huggingface_hub'} & set(sys.modules)\n"
        "print(len(sys.modules) - n, *heavy)"
    )
    count, *heavy = out.split()
    assert int(count) <= 150 and heavy == []


def test_submodules_are_attributes_without_importing_them():
    assert run("import peft; print(peft.utils.other.ModulesToSaveWrapper.__name__)") == "ModulesToSaveWrapper"
    assert run("import peft; print(peft.tuners.tuners_utils.BaseTunerLayer.__module__)") == "peft.core.layer"


@pytest.mark.parametrize(
    ("module", "name", "home", "owned"),
    [
        ("peft.utils.other", "AuxiliaryTrainingWrapper", "peft.core.wrappers", None),
        ("peft.utils.other", "get_pattern_key", "peft.core.match", None),
        ("peft.utils.other", "_prepare_prompt_learning_config", "peft.core.prompt", "prepare_prompt_config"),
        ("peft.utils.peft_types", "register_peft_method", "peft.registry", None),
        ("peft.utils.save_and_load", "get_peft_model_state_dict", "peft.io.state_dict", None),
        ("peft.tuners.tuners_utils", "BaseTuner", "peft.core.tuner", "TunerModel"),
        ("peft.tuners.tuners_utils", "BaseTunerLayer", "peft.core.layer", "AdapterLayer"),
        ("peft.functional", "delete_adapter", "peft.core.trainable", None),
        ("peft.utils.merge_utils", "ties", "peft.core.combine", None),
    ],
)
def test_old_address_is_the_same_object(module, name, home, owned):
    there = getattr(importlib.import_module(module), name)
    assert there is getattr(importlib.import_module(home), owned or name)


def test_addresses_of_lora_over_quantised_layers():
    code = (
        "import peft.tuners.lora.bnb as bnb, peft.tuners.lora.conversion\n"
        "from peft.tuners.lora.tp_layer import LoraParallelLinear\n"
        "from peft.tuners.lora import GPTQLoraLinear, aqlm\n"
        "print(bnb.Linear4bit.__name__, aqlm.AqlmLoraLinear.__name__, GPTQLoraLinear is aqlm.GPTQLoraLinear)"
    )
    assert run(code) == "Linear4bit AqlmLoraLinear True"
    from peft.tuners import lora

    layer = lora.bnb.Linear8bitLt(nn.Linear(4, 4), "default", LoraConfig(r=2))
    assert type(layer) is lora.Linear and not isinstance(layer, lora.bnb.Linear8bitLt)
    assert not isinstance(nn.Linear(4, 4), lora.bnb.Linear8bitLt)
    weight = torch.randn(2, 3)
    assert [lora.layer.transpose(weight, flag).shape for flag in (False, True)] == [(2, 3), (3, 2)]
    layer.storage = type("Storage", (), {"label": "gptq"})()
    assert isinstance(layer, lora.GPTQLoraLinear) and not isinstance(layer, lora.tp_layer.LoraParallelLinear)
    layer._modules["base_layer"] = type("RowParallelLinear", (nn.Linear,), {})(4, 4)
    assert isinstance(layer, lora.tp_layer.LoraParallelLinear)
    assert lora.conversion.convert_to_lora is peft.convert_to_lora


def test_errors_and_warnings():
    assert issubclass(peft.NoMatchingPeftModuleError, (peft.PeftError, ValueError))
    assert issubclass(peft.PeftWarning, UserWarning)
    assert len(peft.PeftType) >= 45 and peft.PeftType.LORA == "LORA" and str(peft.PeftType.LORA) == "PeftType.LORA"


def test_a_missing_dependency_is_named(tmp_path, monkeypatch):
    """Not the attribute; even where its name starts that of the module."""
    (tmp_path / "needs_much.py").write_text("import needs\n")
    monkeypatch.syspath_prepend(tmp_path)
    get, _ = lazy_attributes(__name__, {"thing": "needs_much"})
    with pytest.raises(ModuleNotFoundError, match="No module named 'needs'"):
        get("thing")


def test_lazy_attributes():
    homes = owners({"math": "sqrt pi", "math:floor": "round_down", "math:nothing": "lost", "no_such_module": ["gone"]})
    get, names = lazy_attributes(__name__, homes)
    assert get("pi") > 3 and get("round_down")(1.7) == 1
    assert {"sqrt", "round_down", "gone"} <= set(names())
    for missing in ("unknown", "lost", "gone"):
        with pytest.raises(AttributeError, match="unknown|nothing|gone"):
            get(missing)


# ---- tuners_utils


def test_in_and_out_features():
    sizes = tuners_utils._get_in_out_features
    assert sizes(nn.Linear(3, 4)) == (3, 4)
    assert sizes(nn.Conv2d(6, 4, 2, groups=2)) == (6, 4)
    assert sizes(nn.Embedding(5, 6)) == (5, 6)
    assert sizes(nn.MultiheadAttention(4, 2)) == (4, 12)
    for names in (("in_features", "out_features"), ("infeatures", "outfeatures"), ("input_size", "output_size")):
        packed = nn.Module()  # a layer of another library
        packed.__dict__.update(zip(names, (5, 7), strict=True))
        assert sizes(packed) == (5, 7)
    with pytest.warns(UserWarning, match="Unsupported layer type"):
        assert sizes(nn.LayerNorm(3)) == (None, None)


def test_all_linear_and_matched_modules():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    config = LoraConfig(target_modules="all-linear")
    assert tuners_utils._maybe_include_all_linear_layers(config, model) is config
    assert config.target_modules == {"0", "2"}
    adapted = get_peft_model(model, LoraConfig(target_modules=["0"]))
    found = tuners_utils.inspect_matched_modules(adapted.base_model)
    assert found["matched"] == ["0"] and {"", "1", "2", "0.base_layer"} <= set(found["unmatched"])
    prefixes = tuners_utils._get_tuner_state_dict_key_prefixes(adapted)
    assert "base_model.model.0.lora_A" in prefixes and len(prefixes) == 6
    assert tuners_utils._get_tuner_state_dict_key_prefixes(adapted, "default") >= {"base_model.model.0.lora_B.default"}
    with pytest.raises(ValueError, match="merged"):
        adapted.merge_adapter()
        tuners_utils._check_adapters_not_merged(adapted, "default")


def test_module_helpers():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(3, 4))
    assert tuners_utils.find_parameter_name_by_module(model, model[1]) == "1"
    assert tuners_utils.find_parameter_name_by_module(model, nn.Linear(2, 2)) == ""
    assert tuners_utils.get_device_map(model) == {"": torch.device("cpu")}
    assert tuners_utils.clone_module(model[0]).weight is not model[0].weight
    shared = tuners_utils.clone_module(model[0], share_weights=True)
    assert shared is not model[0] and shared.weight is model[0].weight


def test_keys():
    remove = tuners_utils._remove_adapter_name_from_state_dict_key
    assert remove("a.lora_A.default.weight", "default") == "a.lora_A.weight"
    assert remove("a.vec.default", "default") == "a.vec" and remove("a.defaults", "default") == "a.defaults"
    assert tuners_utils._filter_state_dict_by_key_prefixes({"a.b": 1, "ab": 2, "a": 3}, {"a"}) == {"a.b": 1, "a": 3}


def test_mamba_modules():
    model = nn.Linear(2, 2)
    model.config = type("Config", (), {"model_type": "mamba"})()
    with pytest.raises(ValueError, match="Mamba"):
        tuners_utils._check_lora_target_modules_mamba(LoraConfig(), model, "out_proj")
    tuners_utils._check_lora_target_modules_mamba(LoraConfig(), model, "q_proj")


def test_adapter_name_goes_into_keys():
    from peft.utils.save_and_load import _insert_adapter_name_into_state_dict as insert

    keys = {"a.lora_A.weight": 1, "b.lora_vec": 2, "c.weight": 3, "lora_x.q.lora_B.weight": 4}
    keys["d.lora_magnitude_vector"] = 5
    assert insert(keys, "ad", "lora_") == {
        "a.lora_A.ad.weight": 1, "b.lora_vec.ad": 2, "c.weight": 3, "lora_x.q.lora_B.ad.weight": 4,
        "d.lora_magnitude_vector.ad.weight": 5,
    }  # fmt: skip


def test_dict_of_buffers():
    held = tuners_utils.BufferDict({"a": torch.zeros(2)})
    held.update([("b", torch.ones(3, 4))])
    held.update(tuners_utils.BufferDict({"c": torch.ones(1)}))
    assert list(held) == ["a", "b", "c"] and list(held.state_dict()) == []
    sizes = {"a": "2", "b": "3x4", "c": "1"}
    lines = [f"    ({name}): Buffer containing: [torch.FloatTensor of size {size}]" for name, size in sizes.items()]
    assert repr(held) == "\n".join(["BufferDict(", *lines, ")"]) and repr(tuners_utils.BufferDict()) == "BufferDict()"
    with pytest.raises(TypeError, match="got int"):
        held.update(3)


def test_tables_are_listed():
    from peft.utils import constants

    names = dir(constants)
    assert {"WEIGHTS_NAME", "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"} <= set(names)
    assert all(hasattr(constants, name) for name in names)


def test_deleting_the_trained_copies_of_an_adapter():
    model = get_peft_model(
        nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), LoraConfig(target_modules=["0"], modules_to_save=["1"])
    )
    model.add_adapter("other", LoraConfig(target_modules=["0"], modules_to_save=["1"]))
    tuners_utils._delete_auxiliary_adapter(model, "default", ["other"])
    wrapper = model.base_model.model[1]
    assert list(wrapper.modules_to_save) == ["other"] and wrapper.active_adapters == ["other"]
    assert "default" in model.base_model.model[0].lora_A  # layers are not its business
