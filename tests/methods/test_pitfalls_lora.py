"""Known defects of the published library's LoRA, one test each: none of them is here. See test_pitfalls.py."""

import copy
import gc
import weakref

import pytest
import torch
from tests.methods.bases import Net
from tests.methods.test_pitfalls import agrees_with_merging, perturbed
from tests.storage import formats
from tests.storage.formats import FORMATS
from torch import nn

import peft
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.config import CordaConfig, KasaConfig, MontecloraConfig

pytestmark = pytest.mark.filterwarnings("ignore")
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def mlp(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(3)
    return Net(nn.Linear(8, 12), nn.Linear(12, 6)).to(dtype)


def lora(**kwargs) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": ["lin0", "lin1"]} | kwargs)


def adapted(model: nn.Module | None = None, size: float = 0.3, **kwargs) -> PeftModel:
    torch.manual_seed(1)
    return perturbed(get_peft_model(mlp() if model is None else model, lora(**kwargs)), size=size).eval()


# ---- attention, embeddings, parameters


def test_attention_keeps_its_parameters():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(2)
            self.lin0 = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x):
            return self.lin0(x, x, x, need_weights=False)[0]

    model = adapted(Attention(), target_modules=["lin0"])
    base = model.base_model.model.lin0.get_base_layer()
    held = {n: (id(p), p.data_ptr(), p.clone()) for n, p in base.named_parameters()}
    x = torch.randn(2, 4, 16)
    for _ in range(20):
        model.train()(x).sum().backward()
    for n, p in base.named_parameters():
        assert (id(p), p.data_ptr()) == held[n][:2] and torch.equal(p, held[n][2])


def test_embedding_with_max_norm_leaves_the_adapter_alone_and_refuses_to_merge():
    torch.manual_seed(0)
    model = adapted(Net(nn.Embedding(10, 8, max_norm=0.5), nn.Identity()), target_modules=["lin0"])
    ids, layer = torch.arange(10), model.base_model.model.lin0
    A = layer.lora_embedding_A["default"].clone()
    with torch.no_grad():
        delta = layer(ids) - layer.base_layer(ids)
    torch.testing.assert_close(delta, layer.get_delta_weight("default"))
    assert torch.equal(layer.lora_embedding_A["default"], A)
    with pytest.raises(NotImplementedError, match="max_norm"):
        model.merge_adapter()


def test_a_parametrised_parameter_is_refused():
    class Shift(nn.Module):
        def forward(self, w):
            return w + 1

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.weight = nn.Parameter(torch.randn(3, 8, 6))

        def forward(self, x):
            return torch.einsum("ti,eio->teo", x, self.weight).sum(1)

    model = nn.ModuleDict({"mlp": Experts()})
    torch.nn.utils.parametrize.register_parametrization(model["mlp"], "weight", Shift())
    want = model["mlp"](X)
    with pytest.raises(ValueError, match="target_parameters"):
        get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=["mlp.weight"]))
    assert all(torch.equal(model["mlp"](X), want) for _ in range(2))


def test_a_tied_embedding_takes_one_step_of_the_optimizer_also_on_a_half_precision_base():
    from tests.methods.test_lora_model import llama

    for dtype in (torch.float32, torch.bfloat16):
        base = llama(tie_word_embeddings=True).to(dtype)
        model = get_peft_model(base, lora(target_modules=["embed_tokens"], ensure_weight_tying=True))
        params = [p for p in model.parameters() if p.requires_grad]
        assert len({p.data_ptr() for p in params}) == len(params) == 2
        core = model.base_model.model
        assert (
            core.lm_head.lora_A["default"].weight.data_ptr()
            == core.model.embed_tokens.lora_embedding_B["default"].data_ptr()
        )
        before = [p.clone() for p in params]
        model(input_ids=torch.tensor([[1, 2, 3]])).logits.float().square().sum().backward()
        torch.optim.AdamW(params, lr=0.1, weight_decay=0.0).step()
        assert max(float((p - q).abs().max()) for p, q in zip(params, before, strict=True)) < 0.11


# ---- deletion, combination, conversion


def test_deleting_reaches_modules_called_like_slots():
    model = nn.ModuleDict({"lora_A": nn.Linear(8, 8), "b": nn.ModuleDict({"lora_x": nn.Linear(8, 8)})})
    model = get_peft_model(model, LoraConfig(target_modules=["lora_A", "lora_x"]))
    model.add_adapter("second", LoraConfig(target_modules=["lora_A", "lora_x"]))
    model.delete_adapter("default")
    assert [layer.adapter_names for layer in model.base_model.layers()] == [["second"]] * 2
    assert len(get_peft_model_state_dict(model, adapter_name="second")) == 4


def test_combinations_check_their_arguments_and_keep_float32():
    model = adapted(mlp(torch.bfloat16))
    model.add_adapter("b", lora())
    with pytest.raises(ValueError, match="weights"):
        model.add_weighted_adapter(["default", "b"], [1.0], "c")
    assert list(model.peft_config) == ["default", "b"]
    for kind in ("cat", "linear", "svd"):
        model.add_weighted_adapter(["default", "b"], [1.0, 0.5], kind, combination_type=kind)
        layer = model.base_model.model.lin0
        assert layer.lora_A[kind].weight.dtype == layer.lora_A["default"].weight.dtype == torch.float32
    model.add_weighted_adapter(["default", "b"], [1.0, 0.5], "wide", combination_type="svd", svd_rank=100)
    A, B = (getattr(layer, s)["wide"].weight for s in ("lora_A", "lora_B"))
    assert A.shape[0] == B.shape[1] == layer.r["wide"]


@pytest.mark.parametrize("conv, x", [
    (nn.Conv1d(4, 8, 3, padding=1), torch.randn(2, 4, 9)),
    (nn.Conv3d(4, 8, 3, padding=1), torch.randn(1, 4, 4, 5, 6)),
], ids=["Conv1d", "Conv3d"])  # fmt: skip
def test_combining_convolutions_by_svd(conv, x):
    model = adapted(Net(copy.deepcopy(conv), nn.Identity()), target_modules=["lin0"])
    model.add_adapter("b", lora(target_modules=["lin0"]))
    perturbed(model.base_model.model.lin0.lora_B["b"].requires_grad_(True))
    model.add_weighted_adapter(["default", "b"], [1.0, 0.5], "c", combination_type="svd", svd_rank=4)
    layer = model.base_model.model.lin0
    want = layer.get_delta_weight("default") + 0.5 * layer.get_delta_weight("b")
    torch.testing.assert_close(layer.get_delta_weight("c"), want, rtol=1e-4, atol=1e-5)
    model.set_adapter("c")
    agrees_with_merging(model, x)


def test_conversion_to_plain_lora_keeps_everything_in_the_file(tmp_path):
    class WithEmbedding(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(3)
            self.emb, self.lin0, self.head = nn.Embedding(10, 8), nn.Linear(8, 12), nn.Linear(12, 3)

        def forward(self, ids):
            return self.head(self.lin0(self.emb(ids)))

    options = {"target_modules": ["emb", "lin0"], "modules_to_save": ["head"]}
    model = get_peft_model(WithEmbedding(), lora(init_lora_weights="olora", **options))
    model.save_pretrained(tmp_path / "initial")
    perturbed(model, size=0.1).eval()
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    loaded = PeftModel.from_pretrained(WithEmbedding(), tmp_path / "plain")
    ids = torch.arange(10)
    torch.testing.assert_close(loaded(ids), model(ids), rtol=1e-4, atol=1e-5)


def test_conversion_to_plain_lora_keeps_biases(tmp_path):
    model = get_peft_model(mlp(), lora(lora_bias=True))
    model.save_pretrained(tmp_path / "initial")
    perturbed(model, size=0.1).eval()
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    torch.testing.assert_close(PeftModel.from_pretrained(mlp(), tmp_path / "plain")(X), model(X), rtol=1e-4, atol=1e-5)


# ---- initialisations


@pytest.mark.parametrize("scheme", ["pissa", "pissa_niter_2", "olora", "orthogonal", "eva", "corda", "lora_ga"])
def test_schemes_leave_embeddings_alone(scheme):
    """As published: the base stays as it is, and a file of an adapted embedding fits it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 8))
    before = model[0].weight.detach().clone()
    layer = get_peft_model(model, lora(target_modules=["0"], init_lora_weights=scheme)).base_model.layers()[0]
    assert torch.equal(layer.base_layer.weight, before)
    assert layer.lora_embedding_A["default"].abs().max() == 0 and layer.lora_embedding_B["default"].std() > 0.5


@pytest.mark.parametrize("spelling", ["mica", "MiCA", "MICA"])
def test_mica_in_any_case_freezes_b(spelling):
    model = get_peft_model(mlp(), lora(init_lora_weights=spelling))
    assert not any(layer.lora_B["default"].weight.requires_grad for layer in model.base_model.layers())
    with torch.no_grad():
        torch.testing.assert_close(model(X), mlp()(X))


@pytest.mark.parametrize("scheme", ["pissa", "olora", "pissa_niter_4", "mica"])
def test_ranks_above_the_dimensions_are_refused(scheme):
    base = mlp()
    with pytest.raises(ValueError, match="'lin1'.*r=8 is more than the smallest dimension"):
        get_peft_model(base, lora(r=8, init_lora_weights=scheme))
    assert all(torch.equal(v, mlp().state_dict()[k]) for k, v in base.state_dict().items())


def test_eva_leaves_all_layers_in_float32():
    config = lora(init_lora_weights="eva", eva_config=peft.EvaConfig(rho=2.0))
    model = get_peft_model(mlp(torch.bfloat16), config)
    peft.initialize_lora_eva_weights(
        model,
        [torch.randn(20, 8, dtype=torch.bfloat16) for _ in range(4)],
        forward_fn=lambda m, x: m(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda layer_input, model_input, name: layer_input[0],
        show_progress_bar=False,
    )
    dtypes = {n: p.dtype for n, p in model.named_parameters() if "lora_" in n}
    assert set(dtypes.values()) == {torch.float32}


def corda(**kwargs) -> LoraConfig:
    return lora(init_lora_weights="corda", corda_config=CordaConfig(**kwargs), target_modules=["lin0"])


def test_cache_files_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = mlp()
    config = corda(cache_file="cache.pt", covariance_file="covariance.pt")
    peft.tuners.lora.corda.preprocess_corda(base, config, run_model=lambda: base(X))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache.pt", "covariance.pt"]


@pytest.mark.parametrize("sign", [1, -1])
def test_corda_does_not_depend_on_the_sign_of_the_inputs(sign):
    base = mlp()
    x = sign * X.abs()
    peft.tuners.lora.corda.preprocess_corda(base, corda(), run_model=lambda: base(x))
    other = mlp()
    peft.tuners.lora.corda.preprocess_corda(other, corda(), run_model=lambda: other(-x))
    torch.testing.assert_close(base.lin0.eigens.S_WC, other.lin0.eigens.S_WC)


@pytest.mark.parametrize("scale", ["stable", "gd_scale", "unit", "weight_svd"])
def test_lora_ga_on_conv1d_is_that_on_linear(scale):
    from transformers.pytorch_utils import Conv1D

    linear, conv = mlp(), Net(Conv1D(12, 8), Conv1D(6, 12))
    for a, b in ((linear.lin0, conv.lin0), (linear.lin1, conv.lin1)):
        b.weight.data, b.bias.data = a.weight.data.T.contiguous(), a.bias.data.clone()
    deltas = []
    for base in (linear, conv):
        config = lora(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig(scale=scale))
        peft.preprocess_loraga(base, config, lambda base=base: base(X).square().sum().backward())
        layer = get_peft_model(base, config).base_model.model.lin0
        deltas.append(layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
    torch.testing.assert_close(*deltas, rtol=1e-3, atol=1e-4)


def test_loading_lora_ga_on_the_unchanged_base_warns_and_the_plain_form_fits(tmp_path):
    base, config = mlp(), lora(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())
    peft.preprocess_loraga(base, config, lambda: base(X).square().sum().backward())
    model = get_peft_model(base, config)
    model.save_pretrained(tmp_path / "initial")
    perturbed(model, size=0.1).eval().save_pretrained(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    with pytest.warns(UserWarning, match="path_initial_model_for_weight_conversion"):
        PeftModel.from_pretrained(mlp(), tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(mlp(), tmp_path / "plain")
    torch.testing.assert_close(loaded(X), model(X), rtol=1e-4, atol=1e-5)


def test_random_decomposition_is_the_same_after_loading(tmp_path):
    torch.manual_seed(5)
    model = perturbed(get_peft_model(mlp(), lora(init_lora_weights="pissa_niter_1")), size=0.1).eval()
    model.save_pretrained(tmp_path)
    for seed in (5, 6):
        torch.manual_seed(seed)
        torch.testing.assert_close(PeftModel.from_pretrained(mlp(), tmp_path)(X), model(X), rtol=1e-4, atol=1e-5)


# ---- variants


def test_dora_refuses_grouped_convolutions():
    with pytest.raises(ValueError, match="grouped convolution 'lin0'"):
        adapted(Net(nn.Conv2d(4, 8, 3, groups=2), nn.Identity()), target_modules=["lin0"], use_dora=True)


def test_dora_norms_are_taken_without_dense_products_and_names_stay_unique():
    model = adapted(use_dora=True)
    for i in range(3):
        model.add_adapter(f"a{i}", lora(use_dora=True))
        model.delete_adapter(f"a{i}")
    names = model.base_model.layers()[0].adapter_layer_names
    assert len(names) == len(set(names))


def test_dora_sees_a_new_base_weight():
    model = adapted(use_dora=True)
    layer, x = model.base_model.model.lin0, X
    model(x)
    layer.set_base_weight(torch.randn(12, 8, generator=torch.Generator().manual_seed(7)))
    V = layer.base_layer.weight + 1.5 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    g = layer.lora_magnitude_vector["default"].weight / V.norm(dim=1)
    torch.testing.assert_close(layer(x), x @ (g[:, None] * V).T + layer.bias, rtol=1e-4, atol=1e-4)
    agrees_with_merging(model, x)


def test_variants_give_their_whole_delta():
    for options in ({"kasa_config": KasaConfig()}, {"use_dora": True}, {"use_bdlora": peft.BdLoraConfig(
        target_modules_bd_a=["lin1"], target_modules_bd_b=["lin0"], nblocks=2)}):  # fmt: skip
        model = adapted(**options)
        layer = model.base_model.model.lin0
        with torch.no_grad():
            want = layer(X) - layer.base_layer(X)
            torch.testing.assert_close(X @ layer.get_delta_weight("default").T, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("low", [False, True])
def test_monteclora_samplers_are_loaded_and_known_to_optimizers(tmp_path, low):
    model = adapted(monteclora_config=MontecloraConfig(buffer_size=2))
    model.train()(X).sum().backward()
    copy.deepcopy(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mlp(), tmp_path, low_cpu_mem_usage=low, is_trainable=True)
    state, again = get_peft_model_state_dict(model), get_peft_model_state_dict(loaded)
    assert state.keys() == again.keys() and any("sampler.std_prior" in k for k in state)
    assert all(torch.equal(v, again[k]) for k, v in state.items())
    trained = {n for n, p in loaded.named_parameters() if p.requires_grad}
    loaded.train()(X)
    assert trained == {n for n, p in loaded.named_parameters() if p.requires_grad}
    assert sum(b.numel() for b in loaded.buffers()) < 200  # no buffers of noise


@pytest.mark.parametrize("low", [False, True])
def test_kasa_base_is_truncated_before_the_first_forward(tmp_path, low):
    model = adapted(kasa_config=KasaConfig())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mlp(), tmp_path, low_cpu_mem_usage=low)
    layer = loaded.base_model.model.lin0
    torch.testing.assert_close(layer.base_layer.weight, model.base_model.model.lin0.base_layer.weight)
    torch.testing.assert_close(loaded(X), model(X))


def experts(folder, count: int, **kwargs) -> list[str]:
    for i in range(count):
        model = perturbed(get_peft_model(mlp(), lora(**kwargs)), seed=i)
        model.save_pretrained(folder / str(i))
    return [str(folder / str(i)) for i in range(count)]


def test_arrow_with_fewer_experts_than_top_k_and_adapters_added_later(tmp_path):
    paths = experts(tmp_path, 4)
    model = peft.create_arrow_model(mlp(), paths[:2], peft.ArrowConfig(top_k=5)).eval()
    want = model(X)
    assert torch.isfinite(want).all()
    model.add_adapter("other", lora())
    perturbed(model.base_model.model.lin0.lora_B["other"].requires_grad_(True))
    torch.testing.assert_close(model(X), want)
    model.delete_adapter("task_1")
    assert torch.isfinite(model(X)).all()


def test_arrow_leaves_the_stored_experts_alone(tmp_path):
    paths = experts(tmp_path, 4)
    options = peft.ArrowConfig(top_k=2, use_gks=True)
    model = peft.create_arrow_model(mlp(), paths[:2], options, general_adapter_paths=paths[2:])
    layer = model.base_model.model.lin0
    before = [layer.lora_A[f"task_{i}"].weight.clone() for i in range(2)]
    model(X)
    assert all(torch.equal(layer.lora_A[f"task_{i}"].weight, before[i]) for i in range(2))


def test_arrow_refuses_embeddings(tmp_path):
    torch.manual_seed(0)
    base = Net(nn.Embedding(10, 8), nn.Linear(8, 4))
    get_peft_model(copy.deepcopy(base), lora()).save_pretrained(tmp_path)
    with pytest.raises((TypeError, ValueError), match="lin0|[Ll]inear"):
        peft.create_arrow_model(base, [str(tmp_path)], peft.ArrowConfig())


@pytest.mark.parametrize("kind", ["Conv1D", "Embedding"])
def test_intruders_on_transposed_layers(kind):
    from transformers.pytorch_utils import Conv1D

    from peft.tuners.lora.intruders import reduce_intruder_dimension

    torch.manual_seed(0)
    base, x = {
        "Conv1D": (Net(Conv1D(12, 8), nn.Identity()), X),
        "Embedding": (Net(nn.Embedding(10, 8), nn.Identity()), torch.arange(10)),
    }[kind]
    base.lin0.weight.data.normal_()
    model = adapted(base, size=1.0, target_modules=["lin0"])
    reduce_intruder_dimension(model, top_k=4, threshold_epsilon=0.9, logging_sink=None)
    assert model.active_adapter == "intruder_reduced"
    agrees_with_merging(model, x)
    assert model.peft_config["default"] is not model.peft_config["intruder_reduced"]


def test_alora_takes_any_memory_layout_and_batches_without_the_invocation():
    from tests.methods.test_lora_model import llama

    config = LoraConfig(r=2, target_modules=["q_proj"], alora_invocation_tokens=[3, 4], task_type="CAUSAL_LM")
    model = perturbed(get_peft_model(llama(), config)).eval()
    ids = torch.tensor([[1, 3, 4, 5], [1, 2, 2, 5]])
    with model.disable_adapter():
        want = model(input_ids=ids).logits
    got = model(input_ids=ids).logits
    torch.testing.assert_close(got[1], want[1])
    torch.testing.assert_close(got[0, :1], want[0, :1])
    assert not torch.allclose(got[0, 1:], want[0, 1:])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, layer.in_features, 4).transpose(1, 2)  # not contiguous
    torch.testing.assert_close(layer(x), layer(x.contiguous()))


def test_variant_layers_are_freed():
    for options in ({"use_dora": True}, {"kasa_config": KasaConfig()}, {"monteclora_config": MontecloraConfig()}):
        model = adapted(**options)
        model.train()(X).sum().backward()
        ref = weakref.ref(model.base_model.layers()[0])
        del model
        gc.collect()
        assert ref() is None


# ---- quantised bases


@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.writable])
@torch.no_grad()
def test_merging_into_quantised_weights(name):
    """Scaled biases, several adapters in one call, and a check of the result before anything is written."""
    if not formats.installed(FORMATS[name].package):
        pytest.skip("not installed")
    model, x = adapted(formats.base(name), lora_bias=True), formats.inputs()
    model.add_adapter("b", lora(lora_bias=True))
    model.base_model.set_adapter(["default", "b"])
    perturbed(model, seed=5)
    layer = model.base_model.model.lin0
    bias = layer.base_layer.bias.clone()
    added = sum(layer.lora_B[n].bias * layer.scaling[n] for n in ("default", "b"))
    before, want = layer.get_base_weight().clone(), model(x)
    target = before + sum(layer.get_delta_weight(n) for n in ("default", "b"))
    model.merge_adapter()
    torch.testing.assert_close(layer.base_layer.bias, bias + added)
    assert (layer.get_base_weight() - target).norm() < 0.15 * target.norm()
    model.unmerge_adapter()
    assert torch.equal(layer.get_base_weight(), before) and torch.equal(layer.base_layer.bias, bias)
    torch.testing.assert_close(model(x), want)
    layer.lora_B["b"].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        layer.merge(safe_merge=True, adapter_names=["b"])
    assert torch.equal(layer.get_base_weight(), before) and not layer.merged
