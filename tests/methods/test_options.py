"""Options of layer methods that the examples of the contract tests leave at their defaults: what they compute, and the
errors where they do not fit a layer or a file. Methods in the order of their names.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from tests.methods.bases import Net, base, inputs
from tests.methods.test_pitfalls import adalora, adapted, agrees_with_merging, perturbed
from torch import nn

import peft
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners import frod, randlora
from peft.tuners.oft import nearest_divisor

pytestmark = pytest.mark.filterwarnings("ignore")
BOTH = {"target_modules": ["lin0", "lin1"]}


# ---- what does not fit is named, and changes nothing


@pytest.mark.parametrize(
    ("method", "options", "text"),
    [
        ("BOFT", {"boft_block_size": 5}, "lin0: The width must be divisible .*: width 16, boft_block_size=5"),
        ("BOFT", {"boft_n_butterfly_factor": 4}, "lin0: Too many butterfly factors: .* boft_n_butterfly_factor=4"),
        (
            "BOFT",
            {"boft_block_size": 0, "boft_block_num": 16, "boft_n_butterfly_factor": 2},
            "lin0: Blocks must have an even size .*: width 16",
        ),
        (
            "C3A",
            {"block_size": 16},
            r"lin0: the block size should be positive and divide the widths \(24, 16\), got 16",
        ),
        ("FourierFT", {"n_frequency": 385}, "lin0: `n_frequency` must be above 0 and at most in · out = 384, got 385"),
        ("FourierFT", {"n_frequency": 9, "n_frequency_pattern": {"lin1": 0}}, "lin1: `n_frequency` .* got 0"),
        ("WaveFT", {"n_frequency": 0}, "lin0: `n_frequency` must be above 0 .* got 0"),
        ("Gralora", {"r": 5, "gralora_k": 5}, r"lin0: the widths \(24, 16\) must be divisible by gralora_k=5"),
        ("Hira", {"init_weights": "gausian"}, "init_weights='gausian'; use True, False or 'gaussian'"),
        ("Miss", {"r": 17}, "lin0: `r` should be positive and at most the input width 16, got 17"),
        ("Miss", {"r": 16, "init_weights": "bat"}, r"lin0: the widths \(24, 16\) must be divisible by r=16 for 'bat'"),
        ("Psoft", {"r": 17}, r"lin0: r=17 must be at most min\(in, out\) = 16"),
        ("Road", {"group_size": 16}, "lin0: the output width 24 must be divisible by group_size=16"),
        ("Shira", {"r": 10}, r"lin0: r·\(in \+ out\) must be positive and at most in·out = 384, got r=10"),
        ("Supertuning", {"sparsity": 0.999}, "lin0: sparsity=0.999 leaves none of 384 weights to train"),
        ("VBLoRA", {"vector_length": 6}, r"lin0: the widths \(24, 16\) must be divisible by vector_length=6"),
    ],
)
def test_options_that_do_not_fit_a_layer(method, options, text):
    model = base("Linear")
    with pytest.raises(ValueError, match=text):
        get_peft_model(model, getattr(peft, f"{method}Config")(**BOTH, **options))
    assert type(model.lin0) is nn.Linear and not hasattr(model, "peft_config")


@pytest.mark.parametrize(
    ("first", "second", "error", "text"),
    [
        (adalora(), adalora(), ValueError, r"only 1 trainable adapter.* \(now trainable: \['default', 'second'\]\)"),
        (
            peft.SupertuningConfig(**BOTH),
            peft.SupertuningConfig(**BOTH, save_precomputed_indices=False),
            ValueError,
            "`save_precomputed_indices` must be the same",
        ),
        (
            peft.TinyLoraConfig(**BOTH),
            peft.TinyLoraConfig(**BOTH, save_projection=False),
            TypeError,
            "`save_projection` must be the same",
        ),
    ],
    ids=["adalora", "supertuning", "tinylora"],
)
def test_adapters_that_do_not_go_together(first, second, error, text):
    model = adapted(first)
    want = model(inputs("Linear"))
    with pytest.raises(error, match=text):
        model.add_adapter("second", second)
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(inputs("Linear")), want)


def test_default_targets_of_unknown_architectures():
    with pytest.raises(ValueError, match=r"specify `feedforward_modules` \(\[\] for none\).*'custom'"):
        get_peft_model(base("Linear"), peft.IA3Config(**BOTH))
    assert set(get_peft_model(base("Linear"), peft.OSFConfig()).base_model.named_layers()) == {"lin0", "lin1"}


@pytest.mark.parametrize("method", ["Frod", "Psoft", "Supertuning"])
def test_models_on_meta_can_be_adapted(method):
    """The plan of a model without memory for it: the right shapes, no values."""
    options = {"Frod": {"progressbar": False}, "Psoft": {"r": 4}, "Supertuning": {"sparsity": 0.5, "r": 2}}[method]
    config = getattr(peft, f"{method}Config")(**BOTH, **options)
    empty, full = (get_peft_model(base("Linear").to(d), config) for d in ("meta", "cpu"))
    shapes = [{n: p.shape for n, p in m.named_parameters() if p.requires_grad} for m in (empty, full)]
    assert shapes[0] == shapes[1] and len(shapes[0]) > 3
    assert all(p.is_meta for p in empty.parameters())


def test_adamss_needs_the_weights():
    with pytest.raises(RuntimeError, match="the base model must be loaded before the adapter is made"):
        get_peft_model(base("Linear").to("meta"), peft.AdamssConfig(**BOTH, r=8))


# ---- AdaLoRA, BOFT, DEFT


def test_adalora_without_a_trainable_adapter():
    model = get_peft_model(base("Linear"), adalora(inference_mode=True)).base_model
    assert not hasattr(model, "rankallocator")
    with pytest.raises(AttributeError, match=r"None of the AdaLoRA adapters \['default'\] is trainable.*is_trainable"):
        model.update_and_allocate(1)
    with pytest.raises(TypeError, match="AdaLoraModel does not support add_weighted_adapter"):
        model.add_weighted_adapter(["default"], [1.0], "c")


@pytest.mark.parametrize(
    "config",
    [
        peft.BOFTConfig(target_modules=["lin0"], boft_block_size=4, boft_n_butterfly_factor=2),
        peft.OFTConfig(target_modules=["lin0"], oft_block_size=4, use_cayley_neumann=False),
        peft.HRAConfig(target_modules=["lin0"], r=3),
    ],
    ids=lambda c: c.peft_type.value,
)
def test_delta_weights_of_rotations(config):
    """get_delta_weight is the rotation: with BOFT (R, s), y = s ⊙ (W R xᵀ) + b; HRA y = W H xᵀ + b, OFT with xᵀ R."""
    layer, x = adapted(config).base_model.layers()[0], inputs("Linear")
    R, s = found if isinstance(found := layer.get_delta_weight("default"), tuple) else (found, None)
    torch.testing.assert_close(R @ R.T, torch.eye(16), rtol=1e-4, atol=1e-5)
    linear = layer.base_layer
    z = F.linear(x @ R if config.peft_type != "HRA" else x @ R.T, linear.weight)
    torch.testing.assert_close(layer(x), (z if s is None else z * s[:, 0]) + linear.bias, rtol=1e-4, atol=1e-5)


def test_deft_dropout_is_on_the_input_of_r_alone():
    for method in ("relu", "qr"):
        config = peft.DeftConfig(
            **BOTH, r=4, alpha=2, decomposition_method=method, deft_dropout=1.0, init_weights=False
        )
        model, x = adapted(config), inputs("Linear")
        agrees_with_merging(model, x)
        layer = model.base_model.layers()[0].train()
        W, P = layer.base_layer.weight, layer.deft_P["default"]
        Q, right = (P, P.relu()) if method == "relu" else (torch.linalg.qr(P)[0],) * 2
        torch.testing.assert_close(layer(x), F.linear(x, W - Q @ right.T @ W, layer.base_layer.bias))
        R = Q @ layer.deft_R["default"] * 0.5  # alpha / r
        torch.testing.assert_close(layer.eval()(x), F.linear(x, W - Q @ right.T @ W + R, layer.base_layer.bias))


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_deft_draws_r(scale):
    config = peft.DeftConfig(target_modules=["0"], r=100, init_weights=False, init_scale=scale)
    R = get_peft_model(nn.Sequential(nn.Linear(100, 100)), config).base_model.layers()[0].deft_R["default"]
    assert R.std().item() == pytest.approx(0.02 * scale, rel=0.05)


# ---- FRoD, GLoRA, HiRA, (IA)³


def test_categories_of_frod():
    """Part of the file format: the bases are stored under these names."""
    names = {
        "q_proj": "q_proj",
        "layers.0": "layers_0",
        "blocks.3.fc": "fc",
        "model.layers.0.self_attn.q_proj": "self_attn_q_proj",
        "encoder.layer.0.attention.output.dense": "attention_output",
        "encoder.layer.0.output.dense": "output_dense",
        "output.dense": "output_dense",
    }
    assert {key: frod.category(key) for key in names} == names


def test_frod_layers_of_a_category_have_one_width():
    model = nn.ModuleDict({"1": nn.ModuleDict({"fc": nn.Linear(4, 4)}), "2": nn.ModuleDict({"fc": nn.Linear(6, 4)})})
    with pytest.raises(ValueError, match=r"category 'fc', but their input widths differ: \[4, 6\]"):
        get_peft_model(model, peft.FrodConfig(target_modules=["fc"], progressbar=False))


def test_frod_starts_elsewhere_on_request():
    config = peft.FrodConfig(target_modules=["lin0"], progressbar=False, init_weights=False)
    layer = get_peft_model(base("Linear"), config).base_model.layers()[0]
    assert 0.01 < layer.get_delta_weight("default").abs().mean() < 10


def test_frod_with_a_singular_basis():
    """Equal columns of the weight: the shared basis has no inverse."""
    model = base("Linear")
    with torch.no_grad():
        model.lin0.weight[:, 8:] = 0.0
    want = model(inputs("Linear"))
    adapted_to = get_peft_model(model, peft.FrodConfig(target_modules=["lin0"], progressbar=False))
    V = adapted_to.base_model.layers()[0].frod_V["default"]["lin0"]
    assert torch.linalg.matrix_rank(V) < 16
    torch.testing.assert_close(adapted_to(inputs("Linear")), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [peft.FrodConfig, peft.VeraConfig, peft.PveraConfig], ids=lambda c: c.__name__)
def test_files_with_and_without_projections(tmp_path, config):
    options = {"progressbar": False} if config is peft.FrodConfig else {"r": 4}
    model = adapted(config(**BOTH, **options, save_projection=False))
    want = model(inputs("Linear"))
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="The file holds no bases|Specified to not load p?vera_A and p?vera_B"):
        loaded = PeftModel.from_pretrained(base("Linear"), tmp_path)
    torch.testing.assert_close(loaded(inputs("Linear")), want)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(values | {"save_projection": True}))
    with pytest.raises(ValueError, match="not present! Set save_projection=False"):
        PeftModel.from_pretrained(base("Linear"), tmp_path)


def test_glora_without_a_bias_and_with_paths_left_out(tmp_path):
    model = Net(nn.Linear(16, 24, bias=False), nn.Linear(24, 16))
    config = peft.GloraConfig(**BOTH, r=2, config_A_B="vector", config_C="none", config_D_E="vector")
    model = adapted(config, model)
    agrees_with_merging(model, inputs("Linear"))
    state = get_peft_model_state_dict(model)
    zeros = {k.removeprefix("base_model.model."): tuple(v.shape) for k, v in state.items() if k.endswith("zeros")}
    assert zeros == {  # as published: also where the base layer has no bias
        "lin0.glora_C.zeros": (16, 1),
        "lin0.glora_D.zeros": (24,),
        "lin0.glora_E.zeros": (24,),
        "lin1.glora_C.zeros": (24, 1),
    }


@pytest.mark.parametrize("form", ["config_A_B", "config_C", "config_D_E"])
def test_glora_in_half_precision_with_one_path(form):
    """The adapter is in float32; what the paths left out stand for is, too."""
    options = dict.fromkeys(("config_A_B", "config_C", "config_D_E"), "none") | {form: "vector"}
    model, x = base("Linear").bfloat16(), inputs("Linear").bfloat16()
    plain = model(x)
    model = adapted(peft.GloraConfig(**BOTH, **options), model)
    y = model(x)
    assert y.dtype == torch.bfloat16 and (y - plain).abs().max() > 0.1
    model.merge_adapter()
    torch.testing.assert_close(model(x), y, rtol=2e-2, atol=5e-2)


def test_hira_delta_is_the_factor():
    layer = adapted(peft.HiraConfig(target_modules=["lin0"], r=4)).base_model.layers()[0]
    factor = layer.get_delta_weight("default")
    torch.testing.assert_close(factor, layer.hira_B["default"] @ layer.hira_A["default"])
    torch.testing.assert_close(
        layer(inputs("Linear")), F.linear(inputs("Linear"), layer.weight * (1 + factor), layer.bias)
    )


def ia3_pair(first: dict, second: dict) -> PeftModel:
    model = adapted(peft.IA3Config(**{**BOTH, "feedforward_modules": ["lin1"], **first}))
    model.add_adapter("b", peft.IA3Config(**{**BOTH, "feedforward_modules": ["lin1"], **second}))
    model.set_adapter("b")
    return perturbed(model, seed=5)


def test_weighted_ia3_adapters():
    model = ia3_pair({}, {"target_modules": ["lin1"]})
    model.base_model.add_weighted_adapter(["default", "b"], [0.25, 2.0], "c")
    lin0, lin1 = model.base_model.layers()
    torch.testing.assert_close(lin0.ia3_l["c"], 0.25 * lin0.ia3_l["default"])  # 'b' is not on it
    torch.testing.assert_close(lin1.ia3_l["c"], 0.25 * lin1.ia3_l["default"] + 2 * lin1.ia3_l["b"])
    assert model.active_adapters == ["b"] and not lin1.ia3_l["c"].requires_grad
    assert model.peft_config["c"].target_modules == {"lin0", "lin1"}
    before = lin1.ia3_l["c"].clone()
    model.base_model.add_weighted_adapter(["default"], [3.0], "c")  # published: no change, no error
    assert torch.equal(lin1.ia3_l["c"], before)
    with pytest.raises(ValueError, match=r"Adapter d does not exist; there are \['b', 'c', 'default'\]"):
        model.base_model.add_weighted_adapter(["default", "d"], [1.0, 1.0], "e")


def test_weighted_ia3_adapters_leave_modules_alone_that_no_source_has():
    model = ia3_pair({"target_modules": ["lin0"], "feedforward_modules": []}, {"exclude_modules": ["lin1"]})
    model.base_model.add_weighted_adapter(["default", "b"], [0.5, 0.5], "c")
    assert torch.equal(model.base_model.named_layers()["lin1"].ia3_l["c"], torch.ones(1, 24))


def test_weighted_ia3_adapters_scale_the_same_side():
    model = ia3_pair({}, {"feedforward_modules": ["lin0"]})
    with pytest.raises(ValueError, match=r"lin0 is among the `feedforward_modules` of some of .*\['default', 'b'\]"):
        model.base_model.add_weighted_adapter(["default", "b"], [0.5, 0.5], "c")
    assert list(model.peft_config) == ["default", "b"]


# ---- LoHa and LoKr, MiSS, OFT


@pytest.mark.parametrize("r", [1, 8])  # factored, dense
@pytest.mark.parametrize("method", ["LoHa", "LoKr"])
def test_rank_dropout_drops_output_features(method, r):
    scaled = {"rank_dropout_scale": True} if method == "LoKr" else {}
    config = getattr(peft, f"{method}Config")(target_modules=["lin0"], r=r, rank_dropout=0.5, **scaled)
    model, x = adapted(config), inputs("Linear")
    layer = model.base_model.layers()[0]
    y = layer.base_layer(x)
    full = layer(x) - y
    torch.manual_seed(0)
    share = (layer.train()(x) - y) / full
    kept = share.flatten(0, -2)[0].abs() > 0.1
    assert 0 < kept.sum() < 24
    torch.testing.assert_close(share, (kept * 24 / kept.sum()).expand_as(share), rtol=1e-2, atol=1e-3)
    if scaled:
        layer.rank_dropout_scale["default"] = False
        share = (layer(x) - y) / full
        torch.testing.assert_close(share, share.round().clamp(0, 1), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("method", ["LoHa", "LoKr"])
def test_module_dropout_skips_the_adapter(method):
    config = getattr(peft, f"{method}Config")(target_modules=["lin0"], r=2, module_dropout=0.5)
    layer, x = adapted(config).base_model.layers()[0], inputs("Linear")
    base_output, whole = layer.base_layer(x), layer(x)
    torch.manual_seed(0)
    skipped = [torch.equal(layer.train()(x), base_output) for _ in range(20)]
    assert 3 < sum(skipped) < 17
    torch.testing.assert_close(next(y for y in iter(lambda: layer(x), None) if not torch.equal(y, base_output)), whole)


def test_lycoris_scale_is_relative_to_the_configured_one():
    layer, x = adapted(peft.LoHaConfig(target_modules=["lin0"], r=2, alpha=6)).base_model.layers()[0], inputs("Linear")
    change = layer(x) - layer.base_layer(x)
    layer.set_scale("default", 0.5)
    assert layer.scaling == {"default": 1.5}
    torch.testing.assert_close(layer(x) - layer.base_layer(x), change / 2)
    layer.unscale_layer()
    assert layer.scaling == {"default": 3.0}


def test_published_name_of_the_miss_variant():
    for init, name in ((True, True), ("bat", "bat"), ("mini", "mini")):
        config = peft.MissConfig(target_modules=["lin0"], r=4, init_weights=init)
        assert get_peft_model(base("Linear"), config).base_model.layers()[0].miss_fn == name


def test_a_bat_becomes_a_lora_of_its_delta():
    model = adapted(peft.MissConfig(target_modules=["lin0"], r=8, init_weights="bat"))
    config, state = peft.convert_to_lora(model, 16)
    lora = get_peft_model(base("Linear"), config)
    set_peft_model_state_dict(lora, state)
    torch.testing.assert_close(lora(inputs("Linear")), model(inputs("Linear")), rtol=1e-4, atol=1e-4)


def test_oft_takes_the_nearest_divisor():
    assert [nearest_divisor(24, n) for n in (1, 5, 7, 10, 23, 24, 99)] == [1, 4, 6, 8, 24, 24, 24]
    for given, option in (({"oft_block_size": 5}, "oft_block_size"), ({"r": 5, "oft_block_size": 0}, "r")):
        with pytest.warns(UserWarning, match=rf"Invalid `{option}` \(5\) for width 16. Adjusted `{option}` to \(4\)"):
            model = get_peft_model(base("Linear"), peft.OFTConfig(target_modules=["lin0"], **given))
        layer = model.base_model.layers()[0]
        assert (layer.r["default"], layer.oft_block_size["default"]) == (4, 4)


def test_oft_files_of_an_older_form():
    model = get_peft_model(base("Linear"), peft.OFTConfig(target_modules=["lin0"], oft_block_size=4))
    state = {k.replace("oft_R.weight", "oft_r.weight"): v for k, v in get_peft_model_state_dict(model).items()}
    with pytest.raises(ValueError, match="old OFT checkpoint"):
        set_peft_model_state_dict(model, state)


# ---- PEANuT, PSOFT, RandLoRA and Lily


def test_peanut_takes_any_activation_of_transformers():
    from transformers.activations import ACT2FN

    config = peft.PeanutConfig(target_modules=["lin0"], r=4, act_fn="relu2")
    layer = adapted(config).base_model.layers()[0]
    H = ACT2FN["relu2"](layer.base_layer.weight.T @ layer.peanut_A["default"].weight.T)
    torch.testing.assert_close(layer.get_delta_weight("default"), layer.peanut_B["default"].weight @ H.T)


def test_psoft_with_the_fast_solver():
    options = {"target_modules": ["lin0"], "r": 15, "psoft_svd": "lowrank", "psoft_svd_lowrank_niter": 20}
    model = base("Linear")
    state = torch.random.get_rng_state()
    layer = get_peft_model(model, peft.PsoftConfig(**options)).base_model.layers()[0]
    assert torch.equal(torch.random.get_rng_state(), state)  # it has a seed of its own
    A, B = layer._psoft_A_cache["default"], layer._psoft_B_cache["default"]
    U, S, Vh = torch.linalg.svd(layer.base_layer.weight)
    torch.testing.assert_close(B @ A, (U[:, :15] * S[:15]) @ Vh[:15], rtol=1e-3, atol=1e-3)


def test_psoft_of_a_free_matrix():
    options = {"target_modules": ["lin0"], "r": 4, "psoft_orth": False, "init_weights": False}
    layer = get_peft_model(base("Linear"), peft.PsoftConfig(**options)).base_model.layers()[0]
    R = layer.psoft_R["default"]
    assert 0.02 < (R.weight - torch.eye(4)).std() < 0.3
    A, B = layer._psoft_A_cache["default"], layer._psoft_B_cache["default"]
    torch.testing.assert_close(layer.get_delta_weight("default"), B @ (R.weight - torch.eye(4)) @ A)


def test_large_bases_are_stored_once(tmp_path, monkeypatch):
    model = adapted(peft.RandLoraConfig(**BOTH, r=4))
    assert sum("randlora_A" in k for k in get_peft_model_state_dict(model)) == 3  # as published, with copies
    monkeypatch.setattr(randlora, "COPIES_UP_TO", 1000)
    assert sum("randlora_A" in k for k in get_peft_model_state_dict(model)) == 1
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(
        PeftModel.from_pretrained(base("Linear"), tmp_path)(inputs("Linear")), model(inputs("Linear"))
    )


# ---- SHiRA, TinyLoRA


def test_shira_scale_and_masks_of_another_size():
    layer, x = adapted(peft.ShiraConfig(target_modules=["lin0"], r=2)).base_model.layers()[0], inputs("Linear")
    change = layer(x) - layer.base_layer(x)
    layer.set_scale("default", 3)
    layer.set_scale("other", 5)
    torch.testing.assert_close(layer(x) - layer.base_layer(x), 3 * change)
    config = peft.ShiraConfig(target_modules=["lin0"], r=2, mask_type="mine")
    config.mask_fn = lambda base_layer, r: torch.eye(24, 16)
    with pytest.raises(ValueError, match=r"'mine' has 16 ones for a layer of 16 -> 24 .* r·\(in \+ out\) = 80"):
        get_peft_model(base("Linear"), config)


def test_tinylora_starts_elsewhere_on_request():
    def vector(init):
        config = peft.TinyLoraConfig(target_modules=["lin0"], u=4000, init_weights=init, init_v_bound=0.5)
        return get_peft_model(base("Linear"), config).base_model.tinylora_v["default"]["0"]

    assert vector(True).abs().max() == 0
    assert vector(False).std().item() == pytest.approx(1, rel=0.1) and vector(False).abs().max() > 2
    assert vector("uniform").std().item() == pytest.approx(0.5 / 3**0.5, rel=0.1) and vector("uniform").max() <= 0.5
