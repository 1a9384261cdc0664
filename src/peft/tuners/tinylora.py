# SPDX-License-Identifier: Apache-2.0
"""TinyLoRA: Learning to Reason in 13 Parameters (arXiv 2602.04118), on LoRA-XS (arXiv 2405.17604).

ΔW = B R A with W ≈ B A the top singular subspace and R = Σ_i v_i P_i a random projection of a tiny trained vector v.
"""

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from ..config import PeftConfig, biases, fan_in_fan_out, layer_names, layer_range, option, saves, targets
from ..core import kinds
from ..core.layer import AdapterLayer, dropout, dropout_p
from ..core.modules import making_on_meta
from ..core.slots import Aux, BufferDict, PersistentBufferDict, Saved, SharedTrainable
from ..core.tuner import TunerModel
from ..ops.low_rank import Factors
from ..registry import register_method


@dataclass
class TinyLoraConfig(PeftConfig):
    """Options of TinyLoRA."""

    r: int = option(2, "Rank of the subspace.")
    u: int = option(64, "Length of the trained vector.")
    weight_tying: float = option(0.0, "0: one vector a module; 1: one vector for all; between: groups of neighbours.")
    projection_seed: int = option(42, "Seed of the projections.")
    save_projection: bool = option(True, "Store the projections.")
    init_v_bound: float = option(0.02, "Bound of the uniform initialisation.")
    target_modules: list[str] | set[str] | str | None = targets()
    tinylora_dropout: float = option(0.0, "Dropout on the input.")
    fan_in_fan_out: bool = fan_in_fan_out()
    bias: str = biases("tinylora_only")
    modules_to_save: list[str] | None = saves()
    init_weights: bool | Literal["uniform"] = option(True, "True starts at zero; 'uniform' draws U(-bound, bound).")
    layers_to_transform: list[int] | int | None = layer_range()
    layers_pattern: list[str] | str | None = layer_names()
    _regex_with_layers = "warn"
    _positive = ("r", "u")
    _choices = ("init_weights",)
    _shares = ("weight_tying",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.save_projection:
            warnings.warn(
                "With save_projection=False the projections are drawn again from projection_seed, which "
                "needs the same targets in the same order.",
                stacklevel=4,
            )


class TinyLoraLayer(AdapterLayer):
    """A tiny vector inside the principal subspace."""

    tinylora_v: SharedTrainable[nn.ModuleDict]  # adapter -> ParameterDict group -> [u]
    tinylora_A: Saved[PersistentBufferDict]  # [r, in]; embeddings [r, dim]
    tinylora_B: Saved[PersistentBufferDict]  # [out, r]; embeddings [num, r]
    tinylora_P: Saved[BufferDict]  # [u, r, r]
    tinylora_dropout: Aux[nn.ModuleDict]
    r: Aux[dict]
    group: Aux[dict]
    kinds = (kinds.Linear, kinds.Conv1D, kinds.Embedding)
    weight_need = "read"

    def create(self, name: str, cfg: Any) -> None:
        r = self.r[name] = min(cfg.r, self.in_features, self.out_features)
        self.group[name], self.tinylora_dropout[name] = str(cfg.group), dropout(cfg.tinylora_dropout)
        with torch.no_grad():
            W = self.base_weight()
            W = W.T if self.kind is kinds.Embedding else W  # embeddings are decomposed as [num, dim]
            if W.device.type == "meta" or making_on_meta():  # the file has them
                A, B = W.new_zeros(r, W.shape[1], device="cpu"), W.new_zeros(W.shape[0], r, device="cpu")
            else:
                U, S, V = torch.linalg.svd(W.float(), full_matrices=False)
                A, B = S[:r].sqrt()[:, None] * V[:r], U[:, :r] * S[:r].sqrt()
        self.tinylora_A[name], self.tinylora_B[name] = A, B
        generator = torch.Generator(device="cpu").manual_seed(cfg.projection_seed + cfg.layer_index)
        self.tinylora_P.persistent = cfg.save_projection
        self.tinylora_P[name] = torch.randn(cfg.u, r, r, generator=generator, device="cpu") / r**0.5

    def factors(self, name: str) -> Factors:
        v, P = self.tinylora_v[name][self.group[name]], self.tinylora_P[name]  # type: ignore[index]
        R = torch.tensordot(v.to(P.device), P.to(v.dtype), dims=1)  # [r, r]
        A, B = self.tinylora_A[name].to(R.dtype), self.tinylora_B[name].to(R.dtype)
        return Factors(R @ A, B, 1.0, dropout_p(self.tinylora_dropout[name]))

    def delta_weight(self, name: str) -> torch.Tensor:
        A, B, _, _ = self.factors(name)
        return (B @ A).T if self.kind is kinds.Embedding else B @ A

    def delta(self, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self.kind is not kinds.Embedding:
            return super().delta(name, x, y)
        A, B, _, _ = self.factors(name)
        out = self.tinylora_dropout[name](F.embedding(x, B)) @ A
        scale = self.kind.scale(self.get_base_layer())
        return out if scale is None else out * scale


@register_method("tinylora", config=TinyLoraConfig)
class TinyLoraModel(TunerModel):
    layer_cls = TinyLoraLayer
    uses_shared_state = True
    unsupported_error = TypeError
    example = {"r": 2, "u": 8}

    def shared(self, name: str, cfg: Any, targets: dict[str, nn.Module]) -> None:
        """Number the targets, put neighbours into groups, make one vector a group."""
        count = len(targets)
        groups = max(1, round(count * (1 - cfg.weight_tying)))
        size = max(1, count // groups)
        self._places = {key: (i, min(i // size, groups - 1)) for i, key in enumerate(targets)}
        tensors = (t for m in targets.values() for t in m.parameters())
        dtype = next((t.dtype for t in tensors if t.dtype.is_floating_point), torch.float32)
        vectors = {}
        for group in sorted({g for _, g in self._places.values()}):
            v = torch.zeros(cfg.u, dtype=dtype)  # type: ignore
            if cfg.init_weights == "uniform":
                v.uniform_(-cfg.init_v_bound, cfg.init_v_bound)
            elif cfg.init_weights is False:
                v = torch.randn(cfg.u, dtype=dtype)  # type: ignore
            vectors[str(group)] = nn.Parameter(v)
        self.tinylora_v[name] = nn.ParameterDict(vectors)

    def layer_config(self, cfg: Any, key: str, module: nn.Module) -> Any:
        index, group = self._places[key]
        return cfg.with_values(layer_index=index, group=group)

    def check_config(self, name: str, cfg: Any) -> None:
        super().check_config(name, cfg)
        if {c.save_projection for c in self.peft_config.values()} != {cfg.save_projection}:
            raise TypeError("`save_projection` must be the same for all TinyLoRA adapters of a model.")
