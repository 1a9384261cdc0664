# SPDX-License-Identifier: Apache-2.0
"""MixedModel: adapters of several methods in one model.

Layers of different methods nest (the later one wraps the earlier one). One tuner a method does the injection and holds
what that method shares between layers; switching, merging and deleting work on all layers at once, of any method.
"""

import sys
from typing import Any

from torch import nn

from ..config import PeftConfig
from ..core.context import Switch
from ..core.tuner import TunerModel
from ..registry import Method, method_of, methods


def _mixable(record: Method) -> bool:
    """Whether the method works layer by layer, so that it goes with others: it holds no modules besides its layers."""
    return issubclass(record.tuner, TunerModel) and record.tuner.own_tensors is TunerModel.own_tensors


def check_mixable(config: PeftConfig) -> None:
    if not _mixable(method_of(config)):
        good = [peft_type.value for peft_type, record in methods().items() if _mixable(record)]
        raise ValueError(
            f"The provided `peft_type` '{getattr(config.peft_type, 'value', config.peft_type)}' is not compatible with "
            f"the `PeftMixedModel`. Compatible types are: {', '.join(good)}."
        )


class MixedModel(TunerModel):
    """The tuner of a PeftMixedModel."""

    def __init__(self, model: nn.Module, config: Any, adapter_name: str, low_cpu_mem_usage: bool = False):
        super().__init__(model, config, adapter_name, low_cpu_mem_usage)
        self.active_adapter = self.active_adapters

    def _surround(self, model: nn.Module, configs: dict[str, PeftConfig], switch: Switch | None = None) -> None:
        super()._surround(model, configs, switch)
        self._tuners: dict[type[TunerModel], TunerModel] = {}  # a dict: they are no sub-modules

    def _tuner_of(self, config: PeftConfig) -> TunerModel:
        cls: Any = method_of(config).tuner
        if cls not in self._tuners:
            tuner = cls.__new__(cls)
            nn.Module.__init__(tuner)
            tuner._surround(self.model, {}, self.switch)
            self._tuners[cls] = tuner
            for name, container in tuner.shared_containers().items():
                setattr(self, name, container)
        return self._tuners[cls]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject an adapter with the tuner of its method."""
        config = self.peft_config[adapter_name]
        check_mixable(config)
        self.check_config(adapter_name, config)
        tuner = self._tuner_of(config)
        tuner.peft_config[adapter_name] = config
        try:
            tuner.inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            tuner.peft_config.pop(adapter_name, None)
            raise
        self.forget_layers()
        if adapter_name in self.switch.active:
            self._may_train.add(adapter_name)
        self.reports[adapter_name] = tuner.reports[adapter_name]
        self._note(self.targeted_module_names, tuner.targeted_module_names)
        self._note(self.targeted_parameter_names, tuner.targeted_parameter_names)

    def forget_layers(self) -> None:
        super().forget_layers()
        for tuner in self.__dict__.get("_tuners", {}).values():
            tuner.forget_layers()

    def shared_containers(self) -> dict[str, Any]:
        return {name: box for tuner in self._tuners.values() for name, box in tuner.shared_containers().items()}

    def on_delete(self, name: str) -> None:
        for tuner in self._tuners.values():
            if tuner.peft_config.pop(name, None) is not None:
                tuner.on_delete(name)

    def call_arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        for tuner in self._tuners.values():
            kwargs = tuner.call_arguments(kwargs)
        return kwargs

    def after_forward(self, out: Any) -> Any:
        for tuner in self._tuners.values():
            out = tuner.after_forward(out)
        return out

    def _check_merge_allowed(self) -> None:
        for tuner in self._tuners.values():
            tuner._check_merge_allowed()

    def set_adapter(self, adapter_name: Any, inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode)
        self.active_adapter = self.active_adapters

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("Weighted adapters are not supported for MixedModel (yet).")


sys.modules.setdefault(f"{__name__}.model", sys.modules[__name__])
