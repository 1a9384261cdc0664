# SPDX-License-Identifier: Apache-2.0
"""The default-target tables equal the published ones (tests/data/target_defaults.json, full or as differences)."""

import json
from pathlib import Path

import pytest

import peft.utils.constants as constants
from peft.core.targets import default_targets, published_names, table_names, table_of_method, target_table
from peft.utils import PeftType

FACTS = json.loads((Path(__file__).parents[1] / "data" / "target_defaults.json").read_text())


def published(name):
    fact = FACTS[name]
    if "equals" in fact:
        return published(fact["equals"])
    return {**published(fact["base"]), **fact["override"]} if "base" in fact else fact["table"]


def test_all_tables_are_there():
    assert set(table_names()) == set(FACTS) and len(table_names()) == 36


@pytest.mark.parametrize("name", sorted(FACTS))
def test_table_equals_the_published_one(name):
    assert target_table(name) == published(name)


def test_constants_are_views_of_the_tables():
    for constant, name in published_names().items():
        assert getattr(constants, constant) is target_table(name)
    assert constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["phi"] == ["q_proj", "v_proj", "fc1", "fc2"]
    with pytest.raises(AttributeError, match="TRANSFORMERS_MODELS_TO_NOTHING"):
        constants.TRANSFORMERS_MODELS_TO_NOTHING  # noqa: B018


def test_default_targets():
    assert default_targets("lora", "llama") == {"q_proj", "v_proj"}
    assert default_targets("lora", "gemma4") == r".*language_model\..*\.(q_proj|v_proj)"
    assert type(default_targets("lora", "gemma4")) is str
    assert default_targets("lora", "no_such_family") is None
    assert default_targets("ia3_feedforward", "mt5") == set()
    with pytest.raises(KeyError, match="lorra"):
        default_targets("lorra", "llama")


def test_an_entry_added_to_a_published_table_is_used(monkeypatch):
    mapping = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    monkeypatch.setitem(mapping, "my_model", ["a", "b"])
    assert default_targets("lora", "my_model") == {"a", "b"}
    assert default_targets("loha", "my_model") is None


def test_table_of_method():
    without = {t for t in list(PeftType)[:45] if table_of_method(t) is None}
    assert {t.value for t in without} == {
        *("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE"),
        *("ADAPTION_PROMPT", "XLORA", "TRAINABLE_TOKENS", "SHADOW"),
    }
    assert table_of_method("LN_TUNING") == "lntuning" and table_of_method(PeftType.VERA) == "vera"
