# SPDX-License-Identifier: Apache-2.0
"""PSOFT: Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation (arXiv 2505.11235).

ΔW = B (R - I) A on the top-r singular subspace W ≈ B A, R = diag(b) C diag(a), C the Cayley map of a trained skew
matrix. A and B are recomputed from the base weight whenever an adapter is made or loaded. Another solver (a GPU's) may
turn signs around, so the text part of a file says what they were.
"""

import json
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..config import PeftConfig, excludes, fan_in_fan_out, layer_names, layer_range, option, positive, saves, targets
from ..core import kinds
from ..core.layer import AdapterLayer, dropout, dropout_p
from ..core.slots import Aux, BufferDict, Trainable
from ..core.tuner import TunerModel
from ..ops import cayley
from ..ops.low_rank import Factors
from ..registry import register_method

LANDMARKS = "psoft_landmarks"  # in the text part of a file: {path of the layer: landmarks}


@dataclass
class PsoftConfig(PeftConfig):
    """Options of PSOFT."""

    r: int = option(32, "Rank of the subspace.")
    target_modules: list[str] | set[str] | str | None = targets()
    exclude_modules: list[str] | set[str] | str | None = excludes()
    psoft_alpha: int = option(32, "Has no effect (it cancels); kept for old files.")
    psoft_dropout: float = option(0.0, "Dropout on the input.")
    fan_in_fan_out: bool = fan_in_fan_out()
    ab_svd_init: Literal["psoft_init", "pissa_init"] = option(
        "psoft_init", "Where the singular values go: all into B, or half each."
    )
    psoft_svd: Literal["full", "lowrank"] = option("full", "Solver of the singular value decomposition.")
    psoft_svd_lowrank_niter: int = option(10, "Power iterations of 'lowrank'.")
    random_seed: int = option(0, "Seed of 'lowrank'.")
    psoft_orth: bool = option(True, "R is orthogonal; False: a free matrix.")
    psoft_mag_b: bool = option(True, "Train a scale for each row of R.")
    psoft_mag_a: bool = option(True, "Train a scale for each column of R.")
    use_cayley_neumann: bool = option(False, "Truncated series instead of the exact Cayley map.")
    num_cayley_neumann_terms: int = option(5, "Number of terms of the series.")
    cayley_neumann_eps: float | None = option(None, "Bound on the Frobenius norm of the skew matrix, in (0, 1).")
    modules_to_save: list[str] | None = saves()
    init_weights: bool = option(True, "Start at the identity.")
    layers_to_transform: list[int] | int | None = layer_range()
    layers_pattern: list[str] | str | None = layer_names()
    _positive = ("r",)
    _choices = ("ab_svd_init", "psoft_svd")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.psoft_svd == "full" and self.psoft_svd_lowrank_niter != 10:
            warnings.warn("`psoft_svd_lowrank_niter` only has an effect with psoft_svd='lowrank'.", stacklevel=4)
        if not self.use_cayley_neumann:
            if self.num_cayley_neumann_terms != 5 or self.cayley_neumann_eps is not None:
                warnings.warn(
                    "The Cayley-Neumann options only have an effect with use_cayley_neumann=True.", stacklevel=4
                )
            return
        positive("num_cayley_neumann_terms", self.num_cayley_neumann_terms)
        if self.cayley_neumann_eps is not None and not 0 < self.cayley_neumann_eps < 1:
            raise ValueError(f"`cayley_neumann_eps` must be in (0, 1), got {self.cayley_neumann_eps}.")


class OrthLayer(nn.Module):
    """The trained r x r matrix of one adapter."""

    def __init__(self, cfg: Any):
        super().__init__()
        r = cfg.r
        self.r, self.cfg = r, cfg
        if cfg.psoft_orth:
            weight = torch.zeros(r * (r - 1) // 2)  # upper triangle of the skew matrix, row by row
            weight = weight if cfg.init_weights else nn.init.normal_(weight, 0.0, 0.1)
        else:
            weight = torch.eye(r) if cfg.init_weights else torch.eye(r) + 0.1 * torch.randn(r, r)
        self.weight = nn.Parameter(weight)
        self.vector_b = nn.Parameter(torch.ones(r)) if cfg.psoft_mag_b else None
        self.vector_a = nn.Parameter(torch.ones(r)) if cfg.psoft_mag_a else None
        rows, cols = torch.triu_indices(r, r, 1, device="cpu")
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("cols", cols, persistent=False)

    def matrix(self) -> torch.Tensor:
        """R [r, r]."""
        R, cfg = self.weight, self.cfg
        if cfg.psoft_orth:
            Q = cayley.skew(self.weight, self.r, self.rows, self.cols)  # type: ignore
            if not cfg.use_cayley_neumann:
                R = cayley.cayley(Q).T  # published sign: (I + Q)(I - Q)⁻¹, which is the transpose
            else:
                Q = Q if cfg.cayley_neumann_eps is None else cayley.bound(Q, cfg.cayley_neumann_eps)
                R = cayley.cayley_series(Q, cfg.num_cayley_neumann_terms)
        if self.vector_b is not None and self.vector_a is not None:
            return R * (self.vector_b[:, None] @ self.vector_a[None])
        R = R if self.vector_b is None else self.vector_b[:, None] * R
        return R if self.vector_a is None else R * self.vector_a


class PsoftLayer(AdapterLayer):
    """Rotates inside the principal subspace of the weight."""

    psoft_R: Trainable[nn.ModuleDict]
    psoft_dropout: Aux[nn.ModuleDict]
    r: Aux[dict]
    _psoft_A_cache: Aux[BufferDict]  # [r, in]
    _psoft_B_cache: Aux[BufferDict]  # [out, r]
    kinds = (kinds.Linear, kinds.Conv1D)
    weight_need = "read"

    def create(self, name: str, cfg: Any) -> None:
        self.r[name], self.psoft_dropout[name] = cfg.r, dropout(cfg.psoft_dropout)
        self.psoft_R[name] = OrthLayer(cfg)
        with torch.no_grad():
            self._psoft_A_cache[name], self._psoft_B_cache[name] = self._subspace(cfg)

    def _subspace(self, cfg: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """A [r, in] and B [out, r] with B A the best rank-r part of the weight."""
        W = self.base_weight().float()
        if W.device.type == "meta":
            return W.new_empty(cfg.r, self.in_features), W.new_empty(self.out_features, cfg.r)
        if cfg.psoft_svd == "full":
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        else:
            with torch.random.fork_rng(devices=[W.device] if W.device.type == "cuda" else []):
                torch.manual_seed(cfg.random_seed)
                U, S, V = torch.svd_lowrank(W, q=cfg.r, niter=cfg.psoft_svd_lowrank_niter)
            Vh = V.T
        U, S, Vh = U[:, : cfg.r], S[: cfg.r], Vh[: cfg.r]
        if cfg.ab_svd_init == "psoft_init":
            return Vh.contiguous(), (U * S).contiguous()
        return S.sqrt()[:, None] * Vh, U * S.sqrt()

    def move_adapter(self, name: str) -> bool:
        """The caches stay in float32, unrounded."""
        caches = {c: c[name] for c in (self._psoft_A_cache, self._psoft_B_cache)}
        half = super().move_adapter(name)
        for cache, value in caches.items():
            cache[name] = value.to(cache[name].device)
        return half

    def landmarks(self, name: str) -> list[int]:
        """For each row of A the place (from 1) of its largest entry, with its sign."""
        A = self._psoft_A_cache[name]
        place = A.abs().argmax(1, keepdim=True)
        return ((place + 1) * A.gather(1, place).sign().long())[:, 0].tolist()

    def turn(self, name: str, landmarks: list[int]) -> None:
        """Give the singular pairs the signs that these landmarks had."""
        A, B = self._psoft_A_cache[name], self._psoft_B_cache[name]
        place = torch.tensor(landmarks, device=A.device)
        signs = A.gather(1, place.abs()[:, None] - 1)[:, 0].sign() * place.sign()
        self._psoft_A_cache[name], self._psoft_B_cache[name] = A * signs[:, None], B * signs

    def factors(self, name: str) -> Factors:
        R = self.psoft_R[name].matrix()  # type: ignore[operator]
        A, B = self._psoft_A_cache[name].to(R.dtype), self._psoft_B_cache[name].to(R.dtype)
        return Factors(A, torch.addmm(B, B, R, beta=-1), 1.0, dropout_p(self.psoft_dropout[name]))


@register_method("psoft", config=PsoftConfig)
class PsoftModel(TunerModel):
    layer_cls = PsoftLayer
    example = {"r": 4}

    def check_target(self, cfg: Any, key: str, module: nn.Module) -> None:
        shape = self.target_shape(module)
        if cfg.r > min(shape):
            raise ValueError(f"Target module {key}: r={cfg.r} must be at most min(in, out) = {min(shape)}.")

    def holders(self, name: str) -> dict[str, PsoftLayer]:
        return {k: m for k, m in super().holders(name).items() if not m._psoft_A_cache[name].is_meta}

    def export_state(self, name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        from ..io.files import Tensors

        return Tensors(state, {LANDMARKS: json.dumps({k: m.landmarks(name) for k, m in self.holders(name).items()})})

    def import_state(self, name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        stored = json.loads(getattr(state, "metadata", {}).get(LANDMARKS, "{}"))
        for path, layer in self.holders(name).items():
            if path in stored and len(stored[path]) == layer.r[name]:
                layer.turn(name, stored[path])
        return state
