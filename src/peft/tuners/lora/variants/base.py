# SPDX-License-Identifier: Apache-2.0
"""The protocol of LoRA variants: what one changes of plain LoRA, for one adapter on one layer."""

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from ....core import kinds
from ....core.kinds import LayerKind
from ....core.slots import Slot
from ....ops.low_rank import Factors

if TYPE_CHECKING:
    from ..layer import LoraLayer


class LoraVariant:
    """Hooks like those of a layer, with the layer and the adapter's name as first arguments; the base class is plain
    LoRA.

    Objects hold options only. State lives in slots of the layer: the published ones, and `slots` that the variant adds.
    A variant that overrides `advance` sees activations; one that overrides only `factors` keeps the fused path of
    plain LoRA.
    """

    name: ClassVar[str] = ""
    kinds: ClassVar[tuple[type[LayerKind], ...]] = (kinds.Linear, kinds.Conv1D)
    quantised: ClassVar[bool] = False  # allowed on quantised base layers
    slots: ClassVar[tuple[Slot, ...]] = ()
    frozen: ClassVar[tuple[str, ...]] = ()  # slots of plain LoRA that get no gradients
    standalone: ClassVar[bool] = True  # delta_weight alone says everything: the adapter can become a plain LoRA
    additive: ClassVar[bool] = True  # merging adds delta_weight and does nothing else
    why_not_mergeable: ClassVar[str] = ""
    replaces_factors: ClassVar[bool] = False  # the modules in lora_A and lora_B are the variant's own

    def __init__(self, cfg: Any):
        """Take the options that the hooks need."""

    @classmethod
    def check(cls, cfg: Any, key: str, kind: type[LayerKind], layer_storage: Any, base: nn.Module) -> None:
        """Refuse a layer before anything is created."""
        if kind not in cls.kinds or (layer_storage.label is not None and not cls.quantised):
            what = kind.name if layer_storage.label is None else f"{layer_storage.label} {kind.name}"
            names = ", ".join(k.name for k in cls.kinds)
            raise ValueError(
                f"{cls.name} does not support {key!r}, which is a {what} layer (supported: {names}"
                f"{', also quantised' if cls.quantised else ''}). Leave that module out of target_modules."
            )

    @property
    def factored(self) -> bool:
        return type(self).advance is LoraVariant.advance

    def create(self, layer: "LoraLayer", name: str, cfg: Any) -> None:
        """Allocate what the variant adds; the factors of plain LoRA exist and are initialised."""

    def factors(self, layer: "LoraLayer", name: str) -> Factors:
        return layer.plain_factors(name)

    def static_factors(self, layer: "LoraLayer", name: str) -> Factors:
        """Factors without what training adds at random."""
        return self.factors(layer, name)

    def advance(
        self, layer: "LoraLayer", name: str, x: torch.Tensor, y: torch.Tensor, base: torch.Tensor
    ) -> torch.Tensor:
        """The running output `y` after the adapter."""
        return y + layer.delta(name, x, base)

    def fuses(self, layer: "LoraLayer") -> bool:
        """Whether `fused` does base product and adapter in one operator, on plain base layers of this kind."""
        return False

    def fused(self, layer: "LoraLayer", name: str, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__} does not implement fused")

    def delta_weight(self, layer: "LoraLayer", name: str) -> torch.Tensor:
        return layer.product(self.static_factors(layer, name))

    def map_weight(self, layer: "LoraLayer", name: str, w: torch.Tensor) -> torch.Tensor:
        """The weight after the adapter, given the weight with delta_weight added; for variants that are not
        additive.
        """
        return w

    def check_merge(self, layer: "LoraLayer", name: str) -> None:
        if self.why_not_mergeable:
            raise NotImplementedError(f"{self.name} adapters cannot be merged: {self.why_not_mergeable}")


PLAIN = LoraVariant(None)
