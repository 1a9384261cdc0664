# SPDX-License-Identifier: Apache-2.0
"""Options of ShadowPEFT."""

from dataclasses import dataclass

from ...config import PeftConfig, excludes, layer_names, layer_range, option, saves

MIRROR = "mirror"
_SIZES = (
    "shadow_num_hidden_layers",
    "shadow_hidden_size",
    "shadow_num_attention_heads",
    "shadow_intermediate_size",
)


@dataclass
class ShadowConfig(PeftConfig):
    """Options of ShadowPEFT. Target modules are whole transformer blocks."""

    target_modules: list[str] | str | None = option(None, "Transformer blocks to correct; None: all of the decoder.")
    exclude_modules: list[str] | str | None = excludes()
    r: int = option(8, "Width of the bottleneck that corrects a block's input.")
    shadow_alpha: float = option(0.1, "Strength of the correction.")
    shadow_dropout: float = option(0.2, "Dropout on the difference of hidden and shadow state.")
    init_weights: bool = option(True, "Start without correction (shadow_up = 0).")
    shadow_model: str = option(
        MIRROR, "The shadow network: 'mirror' of the decoder, or folder or repository of a model."
    )
    shadow_num_hidden_layers: int | None = option(None, "Depth of a mirror; None: 1.")
    shadow_hidden_size: int | None = option(None, "Width of a mirror; None: that of the base model.")
    shadow_num_attention_heads: int | None = option(None, "Attention heads of a mirror.")
    shadow_intermediate_size: int | None = option(None, "Width of the feed-forward layers of a mirror.")
    share_embeddings: bool = option(True, "A mirror of the same width reads the embeddings of the base model.")
    update_hidden_size: int | None = option(None, "Hidden width of the networks that update the shadow state; None: r.")
    auxiliary_loss_weight: float = option(0.05, "Weight of the shadow network's own loss; 0 turns it off.")
    layers_to_transform: list[int] | int | None = layer_range()
    layers_pattern: list[str] | str | None = layer_names()
    modules_to_save: list[str] | None = saves()
    _positive = ("r", "update_hidden_size", *_SIZES)
    _not_negative = ("auxiliary_loss_weight",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shadow_model != MIRROR and (given := [n for n in _SIZES if getattr(self, n) is not None]):
            raise ValueError(
                f"{', '.join(f'`{n}`' for n in given)} give the sizes of a mirror, but `shadow_model` is "
                f"{self.shadow_model!r}."
            )
