# SPDX-License-Identifier: Apache-2.0
"""Initialisations of LoRA factors (`init_lora_weights`), one function each, by name in `SCHEMES`.

PiSSA, arXiv 2404.02948. OLoRA, 2406.01775. CorDA, 2406.05223. LoftQ, 2310.08659. LoRA-GA, 2407.05000. EVA, 2410.07170.
MiCA, 2604.01694. Notation: W [out, in] base weight, A [r, in], B [out, r], s scaling.

A function gets freshly made factors (torch's default draws, part of the seeded format).
Some change the base: W <- W - s·B·A.
"""

import math
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...config import nearest
from ...core import kinds
from ...core.combine import split_svd
from ...core.modules import kaiming_, values_awaited
from ...storage.base import resolve
from ...utils.other import infer_device

if TYPE_CHECKING:
    from .layer import LoraLayer

ALLOWED_COMPUTE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
Scheme = Callable[["LoraLayer", str, Any], None]
_NITER = re.compile(r"pissa_niter_(\d+)")


def default(layer: "LoraLayer", name: str, cfg: Any) -> None:
    """A uniform in +-1/sqrt(in), B zero; embeddings: A zero, B N(0, 1)."""
    A, B = layer.factor_tensors(name)
    if layer.kind is kinds.Embedding:
        nn.init.zeros_(A)
        nn.init.normal_(B)
    else:
        kaiming_(A)
        zero_b(layer, name, cfg)


def gaussian(layer: "LoraLayer", name: str, cfg: Any) -> None:
    """A N(0, 1/r²), B zero."""
    nn.init.normal_(layer.factor_tensors(name)[0], std=1 / layer.r[name])
    zero_b(layer, name, cfg)


def zero_b(layer: "LoraLayer", name: str, cfg: Any) -> None:
    """B zero. With "eva" that is all: `initialize_lora_eva_weights` fills A."""
    layer.factor_tensors(name)[1].zero_()
    if layer.lora_bias[name]:
        nn.init.zeros_(layer.lora_B[name].bias)  # type: ignore[arg-type]


def orthogonal(layer: "LoraLayer", name: str, cfg: Any) -> None:
    """A and B from disjoint rows of an orthogonal r x r matrix: both non-zero, B·A = 0."""
    r, out, n_in = layer.r[name], layer.out_features, layer.in_features
    if r % 2:
        raise ValueError(f"Orthogonal initialization requires the LoRA rank to be even, got {r}.")
    Q = torch.linalg.qr(torch.randn(r, r)).Q
    A = (torch.randn(n_in, r // 2) @ Q[0::2]).T / 10
    B = (torch.randn(r // 2, out).T @ Q[1::2]) / 10
    layer.set_factors(name, A, B)


def pissa(layer: "LoraLayer", name: str, cfg: Any) -> None:
    """The r principal components of W; "pissa_niter_N" by randomised SVD with N subspace iterations."""
    W, s, r = compute_weight(layer, cfg), layer.scaling[name], layer.r[name]
    niter = _NITER.fullmatch(cfg.init_lora_weights.lower())
    if niter is None:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(W, q=r, niter=int(niter.group(1)))
        Vh = V.T
    _replace(layer, name, W, *split_svd(U, S / s, Vh, r, balanced=True))


def olora(layer: "LoraLayer", name: str, cfg: Any) -> None:
    """W = Q R: A the first r rows of R, B the first r columns of Q. They depend on the first r columns of W only."""
    W = compute_weight(layer, cfg)
    Q = torch.linalg.qr(W[:, : layer.r[name]]).Q
    _replace(layer, name, W, Q.T @ W, Q)


def mica(layer: "LoraLayer", name: str, cfg: Any) -> None:
    """A zero, B the r minor left singular vectors of W (frozen by the variant)."""
    U = torch.linalg.svd(compute_weight(layer, cfg), full_matrices=False).U
    layer.set_factors(name, torch.zeros_like(layer.factor_tensors(name)[0]), U[:, -layer.r[name] :])


def corda(layer: "LoraLayer", name: str, cfg: Any) -> None:
    """The context-oriented decomposition that `preprocess_corda` left on the layer."""
    base, s, r = layer.get_base_layer(), layer.scaling[name], layer.r[name]
    eigens: Any = getattr(base, "eigens", None)
    if eigens is None:
        raise ValueError(
            "`eigens` attribute not found for layer, please run `preprocess_corda` before creating the adapter."
        )
    W = compute_weight(layer, cfg)
    U, S, V = (t.to(W.device, W.dtype) for t in (eigens.U_WC, eigens.S_WC, eigens.V_WC))
    if not all(torch.isfinite(t).all() for t in (U, S, V)):
        raise ValueError("Invalid value found in the CorDA decomposition (NaN or infinity). Check the sample data.")
    sizes = {"U_WC": (U, (layer.out_features, r)), "S_WC": (S, (r,)), "V_WC": (V, (layer.in_features, r))}
    for label, (tensor, wanted) in sizes.items():
        if tuple(tensor.shape) != wanted:
            raise ValueError(
                f"{label} is {tuple(tensor.shape)}, expected {wanted}; was the rank the same in `preprocess_corda`?"
            )
    _replace(layer, name, W, *split_svd(U, S / s, V.T, r, balanced=True))
    del base.eigens


def lora_ga(layer: "LoraLayer", name: str, cfg: Any) -> None:
    """Factors along the gradient that `preprocess_loraga` left on the layer; the default where there is none."""
    base = layer.get_base_layer()
    grad: Any = getattr(base, "_peft_loraga_grad", None)
    if not layer.kind.is_linear:
        return default(layer, name, cfg)
    if grad is None:
        warnings.warn(
            "There is no gradient of `preprocess_loraga`: LoRA-GA falls back to the default initialisation. An "
            "adapter from a file belongs to the base weights that its gradients changed; save it with "
            "`path_initial_model_for_weight_conversion` to use it with the unchanged ones.",
            stacklevel=2,
        )
        return default(layer, name, cfg)
    if cfg.lora_ga_config is None:
        raise ValueError("`lora_ga_config` must be given when `init_lora_weights` is 'lora_ga'.")
    W = compute_weight(layer, cfg)
    G = layer.kind.canonical(grad).to(W.device, W.dtype)
    A, B = gradient_factors(G, W, layer.r[name], layer.scaling[name], cfg.lora_ga_config)
    dtype = layer.kind.parameter(base).dtype
    _replace(layer, name, W, A.to(dtype).to(W.dtype), B.to(dtype).to(W.dtype))
    del base._peft_loraga_grad
    return None


def gradient_factors(
    G: torch.Tensor, W: torch.Tensor, r: int, s: float, options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, in] and B [out, r] of LoRA-GA from the gradient G [out, in]."""
    n_out, n_in = G.shape
    if 2 * r > min(n_out, n_in):
        raise ValueError(f"LoRA-GA needs 2·r <= min(in, out) = {min(n_out, n_in)}, got r={r}.")
    U, S, V = torch.svd_lowrank(G, q=min(4 * r, n_out, n_in), niter=4)
    if options.direction == "random":
        rows = columns = torch.randperm(2 * r)[:r].to(G.device)
    else:
        all_ = torch.arange(2 * r, device=G.device)
        halves = {"ArBr": (all_[1::2], all_[::2]), "A2rBr": (all_[r:], all_[:r]), "ArB2r": (all_[:r], all_[r:])}
        rows, columns = halves[options.direction]
    A, B = V.T[rows], U[:, columns] * S[columns]
    scale = options.scale
    if scale == "stable":
        return A, B * (n_out**0.25 / math.sqrt(options.stable_gamma))
    if scale == "weight_svd":
        first = S[columns[0]]
        return A, B * (torch.linalg.matrix_norm(W, 2) / first) if first > 0 else B
    return (A / s, B / s) if scale == "gd_scale" else (A, B)


def loftq(layer: "LoraLayer", name: str, cfg: Any) -> None:
    """Alternate quantising W - B·A and factoring what that loses; the base becomes the (dequantised) quantised
    weight.
    """
    from ...utils.loftq_utils import loftq_init

    dtype = layer.kind.parameter(layer.get_base_layer()).dtype
    bits, iterations = cfg.loftq_config.get("loftq_bits", 4), cfg.loftq_config.get("loftq_iter", 1)
    Q, A, B = loftq_init(compute_weight(layer, cfg), bits, layer.r[name], iterations)
    layer.set_factors(name, A, B)
    layer.set_base_weight(layer.kind.stored(Q.to(dtype)))


SCHEMES: dict[str, Scheme] = {
    "gaussian": gaussian, "eva": zero_b, "olora": olora, "pissa": pissa, "corda": corda, "loftq": loftq,
    "orthogonal": orthogonal, "lora_ga": lora_ga, "mica": mica,
}  # fmt: skip
_CHANGE_BASE = (pissa, olora, corda, lora_ga, loftq)
_READ_BASE = (*_CHANGE_BASE, mica)
_ON_CONVS = (gaussian, lora_ga)
_ON_SUBSTITUTED = (gaussian, zero_b)
_ON_EMBEDDINGS = (None, default, mica)  # the others mean the default there, as published


def scheme(value: Any) -> Scheme | None:
    """The function of an `init_lora_weights` value; None leaves torch's own draws."""
    if value is True or value is False or value is None:
        return default if value else None
    key = str(value).lower()
    if _NITER.fullmatch(key):
        return pissa
    if key.startswith("corda"):
        return corda
    if key not in SCHEMES:
        valid = (*SCHEMES, "pissa_niter_<iterations>")
        raise ValueError(
            f"Unknown initialization init_lora_weights={value!r}; use True, False or one of "
            f"{', '.join(valid)}.{nearest(key, valid)}"
        )
    return SCHEMES[key]


def changes_base(value: Any) -> bool:
    return scheme(value) in _CHANGE_BASE


def check(cfg: Any, key: str, kind: type[kinds.LayerKind], base: nn.Module) -> None:
    """Refuse a scheme that layer `key` cannot have, before anything is changed."""
    function = scheme(cfg.init_lora_weights)
    if function in (None, default) or kind is kinds.Embedding:
        return
    text = f"init_lora_weights={cfg.init_lora_weights!r} is not possible for {key!r} ({type(base).__name__})"
    if kind.is_conv and function not in _ON_CONVS:
        raise ValueError(f"Unknown initialization: {text}; convolutions take True, False and 'gaussian'.")
    if kind.substituted and function not in _ON_SUBSTITUTED:
        raise ValueError(f"{text}; attention modules and raw parameters take True, False and 'gaussian'.")
    if function in _READ_BASE:
        weight = getattr(base, kind.weight_name, None)
        if not resolve(base).readable:
            raise TypeError(
                f"{text}: a {resolve(base).label} weight cannot be read. Load the base model unquantised, or take "
                "True or 'gaussian'."
            )
        if function is not olora and (weight is None or weight.dtype not in ALLOWED_COMPUTE_DTYPES):
            raise TypeError(
                f"{text}: it needs a float weight. Load the base model in floats, or quantise it afterwards."
            )
        limit = min(kind.shape(base)[:2])
        if function in (pissa, olora, mica) and cfg.r > limit:
            raise ValueError(f"{text}: r={cfg.r} is more than the smallest dimension of the weight, {limit}.")


def initialise(layer: "LoraLayer", name: str, cfg: Any) -> None:
    """Fill the factors of adapter `name`."""
    function = scheme(cfg.init_lora_weights)
    if layer.kind is kinds.Embedding and function not in _ON_EMBEDDINGS:
        function = default
    if function is None:
        return
    base_weight = getattr(layer.get_base_layer(), layer.kind.weight_name, None)
    if isinstance(base_weight, torch.Tensor) and base_weight.is_meta:
        return
    # What a file brings is not computed, but a scheme that changes the base must change it all the same.
    if function not in _CHANGE_BASE and (values_awaited() or layer.factor_tensors(name)[0].is_meta):
        return
    with torch.no_grad():
        function(layer, name, cfg)


def compute_weight(layer: "LoraLayer", cfg: Any) -> torch.Tensor:
    """The canonical base weight [out, in] in float32 (float64 stays), on the accelerator if the user wants that."""
    W = layer.base_weight()
    if W.device.type == "cpu" and cfg.runtime_config.ephemeral_gpu_offload:
        W = W.to(infer_device())
    return W if W.dtype in (torch.float32, torch.float64) else W.to(torch.float32)


def _replace(layer: "LoraLayer", name: str, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> None:
    """Take s·B·A out of the base weight and give it to the adapter."""
    residual = torch.addmm(W, B, A, alpha=-layer.scaling[name])
    layer.set_base_weight(layer.kind.stored(residual))
    layer.set_factors(name, A, B)
