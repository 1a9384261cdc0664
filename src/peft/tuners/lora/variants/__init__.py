# SPDX-License-Identifier: Apache-2.0
"""Variants of LoRA, one file each.

A layer holds one variant object an adapter (`layer.lora_variant[name]`); plain LoRA has none.
"""

import importlib
from typing import Any

from ....utils._lazy import lazy_attributes, owners
from ..config import LoraConfig
from .base import PLAIN as PLAIN
from .base import LoraVariant as LoraVariant

# Option that turns a variant on -> (its class, published names of that by layer type); imported when it is used.
_VARIANTS = {
    "use_dora": (
        "dora:Dora",
        "DoraLinearVariant DoraEmbeddingVariant DoraConv1dVariant DoraConv2dVariant DoraConv3dVariant",
    ),
    "velora_config": ("velora:Velora", "VeloraLinearVariant"),
    "alora_invocation_tokens": ("alora:ALora", "ALoraLinearVariant"),
    "monteclora_config": ("monteclora:MonteCLora", "MonteCLoraLinearVariant"),
    "use_bdlora": ("bdlora:BdLora", "BdLoraLinearVariant"),
    "arrow_config": ("arrow:Arrow", "ArrowLinearVariant"),
    "kasa_config": ("kasa:Kasa", "KasaLinearVariant"),
    "init_lora_weights": ("mica:Mica", "MiCALinearVariant MiCAEmbeddingVariant"),
    "use_qalora": ("qalora:QALora", "QALoraLinearVariant"),
}
__getattr__, __dir__ = lazy_attributes(
    __name__, owners({f"{__name__}.{home}": names for home, names in _VARIANTS.values()})
)


def variant_class(cfg: Any, gptq: bool = False) -> type[LoraVariant] | None:
    """The variant that a configuration asks for, None for plain LoRA. QA-LoRA counts on GPTQ layers only."""
    active = LoraConfig.active_variants(cfg)
    if not active and cfg.use_qalora and gptq:
        active = ("use_qalora",)
    if len(active) > 1:
        raise ValueError(f"The LoRA variants {', '.join(active)} cannot be combined; turn on one of them.")
    if not active:
        return None
    module, _, name = _VARIANTS[active[0]][0].partition(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
