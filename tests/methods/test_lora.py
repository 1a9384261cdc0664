"""LoRA: kinds, initialisations, scaling, raw parameters, attention, replication, tied layers, weighted combination."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from peft import BdLoraConfig, LoftQConfig, LoraConfig, LoraRuntimeConfig, get_peft_model
from peft.tuners.lora import Conv2d, Embedding, KasaConfig, Linear, LoraLayer, LoraModel, ParamWrapper, init


class Net(nn.Module):
    def __init__(self, *layers: nn.Module):
        super().__init__()
        for i, layer in enumerate(layers):
            self.add_module(f"lin{i}", layer)

    def forward(self, x):
        for layer in self.children():
            x = layer(x)
        return x


class Experts(nn.Module):
    """[E, out, in] summed over experts; `is_transposed` for [E, in, out]."""

    def __init__(self, num: int = 3, n_in: int = 6, n_out: int = 5, swapped: bool = False):
        super().__init__()
        self.is_transposed = swapped
        self.weight = nn.Parameter(torch.randn(num, *((n_in, n_out) if swapped else (n_out, n_in))))
        self.gate = nn.Parameter(torch.randn(num, n_in))

    def forward(self, x):
        p = torch.softmax(x @ self.gate.T, -1)
        form = "...i,eio->...eo" if self.is_transposed else "...i,eoi->...eo"
        return (torch.einsum(form, x, self.weight) * p[..., None]).sum(-2)


def mlp() -> Net:
    torch.manual_seed(0)
    return Net(nn.Linear(8, 12), nn.Linear(12, 6))


def randomise(model: nn.Module, scale: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(5)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = (torch.randn(p.shape, generator=generator) * scale).to(p)


def layer_of(model: nn.Module, key: str) -> LoraLayer:
    return model.base_model.model.get_submodule(key)


x8 = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


# ---- kinds
def test_grouped_dilated_circular_convolution_runs_and_refuses_to_merge():
    torch.manual_seed(0)
    base = Net(nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2, padding_mode="circular", stride=2))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["lin0"]))
    randomise(model)
    x = torch.randn(2, 4, 9, 9)
    layer = layer_of(model, "lin0")
    assert isinstance(layer, Conv2d)
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    expected = layer.base_layer(x) + B(A(x)) * layer.scaling["default"]
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(NotImplementedError, match="grouped"):
        model.merge_adapter()


def test_groups_need_a_fitting_rank():
    with pytest.raises(ValueError, match="multiple of the groups"):
        get_peft_model(Net(nn.Conv2d(4, 6, 3, groups=2)), LoraConfig(r=3, target_modules=["lin0"]))


@pytest.mark.parametrize("dilation, mode", [(2, "zeros"), (1, "reflect"), (2, "circular")])
def test_convolution_merges_with_dilation_and_padding_mode(dilation, mode):
    torch.manual_seed(0)
    model = get_peft_model(
        Net(nn.Conv1d(4, 6, 3, padding=2, dilation=dilation, padding_mode=mode)),
        LoraConfig(r=2, target_modules=["lin0"]),
    )
    randomise(model)
    x = torch.randn(2, 4, 9)
    before = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


def test_embedding_ignores_dropout_and_scales_like_its_base():
    class Scaled(nn.Embedding):
        embed_scale = torch.tensor(3.0)

        def forward(self, ids):
            return super().forward(ids) * self.embed_scale

    model = get_peft_model(Net(Scaled(10, 4)), LoraConfig(r=2, lora_dropout=0.5, target_modules=["lin0"]))
    randomise(model)
    ids = torch.tensor([[1, 2, 9]])
    layer = layer_of(model, "lin0")
    assert isinstance(layer, Embedding)
    delta = (layer.lora_embedding_B["default"] @ layer.lora_embedding_A["default"]).T[ids] * layer.scaling["default"]
    torch.testing.assert_close(model.train()(ids), layer.base_layer(ids) + 3 * delta)


def test_attention_counts_out_proj_twice_in_value_and_once_in_gradient():
    torch.manual_seed(0)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.mha(x, x, x, need_weights=False)[0]

    base = Attention()
    reference = copy.deepcopy(base)
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=2, target_modules=["mha"]))
    randomise(model)
    outer = layer_of(model, "mha")
    inner = outer.base_layer.out_proj
    assert repr(inner).startswith("lora.Linear(")
    with torch.no_grad():
        reference.mha.in_proj_weight += outer.lora_B["default"].weight @ outer.lora_A["default"].weight
        reference.mha.out_proj.weight += 2 * inner.lora_B["default"].weight @ inner.lora_A["default"].weight
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(model(x), reference(x))
    model(x).square().sum().backward()
    reference(x).square().sum().backward()
    once = reference.mha.out_proj.weight.grad @ inner.lora_A["default"].weight.T
    torch.testing.assert_close(inner.lora_B["default"].weight.grad, once, rtol=1e-4, atol=1e-4)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), reference(x))
    assert type(merged.mha) is nn.MultiheadAttention and not isinstance(merged.mha.out_proj, LoraLayer)


def test_bias_of_an_attention_output_is_there_before_merging():
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True)), torch.randn(2, 5, 8)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"], lora_bias=True))
    randomise(model)
    attention = layer_of(model, "0")
    bias = attention.base_layer.out_proj.lora_B["default"].bias
    with torch.no_grad():
        bias.normal_()
    before = attention(x, x, x)[0]
    before.sum().backward()
    torch.testing.assert_close(bias.grad, torch.full((8,), 10.0 * attention.base_layer.out_proj.scaling["default"]))
    model.merge_adapter()
    torch.testing.assert_close(attention(x, x, x)[0], before)


# ---- raw parameters
@pytest.mark.parametrize("swapped", [False, True])
def test_experts_layout(swapped):
    model = get_peft_model(
        Net(Experts(swapped=swapped)), LoraConfig(r=2, lora_alpha=2, target_modules=[], target_parameters=["weight"])
    )
    randomise(model)
    layer = layer_of(model, "lin0")
    assert isinstance(layer, ParamWrapper) and layer.parameter_name == "weight"
    A = layer.lora_A["default"].weight.reshape(3, 2, 6)
    B = layer.lora_B["default"].weight.reshape(5, 2, 3)
    delta = torch.stack([B[:, :, e] @ A[e] for e in range(3)])
    delta = delta.transpose(1, 2) if swapped else delta
    torch.testing.assert_close(layer.get_delta_weight("default"), delta)
    x = torch.randn(4, 6)
    reference = copy.deepcopy(layer.base_layer)
    reference.weight.data += delta
    torch.testing.assert_close(model(x), reference(x))


def test_two_parameters_nest_and_two_adapters_add():
    torch.manual_seed(0)
    cfg = {"target_modules": [], "target_parameters": ["lin0.weight", "lin0.gate"]}
    model = get_peft_model(Net(Experts()), LoraConfig(r=2, **cfg))
    model.add_adapter("b", LoraConfig(r=3, **cfg))
    randomise(model)
    names = [n for n, _ in model.named_parameters() if ".default." in n]
    assert any("lin0.base_layer.lora_A" in n for n in names) and any("lin0.lora_A" in n for n in names)
    model.base_model.set_adapter(["default", "b"])
    x = torch.randn(4, 6)
    before = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="same `target_parameters`"):
        model.add_adapter("c", LoraConfig(target_modules=[], target_parameters=["lin0.gate"]))


def test_mixed_batch_of_nested_parameters():
    cfg = {"target_modules": [], "target_parameters": ["lin0.weight", "lin0.gate"]}
    model = get_peft_model(Net(Experts()), LoraConfig(r=2, **cfg))
    model.add_adapter("b", LoraConfig(r=3, **cfg))
    randomise(model.eval())
    x, expected = torch.randn(3, 6), []
    for row, name in zip(x, ("default", "b"), strict=False):
        model.set_adapter(name)
        expected.append(model(row[None]))
    with model.disable_adapter():
        expected.append(model(x[2:]))
    model.set_adapter("default")
    torch.testing.assert_close(model(x, adapter_names=["default", "b", "__base__"]), torch.cat(expected))


def test_dropout_on_a_parameter_is_one_mask_for_all_tokens_and_does_not_touch_merging():
    torch.manual_seed(0)
    model = get_peft_model(
        Net(Experts()), LoraConfig(r=2, lora_dropout=0.5, target_modules=[], target_parameters=["lin0.weight"])
    )
    randomise(model)
    x = torch.randn(1, 6).expand(4, 6)
    y = model.train()(x)
    torch.testing.assert_close(y, y[:1].expand_as(y))
    assert not torch.allclose(y, model(x))
    layer = layer_of(model, "lin0")
    f = layer.factors("default")
    torch.testing.assert_close(layer.get_delta_weight("default"), layer.product(f).detach())


def test_a_float8_parameter_is_added_to_in_float32_and_stays_in_range():
    dtype, worst = torch.float8_e4m3fn, torch.finfo(torch.float8_e4m3fn).max
    weight = nn.Parameter(torch.tensor([[1.0, worst], [0.5, -worst]]).to(dtype), requires_grad=False)
    layer = ParamWrapper(nn.ParameterDict({"w": weight}), "default", "w", LoraConfig(r=2, lora_alpha=2))
    assert layer.parameter_name == "w" and layer.lora_A["default"].weight.shape == (2, 2)
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = torch.eye(2), torch.eye(2).flip(0) * 64
    with layer._activate_lora(["default", "not here"]):
        found = layer.base_layer["w"]
    assert found.dtype == dtype and found.tolist() == [[1.0, worst], [64.0, -worst]]
    assert layer.base_layer["w"] is weight


# ---- initialisations
@pytest.mark.parametrize(
    "scheme", ["pissa", "pissa_niter_8", "olora", "orthogonal", "gaussian", True, "PISSA", "OLoRA"]
)
def test_initialisation_changes_no_output(scheme):
    base = mlp()
    expected = base(x8)
    model = get_peft_model(
        base, LoraConfig(r=2, lora_alpha=5, init_lora_weights=scheme, target_modules=["lin0", "lin1"])
    )
    torch.testing.assert_close(model(x8), expected, rtol=1e-5, atol=1e-5)


def test_pissa_takes_the_principal_part_out_of_the_base():
    base = mlp()
    W = base.lin0.weight.detach().clone()
    model = get_peft_model(base, LoraConfig(r=3, lora_alpha=7, init_lora_weights="pissa", target_modules=["lin0"]))
    layer = layer_of(model, "lin0")
    U, S, Vh = torch.linalg.svd(W)
    torch.testing.assert_close(layer.get_delta_weight("default"), (U[:, :3] * S[:3]) @ Vh[:3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.base_layer.weight + layer.get_delta_weight("default"), W, rtol=1e-5, atol=1e-6)


def test_olora_on_conv1d_and_half_precision():
    from transformers.pytorch_utils import Conv1D

    base = Net(Conv1D(12, 8)).to(torch.bfloat16)
    W = base.lin0.weight.detach().clone()
    model = get_peft_model(base, LoraConfig(r=2, init_lora_weights="olora", target_modules=["lin0"]))
    layer = layer_of(model, "lin0")
    assert layer.lora_A["default"].weight.shape == (2, 8) and layer.lora_A["default"].weight.dtype == torch.float32
    assert model.peft_config["default"].fan_in_fan_out is True
    torch.testing.assert_close(
        layer.base_layer.weight + layer.get_delta_weight("default").bfloat16(), W, rtol=0.02, atol=0.002
    )


@pytest.mark.parametrize("bits, worst", [(4, 0.2), (8, 0.02)])
def test_loftq_approximates_the_weight(bits, worst):
    base = mlp()
    W = base.lin0.weight.detach().clone()
    cfg = LoraConfig(
        r=4,
        lora_alpha=4,
        init_lora_weights="loftq",
        loftq_config={"loftq_bits": bits, "loftq_iter": 3},
        target_modules=["lin0"],
    )
    layer = layer_of(get_peft_model(base, cfg), "lin0")
    quantised = (layer.base_layer.weight - W).norm() / W.norm()
    corrected = (layer.base_layer.weight + layer.get_delta_weight("default") - W).norm() / W.norm()
    assert 0 < corrected < quantised < worst


def test_mica_freezes_b():
    model = get_peft_model(mlp(), LoraConfig(r=2, init_lora_weights="mica", target_modules=["lin0"]))
    layer = layer_of(model, "lin0")
    assert not layer.lora_B["default"].weight.requires_grad and layer.lora_A["default"].weight.requires_grad
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    model.set_adapter("default")
    assert not layer.lora_B["default"].weight.requires_grad and layer.lora_A["default"].weight.requires_grad
    U = torch.linalg.svd(layer.base_layer.weight, full_matrices=False).U
    torch.testing.assert_close(layer.lora_B["default"].weight.abs(), U[:, -2:].abs())


def test_unknown_scheme_names_the_nearest_and_changes_nothing():
    base = mlp()
    with pytest.raises(ValueError, match="Did you mean 'pissa'"):
        get_peft_model(base, LoraConfig(init_lora_weights="pisa", target_modules=["lin0"]))
    assert type(base.lin0) is nn.Linear


def test_scheme_that_reads_an_integer_weight():
    class Packed(nn.Linear):
        pass

    base = Net(Packed(8, 12))
    base.lin0.weight = nn.Parameter(torch.zeros(12, 8, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match="float weight"):
        get_peft_model(base, LoraConfig(r=2, init_lora_weights="pissa", target_modules=["lin0"]))


def test_failing_rank_leaves_the_base_weight_alone():
    base = mlp()
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(ValueError, match="smallest dimension"):
        get_peft_model(base, LoraConfig(r=7, init_lora_weights="pissa", target_modules=["lin0", "lin1"]))
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())


def test_meta_initialisation_costs_no_random_numbers():
    with torch.device("meta"):
        base = mlp()
    state = torch.get_rng_state()
    model = get_peft_model(
        base, LoraConfig(init_lora_weights="pissa", r=2, target_modules=["lin0"]), low_cpu_mem_usage=True
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.device.type == "meta" for p in model.parameters())


# ---- configuration
def test_sub_configs_and_serialisation(tmp_path):
    cfg = LoraConfig(
        eva_config={"rho": 3.0}, init_lora_weights="eva", target_modules=["b", "a"], use_bdlora={"nblocks": 2}
    )
    assert cfg.eva_config.rho == 3.0 and cfg.use_bdlora.nblocks == 2
    assert "runtime_config" not in cfg.to_dict()
    cfg.save_pretrained(tmp_path)
    again = LoraConfig.from_pretrained(tmp_path)
    assert again.eva_config == cfg.eva_config and again.target_modules == {"a", "b"}


@pytest.mark.parametrize(
    "kwargs, error",
    [
        ({"use_dora": True, "lora_bias": True}, ValueError),
        ({"lora_bias": True, "init_lora_weights": "pissa"}, ValueError),
        ({"target_parameters": "weight"}, TypeError),
        ({"eva_config": 3, "init_lora_weights": "eva"}, TypeError),
        ({"init_lora_weights": "loftq"}, ValueError),
        ({"use_dora": True, "megatron_config": {"a": 1}}, ValueError),
        ({"layers_pattern": "h", "target_modules": ["a"]}, ValueError),
        ({"loftq_config": 3}, TypeError),
        ({"eva_config": {"rho": 0.5}}, ValueError),
        ({"use_bdlora": {"target_modules_bd_a": ["q"], "target_modules_bd_b": ["q"]}}, ValueError),
    ],
)
def test_invalid_options(kwargs, error):
    with pytest.raises(error):
        LoraConfig(**kwargs)


@pytest.mark.parametrize(
    "scheme, layer, options, error, match",
    [
        (
            "pissa",
            nn.Conv1d(4, 4, 1),
            {},
            ValueError,
            r"for '0' \(Conv1d\); convolutions take True, False and 'gaussian'",
        ),
        ("pissa", nn.MultiheadAttention(4, 2), {}, ValueError, "attention modules and raw parameters take True, False"),
        ("orthogonal", nn.Linear(4, 4), {"r": 3}, ValueError, "rank to be even, got 3"),
    ],
)
def test_schemes_that_a_layer_cannot_have(scheme, layer, options, error, match):
    base = nn.Sequential(layer)
    with pytest.raises(error, match=match):
        get_peft_model(base, LoraConfig(**{"r": 2, "target_modules": ["0"], "init_lora_weights": scheme, **options}))
    assert base[0] is layer


def test_options_without_effect_warn():
    with pytest.warns(UserWarning, match="loftq_config"):
        cfg = LoraConfig(loftq_config={"loftq_bits": 8})
    assert cfg.loftq_config == {}
    with pytest.warns(UserWarning, match="eva_config"):
        assert LoraConfig(init_lora_weights="eva").eva_config is not None
    with pytest.warns(UserWarning, match="cannot be converted to one for the unchanged base model later"):
        LoraConfig(init_lora_weights="olora", use_rslora=True, rank_pattern={"a": 2})
    with pytest.warns(UserWarning, match="megatron_config has no effect"):
        get_peft_model(mlp(), LoraConfig(target_modules=["lin0"], megatron_config={"a": 1}))
    cfg = LoraConfig(runtime_config=None, loftq_config=LoftQConfig(loftq_bits=8), init_lora_weights="loftq")
    assert cfg.runtime_config == LoraRuntimeConfig() and cfg.loftq_config == {"loftq_bits": 8, "loftq_iter": 1}


# ---- layers
def test_scaling():
    model = get_peft_model(mlp(), LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["lin0"]))
    layer = layer_of(model, "lin0")
    assert layer.scaling["default"] == 3.0
    layer.scale_layer(2)
    assert layer.scaling["default"] == 6.0
    layer.unscale_layer(4)
    assert layer.scaling["default"] == 1.5
    layer.unscale_layer()
    layer.set_scale("default", 0.5)
    layer.set_scale("other", 7)
    assert layer.scaling == {"default": 1.5}


def test_lora_bias():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(mlp(), LoraConfig(r=2, lora_bias=True, target_modules=["lin0"]))
    randomise(model)
    before = model(x8)
    model.merge_adapter()
    torch.testing.assert_close(model(x8), before, rtol=1e-5, atol=1e-5)
    with pytest.warns(UserWarning, match="has no bias"):
        model = get_peft_model(
            Net(nn.Linear(8, 8, bias=False)), LoraConfig(r=2, lora_bias=True, target_modules=["lin0"])
        )
    with pytest.raises(RuntimeError, match="without one"):
        model.merge_adapter()


def test_a_merge_that_keeps_nothing():
    """Additive deltas are subtracted; DoRA's scaling has no way back."""
    model = get_peft_model(mlp(), LoraConfig(r=2, target_modules=["lin0"]))
    model.add_adapter("dora", LoraConfig(r=2, target_modules=["lin0"], use_dora=True))
    randomise(model)
    layer = layer_of(model, "lin0")
    before = layer.weight.clone()
    layer.merge(keep=False, adapter_names=["default"])
    layer.unmerge()
    torch.testing.assert_close(layer.weight.data, before)
    layer.merge(keep=False, adapter_names=["dora"])
    with pytest.raises(RuntimeError, match="DoRA adapters merged with keep=False cannot be unmerged"):
        layer.unmerge()


def test_rows_of_plain_and_variant_adapters_in_one_batch():
    model = get_peft_model(mlp(), LoraConfig(r=2, target_modules=["lin0", "lin1"]))
    blocks = BdLoraConfig(["lin0"], ["lin1"], nblocks=2)
    model.add_adapter("b", LoraConfig(r=2, target_modules=["lin0", "lin1"], use_bdlora=blocks))
    randomise(model.eval())
    want = []
    for name in ("b", "default", "b"):
        model.set_adapter(name)
        want.append(model(x8[:1]))
    torch.testing.assert_close(model(x8[[0, 0, 0]], adapter_names=["b", "default", "b"]), torch.cat(want))


def test_published_containers_and_names():
    layer = layer_of(get_peft_model(mlp(), LoraConfig(r=2, target_modules=["lin0"])), "lin0")
    assert isinstance(layer, Linear) and repr(layer).startswith("lora.Linear(")
    assert LoraLayer.adapter_layer_names == (
        "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector",
    )  # fmt: skip
    assert not layer.lora_embedding_A and not layer.lora_magnitude_vector and len(layer.r) == 1


def test_copies_are_independent():
    model = get_peft_model(mlp(), LoraConfig(r=2, target_modules=["lin0", "lin1"]))
    randomise(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(x8), model(x8))
        layer_of(other, "lin0").lora_B["default"].weight.data.zero_()
        assert not torch.allclose(other(x8), model(x8))


def test_compiles_without_graph_break():
    model = get_peft_model(mlp(), LoraConfig(r=2, lora_dropout=0.1, target_modules=["lin0", "lin1"]))
    model.add_adapter("b", LoraConfig(r=3, use_dora=True, target_modules=["lin1"]))
    randomise(model)
    for active in ("default", ["default", "b"]):
        model.base_model.set_adapter(active)
        compiled = torch.compile(model.base_model.model, backend="eager", fullgraph=True)
        model.eval()
        torch.testing.assert_close(compiled(x8), model(x8), rtol=1e-5, atol=1e-6)


def test_mamba_modules_are_refused():
    class Config:
        model_type = "mamba"

        def to_dict(self):
            return {"model_type": "mamba"}

    base = Net(nn.Linear(8, 8))
    base.out_proj, base.config = nn.Linear(8, 8), Config()
    with pytest.raises(ValueError, match="Mamba"):
        LoraModel(base, LoraConfig(target_modules=["out_proj"]), "default")
    assert type(base.out_proj) is nn.Linear


def test_custom_layer_class():
    class MyLora(LoraLayer):
        def allocate(self, name, cfg):
            self.lora_A[name] = nn.Linear(4, cfg.r, bias=False)
            self.lora_B[name] = nn.Linear(cfg.r, 4, bias=False)

        def forward(self, x):
            y, _ = self.base_layer(x)
            return y + self.lora_B["default"](self.lora_A["default"](y))

    cfg = LoraConfig(r=2, target_modules=["lin0"])
    cfg._register_custom_module({nn.LSTM: MyLora})
    model = get_peft_model(Net(nn.LSTM(3, 4)), cfg)
    assert model(torch.randn(5, 2, 3)).shape == (5, 2, 4)
    assert model.get_nb_trainable_parameters()[0] == 16
    cfg._register_custom_module({nn.GRU: nn.Linear})
    with pytest.raises(TypeError, match=r"class Linear for GRU must be a subclass of lora\.LoraLayer"):
        get_peft_model(Net(nn.GRU(3, 4)), cfg)


def test_scheme_table_is_complete():
    assert all(init.scheme(name) is function for name, function in init.SCHEMES.items())
    assert (
        init.scheme("pissa_niter_4") is init.pissa and init.scheme(False) is None and init.scheme(True) is init.default
    )
    for bad in ("pissa_niter_", "pissa_niter_x", "kaiming"):
        with pytest.raises(ValueError, match="Unknown initialization"):
            init.scheme(bad)


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize(
    "options", [{"init_lora_weights": "pissa"}, {"kasa_config": KasaConfig()}], ids=["pissa", "kasa"]
)
def test_ephemeral_offload_decomposes_on_the_accelerator(monkeypatch, wanted, options):
    """It is asked for once a layer, and only if the user wants it; `tests/device` looks at a real one."""
    asked = []
    monkeypatch.setattr(init, "infer_device", lambda: asked.append(True) or "cpu")
    config = LoraConfig(r=2, target_modules=["0", "2"], runtime_config={"ephemeral_gpu_offload": wanted}, **options)
    get_peft_model(nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)), config)
    assert len(asked) == 2 * wanted
