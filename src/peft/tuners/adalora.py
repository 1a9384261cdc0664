# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning (arXiv 2303.10512).

ΔW = c · B diag(E) A,  c = alpha / rank. While training, triplets (A_k, E_k, B_k) of little importance are switched
off (E_k = 0) until the average rank is `target_r`; an orthogonality loss keeps A and B near orthonormal.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import option
from ..core import kinds
from ..core.layer import AdapterLayer, dropout, dropout_p
from ..core.scaling import Rescaling
from ..core.slots import Aux, Trainable
from ..core.tuner import TunerModel
from ..ops.low_rank import Factors
from ..registry import register_method
from .lora.config import LoraConfig


@dataclass
class AdaLoraConfig(LoraConfig):
    """Options of AdaLoRA. Call `model.base_model.update_and_allocate(step)` after each backward pass."""

    rank_pattern: dict | None = option(None, "Surviving triplets by layer, written by training.")
    target_r: int = option(8, "Average rank at the end.")
    init_r: int = option(12, "Rank of every layer at the start.")
    tinit: int = option(0, "Steps before pruning starts.")
    tfinal: int = option(0, "Steps after pruning has ended.")
    deltaT: int = option(1, "Steps between two allocations.")
    beta1: float = option(0.85, "Decay of the averaged importance.")
    beta2: float = option(0.85, "Decay of the averaged uncertainty.")
    orth_reg_weight: float = option(0.5, "Weight of the orthogonality loss.")
    total_step: int | None = option(None, "Number of training steps; required.")
    _positive = ("deltaT",)
    _not_negative = ("target_r", "init_r", "orth_reg_weight")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("use_dora", "loftq_config", "layer_replication"):
            if getattr(self, name):
                raise ValueError(f"ADALORA does not support `{name}`, got {getattr(self, name)!r}.")
        if self.total_step is None or self.total_step <= 0:
            raise ValueError("AdaLoRA does not work when `total_step` is None or not positive, supply a value > 0.")
        if self.tinit >= self.total_step - self.tfinal:
            raise ValueError(
                f"The schedule leaves no step for pruning: tinit={self.tinit}, tfinal={self.tfinal}, "
                f"total_step={self.total_step}. Use tinit < total_step - tfinal."
            )
        if not (0 < self.beta1 < 1 and 0 < self.beta2 < 1):
            raise ValueError(f"`beta1` and `beta2` must be in (0, 1), got {self.beta1} and {self.beta2}.")
        if self.r != 8:
            warnings.warn(
                "Note that `r` is not used in AdaLora and will be ignored. If you intended to set the "
                "initial rank, use `init_r` instead.",
                stacklevel=4,
            )


class AdaLoraLayer(Rescaling, AdapterLayer):
    """A low-rank delta in the form of a singular value decomposition."""

    lora_A: Trainable[nn.ParameterDict]  # [r, in]; convolutions [r, in·kernel]
    lora_B: Trainable[nn.ParameterDict]  # [out, r]
    lora_E: Trainable[nn.ParameterDict]  # [r, 1]
    ranknum: Aux[nn.ParameterDict]  # [1], the initial rank
    r: Aux[dict]
    lora_alpha: Aux[dict]
    scaling: Aux[dict]
    lora_dropout: Aux[nn.ModuleDict]
    kinds = (kinds.Linear, kinds.Conv1D, kinds.Conv2d, kinds.Conv1d, kinds.Conv3d)
    input_dropout = "lora_dropout"
    standalone_delta = False

    def create(self, name: str, cfg: Any) -> None:
        r = self.r[name] = getattr(cfg, "kept_r", cfg.init_r)
        self.lora_alpha[name], self.lora_dropout[name] = cfg.lora_alpha, dropout(cfg.lora_dropout)
        self.ranknum[name] = nn.Parameter(torch.full((1,), float(cfg.init_r), device="cpu"), requires_grad=False)
        self.scaling[name] = self._initial_scaling(name)
        width = torch.Size(self.kind.shape(self.get_base_layer())[1:]).numel()
        A, E, B = torch.randn(r, width), torch.randn(r, 1), torch.randn(self.out_features, r)
        torch.randn(1)  # drawn and discarded: the published library consumes it
        if cfg.init_lora_weights:
            A, E, B = nn.init.normal_(A, std=0.02), torch.zeros_like(E), nn.init.normal_(B, std=0.02)
        self.lora_A[name], self.lora_E[name], self.lora_B[name] = nn.Parameter(A), nn.Parameter(E), nn.Parameter(B)

    def _initial_scaling(self, name: str) -> float:
        """Divided by the initial rank at every use."""
        return self.lora_alpha[name] if self.lora_alpha[name] > 0 else float(self.ranknum[name])

    def factors(self, name: str) -> Factors:
        """diag(E) and the scale act on the r-wide intermediate."""
        scale = self.lora_E[name][:, 0] * (self.scaling[name] / (self.ranknum[name] + 1e-5))
        return Factors(self.lora_A[name], self.lora_B[name], scale, dropout_p(self.lora_dropout[name]))

    def delta_weight(self, name: str) -> torch.Tensor:
        return super().delta_weight(name).view(self.kind.shape(self.get_base_layer()))


def orthogonality(layers: list["AdaLoraLayer"], name: str) -> torch.Tensor:
    """Mean over layers of ‖A Aᵀ - I‖ and ‖Bᵀ B - I‖; factors of one shape are taken together."""
    groups: dict[Any, list[torch.Tensor]] = {}
    for layer in layers:
        for M in (layer.lora_A[name], layer.lora_B[name].T):
            groups.setdefault((M.shape, M.device, M.dtype), []).append(M)
    norms = []
    for members in groups.values():
        M = torch.stack(members)
        gram = torch.baddbmm(torch.eye(M.shape[1], dtype=M.dtype, device=M.device)[None], M, M.transpose(1, 2), beta=-1)
        norms.append(torch.linalg.vector_norm(gram, dim=(1, 2)).to(layers[0].lora_A[name].device))
    return torch.cat(norms).mean()


class RankAllocator:
    """Scores the triplets of one adapter and switches off what exceeds the budget of the schedule."""

    def __init__(self, layers: dict[str, Any], name: str, cfg: Any):
        self.layers, self.name, self.cfg = layers, name, cfg
        self.init_budget = sum(layer.lora_A[name].shape[0] for layer in layers.values())
        self.target_budget = cfg.target_r * len(layers)
        self.averages: dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]] = {}  # by layer and slot

    def budget(self, step: int) -> int:
        """How many triplets may live: a cubic decay between tinit and total_step - tfinal."""
        start, last = self.cfg.tinit, self.cfg.total_step - self.cfg.tfinal
        rest = 1 - min(max((step - start) / (last - start), 0), 1)
        return int((self.init_budget - self.target_budget) * rest**3 + self.target_budget)

    def observe(self) -> None:
        """Update the averages of |p·grad| and of its deviation; parameters without gradient are skipped."""
        b1, b2 = self.cfg.beta1, self.cfg.beta2
        for key, layer in self.layers.items():
            for slot in ("lora_A", "lora_E", "lora_B"):
                p = getattr(layer, slot)[self.name]
                if p.grad is not None:
                    now = (p * p.grad).abs().detach()
                    mean, spread = self.averages.get((key, slot), (torch.zeros_like(now),) * 2)
                    mean = b1 * mean + (1 - b1) * now
                    self.averages[key, slot] = mean, b2 * spread + (1 - b2) * (now - mean).abs()

    @torch.no_grad()
    def mask(self, budget: int) -> dict[str, list[bool]]:
        """Set E_k = 0 for the least important triplets; returns which survive."""
        scores, pattern = {}, {}
        for key in self.layers:
            parts = [self.averages[key, s] for s in ("lora_E", "lora_A", "lora_B") if (key, s) in self.averages]
            if len(parts) == 3:
                e, a, b = (mean * spread for mean, spread in parts)
                scores[key] = e[:, 0] + a.mean(1) + b.mean(0)  # [r]
        surplus = self.init_budget - budget
        threshold = torch.cat(list(scores.values())).kthvalue(surplus)[0] if scores and surplus > 0 else -torch.inf
        for key, s in scores.items():
            dead = s <= threshold
            self.layers[key].lora_E[self.name].masked_fill_(dead[:, None], 0.0)
            pattern[f"{key}.lora_E.{self.name}"] = (~dead).tolist()
        return pattern

    @torch.no_grad()
    def apply(self, pattern: dict[str, list[bool]]) -> None:
        for key, layer in self.layers.items():
            alive = pattern.get(f"{key}.lora_E.{self.name}", pattern.get(f"{key}.lora_E"))
            E = layer.lora_E[self.name]
            if alive is not None and len(alive) == len(E):  # loaded layers hold what survived alone
                E.masked_fill_(~torch.tensor(alive, device=E.device)[:, None], 0.0)


@register_method("adalora", config=AdaLoraConfig, prefix="lora_", mixed=True)
class AdaLoraModel(TunerModel):
    layer_cls = AdaLoraLayer
    second_example = {"inference_mode": True}  # only one adapter may be trained
    example = {"init_r": 4, "target_r": 2, "total_step": 10}

    def check_config(self, name: str, cfg: Any) -> None:
        super().check_config(name, cfg)
        training = self._training()
        if len(training) > 1:
            raise ValueError(
                "AdaLoraModel supports only 1 trainable adapter. When using multiple adapters, set inference_mode "
                f"to True for all adapters except the one you want to train (now trainable: {training})."
            )

    def layer_config(self, cfg: Any, key: str, module: nn.Module) -> Any:
        """A stored pattern says how many triplets of the layer survived."""
        for name, alive in (cfg.rank_pattern or {}).items():
            if name == f"{key}.lora_E" or name.startswith(f"{key}.lora_E."):
                return cfg.with_values(kept_r=sum(alive))
        return cfg

    def _training(self) -> list[str]:
        return [n for n, c in self.peft_config.items() if isinstance(c, AdaLoraConfig) and not c.inference_mode]

    @property
    def trainable_adapter_name(self) -> str | None:
        return next(iter(self._training()), None)

    @property
    def rankallocator(self) -> RankAllocator:
        name = self.trainable_adapter_name
        if name is None:
            raise AttributeError  # nn.Module goes on to look for the name in the base model: a text would be lost
        made = self.__dict__.get("_allocator")
        if made is None or made.name != name:
            made = self.__dict__["_allocator"] = RankAllocator(self.holders(name), name, self.peft_config[name])
        return made

    def update_and_allocate(self, global_step: int) -> None:
        """Rank schedule; call it after backward, before the gradients are cleared."""
        if self.trainable_adapter_name is None:
            raise AttributeError(
                f"None of the AdaLoRA adapters {sorted(self.peft_config)} is trainable, so there are no ranks to "
                "allocate: load with is_trainable=True, or set inference_mode=False."
            )
        allocator = self.rankallocator
        cfg = allocator.cfg
        last = cfg.total_step - cfg.tfinal
        if global_step > last:
            allocator.apply(cfg.rank_pattern or {})
            return
        if global_step < last:
            allocator.observe()
        if global_step == last or (global_step > cfg.tinit and global_step % cfg.deltaT == 0):
            cfg.rank_pattern = allocator.mask(allocator.budget(global_step))
        if global_step == last:
            allocator.averages.clear()

    def after_forward(self, out: Any) -> Any:
        """Add the orthogonality loss to the model's own."""
        name, loss = self.trainable_adapter_name, getattr(out, "loss", None)
        if name is None or not isinstance(loss, torch.Tensor):
            return out
        weight = self.peft_config[name].orth_reg_weight
        layers = [m for m in self.layers() if isinstance(m, AdaLoraLayer) and name in m]
        if weight > 0 and layers:
            out.loss = loss + weight * orthogonality(layers, name).to(loss.device)
        return out

    def export_state(self, name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Leave the triplets out that did not survive; the pattern is stored without the adapter's name."""
        cfg = self.peft_config[name]
        if not cfg.rank_pattern:
            return state
        cfg.rank_pattern = {k.removesuffix(f".{name}"): v for k, v in cfg.rank_pattern.items()}
        out = dict(state)
        for key, alive in cfg.rank_pattern.items():
            stem = key.removesuffix("lora_E")
            for full in (k for k in state if k.endswith((stem + "lora_A", stem + "lora_E", stem + "lora_B"))):
                dim = 1 if full.endswith("lora_B") else 0
                if state[full].shape[dim] == len(alive):
                    kept = torch.tensor(alive, device=state[full].device)
                    out[full] = state[full][:, kept] if dim else state[full][kept]
        return out

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(f"{type(self).__name__} does not support add_weighted_adapter.")

    def on_delete(self, name: str) -> None:
        self.__dict__.pop("_allocator", None)
