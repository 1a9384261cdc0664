"""LoRA initialisations from data: CorDA, LoRA-GA, EVA."""

import pytest
import torch
from torch import nn

from peft import (
    EvaConfig,
    LoraConfig,
    LoraGAConfig,
    get_eva_state_dict,
    get_peft_model,
    initialize_lora_eva_weights,
    preprocess_loraga,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6))


def batches(n: int = 6, rows: int = 20) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    spread = torch.linspace(3, 0.1, 8)
    return [torch.randn(rows, 8, generator=generator) * spread for _ in range(n)]


def config(scheme: str, **kwargs) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 3, "init_lora_weights": scheme, "target_modules": ["0", "2"], **kwargs})


# ---- CorDA
@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_changes_no_output_and_caches(tmp_path, method):
    data = batches()
    cache, covariance = str(tmp_path / "c" / "cache.pt"), str(tmp_path / "cov.pt")
    base = mlp()
    expected = base(data[0])
    cfg = config("corda", corda_config=CordaConfig(corda_method=method, cache_file=cache, covariance_file=covariance))
    preprocess_corda(base, cfg, run_model=lambda: [base(x) for x in data])
    model = get_peft_model(base, cfg)
    torch.testing.assert_close(model(data[0]), expected, rtol=1e-4, atol=1e-4)
    assert not hasattr(model.base_model.model[0].base_layer, "eigens")
    for options in (
        CordaConfig(corda_method=method, cache_file=cache),
        CordaConfig(corda_method=method, covariance_file=covariance),
    ):
        base = mlp()
        cfg = config("corda", corda_config=options)
        preprocess_corda(base, cfg)
        again = get_peft_model(base, cfg)
        for (name, p), q in zip(again.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4, msg=name)


def test_corda_errors():
    base, data = mlp(), batches()
    cfg = config("corda", corda_config=CordaConfig())
    with pytest.raises(ValueError, match="preprocess_corda"):
        get_peft_model(base, cfg)
    assert type(base[0]) is nn.Linear
    with pytest.raises(ValueError, match="run_model"):
        preprocess_corda(base, cfg)
    with pytest.raises(RuntimeError, match="batch size of 1"):
        preprocess_corda(base, cfg, run_model=lambda: base(data[0].reshape(2, 10, 8)))
    with pytest.raises(ValueError, match="smallest dimension"):
        preprocess_corda(base, config("corda", r=7, corda_config=CordaConfig()), run_model=lambda: base(data[0]))
    with pytest.raises(ValueError, match="corda_method"):
        preprocess_corda(
            base, config("corda", corda_config=CordaConfig(corda_method="x")), run_model=lambda: base(data[0])
        )
    assert not base[0]._forward_hooks


# ---- LoRA-GA
@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r", "random"])
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
def test_loraga_changes_no_output(direction, scale):
    data, base = batches(), mlp()
    expected = base(data[0]).detach()
    cfg = config("lora_ga", lora_ga_config=LoraGAConfig(direction=direction, scale=scale))
    preprocess_loraga(base, cfg, lambda: [base(x).square().sum().backward() for x in data])
    assert all(p.requires_grad and p.grad is None for p in base.parameters())
    model = get_peft_model(base, cfg)
    torch.testing.assert_close(model(data[0]), expected, rtol=1e-4, atol=1e-4)
    assert model.base_model.model[0].lora_B["default"].weight.abs().sum() > 0
    assert not hasattr(model.base_model.model[0].base_layer, "_peft_loraga_grad")


def test_loraga_measures_the_mean_gradient_and_caches(tmp_path):
    data, base = batches(2), mlp()
    cfg = config("lora_ga", lora_ga_config=LoraGAConfig())
    cache = str(tmp_path / "grad.pt")
    preprocess_loraga(base, cfg, lambda: [base(x).square().sum().backward() for x in data], cache_file=cache)
    loss = sum(base(x).square().sum() for x in data) / 2
    expected = torch.autograd.grad(loss, base[0].weight)[0]
    torch.testing.assert_close(base[0]._peft_loraga_grad, expected)
    other = mlp()
    preprocess_loraga(other, cfg, lambda: pytest.fail("the cache was not used"), cache_file=cache)
    torch.testing.assert_close(other[2]._peft_loraga_grad, base[2]._peft_loraga_grad)


def test_loraga_errors_and_default_without_gradient():
    base = mlp()
    with pytest.raises(ValueError, match="lora_ga_config"):
        preprocess_loraga(base, config("lora_ga"), lambda: None)
    with pytest.raises(ValueError, match="no gradient"):
        preprocess_loraga(base, config("lora_ga", lora_ga_config=LoraGAConfig()), lambda: None)
    assert all(p.requires_grad for p in base.parameters())
    model = get_peft_model(base, config("lora_ga", lora_ga_config=LoraGAConfig()))
    assert model.base_model.model[0].lora_B["default"].weight.abs().sum() == 0


# ---- EVA
EVA = {"forward_fn": lambda model, x: model(x), "prepare_model_inputs_fn": None, "show_progress_bar": False}
EVA["prepare_layer_inputs_fn"] = lambda layer_input, model_input, name: layer_input[0]


def eva_model(**kwargs):
    return get_peft_model(mlp(), config("eva", **{"eva_config": EvaConfig(rho=1.0), **kwargs}), low_cpu_mem_usage=False)


def test_eva_finds_the_leading_directions_of_the_inputs():
    model, data = eva_model(), batches()
    state = get_eva_state_dict(model, data, **EVA)
    assert set(state) == {"base_model.model.0", "base_model.model.2"}
    A = state["base_model.model.0"]
    torch.testing.assert_close(A @ A.T, torch.eye(2), rtol=1e-4, atol=1e-4)
    rows = torch.cat(data)
    leading = torch.linalg.svd(rows - rows.mean(0)).Vh[:2]
    assert torch.linalg.matrix_norm(leading @ A.T, 2) > 0.99
    expected = model(data[0])
    initialize_lora_eva_weights(model, eva_state_dict=state)
    layer = model.base_model.model[0]
    torch.testing.assert_close(layer.lora_A["default"].weight.data, A)
    torch.testing.assert_close(model(data[0]), expected)


def test_eva_on_an_unwrapped_model_gives_the_same():
    data, cfg = batches(), config("eva", eva_config=EvaConfig(rho=1.0))
    plain = get_eva_state_dict(mlp(), data, cfg, **EVA)
    wrapped = get_eva_state_dict(eva_model(), data, **EVA)
    for name in ("0", "2"):
        torch.testing.assert_close(plain[name], wrapped["base_model.model." + name])


def test_eva_redistributes_ranks():
    model = eva_model(eva_config=EvaConfig(rho=2.0))
    initialize_lora_eva_weights(model, batches(), **EVA)
    cfg = model.peft_config["default"]
    layers = {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, LoraLayer)}
    assert sum(m.r["default"] for m in layers.values()) == 4
    assert set(cfg.target_modules) == set(layers)
    for name, layer in layers.items():
        assert layer.scaling["default"] == 1.5 and layer.lora_A["default"].weight.requires_grad
        assert cfg.rank_pattern.get(name, 2) == layer.r["default"]


def test_rank_zero_takes_the_layer_off_and_missing_entries_warn():
    model = eva_model()
    with pytest.warns(UserWarning, match="no entry"):
        initialize_lora_eva_weights(model, eva_state_dict={"0": torch.zeros(0, 8)})
    assert type(model.base_model.model[0]) is nn.Linear and isinstance(model.base_model.model[2], LoraLayer)
    assert model.peft_config["default"].target_modules == ["2"]
    assert model(batches()[0]).shape == (20, 6)


def test_eva_errors():
    with pytest.raises(ValueError, match="PeftModel"):
        initialize_lora_eva_weights(mlp(), batches())
    model = eva_model()
    with pytest.raises(ValueError, match="dataloader is required"):
        initialize_lora_eva_weights(model)
    with pytest.raises(ValueError, match="empty"):
        get_eva_state_dict(model, [], **EVA)
    with pytest.raises(ValueError, match="an iterator does not do"):
        get_eva_state_dict(model, iter(batches(2)), **EVA)
    with pytest.raises(ValueError, match="peft_config"):
        get_eva_state_dict(mlp(), batches(), **EVA)
    with pytest.raises(ValueError, match="no target module"):
        get_eva_state_dict(model, batches(), **{**EVA, "prepare_layer_inputs_fn": {"nope": None}})
    model = get_peft_model(mlp(), LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="init_lora_weights='eva'"):
        initialize_lora_eva_weights(model, batches())
