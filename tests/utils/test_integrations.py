# SPDX-License-Identifier: Apache-2.0
"""peft.utils.integrations: device maps, meta initialisation, dequantisation by class name."""

import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from peft.utils import integrations
from peft.utils.integrations import get_layer_device_map, init_empty_weights


def dispatched(device_map, layers=4):
    config = SimpleNamespace(num_hidden_layers=layers)
    config.get_text_config = lambda **_: config
    return SimpleNamespace(hf_device_map=device_map, config=config)


@pytest.mark.parametrize(
    ("device_map", "want"),
    [
        ({"": 0}, [0, 0, 0, 0]),
        ({"": "cpu"}, ["cpu"] * 4),
        ({"model.layers.0": 0, "model.layers.1": 1, "model.layers.2": 1, "model.layers.3": "cpu"}, [0, 1, 1, 0]),
        ({"h.0": 0, "h.1": 0, "h.2": 0, "h.3": 1, "ln_f": 1}, [0, 0, 0, 1]),
        ({"model.layers.0.mlp": 0, "model.layers.1": 2, "model.layers.2": 0, "model.layers.3": 0}, [0, 2, 0, 0]),
        ({"a.1.layers.0": 0, "a.1.layers.1": 1, "layers.2": 2, "layers.3": 3}, [0, 1, 2, 3]),
        ({"layers.0.experts.1": 3, "layers.1.experts.0": 4, "layers.2": 5, "layers.3": 6}, [3, 4, 5, 6]),
    ],
)
def test_layer_device_map(device_map, want):
    assert get_layer_device_map(dispatched(device_map)) == dict(enumerate(want))


def test_unmapped_layer():
    with pytest.raises(RuntimeError, match="layer 2 has not been mapped"):
        get_layer_device_map(dispatched({"model.layers.0": 0, "model.layers.1": 1}))


def test_cache_is_moved_to_the_layers_devices():
    transformers = pytest.importorskip("transformers")

    def cache():
        filled = transformers.DynamicCache()
        for layer in range(2):
            filled.update(torch.ones(1, 1, 2, 3), torch.ones(1, 1, 2, 3), layer)
        return filled

    model = dispatched({"layers.0": "cpu", "layers.1": "meta"}, layers=2)
    model.hf_device_map["embed"] = "meta"
    moved = cache()
    integrations.map_cache_to_layer_device_map(dispatched({"layers.0": "meta", "layers.1": "meta"}, 2), moved)
    assert [layer.keys.device.type for layer in moved.layers] == ["meta", "meta"]
    both = transformers.EncoderDecoderCache(cache(), transformers.DynamicCache())
    integrations.map_cache_to_layer_device_map(dispatched({"layers.0": "meta", "layers.1": "meta"}, 2), both)
    assert both.self_attention_cache.layers[0].values.device.type == "meta"
    untouched = cache()
    integrations.map_cache_to_layer_device_map(SimpleNamespace(), untouched)
    assert untouched.layers[0].keys.device.type == "cpu"
    integrations.map_cache_to_layer_device_map(model, (1, 2))


def test_init_on_meta():
    with init_empty_weights():
        linear, norm = nn.Linear(2, 2), nn.BatchNorm1d(3)
    assert linear.weight.is_meta and linear.weight.requires_grad and not norm.running_mean.is_meta
    with init_empty_weights(include_buffers=True):
        norm = nn.BatchNorm1d(3)
        assert torch.ones(2).is_meta
    assert norm.running_mean.is_meta and norm.weight.is_meta
    assert not nn.Linear(2, 2).weight.is_meta


def test_init_on_meta_is_left_on_errors_and_can_be_skipped():
    with pytest.raises(KeyError), init_empty_weights():
        raise KeyError
    assert not nn.Linear(2, 2).weight.is_meta

    @integrations.skip_init_on_device
    def make():
        return nn.Linear(2, 2)

    with init_empty_weights():
        assert not make().weight.is_meta
        assert nn.Linear(2, 2).weight.is_meta


class Params4bit(nn.Parameter):
    quant_state = "state"


class Int8Params(nn.Parameter):
    SCB = torch.tensor([127.0, 254.0])


@pytest.fixture
def fake_bnb(monkeypatch):
    bnb = ModuleType("bitsandbytes")
    bnb.functional = SimpleNamespace(dequantize_4bit=lambda data, state: data.float() / 2 if state == "state" else None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", bnb)
    return bnb


def test_dequantisation(fake_bnb):
    linear = nn.Linear(2, 2)
    assert integrations.dequantize_module_weight(linear) is linear.weight
    assert integrations.get_bnb_param_type(linear.weight) is False
    four = SimpleNamespace(weight=Params4bit(torch.full((2, 2), 3.0)))
    assert integrations.get_bnb_param_type(four.weight) == "4bit"
    assert integrations.dequantize_module_weight(four).tolist() == [[1.5, 1.5], [1.5, 1.5]]
    data = torch.tensor([[127, 1], [-127, 2]], dtype=torch.int8)
    eight = SimpleNamespace(weight=Int8Params(data, requires_grad=False), state=SimpleNamespace(SCB=None))
    assert integrations.get_bnb_param_type(eight.weight) == "8bit"
    torch.testing.assert_close(
        integrations.dequantize_module_weight(eight), torch.tensor([[127.0, 1.0], [-254.0, 4.0]])
    )
    with pytest.raises(ValueError, match="No `state`"):
        integrations.dequantize_bnb_weight(eight.weight)
    assert integrations.dequantize_bnb_weight(linear.weight) is linear.weight


def test_other_weights():
    plain = SimpleNamespace(weight=torch.ones(2))
    assert integrations.dequantize_module_weight(plain) is plain.weight
    torchao = pytest.importorskip("torchao.quantization")
    linear, dense = nn.Linear(32, 4), torch.empty(4, 32)
    dense.copy_(linear.weight.detach())
    torchao.quantize_(linear, torchao.Int8WeightOnlyConfig())
    error = (integrations.dequantize_module_weight(linear) - dense).abs().max()
    assert 0 < error < 0.01
    with pytest.raises(TypeError, match="nn.Parameter"):
        integrations.dequantize_module_weight(SimpleNamespace(weight=3))
    hqq = SimpleNamespace(W_q=1, dequantize=lambda: "floats")
    assert integrations.dequantize_module_weight(hqq) == "floats"


def test_gather_does_nothing_without_zero3():
    p = nn.Parameter(torch.ones(2))
    with integrations.gather_params_ctx(p, modifier_rank=None):
        assert p.sum() == 2
    with integrations.gather_params_ctx(iter([p])):
        pass
    assert integrations.check_deepspeed_zero3_enabled() is False


def test_gather_under_zero3(monkeypatch):
    seen = []

    @contextmanager
    def gathered(param, **options):
        seen.append((param, options))
        yield

    stand_in = ModuleType("deepspeed")
    stand_in.zero = SimpleNamespace(GatheredParameters=gathered)
    monkeypatch.setitem(sys.modules, "deepspeed", stand_in)
    monkeypatch.setattr(integrations, "check_deepspeed_zero3_enabled", lambda: True)
    with integrations.gather_params_ctx("p", modifier_rank=None, fwd_module="m"):
        assert seen == [("p", {"modifier_rank": None, "fwd_module": "m"})]


def test_dtensor_like_a_plain_tensor():
    x = torch.ones(2)
    assert integrations.dtensor_from_local_like(x, torch.zeros(3)) is x
    info = integrations.TpInfo(tp_plan={"a": "colwise"}, device_mesh=None, tp_size=2)
    assert info.tp_size == 2


def test_dtensor_like_a_sharded_one():
    from torch import distributed
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        reference = distribute_tensor(torch.zeros(4, 2), init_device_mesh("cpu", (1,)), [Shard(1)])
        made = integrations.dtensor_from_local_like(torch.ones(3, 2), reference)
        assert isinstance(made, DTensor) and made.placements == (Shard(1),)
        assert torch.equal(made.full_tensor(), torch.ones(3, 2))
    finally:
        distributed.destroy_process_group()
