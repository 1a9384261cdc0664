# SPDX-License-Identifier: Apache-2.0
"""LoRA on a whole model: patterns, checks before injection, replicated and tied layers, weighted combination."""

from typing import Any

from torch import nn

from ...core import kinds
from ...core.layer import AdapterLayer
from ...core.match import pattern_value
from ...core.tuner import TunerModel
from ...registry import register_method
from ...storage.base import resolve
from . import init
from .config import LoraConfig
from .layer import LoraLayer
from .variants import variant_class

# Model types whose fused kernels read these modules' weights directly.
_MAMBA_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
_MAMBA_LEAVES = ("out_proj", "conv1d")


@register_method("lora", config=LoraConfig, mixed=True)
class LoraModel(TunerModel):
    layer_cls = LoraLayer
    supports_parameters = True

    def layer_config(self, cfg: Any, key: str, module: nn.Module) -> Any:
        if not (cfg.rank_pattern or cfg.alpha_pattern):
            return cfg
        return cfg.with_values(
            r=pattern_value(cfg.rank_pattern, key, cfg.r),
            lora_alpha=pattern_value(cfg.alpha_pattern, key, cfg.lora_alpha),
        )

    def check_config(self, name: str, cfg: Any) -> None:
        super().check_config(name, cfg)
        variant_class(cfg, gptq=False)
        init.scheme(cfg.init_lora_weights)

    def check_target(self, cfg: Any, key: str, module: nn.Module) -> None:
        base = module.get_base_layer() if isinstance(module, AdapterLayer) else module
        leaf = key.rsplit(".", 1)[-1]
        kind = kinds.pick(base, self.layer_cls.kinds)
        if kind is None or (leaf in base._parameters and leaf != "weight" and cfg.target_parameters):
            kind = kinds.parameter_kind(leaf)
        init.check(self.layer_config(cfg, key, module), key, kind, base)
        variant = variant_class(cfg, resolve(base).label == "gptq")
        if variant is not None:
            variant.check(cfg, key, kind, resolve(base))
