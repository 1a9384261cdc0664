# SPDX-License-Identifier: Apache-2.0
"""VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks (arXiv 2405.15179).

ΔW = B A, whose sub-vectors are mixtures of the top-k vectors of one trained bank shared by all layers.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import PeftConfig, biases, excludes, fan_in_fan_out, layer_names, layer_range, option, saves, targets
from ..core import kinds
from ..core.layer import AdapterLayer, dropout, dropout_p
from ..core.slots import Aux, SharedTrainable, Trainable
from ..core.tuner import TunerModel
from ..ops.low_rank import Factors
from ..registry import register_method


@dataclass
class VBLoRAConfig(PeftConfig):
    """Options of VB-LoRA."""

    r: int = option(4, "Rank.")
    num_vectors: int = option(256, "Number of vectors in the bank.")
    vector_length: int = option(256, "Length of the vectors; must divide the widths of the layers.")
    topk: int = option(2, "Vectors mixed for each sub-vector.")
    target_modules: list[str] | set[str] | str | None = targets()
    exclude_modules: list[str] | set[str] | str | None = excludes()
    save_only_topk_weights: bool = option(
        False, "Store only the chosen weights: a small file that cannot be trained further."
    )
    vblora_dropout: float = option(0.0, "Dropout on the input.")
    fan_in_fan_out: bool = fan_in_fan_out()
    bias: str = biases("vblora_only")
    modules_to_save: list[str] | None = saves()
    init_vector_bank_bound: float = option(0.02, "The bank starts as U(-bound, bound).")
    init_logits_std: float = option(0.1, "The logits start as N(0, std).")
    layers_to_transform: list[int] | int | None = layer_range()
    layers_pattern: list[str] | str | None = layer_names()
    _regex_with_layers = "warn"
    _positive = ("r", "num_vectors", "vector_length", "topk")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.topk > self.num_vectors:
            raise ValueError(f"`topk` ({self.topk}) cannot be larger than `num_vectors` ({self.num_vectors}).")


class VBLoRALayer(AdapterLayer):
    """Low-rank factors composed from a vector bank."""

    vblora_logits_A: Trainable[nn.ParameterDict]  # [r, in / length, vectors]
    vblora_logits_B: Trainable[nn.ParameterDict]  # [out / length, r, vectors]
    vblora_vector_bank: SharedTrainable[nn.ParameterDict]  # [vectors, length]
    vblora_dropout: Aux[nn.ModuleDict]
    r: Aux[dict]
    topk: Aux[dict]
    topk_only: Aux[dict]  # loaded from a compact file
    kinds = (kinds.Linear, kinds.Conv1D)

    def create(self, name: str, cfg: Any) -> None:
        r, h, v = cfg.r, cfg.num_vectors, cfg.vector_length
        self.r[name], self.topk[name], self.topk_only[name] = r, cfg.topk, False
        self.vblora_dropout[name] = dropout(cfg.vblora_dropout)
        # every layer draws the bank again and the last draw stays: the published order of random numbers
        bank = torch.empty(h, v).uniform_(-cfg.init_vector_bank_bound, cfg.init_vector_bank_bound)
        self.vblora_vector_bank[name] = nn.Parameter(bank)
        A, B = torch.empty(r, self.in_features // v, h), torch.empty(self.out_features // v, r, h)
        for slot, logits in ((self.vblora_logits_A, A), (self.vblora_logits_B, B)):
            slot[name] = nn.Parameter(logits.normal_(0, cfg.init_logits_std))

    def factors(self, name: str) -> Factors:
        """Every piece of A [r, in] and B [out, r] is a mixture of its top-k vectors; both are composed at once."""
        if self.topk_only[name] and self.training:
            raise RuntimeError(
                "Found infinity values in VB-LoRA logits. Ensure training was not resumed from a "
                "`save_only_topk_weights` model."
            )
        logits, k = (self.vblora_logits_A[name], self.vblora_logits_B[name]), self.topk[name]
        bank = self.vblora_vector_bank[name].to(logits[0].device)
        (top_a, index_a), (top_b, index_b) = (t.flatten(0, 1).topk(k) for t in logits)
        weights, index = torch.cat((top_a, top_b)).softmax(-1), torch.cat((index_a, index_b))
        mixed = (bank[index] * weights[..., None]).sum(-2)  # [pieces, length]
        A, B = mixed.split((len(top_a), len(top_b)))
        A, B = A.view(self.r[name], -1), B.view(-1, self.r[name], bank.shape[1]).transpose(1, 2).flatten(0, 1)
        return Factors(A, B, 1.0, dropout_p(self.vblora_dropout[name]))


def _index_dtype(count: int) -> torch.dtype:
    bounds = ((2**8, torch.uint8), (2**15, torch.int16), (2**31, torch.int32))
    return next((dtype for bound, dtype in bounds if count < bound), torch.int64)


@register_method("vblora", config=VBLoRAConfig)
class VBLoRAModel(TunerModel):
    layer_cls = VBLoRALayer
    uses_shared_state = True
    unsupported_error = TypeError
    identity_at_init = False
    example = {"r": 2, "num_vectors": 8, "vector_length": 4}

    def check_target(self, cfg: Any, key: str, module: nn.Module) -> None:
        if any(n % cfg.vector_length for n in self.target_shape(module)[:2]):
            raise ValueError(
                f"Target module {key}: the widths {self.target_shape(module)[:2]} must be divisible by "
                f"vector_length={cfg.vector_length}."
            )

    def export_state(self, name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """With save_only_topk_weights: indices, and all weights but the last, which is what is missing to 1."""
        cfg = self.peft_config[name]
        if not cfg.save_only_topk_weights:
            return state
        out = {}
        for key, value in state.items():
            if key.endswith(("vblora_logits_A", "vblora_logits_B")):
                top, index = value.topk(cfg.topk, dim=-1)
                out[key + "_topk_indices"] = index.to(_index_dtype(cfg.num_vectors))
                out[key + "_topk_weights"] = top.softmax(-1)[..., :-1].contiguous()
            else:
                out[key] = value
        return out

    def import_state(self, name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        cfg, out = self.peft_config[name], {}
        for key, value in state.items():
            if key.endswith("_topk_weights"):
                continue
            if not key.endswith("_topk_indices"):
                out[key] = value
                continue
            base = key.removesuffix("_topk_indices")
            weights = state[base + "_topk_weights"]
            last = (1 - weights.sum(-1, keepdim=True)).clamp(min=0)  # rounding may take it below
            weights = torch.cat([weights, last], dim=-1)
            full = weights.new_full((*weights.shape[:-1], cfg.num_vectors), float("-inf"))
            out[base] = full.scatter(-1, value.long(), weights.log())
        for layer in self.holders(name).values():
            layer.topk_only[name] = len(out) != len(state)
        return out

    def get_nb_savable_parameters(self, adapter: str = "default") -> tuple[int, int]:
        """(VB-LoRA parameters, others) that a file holds, counted in float32 numbers."""
        cfg = self.peft_config[adapter]
        bank = sum(p.numel() for n, p in self.named_parameters() if "vblora_vector_bank" in n)
        logits = sum(p.numel() for n, p in self.named_parameters() if "vblora_logits" in n)
        other = sum(p.numel() for n, p in self.named_parameters() if p.requires_grad and "vblora_" not in n)
        if not cfg.save_only_topk_weights:
            return bank + logits, other
        factor = torch.empty(0, dtype=_index_dtype(cfg.num_vectors)).element_size() / 4
        chosen = logits / cfg.num_vectors
        return int(bank + chosen * (cfg.topk - 1) + chosen * cfg.topk * factor), other

    def print_savable_parameters(self) -> None:
        vblora, other = self.get_nb_savable_parameters()
        total = f"total params to-be-saved: {vblora + other:,d}"
        print(f"VB-LoRA params to-be-saved (float32-equivalent): {vblora:,d} || {total}")
