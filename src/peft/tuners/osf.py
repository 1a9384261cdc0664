# SPDX-License-Identifier: Apache-2.0
"""OSF: Sculpting Subspaces, Constrained Full Fine-Tuning in LLMs for Continual Learning (arXiv 2504.07097).

ΔW = U diag(S) V - U₀ diag(S₀) V₀ over the smallest singular triplets of W; gradients of U and V are projected so that
the large singular subspaces stay untouched.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import PeftConfig, option, saves, targets
from ..core import kinds
from ..core.layer import AdapterLayer
from ..core.modules import making_on_meta
from ..core.slots import Aux, BufferDict, Trainable
from ..core.targets import default_targets
from ..core.tuner import TunerModel
from ..ops import dense
from ..ops.dispatch import settled
from ..registry import register_method

# The method itself: the gradients of U and V are projected, so they are not the derivatives.
PROJECT_GRADIENTS = True


@dataclass
class OSFConfig(PeftConfig):
    """Options of OSF."""

    effective_rank: int | float | None = option(
        None, "Rank that is preserved: a number, a fraction in (0, 1], or None for half."
    )
    target_modules: list[str] | set[str] | str | None = targets()
    rank_pattern: dict | None = option(None, "Ranks that differ: {regex: rank}.")
    init_weights: bool | None = option(True, "Start at the base model; False draws the trained factors.")
    modules_to_save: list[str] | None = saves()
    target_svd_config: dict | None = option(None, "Has no effect; kept for old files.")
    _set_fields = ()  # the published configuration keeps lists


class ProjectGradient(torch.autograd.Function):
    """Identity; the gradient is projected along one side: g - P Pᵀ g (or P Pᵀ g), with P orthonormal."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: torch.Tensor, basis: torch.Tensor, keep: bool, left: bool) -> torch.Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.keep, ctx.left = inputs[2:]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (basis,), g = ctx.saved_tensors, grads[0]
        basis = basis.to(g.dtype)
        part = basis @ (basis.T @ g) if ctx.left else (g @ basis.T) @ basis
        return (part if ctx.keep else g - part), None, None, None


def _copy(part: torch.Tensor) -> torch.Tensor:
    return part.clone(memory_format=torch.contiguous_format)


class OSFLayer(AdapterLayer):
    """Trains the small singular triplets of the weight."""

    osf_svd_params: Trainable[nn.ModuleDict]  # U_low [out, m], S_low [m], V_low [m, in]
    effective_rank: Aux[dict]
    _osf_U_low_init: Aux[BufferDict]
    _osf_S_low_init: Aux[BufferDict]
    _osf_V_low_init: Aux[BufferDict]
    _osf_U_high: Aux[BufferDict]  # [out, k], only if out > in
    _osf_V_high: Aux[BufferDict]  # [k, in], only if out < in
    kinds = (kinds.Linear, kinds.Conv1D)
    weight_need = "read"
    prefer_weight_path = True
    standalone_delta = False
    one_active = True

    def create(self, name: str, cfg: Any) -> None:
        k, (out, n_in) = cfg.effective_rank, (self.out_features, self.in_features)
        self.effective_rank[name] = k
        with torch.no_grad():
            W = self.base_weight()
            U, S, V = torch.linalg.svd(W if W.dtype == torch.float64 else W.float(), full_matrices=False)
        low = {"U_low": U[:, k:], "S_low": S[k:], "V_low": V[k:]}
        for key, value in low.items():
            getattr(self, f"_osf_{key}_init")[name] = _copy(value)
        if out > n_in:
            self._osf_U_high[name] = _copy(U[:, :k])
        elif out < n_in:
            self._osf_V_high[name] = _copy(V[:k])
        drawn = not cfg.init_weights or making_on_meta()  # with low_cpu_mem_usage the file has the values
        start = {key: nn.Parameter(torch.randn(v.shape) if drawn else _copy(v)) for key, v in low.items()}
        self.osf_svd_params[name] = nn.ParameterDict(start)

    def delta_weight(self, name: str) -> torch.Tensor:
        params: Any = self.osf_svd_params[name]
        U, S, V = params["U_low"], params["S_low"], params["V_low"]
        U0, S0, V0 = self._osf_U_low_init[name], self._osf_S_low_init[name], self._osf_V_low_init[name]
        if PROJECT_GRADIENTS and torch.is_grad_enabled() and U.requires_grad:
            keep_u, keep_v = name not in self._osf_U_high, name not in self._osf_V_high
            U = ProjectGradient.apply(U, U0 if keep_u else self._osf_U_high[name], keep_u, True)
            V = ProjectGradient.apply(V, V0 if keep_v else self._osf_V_high[name], keep_v, False)
        with settled(U):  # a difference of two near products
            return torch.addmm(dense.triplets(U, S, V), (U0 * S0).to(U.dtype), V0.to(V.dtype), alpha=-1)


@register_method("osf", config=OSFConfig)
class OSFModel(TunerModel):
    layer_cls = OSFLayer
    inexact_gradients = {"osf.PROJECT_GRADIENTS": False}

    def default_targets(self, cfg: Any, model: nn.Module) -> Any:
        """The method's own table; every linear layer of unknown architectures."""
        return default_targets("osf", self.get_model_config(model).get("model_type", "custom")) or "all-linear"

    def layer_config(self, cfg: Any, key: str, module: nn.Module) -> Any:
        return cfg.with_values(effective_rank=self._rank(self._wanted(cfg, key), module))

    @staticmethod
    def _wanted(cfg: Any, key: str) -> int | float | None:
        return next((v for p, v in (cfg.rank_pattern or {}).items() if re.search(p, key)), cfg.effective_rank)

    def _rank(self, wanted: int | float | None, module: nn.Module) -> int:
        smaller = min(self.target_shape(module)[:2])
        if wanted is None:
            return smaller // 2
        rank = int(smaller * wanted) if isinstance(wanted, float) and 0 < wanted <= 1 else int(wanted)
        return max(0, min(rank, smaller))

    def check_target(self, cfg: Any, key: str, module: nn.Module) -> None:
        wanted = self._wanted(cfg, key)
        if not isinstance(wanted, int | float | None) or self._rank(wanted, module) == 0:
            raise ValueError(
                f"Target module {key}: effective_rank {wanted!r} preserves nothing; give a rank of at least 1, a "
                "fraction of the smaller width, or None for half."
            )
