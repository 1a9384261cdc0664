# SPDX-License-Identifier: Apache-2.0
"""Backend views on storages, LoftQ weight replacement (with stand-ins for the packages), package look-ups."""

import json
import sys
from importlib import metadata
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from peft import LoraConfig, get_peft_model, import_utils
from peft.utils import loftq_utils, quantization_utils
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend, resolve_quantization_backend


def test_dense_layers_have_no_backend():
    assert resolve_quantization_backend(nn.Linear(2, 2)) is None
    assert resolve_quantization_backend(nn.Linear(2, 2), get_apply_tensor_subclass=len) is None


def test_forward_only_backend():
    backend = ForwardOnlyQuantizationBackend("gptq")
    assert not backend.supports_merge and backend.layer_type == "linear"
    with pytest.raises(TypeError, match="Dequantization is not supported for gptq"):
        backend.get_base_weight(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="Requantization is not supported for gptq"):
        backend.set_base_weight(None, torch.ones(2, 2))
    x = torch.ones(1)
    assert backend.maybe_clone_base_result(x) is x


def stub_storage(monkeypatch, label, mergeable=True):
    written = nn.Linear(2, 2)
    storage = SimpleNamespace(
        label=label, readable=mergeable, writable=mergeable,
        read=lambda m: m.weight * 2, write=lambda m, w: written,
    )  # fmt: skip
    monkeypatch.setattr(quantization_utils, "resolve", lambda module: storage)
    return written


@pytest.mark.parametrize("label", ["bnb 8bit", "bnb 4bit", "hqq"])
def test_mergeable_backends_use_the_storage(monkeypatch, label):
    written = stub_storage(monkeypatch, label)
    layer = nn.Linear(2, 2)
    backend = resolve_quantization_backend(layer)
    assert backend.backend_name == label and backend.supports_merge
    assert torch.equal(backend.get_base_weight(layer), layer.weight * 2)
    outer = SimpleNamespace(base_layer=layer, get_base_layer=lambda: layer)
    backend.set_base_weight(outer, torch.ones(2, 2))
    assert outer.base_layer is written
    x = torch.ones(1)
    assert (backend.maybe_clone_base_result(x) is x) == (label != "bnb 4bit")


def test_torchao_needs_its_requantiser(monkeypatch):
    stub_storage(monkeypatch, "torchao")
    with pytest.raises(ValueError, match="get_apply_tensor_subclass"):
        resolve_quantization_backend(nn.Linear(2, 2))
    backend = resolve_quantization_backend(nn.Linear(2, 2), get_apply_tensor_subclass=len)
    assert backend.backend_name == "torchao" and backend.get_apply_tensor_subclass is len
    layer = nn.Linear(2, 2)
    assert backend.get_base_weight(layer) is layer.weight
    with pytest.raises(NotImplementedError, match="cannot be dequantised"):
        backend.get_base_weight(SimpleNamespace(weight=object()))


def test_torchao_writes_with_the_given_requantiser():
    quantization = pytest.importorskip("torchao.quantization")
    layer, asked = nn.Linear(32, 32), []
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    getter = lambda: asked.append(1) or quantization.Int8WeightOnlyConfig()  # noqa: E731
    backend = resolve_quantization_backend(layer, get_apply_tensor_subclass=getter)
    value = torch.randn(32, 32)
    with pytest.warns(UserWarning, match="rounds it again"):
        backend.set_base_weight(SimpleNamespace(base_layer=layer, get_base_layer=lambda: layer), value)
    assert asked == [1]
    torch.testing.assert_close(backend.get_base_weight(layer), value, rtol=0, atol=0.03)


def test_unreadable_backend(monkeypatch):
    stub_storage(monkeypatch, "aqlm", mergeable=False)
    assert resolve_quantization_backend(nn.Linear(2, 2)).backend_name == "aqlm"


def test_quantization_kwargs_and_repr():
    assert quantization_utils.get_quantization_kwargs(nn.Linear(2, 2)) == {}
    model = SimpleNamespace(hf_quantizer=SimpleNamespace(quantization_config=SimpleNamespace()))
    assert quantization_utils.get_quantization_kwargs(model) == {}
    model.hf_quantizer.quantization_config.get_apply_tensor_subclass = len
    assert quantization_utils.get_quantization_kwargs(model) == {"get_apply_tensor_subclass": len}
    assert quantization_utils.quantization_extra_repr(nn.Linear(2, 2)) == ""
    module = SimpleNamespace(quantization_backend=ForwardOnlyQuantizationBackend("gptq"))
    assert quantization_utils.quantization_extra_repr(module) == "quantization_backend='gptq'"


# ---- LoftQ


class Params4bit(nn.Parameter):
    quant_state = None


def rounded(weight):
    return (weight * 4).round() / 4


@pytest.fixture
def fake_bnb(monkeypatch):
    """bitsandbytes whose 4-bit weights are floats rounded to quarters."""
    bnb = ModuleType("bitsandbytes")
    bnb.nn = SimpleNamespace(Linear4bit=type("Linear4bit", (), {}), Linear8bitLt=type("Linear8bitLt", (), {}))
    bnb.functional = SimpleNamespace(dequantize_4bit=lambda data, state: data)
    monkeypatch.setitem(sys.modules, "bitsandbytes", bnb)
    monkeypatch.setattr(import_utils, "is_bnb_4bit_available", lambda: True)
    return bnb


class Net(nn.Module):
    base_model_prefix = "model"

    def __init__(self):
        super().__init__()
        self.model = nn.ModuleDict({"a": nn.Linear(6, 5), "b": nn.Linear(5, 4)})

    def forward(self, x):
        return self.model["b"](self.model["a"](x))


def quantised(r=2):
    torch.manual_seed(0)
    net = Net()
    original = {f"model.{n}.weight": m.weight.detach().clone() for n, m in net.model.items()}
    model = get_peft_model(net, LoraConfig(r=r, lora_alpha=r, target_modules=["a", "b"]))
    for layer in model.base_model.model.model.values():
        layer.base_layer.weight = Params4bit(rounded(layer.base_layer.weight.data), requires_grad=False)
    return model, original


def error_of(layer, original, with_adapter=True):
    weight = layer.base_layer.weight.data
    if with_adapter:
        weight = weight + layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    return (original - weight).norm().item()


@pytest.mark.parametrize("layout", ["file", "folder", "shards", "no prefix", "named folder", "cached"])
def test_replaced_weights_make_up_for_the_error(fake_bnb, tmp_path, layout, monkeypatch):
    model, original = quantised()
    files = {k.removeprefix("model.") if layout == "no prefix" else k: v for k, v in original.items()}
    path = tmp_path / "model.safetensors"
    if layout == "shards":
        for i, (key, value) in enumerate(files.items()):
            save_file({key: value}, tmp_path / f"part{i}.safetensors")
        index = {"weight_map": {key: f"part{i}.safetensors" for i, key in enumerate(files)}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(files, path)
    given = str(path if layout == "file" else tmp_path)
    if layout in ("named folder", "cached"):  # the model says where it came from
        model.base_model.model.config = SimpleNamespace(_name_or_path="user/base" if layout == "cached" else given)
        monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **kwargs: {"user/base": tmp_path}[name])
        given = None
    loftq_utils.replace_lora_weights_loftq(model, given)
    for name, layer in model.base_model.model.model.items():
        weight = original[f"model.{name}.weight"]
        S = torch.linalg.svdvals(weight - layer.base_layer.weight.data)
        assert error_of(layer, weight) == pytest.approx(S[2:].norm().item(), rel=1e-4)  # the best of rank 2
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0))


def test_callback_rolls_back(fake_bnb, tmp_path):
    model, original = quantised()
    save_file(original, tmp_path / "model.safetensors")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    seen = []

    def keep_a(m, name):
        seen.append(name)
        return name.endswith(".a")

    loftq_utils.replace_lora_weights_loftq(model, str(tmp_path), callback=keep_a)
    assert seen == ["base_model.model.model.a", "base_model.model.model.b"]
    changed = {n.split(".")[3] for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"a"}


def test_loftq_errors(fake_bnb, tmp_path, monkeypatch):
    model, original = quantised()
    with pytest.raises(FileNotFoundError, match="nothing_here"):
        loftq_utils.replace_lora_weights_loftq(model, str(tmp_path / "nothing_here"))
    with pytest.raises(FileNotFoundError, match="safetensors"):
        loftq_utils.replace_lora_weights_loftq(model, str(tmp_path))
    (tmp_path / "model.bin").touch()
    with pytest.raises(ValueError, match=r"model.bin is no safetensors file"):
        loftq_utils.replace_lora_weights_loftq(model, str(tmp_path / "model.bin"))
    model.base_model.model.config = SimpleNamespace(_name_or_path="nobody/nothing-here")
    with pytest.raises(ValueError, match="The local cache has no safetensors files of 'nobody/nothing-here'"):
        loftq_utils.replace_lora_weights_loftq(model)
    del model.base_model.model.config
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"no tensor called model\.a\.weight"):
        loftq_utils.replace_lora_weights_loftq(model, str(tmp_path))
    with pytest.raises(ValueError, match="model_path"):
        loftq_utils.replace_lora_weights_loftq(model)
    with pytest.raises(ValueError, match="No bnb LoRA module of the adapter 'other'"):
        loftq_utils.replace_lora_weights_loftq(model, str(tmp_path), adapter_name="other")
    with pytest.raises(TypeError, match="valid PeftModel"):
        loftq_utils.replace_lora_weights_loftq(model.base_model.model, str(tmp_path))
    monkeypatch.setattr(import_utils, "is_bnb_4bit_available", lambda: False)
    with pytest.raises(ValueError, match="bitsandbytes"):
        loftq_utils.replace_lora_weights_loftq(model)
    with pytest.raises(ValueError, match="Only 4 and 8 bits"):
        loftq_utils.loftq_init(torch.ones(4, 4), num_bits=3, reduced_rank=2)
    with pytest.raises(ValueError, match="iterations"):
        loftq_utils.loftq_init(torch.ones(4, 4), num_bits=4, reduced_rank=2, num_iter=0)


# ---- packages


def test_packages_that_are_not_there():
    functions = [
        getattr(import_utils, n) for n in vars(import_utils) if n.startswith("is_") and n.endswith("_available")
    ]
    assert len(functions) == 14
    assert all(isinstance(function(), bool) and hasattr(function, "cache_info") for function in functions)


def test_versions_of_packages(monkeypatch):
    versions = {"gptqmodel": "6.9", "optimum": "1.24.0", "torchao": "0.15.0"}
    monkeypatch.setattr(import_utils, "_is_there", lambda name: name in versions)
    monkeypatch.setattr(import_utils, "_version", lambda name: import_utils.Version(versions[name]))
    names = ("is_gptqmodel_available", "is_optimum_available", "is_torchao_available", "is_torchao_ge_v0_18_0")

    def fresh(name):
        for function in names:
            getattr(import_utils, function).cache_clear()
        return getattr(import_utils, name)()

    with pytest.raises(ImportError, match="incompatible version of gptqmodel. Found version 6.9"):
        fresh("is_gptqmodel_available")
    with pytest.raises(ImportError, match="torchao"):
        fresh("is_torchao_available")
    versions.update(gptqmodel="7.1", torchao="0.18.0")
    assert fresh("is_gptqmodel_available") and fresh("is_torchao_available") and fresh("is_torchao_ge_v0_18_0")
    versions["optimum"] = "1.23"
    with pytest.raises(ImportError, match="optimum"):
        fresh("is_gptqmodel_available")
    del versions["optimum"]
    with pytest.raises(ImportError, match="optimum"):
        fresh("is_gptqmodel_available")
    del versions["gptqmodel"]
    assert fresh("is_gptqmodel_available") is False
    monkeypatch.undo()
    for function in names:
        getattr(import_utils, function).cache_clear()


def test_packages_and_devices_that_are_missing(monkeypatch):
    """Each answer is computed anew: nothing is there, then a device package without a device."""
    there = set()
    monkeypatch.setattr(import_utils, "_is_there", there.__contains__)
    names = [n for n in vars(import_utils) if n.startswith("is_") and n.endswith("_available") and "xpu" not in n]

    def fresh(name, *args):
        for n in (*names, "is_xpu_available"):
            getattr(import_utils, n).cache_clear()
        return getattr(import_utils, name)(*args)

    assert not any(fresh(name) for name in names)
    there.add("torch_xla")
    xla = ModuleType("torch_xla.core.xla_model")
    for name in ("torch_xla", "torch_xla.core"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, xla.__name__, xla)
    sys.modules["torch_xla.core"].xla_model = xla

    def missing(*args, **kwargs):
        raise RuntimeError("no device")

    for device, want in ((missing, False), (lambda: "xla:0", True)):
        xla.xla_device = device
        assert (fresh("is_torch_tpu_available"), fresh("is_torch_tpu_available", False)) == (want, True)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    for zeros, want in ((missing, False), (lambda *args, **kwargs: None, True)):
        monkeypatch.setattr(torch, "zeros", zeros)
        assert (fresh("is_xpu_available", True), fresh("is_xpu_available")) == (want, True)
    monkeypatch.undo()
    for name in (*names, "is_xpu_available"):
        getattr(import_utils, name).cache_clear()


def test_packages_without_metadata(monkeypatch):
    def unknown(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(import_utils, "_version", unknown)
    monkeypatch.setattr(import_utils, "_is_there", lambda name: True)
    import_utils.require.cache_clear()
    import_utils.require("This", "transformers")
    monkeypatch.delitem(vars(import_utils), "is_transformers_ge_v5", raising=False)
    assert import_utils.is_transformers_ge_v5 is False
    monkeypatch.undo()
    import_utils.require.cache_clear()
    vars(import_utils).pop("is_transformers_ge_v5", None)


def test_transformers_flags():
    transformers = pytest.importorskip("transformers")
    version = import_utils.Version(transformers.__version__)
    assert import_utils.is_transformers_ge_v5 == (version.major >= 5)
    assert import_utils.is_transformers_le_4_53 == (version < import_utils.Version("4.54.0"))
    assert {"is_transformers_ge_v5_17_0", "is_transformers_dtensor_tp"} <= set(dir(import_utils))
    with pytest.raises(AttributeError):
        import_utils.is_transformers_ge_v99  # noqa: B018


def test_with_bitsandbytes(tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    from peft.utils.integrations import dequantize_module_weight

    torch.manual_seed(0)
    weight = torch.randn(64, 128)
    layer = bnb.nn.Linear4bit(128, 64, quant_type="nf4", compute_dtype=torch.float32)
    layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
    layer = layer.to("cpu")
    if getattr(layer.weight, "quant_state", None) is None:
        pytest.skip("this version of bitsandbytes quantises on accelerators only")
    dense = dequantize_module_weight(layer)
    backend = resolve_quantization_backend(layer)
    assert backend.backend_name == "bnb 4bit" and torch.equal(backend.get_base_weight(layer).float(), dense.float())
    model = get_peft_model(nn.Sequential(layer), LoraConfig(r=16, lora_alpha=16, target_modules=["0"]))
    save_file({"0.weight": weight}, tmp_path / "model.safetensors")
    loftq_utils.replace_lora_weights_loftq(model, str(tmp_path))
    adapted = model.base_model.model[0]
    assert adapted.quantization_backend == "bnb 4bit" or adapted.quantization_backend.backend_name == "bnb 4bit"
    update = adapted.lora_B["default"].weight @ adapted.lora_A["default"].weight
    S = torch.linalg.svdvals(weight - dense)
    assert (weight - dense - update).norm().item() == pytest.approx(S[16:].norm().item(), rel=1e-3)
    with torch.no_grad():
        layer.eval()(torch.ones(2, 128))  # some CPUs pack the weight for a kernel now
    torch.testing.assert_close(dequantize_module_weight(layer).float(), dense.float(), rtol=1e-2, atol=1e-3)
