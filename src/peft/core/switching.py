# SPDX-License-Identifier: Apache-2.0
"""Turning the adapters of a whole model on and off, and finding the parts that this concerns."""

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from .aux_modules import AuxiliaryTrainingWrapper, as_names
from .layer import AdapterLayer


class WholeModelSwitch:
    """The part of TunerModel that switches: one setting that all layers read, and the gradients that go with it."""

    def set_adapter(self: Any, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activate one or several adapters: they become trainable (unless `inference_mode`), all others frozen."""
        names = as_names(adapter_name)
        for wrapper in self.wrappers():
            wrapper.check_set_adapter(names)
        if any(layer.merged_adapters for layer in self.layers()):
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=2)
            self.unmerge_adapter()
        others = [n for n in self._may_train if n not in names]
        self._may_train = set() if inference_mode else set(names)
        for layer in self.layers():
            layer._local = None
            layer.set_requires_grad(others, False)
            layer.set_requires_grad(names, not inference_mode)
        self.switch.set_active(names)
        self.active_adapter = adapter_name if isinstance(adapter_name, str) else names
        for wrapper in self.wrappers():
            wrapper.follow_switch(names, inference_mode)

    def set_requires_grad(self: Any, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        names = as_names(adapter_names)
        if requires_grad:
            self._may_train |= set(names) & set(self.peft_config)
        for part in [*self.layers(), *self.wrappers()]:
            part.set_requires_grad(names, requires_grad)

    def disable_adapter_layers(self: Any) -> None:
        """Turn all adapters off, until `enable_adapter_layers`. Their parameters are frozen meanwhile."""
        configs = [self.peft_config[n] for n in self.active_adapters if n in self.peft_config]
        if any(getattr(config, "bias", "none") != "none" for config in configs):
            warnings.warn(
                "Careful, disabling adapter layers with bias configured does not produce the same output as the base "
                "model would without adaption.",
                stacklevel=2,
            )
        self._set_enabled(False)

    def enable_adapter_layers(self: Any) -> None:
        """Turn the active adapters on again; parameters get back the requires_grad that turning off took away."""
        self._set_enabled(True)

    def _set_enabled(self: Any, enabled: bool) -> None:
        if enabled == (not self.switch.disabled) and not any(layer._local for layer in self.layers()):
            return
        if enabled:
            for parameter in self._was_trainable:
                parameter.requires_grad_(True)
            self._was_trainable = []
        else:
            names = list(dict.fromkeys([*self.active_adapters, *self._may_train]))
            self._was_trainable = [p for layer in self.layers() for p in layer.trained_now(names)]
            for wrapper in self.wrappers():
                self._was_trainable += [
                    p for n in wrapper.adapter_names for p in wrapper.parameters_of(n) if p.requires_grad and p.is_leaf
                ]
            for parameter in self._was_trainable:
                parameter.requires_grad_(False)
        for layer in self.layers():
            layer._local = None
        self.switch.set_disabled(not enabled)


def find_parts(model: nn.Module) -> tuple[list[AdapterLayer], list[AuxiliaryTrainingWrapper]]:
    """Adapter layers and auxiliary wrappers in the order of the modules. What adapters own is not searched."""
    layers, wrappers, seen = [], [], set()
    stack: list[Any] = [model]
    while stack:
        module = stack.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, AdapterLayer):
            layers.append(module)
            stack.append(module.base_layer)
            continue
        if isinstance(module, AuxiliaryTrainingWrapper):
            wrappers.append(module)
            stack += [m for n, m in reversed(module._modules.items()) if n != "modules_to_save"]
        elif module._modules:
            stack += reversed(module._modules.values())
    return layers, wrappers
