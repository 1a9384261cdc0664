# SPDX-License-Identifier: Apache-2.0
"""CorDA: Context-Oriented Decomposition Adaptation (arXiv 2406.05223).

With C the covariance of a layer's inputs: W C = U Σ Vᵀ, W = U Σ (Vᵀ C⁻¹). The adapter takes r components of it, the
largest ("ipm") or the smallest ("kpm"); see `init.corda`. `preprocess_corda` leaves the r components on each layer as
`eigens`.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ...core import kinds
from ...core.match import pattern_value
from . import data_init
from .config import LoraConfig

_PARTS = ("S_WC", "U_WC", "V_WC")  # fields of CordaEigens, in order
_CONDITION = 0.05  # largest ‖C C⁻¹ - I‖ of an inverse that is good enough


@dataclass
class CordaEigens:
    S_WC: torch.Tensor  # [r]
    U_WC: torch.Tensor  # [out, r]
    V_WC: torch.Tensor  # [in, r]


def target_modules(model: nn.Module, config: LoraConfig) -> Iterable[tuple[str, nn.Module]]:
    """(name, layer) of the linear layers that `config` targets."""
    yield from data_init.target_layers(model, config).items()


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], None] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Decompose the target layers of `model` in the context of data, before `get_peft_model` with
    init_lora_weights="corda".

    `run_model` runs the model on sample data, one sample a call of a layer (batch size 1). `hooked_model`: measure
    the inputs on this model instead, which has the same layer names. `corda_config.cache_file` and `covariance_file`
    are read if they exist, else written.
    """
    options: Any = lora_config.corda_config
    if options is None:
        raise ValueError("`corda_config` must be given in the LoraConfig.")
    layers = data_init.target_layers(model, lora_config)
    data_init.refuse_quantised(layers, "CorDA")
    cache = data_init.cached(options.cache_file, [f"{n}.eigens.{part}" for n in layers for part in _PARTS])
    if cache is not None:
        for name, layer in layers.items():
            layer.eigens = CordaEigens(*(cache[f"{name}.eigens.{part}"] for part in _PARTS))  # type: ignore[assignment]
        return
    covariances = data_init.cached(options.covariance_file, layers)
    if covariances is None:
        covariances = _covariances(layers, model if hooked_model is None else hooked_model, options, run_model)
        data_init.save(options.covariance_file, covariances)
    for name, layer in tqdm(layers.items(), "CorDA decomposition", disable=not options.verbose):
        rank = pattern_value(lora_config.rank_pattern, name, lora_config.r)
        layer.eigens = decompose(layer, covariances[name].to(layer.weight.device), rank, options.corda_method, name)  # type: ignore
        if not options.prune_temporary_fields:
            layer.covariance_matrix = covariances[name]
    found = {f"{n}.eigens.{part}": getattr(m.eigens, part) for n, m in layers.items() for part in _PARTS}
    data_init.save(options.cache_file, found)


def _covariances(
    layers: dict[str, nn.Module], hooked: nn.Module, options: Any, run_model: Callable[[], None] | None
) -> dict[str, torch.Tensor]:
    """Mean of xᵀ x over the calls of each layer, [in, in]."""
    if run_model is None:
        raise ValueError("`run_model` must be specified when there is no covariance file: CorDA needs sample data.")
    dtype = torch.float16 if options.use_float16_for_covariance else torch.float32
    sums: dict[str, torch.Tensor] = {}
    counts = dict.fromkeys(layers, 0)

    def add(name: str, module: nn.Module, args: tuple, output: Any) -> None:
        added = _outer(args[0].detach(), dtype, name)
        sums[name] = sums[name] + added if name in sums else added
        counts[name] += 1

    measured = dict(hooked.named_modules())
    if missing := [n for n in layers if n not in measured]:
        raise ValueError(f"`hooked_model` has no layer {missing[0]!r}: it needs the target layers of `model`.")
    with contextlib.ExitStack() as hooks, data_init.mode(hooked, False):
        for name in layers:
            hooks.enter_context(measured[name].register_forward_hook(functools.partial(add, name)))
        run_model()
    if unused := [n for n, c in counts.items() if c == 0]:
        raise ValueError(f"`run_model` never called {unused[0]!r}: CorDA needs data for every target module.")
    result = {n: sums[n] / counts[n] for n in layers}
    if broken := [n for n, C in result.items() if not torch.isfinite(C).all()]:
        raise ValueError(
            f"Invalid value found in covariance matrix of {broken[0]!r} (NaN or infinity). Check the sample data."
        )
    return result


def _outer(x: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    x = x.squeeze(0) if x.dim() == 3 and x.shape[0] == 1 else x
    if x.dim() != 2:
        raise RuntimeError(
            f"CorDA expects one sample a call: {name!r} got an input of shape {tuple(x.shape)}. Use a batch size of 1."
        )
    x = x.to(dtype)
    x = x / x.abs().max().clamp_min(torch.finfo(dtype).tiny)
    return x.T @ x


def decompose(layer: nn.Module, C: torch.Tensor, rank: int, method: str, name: str = "") -> CordaEigens:
    """The first or last `rank` components of the weight in the context of the covariance C [in, in]."""
    kind: Any = kinds.kind_of(layer)
    W = kind.canonical(layer.weight).float()
    if rank > min(W.shape):
        raise ValueError(f"r={rank} is larger than the smallest dimension of {name!r}, {min(W.shape)}.")
    C, inverse = _inverted(C.float(), name)
    U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
    part = slice(0, rank) if method == "ipm" else slice(S.shape[0] - rank, S.shape[0])
    V = (Vh[part] @ inverse).T
    return CordaEigens(S[part].contiguous(), U[:, part].contiguous(), V.contiguous())


def _inverted(C: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """C with as much added to its diagonal as it takes to invert it, and the inverse."""
    eye = torch.eye(len(C), device=C.device)
    share = 0.01
    for _ in range(64):
        damped = C + share * C.diagonal().mean() * eye
        inverse, info = torch.linalg.inv_ex(damped)
        if info == 0 and torch.linalg.matrix_norm(damped @ inverse - eye) < _CONDITION:
            return damped, inverse
        share *= 2
    raise ValueError(f"The covariance matrix of {name!r} cannot be inverted. Check the sample data.")
