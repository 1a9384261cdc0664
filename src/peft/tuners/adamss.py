# SPDX-License-Identifier: Apache-2.0
"""AdaMSS: Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning (2025, OpenReview 8ZdWmpYxT0).

[ΔW | Δb][rows of cluster i] = B_i A_i V: the output rows are clustered by their left singular vectors, each cluster
has a small trained map into the shared right singular space V of [W | b].
"""

import base64
import json
import sys
import warnings
import zlib
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from ..config import PeftConfig, layer_names, layer_range, option, positive, saves, targets
from ..core import kinds
from ..core.layer import AdapterLayer
from ..core.modules import making_on_meta
from ..core.slots import Aux, PersistentBufferDict, Saved, Trainable
from ..core.tuner import TunerModel
from ..import_utils import require
from ..registry import register_method


@dataclass
class AdamssConfig(PeftConfig):
    """Options of AdaMSS."""

    r: int = option(100, "Rank of the decomposition.")
    num_subspaces: int = option(5, "Number of clusters a layer.")
    subspace_rank: int = option(1, "Rank of each cluster.")
    target_modules: list[str] | set[str] | str | None = targets()
    init_weights: Literal["orthogonal"] | None = option("orthogonal", "'orthogonal' starts at zero; None draws B.")
    modules_to_save: list[str] | None = saves()
    layers_to_transform: list[int] | int | None = layer_range()
    layers_pattern: list[str] | str | None = layer_names()
    use_asa: bool = option(False, "Adaptive subspace allocation: freeze unimportant clusters while training.")
    asa_target_subspaces: int = option(50, "Clusters that stay trainable, over all layers.")
    init_warmup: int = option(50, "Step at which allocation starts.")
    final_warmup: int = option(1000, "Step at which it ends.")
    mask_interval: int = option(100, "Steps between allocations.")
    asa_importance_beta: float = option(0.85, "Decay of the averaged importance.")
    asa_uncertainty_beta: float = option(0.85, "Decay of the averaged uncertainty.")
    asa_schedule_exponent: float = option(3.0, "Exponent of the schedule.")
    use_dynamic_rank: bool = option(False, "Choose the rank of each cluster by its singular values.")
    svd_threshold: float = option(0.1, "Singular values below this share of the largest are dropped.")
    random_seed: int = option(0, "Seed of the randomised decomposition.")
    _pattern_alone = True
    _regex_with_layers = "warn"
    _positive = ("r", "num_subspaces")
    _choices = ("init_weights",)

    def __post_init__(self) -> None:
        self.init_weights = self.init_weights or None  # published: False means None
        super().__post_init__()
        if not self.use_asa:
            return
        for field in ("mask_interval", "asa_target_subspaces", "asa_schedule_exponent"):
            positive(field, getattr(self, field))
        if self.init_warmup >= self.final_warmup:
            raise ValueError(
                f"`init_warmup` ({self.init_warmup}) must be smaller than `final_warmup` ({self.final_warmup})."
            )


def cluster(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Labels [n] of a seeded k-means on the rows; part of the file format."""
    require("AdaMSS", "sklearn")
    from sklearn.cluster import KMeans

    means = KMeans(n_clusters=count, init="random", n_init=1, max_iter=10, random_state=123456789)  # type: ignore
    return torch.from_numpy(means.fit_predict(rows.float().cpu().numpy())).long()


class AdamssLayer(AdapterLayer):
    """One small map for each cluster of output rows."""

    adamss_A: Trainable[nn.ModuleDict]  # clusters of [rank_i, R]
    adamss_B: Trainable[nn.ModuleDict]  # clusters of [rows_i, rank_i]
    adamss_newB: Saved[PersistentBufferDict]  # V [R, in] ([R, in + 1] with a bias)
    num_subspaces: Aux[dict]
    labels: Aux[dict]  # [out] cluster of each row
    pruned: Aux[dict]  # clusters that allocation froze
    _averages: Aux[dict]  # (mean, spread) of |p · grad| by (cluster, 0 for A or 1 for B), since the last allocation
    kinds = (kinds.Linear, kinds.Conv1D)
    weight_need = "read"
    standalone_delta = False

    def create(self, name: str, cfg: Any) -> None:
        with torch.no_grad():
            augmented, bias = self.base_weight().float(), self.base_bias()
            if bias is not None:
                augmented = torch.cat([augmented, bias.float()[:, None]], dim=1)
            if augmented.device.type == "meta":
                raise RuntimeError(
                    "AdaMSS clusters the base weights, so the base model must be loaded before the adapter is made."
                )
            R, K = min(cfg.r, *augmented.shape), min(cfg.num_subspaces, self.out_features)
            with torch.random.fork_rng(devices=[augmented.device] if augmented.is_cuda else []):
                torch.manual_seed(cfg.random_seed)
                U, _, V = torch.svd_lowrank(augmented, q=R, niter=2)
            labels = cluster(U, K)
            self.adamss_newB[name] = V.T.contiguous()
            A, B = [], []
            for i in range(K):  # drawn cluster by cluster, as published
                A.append(self._directions(U[labels == i], cfg))
                size = int((labels == i).sum()), len(A[i])
                B.append(torch.zeros(size) if cfg.init_weights else 0.01 * torch.randn(size))
        self.num_subspaces[name], self.labels[name], self.pruned[name], self._averages[name] = K, labels, set(), {}
        if making_on_meta():
            A = [torch.empty(a.shape) for a in A]
        self.adamss_A[name], self.adamss_B[name] = nn.ParameterList(A), nn.ParameterList(B)

    @staticmethod
    def _directions(U: torch.Tensor, cfg: Any) -> torch.Tensor:
        """[rank, R] orthonormal rows that span (nearly) the top right singular space of the cluster's rows U [m, R]."""
        gram, rank = U @ U.T, max(1, min(U.shape[0], cfg.subspace_rank))
        if cfg.use_dynamic_rank:
            S = torch.svd_lowrank(gram, q=len(gram))[1]
            rank = max(1, min(int((cfg.svd_threshold * S[0] < S).sum()), rank))
        left = torch.svd_lowrank(gram, q=rank)[0]
        return torch.linalg.qr(U.T @ left)[0].T.contiguous()

    def observe(self, name: str, b1: float, b2: float) -> None:
        """Average |p · grad| and its change; parameters without gradient are skipped."""
        kept = self._averages[name]
        for i, pair in enumerate(self.clusters(name)):
            for part, p in enumerate(pair):
                if p.grad is not None:
                    now = (p * p.grad).abs().detach()
                    mean, spread = kept.get((i, part), (torch.zeros_like(now),) * 2)
                    kept[i, part] = b1 * mean + (1 - b1) * now, b2 * spread + (1 - b2) * (now - mean).abs()

    def scores(self, name: str) -> dict[int, float]:
        """Importance of the clusters that were observed."""
        found = {key: float((mean * spread).mean()) for key, (mean, spread) in self._averages[name].items()}
        return {i: found[i, 0] + found[i, 1] for i, part in found if part == 0 and (i, 1) in found}

    def freeze(self, name: str, alive: set[int]) -> None:
        """Leave only the clusters in `alive` trainable."""
        self._averages[name].clear()
        for i, pair in enumerate(self.clusters(name)):
            if i not in alive:
                self.pruned[name].add(i)
                for p in pair:
                    p.requires_grad_(False)
                    p.grad = None

    def _may_train(self, name: str, parameter: nn.Parameter) -> bool:
        dead = (pair for i, pair in enumerate(self.clusters(name)) if i in self.pruned[name])
        return not any(p is parameter for pair in dead for p in pair)

    def clusters(self, name: str) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """A and B of each cluster."""
        return list(zip(self.adamss_A[name], self.adamss_B[name], strict=True))  # type: ignore

    def _maps(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(P [Σ rank, in(+1)], B [out, Σ rank]) with [ΔW | Δb] = B P; row o of B is non-zero for its own cluster."""
        A, B = list(self.adamss_A[name]), list(self.adamss_B[name])  # type: ignore
        P = torch.cat(A) @ self.adamss_newB[name].to(A[0])
        order = torch.argsort(self.labels[name], stable=True).to(P.device)
        stacked = torch.block_diag(*B)  # clusters one after another
        return P, stacked.new_zeros(stacked.shape).index_copy(0, order, stacked)

    def delta(self, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        P, B = self._maps(name)
        offset = P[:, self.in_features] if P.shape[1] > self.in_features else None
        return F.linear(F.linear(x, P[:, : self.in_features], offset), B)

    def delta_weight(self, name: str) -> torch.Tensor:
        P, B = self._maps(name)
        return B @ P[:, : self.in_features]

    def delta_bias(self, name: str) -> torch.Tensor | None:
        P, B = self._maps(name)
        return B @ P[:, self.in_features] if P.shape[1] > self.in_features else None


LABELS = "adamss_labels"  # in the text part of a file: {path of the layer: packed labels}


def pack(labels: torch.Tensor) -> str:
    return base64.b64encode(zlib.compress(labels.to("cpu", torch.int32).numpy().tobytes())).decode()


def unpack(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(text))), dtype=torch.int32).long()


@register_method("adamss", config=AdamssConfig)
class AdamssModel(TunerModel):
    layer_cls = AdamssLayer
    unsupported_error = TypeError
    example = {"r": 8, "num_subspaces": 3}

    def export_state(self, name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Published files leave the rows of the clusters to be found again; they are kept in the file's text part."""
        from ..io.files import Tensors

        labels = {path: pack(layer.labels[name]) for path, layer in self.holders(name).items()}
        return Tensors(state, {LABELS: json.dumps(labels)})

    def import_state(self, name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Give each row the cluster it had; clusters found again in other weights (half precision) are others."""
        from ..io.keys import misfits, resize

        stored = json.loads(getattr(state, "metadata", {}).get(LABELS, "{}"))
        for path, layer in self.holders(name).items():
            if path in stored and (labels := unpack(stored[path])).shape == layer.labels[name].shape:
                layer.labels[name] = labels
            elif layer.base_weight().dtype != torch.float32:
                warnings.warn(
                    f"The file does not say which rows the clusters of {path!r} hold. They were found again in weights "
                    f"of {layer.base_weight().dtype}: if the training was in float32, they are others.",
                    stacklevel=2,
                )
        if stored:
            for entry, value in misfits(self, name, state):
                resize(entry, value.shape)
        return state

    def update_and_allocate(self, global_step: int) -> None:
        """Adaptive subspace allocation; call it after each optimizer step, before the gradients are cleared."""
        for name in self.active_adapters:
            cfg = self.peft_config[name]
            if cfg.use_asa and cfg.init_warmup <= global_step <= cfg.final_warmup:
                for layer in self.holders(name).values():
                    layer.observe(name, cfg.asa_importance_beta, cfg.asa_uncertainty_beta)
                if global_step % cfg.mask_interval == 0:
                    self._prune(name, cfg, global_step)

    def _prune(self, name: str, cfg: Any, step: int) -> None:
        """Freeze the clusters below the threshold; their values stay in the output."""
        layers, goal = list(self.holders(name).values()), cfg.asa_target_subspaces
        total = sum(layer.num_subspaces[name] for layer in layers)
        part = 1 - (step - cfg.init_warmup) / (cfg.final_warmup - cfg.init_warmup)
        target = int(goal + (total - goal) * part**cfg.asa_schedule_exponent)
        scored = [(score, layer, i) for layer in layers for i, score in layer.scores(name).items()]
        if target < len(scored):  # published: the one at the threshold is frozen too
            scored = sorted(scored, key=lambda item: item[0], reverse=True)[: max(target - 1, 0)]
        for layer in layers:
            layer.freeze(name, {i for _, holder, i in scored if holder is layer})


# ---- the callback, at its published address peft.tuners.adamss.asa_callback
asa_callback = sys.modules[f"{__name__}.asa_callback"] = sys.modules[__name__]


def __getattr__(name: str) -> Any:
    """AdamssAsaCallback is made on first use: it needs transformers."""
    if name != "AdamssAsaCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from transformers import TrainerCallback

    class AdamssAsaCallback(TrainerCallback):
        """Calls `update_and_allocate` after each optimizer step of transformers' Trainer."""

        def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            tuner = getattr(model, "base_model", None)
            if isinstance(tuner, AdamssModel):
                tuner.update_and_allocate(state.global_step)

    AdamssAsaCallback.__qualname__ = AdamssAsaCallback.__name__
    globals()[name] = AdamssAsaCallback
    return AdamssAsaCallback
