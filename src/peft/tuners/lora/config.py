# SPDX-License-Identifier: Apache-2.0
"""Options of LoRA and of its initialisations and variants."""

from dataclasses import dataclass
from typing import Any, Literal

from ...config import PeftConfig, biases, excludes, fan_in_fan_out, layer_names, layer_range, option, saves, targets


@dataclass
class LoraConfig(PeftConfig):
    """Options of LoRA. https://arxiv.org/abs/2106.09685"""

    r: int = option(8, "Rank.")
    target_modules: list[str] | set[str] | str | None = targets()
    exclude_modules: list[str] | set[str] | str | None = excludes()
    lora_alpha: int = option(8, "Numerator of the scaling alpha / r.")
    lora_dropout: float = option(0.0, "Dropout on the input of A.")
    fan_in_fan_out: bool = fan_in_fan_out()
    bias: Literal["none", "all", "lora_only"] = biases("lora_only")
    use_rslora: bool = option(False, "Scale by alpha / sqrt(r). https://arxiv.org/abs/2312.03732")
    modules_to_save: list[str] | None = saves()
    init_lora_weights: bool | str = option(True, "Initialisation.")
    layers_to_transform: list[int] | int | None = layer_range()
    layers_pattern: list[str] | str | None = layer_names()
    rank_pattern: dict | None = option(factory=dict, help="Ranks that differ: {name or regex: rank}.")
    alpha_pattern: dict | None = option(factory=dict, help="Alphas that differ: {name or regex: alpha}.")
    trainable_token_indices: list[int] | dict[str, list[int]] | None = option(None, "Embedding rows to train besides.")
    use_dora: bool = option(False, "DoRA.")
    lora_bias: bool = option(False, "Bias on B.")
    target_parameters: list[str] | None = option(None, "Raw parameters to adapt.")
    ensure_weight_tying: bool = option(False, "Tie the adapters of tied layers.")

    @classmethod
    def _any(cls) -> Any: ...
