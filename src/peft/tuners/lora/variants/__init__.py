# SPDX-License-Identifier: Apache-2.0
"""Variants of LoRA, one file each.

A layer holds one variant object an adapter (`layer.lora_variant[name]`); plain LoRA has none.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ..config import LoraConfig
from .base import LoraVariant as LoraVariant

if TYPE_CHECKING:
    from ..layer import LoraLayer

# Option that turns a variant on -> (module, class); modules are imported when a variant is used.
_HOMES = {
    "use_dora": ("dora", "Dora"),
    "velora_config": ("velora", "Velora"),
    "alora_invocation_tokens": ("alora", "ALora"),
    "monteclora_config": ("monteclora", "MonteCLora"),
    "use_bdlora": ("bdlora", "BdLora"),
    "arrow_config": ("arrow", "Arrow"),
    "kasa_config": ("kasa", "Kasa"),
    "init_lora_weights": ("mica", "Mica"),
    "use_qalora": ("qalora", "QALora"),
}
# Published class names, for code that imports them.
_PUBLISHED = {
    "DoraLinearVariant": "use_dora",
    "DoraEmbeddingVariant": "use_dora",
    "DoraConv1dVariant": "use_dora",
    "DoraConv2dVariant": "use_dora",
    "DoraConv3dVariant": "use_dora",
    "VeloraLinearVariant": "velora_config",
    "ALoraLinearVariant": "alora_invocation_tokens",
    "MonteCLoraLinearVariant": "monteclora_config",
    "BdLoraLinearVariant": "use_bdlora",
    "ArrowLinearVariant": "arrow_config",
    "KasaLinearVariant": "kasa_config",
    "MiCALinearVariant": "init_lora_weights",
    "MiCAEmbeddingVariant": "init_lora_weights",
    "QALoraLinearVariant": "use_qalora",
}


def _class_of(option: str) -> type[LoraVariant]:
    module, name = _HOMES[option]
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def variant_class(cfg: Any, gptq: bool = False) -> type[LoraVariant] | None:
    """The variant that a configuration asks for, None for plain LoRA. QA-LoRA counts on GPTQ layers only."""
    active = LoraConfig.active_variants(cfg)
    if not active and cfg.use_qalora and gptq:
        active = ("use_qalora",)
    if not active:
        return None
    if len(active) > 1:
        raise ValueError(f"The LoRA variants {', '.join(active)} cannot be combined; turn on one of them.")
    return _class_of(next(iter(active)))


def make_variant(cfg: Any, layer: "LoraLayer") -> LoraVariant | None:
    cls = variant_class(cfg, layer.storage.label == "gptq")
    return None if cls is None else cls(cfg)


def __getattr__(name: str) -> Any:
    if name in _PUBLISHED:
        return _class_of(_PUBLISHED[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
