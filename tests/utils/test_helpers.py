# SPDX-License-Identifier: Apache-2.0
"""peft.helpers."""

import inspect

import pytest
import torch
from torch import nn

from peft import LoraConfig, VeraConfig, get_peft_model, helpers, inject_adapter_in_model


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x, scale: float = 1.0):
        """Forward of the net."""
        return self.lin1(torch.relu(self.lin0(x))) * scale

    def generate(self, x, length: int = 2):
        """Generate of the net."""
        return self.forward(x) * length


def lora(**options):
    torch.manual_seed(0)
    config = LoraConfig(**{"target_modules": ["lin0", "lin1"], "init_lora_weights": False, **options})
    return get_peft_model(Net(), config)


X = torch.linspace(-1, 1, 8).reshape(2, 4)


# ---- signatures


def test_signatures_of_the_base_model():
    model = lora()
    before = model(X, scale=2.0)
    assert set(inspect.signature(model.forward).parameters) == {"args", "kwargs"}
    helpers.update_signature(model)
    assert "scale" in inspect.signature(model.forward).parameters
    assert "length" in inspect.signature(model.generate).parameters
    assert model.forward.__doc__ == "Forward of the net."
    assert torch.equal(model(X, scale=2.0), before)
    assert "scale" not in inspect.signature(type(model).forward).parameters  # only this instance


def test_signature_choice():
    model = lora()
    helpers.update_signature(model, "generate")
    assert set(inspect.signature(model.forward).parameters) == {"args", "kwargs"}
    assert "length" in inspect.signature(model.generate).parameters
    with pytest.raises(ValueError, match="method foo is not supported"):
        helpers.update_signature(model, "foo")


def test_check_if_peft_model(tmp_path):
    assert helpers.check_if_peft_model(str(tmp_path)) is False
    LoraConfig(r=3).save_pretrained(str(tmp_path))
    assert helpers.check_if_peft_model(str(tmp_path)) is True


# ---- temporary switches


@pytest.mark.parametrize("plain", [False, True])
def test_rescaled_adapters(plain):
    torch.manual_seed(0)
    if plain:
        model = inject_adapter_in_model(LoraConfig(target_modules=["lin1"], init_lora_weights=False), Net())
        layer, base = model.lin1, None
    else:
        model = lora(target_modules=["lin1"])
        layer = model.base_model.model.lin1
    y = model(X)
    layer.enable_adapters(False)
    base = model(X)
    layer.enable_adapters(True)
    scaling = layer.scaling["default"]
    with helpers.rescale_adapter_scale(model, 2):
        torch.testing.assert_close(model(X), base + 2 * (y - base))
        assert layer.scaling["default"] == 2 * scaling
    assert layer.scaling["default"] == scaling and torch.equal(model(X), y)
    with pytest.raises(KeyError), helpers.rescale_adapter_scale(model, 0.5):
        raise KeyError
    assert layer.scaling["default"] == scaling


def test_rescale_errors():
    with pytest.raises(TypeError, match="multiplier"), helpers.rescale_adapter_scale(lora(), "2"):
        pass
    with pytest.raises(ValueError, match="LoraLayer"), helpers.rescale_adapter_scale(Net(), 2.0):
        pass


@pytest.mark.parametrize("config", [LoraConfig, VeraConfig])
def test_input_casting_is_switched_off_and_restored(config):
    model = get_peft_model(Net(), config(target_modules=["lin0"], r=2))
    layer = model.base_model.model.lin0
    with helpers.disable_input_dtype_casting(model, active=False):
        assert layer.cast_input_dtype_enabled
    with pytest.raises(KeyError), helpers.disable_input_dtype_casting(model):
        assert not layer.cast_input_dtype_enabled
        raise KeyError
    assert layer.cast_input_dtype_enabled


def test_dora_caching():
    from peft.tuners.lora import dora

    assert dora.ENABLE_DORA_CACHING is False
    with helpers.DoraCaching():
        assert dora.ENABLE_DORA_CACHING is True
        with helpers.DoraCaching(enabled=False):
            assert dora.ENABLE_DORA_CACHING is False
        assert dora.ENABLE_DORA_CACHING is True
    assert dora.ENABLE_DORA_CACHING is False
    helpers.DoraCaching()(enabled=True)
    assert dora.ENABLE_DORA_CACHING is True
    helpers.DoraCaching()(enabled=False)
    assert dora.ENABLE_DORA_CACHING is False


def test_montecarlo_loss_is_added(monkeypatch):
    class Trainer:
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss = torch.tensor(1.0)
            return (loss, "outputs") if return_outputs else loss

    class Mixed(helpers.MontecloraTrainerMixin, Trainer):
        pass

    model = lora()
    monkeypatch.setattr(type(model.base_model), "_get_monteclora_loss", lambda self: torch.tensor(0.25), raising=False)
    assert Mixed().compute_loss(model, {}) == 1.25
    loss, outputs = Mixed().compute_loss(model, {}, return_outputs=True)
    assert loss == 1.25 and outputs == "outputs"
    assert Mixed().compute_loss(Net(), {}) == 1.0


# ---- condition numbers


def conditioned(ratio, rows=4, columns=3):
    """A matrix with singular values from 1 to 1 / ratio."""
    g = torch.Generator().manual_seed(int(ratio))
    Q = torch.linalg.qr(torch.randn(rows, rows, generator=g))[0][:, :columns]
    P = torch.linalg.qr(torch.randn(columns, columns, generator=g))[0]
    return Q * torch.linspace(1, 1 / ratio, columns) @ P


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.stack([conditioned(2), conditioned(4)]))
        self.down_proj = nn.Parameter(torch.stack([conditioned(2), conditioned(2)]))
        self.router = nn.Parameter(torch.ones(2, 2, 2))


def ranked():
    model = nn.ModuleDict({name: nn.Linear(3, 4) for name in "abc"})
    for name, ratio in (("a", 20), ("b", 3), ("c", 7)):
        model[name].weight.data = conditioned(ratio)
    model["experts"] = Experts()
    model["wide"] = nn.Linear(50, 2)
    return model


def test_kappa_selector():
    selector = helpers.KappaTuneSelector(ranked(), max_dim_size_to_analyze=10, show_progress=False)
    assert selector.get_best_targets() == ["b", "c", "a"]
    assert selector.get_best_targets(num_modules=2, top_p=0.1) == ["b", "c"]
    assert selector.get_best_targets(top_p=0.1) == ["b"] and selector.get_best_targets(top_p=0.7) == ["b", "c"]
    assert selector.get_best_targets(threshold=7.5) == ["b", "c"] and selector.get_best_targets(threshold=1) == []
    assert selector.get_best_targets(num_modules=9) == ["b", "c", "a"]
    modules, parameters = selector._module_kappas, selector._parameter_kappas
    assert modules == pytest.approx({"a": 20, "b": 3, "c": 7}, rel=1e-3)
    assert parameters == pytest.approx({"experts.gate_up_proj": 3, "experts.down_proj": 2}, rel=1e-3)
    assert selector.get_best_target_parameters(top_p=0.5) == ["experts.down_proj"]


def test_kappa_targets():
    found = helpers.find_kappa_target_modules(ranked(), top_p=0.5, max_dim_size_to_analyze=10, show_progress=False)
    assert found == {"target_modules": ["b"], "target_parameters": ["experts.down_proj"]}
    found = helpers.find_kappa_target_modules(nn.Sequential(nn.Linear(3, 3)), show_progress=False)
    assert found == {"target_modules": ["0"], "target_parameters": None}
    found = helpers.find_kappa_target_modules(ranked(), moe_param_suffixes=(".router",), show_progress=False)
    assert found["target_parameters"] == ["experts.router"]
