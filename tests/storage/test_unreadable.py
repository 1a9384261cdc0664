"""A weight that cannot be read: every setting of every method either works, or is refused when the adapter is made."""

import dataclasses
import itertools
import re
import typing
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from tests.storage.formats import base, inputs
from tests.storage.test_contract import METHODS, bytes_of, config, perturb, same

import peft


def choices(hint: Any) -> Iterator[Any]:
    """Values that a type names: of literals, and of bool."""
    if typing.get_origin(hint) is Literal:
        yield from typing.get_args(hint)
    elif hint is bool:
        yield from (False, True)
    else:
        yield from itertools.chain.from_iterable(map(choices, typing.get_args(hint)))


def settings(method: str) -> Iterator[tuple[str, Any]]:
    cls = METHODS[method].config
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        for value in choices(hints[field.name]):
            ours = value != field.default and "[" not in str(value)  # of pissa_niter_[...] an example is below
            if ours and field.name not in ("peft_type", "task_type", "inference_mode", "auto_mapping"):
                yield field.name, value


OBJECTS: list[dict[str, Any]] = [  # options that are no literals
    {"init_lora_weights": "pissa_niter_4"}, {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 8}},
    {"use_bdlora": {"nblocks": 2, "match_strict": False}},
    {"kasa_config": peft.KasaConfig()},
    {"velora_config": peft.VeloraConfig(num_groups=2)},
    {"monteclora_config": peft.MontecloraConfig()}, {"use_dora": True, "lora_dropout": 0.1},
]  # fmt: skip


def possible(method: str, options: dict[str, Any]) -> bool:
    """Whether the configuration takes the value without further options."""
    try:
        return bool(config(method, **options))
    except (ValueError, TypeError, ImportError):
        return False


TRIED = [(m, {name: value}) for m in METHODS for name, value in settings(m)]
CASES = [(m, {}) for m in METHODS] + [(m, options) for m, options in TRIED if possible(m, options)]
CASES += [("lora", options) for options in OBJECTS] + [("miss", {"init_weights": "bat", "r": 8})]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("method", "options"), CASES, ids=[f"{m}-{o}" for m, o in CASES])
def test_works_or_is_refused(method: str, options: dict[str, Any]) -> None:
    given = config(method, **options)
    net, x = base("eetq"), inputs()
    before, plain, kept = bytes_of(net), net(x), dict(net.named_modules())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(net, given)
    except Exception as error:
        assert type(error) in (TypeError, ValueError), error
        assert re.search("lin0.*eetq.*(Load the base model|Set use_|[Ll]eave that module out)", str(error)), error
        assert dict(net.named_modules()) == kept and same(before, bytes_of(net)) and torch.equal(net(x), plain)
        assert not any(p.requires_grad for p in net.parameters())
        return
    perturb(model)
    for training in (True, False):
        model.train(training)(x).square().sum().backward()
    with model.disable_adapter():
        assert torch.equal(model(x), plain)
    assert same(before, bytes_of(model.base_model.model))


def test_few_settings_need_others() -> None:
    """Else the test above would try less than it says."""
    assert len(TRIED) > 130
    assert [case for case in TRIED if not possible(*case)] == [
        ("lora", {"init_lora_weights": "loftq"}), ("adalora", {"init_lora_weights": "loftq"}),
        ("adalora", {"use_dora": True}),
    ]  # fmt: skip


def test_a_second_adapter_that_is_refused_changes_nothing() -> None:
    model, x = peft.get_peft_model(base("eetq"), config("miss")), inputs()
    perturb(model)
    expected, names = model(x), [n for n, _ in model.named_parameters()]
    with pytest.raises(TypeError, match="lin0: 'bat' reads the weight in every forward.*eetq format.*'mini'"):
        model.add_adapter("second", config("miss", init_weights="bat"))
    assert list(model.peft_config) == ["default"] and [n for n, _ in model.named_parameters()] == names
    assert torch.equal(model(x), expected)
