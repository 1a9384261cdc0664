# SPDX-License-Identifier: Apache-2.0
"""LN tuning: Tuning LayerNorm in Attention, Towards Efficient Multi-Modal LLM Finetuning (arXiv 2312.11420).

The targeted modules (normally the norms) are trained as copies; the copy is called instead of the base module.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..config import PeftConfig, excludes, saves, targets
from ..core import kinds
from ..core.layer import AdapterLayer
from ..core.offload import copy_module
from ..core.slots import Trainable
from ..core.tuner import TunerModel
from ..registry import register_method


@dataclass
class LNTuningConfig(PeftConfig):
    """Options of LN tuning."""

    target_modules: list[str] | str | None = targets()
    exclude_modules: list[str] | str | None = excludes()
    modules_to_save: list[str] | None = saves()
    _set_fields = ()  # the published configuration keeps lists


class LNTuningLayer(AdapterLayer):
    """Calls a trained copy of the base module."""

    ln_tuning_layers: Trainable[nn.ModuleDict]  # a copy of the base module
    kinds = (kinds.Linear, kinds.Norm, kinds.Module)
    weight_need = "train"
    one_active = True

    def create(self, name: str, cfg: Any) -> None:
        self.ln_tuning_layers[name] = copy_module(self.pristine_module()).requires_grad_(True)

    def replace(self, name: str) -> nn.Module:
        return self.ln_tuning_layers[name]

    def cast_adapter(self, name: str) -> None:
        """The copy keeps the dtype of the base module."""


@register_method("ln_tuning", config=LNTuningConfig)
class LNTuningModel(TunerModel):
    layer_cls = LNTuningLayer
