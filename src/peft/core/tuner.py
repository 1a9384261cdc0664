# SPDX-License-Identifier: Apache-2.0
"""TunerModel: the part of a method that sees the whole model. Hooks around injection, the shared switch, whole-model
operations.

Also exported as `tuners_utils.BaseTuner`. Methods set `layer_cls` and override hooks.
"""

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ..config import PeftConfig
from ..storage.base import open_model
from . import kinds, match, tied, trainable
from .context import Switch
from .inject import Injection, InjectionReport
from .layer import AdapterLayer
from .modules import tree
from .patch_points import PatchPoints
from .slots import BufferDict
from .switching import WholeModelSwitch, find_parts
from .targets import target_table
from .unload import WholeModelMerge
from .wrappers import AuxiliaryTrainingWrapper, wrap_additional

DUMMY_MODEL_CONFIG = {"model_type": "custom"}


class TunerModel(PatchPoints, WholeModelSwitch, WholeModelMerge, nn.Module):
    """A base model with the adapters of one method; `tuner.model` is the user's model, changed in place."""

    prefix: str
    layer_cls: ClassVar[type[AdapterLayer]]
    # Default targets by model type: the method's table in core/targets.py, unless its class says otherwise.
    target_module_mapping: ClassVar[dict[str, Any]]
    tuner_layer_cls: ClassVar[type[AdapterLayer]]  # published name of layer_cls
    uses_shared_state: ClassVar[bool] = False  # the tuner owns tensors, so injection without it is impossible
    supports_parameters: ClassVar[bool] = False  # target_parameters
    condense_targets: ClassVar[bool] = True
    patterned: ClassVar[dict[str, str]] = {}  # option -> the option with its values for single layers
    unsupported_error: ClassVar[type[Exception]] = ValueError
    identity_at_init: ClassVar[bool] = True  # a new adapter with default options changes no output
    second_example: ClassVar[dict[str, Any]] = {}  # what a second adapter needs besides
    # constants (address below peft.tuners -> value for exact gradients) that keep a published gradient that is none
    inexact_gradients: ClassVar[dict[str, Any]] = {}
    example: ClassVar[dict[str, Any]] = {}  # options fit for layers of width 16 to 24; the contract tests use them

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ):
        super().__init__()
        configs = {adapter_name: peft_config} if isinstance(peft_config, PeftConfig) else peft_config
        existing = getattr(model, "peft_config", None)  # also of a PeftModel that is wrapped once more
        if isinstance(existing, dict) and existing is not configs:
            warnings.warn(
                "Already found a `peft_config` attribute in the model. This will lead to having multiple adapters "
                "in the model. Make sure to know what you are doing!",
                stacklevel=3,
            )
        self._surround(model, existing if isinstance(existing, dict) else {})
        before = dict(self.peft_config)
        self.peft_config.update(configs)
        key = self.switch.key
        self.switch.set_active((adapter_name,))
        try:
            self.inject_adapter(model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict)
        except BaseException:
            self.switch.key = key
            self.peft_config.clear()
            self.peft_config.update(before)
            raise
        model.peft_config = self.peft_config  # type: ignore[assignment]

    def _surround(self, model: nn.Module, configs: dict[str, PeftConfig], switch: Switch | None = None) -> None:
        """Set up the state of a tuner around `model` as it is; nothing is injected."""
        open_model(model)
        self.model = model
        self.peft_config: dict[str, Any] = configs
        self.targeted_module_names: list[str] = []
        self.targeted_parameter_names: list[str] = []
        self.reports: dict[str, InjectionReport] = {}
        self._layers: list[AdapterLayer] | None = None
        self._wrappers: list[AuxiliaryTrainingWrapper] | None = None
        self._was_trainable: list[nn.Parameter] = []
        self._to_cast: dict[str, list[AdapterLayer]] = {}  # by new adapter: layers that may hold half precision
        self.switch = switch or self._found_switch(model)
        # Adapters whose parameters may require grad: switching looks at no others.
        self._may_train: set[str] = {n for layer in self.layers() for n in layer.adapter_names}
        self.active_adapter: str | list[str] = self.active_adapters
        self._make_shared()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.model.forward(*args, **kwargs)
        return out if self.switch.disabled else self.after_forward(out)

    # ---- hooks ---------------------------------------------------------------------------------------------
    def prepare(self, cfg: Any, model: nn.Module) -> None:
        """Fill `cfg.target_modules` from the default table when the user gave none."""
        self.user_targets = cfg.target_modules is not None
        if cfg.target_modules is None and not getattr(cfg, "target_parameters", None):
            cfg.target_modules = self.default_targets(cfg, model)

    def default_targets(self, cfg: Any, model: nn.Module) -> Any:
        model_type = self.get_model_config(model).get("model_type", "custom")
        found = (getattr(type(self), "target_module_mapping", None) or target_table("lora")).get(model_type)
        if found is None:
            also = " or `target_parameters`" if self.supports_parameters else ""
            raise ValueError(
                f"Please specify `target_modules`{also} in `peft_config`: {self.method_label} has no defaults for "
                f"model type {model_type!r}."
            )
        return found if isinstance(found, str) else set(found)

    def prepare_model(self, name: str, cfg: Any, model: nn.Module) -> None:
        """Change the model before targets are matched (LoRA: layer replication)."""

    def check_config(self, name: str, cfg: Any) -> None:
        """Refuse a configuration that cannot go with the adapters already there."""
        others = [c for n, c in self.peft_config.items() if n != name]
        if sum(getattr(c, "bias", "none") != "none" for c in [cfg, *others]) > 1:
            raise ValueError(
                f"{type(self).__name__} supports only 1 adapter with bias. When using multiple adapters, set bias "
                "to 'none' for all adapters."
            )
        trainable.check_bias(cfg)

    def check_target(self, cfg: Any, key: str, module: nn.Module) -> None:
        """Refuse one target module (with an error that names `key`) before anything is changed."""

    def accepts(self, module: nn.Module, cfg: Any) -> bool:
        return self.layer_cls.supports(module)

    def make_layer(self, module: nn.Module, kind: type[kinds.LayerKind] | None, cfg: Any, key: str) -> AdapterLayer:
        """Wrap one module; LoRA looks at custom layer types first."""
        layer = self.layer_cls.wrap(module, self.switch, kind)
        if layer.storage.label == "torchao":  # writing needs the model's quantisation settings
            from ..storage.torchao import with_config

            layer.storage = with_config(self.model)
        return layer

    def shared(self, name: str, cfg: Any, targets: dict[str, nn.Module]) -> None:
        """Fill the shared containers (attributes of the tuner) before the layers are made."""

    def layer_config(self, cfg: Any, key: str, module: nn.Module) -> Any:
        """The configuration as one layer sees it, with patterns applied."""
        given = {o: p for o, field in self.patterned.items() if (p := getattr(cfg, field))}
        values = {o: match.pattern_value(p, key, getattr(cfg, o)) for o, p in given.items()}
        return cfg.with_values(**values) if values else cfg

    def after_inject(self, name: str, cfg: Any, layers: dict[str, AdapterLayer]) -> None:
        """Whatever needs all layers of the adapter."""

    def call_arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Before one forward of the model: take this method's own arguments out of `kwargs`, into `switch.call`."""
        return kwargs

    def after_forward(self, out: Any) -> Any:
        """What the model returns while adapters are on."""
        return out

    def export_state(self, name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Last change to what is saved for adapter `name` (keys as in the file)."""
        return state

    def import_state(self, name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """First change to what is loaded."""
        return state

    def only_draws(self, cfg: Any) -> bool:
        """Whether a new adapter is made of constants, `kinds.linear` and `kaiming` alone: then nothing is drawn where a
        file brings the values.
        """
        return False

    def on_delete(self, name: str) -> None:
        """Drop what the tuner itself holds for adapter `name`."""

    def own_tensors(self, name: str) -> Iterator[tuple[str, str, nn.Module, str]] | None:
        """(key in the file, name in memory, owner, attribute) of saved tensors outside adapter layers, names relative
        to
        the tuner; None: what its containers hold.
        """
        return None

    def save_parts(self, folder: Path, config: Any, safe_serialization: bool = True) -> None:
        """Write files of its own beside those of an adapter; `config` is the copy that will be written."""

    @classmethod
    def strip(cls, model: nn.Module) -> None:
        """Take off `model` what this method put on it besides adapter layers: hooks that are methods of a tuner."""
        for hooks in (model._forward_pre_hooks, model._forward_hooks):
            for key in [k for k, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), cls)]:
                del hooks[key]

    # ---- facts ---------------------------------------------------------------------------------------------
    @property
    def method_label(self) -> str:
        return self.layer_cls.method_name or type(self).__name__

    def supported_kinds(self) -> list[str]:
        return [k.name or k.__name__ for k in self.layer_cls.kinds]

    def target_shape(self, module: nn.Module) -> tuple[int, ...]:
        """[out, in, *kernel] of a target, adapted already or not."""
        base = module.get_base_layer() if isinstance(module, AdapterLayer) else module
        return kinds.demand(base, self.layer_cls.kinds, self.method_label).shape(base)

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        config: Any = getattr(model, "config", DUMMY_MODEL_CONFIG)
        if hasattr(config, "to_dict"):
            return config.to_dict()
        if dataclasses.is_dataclass(config) and not isinstance(config, type):
            return dataclasses.asdict(config)
        return config  # type: ignore[return-value]

    @staticmethod
    def _found_switch(model: nn.Module) -> Switch:
        found = next((m.switch for m in tree(model) if isinstance(m, AdapterLayer)), None)
        return found or Switch()

    @property
    def active_adapters(self) -> list[str]:
        return list(self.switch.active)

    def layers(self) -> list[AdapterLayer]:
        """All adapter layers of the model (of every method), inner ones of nested layers included."""
        if self._layers is None:
            self._layers, self._wrappers = find_parts(self.model)
        return self._layers

    def named_layers(self) -> dict[str, AdapterLayer]:
        return {k: m for k, m in self.model.named_modules() if isinstance(m, AdapterLayer)}

    def holders(self, name: str) -> dict[str, Any]:
        """The layers of this method that hold adapter `name`, by path."""
        return {k: m for k, m in self.named_layers().items() if isinstance(m, self.layer_cls) and name in m}

    def wrappers(self) -> list[AuxiliaryTrainingWrapper]:
        if self._wrappers is None:
            self._layers, self._wrappers = find_parts(self.model)
        return self._wrappers

    def forget_layers(self) -> None:
        """The set of adapter layers or wrappers changed."""
        self._layers = self._wrappers = None

    # ---- injection -----------------------------------------------------------------------------------------
    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Add adapter `adapter_name` (its configuration is in `peft_config`) to `model`; a failure changes nothing."""
        cfg = self.peft_config[adapter_name]
        self.check_name(adapter_name)
        self.convert_config(cfg, model)
        self.check_config(adapter_name, cfg)
        tied.check(self, cfg, model)
        self.prepare(cfg, model)
        self.prepare_model(adapter_name, cfg, model)
        first = not self.layers()
        if merged := sorted({n for layer in self.layers() for n in layer.merged_adapters}):
            warnings.warn(
                f"Adapters {merged} are merged into the base weights and stay so: adapter {adapter_name!r} is added "
                "beside them, activating it unmerges them first.",
                stacklevel=4,
            )
        injection = Injection(self, model, adapter_name, cfg, low_cpu_mem_usage, state_dict)
        layers = injection.run()
        try:
            saved = wrap_additional(model, cfg, adapter_name, adapter_name in self.switch.active, self.switch)
        except BaseException:
            injection.roll_back()
            raise
        if saved or injection.wraps:
            self.forget_layers()
        for wrapper in self.wrappers():
            wrapper._known.add(adapter_name)
        trainable.mark_trainable(model, self, adapter_name, cfg, first)
        self._activate(adapter_name, cfg, layers)
        self.reports[adapter_name] = injection.report
        self._to_cast[adapter_name] = injection.half
        self._note(self.targeted_module_names, injection.report.modules)
        self._note(self.targeted_parameter_names, injection.report.parameters)
        self._check_patterns(cfg, layers)
        self.active_adapter = self.active_adapters
        self.set_orientation(cfg, layers)

    def add(self, name: str, cfg: PeftConfig, low_cpu_mem_usage: bool = False, state_dict: dict | None = None) -> None:
        """Add one more adapter, inactive; a failure leaves no trace."""
        if name in self.peft_config:
            raise ValueError(f"Adapter with name {name} already exists.")
        self.peft_config[name] = cfg
        try:
            self.inject_adapter(self.model, name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict)
        except BaseException:
            self.peft_config.pop(name, None)
            raise

    @staticmethod
    def check_name(adapter_name: str) -> None:
        if not adapter_name or "." in adapter_name:
            raise KeyError(
                f"Adapter name {adapter_name!r} can't be empty or contain a dot: it becomes part of parameter names."
            )
        if adapter_name == "__base__":
            raise ValueError("The adapter name '__base__' is reserved: in `adapter_names` it means the base model.")

    def convert_config(self, cfg: Any, model: nn.Module) -> None:
        """Rewrite a configuration made for another layout of the same architecture (LoRA on fused experts)."""

    def _activate(self, name: str, cfg: Any, layers: dict[str, AdapterLayer]) -> None:
        """New adapters that are active are trainable unless loaded for inference; layers made now know the switch
        already.
        """
        active = name in self.switch.active
        overridden = [layer for layer in (self.layers() if active else layers.values()) if layer._local is not None]
        for layer in overridden:
            layer._local = None
        if active:
            self._may_train.add(name)
            for layer in overridden:  # the others set their gradients by the switch when they were made
                if name in layer:
                    layer.set_requires_grad(name, not cfg.inference_mode)

    @staticmethod
    def _note(names: list[str], new: list[str]) -> None:
        known = set(names)
        names.extend(n for n in new if n not in known)

    def _check_patterns(self, cfg: Any, layers: dict[str, AdapterLayer]) -> None:
        for field in self.patterned.values():
            if lost := match.unmatched_patterns(getattr(cfg, field), layers):
                hint = match.suggestions(lost, list(layers))
                warnings.warn(
                    f"Keys {lost} of `{field}` did not match any targeted module. {hint}".strip(),
                    RuntimeWarning,
                    stacklevel=5,
                )

    def set_orientation(self, cfg: Any, layers: dict[str, AdapterLayer]) -> None:
        """`fan_in_fan_out` as published files have it: what the last linear layer is.

        Layers know their orientation by themselves.
        """
        linear = [layer for layer in layers.values() if layer.kind.is_linear] if hasattr(cfg, "fan_in_fan_out") else []
        if linear and linear[-1].fan_in_fan_out != cfg.fan_in_fan_out:
            actual = linear[-1].fan_in_fan_out
            kind = "`transformers.pytorch_utils.Conv1D`" if actual else "`torch.nn.Linear`"
            warnings.warn(
                f"fan_in_fan_out is set to {cfg.fan_in_fan_out} but the target module is {kind}. Setting "
                f"fan_in_fan_out to {actual}.",
                stacklevel=5,
            )
            cfg.fan_in_fan_out = actual

    def _make_shared(self) -> None:
        for slot in self.layer_cls.slots.values() if hasattr(type(self), "layer_cls") else ():
            if slot.role == "shared":
                setattr(self, slot.name, slot.container())

    def link_shared(self, layer: AdapterLayer) -> None:
        """Register the tuner's shared containers on a layer."""
        for name in layer.shared_slots:
            if getattr(layer, name) is not getattr(self, name):
                setattr(layer, name, getattr(self, name))

    def shared_containers(self) -> dict[str, BufferDict | nn.ParameterDict]:
        """Shared slot containers by attribute name."""
        slots = self.layer_cls.slots.values() if hasattr(type(self), "layer_cls") else ()
        return {s.name: getattr(self, s.name) for s in slots if s.role == "shared"}

    # ---- the rest ------------------------------------------------------------------------------------------
    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter everywhere. If it was active: the other active ones stay, else the first remaining one
        becomes active.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist; there are {sorted(self.peft_config)}.")
        if any(adapter_name in layer.merged_adapters for layer in self.layers()):
            raise ValueError(f"Adapter {adapter_name} is merged; call `unmerge_adapter` before deleting it.")
        del self.peft_config[adapter_name]
        for layer in self.layers():
            layer.drop(adapter_name)
        for wrapper in self.wrappers():
            wrapper.drop(adapter_name)
        for container in self.shared_containers().values():
            if adapter_name in container:
                del container[adapter_name]
        self.on_delete(adapter_name)
        active = [n for n in self.active_adapters if n != adapter_name]
        if adapter_name in self.active_adapters and not active and self.peft_config:
            active = sorted(self.peft_config)[:1]
            warnings.warn(
                f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {active[0]}.",
                stacklevel=2,
            )
        if active != self.active_adapters:
            frozen = all(self.peft_config[n].inference_mode for n in active) if active else True
            self.set_adapter(active, inference_mode=frozen)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        layers = [layer for layer in self.layers() if adapter_name in layer] or self.layers()
        return bool(layers) and all(layer.supports_lora_conversion(adapter_name) for layer in layers)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        new = self._to_cast.pop(adapter_name, None)
        for layer in (self.layers() if new is None else new) if autocast_adapter_dtype else ():
            if adapter_name in layer:
                layer.cast_adapter(adapter_name)
