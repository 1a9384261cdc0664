# SPDX-License-Identifier: Apache-2.0
"""C3A: Parameter-Efficient Fine-Tuning via Circular Convolution (arXiv 2407.19342).

ΔW is block-circulant: block (m, n) has the entries w[m, n, (j - i) mod b] / in. Applied by FFT.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..config import PeftConfig, biases, layer_names, layer_range, option, saves, targets
from ..core import kinds
from ..core.layer import AdapterLayer
from ..core.match import dotted_value
from ..core.slots import Aux, Trainable
from ..core.tuner import TunerModel
from ..ops import circulant
from ..registry import register_method

# The published library's gradient with respect to the input of a C3A layer is not the derivative: it uses w[(i + j)
# mod b] (found by comparing it with finite differences). It reaches the layers below. True keeps published training
# runs reproducible; set it to False for exact gradients.
PUBLISHED_INPUT_GRADIENT = True


@dataclass
class C3AConfig(PeftConfig):
    """Options of C3A."""

    block_size: int = option(256, "Size b of the circulant blocks; must divide the widths of the layers.")
    target_modules: list[str] | set[str] | str | None = targets()
    bias: str = biases("c3a_only")
    modules_to_save: list[str] | None = saves()
    layers_to_transform: list[int] | int | None = layer_range()
    layers_pattern: list[str] | str | None = layer_names()
    block_size_pattern: dict | None = option(factory=dict, help="Block sizes that differ: {name or regex: size}.")
    init_weights: bool | Literal["gaussian", "kaiming_uniform", "xavier_uniform"] = option(
        "xavier_uniform", "Initialisation; True starts at zero."
    )
    _pattern_alone = True
    _choices = ("init_weights",)


class C3ALayer(AdapterLayer):
    """Adds a block-circulant product."""

    c3a_kernel: Trainable[nn.ParameterDict]  # [out/b, in/b, b]
    block_size: Aux[dict]
    kinds = (kinds.Linear, kinds.Conv1D)

    def create(self, name: str, cfg: Any) -> None:
        b = self.block_size[name] = cfg.block_size
        kernel = torch.zeros(self.out_features // b, self.in_features // b, b)
        xavier, kaiming = math.sqrt(6 / (self.in_features + self.out_features)), 1 / math.sqrt(self.in_features)
        bounds = {"xavier_uniform": xavier, False: xavier, "kaiming_uniform": kaiming}
        if cfg.init_weights == "gaussian":
            nn.init.normal_(kernel)
        elif bound := bounds.get(cfg.init_weights):
            nn.init.uniform_(kernel, -bound, bound)
        self.c3a_kernel[name] = nn.Parameter(kernel)

    def delta(self, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return circulant.multiply(x, self.c3a_kernel[name], 1 / self.in_features, PUBLISHED_INPUT_GRADIENT)

    def delta_weight(self, name: str) -> torch.Tensor:
        return circulant.matrix(self.c3a_kernel[name]) / self.in_features


@register_method("c3a", config=C3AConfig)
class C3AModel(TunerModel):
    layer_cls = C3ALayer
    unsupported_error = TypeError
    example = {"block_size": 8, "init_weights": True}
    inexact_gradients = {"c3a.PUBLISHED_INPUT_GRADIENT": False}
    patterned = {"block_size": "block_size_pattern"}

    def layer_config(self, cfg: Any, key: str, module: nn.Module) -> Any:
        return cfg.with_values(block_size=dotted_value(cfg.block_size_pattern, key, cfg.block_size))

    def check_target(self, cfg: Any, key: str, module: nn.Module) -> None:
        b, shape = self.layer_config(cfg, key, module).block_size, self.target_shape(module)
        if b <= 0 or shape[0] % b or shape[1] % b:
            raise ValueError(
                f"Target module {key}: the block size should be positive and divide the widths {shape[:2]}, got {b}."
            )
