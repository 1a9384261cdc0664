"""LoRA variants: DoRA, aLoRA, BD-LoRA, KaSA, MonteCLoRA, VeLoRA, QA-LoRA, Arrow; intruder dimensions."""

import copy
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from peft import (
    ArrowConfig,
    BdLoraConfig,
    KasaConfig,
    LoraConfig,
    MontecloraConfig,
    PeftModel,
    VeloraConfig,
    create_arrow_model,
    get_peft_model,
)
from peft.ops import plain
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.arrow import _location
from peft.tuners.lora.intruders import reduce_intruder_dimension
from peft.tuners.lora.variants.alora import calculate_alora_offsets
from peft.tuners.lora.variants.arrow import leading_direction
from peft.tuners.lora.variants.monteclora import _advance_generator


def mlp(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12, bias=bias), nn.Linear(12, 6, bias=bias))


def adapted(targets=("0", "1"), bias: bool = True, **kwargs):
    model = get_peft_model(
        mlp(bias), LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": list(targets), **kwargs})
    )
    generator = torch.Generator().manual_seed(5)
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.3
        if "magnitude" in name:
            p.data = p.data * 1.3
    return model


def layer_of(model: nn.Module, key: str) -> LoraLayer:
    return model.base_model.model.get_submodule(key)


x8 = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(1))


# ---- the mechanism
@pytest.mark.parametrize(
    "first, second",
    [({"use_dora": True}, {"use_bdlora": BdLoraConfig()}), ({"use_dora": True}, {"kasa_config": KasaConfig()})],
)
def test_variants_do_not_combine(first, second):
    base = mlp()
    with pytest.raises(ValueError, match="cannot be combined"):
        get_peft_model(base, LoraConfig(target_modules=["0"], **first, **second))
    assert type(base[0]) is nn.Linear


@pytest.mark.parametrize(
    "layer, kwargs",
    [
        (nn.MultiheadAttention(8, 2), {"use_dora": True}),
        (nn.Conv2d(3, 4, 3), {"velora_config": VeloraConfig()}),
        (nn.Embedding(5, 4), {"kasa_config": KasaConfig()}),
        (nn.Embedding(5, 4), {"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}),
    ],
)
def test_unsupported_layers_are_named(layer, kwargs):
    base = nn.Sequential(layer)
    with pytest.raises(ValueError, match="does not support '0'"):
        get_peft_model(base, LoraConfig(r=2, target_modules=["0"], **kwargs))
    assert base[0] is layer


@pytest.mark.parametrize("cast", [True, False])
@pytest.mark.parametrize("options", [
    {"kasa_config": KasaConfig()}, {"monteclora_config": MontecloraConfig(num_samples=2, buffer_size=1)},
    {"velora_config": VeloraConfig(num_groups=4)}, {"use_dora": True}, {"use_bdlora": BdLoraConfig(["0"], ["1"])},
], ids=lambda o: next(iter(o)))  # fmt: skip
def test_all_tensors_of_a_variant_follow_the_base(options, cast):
    """In half precision, and on the device of the base: both go over the tensors that the layer says are its own."""
    config = LoraConfig(r=2, target_modules=["0", "1"], **options)
    model = get_peft_model(mlp().to(torch.bfloat16), config, autocast_adapter_dtype=cast)
    for key in ("0", "1"):
        layer = layer_of(model, key)
        own = {id(tensor) for _, _, tensor in layer._own_tensors("default")}
        held = [t for n, t in [*layer.named_parameters(), *layer.named_buffers()] if not n.startswith("base_layer.")]
        assert own == set(map(id, held))
        assert {p.dtype for p in layer.parameters_of("default")} == {torch.float32 if cast else torch.bfloat16}
    x = x8.to(torch.bfloat16)
    model.train()(x).sum().backward()
    want = model.eval()(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), want, rtol=2e-2, atol=2e-2)


def test_different_variants_on_one_layer():
    model = adapted(use_dora=True)
    model.add_adapter("v", LoraConfig(r=2, target_modules=["0"], velora_config=VeloraConfig(num_groups=2)))
    model.add_adapter("p", LoraConfig(r=2, target_modules=["0"]))
    for active in ("default", "v", "p", ["p", "default", "v"]):
        model.base_model.set_adapter(active)
        assert model(x8).shape == (4, 3, 6)
    model.delete_adapter("v")
    assert "lora_velora_embed" in dir(layer_of(model, "0")) and "v" not in layer_of(model, "0").lora_velora_embed


# ---- DoRA
def dora_reference(layer, x, p=None):
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    V = layer.base_layer.weight + layer.scaling["default"] * B @ A
    g = layer.lora_magnitude_vector["default"].weight / V.norm(dim=1).detach()
    return F.linear(x, g[:, None] * V, layer.base_layer.bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("is_plain", [True, False])
def test_dora_values_and_gradients(bias, is_plain):
    model = adapted(use_dora=True, bias=bias)
    layer = layer_of(model, "0")
    with plain(is_plain):
        out = layer(x8)
    expected = dora_reference(layer, x8)
    torch.testing.assert_close(out, expected)
    parameters = list(layer.parameters_of("default"))
    got = torch.autograd.grad(out.square().sum(), parameters)
    want = torch.autograd.grad(expected.square().sum(), parameters)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)


def test_dora_starts_at_the_base_and_merges_bit_by_bit_back():
    base = mlp()
    expected = base(x8)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0", "1"], use_dora=True))
    torch.testing.assert_close(model(x8), expected)
    model = adapted(use_dora=True)
    weight = layer_of(model, "0").base_layer.weight
    before, out = weight.clone(), model(x8)
    model.merge_adapter()
    torch.testing.assert_close(model(x8), out, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(weight, before)
    torch.testing.assert_close(
        layer_of(model, "0").get_delta_weight("default") + weight, _merged(model, "0"), rtol=1e-5, atol=1e-6
    )


def _merged(model, key):
    return copy.deepcopy(model).merge_and_unload().get_submodule(key).weight


def test_order_of_dora_and_lora_matters_in_forward_as_in_merging():
    outputs = []
    for order in (["default", "b"], ["b", "default"]):
        model = adapted(use_dora=True)
        model.add_adapter("b", LoraConfig(r=2, target_modules=["0"]))
        layer_of(model, "0").lora_B["b"].weight.data.normal_(generator=torch.Generator().manual_seed(3))
        model.base_model.set_adapter(order)
        outputs.append(model(x8))
        torch.testing.assert_close(copy.deepcopy(model).merge_and_unload()(x8), outputs[-1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(*outputs)


def test_dora_rows_in_a_mixed_batch():
    model = adapted(use_dora=True)
    model.add_adapter("b", LoraConfig(r=2, target_modules=["0"]))
    model.eval()
    alone = model(x8)
    with model.disable_adapter():
        base = model(x8)
    out = model(x8, adapter_names=["default", "__base__", "b", "default"])
    torch.testing.assert_close(out[[0, 3]], alone[[0, 3]])
    torch.testing.assert_close(out[1], base[1])


def test_dora_caching_keeps_norms_in_eval_mode_only():
    from peft.helpers import DoraCaching

    model = adapted(use_dora=True)
    layer = layer_of(model, "0")
    expected = model(x8)
    with DoraCaching():
        model.eval()
        torch.testing.assert_close(model(x8), expected)
        assert "default" in layer.__dict__["_norm_cache"]
        torch.testing.assert_close(model(x8), expected)
        model.train()
        assert "_norm_cache" not in layer.__dict__
        layer.lora_B["default"].weight.data *= 3
        changed = model(x8)
        model.eval()
        torch.testing.assert_close(model(x8), changed)
    assert not torch.allclose(changed, expected)


def test_dora_dropout_uses_one_mask_for_both_products():
    model = adapted(use_dora=True, lora_dropout=0.5)
    layer = layer_of(model, "0")
    layer.train()
    torch.manual_seed(3)
    out = layer(x8)
    f = layer.factors("default")
    g = layer.lora_magnitude_vector["default"].weight / layer.lora_variant["default"].norm(layer, "default")
    y = layer.base_layer(x8)
    # y + (g-1) W d + g s B A d for the dropped input d: solve for what d gives, with d = 0 or 2 x
    rest = (out - y).detach()
    V = (g - 1)[:, None] * layer.base_layer.weight + g[:, None] * f.scale * f.B @ f.A
    d = torch.linalg.lstsq(V.detach(), rest.reshape(-1, 12).T).solution.T.reshape(x8.shape)
    ratio = d / x8
    assert torch.all((ratio.abs() < 1e-2) | ((ratio - 2).abs() < 1e-2))


def test_dora_on_an_embedding():
    model = get_peft_model(nn.Sequential(nn.Embedding(9, 6)), LoraConfig(r=2, target_modules=["0"], use_dora=True))
    layer, ids = layer_of(model, "0"), torch.tensor([[1, 8, 1]])
    torch.testing.assert_close(model(ids), layer.base_layer(ids))
    for p in layer.parameters_of("default"):
        p.data = torch.rand(p.shape, generator=torch.Generator().manual_seed(3)) + 0.5
    V = layer.base_layer.weight + (layer.lora_embedding_B["default"] @ layer.lora_embedding_A["default"]).T * 4
    want = layer.lora_magnitude_vector["default"].weight / V.norm(dim=0) * V  # a norm for each embedding dimension
    torch.testing.assert_close(model(ids), want[ids])
    torch.testing.assert_close(model.merge_and_unload()(ids), want[ids])


def test_dora_on_a_convolution_drops_inputs_of_both_products():
    """With everything dropped, nothing is left but the base's own output."""
    config = LoraConfig(r=2, target_modules=["0"], use_dora=True, lora_dropout=1.0)
    model = get_peft_model(nn.Sequential(nn.Conv1d(8, 6, 3)), config)
    layer, x = layer_of(model, "0"), x8.transpose(1, 2)
    for p in layer.parameters_of("default"):
        p.data += 1
    torch.testing.assert_close(model.train()(x), layer.base_layer(x))
    assert not torch.allclose(model.eval()(x), layer.base_layer(x))


# ---- aLoRA
class Embedder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.lin = nn.Embedding(20, 8), nn.Linear(8, 8)
        self.config = {"model_type": "custom"}

    def forward(self, input_ids=None, inputs_embeds=None):
        return self.lin(self.emb(input_ids) if inputs_embeds is None else inputs_embeds)

    def prepare_inputs_for_generation(self, *args, **kwargs):
        return kwargs


def test_alora_acts_from_the_last_invocation_on():
    cfg = LoraConfig(r=2, target_modules=["lin"], task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6])
    model = get_peft_model(Embedder(), cfg)
    layer = layer_of(model, "lin")
    layer.lora_B["default"].weight.data.normal_()
    ids = torch.tensor([[1, 5, 6, 5, 6, 2], [5, 6, 1, 2, 3, 4], [1, 2, 3, 4, 6, 5]])
    assert calculate_alora_offsets({"default": cfg}, "default", ids) == [3, 6, None]
    out = model(input_ids=ids)
    with model.disable_adapter():
        base = model(input_ids=ids)
    delta = model.base_model.model.emb(ids) @ layer.get_delta_weight("default").T
    gate = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6, [0] * 6])[..., None]
    torch.testing.assert_close(out, base + gate * delta)
    torch.testing.assert_close(model(input_ids=ids, alora_offsets=[None, 2, 1])[1, 4:], (base + delta)[1, 4:])
    model.eval()
    mixed = model(input_ids=ids, adapter_names=["__base__", "default", "default"])
    torch.testing.assert_close(mixed, torch.cat([base[:1], out[1:]]))
    with pytest.raises(NotImplementedError):
        model.merge_adapter()
    with pytest.raises(ValueError, match="Beam"):
        model(input_ids=ids, num_beams=2)


def test_offsets_of_rows_with_names_of_their_own():
    cfg = {n: LoraConfig(alora_invocation_tokens=t, task_type="CAUSAL_LM") for n, t in (("a", [5]), ("b", [6, 6]))}
    ids = torch.tensor([[5, 6, 6]] * 4)
    with pytest.warns(UserWarning, match="'c' not found in peft_config, its rows use the base model"):
        assert calculate_alora_offsets(cfg, "a", ids, ["b", "__base__", "c", "a"]) == [2, None, None, 3]
    assert calculate_alora_offsets(cfg, ["b"], ids[:1, :1]) == [None]  # shorter than the invocation
    assert calculate_alora_offsets(cfg, "a", None) == []
    with pytest.raises(ValueError, match="exactly one active adapter; use `adapter_names`"):
        calculate_alora_offsets(cfg, ["a", "b"], ids)


def test_offsets_are_given_repeated_or_missing():
    cfg = LoraConfig(r=2, target_modules=["lin"], task_type="CAUSAL_LM", alora_invocation_tokens=[5])
    model = get_peft_model(Embedder(), cfg).eval()
    layer_of(model, "lin").lora_B["default"].weight.data.normal_()
    ids = torch.tensor([[1, 5, 2], [5, 1, 1]])
    out = model(input_ids=ids)
    torch.testing.assert_close(model(input_ids=ids, alora_offsets=torch.tensor([2, 3])), out)
    twice = ids.repeat_interleave(2, 0)  # as generate does after the offsets of the prompts are known
    torch.testing.assert_close(model(input_ids=twice, alora_offsets=[2, 3]), out.repeat_interleave(2, 0))
    inner = model.base_model
    with model.disable_adapter():
        base = model(input_ids=ids)
    with torch.no_grad(), pytest.warns(UserWarning, match="from inputs_embeds; the adapter is off. Pass input_ids"):
        torch.testing.assert_close(model(inputs_embeds=inner.model.emb(ids)), base)
    model.add_adapter("b", LoraConfig(r=2, target_modules=["lin"]))
    inner.set_adapter(["default", "b"])
    with pytest.raises(ValueError, match="exactly one active adapter"):
        model(input_ids=ids)
    with pytest.warns(UserWarning, match="CAUSAL_LM only"):
        other = get_peft_model(Embedder(), LoraConfig(target_modules=["lin"], alora_invocation_tokens=[5]))
    layer_of(other, "lin").lora_B["default"].weight.data.normal_()
    with torch.no_grad():
        torch.testing.assert_close(other(input_ids=ids), base)


# ---- BD-LoRA
def test_alora_batches_without_an_invocation_have_gradients_of_zero():
    model = adapted(task_type="CAUSAL_LM", alora_invocation_tokens=[1])
    model.base_model(x8).sum().backward()
    assert {p.grad.abs().max().item() for p in layer_of(model, "0").parameters_of("default")} == {0.0}
    assert torch.equal(model.base_model(x8), layer_of(model, "1").base_layer(layer_of(model, "0").base_layer(x8)))


def test_bdlora_factors_are_block_diagonal():
    options = BdLoraConfig(target_modules_bd_a=["1"], target_modules_bd_b=["0"], nblocks=2)
    model = adapted(use_bdlora=options)
    first, second = layer_of(model, "0"), layer_of(model, "1")
    assert first.lora_B["default"].weight.shape == (12, 1) and second.lora_A["default"].weight.shape == (2, 6)
    B = torch.block_diag(*first.lora_B["default"].weight.chunk(2))
    torch.testing.assert_close(first.get_delta_weight("default"), 1.5 * B @ first.lora_A["default"].weight)
    out = model(x8)
    torch.testing.assert_close(copy.deepcopy(model).merge_and_unload()(x8), out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("blocks", [{"target_modules_bd_a": ["0"]}, {"target_modules_bd_b": ["0"]}], ids=str)
def test_bdlora_with_a_bias_and_modules_in_no_list(blocks):
    options = BdLoraConfig(**blocks, nblocks=2, match_strict=False)
    model = adapted(use_bdlora=options, lora_bias=True)
    first, second = layer_of(model, "0"), layer_of(model, "1")
    assert "nblocks=2" in repr(first) and "nblocks" not in repr(second)
    bias = first.lora_B["default"].bias
    bias.data += 1
    torch.testing.assert_close(
        first(x8), first.base_layer(x8) + x8 @ first.get_delta_weight("default").T + 1.5 * bias, rtol=1e-5, atol=1e-5
    )
    out = model(x8)
    model.merge_adapter()
    torch.testing.assert_close(model(x8), out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options, match",
    [
        (BdLoraConfig(target_modules_bd_a=["0"], nblocks=3), "divisible"),
        (BdLoraConfig(target_modules_bd_a=["1"], nblocks=2), "neither"),
        (BdLoraConfig(target_modules_bd_a=["0"], target_modules_bd_b=[""], nblocks=2), "both"),
    ],
)
def test_bdlora_matching(options, match):
    with pytest.raises(ValueError, match=match):
        adapted(targets=["0"], use_bdlora=options)


# ---- KaSA
def test_kasa_truncates_the_base_once_and_has_a_loss():
    W = mlp()[0].weight.detach()
    model = adapted(targets=["0"], kasa_config=KasaConfig(beta=0.5, gamma=0.0))
    layer = layer_of(model, "0")
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(layer.base_layer.weight, (U[:, :6] * S[:6]) @ Vh[:6], rtol=1e-4, atol=1e-5)
    d = layer.lora_diag["default"]
    expected = 1.5 * (layer.lora_B["default"].weight * d) @ layer.lora_A["default"].weight
    torch.testing.assert_close(layer.get_delta_weight("default"), expected)
    torch.testing.assert_close(model.base_model._get_kasa_loss(), 0.5 * d.square().sum())
    with pytest.raises(ValueError, match="KaSA"):
        model.add_adapter("b", LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="min"):
        adapted(targets=["0"], r=8, kasa_config=KasaConfig())


# ---- MonteCLoRA
def test_monteclora_is_noisy_in_training_only():
    model = adapted(
        targets=["0"], monteclora_config=MontecloraConfig(sample_scaler=0.1, use_entropy=True, buffer_size=1)
    )
    model.train()
    assert not torch.allclose(model(x8), model(x8))
    loss = model(x8).square().sum() + model.base_model._get_monteclora_loss()
    loss.backward()
    sampler = layer_of(model, "0").lora_monteclora_sampler["default"]
    assert sampler.std_prior.grad is not None and sampler.expert_weights_prior.grad is not None
    assert not sampler.gaussian_var_prior.requires_grad
    copy.deepcopy(model)  # the graph of the last draw is no obstacle
    model.eval()
    assert torch.equal(model(x8), model(x8)) and model.base_model._get_monteclora_loss() == 0.0
    out = model(x8)
    torch.testing.assert_close(copy.deepcopy(model).merge_and_unload()(x8), out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_in", [3, 1 << 17])
def test_monteclora_advances_the_generator_as_if_it_drew_its_buffer(n_in):
    torch.manual_seed(7)
    _advance_generator(8, n_in, MontecloraConfig(num_samples=3, buffer_size=1))
    after = torch.rand(3)
    torch.manual_seed(7)
    torch.randn(3 * n_in * 8), torch.randn(3)
    torch.distributions.Wishart(torch.tensor(8.0), torch.eye(8), validate_args=False)._bartlett_sampling(torch.Size())
    assert torch.equal(torch.rand(3), after)


# ---- VeLoRA
def test_velora_gradient_is_that_of_the_projected_input():
    model = adapted(targets=["0"], velora_config=VeloraConfig(num_groups=3, scale=0.5))
    layer = layer_of(model, "0")
    out = layer(x8)
    torch.testing.assert_close(out, layer.base_layer(x8) + x8 @ layer.get_delta_weight("default").T)
    out.sum().backward()
    embed = layer.lora_velora_embed["default"]  # [3]
    padded = F.pad(x8, (0, 1)).reshape(-1, 3, 3)
    torch.testing.assert_close(embed, F.normalize(padded.mean((0, 1)), dim=0))
    projected = (0.5 * (padded @ embed)[..., None] * embed).flatten(1)[:, :8]
    upstream = 1.5 * torch.ones(12, 12) @ layer.lora_B["default"].weight  # [tokens, r]
    torch.testing.assert_close(layer.lora_A["default"].weight.grad, upstream.T @ projected, rtol=1e-4, atol=1e-4)


def test_velora_once_and_random():
    model = adapted(targets=["0"], velora_config=VeloraConfig(num_groups=2, init_type="batch_average_once"))
    layer = layer_of(model, "0")
    model(x8)
    first = layer.lora_velora_embed["default"].clone()
    model(-x8)
    assert torch.equal(layer.lora_velora_embed["default"], first)
    model = adapted(targets=["0"], velora_config=VeloraConfig(num_groups=2, init_type="random"))
    assert layer_of(model, "0").lora_velora_embed["default"].norm() == pytest.approx(1.0, abs=1e-5)


# ---- QA-LoRA
class BaseQuantLinear(nn.Module):
    """Stands in for a GPTQ layer: the weight is for its own kernel only."""

    __module__ = "gptqmodel.nn_modules"

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features, self.bias = 8, 6, None
        self.register_buffer("qweight", torch.zeros(2, 6, dtype=torch.int32))

    def forward(self, x):
        return x[..., :6]


def test_qalora_pools_over_groups(monkeypatch):
    monkeypatch.setitem(sys.modules, "gptqmodel", types.ModuleType("gptqmodel"))
    cfg = LoraConfig(r=2, lora_alpha=3, target_modules=["0"], use_qalora=True, qalora_group_size=4)
    model = get_peft_model(nn.Sequential(BaseQuantLinear()), cfg)
    layer = layer_of(model, "0")
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert A.shape == (2, 2)
    B.data.normal_()
    pooled = torch.stack([x8[..., :4].mean(-1), x8[..., 4:].mean(-1)], -1) * 2
    torch.testing.assert_close(model(x8), x8[..., :6] + 1.5 * pooled @ A.T @ B.T)
    layer.lora_dropout["default"] = nn.Dropout(1.0)
    torch.testing.assert_close(model.train()(x8), x8[..., :6])
    with pytest.raises((NotImplementedError, TypeError)):
        model.merge_adapter()
    for kwargs, error in (
        ({"use_dora": True}, ValueError),
        ({"init_lora_weights": "pissa"}, TypeError),
        ({"qalora_group_size": 3}, ValueError),
    ):
        options = {"r": 2, "target_modules": ["0"], "use_qalora": "qalora_group_size" in kwargs, **kwargs}
        with pytest.raises(error):
            get_peft_model(nn.Sequential(BaseQuantLinear()), LoraConfig(**options))
    with pytest.warns(UserWarning, match="GPTQ"):
        adapted(use_qalora=True)


# ---- Arrow
def test_leading_direction():
    torch.manual_seed(0)
    A, B = torch.randn(3, 8), torch.randn(6, 3)
    Vh = torch.linalg.svd(B @ A).Vh
    torch.testing.assert_close(leading_direction(A, B).abs(), Vh[0].abs(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("general", [False, True])
def test_arrow_routes_each_token(tmp_path, general):
    paths = []
    for i in range(5):
        model = adapted()
        generator = torch.Generator().manual_seed(i)
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data = torch.randn(p.shape, generator=generator) * 0.3
        model.save_pretrained(tmp_path / str(i))
        paths.append(str(tmp_path / str(i)))
    options = ArrowConfig(top_k=2, router_temperature=0.5, use_gks=general)
    model = create_arrow_model(mlp(), paths[:3], options, general_adapter_paths=paths[3:])
    assert model.active_adapter == "arrow_router"
    layer = layer_of(model, "0")
    pairs = [(layer.lora_A[f"task_{i}"].weight, layer.lora_B[f"task_{i}"].weight) for i in range(3)]
    if general:
        mean = [
            torch.stack([getattr(layer, s)[f"gks_{i}"].weight for i in range(2)]).mean(0) for s in ("lora_A", "lora_B")
        ]
        pairs = [(A - mean[0], B - mean[1]) for A, B in pairs]
    x = x8.reshape(-1, 8)
    expected = layer.base_layer(x)
    likeness = torch.stack([(x @ torch.linalg.svd(B @ A).Vh[0]).abs() for A, B in pairs], 1)
    top, index = likeness.topk(2)
    weights = torch.softmax(top / 0.5, 1)
    for t in range(len(x)):
        for w, e in zip(weights[t], index[t], strict=True):
            A, B = pairs[e]
            expected[t] = expected[t] + w * 1.5 * (B @ (A @ x[t]))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="router"):
        model.merge_adapter()


def experts(folder, *options):
    """Folders of LoRAs with these options."""
    for i, kwargs in enumerate(options):
        adapted(**kwargs).save_pretrained(folder / str(i))
    return [str(folder / str(i)) for i in range(len(options))]


@pytest.mark.parametrize(
    "options, error, match",
    [
        ([{}, {"r": 3}], ValueError, "equal ranks"),
        ([{}, {"targets": ["0"]}], ValueError, r"'task_0' and 'task_1' differ in \['1'\]"),
        ([{"rank_pattern": {"0": 3}}], ValueError, r"same rank, 'task_0' has \[2, 3\]"),
        ([{"kasa_config": KasaConfig()}], ValueError, "KaSA"),
    ],
)
def test_arrow_checks_its_experts_and_leaves_nothing(tmp_path, options, error, match):
    base = mlp()
    with pytest.raises(error, match=match):
        create_arrow_model(base, experts(tmp_path, *options), ArrowConfig())
    assert type(base[0]) is nn.Linear and not hasattr(base, "peft_config")


@pytest.mark.parametrize(
    "paths, options, match",
    [
        ([], {}, "at least one"),
        (["{tmp}"], {}, "adapter_config"),
        (["nowhere"], {}, r"neither a folder .* nor a hub repository \('user/name'\)"),
        (["{tmp}/nowhere"], {}, "neither a folder"),
        (["{tmp}"], {"use_gks": True}, "general LoRA paths"),
    ],
)
def test_arrow_paths(tmp_path, paths, options, match):
    with pytest.raises(ValueError, match=match):
        create_arrow_model(mlp(), [path.format(tmp=tmp_path) for path in paths], ArrowConfig(**options))
    assert _location("user/name/sub/folder") == {"path": "user/name", "subfolder": "sub/folder"}
    assert _location("user/name") == {"path": "user/name"}


@pytest.mark.parametrize("blocked", [False, True])
def test_arrow_over_all_other_adapters(tmp_path, blocked):
    """A router without names takes what is on the layer, block-diagonal experts and those in training too."""
    options = {"use_bdlora": BdLoraConfig(["0"], ["1"], nblocks=2)} if blocked else {}
    model = adapted(**options)
    model.add_adapter("route", LoraConfig(r=2, target_modules=["0", "1"], arrow_config=ArrowConfig(), lora_dropout=1.0))
    model.eval()
    want = model(x8)
    model.base_model.set_adapter("route")
    torch.testing.assert_close(model(x8), want)  # one expert has all the weight
    for p in (own := list(layer_of(model, "0").parameters_of("default"))):
        p.requires_grad_(True)
    out = model(x8)
    torch.testing.assert_close(out, want)
    assert all(grad.any() for grad in torch.autograd.grad(out.sum(), own))
    with pytest.raises(RuntimeError, match="no delta weight"):
        layer_of(model, "0").get_delta_weight("route")
    model.train()
    with model.disable_adapter():
        base = model(x8)
    torch.testing.assert_close(model(x8), base)
    model.eval().delete_adapter("default")
    torch.testing.assert_close(model(x8), base)


def test_router_configuration_survives_saving(tmp_path):
    adapted().save_pretrained(tmp_path / "e")
    model = create_arrow_model(mlp(), [str(tmp_path / "e")] * 2, ArrowConfig())
    model.save_pretrained(tmp_path / "all")
    again = PeftModel.from_pretrained(mlp(), tmp_path / "all" / "task_0", adapter_name="task_0")
    again.load_adapter(tmp_path / "all" / "task_1", "task_1")
    again.load_adapter(tmp_path / "all" / "arrow_router", "arrow_router")
    again.set_adapter("arrow_router")
    torch.testing.assert_close(again(x8), model(x8))
    again.delete_adapter("task_1")
    assert torch.isfinite(again(x8)).all()


# ---- intruder dimensions
def test_intruders_are_damped():
    model = adapted(targets=["0"], r=1, lora_alpha=1)
    layer = layer_of(model, "0")
    layer.lora_A["default"].weight.data *= 20
    layer.lora_B["default"].weight.data *= 20
    reduce_intruder_dimension(model, top_k=3, threshold_epsilon=0.7, mitigation_lambda=0.5, logging_sink=None)
    assert model.active_adapter == "intruder_reduced"
    before, after = layer.get_delta_weight("default"), layer.get_delta_weight("intruder_reduced")
    assert 0.4 < after.norm() / before.norm() < 0.6
    with pytest.raises(ValueError, match="exists"):
        reduce_intruder_dimension(model)


@pytest.mark.parametrize("options", [
    {}, {"lora_bias": True}, {"use_dora": True}, {"kasa_config": KasaConfig()},
    {"use_bdlora": BdLoraConfig(["0"], ["1"], nblocks=2)},
], ids=str)  # fmt: skip
def test_an_adapter_without_intruders_is_copied(options):
    model = adapted(**options).eval()
    for name, p in model.named_parameters():
        if "lora_B" in name and name.endswith("bias"):
            p.data += 1
    want, shown = model(x8), []
    reduce_intruder_dimension(model, threshold_epsilon=0.0, logging_sink=shown.append)
    assert shown == [f"base_model.model.{i}: 0 intruder dimensions" for i in "01"]
    assert model.active_adapter == "intruder_reduced"
    torch.testing.assert_close(model(x8), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "base, options, error, match",
    [
        (nn.Linear(4, 4), {"target_modules": [], "target_parameters": ["0.weight"]}, ValueError, "target_parameters"),
        (nn.Linear(4, 4), {"arrow_config": ArrowConfig()}, ValueError, "arrow_config"),
        (nn.Conv1d(4, 4, 1, groups=2), {}, NotImplementedError, "grouped"),
    ],
)
def test_intruders_of_what_has_no_weight_are_refused(base, options, error, match):
    model = get_peft_model(nn.Sequential(base), LoraConfig(**{"r": 2, "target_modules": ["0"], **options}))
    with pytest.raises(error, match=match):
        reduce_intruder_dimension(model)
    with pytest.raises(ValueError, match="'b' is no LoRA adapter"):
        reduce_intruder_dimension(model, "b")
    assert list(model.peft_config) == ["default"]
