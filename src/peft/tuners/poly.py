# SPDX-License-Identifier: Apache-2.0
"""Poly: Combining Modular Skills in Multitask Learning (arXiv 2202.13914), Multi-Head Adapter Routing (2211.03831).

Skills are low-rank updates; each task mixes its own, separately for each head q (a split of the features):
    y_b = W x_b + (x_b A_b) B_b / r,   A_b[q] = Σ_s w[b,q,s] A[q,s],   B_b[q] = Σ_s w[b,q,s] B[q,s]
    w[b,q,:] = σ(Z[task_b, q, :]) normalised over the skills; in training σ is a sample of the relaxed Bernoulli.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..config import PeftConfig, excludes, option, saves, targets
from ..core import kinds
from ..core.layer import AdapterLayer, kaiming
from ..core.slots import Aux, Trainable
from ..core.tuner import TunerModel
from ..registry import register_method

EPS = 1e-12


@dataclass
class PolyConfig(PeftConfig):
    """Options of Poly."""

    r: int = option(8, "Rank of each skill.")
    target_modules: list[str] | set[str] | str | None = targets()
    exclude_modules: list[str] | set[str] | str | None = excludes()
    modules_to_save: list[str] | None = saves()
    init_weights: bool = option(True, "Start at zero (B = 0).")
    poly_type: Literal["poly"] = option("poly", "The kind of router; there is one.")
    n_tasks: int = option(1, "Number of tasks; with more than one every call needs `task_ids`.")
    n_skills: int = option(4, "Skills in each layer.")
    n_splits: int = option(1, "Heads: splits of the features with their own mixtures (Multi-Head Routing).")
    _positive = ("r", "n_tasks", "n_skills", "n_splits")
    _choices = ("poly_type",)


class Router(nn.Module):
    """The mixing logits of all tasks, Z [n_tasks, n_splits · n_skills]."""

    def __init__(self, cfg: Any):
        super().__init__()
        self.n_splits, self.n_skills = cfg.n_splits, cfg.n_skills
        self.module_logits = nn.Parameter(torch.empty(cfg.n_tasks, cfg.n_splits * cfg.n_skills).uniform_(-1e-3, 1e-3))

    def forward(self, task_ids: torch.Tensor) -> torch.Tensor:
        """Weights [b, n_splits, n_skills] of the skills for tasks [b]."""
        logits = self.module_logits[task_ids].view(-1, self.n_splits, self.n_skills)
        if self.training:
            eps = torch.finfo(logits.dtype).eps
            u = torch.rand(logits.shape, dtype=logits.dtype, device=logits.device).clamp(eps, 1 - eps)
            logits = logits + u.log() - (-u).log1p()
        w = logits.sigmoid()
        return w / (w.sum(-1, keepdim=True) + EPS)


class PolyLayer(AdapterLayer):
    """Low-rank skills, mixed for each sample by its task."""

    poly_lora_A: Trainable[nn.ParameterDict]  # [n_splits, n_skills, in / n_splits, r]
    poly_lora_B: Trainable[nn.ParameterDict]  # [n_splits, n_skills, r, out / n_splits]
    poly_router: Trainable[nn.ModuleDict]
    r: Aux[dict]
    n_tasks: Aux[dict]
    n_skills: Aux[dict]
    n_splits: Aux[dict]
    poly_type: Aux[dict]
    kinds = (kinds.Linear,)

    def create(self, name: str, cfg: Any) -> None:
        for option_name in ("r", "n_tasks", "n_skills", "n_splits", "poly_type"):
            getattr(self, option_name)[name] = getattr(cfg, option_name)
        shape = (cfg.n_splits, cfg.n_skills)
        A = torch.empty(*shape, self.in_features // cfg.n_splits, cfg.r)
        B = torch.zeros(*shape, cfg.r, self.out_features // cfg.n_splits)
        for factor in (A,) if cfg.init_weights else (A, B):
            for s in range(cfg.n_skills):  # the order of the published draws
                for q in range(cfg.n_splits):
                    factor[q, s] = kaiming(factor.shape[-1], factor.shape[-2]).T
        self.poly_lora_A[name], self.poly_lora_B[name] = nn.Parameter(A), nn.Parameter(B)
        self.poly_router[name] = Router(cfg)

    def delta(self, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x [b, ..., in]. In evaluation of a single task one mixture serves the whole batch."""
        router: Router = self.poly_router[name]  # type: ignore[assignment]
        ids = self._task_ids(name, x)
        if not router.training and self.n_tasks[name] == 1:
            ids = ids[:1]
        w = router(ids)
        A = torch.einsum("bqs,qsdr->bqdr", w, self.poly_lora_A[name]).flatten(1, 2)  # [b, in, r]
        B = torch.einsum("bqs,qsrd->brqd", w, self.poly_lora_B[name]).flatten(2, 3)  # [b, r, out]
        if len(w) == 1:
            return x @ A[0] @ (B[0] / self.r[name])
        z = x.reshape(len(x), -1, x.shape[-1]) @ A @ (B / self.r[name])
        return z.view(*x.shape[:-1], -1)

    def _task_ids(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """The task [b] of each row of x; `generate` has repeated the rows for beams."""
        call, n_tasks = self.switch.call, self.n_tasks[name]
        if call.task_ids is None:
            if n_tasks > 1:
                raise ValueError(f"Adapter {name!r} of Poly has {n_tasks} tasks: pass `task_ids`, one for each sample.")
            return torch.zeros(len(x), dtype=torch.long, device=x.device)
        ids, rows = call.task_ids.to(x.device), len(x) if call.part is None else len(call.adapter_names or ())
        if call.generating and rows > len(ids) and rows % len(ids) == 0:
            ids = ids.repeat_interleave(rows // len(ids))
        if len(ids) != rows:
            raise RuntimeError(
                f"`task_ids` must hold one task for each sample, got {len(ids)} ids for a batch of {rows}."
            )
        return ids if call.part is None else ids[call.part]


@register_method("poly", config=PolyConfig)
class PolyModel(TunerModel):
    layer_cls = PolyLayer
    unsupported_error = TypeError
    example = {"r": 4, "n_skills": 3, "n_splits": 2}

    def check_target(self, cfg: Any, key: str, module: nn.Module) -> None:
        out, n_in = self.target_shape(module)[:2]
        if n_in % cfg.n_splits or out % cfg.n_splits:
            raise ValueError(
                f"Target module {key}: n_splits={cfg.n_splits} must divide both widths, which are {n_in} -> {out}."
            )

    def call_arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        task_ids = kwargs.pop("task_ids", None)
        if task_ids is not None:
            self.switch.call.task_ids = self._checked(task_ids)
        return kwargs

    def _checked(self, task_ids: Any) -> torch.Tensor:
        """Looked at once a call, not in every layer."""
        ids = torch.as_tensor(task_ids).reshape(-1).long()
        limit = min(self.peft_config[n].n_tasks for n in self.active_adapters)  # type: ignore[attr-defined]
        if not torch.compiler.is_compiling() and bool(((ids < 0) | (ids >= limit)).any()):
            raise ValueError(f"`task_ids` must be between 0 and n_tasks - 1 = {limit - 1}, got {ids.tolist()}.")
        return ids

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **self.call_arguments(kwargs))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        call = self.switch.call
        call.generating = True
        try:
            return self.model.generate(*args, **self.call_arguments(kwargs))  # type: ignore[operator]
        finally:
            call.clear()
