# SPDX-License-Identifier: Apache-2.0
"""(IA)³: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning (arXiv 2205.05638).

y = l ⊙ (W x + b), or y = W (l ⊙ x) + b on feed-forward modules, with one trained vector l a layer.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import PeftConfig, excludes, fan_in_fan_out, option, saves, targets
from ..core import kinds
from ..core.layer import AdapterLayer
from ..core.match import Names, suffixes
from ..core.slots import Aux, Trainable
from ..core.targets import default_targets
from ..core.tuner import TunerModel
from ..core.weighted import combined_config
from ..ops import gain
from ..registry import register_method


@dataclass
class IA3Config(PeftConfig):
    """Options of (IA)³."""

    target_modules: list[str] | set[str] | str | None = targets()
    exclude_modules: list[str] | set[str] | str | None = excludes()
    feedforward_modules: list[str] | set[str] | str | None = option(
        None, "The targets whose input is scaled instead of the output."
    )
    fan_in_fan_out: bool = fan_in_fan_out()
    modules_to_save: list[str] | None = saves()
    init_ia3_weights: bool = option(True, "Start with ones; False keeps a normal draw.")
    _set_fields = ("target_modules", "exclude_modules", "feedforward_modules")

    def __post_init__(self) -> None:
        super().__post_init__()
        given, inner = self.target_modules, self.feedforward_modules
        if isinstance(given, set) and isinstance(inner, set):
            ends = {s for name in given for s in suffixes(name)}  # 'all-linear' is stored as whole names
            if lost := sorted(inner - ends):
                raise ValueError(f"`feedforward_modules` should be a subset of `target_modules`; {lost} are not in it.")


class IA3Layer(AdapterLayer):
    """Scales features: of the output, or of the input on feed-forward modules."""

    ia3_l: Trainable[nn.ParameterDict]  # [out, 1], feed-forward [1, in]; convolutions [1, features, 1, ...]
    is_feedforward: Aux[dict]
    kinds = (kinds.Linear, kinds.Conv1D, kinds.Conv2d, kinds.Conv3d)

    def create(self, name: str, cfg: Any) -> None:
        inner = self.is_feedforward[name] = cfg.is_feedforward
        base = self.get_base_layer()
        features = (base.in_channels if self.kind.is_conv else self.in_features) if inner else self.out_features
        kernel = (1,) * getattr(self.kind, "ndim", 0)
        shape = (1, features, *kernel) if kernel or inner else (features, 1)
        drawn = torch.randn(shape)  # drawn in any case: the published library consumes it too  # type: ignore
        self.ia3_l[name] = nn.Parameter(torch.ones(shape) if cfg.init_ia3_weights else drawn)  # type: ignore

    def _scale(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x * self.kind.per_feature(self.ia3_l[name].flatten(), x)

    def _adapt_activations(self, names: tuple[str, ...], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base, y, one = self.base_layer, None, names[0]
        simple = len(names) == 1 and self.kind is kinds.Linear and not self.is_feedforward[one] and not kwargs
        if simple and self._base_is_plain(base):
            y = gain.linear(base, x, self.ia3_l[one])
        return super()._adapt_activations(names, x, *args, **kwargs) if y is None else y

    def map_input(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self._scale(name, x) if self.is_feedforward[name] else x

    def map_output(self, name: str, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return y if self.is_feedforward[name] else self._scale(name, y)

    def weight_scale(self, name: str, w: torch.Tensor) -> torch.Tensor:
        """What merging multiplies the canonical weight by: one factor a row or, for inputs, a column."""
        scale, ones = self.ia3_l[name].flatten(), (1,) * (w.dim() - 2)
        if not self.is_feedforward[name]:
            return scale.view(-1, 1, *ones)
        groups = getattr(self.get_base_layer(), "groups", 1)  # each group of outputs sees its own slice of the inputs
        scale = scale.view(groups, -1)
        scale = scale if groups == 1 else scale.repeat_interleave(len(w) // groups, 0)
        return scale.view(*scale.shape, *ones)

    def map_weight(self, name: str, w: torch.Tensor) -> torch.Tensor:
        return w * self.weight_scale(name, w)

    def map_bias(self, name: str, b: torch.Tensor) -> torch.Tensor:
        return b if self.is_feedforward[name] else b * self.ia3_l[name].flatten()


@register_method("ia3", config=IA3Config, mixed=True)
class IA3Model(TunerModel):
    layer_cls = IA3Layer
    example = {"feedforward_modules": ["lin1"]}
    condense_targets = False  # feedforward_modules name the same suffixes

    def prepare(self, cfg: Any, model: nn.Module) -> None:
        super().prepare(cfg, model)
        if cfg.feedforward_modules is None:
            model_type = self.get_model_config(model).get("model_type", "custom")
            found = default_targets("ia3_feedforward", model_type)
            if found is None:
                raise ValueError(
                    f"Please specify `feedforward_modules` ([] for none): no defaults for model type {model_type!r}."
                )
            cfg.feedforward_modules = set(found)

    def layer_config(self, cfg: Any, key: str, module: nn.Module) -> Any:
        """The published rule is a suffix test without a dot boundary; files rely on it, so it stays, with a warning."""
        inner = cfg.feedforward_modules
        dotted = bool(Names(inner).match(key))
        plain = dotted if isinstance(inner, str) else any(key.endswith(entry) for entry in inner)
        if plain and not dotted:
            warnings.warn(
                f"{key!r} counts as feed-forward because its name ends like an entry of "
                f"feedforward_modules={sorted(inner)}.",
                stacklevel=2,
            )
        return cfg.with_values(is_feedforward=plain)

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """A new, frozen adapter whose vectors are the weighted sum of those of `adapters`."""
        if adapter_name in self.peft_config:
            return
        cfg = combined_config(self, adapters, weights, ("target_modules", "feedforward_modules"))
        for name in adapters:
            for key, layer in self.holders(name).items():
                if layer.is_feedforward[name] != self.layer_config(cfg, key, layer).is_feedforward:
                    raise ValueError(
                        f"{key} is among the `feedforward_modules` of some of the adapters {adapters} only: vectors "
                        "for its input and for its output do not add up."
                    )
        self.add(adapter_name, cfg)
        for layer in self.holders(adapter_name).values():
            vector = layer.ia3_l[adapter_name]
            parts = [layer.ia3_l[n].data * w for n, w in zip(adapters, weights, strict=True) if n in layer]
            vector.data = sum(parts) if parts else torch.ones_like(vector)  # all of them exclude the module
        self.set_requires_grad(adapter_name, False)
