# SPDX-License-Identifier: Apache-2.0
"""Every published name is importable from its address, with the published parameters and defaults.

tests/data/public_api.json was made by introspection of the published package. A signature may have more optional
parameters than the published one, but those that were published stay where they were. Private members may be absent or
different, but for those that other libraries replace or call.
"""

import dataclasses
import enum
import functools
import importlib
import inspect
import json
from pathlib import Path

import pytest
from torch import nn

import peft
from peft.registry import methods

DATA = json.loads((Path(__file__).parent / "data" / "public_api.json").read_text())
NAMES = [(module, name) for module, names in DATA["names"].items() for name in names]
# Private members that other libraries call or replace; the others are of internal use in the published class.
PATCHED = {
    "_cast_adapter_dtype", "_get_peft_type", "_split_kwargs", "_create_and_replace", "_inject_parameters",
    "_check_target_module_exists", "_check_target_module_compatiblity", "_unload_and_optionally_merge",
}  # fmt: skip
MEMBERS = [
    (cls, name)
    for cls, names in DATA["members"].items()
    for name in names
    if name[0] != "_" or name in PATCHED or cls == "BasePromptEncoder"
]
IMPORTS = [(module, name) for module, names in DATA["ecosystem"].items() for name in names.split()]
OF_METHOD = {name: method for method, names in DATA["methods"].items() for name in names.split()}


# ---- signatures as text


def default_text(parameter):
    value = parameter.default
    if value is inspect.Parameter.empty:
        return None
    if isinstance(value, enum.Enum):
        return repr(str(value.value))
    if isinstance(value, type) or (callable(value) and hasattr(value, "__name__")):
        return f"<{value.__name__}>"
    if dataclasses.is_dataclass(value):
        return f"<{type(value).__name__}>"
    text = repr(value)
    return "<factory>" if "factory" in text else text


def parameters_of(function):
    """[(name, default text or None, kind)] of a callable."""
    return [(p.name, default_text(p), p.kind) for p in inspect.signature(function).parameters.values()]


@functools.cache
def split(text):
    """["a", "b=1", "*", ...] of a signature text; commas inside of defaults do not count."""
    parts, depth, current = [], 0, ""
    for char in text + ",":
        if char == "," and depth == 0:
            parts.append(current.strip())
            current = ""
            continue
        depth += (char in "([{") - (char in ")]}")
        current += char
    return [part for part in parts if part]


def expanded(text):
    for short, full in sorted(DATA["abbreviations"].items(), reverse=True):
        text = text.replace(short, full)
    return text


# Our names of base classes in defaults, and of the first arguments of tuners, which are passed by position.
SYNONYMS = {"<AdapterLayer>": "<BaseTunerLayer>", "config": "peft_config", "configs": "peft_config"}
VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def differences(published, function, is_tuner=False):
    """What of a published signature text a callable does not offer."""
    ours = parameters_of(function)
    by_name = {name: (position, default, kind) for position, (name, default, kind) in enumerate(ours)}
    wrong, position, keyword_only, known = [], 0, False, set()
    for part in split(expanded(published)):
        if part.startswith("*"):
            keyword_only = True
            continue
        name, _, default = part.partition("=")
        name = SYNONYMS.get(name, name) if is_tuner and name not in by_name else name
        known.add(name)
        if name not in by_name:
            if not (default and inspect.Parameter.VAR_KEYWORD in {kind for *_, kind in ours}):
                wrong.append(f"no parameter {name!r}")
        else:
            where, our_default, kind = by_name[name]
            if default and default != SYNONYMS.get(our_default or "", our_default):
                wrong.append(f"default of {name!r} is {our_default}, published {default}")
            if not keyword_only and (where != position or kind is inspect.Parameter.KEYWORD_ONLY):
                wrong.append(f"{name!r} is not parameter number {position}")
        position += 1
    open_ended = "*args" in published or "**" in published
    for name, default, kind in ours:
        if name not in known and default is None and kind not in VARIABLE and not open_ended:
            wrong.append(f"{name!r} is required, and was not published")
    return wrong


# ---- names


# Signatures that are not the published ones, and why.
DIFFERENT = {
    "peft.PeftModelForTokenClassification": "published with a default of None for the config, and fails with it",
    "peft.tuners.tuners_utils.BaseTunerLayer": "a class of its own, not a mixin: it takes the base layer",
    "peft.tuners.lora.LoraLayer": "layers are made by the tuner",
    "BaseTuner._check_target_module_exists": "the function of that name, whose first parameter is called config",
    "LoraModel._create_and_replace": "has the parameters of BaseTuner's, which are passed by position",
    "AuxiliaryTrainingWrapper.init_modules": "of internal use",
}


def look_up(module, name):
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize(("module", "name"), NAMES, ids=lambda v: v)
def test_name(module, name):
    published = DATA["names"][module][name]
    if published == "= peft":
        published = DATA["names"]["peft"][name]
    found = look_up(module, name)
    kind, _, rest = published.partition(": ")
    if kind == "const":
        assert repr(found) == rest
    elif kind == "enum":
        members = " ".join(m.name if m.name == m.value else f"{m.name}={m.value}" for m in found)
        # further methods may follow the published ones
        assert members == rest or (name == "PeftType" and members.startswith(rest + " "))
    elif kind == "text":
        assert isinstance(found, str)
    elif published.startswith("dict"):
        size = int(published.split()[1])
        assert isinstance(found, dict)
        if name != "PEFT_TYPE_TO_MIXED_MODEL_MAPPING":
            assert len(found) == size or (name.startswith("PEFT_TYPE_TO") and len(found) == len(methods()))
    else:
        assert isinstance(found, type) == (kind == "class")
        if f"{module}.{name}" in DIFFERENT or not rest or (name.startswith("_") and kind == "func"):
            return
        wrong = differences(rest, found, is_tuner=name in OF_METHOD and name.endswith("Model"))
        assert not wrong, f"{module}.{name}: {'; '.join(wrong)}"


def test_all_lists():
    for module in ("peft", "peft.utils", "peft.tuners", "peft.functional", "peft.optimizers"):
        assert set(DATA["names"][module]) - set(importlib.import_module(module).__all__) == set()


def test_registry_is_complete():
    assert len(DATA["methods"]) == 45 and list(methods()) == list(peft.PeftType)
    for name, classes in DATA["methods"].items():
        record = methods()[peft.PeftType(name)]
        assert [record.config.__name__, record.tuner.__name__] == classes.split()


# ---- members of classes


def owner(cls):
    from peft.tuners import tuners_utils
    from peft.utils import other

    for place in (peft, tuners_utils, other):
        if hasattr(place, cls):
            return getattr(place, cls)
    raise AssertionError(cls)


@functools.cache
def instances():
    """Attributes may be set on instances."""
    model = peft.get_peft_model(nn.Sequential(nn.Linear(2, 2)), peft.LoraConfig(target_modules=["0"]))
    return {"BaseTuner": model.base_model, "LoraModel": model.base_model, "BaseTunerLayer": model.base_model.model[0]}


@pytest.mark.parametrize(("cls", "name"), MEMBERS, ids=lambda v: v)
def test_member(cls, name):
    kind, _, published = DATA["members"][cls][name].partition(": ")
    found = inspect.getattr_static(owner(cls), name, None)
    if found is None and kind in ("property", "attribute") and hasattr(instances().get(cls, owner(cls)), name):
        return
    assert found is not None or hasattr(owner(cls), name), f"{cls} has no member {name!r}"
    if kind in ("property", "attribute") or f"{cls}.{name}" in DIFFERENT:
        return
    assert type(found).__name__ == {"method": "function"}.get(kind, kind)
    function = found.__func__ if isinstance(found, (staticmethod, classmethod)) else found
    assert not (wrong := differences(published, function)), f"{cls}.{name}: {'; '.join(wrong)}"


# ---- what other libraries import


@pytest.mark.parametrize(("module", "name"), IMPORTS, ids=lambda v: v)
def test_import_of_other_libraries(module, name):
    if name == "get_model_conversion_mapping":
        pytest.importorskip("transformers.conversion_mapping", reason="since transformers 5")
    assert look_up(module, name) is not None
