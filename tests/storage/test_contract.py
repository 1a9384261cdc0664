"""The contract of every method that adapts linear layers, for every storage format: both lists come from elsewhere."""

import warnings
from typing import Any

import pytest
import torch
from tests.methods.bases import Net
from tests.storage.formats import FORMATS, base, dense, inputs, installed

import peft
from peft import registry
from peft.core import kinds
from peft.core.tuner import TunerModel
from peft.storage.base import resolve

METHODS = {
    m.name: m
    for m in registry.methods().values()
    if m.layer is not None and issubclass(m.tuner, TunerModel) and kinds.Linear in getattr(m.layer, "kinds", ())
}
QUICK = ("lora", "oft", "vera", "loha", "ia3")  # on every format; the others on formats unlike each other
UNLIKE = ("bnb nf4", "torchao int8", "hqq", "gptq", "eetq")


def _marks(method: str, name: str) -> list[pytest.MarkDecorator]:
    missing = pytest.mark.skipif(not installed(FORMATS[name].package), reason=f"{FORMATS[name].package} is missing")
    return [missing] if method in QUICK or name in UNLIKE else [missing, pytest.mark.slow]


CASES = [pytest.param(method, name, marks=_marks(method, name)) for method in METHODS for name in FORMATS]
pytestmark = [
    pytest.mark.parametrize(("method", "name"), CASES),
    pytest.mark.filterwarnings(
        "ignore:.*(rounds it again|inputs will be cast|not save|PRNG|does not promise|deterministic).*"
    ),
]


def config(method: str, **options: Any) -> peft.PeftConfig:
    tuner = METHODS[method].tuner
    return METHODS[method].config(**{"target_modules": ["lin0", "lin1"], **tuner.example, **options})


def adapt(method: str, net: Net, seed: int = 11) -> peft.PeftModel:
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(net, config(method)).eval()
    return perturb(model, seed)


def perturb(model: Any, seed: int = 11) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.device)
    return model


def adapted(method: str, name: str) -> peft.PeftModel:
    """The adapted network, unless the method needs more of the weight than the format gives and says so."""
    fmt, need = FORMATS[name], METHODS[method].layer.weight_need
    if need == "train" or (need == "read" and not fmt.readable):
        net = base(name)
        with pytest.raises(TypeError, match=f"lin0.* has to {need} the weight.* {fmt.label} format"):
            adapt(method, net)
        assert type(net.lin0).__name__ == type(base(name).lin0).__name__
        pytest.skip(f"has to {need} the weight")
    return adapt(method, base(name))


def contents(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that a tensor consists of."""
    if hasattr(tensor, "__tensor_flatten__") and type(tensor) is not torch.nn.Parameter:
        return [t for part in tensor.__tensor_flatten__()[0] for t in contents(getattr(tensor, part))]
    return [tensor.detach().as_subclass(torch.Tensor)]


def bytes_of(net: Any) -> dict[str, list[torch.Tensor]]:
    """Copies of all tensors of the two base layers, wrapped or not, and HQQ's settings of scales and zeros."""
    found = {}
    for key in ("lin0", "lin1"):
        layer = net.get_submodule(key)
        layer = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers()), **getattr(layer, "meta", {})}
        for name, value in tensors.items():
            if isinstance(value, torch.Tensor):
                found[f"{key}.{name}"] = [t.clone() for t in contents(value)]
    return found


def same(a: dict[str, list[torch.Tensor]], b: dict[str, list[torch.Tensor]]) -> bool:
    return a.keys() == b.keys() and all(
        len(a[k]) == len(b[k]) and all(torch.equal(x, y) for x, y in zip(a[k], b[k], strict=True)) for k in a
    )


def apart(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def test_forward_agrees_with_the_weight_that_the_format_stands_for(method: str, name: str) -> None:
    fmt, x = FORMATS[name], inputs()
    plain = base(name)(x)
    model = adapted(method, name)
    got = model(x)
    assert apart(got, plain) > 1e-3
    if fmt.readable:
        other = adapt(method, dense(name))
        peft.set_peft_model_state_dict(other, peft.get_peft_model_state_dict(model))
        assert apart(got, other(x)) < 2 * fmt.close
    with model.disable_adapter():
        assert torch.equal(model(x), plain)
    assert torch.equal(model(x), got)
    assert model.base_model.layers()[0].quantization_backend == fmt.label


def test_training_lowers_the_loss_and_leaves_the_base_alone(method: str, name: str) -> None:
    model, x = adapted(method, name).train(), inputs()
    net = model.base_model.model
    before = bytes_of(net)
    target = base(name)(x) + 0.3 * torch.randn(len(x), 32, generator=torch.Generator().manual_seed(1)).to(x.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.Adam(parameters, lr=1e-2), []
    for _ in range(10):
        optimizer.zero_grad()
        torch.manual_seed(3)
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    first = model.base_model.layers()[0]  # reached through the base layer after it
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in first.parameters() if p.requires_grad)
    assert same(before, bytes_of(net))


@torch.no_grad()
def test_merging(method: str, name: str) -> None:
    fmt, x = FORMATS[name], inputs()
    model = adapted(method, name)
    expected = model(x)
    before = bytes_of(model.base_model.model)
    layers = model.base_model.layers()
    if not all(layer.mergeable for layer in layers):
        error, text = (NotImplementedError, "depend on the input") if fmt.writable else (TypeError, fmt.label)
        with pytest.raises(error, match=text):
            model.merge_adapter()
        assert same(before, bytes_of(model.base_model.model))
        return
    wanted = adapt(method, dense(name))
    peft.set_peft_model_state_dict(wanted, peft.get_peft_model_state_dict(model))
    wanted, fresh, rounded = wanted.merge_and_unload(), base(name), dense(name)
    model.merge_adapter()
    for key in ("lin0", "lin1"):  # what the same weight is rounded to when it is written at once
        layer, other = model.base_model.model.get_submodule(key).get_base_layer(), fresh.get_submodule(key)
        stored, weight = resolve(layer).read(layer), wanted.get_submodule(key).weight.detach()
        other = resolve(other).write(other, weight)
        assert apart(stored, resolve(other).read(other)) < 1e-2
        rounded.get_submodule(key).weight.copy_(stored)
        rounded.get_submodule(key).bias.copy_(wanted.get_submodule(key).bias)
    merged = model(x)
    assert apart(merged, rounded(x)) < 2 * fmt.close
    model.unmerge_adapter()
    assert same(before, bytes_of(model.base_model.model))
    assert torch.equal(model(x), expected)
    unloaded = model.merge_and_unload(safe_merge=True)
    assert apart(unloaded(x), merged) < max(1e-6, fmt.close)
    assert type(unloaded.lin0).__name__ == type(base(name).lin0).__name__


def test_two_adapters_and_files(method: str, name: str, tmp_path: Any) -> None:
    x, tuner = inputs(), METHODS[method].tuner
    model = adapted(method, name)
    first = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter("second", config(method, **tuner.second_example))
    model.set_adapter("second")
    second = perturb(model, 23)(x)
    assert apart(second, first) > 1e-4
    model.set_adapter("default")
    assert torch.equal(model(x), first)
    model.save_pretrained(tmp_path)
    again, close = peft.PeftModel.from_pretrained(base(name), tmp_path), min(FORMATS[name].close, 1e-3)
    assert apart(again(x), first) < close
    again.load_adapter(tmp_path / "second", "second")
    again.set_adapter("second")
    assert apart(again(x), second) < close
    again.delete_adapter("default")
    assert apart(again(x), second) < close


def outcome(method: str, name: str) -> str:
    """The cell of docs/methods.md, found by trying: "merge", "train" (merging is refused) or "no" (adapting is)."""
    try:
        model = adapt(method, base(name))
    except TypeError:
        return "no"
    model.train()(inputs()).square().mean().backward()
    first = model.base_model.layers()[0]
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in first.parameters() if p.requires_grad)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.eval().merge_adapter()
    except (TypeError, NotImplementedError):
        return "train"
    return "merge"
