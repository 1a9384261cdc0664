"""LoRA initialisations from data: CorDA, LoRA-GA, EVA."""

import sys
import types
import warnings

import pytest
import torch
from tests.methods.test_lora_variants import BaseQuantLinear
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
from peft.tuners.lora import LoraLayer, eva
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda, target_modules


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6))


x8 = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))


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


# ---- what is refused, and rare options of all three
def test_default_targets_and_quantised_layers(monkeypatch):
    base = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "v_proj": nn.Linear(8, 8), "k_proj": nn.Linear(8, 8)})
    cfg = LoraConfig(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    base.config = {"model_type": "llama"}
    preprocess_loraga(base, cfg, lambda: (base["q_proj"](x8) + base["v_proj"](x8)).sum().backward())
    assert cfg.target_modules == {"q_proj", "v_proj"} and hasattr(base["v_proj"], "_peft_loraga_grad")
    base.config = {"model_type": "unheard_of"}
    with pytest.raises(ValueError, match="`target_modules`.* no defaults for model type 'unheard_of'"):
        preprocess_loraga(base, LoraConfig(lora_ga_config=LoraGAConfig()), lambda: None)
    with pytest.raises(ValueError, match="found no supported target layer"):
        preprocess_loraga(mlp(), config("lora_ga", target_modules=["1"], lora_ga_config=LoraGAConfig()), lambda: None)
    monkeypatch.setitem(sys.modules, "gptqmodel", types.ModuleType("gptqmodel"))
    base = nn.Sequential(BaseQuantLinear(), nn.Identity(), nn.Linear(8, 8))
    for run in (preprocess_corda, lambda model, cfg: preprocess_loraga(model, cfg, lambda: None)):
        with pytest.raises(ValueError, match="needs float weights, '0' is quantised"):
            run(base, config("corda", corda_config=CordaConfig(), lora_ga_config=LoraGAConfig()))


def test_a_cache_of_other_layers_is_named(tmp_path):
    torch.save({"0._peft_loraga_grad": torch.ones(12, 8)}, tmp_path / "cache.pt")
    with pytest.raises(ValueError, match="cache.pt lacks '2._peft_loraga_grad': it was made for other layers"):
        preprocess_loraga(
            mlp(), config("lora_ga", lora_ga_config=LoraGAConfig()), lambda: None, str(tmp_path / "cache.pt")
        )


def test_corda_refuses_data_that_say_nothing(tmp_path):
    base, data = mlp(), batches()
    cfg = config("corda", target_modules=["0"])
    with pytest.raises(ValueError, match="cannot be inverted"):
        preprocess_corda(base, cfg, run_model=lambda: base(torch.zeros(4, 8)))
    with pytest.raises(ValueError, match="covariance matrix of '0' .NaN"):
        preprocess_corda(base, cfg, run_model=lambda: base(data[0] / 0))
    with pytest.raises(ValueError, match="never called '0'"):
        preprocess_corda(base, cfg, run_model=lambda: base[2](torch.ones(1, 12)))
    with pytest.raises(ValueError, match="`hooked_model` has no layer '0'"):
        preprocess_corda(base, cfg, run_model=lambda: None, hooked_model=nn.ModuleDict())
    with pytest.raises(ValueError, match="`corda_config` must be given"):
        preprocess_corda(base, LoraConfig(target_modules=["0"]), run_model=lambda: base(data[0]))
    assert dict(target_modules(base, cfg)) == {"0": base[0]}
    cfg.corda_config.prune_temporary_fields = False
    preprocess_corda(base, cfg, run_model=lambda: base(data[0]))
    x = data[0] / data[0].abs().max()
    torch.testing.assert_close(base[0].covariance_matrix, x.T @ x)
    with pytest.raises(ValueError, match=r"U_WC is \(12, 2\), expected \(12, 3\); was the rank the same"):
        get_peft_model(base, config("corda", target_modules=["0"], r=3))
    base[0].eigens.S_WC[0] = torch.inf
    with pytest.raises(ValueError, match="Invalid value found in the CorDA decomposition"):
        get_peft_model(base, cfg)


def test_loraga_on_convolutions_large_ranks_and_without_its_options():
    base = nn.Sequential(nn.Conv1d(8, 8, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = get_peft_model(base, config("lora_ga", target_modules=["0"])).base_model.model[0]
    assert not layer.lora_B["default"].weight.any() and layer.lora_A["default"].weight.any()
    for kwargs, message in (({}, "`lora_ga_config` must be given"), ({"r": 4}, r"2·r <= min\(in, out\) = 6, got r=4")):
        base = mlp()
        base[2]._peft_loraga_grad = torch.ones(6, 12)
        options = {"lora_ga_config": LoraGAConfig()} if kwargs else {}
        with pytest.raises(ValueError, match=message):
            get_peft_model(base, config("lora_ga", target_modules=["2"], **kwargs, **options))


def test_eva_counts_tokens_that_are_attended_to_and_have_a_label():
    cfg = config("eva", eva_config=EvaConfig())
    ids, mask = torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 0], [1, 1, 1]])
    labels = torch.tensor([[-100, 5, 5], [5, -100, 5]])
    count = eva.prepare_model_inputs_fn_language_modeling
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    assert count(batch, cfg).tolist() == [[0, 1], [1, 0], [1, 2]]
    assert len(count({"input_ids": ids}, cfg)) == 6 and count({"pixel_values": ids}, cfg) is None
    x = torch.randn(2, 3, 4)
    rows = eva.prepare_layer_inputs_fn_language_modeling
    torch.testing.assert_close(rows((x,), count(batch, cfg), "a"), x[[0, 1, 1], [1, 0, 2]])
    assert torch.equal(rows(x, None, "a"), x.reshape(6, 4))
    with pytest.raises(ValueError, match="needs batches that are dicts"):
        count([ids], cfg)


@pytest.mark.parametrize("rho", [1.0, 5000.0])
def test_eva_options(rho):
    """Whitened components, a function for one layer, batches in a list; a huge rho means the widest layer."""
    data, cfg = [[x] for x in batches()], config("eva", eva_config=EvaConfig(rho=rho))
    call = EVA | {"forward_fn": lambda model, batch: model(batch[0])}
    call["prepare_layer_inputs_fn"] = {"0": lambda layer_input, model_input, name: layer_input[0]}
    plain = get_eva_state_dict(mlp(), data, cfg, **call)
    assert sum(len(A) for A in plain.values()) == 4
    cfg.eva_config.whiten = True
    for name, A in get_eva_state_dict(mlp(), data, cfg, **call).items():
        directions = torch.nn.functional.normalize(A, dim=1)
        torch.testing.assert_close(directions, plain[name])
        assert (A.norm(dim=1).diff() >= 0).all()  # divided by singular values, the largest first


@pytest.mark.parametrize("r", [2, {"0": 8}])
def test_eva_ends_where_batches_have_too_few_rows(monkeypatch, capsys, r):
    """Also where only one of the layers waits for more rows in vain."""
    monkeypatch.setattr(eva, "_MOST_FRUITLESS", 3)
    options = {"rank_pattern": r} if isinstance(r, dict) else {}
    cfg = config("eva", eva_config=EvaConfig(rho=1.0), **options)
    data = batches(rows=4 if options else 1)
    with pytest.raises(ValueError, match=f"fewer rows than the {8 if options else 2} components .* for '0'"):
        get_eva_state_dict(mlp(), data, cfg, **EVA)
    assert capsys.readouterr().out.count("skipping SVD for 0") == 1


def test_more_eva_errors():
    model = eva_model()
    with pytest.raises(ValueError, match="Adapter 'b' does not exist"):
        initialize_lora_eva_weights(model, batches(), adapter_name="b")
    with pytest.raises(ValueError, match="`eva_config` must be given"):
        get_eva_state_dict(mlp(), batches(), LoraConfig(target_modules=["0"]), **EVA)
    with pytest.raises(ValueError, match="No linear layer"):
        get_eva_state_dict(mlp(), batches(), config("eva", target_modules=["1"]), **EVA)
    with pytest.raises(ValueError, match="never called 'base_model.model.2'"):
        get_eva_state_dict(model, batches(), **EVA | {"forward_fn": lambda m, x: m.base_model.model[0](x)})
    model.add_adapter("b", config("eva"))
    model.base_model.set_adapter(["default", "b"])
    with pytest.raises(ValueError, match="single active adapter"):
        initialize_lora_eva_weights(model, batches())
