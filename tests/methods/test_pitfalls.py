"""Known defects of the published library, one test each: none of them is here. Methods in the order of their names;
LoRA's are in test_lora*.py, those of whole methods with a file of their own in that file.
"""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from tests.methods.bases import Net, base, inputs
from torch import nn

import peft
from peft import PeftModel, get_peft_model, get_peft_model_state_dict

pytestmark = pytest.mark.filterwarnings("ignore")


def perturbed(model: nn.Module, seed: int = 1, size: float = 0.3) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


def adapted(config, model: nn.Module | None = None, seed: int = 1, size: float = 0.3) -> PeftModel:
    torch.manual_seed(0)
    return perturbed(get_peft_model(base("Linear") if model is None else model, config), seed, size).eval()


def agrees_with_merging(model: PeftModel, x: torch.Tensor) -> None:
    want = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), want)


def run_both(first, second, kind: str = "Linear", size: float = 0.3) -> None:
    """Two adapters of one method with different options: each works alone, and both together as merged together."""
    x = inputs(kind)
    alone = []
    for config in (first, second):
        alone.append(adapted(copy.deepcopy(config), base(kind), size=size)(x))
    model = adapted(first, base(kind), size=size)
    model.add_adapter("second", second)
    model.set_adapter("second")
    torch.testing.assert_close(perturbed(model, size=size)(x), alone[1])
    model.set_adapter("default")
    torch.testing.assert_close(model(x), alone[0])


class CausalOutput(dict):
    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__


class WithLoss(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.lin0, self.lin1 = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        y = self.lin1(self.lin0(x).tanh())
        return CausalOutput(loss=y.square().mean(), y=y)


# ---- AdaLoRA


def adalora(**kwargs) -> peft.AdaLoraConfig:
    return peft.AdaLoraConfig(
        **{"target_modules": ["lin0", "lin1"], "init_r": 4, "target_r": 2, "total_step": 10} | kwargs
    )


def test_adalora_target_above_the_initial_rank_masks_nothing():
    model = get_peft_model(WithLoss(), adalora(init_r=2, target_r=4, tinit=1, tfinal=2, deltaT=1))
    for step in range(1, 11):
        model(torch.ones(2, 16)).loss.backward()
        model.base_model.update_and_allocate(step)
    assert all(all(alive) for alive in model.peft_config["default"].rank_pattern.values())


def test_adalora_allocates_without_gradients():
    model = get_peft_model(WithLoss(), adalora(tinit=1, tfinal=2, deltaT=1))
    for step in range(1, 11):
        model.base_model.update_and_allocate(step)
    assert model.peft_config["default"].rank_pattern == {}


def trained_adalora(model: nn.Module, name: str = "default", **options) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(model, adalora(tinit=1, tfinal=2, deltaT=1, **options), adapter_name=name)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    for step in range(1, 11):
        optimizer.zero_grad()
        model(torch.randn(4, 16)).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
    return model.eval()


def test_adalora_pattern_loads_on_meta(tmp_path):
    model = trained_adalora(WithLoss())
    kept = {k: sum(v) for k, v in model.peft_config["default"].rank_pattern.items()}
    assert 0 < sum(kept.values()) < 8
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 16)
    for low in (False, True):
        loaded = PeftModel.from_pretrained(WithLoss(), tmp_path, low_cpu_mem_usage=low)
        assert {k: layer.lora_A["default"].shape[0] for k, layer in loaded.base_model.named_layers().items()} == {
            k.removeprefix("model.").partition(".lora_E")[0]: n for k, n in kept.items()
        }
        torch.testing.assert_close(loaded(x).y, model(x).y)


@pytest.mark.parametrize("alpha", [8, 0])
def test_adalora_training_goes_on_after_loading(tmp_path, alpha):
    model, x = trained_adalora(WithLoss(), lora_alpha=alpha), torch.randn(3, 16)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(WithLoss(), tmp_path, is_trainable=True)
    torch.testing.assert_close(loaded(x).y, model(x).y)
    loaded(x).loss.backward()
    loaded.base_model.update_and_allocate(9)  # past the last step of the schedule: the pattern is applied again
    torch.testing.assert_close(loaded(x).y, model(x).y)


def test_adalora_parameters_have_the_published_order():
    model = get_peft_model(WithLoss(), adalora())  # optimizer states go by it
    names = [n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad]
    assert names[:3] == ["lora_A", "lora_B", "lora_E"]


def test_adalora_adapters_and_modules_may_be_called_alike():
    class Odd(WithLoss):
        def __init__(self):
            super().__init__()
            self.lora_x = nn.Linear(16, 16)

        def forward(self, x):
            out = super().forward(x)
            return CausalOutput(loss=out.loss + self.lora_x(x).square().mean(), y=out.y)

    plain, odd = trained_adalora(WithLoss()), trained_adalora(Odd(), name="lin")
    assert sorted(get_peft_model_state_dict(odd, adapter_name="lin")) == sorted(get_peft_model_state_dict(plain))


def test_adalora_refuses_to_become_a_plain_lora(tmp_path):
    model = trained_adalora(WithLoss())
    model.save_pretrained(tmp_path / "initial")
    with pytest.raises(ValueError, match="only for LORA"):
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))


def test_adalora_adapters_can_be_rescaled():
    model, x = adapted(adalora(), WithLoss()), torch.randn(3, 16)
    want = WithLoss()(x).y
    with peft.helpers.rescale_adapter_scale(model, 0.0):
        torch.testing.assert_close(model(x).y, want)
    changed = model(x).y
    assert not torch.allclose(changed, want)
    for layer in model.base_model.layers():
        layer.set_scale("default", 1)  # times what the configuration says
    torch.testing.assert_close(model(x).y, changed)


# ---- AdaMSS


def adamss(**kwargs) -> peft.AdamssConfig:
    return peft.AdamssConfig(**{"target_modules": ["lin0", "lin1"], "r": 8, "num_subspaces": 3} | kwargs)


def test_adamss_finds_its_rows_in_other_base_weights(tmp_path):
    model = adapted(adamss())
    model.save_pretrained(tmp_path)
    shaken = perturbed(base("Linear"), size=0.05)
    loaded = PeftModel.from_pretrained(shaken, tmp_path)
    for a, b in zip(model.base_model.layers(), loaded.base_model.layers(), strict=True):
        torch.testing.assert_close(a.get_delta_weight("default"), b.get_delta_weight("default"))


def test_adamss_pruned_subspaces_stay_frozen():
    model = adapted(adamss(use_asa=True, asa_target_subspaces=2, init_warmup=0, final_warmup=2, mask_interval=1))
    for step in range(3):
        model(inputs("Linear")).square().mean().backward()
        model.base_model.update_and_allocate(step)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert 0 < len(trained) < 12
    model.set_adapter("default")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    with model.disable_adapter():
        pass
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained


def test_adamss_counts_subspaces_per_adapter():
    model = adapted(
        adamss(
            target_modules=["lin0"],
            use_asa=True,
            asa_target_subspaces=2,
            init_warmup=0,
            final_warmup=1,
            mask_interval=1,
        )
    )
    model.add_adapter(
        "more", adamss(use_asa=True, asa_target_subspaces=4, init_warmup=0, final_warmup=1, mask_interval=1)
    )
    model.base_model.set_adapter(["default", "more"])
    perturbed(model)
    for step in range(2):
        model(inputs("Linear")).square().mean().backward()
        model.base_model.update_and_allocate(step)
    for name, total, target in (("default", 3, 2), ("more", 6, 4)):
        alive = sum(".adamss_A." in n and f".{name}." in n for n, p in model.named_parameters() if p.requires_grad)
        assert 0 < alive <= target < total


# ---- BEFT, BOFT, HRA, OFT: activations and weights agree


def test_beft_refuses_to_merge_a_bias_into_a_layer_without_one():
    model = Net(nn.Linear(16, 24, bias=False), nn.Linear(24, 16))
    model = get_peft_model(model, peft.BeftConfig(target_modules=["lin0"]))
    with pytest.raises(ValueError, match="does not have a bias"):
        model.merge_adapter()
    assert model.base_model.layers()[0].base_layer.bias is None


CONVS = {
    "dilation": {"dilation": 2, "padding": 2},
    "padding_mode": {"padding": 1, "padding_mode": "circular"},
    "asymmetric": {"stride": (2, 1), "padding": (0, 1)},
    "oblong": {"kernel_size": (3, 1), "padding": (1, 0)},
}
CONV_METHODS = {
    "boft": lambda: peft.BOFTConfig(target_modules=["lin0"], boft_block_size=2),
    "hra": lambda: peft.HRAConfig(target_modules=["lin0"], r=4),
    "oft": lambda: peft.OFTConfig(target_modules=["lin0"], oft_block_size=4),
    "hira": lambda: peft.HiraConfig(target_modules=["lin0"], r=4),
    "lora": lambda: peft.LoraConfig(target_modules=["lin0"], r=4),
    "loha": lambda: peft.LoHaConfig(target_modules=["lin0"], r=2),
    "lokr": lambda: peft.LoKrConfig(target_modules=["lin0"], r=2),
    "adalora": lambda: adalora(target_modules=["lin0"]),
    "ia3": lambda: peft.IA3Config(target_modules=["lin0"], feedforward_modules=["lin0"]),
}


@pytest.mark.parametrize("options", CONVS)
@pytest.mark.parametrize("method", CONV_METHODS)
def test_convolutions_with_uncommon_options(method, options):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, **{"kernel_size": 3, **CONVS[options]})
    model, x = Net(conv, nn.Conv2d(8, 3, 1)), torch.randn(2, 4, 9, 7)
    want = model(x)
    model = get_peft_model(model, CONV_METHODS[method]())
    if method != "hira":
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
    assert model.train()(x).shape == want.shape
    agrees_with_merging(perturbed(model).eval(), x)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [4, 16])
def test_boft_makes_its_rotations_once_a_step(bias, size, monkeypatch):
    from peft.ops import cayley

    calls, original = [], cayley.cayley
    monkeypatch.setattr(cayley, "cayley", lambda Q: calls.append(Q) or original(Q))
    config = peft.BOFTConfig(target_modules=["0"], boft_block_size=size)
    model = get_peft_model(nn.Sequential(nn.Linear(16, 8, bias=bias)), config)
    model(torch.randn(3, 16)).sum().backward()
    assert len(calls) == 1


def test_two_boft_adapters_with_other_blocks():
    run_both(
        peft.BOFTConfig(target_modules=["lin0"], boft_block_size=4),
        peft.BOFTConfig(target_modules=["lin0"], boft_block_size=2, boft_n_butterfly_factor=2),
    )


@pytest.mark.parametrize("init", [True, False])
def test_hra_with_gram_schmidt_is_orthogonal_from_the_start(init):
    config = peft.HRAConfig(target_modules=["lin0"], r=4, apply_GS=True, init_weights=init)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = get_peft_model(base("Linear"), config)
    assert any("does not start at the identity" in str(w.message) for w in caught) == init
    layer = model.base_model.layers()[0]
    assert torch.linalg.svdvals(layer.hra_u["default"]).min() > 1e-2  # nothing there that rounding decides
    for _ in range(2):
        H = layer.get_delta_weight("default")
        torch.testing.assert_close(H @ H.T, torch.eye(16), rtol=1e-4, atol=1e-4)
        agrees_with_merging(model.eval(), inputs("Linear"))
        perturbed(model)


@pytest.mark.parametrize("config", [
    peft.HRAConfig(target_modules=["lin0"], r=4), peft.OFTConfig(target_modules=["lin0"], oft_block_size=4),
    peft.BOFTConfig(target_modules=["lin0"], boft_block_size=4), peft.ShiraConfig(target_modules=["lin0"], r=2),
    peft.FourierFTConfig(target_modules=["lin0"], n_frequency=10), peft.LoHaConfig(target_modules=["lin0"], r=2),
    peft.MissConfig(target_modules=["lin0"], r=4, init_weights="bat"),
], ids=lambda c: c.peft_type.value)  # fmt: skip
def test_hooks_of_the_base_layer_are_called(config):
    model = base("Linear")
    model.lin0.register_forward_hook(lambda module, args, out: out * 2)
    model = adapted(config, model)
    seen = []
    model.base_model.layers()[0].base_layer.register_forward_hook(lambda module, args, out: seen.append(1))
    with model.disable_adapter():
        model(inputs("Linear"))
    model(inputs("Linear"))
    assert len(seen) == 2


def test_several_oft_adapters_merge_in_the_order_of_the_forward_pass():
    model = adapted(peft.OFTConfig(target_modules=["lin0", "lin1"], oft_block_size=4))
    model.add_adapter("second", peft.OFTConfig(target_modules=["lin0", "lin1"], oft_block_size=8))
    model.base_model.set_adapter(["default", "second"])
    agrees_with_merging(perturbed(model, seed=4), inputs("Linear"))


def test_oft_module_dropout_acts_in_training_only():
    model = adapted(peft.OFTConfig(target_modules=["lin0"], oft_block_size=4, module_dropout=0.5))
    x = inputs("Linear")
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("share", [False, True])
def test_coft_projects_in_training_steps_only(share):
    """Projected gradient descent; a forward without gradients writes nothing, a second forward changes nothing."""
    model = adapted(peft.OFTConfig(target_modules=["lin0"], oft_block_size=4, coft=True, eps=1e-2, block_share=share))
    x, before = inputs("Linear"), {n: p.clone() for n, p in model.named_parameters()}
    want = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model.train()(x), want)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    torch.testing.assert_close(model(x), want)
    projected = {n: p.clone() for n, p in model.named_parameters()}
    torch.testing.assert_close(torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False), want)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p, projected[n])
    agrees_with_merging(model.eval(), x)


# ---- C3A


def test_several_c3a_adapters_see_the_same_input():
    model = adapted(peft.C3AConfig(target_modules=["lin0"], block_size=8))
    model.add_adapter("second", peft.C3AConfig(target_modules=["lin0"], block_size=4))
    model.base_model.set_adapter(["default", "second"])
    agrees_with_merging(perturbed(model, seed=4), inputs("Linear"))


ADDITIVE = [
    peft.C3AConfig(target_modules=["lin0"], block_size=4), peft.LoraConfig(target_modules=["lin0"], r=2),
    peft.VeraConfig(target_modules=["lin0"], r=4), peft.LoKrConfig(target_modules=["lin0"], r=2),
    peft.PsoftConfig(target_modules=["lin0"], r=4), peft.DeloraConfig(target_modules=["lin0"], r=4),
    peft.BeftConfig(target_modules=["lin0"]), adalora(target_modules=["lin0"]), adamss(target_modules=["lin0"]),
    peft.IA3Config(target_modules=["lin0"], feedforward_modules=[]),
    peft.RoadConfig(target_modules=["lin0"], group_size=4),
    peft.LilyConfig(target_modules=["lin0"], r=4), peft.PveraConfig(target_modules=["lin0"], r=4),
]  # fmt: skip


@pytest.mark.parametrize("config", ADDITIVE, ids=lambda c: c.peft_type.value)
def test_the_base_output_is_not_changed_in_place(config):
    model = adapted(copy.deepcopy(config))
    kept = []
    model.base_model.layers()[0].base_layer.register_forward_hook(lambda m, a, out: kept.append((out, out.clone())))
    model(inputs("Linear"))
    assert all(torch.equal(a, b) for a, b in kept) and kept


# ---- FRoD, HiRA, IA3


def test_frod_adapter_may_be_called_like_a_module():
    model = get_peft_model(base("Linear"), peft.FrodConfig(target_modules=["lin0"]), adapter_name="lin1")
    model.add_adapter("lin0", peft.FrodConfig(target_modules=["lin0"]))
    keys = [sorted(get_peft_model_state_dict(model, adapter_name=n)) for n in ("lin0", "lin1")]
    assert keys[0] == keys[1] and keys[0]


def test_frod_bases_of_another_width_are_named():
    model = adapted(peft.FrodConfig(target_modules=["lin0"], progressbar=False))
    state = {k: torch.zeros(7, 3) if "frod_V" in k else v for k, v in get_peft_model_state_dict(model).items()}
    with pytest.raises(RuntimeError, match="size mismatch for .*frod_V"):
        peft.set_peft_model_state_dict(model, state)
    peft.set_peft_model_state_dict(model, state, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("kernel", [(1, 1, 3), (1, 3, 1), (1, 1, 1)])
def test_hira_on_flat_kernels(kernel):
    torch.manual_seed(0)
    model = Net(nn.Conv3d(2, 4, kernel), nn.Conv3d(4, 2, 1))
    agrees_with_merging(adapted(peft.HiraConfig(target_modules=["lin0"], r=4), model), torch.randn(1, 2, 4, 5, 6))


class Scaled(nn.Embedding):
    """As in Gemma 3."""

    embed_scale = 3.0

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


@pytest.mark.parametrize("config", [
    peft.HiraConfig(target_modules=["lin0"], r=4), peft.LoraConfig(target_modules=["lin0"], r=4),
    peft.TinyLoraConfig(target_modules=["lin0"], r=2, u=8),
], ids=lambda c: c.peft_type.value)  # fmt: skip
def test_scaled_embeddings_agree_with_merging(config):
    torch.manual_seed(0)
    agrees_with_merging(adapted(copy.deepcopy(config), Net(Scaled(10, 16), nn.Linear(16, 24))), inputs("Embedding"))


def test_ia3_warns_where_feedforward_names_match_inside_of_a_word():
    model = nn.ModuleDict({"lin1": nn.Linear(4, 4), "fatlin1": nn.Linear(4, 4)})
    with pytest.warns(UserWarning, match="fatlin1.*feed-forward"):
        get_peft_model(model, peft.IA3Config(target_modules=["lin1", "fatlin1"], feedforward_modules=["lin1"]))


def test_ia3_unmerges_after_scales_of_zero():
    model = base("Linear")
    before = copy.deepcopy(model.state_dict())
    model = adapted(peft.IA3Config(target_modules=["lin0", "lin1"], feedforward_modules=["lin1"]), model)
    for layer in model.base_model.layers():
        layer.ia3_l["default"].data.zero_()
    model.merge_adapter()
    model.unmerge_adapter()
    after = peft.get_base_model_state_dict(model)
    assert all(torch.equal(v, after[k]) for k, v in before.items())


def test_ia3_with_all_linear_targets_loads_again(tmp_path):
    config = peft.IA3Config(target_modules="all-linear", feedforward_modules=["lin1"])
    model = adapted(config)
    model.save_pretrained(tmp_path)
    x = inputs("Linear")
    torch.testing.assert_close(PeftModel.from_pretrained(base("Linear"), tmp_path)(x), model(x))
    with pytest.raises(ValueError, match=r"subset.*\['n1'\] are not in it"):
        peft.IA3Config(target_modules=["lin0", "lin1"], feedforward_modules=["n1"])


# ---- Lily, LN tuning


@pytest.mark.parametrize("shape", [(16,), (0, 16), (2, 0, 16)])
def test_lily_on_one_position_and_on_none(shape):
    layer = adapted(peft.LilyConfig(target_modules=["lin0"], r=4)).base_model.layers()[0]
    x = torch.randn(shape)
    y = layer(x)
    y.sum().backward()
    torch.testing.assert_close(y, layer(x.view(-1, 16)).view(y.shape))
    assert layer.lily_B["default"].weight.grad.isfinite().all()


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(8, 8), "v": nn.Linear(8, 8)}) for _ in range(4))

    def forward(self, x):
        for block in self.layers:
            x = block["v"](block["q"](x).tanh())
        return x


def test_every_lily_adapter_shares_its_experts(tmp_path):
    model = get_peft_model(Blocks(), peft.LilyConfig(target_modules=["q", "v"], r=4, stride_A=2))
    model.add_adapter("second", peft.LilyConfig(target_modules=["q", "v"], r=4, stride_A=2))
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path / "second", "third", is_trainable=True)
    for name in ("default", "second", "third"):
        layers = model.base_model.named_layers()
        assert len({id(m.lily_B[name].weight) for m in layers.values()}) == 2
        assert len({id(m.lily_A[name].weight) for m in layers.values()}) == 4


def test_lily_takes_the_longest_matching_target():
    layers = []
    for targets in (["1.q", "q"], ["q", "1.q"]):
        model = get_peft_model(Blocks(), peft.LilyConfig(target_modules=targets, r=4))
        layers.append([id(m.lily_B["default"]) for m in model.base_model.layers()])
        assert layers[-1][1] not in (layers[-1][0], layers[-1][2]) and layers[-1][0] == layers[-1][2] == layers[-1][3]


def test_ln_tuning_copies_the_base_while_another_adapter_is_merged():
    model = adapted(peft.LNTuningConfig(target_modules=["lin0"]), base("Norm"))
    want = base("Norm").lin0.weight
    model.merge_adapter()
    model.add_adapter("second", peft.LNTuningConfig(target_modules=["lin0"]))
    layer = model.base_model.layers()[0]
    assert torch.equal(layer.ln_tuning_layers["second"].weight, want)
    assert not torch.equal(layer.ln_tuning_layers["default"].weight, want)
    model.unmerge_adapter()
    layer.merge(safe_merge=True, adapter_names=["second"])
    assert layer.merged_adapters == ["second"]


def test_ln_tuning_merges_one_adapter_at_a_time():
    model, x = adapted(peft.LNTuningConfig(target_modules=["lin0"]), base("Norm")), inputs("Norm")
    model.add_adapter("second", peft.LNTuningConfig(target_modules=["lin0"]))
    with pytest.raises(ValueError, match="only one can be merged"):
        model.merge_adapter(["default", "second"])
    want, layer = model(x), model.base_model.layers()[0]
    model.merge_adapter(["second"])
    with pytest.warns(UserWarning, match="second.*instead merging default"):
        model.merge_adapter(["default"])
    assert layer.merged_adapters == ["default"]
    torch.testing.assert_close(model(x), want)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), want)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"only one active adapter per layer, got \['default', 'second'\]"):
        model(x)


def test_ln_tuning_of_a_module_without_tensors():
    net = Net(nn.LayerNorm(16), nn.Linear(16, 3))
    x = torch.randn(2, 16)
    want = net(x)
    model = get_peft_model(net, peft.LNTuningConfig(target_modules=["act"]))
    assert torch.equal(model(x), want) and type(net.act.ln_tuning_layers["default"]) is nn.Tanh


@pytest.mark.parametrize(("config", "kind"), [
    (peft.LilyConfig(target_modules=["lin0"], r=4), "Linear"), (peft.BeftConfig(target_modules=["lin0"]), "Linear"),
    (peft.LNTuningConfig(target_modules=["lin0"]), "Norm"),
], ids=lambda c: getattr(c, "peft_type", c))  # fmt: skip
def test_methods_without_a_delta_weight_say_so(config, kind):
    with pytest.raises(NotImplementedError, match="no delta weight"):
        adapted(config, base(kind)).base_model.layers()[0].get_delta_weight("default")


# ---- LoKr, MiSS


@pytest.mark.parametrize("r", [1, 2])
def test_lokr_effective_conv1d(r):
    torch.manual_seed(0)
    model = Net(nn.Conv1d(4, 8, 3, padding=1), nn.Conv1d(8, 4, 3, padding=1))
    config = peft.LoKrConfig(target_modules=["lin0", "lin1"], r=r, use_effective_conv2d=True)
    agrees_with_merging(adapted(config, model), inputs("Conv1d"))


def test_miss_variants_live_side_by_side():
    run_both(
        peft.MissConfig(target_modules=["lin0"], r=4), peft.MissConfig(target_modules=["lin0"], r=8, init_weights="bat")
    )
    run_both(
        peft.MissConfig(target_modules=["lin0"], r=4, init_weights="bat"),
        peft.MissConfig(target_modules=["lin0"], r=4, init_weights="mini", mini_r=2),
    )


@pytest.mark.parametrize("first", ["bat", True])
def test_several_miss_adapters_change_the_weight_one_after_another(first):
    """'bat' depends on the weight that it finds: W' = W (I + M1) + M1, then W' (I + M2) + M2."""
    model = adapted(peft.MissConfig(target_modules=["lin0"], r=8, init_weights=first))
    model.add_adapter("second", peft.MissConfig(target_modules=["lin0"], r=4, init_weights="bat"))
    model.base_model.set_adapter(["default", "second"])
    perturbed(model, seed=4)
    layer, x = model.base_model.layers()[0], inputs("Linear")
    weight = layer.base_layer.weight.detach().clone()
    for block in (layer.miss_block["default"], layer.miss_block["second"]):
        r = block.shape[-2]
        if block.dim() == 2:
            weight += block.T.repeat(1, 16 // r)
        else:
            parts = weight.view(24 // r, r, 16 // r, r).transpose(1, 2)
            weight = (parts + parts @ block[:, None] + block[:, None]).transpose(1, 2).reshape(24, 16)
    model.base_model.merge_adapter()
    torch.testing.assert_close(layer.base_layer.weight, weight)
    model.base_model.unmerge_adapter()
    agrees_with_merging(model, x)


def test_miss_refuses_mini_shards_of_no_width():
    with pytest.raises(ValueError, match="divisible by mini_r=0"):
        get_peft_model(base("Linear"), peft.MissConfig(target_modules=["lin0"], r=4, init_weights="mini", mini_r=0))


def test_miss_with_a_rest_leaves_the_weight_alone_until_it_is_written():
    model = adapted(peft.MissConfig(target_modules=["lin0"], r=5))
    layer, x = model.base_model.layers()[0], inputs("Linear")
    before = layer.base_layer.weight.clone()
    layer.get_delta_weight("default")
    assert torch.equal(layer.base_layer.weight, before)
    with torch.no_grad():
        layer.miss_block["default"].fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)
    agrees_with_merging(adapted(peft.MissConfig(target_modules=["lin0"], r=5)), x)


# ---- OSF, PSOFT, PVeRA, RandLoRA, RoAd


@pytest.mark.parametrize("low", [None, False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_osf_projects_gradients_whatever_the_parameters_went_through(tmp_path, dtype, low):
    model = get_peft_model(base("Linear").to(dtype), peft.OSFConfig(target_modules=["lin0"], effective_rank=6))
    if low is not None:
        model.save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(base("Linear").to(dtype), tmp_path, low_cpu_mem_usage=low, is_trainable=True)
    layer = model.base_model.layers()[0]
    W = base("Linear").to(dtype).lin0.weight.float()
    U, _, V = torch.linalg.svd(W, full_matrices=False)
    model(inputs("Linear").to(dtype)).float().square().mean().backward()
    params = layer.osf_svd_params["default"]
    tolerance = 1e-5 if dtype is torch.float32 else 1e-2
    assert params["U_low"].grad.norm() > 0
    assert (U[:, :6].T @ params["U_low"].grad.float()).norm() < tolerance * params["U_low"].grad.norm()
    assert (params["V_low"].grad.float() @ V[:6].T).norm() < max(tolerance, 1e-5) * params["V_low"].grad.norm()


@pytest.mark.parametrize("split", ["psoft_init", "pissa_init"])
def test_psoft_finds_the_signs_of_its_singular_vectors(tmp_path, monkeypatch, split):
    config = peft.PsoftConfig(target_modules=["lin0", "lin1"], r=4, ab_svd_init=split)
    model, x = adapted(config), inputs("Linear")
    model.save_pretrained(tmp_path)
    svd = torch.linalg.svd

    def other_solver(W, **kwargs):
        U, S, Vh = svd(W, **kwargs)
        signs = torch.ones_like(S)
        signs[::2] = -1
        return U * signs, S, Vh * signs[:, None]

    monkeypatch.setattr(torch.linalg, "svd", other_solver)
    for low in (False, True):
        loaded = PeftModel.from_pretrained(base("Linear"), tmp_path, low_cpu_mem_usage=low)
        torch.testing.assert_close(loaded(x), model(x))
    agrees_with_merging(loaded, x)


def test_psoft_decomposes_the_base_while_another_adapter_is_merged():
    config = peft.PsoftConfig(target_modules=["lin0"], r=4)
    model = adapted(copy.deepcopy(config))
    model.merge_adapter()
    model.add_adapter("second", copy.deepcopy(config))
    layer = model.base_model.layers()[0]
    torch.testing.assert_close(layer._psoft_A_cache["second"], layer._psoft_A_cache["default"])


@pytest.mark.parametrize("ranks", [(4, 8), (8, 4)])
@pytest.mark.parametrize("config", [peft.PveraConfig, peft.RandLoraConfig, peft.VeraConfig], ids=lambda c: c.__name__)
def test_adapters_on_shared_projections_may_differ_in_rank(config, ranks):
    x = inputs("Linear")
    model = adapted(config(target_modules=["lin0", "lin1"], r=ranks[0]))
    first = model(x)
    model.add_adapter("second", config(target_modules=["lin0", "lin1"], r=ranks[1]))
    model.set_adapter("second")
    assert not torch.allclose(perturbed(model)(x), first)
    agrees_with_merging(model, x)
    model.set_adapter("default")
    torch.testing.assert_close(model(x), first)


def test_pvera_noise_differs_between_layers():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(2)
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
            self.b.load_state_dict(self.a.state_dict())

        def forward(self, x):
            return self.a(x), self.b(x)

    model = get_peft_model(Twice(), peft.PveraConfig(target_modules=["a", "b"], r=8, generator_seed=3))
    for layer in model.base_model.layers():
        for p in layer.parameters():
            if p.requires_grad:
                p.data.fill_(0.5)
    a, b = model.train()(inputs("Linear"))
    assert not torch.allclose(a, b)


def test_shared_state_and_layer_classes_are_no_linear_layers():
    for config in (peft.PveraConfig, peft.RandLoraConfig, peft.UniLoraConfig, peft.TinyLoraConfig):
        layer = get_peft_model(base("Linear"), config(target_modules=["lin0"])).base_model.layers()[0]
        assert not isinstance(layer, nn.Linear)


# ---- RoAd and every other method: a call that fails leaves nothing behind


@pytest.mark.parametrize("config", [
    peft.RoadConfig(target_modules=["lin0"], group_size=4), peft.LoraConfig(target_modules=["lin0"]),
    peft.GloraConfig(target_modules=["lin0"]),
], ids=lambda c: c.peft_type.value)  # fmt: skip
def test_a_failing_call_leaves_no_adapter_names(config):
    model = adapted(config)
    x = inputs("Linear")
    want = model(x)
    with pytest.raises((RuntimeError, ValueError)):
        model(torch.randn(4, 5, 7), adapter_names=["default", "__base__", "default", "default"])
    assert torch.equal(model(x), want)


# ---- SHiRA, SuperTuning, TinyLoRA, UniLoRA, VB-LoRA


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("config", [peft.ShiraConfig, peft.SupertuningConfig], ids=lambda c: c.__name__)
def test_sparse_deltas_raise_no_warnings(config):
    model = perturbed(get_peft_model(base("Linear"), config(target_modules=["lin0"], r=2)))
    model(inputs("Linear")).sum().backward()
    model.merge_adapter()


def test_shira_without_a_mask_has_no_positions_until_a_file_brings_them(tmp_path):
    config = peft.ShiraConfig(target_modules=["lin0"], r=2, mask_type="mine")
    with pytest.raises(ValueError, match="'default' has no positions: set `config.mask_fn` for mask_type='mine'"):
        get_peft_model(base("Linear"), copy.copy(config))(inputs("Linear"))
    config.mask_fn = lambda layer, r: peft.tuners.shira.random_mask(layer, r, random_seed=3)
    model = adapted(config)
    model.save_pretrained(tmp_path)
    for trainable in (False, True):
        loaded = PeftModel.from_pretrained(base("Linear"), tmp_path, is_trainable=trainable)
        torch.testing.assert_close(loaded(inputs("Linear")), model(inputs("Linear")))


def test_waveft_needs_no_filter_without_a_transform():
    config = peft.WaveFTConfig(target_modules=["lin0"], n_frequency=20, use_idwt=False, wavelet_family="db30")
    agrees_with_merging(adapted(config), inputs("Linear"))


@pytest.mark.parametrize(("rank", "text"), [("half", "'half' preserves nothing"), (0, "0 preserves nothing")])
def test_osf_ranks_that_preserve_nothing(rank, text):
    with pytest.raises(ValueError, match=f"lin1: effective_rank {text}"):
        get_peft_model(base("Linear"), peft.OSFConfig(target_modules=["lin0", "lin1"], rank_pattern={"lin1": rank}))


@pytest.mark.parametrize("config", [
    peft.SupertuningConfig(target_modules=["lin0"], r=2), peft.LoraConfig(target_modules=["lin0"]),
    peft.WaveFTConfig(target_modules=["lin0"], n_frequency=8), peft.ShiraConfig(target_modules=["lin0"], r=2),
    peft.C3AConfig(target_modules=["lin0"], block_size=4), peft.PveraConfig(target_modules=["lin0"], r=4),
    peft.BOFTConfig(target_modules=["lin0"], boft_block_size=4), peft.LoKrConfig(target_modules=["lin0"], r=2),
], ids=lambda c: c.peft_type.value)  # fmt: skip
def test_layers_are_freed(config):
    model = adapted(copy.deepcopy(config))
    model.train()(inputs("Linear")).sum().backward()
    model.merge_adapter()
    seen = [weakref.ref(model.base_model.layers()[0]), weakref.ref(model)]
    del model
    gc.collect()
    assert [ref() for ref in seen] == [None, None]


def test_tinylora_numbers_the_targets_of_each_adapter(tmp_path):
    options = {"r": 2, "u": 8, "save_projection": False}
    model = adapted(peft.TinyLoraConfig(target_modules=["lin0", "lin1"], **options))
    model.add_adapter("second", peft.TinyLoraConfig(target_modules=["lin1"], **options))
    model.set_adapter("second")
    want = perturbed(model)(inputs("Linear"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base("Linear"), tmp_path / "second")
    torch.testing.assert_close(loaded(inputs("Linear")), want)


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("kind", ["Embedding", "Linear"])
def test_tinylora_without_projections_loads_completely(tmp_path, kind, save):
    config = peft.TinyLoraConfig(target_modules=["lin0"], r=2, u=8, save_projection=save)
    model = adapted(config, base(kind))
    model.save_pretrained(tmp_path)
    keys = get_peft_model_state_dict(model)
    assert any("tinylora_P" in k for k in keys) == save
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(base(kind), tmp_path)
    assert not [w for w in caught if "missing" in str(w.message)]
    torch.testing.assert_close(loaded(inputs(kind)), model(inputs(kind)))


def test_vblora_bank_gets_its_gradients_back():
    model = get_peft_model(base("Linear"), peft.VBLoRAConfig(target_modules=["lin0"], vector_length=4, num_vectors=8))
    bank = model.base_model.vblora_vector_bank["default"]
    assert bank.requires_grad
    with model.disable_adapter():
        assert not bank.requires_grad
    assert bank.requires_grad


@pytest.mark.parametrize("name", ["b", "o", "lam", "a"])
def test_short_adapter_names_are_fine(tmp_path, name):
    model = get_peft_model(base("Linear"), peft.VeraConfig(target_modules=["lin0"], r=4), adapter_name=name)
    want = perturbed(model)(inputs("Linear"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base("Linear"), tmp_path / name, adapter_name=name)
    torch.testing.assert_close(loaded(inputs("Linear")), want)


@pytest.mark.parametrize("config", [
    peft.OFTConfig(target_modules=["lin0"], oft_block_size=4),
    peft.BOFTConfig(target_modules=["lin0"], boft_block_size=4),
    peft.HRAConfig(target_modules=["lin0"], r=4), peft.MissConfig(target_modules=["lin0"], r=4),
    peft.DeftConfig(target_modules=["lin0"], r=4),
], ids=lambda c: c.peft_type.value)  # fmt: skip
def test_layers_without_a_scale_say_so(config):
    model, x = adapted(config), inputs("Linear")
    layer, want = model.base_model.layers()[0], model(inputs("Linear"))
    layer.scale_layer(1)
    for call, args in ((layer.scale_layer, (2,)), (layer.unscale_layer, ())):
        with pytest.warns(UserWarning, match="has no scale"):
            call(*args)
    assert torch.equal(model(x), want)
