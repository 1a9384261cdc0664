"""Linear layers of every storage format, made from an ordinary layer: by the package itself where it is installed,
otherwise, for formats whose package does not install everywhere, a stand-in with the class names and the documented
tensors of the package's layer and a plainly written forward.
"""

import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tests.methods.bases import DEVICE, Net
from torch import nn

GROUP = 16


def bnb8(layer: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    made = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
    made.weight = bnb.nn.Int8Params(layer.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
    made.bias = layer.bias
    return made.to(DEVICE)


def bnb4(layer: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    made = bnb.nn.Linear4bit(layer.in_features, layer.out_features, compute_dtype=torch.float32, quant_type="nf4")
    made.weight = bnb.nn.Params4bit(layer.weight.data.clone(), requires_grad=False, quant_type="nf4", blocksize=32)
    made.bias = layer.bias
    made = made.to(DEVICE)
    made.support_avx512bf16_for_cpu = False  # what prepare_model_for_kbit_training does
    return made


def torchao(config: str, **options: Any) -> Callable[[nn.Linear], nn.Module]:
    def make(layer: nn.Linear) -> nn.Module:
        from torchao import quantization
        from torchao.quantization.granularity import PerGroup

        given = {k: PerGroup(v) if k == "granularity" else v for k, v in options.items()}
        quantization.quantize_(layer, getattr(quantization, config)(**given))
        return layer

    return make


def hqq(layer: nn.Linear) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=32, axis=1)
    return HQQLinear(layer, config, compute_dtype=torch.float32, device=str(DEVICE), del_orig=False)


def quanto(layer: nn.Linear) -> nn.Module:
    from optimum.quanto import QLinear, freeze, qint8

    holder = nn.Sequential(QLinear.from_module(layer, weights=qint8))
    freeze(holder)
    return holder[0]


# ---- formats with stand-ins


def stand_in(package: str, *names: str, **methods: Any) -> Any:
    """An empty module whose class is the last of `names`, a chain of classes that say they come from `package`."""
    module = sys.modules.setdefault(package, ModuleType(package))
    if package == "transformer_engine" and module.__spec__ is None:  # accelerate looks for the spec, then for metadata
        module.__spec__ = ModuleSpec(package, None)
    cls: type = nn.Module
    for name in names:
        cls = type(name, (cls,), {"__module__": f"{package}.nn"})
    for name, method in methods.items():
        setattr(cls, name, method)
    return cls()


def _forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, module.plain_weight().to(x), module.bias)


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    """[..., n] -> [..., n, 8]: the eight values of each word, lowest bits first."""
    return torch.stack([(words >> shift) & 15 for shift in range(0, 32, 4)], -1)


def _words(nibbles: torch.Tensor) -> torch.Tensor:
    words = sum(nibbles[..., i].long() << 4 * i for i in range(8))
    return torch.where(words >= 2**31, words - 2**32, words).int().contiguous()  # type: ignore[operator, arg-type]


def _grid(W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [in, out], zeros [groups, out] and half-precision steps [groups, out] of W [in, out] in four bits."""
    groups = W.reshape(-1, GROUP, W.shape[1])
    low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales.float()).round()
    codes = (groups / scales.float()[:, None] + zeros[:, None]).round().clamp(0, 15)
    return codes.reshape(W.shape), zeros, scales


def _packed(made: Any, layer: nn.Linear, **tensors: torch.Tensor) -> nn.Module:
    sizes = {"in_features": layer.in_features, "out_features": layer.out_features, "bits": 4, "group_size": GROUP}
    for name, value in sizes.items():
        setattr(made, name, value)
    for name, tensor in (*tensors.items(), ("bias", layer.bias.data)):
        made.register_buffer(name, tensor)
    return made


def _gptq_weight(m: Any) -> torch.Tensor:
    codes = _nibbles(m.qweight.T).flatten(1)  # [out, in]
    zeros = _nibbles(m.qzeros).flatten(1).T  # [out, groups]
    return (codes - zeros[:, m.g_idx]) * m.scales.T.float()[:, m.g_idx]


def gptq(layer: nn.Linear) -> nn.Module:
    order = torch.randperm(layer.in_features)  # as with desc_act: the inputs of a group are not neighbours
    places, index = order.argsort(), torch.arange(layer.in_features) // GROUP
    codes, zeros, scales = _grid(layer.weight.data.T[order])
    tensors = {
        "qweight": _words(codes[places].T.reshape(layer.out_features, -1, 8)).T.contiguous(),
        "qzeros": _words(zeros.reshape(len(zeros), -1, 8)),
        "scales": scales,
        "g_idx": index[places],
    }
    if not installed("gptqmodel"):
        made = stand_in("gptqmodel", "BaseQuantLinear", "TorchLinear", forward=_forward, plain_weight=_gptq_weight)
        return _packed(made, layer, **tensors)
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    sizes = {"in_features": layer.in_features, "out_features": layer.out_features}
    made = TorchLinear(bits=4, group_size=GROUP, sym=False, desc_act=True, bias=True, **sizes)
    made.optimized = True  # do not compile
    made = _packed(made, layer, **tensors)
    made.post_init()
    return made


_AWQ = [0, 2, 4, 6, 1, 3, 5, 7]


def _awq_weight(m: Any) -> torch.Tensor:
    def values(words: torch.Tensor) -> torch.Tensor:
        found = torch.empty(*words.shape, 8, device=words.device)
        found[..., _AWQ] = _nibbles(words).float()
        return found.flatten(1)

    zeros, scales = (t.repeat_interleave(GROUP, 0) for t in (values(m.qzeros), m.scales.float()))
    return ((values(m.qweight) - zeros) * scales).T


def awq(layer: nn.Linear) -> nn.Module:
    codes, zeros, scales = _grid(layer.weight.data.T)
    tensors = {
        "qweight": _words(codes.reshape(len(codes), -1, 8)[..., _AWQ]),
        "qzeros": _words(zeros.reshape(len(zeros), -1, 8)[..., _AWQ]),
        "scales": scales,
    }
    if not installed("gptqmodel"):
        names = ("BaseQuantLinear", "AWQuantLinear", "AwqTorchLinear")
        return _packed(stand_in("gptqmodel", *names, forward=_forward, plain_weight=_awq_weight), layer, **tensors)
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    sizes = {"in_features": layer.in_features, "out_features": layer.out_features}
    made = AwqTorchLinear(
        bits=4, group_size=GROUP, sym=False, desc_act=False, bias=True, register_buffers=True, **sizes
    )
    made = _packed(made, layer, **tensors)
    made.post_init()
    return made


def aqlm(layer: nn.Linear) -> nn.Module:
    """Random codes: codebooks are made from data. 16 bits, the only ones the package can train on a CPU."""
    from aqlm import QuantizedLinear

    made = QuantizedLinear(layer.in_features, layer.out_features, 8, 1, 1, 16, bias=True).requires_grad_(False)
    made.codes.random_(-(2**15), 2**15)
    made.codebooks.normal_(std=0.1)
    made.scales.uniform_(0.5, 1.5)
    made.bias.copy_(layer.bias.data)
    return made


def eetq(layer: nn.Linear) -> nn.Module:
    """Its int8 weight is rearranged for one kernel; the stand-in keeps a plain one that only it knows."""
    made = stand_in("eetq", "EetqLinear", forward=_forward, plain_weight=lambda m: m.hidden[0])
    made.hidden = (layer.weight.data.clone(),)
    made.in_features, made.out_features = layer.in_features, layer.out_features
    made.register_buffer("weight", torch.zeros(layer.in_features, layer.out_features, dtype=torch.int8))
    made.register_buffer("bias", layer.bias.data)
    return made


def inc(layer: nn.Linear) -> nn.Module:
    """Intel Neural Compressor: float8 values and a scale; attributes of the layer that it was made from."""
    made = stand_in("neural_compressor", "PatchedModuleBase", "PatchedLinear", forward=_forward)
    scale = layer.weight.data.abs().max() / torch.finfo(torch.float8_e4m3fn).max
    made.weight = nn.Parameter((layer.weight.data / scale).to(torch.float8_e4m3fn), requires_grad=False)
    made.register_buffer("scale_weight", scale)
    made.plain_weight = lambda: made.weight.float() * made.scale_weight
    made.in_features, made.out_features, made.bias = layer.in_features, layer.out_features, layer.bias
    return made


def _normalised(module: Any, x: torch.Tensor) -> torch.Tensor:
    x = F.layer_norm(x, x.shape[-1:], module.layer_norm_weight, module.layer_norm_bias)
    if hasattr(module, "weight"):
        return F.linear(x, module.weight, module.bias)
    return F.linear(F.gelu(F.linear(x, module.fc1_weight, module.fc1_bias)), module.fc2_weight, module.fc2_bias)


def _normalising(made: Any, width: int, **tensors: torch.Tensor) -> nn.Module:
    more = {"layer_norm_weight": torch.linspace(0.5, 1.5, width), "layer_norm_bias": torch.linspace(-1, 1, width)}
    for name, tensor in {**more, **tensors}.items():
        made.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return made


def te(layer: nn.Linear) -> nn.Module:
    """Transformer Engine: LayerNorm and product in one module."""
    made = stand_in("transformer_engine", "TransformerEngineBaseModule", "LayerNormLinear", forward=_normalised)
    made.in_features, made.out_features = layer.in_features, layer.out_features
    return _normalising(made, layer.in_features, weight=layer.weight.data, bias=layer.bias.data)


def te_mlp(up: nn.Linear, down: nn.Linear) -> nn.Module:
    """Transformer Engine: LayerNorm and MLP in one module, which has no `in_features`."""
    made = stand_in("transformer_engine", "TransformerEngineBaseModule", "LayerNormMLP", forward=_normalised)
    tensors = {"fc1_weight": up.weight, "fc1_bias": up.bias, "fc2_weight": down.weight, "fc2_bias": down.bias}
    return _normalising(made, up.in_features, **{k: v.data for k, v in tensors.items()})


class Format(NamedTuple):
    make: Callable[[nn.Linear], nn.Module]
    package: str = ""  # needed; otherwise there is a stand-in
    label: str = ""
    readable: bool = True
    writable: bool = True
    close: float = 1e-5  # of the kernel to a product with the weight it stands for
    rounding: float = 0.01  # of weights that are merged, relative


FORMATS: dict[str, Format] = {
    "bnb int8": Format(bnb8, "bitsandbytes", "bnb 8bit", close=2e-2),  # its kernel rounds activations as well
    "bnb nf4": Format(bnb4, "bitsandbytes", "bnb 4bit", rounding=0.12),
    "torchao int8": Format(torchao("Int8WeightOnlyConfig"), "torchao", "torchao"),
    "torchao int4": Format(
        torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=32), "torchao", "torchao", rounding=0.12
    ),
    "torchao float8": Format(torchao("Float8WeightOnlyConfig"), "torchao", "torchao", rounding=0.04),
    "hqq": Format(hqq, "hqq", "hqq", rounding=0.12),
    "quanto int8": Format(quanto, "optimum.quanto", "quanto"),
    "gptq": Format(gptq, "", "gptq", close=1e-3, rounding=0.12),
    "awq": Format(awq, "", "awq", close=1e-3, rounding=0.12),
    "aqlm": Format(aqlm, "aqlm", "aqlm", writable=False),
    "eetq": Format(eetq, "", "eetq", readable=False, writable=False),
    "inc": Format(inc, "", "inc", readable=False, writable=False),
    "te": Format(te, "", "te", readable=False, writable=False),
}


def installed(package: str) -> bool:
    try:
        return not package or importlib.util.find_spec(package) is not None
    except (ModuleNotFoundError, ValueError):  # no parent package; a stand-in has no spec
        return False


def base(name: str) -> Net:
    """in (32) -> lin0 -> tanh -> lin1, both of the format."""
    torch.manual_seed(7)
    layers = (nn.Linear(*widths).requires_grad_(False) for widths in ((32, 64), (64, 32)))
    net = Net(*map(FORMATS[name].make, layers))
    return net.eval().requires_grad_(False).to(DEVICE)  # type: ignore[return-value]


def dense(name: str) -> Net:
    """The same network with the weights that the formats stand for, in ordinary layers."""
    from peft.storage.base import resolve

    net = base(name)
    for key in ("lin0", "lin1"):
        old: Any = getattr(net, key)
        layer = nn.Linear(old.in_features, old.out_features)
        layer.weight.data.copy_(resolve(old).read(old))
        layer.bias.data.copy_(old.bias)
        setattr(net, key, layer)
    return net.eval().requires_grad_(False).to(DEVICE)  # type: ignore[return-value]


def inputs(rows: int = 8) -> torch.Tensor:
    return torch.randn(rows, 32, generator=torch.Generator().manual_seed(3)).to(DEVICE)
