# SPDX-License-Identifier: Apache-2.0
"""Layer kinds: everything the library must know about a type of base layer, and the only place that knows orientations.

Methods see weights as canonical [out, in, *kernel]. A kind is a class that is never instantiated; `m` is the base
module.
"""

import contextlib
import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ..storage.base import resolve
from .modules import blank_state, kaiming_, making_on_meta, values_awaited

Shape = tuple[int, ...]


_AS_IN_TORCH = (nn.Linear.__init__, nn.Module.register_parameter)


def linear(n_in: int, n_out: int, bias: bool = False) -> nn.Linear:
    """`nn.Linear(n_in, n_out, bias)` with the same draws in a fraction of its time; none on the meta device and where
    values are awaited.
    """
    if (nn.Linear.__init__, nn.Module.register_parameter) != _AS_IN_TORCH:
        return nn.Linear(n_in, n_out, bias=bias)  # in a context that puts new parameters elsewhere
    made = nn.Linear.__new__(nn.Linear)
    state, meta = blank_state(), making_on_meta()
    state["in_features"], state["out_features"] = n_in, n_out
    device = "meta" if meta else None
    with torch._C.DisableTorchFunction() if meta else contextlib.nullcontext():  # that context looks at every call
        weight = torch.empty(n_out, n_in, device=device)
        b = torch.empty(n_out, device=device) if bias else None
    if not (meta or values_awaited()):
        kaiming_(weight)
        if b is not None and n_in:
            b.uniform_(-1 / math.sqrt(n_in), 1 / math.sqrt(n_in))
    state["_parameters"].update(weight=nn.Parameter(weight), bias=None if b is None else nn.Parameter(b))
    object.__setattr__(made, "__dict__", state)
    return made


class LayerKind:
    """Base of the kinds, with the behaviour of layers that act on the last dimension."""

    name: ClassVar[str] = ""  # name of the kind in tables and messages
    class_name: ClassVar[str] = "Linear"  # name of the exported adapter class
    weight_name: ClassVar[str] = "weight"
    bias_name: ClassVar[str | None] = "bias"
    transposed: ClassVar[bool] = False  # stored as [in, out]
    feature_dim: ClassVar[int] = -1  # dimension of the features in activations
    float_input: ClassVar[bool] = True
    is_linear: ClassVar[bool] = False  # y = x Wᵀ + b on the last dimension
    is_conv: ClassVar[bool] = False
    substituted: ClassVar[bool] = False  # adapted by calling the base module with replaced tensors
    plain_types: ClassVar[tuple[type, ...]] = ()

    @classmethod
    def matches(cls, m: Any) -> bool:
        return isinstance(m, cls.plain_types)

    @classmethod
    def parameter(cls, m: Any) -> torch.Tensor:
        return getattr(m, cls.weight_name)

    @classmethod
    def bias(cls, m: Any) -> torch.Tensor | None:
        return getattr(m, cls.bias_name, None) if cls.bias_name else None

    @classmethod
    def shape(cls, m: Any) -> Shape:
        """[out, in, *kernel], also when the weight is partitioned or packed."""
        raise NotImplementedError(f"{cls.__name__} has no weight shape")

    @classmethod
    def canonical(cls, w: torch.Tensor) -> torch.Tensor:
        return w.transpose(0, 1) if cls.transposed else w

    stored = canonical  # the same swap turns a canonical tensor into storage orientation

    @classmethod
    def call(cls, m: Any, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        """Apply a canonical weight the way `m` would."""
        raise NotImplementedError(f"{cls.__name__} cannot be called with another weight")

    @classmethod
    def low_rank(cls, m: Any, r: int, bias: bool = False) -> tuple[nn.Module, nn.Module]:
        """(A, B) modules of the layer's own type (linear ones of most), freshly initialised by torch (A first)."""
        n_out, n_in = cls.shape(m)[:2]
        return linear(n_in, r), linear(r, n_out, bias)

    @classmethod
    def per_feature(cls, v: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Shape a [features] vector so that it broadcasts over the activation `y`."""
        return v


class Linear(LayerKind):
    name = "Linear"
    is_linear = True
    plain_types = (nn.Linear,)

    @classmethod
    def matches(cls, m: Any) -> bool:
        return super().matches(m) or (not isinstance(m, nn.Embedding) and resolve(m).label is not None)

    @classmethod
    def shape(cls, m: Any) -> Shape:
        for names in (("out_features", "in_features"), ("outfeatures", "infeatures"), ("output_size", "input_size")):
            if hasattr(m, names[0]):
                return (getattr(m, names[0]), getattr(m, names[1]))
        norm = getattr(m, "layer_norm_weight", None)  # of Transformer Engine's LayerNormMLP, whose in and out are equal
        return tuple(m.weight.shape) if norm is None else 2 * tuple(norm.shape)

    @classmethod
    def call(cls, m, x, w, b=None):
        return F.linear(x, w, b)


class Conv1D(Linear):
    """transformers' Conv1D: a linear layer stored as [in, out]."""

    name = "Conv1D"
    transposed = True
    plain_types = ()

    @classmethod
    def matches(cls, m: Any) -> bool:
        return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(m).__mro__)

    @classmethod
    def shape(cls, m: Any) -> Shape:
        n_in, n_out = getattr(m.weight, "ds_shape", m.weight.shape)
        return (n_out, n_in)


class _Conv(LayerKind):
    is_conv = True
    ndim: ClassVar[int] = 0

    @classmethod
    def shape(cls, m: Any) -> Shape:
        return (m.out_channels, m.in_channels // m.groups, *m.kernel_size)

    @classmethod
    def call(cls, m, x, w, b=None):
        return m._conv_forward(x, w, b)  # stride, padding, padding mode, dilation and groups of the base

    @classmethod
    def low_rank(cls, m, r, bias=False):
        conv = cls.plain_types[0]
        geometry = {k: getattr(m, k) for k in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
        return (
            conv(m.in_channels, r, bias=False, **geometry),
            conv(r, m.out_channels, (1,) * cls.ndim, (1,) * cls.ndim, groups=m.groups, bias=bias),
        )

    @classmethod
    def per_feature(cls, v, y):
        return v.view(-1, *(1,) * cls.ndim)


class Conv1d(_Conv):
    name = class_name = "Conv1d"
    ndim, feature_dim, plain_types = 1, -2, (nn.Conv1d,)


class Conv2d(_Conv):
    name = class_name = "Conv2d"
    ndim, feature_dim, plain_types = 2, -3, (nn.Conv2d,)


class Conv3d(_Conv):
    name = class_name = "Conv3d"
    ndim, feature_dim, plain_types = 3, -4, (nn.Conv3d,)


class Embedding(LayerKind):
    """nn.Embedding: canonical [out=dim, in=num_embeddings], stored transposed; the input is ids."""

    name = class_name = "Embedding"
    transposed, bias_name, float_input = True, None, False
    plain_types = (nn.Embedding,)

    @classmethod
    def shape(cls, m: Any) -> Shape:
        return (m.embedding_dim, m.num_embeddings)

    @classmethod
    def look_up(cls, m: Any, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Rows of `table` [num_embeddings, any width], with the padding and gradient options of the base layer.

        max_norm is left out: it would renormalise the adapter's table in place.
        """
        return F.embedding(ids, table, m.padding_idx, None, m.norm_type, m.scale_grad_by_freq, m.sparse)

    @classmethod
    def scale(cls, m: Any) -> float | torch.Tensor | None:
        """The factor that scaled embeddings (Gemma) multiply their output with, if it is a scalar."""
        scale = getattr(m, "embed_scale", None)
        if scale is None or isinstance(scale, (int, float)):
            return scale
        return scale.reshape(()) if isinstance(scale, torch.Tensor) and scale.numel() == 1 else None

    @classmethod
    def call(cls, m, x, w, b=None):
        y = cls.look_up(m, x, w.transpose(0, 1))
        scale = cls.scale(m)
        return y if scale is None else y * (scale.to(y) if isinstance(scale, torch.Tensor) else scale)


class MultiheadAttention(LayerKind):
    """nn.MultiheadAttention with equal q/k/v widths: the packed in_proj as weight; out_proj is a layer of its own
    inside.
    """

    name = class_name = "MultiheadAttention"
    weight_name, bias_name, substituted = "in_proj_weight", "in_proj_bias", True
    plain_types = (nn.MultiheadAttention,)

    @classmethod
    def shape(cls, m: Any) -> Shape:
        if not m._qkv_same_embed_dim:
            raise ValueError(f"Only same embed for query/key/value is supported as of now for {type(m).__name__}.")
        return (3 * m.embed_dim, m.embed_dim)


class Norm(LayerKind):
    """Layers with one weight a feature (LayerNorm, RMSNorm of any library)."""

    name = class_name = "Norm"

    @classmethod
    def matches(cls, m: Any) -> bool:
        weight = m._parameters.get("weight")
        return weight is not None and weight.dim() == 1

    @classmethod
    def shape(cls, m: Any) -> Shape:
        return (m.weight.shape[0], m.weight.shape[0])


class Module(LayerKind):
    """Any module: for methods that replace the module as a whole."""

    name = class_name = "Module"

    @classmethod
    def shape(cls, m: Any) -> Shape:
        return (getattr(m, "out_features", 0), getattr(m, "in_features", 0))


class Parameter(LayerKind):
    """A raw nn.Parameter of a module: [out, in], or experts [E, out, in] ([E, in, out] when the module says
    `is_transposed`).
    """

    name, class_name, bias_name, substituted = "Parameter", "ParamWrapper", None, True

    @classmethod
    def shape(cls, m: Any) -> Shape:
        """[out, in] or [E, out, in]."""
        shape = tuple(getattr(m, cls.weight_name).shape)
        if len(shape) not in (2, 3):
            raise ValueError(
                f"Parameter {cls.weight_name!r} of {type(m).__name__} is {len(shape)}-d; only 2-d and 3-d ones can "
                "be adapted."
            )
        return (shape[0], shape[2], shape[1]) if len(shape) == 3 and cls.swapped(m) else shape

    @classmethod
    def swapped(cls, m: Any) -> bool:
        return bool(getattr(m, "is_transposed", False))


_ORDER: tuple[type[LayerKind], ...] = (Embedding, Conv2d, Conv3d, Conv1d, MultiheadAttention, Conv1D, Linear, Norm)
_by_type: dict[type, type[LayerKind]] = {
    nn.Linear: Linear, nn.Embedding: Embedding, nn.Conv1d: Conv1d, nn.Conv2d: Conv2d, nn.Conv3d: Conv3d,
    nn.MultiheadAttention: MultiheadAttention,
}  # fmt: skip


def kind_of(m: Any) -> type[LayerKind] | None:
    """The kind of a base module, None when it has none."""
    known = _by_type.get(type(m))
    if known is not None:
        return known
    return next((kind for kind in _ORDER if kind.matches(m)), None)


def pick(m: Any, allowed: tuple[type[LayerKind], ...]) -> type[LayerKind] | None:
    """The kind of `m` among those that a method allows."""
    kind = kind_of(m)
    return kind if kind in allowed else Module if Module in allowed else None


def demand(m: Any, allowed: tuple[type[LayerKind], ...], method: str) -> type[LayerKind]:
    """The same, refused where there is none."""
    kind = pick(m, allowed)
    if kind is None:
        raise TypeError(f"{method} cannot adapt a {type(m).__name__}, only {', '.join(k.name for k in allowed)}.")
    return kind


def parameter_kind(name: str) -> type[Parameter]:
    """The kind of the raw parameter called `name`; made on demand, importable (and so picklable) as
    `kinds.Parameter__<name>`.
    """
    class_name = f"Parameter__{name}"
    if class_name not in globals():
        globals()[class_name] = type(class_name, (Parameter,), {"weight_name": name, "__module__": __name__})
    return globals()[class_name]


def __getattr__(name: str):
    if name.startswith("Parameter__"):
        return parameter_kind(name.removeprefix("Parameter__"))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
