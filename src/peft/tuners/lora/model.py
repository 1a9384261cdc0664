# SPDX-License-Identifier: Apache-2.0
"""LoRA on a whole model."""

from typing import Any

from torch import nn

from ...core.match import pattern_value
from ...core.tuner import TunerModel
from ...registry import register_method
from .config import LoraConfig
from .layer import LoraLayer


@register_method("lora", config=LoraConfig, mixed=True)
class LoraModel(TunerModel):
    layer_cls = LoraLayer
    supports_parameters = True

    def layer_config(self, cfg: Any, key: str, module: nn.Module) -> Any:
        if not (cfg.rank_pattern or cfg.alpha_pattern):
            return cfg
        return cfg.with_values(
            r=pattern_value(cfg.rank_pattern, key, cfg.r), lora_alpha=pattern_value(cfg.alpha_pattern, key, cfg.lora_alpha)
        )
