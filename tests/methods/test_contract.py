"""The contract of every layer method, for every layer kind it declares: taken from the registry, no list to edit."""

import copy
import importlib
import pickle
import warnings

import accelerate
import pytest
import torch
from tests.methods.bases import BASES, DEVICE, base, inputs, targets
from torch import nn

import peft
from peft import registry
from peft.core.layer import AdapterLayer
from peft.core.tuner import TunerModel

LAYER_METHODS = {
    m.name: m for m in registry.methods().values() if m.layer is not None and issubclass(m.tuner, TunerModel)
}
CASES = [(name, kind.name) for name, m in LAYER_METHODS.items() for kind in m.layer.kinds if kind.name in BASES]
pytestmark = pytest.mark.parametrize(("name", "kind"), CASES)


def make_config(name: str, kind: str, **kwargs):
    method = LAYER_METHODS[name]
    options = {**method.tuner.example, **kwargs}
    if "feedforward_modules" in options and len(targets(kind)) == 1:
        options["feedforward_modules"] = []
    return method.config(**{"target_modules": targets(kind), **options})


def adapted(
    name: str, kind: str, dtype: torch.dtype = torch.float32, seed: int = 11, prepare=lambda model: model, **kwargs
) -> peft.PeftModel:
    model = prepare(base(kind).to(dtype))
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, make_config(name, kind, **kwargs)).eval()
    return perturb(model, seed)


def perturb(model: nn.Module, seed: int = 11, size: float = 0.05) -> nn.Module:
    """Give every trainable adapter parameter some value, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter += size * noise.to(parameter)
    return model


def quiet_merge(model, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.merge_adapter(**kwargs)


def layers_of(model) -> list[AdapterLayer]:
    return model.base_model.layers()


def test_default_init_changes_nothing(name, kind):
    if not LAYER_METHODS[name].tuner.identity_at_init:
        pytest.skip("the method does not start at the base model")
    expected = base(kind)(inputs(kind))
    model = peft.get_peft_model(base(kind), make_config(name, kind)).eval()
    torch.testing.assert_close(model(inputs(kind)), expected, rtol=1e-5, atol=1e-5)


def test_autocast_stays_near_full_precision(name, kind):
    """Forward and backward in a bfloat16 region, as mixed-precision training runs them."""
    model, x = adapted(name, kind), inputs(kind)
    found = []
    for enabled in (False, True):
        torch.manual_seed(3)
        model.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=enabled):
            y = model(x)
        y.float().square().sum().backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append((y.detach().float(), torch.cat(grads)))
    (y, g), (low_y, low_g) = found
    torch.testing.assert_close(low_y, y, rtol=5e-2, atol=5e-2)
    assert nn.functional.cosine_similarity(low_g, g, dim=0) > 0.97


def test_orientation_is_written_as_published(name, kind):
    """`fan_in_fan_out` in the file says how the base weight is stored, whatever the user said."""
    if "fan_in_fan_out" not in LAYER_METHODS[name].config.__dataclass_fields__ or kind not in ("Linear", "Conv1D"):
        pytest.skip("no such option, or no linear layer")
    config = make_config(name, kind, fan_in_fan_out=kind == "Linear")
    if name == "hira":  # its published files keep what was given
        peft.get_peft_model(base(kind), config)
        assert config.fan_in_fan_out == (kind == "Linear")
        return
    with pytest.warns(UserWarning, match="Setting fan_in_fan_out to"):
        peft.get_peft_model(base(kind), config)
    assert config.fan_in_fan_out == (kind == "Conv1D")


def test_trained_adapter_changes_the_output_and_disabling_restores_it_bitwise(name, kind):
    expected = base(kind).requires_grad_(False)(
        inputs(kind)
    )  # torch's attention takes another kernel while weights train
    model = adapted(name, kind)
    changed = model(inputs(kind))
    assert (changed - expected).abs().max() > 1e-4
    with model.disable_adapter():
        assert torch.equal(model(inputs(kind)), expected)
    assert torch.equal(model(inputs(kind)), changed)


def test_merged_equals_unmerged_and_unmerging_restores_bitwise(name, kind):
    model = adapted(name, kind)
    if not all(layer.mergeable for layer in layers_of(model)):
        with pytest.raises(NotImplementedError):
            model.merge_adapter()
        return
    expected, before = model(inputs(kind)), {k: v.clone() for k, v in base(kind).state_dict().items()}
    for _ in range(3):
        quiet_merge(model)
        torch.testing.assert_close(model(inputs(kind)), expected, rtol=2e-4, atol=2e-5)
        model.unmerge_adapter()
    after = peft.get_base_model_state_dict(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(model(inputs(kind)), expected)
    merged = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(m, AdapterLayer) for m in merged.modules())
    torch.testing.assert_close(merged(inputs(kind)), expected, rtol=2e-4, atol=2e-5)


def test_unmerge_is_exact_in_bfloat16_after_many_cycles(name, kind):
    model = adapted(name, kind, torch.bfloat16)
    if not all(layer.mergeable for layer in layers_of(model)):
        pytest.skip("cannot be merged: depends on the input")
    before = {k: v.clone() for k, v in base(kind).to(torch.bfloat16).state_dict().items()}
    for _ in range(100 if kind == "Linear" else 5):
        quiet_merge(model)
        model.unmerge_adapter()
    after = peft.get_base_model_state_dict(model)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_unmerging_without_a_copy_is_right_or_refused(name, kind):
    model = adapted(name, kind, torch.float64).double()
    layers = [layer for layer in layers_of(model) if layer.mergeable and "replace" not in layer.hooks]
    before = {k: v.clone() for k, v in peft.get_base_model_state_dict(model).items()}
    for layer in reversed(layers):
        layer.merge(keep=False)
    for layer in layers:  # what only adds is subtracted, and trained token rows are put back
        adds = "map_weight" not in layer.hooks or name in ("lora", "trainable_tokens")
        if adds and layer.standalone_delta:
            layer.unmerge()
        else:
            with pytest.raises(RuntimeError, match=f"{layer.method_name} adapters merged with keep=False cannot be un"):
                layer.unmerge()
            return
    torch.testing.assert_close(peft.get_base_model_state_dict(model), before)


def test_safe_merge_refuses_nan_and_changes_nothing(name, kind):
    model = adapted(name, kind)
    if not all(layer.mergeable for layer in layers_of(model)):
        pytest.skip("cannot be merged: depends on the input")
    before = {k: v.clone() for k, v in peft.get_base_model_state_dict(model).items()}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        quiet_merge(model, safe_merge=True)
    after = peft.get_base_model_state_dict(model)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_gradients_in_float64(name, kind, monkeypatch):
    tuner = LAYER_METHODS[name].tuner
    for constant, exact in tuner.inexact_gradients.items():
        module, attribute = constant.rsplit(".", 1)
        monkeypatch.setattr(importlib.import_module(f"peft.tuners.{module}"), attribute, exact)
    model = adapted(name, kind, torch.float64).double()
    x = inputs(kind, rows=2)
    x = x.double() if x.is_floating_point() else x
    params = [p for p in model.parameters() if p.requires_grad]
    assert params
    weight = torch.randn(model(x).shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(DEVICE)

    def loss(*_):
        return (model(x) * weight).sum()

    analytic = torch.autograd.grad(loss(), params, allow_unused=True)
    generator = torch.Generator().manual_seed(2)
    for p, g in zip(params, analytic, strict=True):
        direction = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(DEVICE)
        direction = direction / direction.norm()
        with torch.no_grad():
            eps = 1e-5
            p += eps * direction
            up = loss()
            p -= 2 * eps * direction
            down = loss()
            p += eps * direction
        numeric = (up - down) / (2 * eps)
        given = 0.0 if g is None else (g * direction).sum()
        assert abs(float(numeric) - float(given)) <= 1e-5 * max(1.0, abs(float(numeric))), tuple(p.shape)


def test_state_dict_round_trip(name, kind, tmp_path):
    model = adapted(name, kind)
    expected = model(inputs(kind))
    state = peft.get_peft_model_state_dict(model)
    assert state
    assert not any(".default" in k for k in state)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*(not save|PRNG|does not promise|deterministic).*")
        again = peft.PeftModel.from_pretrained(base(kind), tmp_path, adapter_name="other")
    torch.testing.assert_close(again(inputs(kind)), expected, rtol=1e-6, atol=1e-6)
    stored = peft.get_peft_model_state_dict(again, adapter_name="other")
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[k], state[k]) for k in state)
    lazy = peft.PeftModel.from_pretrained(base(kind), tmp_path, low_cpu_mem_usage=True)
    assert not any(p.device.type == "meta" for p in lazy.parameters())
    torch.testing.assert_close(lazy(inputs(kind)), expected, rtol=1e-6, atol=1e-6)


def test_copies(name, kind):
    model = adapted(name, kind)
    expected = model(inputs(kind))
    assert torch.equal(copy.deepcopy(model)(inputs(kind)), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(inputs(kind)), expected)
    half = copy.deepcopy(model).to(torch.bfloat16)
    x = inputs(kind)
    out = half(x.to(torch.bfloat16) if x.is_floating_point() else x)
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).abs().max() <= 0.1 * max(1.0, expected.abs().max())


def test_two_adapters(name, kind):
    model = adapted(name, kind)
    first, plain = model(inputs(kind)), base(kind)(inputs(kind))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter("second", make_config(name, kind, **LAYER_METHODS[name].tuner.second_example))
    assert torch.equal(model(inputs(kind)), first)
    model.set_adapter("second")
    assert all(
        ("second" in n) or not p.requires_grad for n, p in model.named_parameters() if "default" in n or "second" in n
    )
    perturb(model, seed=23)
    second = model(inputs(kind))
    assert (second - first).abs().max() > 1e-5
    model.set_adapter("default")
    assert torch.equal(model(inputs(kind)), first)
    x = inputs(kind)
    names = ["second", "__base__", "default", "second"]
    if kind != "MultiheadAttention":
        mixed = model(x, adapter_names=names)
        for n in (
            "second",
            "default",
            "__base__",
        ):  # rows of one adapter at a time: a router may look at the whole batch
            rows = [i for i, other in enumerate(names) if other == n]
            alone = plain[rows] if n == "__base__" else model(x[rows], adapter_names=[n] * len(rows))
            torch.testing.assert_close(mixed[rows], alone, rtol=1e-4, atol=1e-5)
        for n, expected in (("second", second), ("default", first)):
            torch.testing.assert_close(model(x, adapter_names=[n] * len(x)), expected, rtol=1e-4, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter("default")
    assert model.active_adapters == ["second"]
    torch.testing.assert_close(model(inputs(kind)), second, rtol=1e-6, atol=1e-6)


def test_training_leaves_the_base_alone_and_checkpointing_agrees(name, kind):
    model = adapted(name, kind).train()
    x, target = inputs(kind), None
    before = {k: v.clone() for k, v in peft.get_base_model_state_dict(model).items()}
    params = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(1)
    target = torch.randn_like(model(x))

    def grads(run):
        torch.manual_seed(2)
        loss = (run(x) - target).square().mean()
        return loss, torch.autograd.grad(loss, params, allow_unused=True)

    loss, plain = grads(model)
    again, kept = grads(lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False))
    assert float(loss) == pytest.approx(float(again), rel=1e-6)
    for a, b in zip(plain, kept, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    optimizer = torch.optim.Adam(params, lr=1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        torch.manual_seed(3)
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    after = peft.get_base_model_state_dict(model)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_offloaded_base(name, kind):
    """Weights that accelerate brings in for each call are there for what reads them, too."""
    if kind == "MultiheadAttention":
        pytest.skip("torch's attention reads the weight of out_proj past accelerate's hook")
    results = []
    for prepare in (lambda model: model, lambda model: accelerate.cpu_offload(model, DEVICE)):
        model = adapted(name, kind, prepare=prepare)
        params = [p for p in model.parameters() if p.requires_grad]
        out = model(inputs(kind))
        results.append([out, *torch.autograd.grad(out.square().mean(), params, allow_unused=True)])
        if all(layer.mergeable for layer in layers_of(model)):
            quiet_merge(model)
            results[-1].append(model(inputs(kind)))
            model.unmerge_adapter()
            results[-1].append(model(inputs(kind)))
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_traces_without_graph_break(name, kind):
    if kind == "MultiheadAttention" and torch.__version__ < "2.7":
        pytest.skip("the context manager of torch.nn.utils.stateless traces from torch 2.7 on")
    model = adapted(name, kind)
    expected = model(inputs(kind))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(inputs(kind)), expected, rtol=1e-5, atol=1e-5)
    loss = compiled(inputs(kind)).square().mean()
    params = [p for p in model.parameters() if p.requires_grad]
    got = torch.autograd.grad(loss, params, allow_unused=True)
    want = torch.autograd.grad(model(inputs(kind)).square().mean(), params, allow_unused=True)
    for a, b in zip(got, want, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_failing_injection_changes_nothing(name, kind):
    model = base(kind)
    model.bad = nn.Dropout()
    before = {n: type(m) for n, m in model.named_modules()}
    config = make_config(name, kind, target_modules=[*targets(kind), "bad"])
    if LAYER_METHODS[name].tuner.layer_cls.supports(model.bad):
        pytest.skip("the method adapts any module")
    with pytest.raises((ValueError, TypeError, NotImplementedError), match="bad"):
        peft.get_peft_model(model, config)
    assert {n: type(m) for n, m in model.named_modules()} == before
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "peft_config")
