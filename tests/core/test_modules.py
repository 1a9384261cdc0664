# SPDX-License-Identifier: Apache-2.0
"""Modules and tensors made in bulk are those that torch would have made."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from tests.methods.bases import BASES, base, inputs
from torch import nn

from peft import LoraConfig, get_peft_model
from peft.core import kinds, modules, slots
from peft.core.layer import AdapterLayer
from peft.core.modules import OnMeta, awaiting_values, kaiming
from peft.core.slots import BufferDict
from peft.utils.integrations import init_empty_weights


@pytest.mark.parametrize(("n_in", "n_out", "bias"), [(5, 3, False), (3, 7, True), (1, 1, True)])
def test_linear_layers_made_in_bulk_are_those_of_torch(n_in, n_out, bias):
    torch.manual_seed(0)
    made, state = kinds.linear(n_in, n_out, bias), torch.get_rng_state()
    torch.manual_seed(0)
    wanted = nn.Linear(n_in, n_out, bias=bias)
    assert torch.equal(torch.get_rng_state(), state)
    assert vars(made).keys() == vars(wanted).keys() and repr(made) == repr(wanted)
    assert list(made.state_dict()) == list(wanted.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), wanted.parameters(), strict=True))
    assert all(p.requires_grad for p in made.parameters())


def test_linear_layers_made_in_bulk_heed_contexts():
    """What patches torch's own constructors (accelerate, DeepSpeed) or sets a device takes part."""
    with torch.device("meta"):
        assert kinds.linear(2, 3, bias=True).bias.is_meta
    with init_empty_weights():
        assert kinds.linear(2, 3).weight.is_meta
    before = torch.get_rng_state()
    with awaiting_values():
        kinds.linear(2, 3, bias=True)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 5, 2), (0, 3)])
def test_kaiming_draws_as_torch_does(shape):
    torch.manual_seed(0)
    made = kaiming(*shape)
    torch.manual_seed(0)
    assert torch.equal(made, nn.init.kaiming_uniform_(torch.empty(shape), a=5**0.5))


@pytest.mark.parametrize("name", [*BASES, "scaled Embedding"])
def test_every_kind_calls_its_layer_with_another_weight(name):
    layer = base(name.removeprefix("scaled ")).lin0
    if name.startswith("scaled"):
        layer.embed_scale = torch.tensor([3.0])
        layer.register_forward_hook(lambda m, args, y: y * m.embed_scale)
    kind, x = kinds.kind_of(layer), inputs(name.removeprefix("scaled "))
    assert kind.name == name.removeprefix("scaled ")
    assert kind.shape(layer)[:2] == tuple(kind.canonical(kind.parameter(layer)).shape[:2]) or kind is kinds.Norm
    if name in ("MultiheadAttention", "Norm"):
        with pytest.raises(NotImplementedError, match=f"{name} cannot be called with another weight"):
            kind.call(layer, x, kind.parameter(layer))
        return
    weight = kind.canonical(kind.parameter(layer))
    torch.testing.assert_close(kind.call(layer, x, weight, kind.bias(layer)), layer(x))
    torch.testing.assert_close(kind.call(layer, x, 2 * weight), 2 * kind.call(layer, x, weight))


def test_kinds_of_parameters_are_found_by_name():
    """As in a process that unpickles a model before it has made the kind."""
    made = kinds.parameter_kind("odd")
    data = pickle.dumps(made)
    del kinds.Parameter__odd
    found = pickle.loads(data)
    assert found is not made and (found.weight_name, found.__name__) == ("odd", "Parameter__odd")
    with pytest.raises(AttributeError, match="no attribute 'Odd'"):
        _ = kinds.Odd


def test_only_modules_that_hold_nothing_are_made_in_bulk():
    class Full(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Identity()

    assert type(modules.blank(nn.ModuleDict)) is nn.ModuleDict and not modules.blank(nn.ModuleDict)
    with pytest.raises(TypeError, match=r"Full\(\) is not empty"):
        modules.blank(Full)


def test_buffer_dicts_are_dicts():
    held = BufferDict({"a": torch.ones(2)}, persistent=True)
    held.update([("b", torch.zeros(3))])
    held["c"] = torch.ones(1)
    assert list(held) == list(held.keys()) == ["a", "b", "c"] and [len(v) for v in held.values()] == [2, 3, 1]
    assert set(held.state_dict()) == {"a", "b", "c"}
    assert torch.equal(held.pop("b"), torch.zeros(3)) and "b" not in held and len(held) == 2
    held.clear()
    assert len(held) == 0 and not held.state_dict()
    other = BufferDict({"a": torch.ones(2)})
    assert not other.state_dict()
    other.pop("a")
    other.persistent = True
    other["a"] = torch.ones(2)
    assert set(other.state_dict()) == {"a"}
    with pytest.raises(TypeError, match="needs names and tensors in a mapping, got int"):
        other.update(3)


def test_slots_declared_as_text():
    """`from __future__ import annotations` in the module of a method."""
    read = slots.read_slots(type("Layer", (), {"__module__": slots.__name__, "__annotations__": {
        "scale": "Trainable[nn.ParameterDict]", "note": "Aux[dict]", "rank": "int", "names": "list[str]",
    }}))  # fmt: skip
    found = {n: (s.container, s.role, s.trains, s.saved, s.is_module) for n, s in read.items()}
    assert found == {
        "scale": (nn.ParameterDict, "trainable", True, True, True),
        "note": (dict, "aux", False, False, False),
    }


class Doubling(AdapterLayer):
    """W + W, for modules that are called with replaced tensors."""

    method_name = "doubling"
    kinds = (kinds.MultiheadAttention,)
    factor: slots.Trainable[nn.ParameterDict]

    def create(self, name, cfg):
        self.factor[name] = nn.Parameter(torch.ones(()))

    def delta_weight(self, name):
        return self.factor[name] * self.base_weight()


def test_attention_modules_are_called_with_the_changed_weight():
    layer, x = base("MultiheadAttention").lin0, inputs("MultiheadAttention")
    double = copy.deepcopy(layer)
    double.in_proj_weight.data *= 2
    made = Doubling(layer, "a", LoraConfig())
    got, weights = made(x, x, x)
    want, expected = double(x, x, x)
    torch.testing.assert_close((got, weights), (want, expected))
    got.sum().backward()
    assert made.factor["a"].grad.abs() > 0
    made.merge()
    torch.testing.assert_close(layer.in_proj_weight, double.in_proj_weight)
    torch.testing.assert_close(made(x, x, x)[0], want)


def test_mixed_batches_need_an_output_that_is_a_tensor():
    model = get_peft_model(base("MultiheadAttention"), LoraConfig(target_modules=["lin0", "lin1"])).eval()
    with torch.no_grad(), pytest.raises(TypeError, match="not possible on MultiheadAttention layers, whose output is"):
        model(inputs("MultiheadAttention"), adapter_names=["default"] * 4)


FIRST_LOAD = """
import sys, warnings
from tests.methods.bases import base, targets
from tests.methods.test_contract import CASES, make_config
import peft
warnings.simplefilter("ignore")
on_meta = 0
for name in sorted(n for n, kind in CASES if kind == "Linear"):
    before = {"torch._dynamo", "sympy"} & set(sys.modules)
    made = peft.get_peft_model(base("Linear"), make_config(name, "Linear"), low_cpu_mem_usage=True)
    on_meta += any(p.is_meta for p in made.parameters())
    found = {"torch._dynamo", "sympy"} & set(sys.modules) - before
    print(name, *found) if found else None
assert on_meta > 25, on_meta  # some methods train vectors of the whole model alone
"""


def test_a_first_adapter_on_meta_imports_no_compiler():
    """torch draws on meta by Python code, which imports its compiler or sympy: up to a second of a process's start."""
    done = subprocess.run([sys.executable, "-c", FIRST_LOAD], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr[-2000:]


def test_what_is_only_shaped_on_meta_has_the_shapes_and_dtypes_of_draws():
    def shapes():
        A = torch.randn(2, 3)
        drawn = [A, torch.randn((4, 1)), torch.randint(0, 9, (5,)), torch.randint(7, (2, 2)), torch.stack([A, A])]
        like = [torch.zeros_like(A), torch.ones_like(drawn[2]), torch.zeros_like(torch.ones(2, device="cpu"))]
        return [*drawn, *like, A.normal_(0, 0.1), nn.init.normal_(A, std=0.02), torch.randn(3, device="cpu")]

    with OnMeta():
        found = shapes()
    with torch.device("meta"):
        wanted = shapes()
    assert [(t.shape, t.dtype, t.device) for t in found] == [(t.shape, t.dtype, t.device) for t in wanted]
