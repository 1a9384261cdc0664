# SPDX-License-Identifier: Apache-2.0
"""The adapter layer: state, plan and forward paths of every layer method. Methods override the hooks listed in `HOOKS`.

Forward of the active names a1..ak:
    y = map_output_ak(.. map_output_a1( B(map_input_a1(.. map_input_ak(x))) + sum_i delta_ai ))
Input maps run last-active first: that is the order that agrees with merging one adapter after another.
"""

import contextlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from ..ops import low_rank
from ..ops.low_rank import Factors
from ..storage.base import WeightStorage, resolve
from . import kinds
from .context import Switch
from .forward import ForwardPaths
from .kinds import LayerKind
from .merge import Mergeable
from .modules import blank, blank_state, to_eval, tree
from .modules import dropout as dropout  # methods take these from here
from .modules import dropout_p as dropout_p
from .modules import kaiming as kaiming
from .offload import is_offloaded, onload_layer
from .placement import Placement
from .slots import Slot, read_slots

HOOKS = (
    "factors", "delta", "delta_weight", "delta_bias", "map_input", "map_output", "map_weight", "map_bias",
    "unmap_weight", "replace",
)  # fmt: skip
# A layer with one of these can be merged.
WEIGHT_HOOKS = frozenset({"delta_weight", "factors", "delta_bias", "map_weight", "map_bias", "replace"})


class AdapterLayer(ForwardPaths, Mergeable, Placement, nn.Module):
    """A base layer with the adapters of one method; also exported as `tuners_utils.BaseTunerLayer`.

    `kinds` is the domain of the maths: anything else is refused with an error that names the module.
    """

    prefix: ClassVar[str] = ""
    method_name: ClassVar[str] = ""
    kinds: ClassVar[tuple[type, ...]] = (kinds.Linear,)
    prefer_weight_path: ClassVar[bool] = False  # dense deltas: one product with W + delta instead of two
    conv_by_weight: ClassVar[bool] = False  # input maps are defined on the matrix view: convolutions map their weight
    # hooks get x in the adapter's dtype; False: they handle any floating dtype themselves
    casts_input: ClassVar[bool] = True
    input_dropout: ClassVar[str] = ""  # slot of the dropout on the input of dense deltas
    weight_need: ClassVar[str] = ""  # "read": the base weight besides merging; "train": a copy of the base layer
    one_active: ClassVar[bool] = False  # the method cannot combine several active adapters
    name_in_files: ClassVar[str | None] = None  # files keep an adapter name in their keys, always this one
    standalone_delta: ClassVar[bool] = True  # delta_weight does not depend on the base weight (so it can become a LoRA)

    slots: ClassVar[dict[str, Slot]] = {}
    module_slots: ClassVar[tuple[str, ...]] = ()  # of these, the registered containers
    dropout_slots: ClassVar[tuple[str, ...]] = ()  # of these, the dropouts
    hooks: ClassVar[frozenset[str]] = frozenset()
    kind: type[LayerKind]
    storage: WeightStorage
    switch: Switch
    in_features: int
    out_features: int
    fan_in_fan_out: bool
    cast_input_dtype_enabled: bool
    merged_adapters: list[str]
    _names: dict[str, None]
    _local: tuple[tuple[str, ...], bool] | None
    _saved_weights: dict[str, Any]
    _holders: dict[str, tuple]
    shared_slots: ClassVar[tuple[str, ...]] = ()
    adapter_layer_names: ClassVar[tuple[str, ...]] = ()
    other_param_names: ClassVar[tuple[str, ...]] = ()
    by_kind: ClassVar[dict[str, type["AdapterLayer"]]] = {}

    def __init_subclass__(cls, _of_kind: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.slots = read_slots(cls)
        cls.module_slots = tuple(s.name for s in cls.slots.values() if s.is_module)
        cls.dropout_slots = tuple(n for n in cls.module_slots if n.endswith("dropout"))
        cls.shared_slots = tuple(s.name for s in cls.slots.values() if s.role == "shared")
        cls.adapter_layer_names = tuple(s.name for s in cls.slots.values() if s.trains)
        cls.other_param_names = tuple(s.name for s in cls.slots.values() if s.role == "aux")
        cls.hooks = frozenset(h for h in HOOKS if getattr(cls, h) is not getattr(AdapterLayer, h))
        if not _of_kind:
            cls.by_kind = {}
            for kind in cls.kinds:
                cls._export(kind)

    @classmethod
    def _export(cls, kind: type[LayerKind]) -> type["AdapterLayer"]:
        """The class for layers of one kind, importable from the method's module (`peft.tuners.lora.layer.Linear`)."""
        name = kind.class_name
        if name not in cls.by_kind:
            made = type(name, (cls,), {"__module__": cls.__module__, "__doc__": cls.__doc__}, _of_kind=True)
            cls.by_kind[name] = made
            module = sys.modules[cls.__module__]
            if name not in vars(module):
                setattr(module, name, made)
        return cls.by_kind[name]

    @classmethod
    def supports(cls, module: nn.Module) -> bool:
        return kinds.pick(module, cls.kinds) is not None

    @classmethod
    def wrap(cls, module: nn.Module, switch: Switch, kind: type[LayerKind] | None = None) -> "AdapterLayer":
        """An adapter layer around `module`, without adapters yet."""
        base = module.get_base_layer() if isinstance(module, AdapterLayer) else module
        kind = kind or kinds.demand(base, cls.kinds, cls.method_name)
        return cls._export(kind)(module, kind=kind, switch=switch)

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str | None = None,
        config: Any = None,
        *,
        kind: type[LayerKind] | None = None,
        switch: Switch | None = None,
        **overrides: Any,
    ):
        # straight into __dict__: nn.Module's __init__ and __setattr__ cost more than everything else here
        self.__dict__.update(blank_state())
        self._modules["base_layer"] = base_layer
        innermost = self.get_base_layer()
        kind = kind or kinds.demand(innermost, type(self).kinds, self.method_name)
        shape = kind.shape(innermost)
        n_out, n_in = shape[-2:] if issubclass(kind, kinds.Parameter) else shape[:2]
        self.__dict__.update(
            kind=kind,
            storage=resolve(innermost),
            switch=switch or Switch((adapter_name,) if adapter_name else ()),
            out_features=n_out,
            in_features=n_in,
            fan_in_fan_out=kind.transposed and kind.is_linear,
            merged_adapters=[],
            cast_input_dtype_enabled=True,
            _names={},  # adapters of this layer, in order
            _local=None,  # this layer's own setting of the switch, if it differs from the model's
            _seen=None,  # the setting that `_plan` was made for
            _plan=(),  # active adapters present here
            _path="activation",
            _saved_weights={},  # copies of the base tensors while adapters are merged
            _holders={},
        )
        for slot in self.slots.values():
            if not slot.is_module:
                self.__dict__[slot.name] = slot.container()
            elif not slot.rare:
                self._modules[slot.name] = blank(slot.container)
        if adapter_name is not None:
            self.update_layer(adapter_name, config, **overrides)

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if name in modules:
            return modules[name]
        slot = self.slots.get(name)
        if slot is None or not slot.rare or not modules:
            return super().__getattr__(name)
        modules[name] = made = blank(slot.container)
        return made

    # ---- hooks ---------------------------------------------------------------------------------------------
    def create(self, name: str, cfg: Any) -> None:
        """Allocate and initialise adapter `name` in the slots. Buffers and seeded draws say device="cpu";
        parameters say no device.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement create")

    def factors(self, name: str) -> Factors:
        """A [r, in], B [out, r], scale, dropout probability of a low-rank delta s·B·A. May depend on parameters
        through autograd.
        """
        raise NotImplementedError(f"{type(self).__name__} has no low-rank factors")

    def delta(self, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Additive output for input `x` (in the adapter's dtype); `y` is the base output."""
        if self.factored:
            return low_rank.delta(x, self.factors(name), self.training)
        if self.input_dropout:
            x = getattr(self, self.input_dropout)[name](x)
        return self.kind.call(self.get_base_layer(), x, self.delta_weight(name), self.delta_bias(name))

    def advance(self, name: str, x: torch.Tensor, y: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """The running output `y` (base output and earlier adapters) after adapter `name`; for methods that rescale
        it (DoRA).
        """
        return y + self.delta(name, x, base)

    def delta_weight(self, name: str) -> torch.Tensor:
        """Additive canonical weight [out, in, *kernel]."""
        A, B, scale, _ = self.factors(name)
        return (B * scale) @ A if isinstance(scale, torch.Tensor) else (B @ A) * scale

    def delta_bias(self, name: str) -> torch.Tensor | None:
        return None

    def map_input(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x

    def map_output(self, name: str, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return y

    def map_weight(self, name: str, w: torch.Tensor) -> torch.Tensor:
        """The canonical weight after the adapter."""
        return w

    def map_bias(self, name: str, b: torch.Tensor) -> torch.Tensor:
        return b

    def unmap_weight(self, name: str, w: torch.Tensor) -> torch.Tensor:
        return w

    def replace(self, name: str) -> nn.Module | None:
        """A module called instead of the base layer."""
        return None

    def trainable_slots(self, name: str) -> tuple[str, ...]:
        """Slots of adapter `name` that get gradients; methods that freeze one of theirs override it."""
        return self.adapter_layer_names

    @property
    def frozen_peft_weight_names(self) -> dict[str, tuple[str, ...]]:
        """Adapter -> those of its slots that get no gradients; adapters without any are left out."""
        held = {n: {s for s in self.adapter_layer_names if n in self._held_in(s)} for n in self._names}
        frozen = {n: tuple(sorted(slots - set(self.trainable_slots(n)))) for n, slots in held.items()}
        return {n: slots for n, slots in frozen.items() if slots}

    # ---- the base layer ------------------------------------------------------------------------------------
    def get_base_layer(self) -> nn.Module:
        layer: Any = self._modules["base_layer"]
        while isinstance(layer, AdapterLayer):
            layer = layer._modules["base_layer"]
        return layer

    @property
    def weight(self) -> torch.Tensor:
        base = self.get_base_layer()
        return base.qweight if hasattr(base, "qweight") else base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> torch.Tensor | None:
        return self.get_base_layer().bias  # type: ignore[return-value]

    # ---- state ---------------------------------------------------------------------------------------------
    def __contains__(self, name: str) -> bool:
        return name in self._names

    def _held_in(self, slot_name: str) -> Any:
        """What the slot holds, by adapter name; a rare slot that holds nothing is not made for it."""
        return self._modules.get(slot_name) or self.__dict__.get(slot_name, ())

    @property
    def adapter_names(self) -> list[str]:
        return list(self._names)

    @property
    def _key(self) -> tuple[tuple[str, ...], bool]:
        return self._local or self.switch.key

    @property
    def active_adapters(self) -> list[str]:
        return list(self._key[0])

    active_adapter = active_adapters

    @property
    def _active_adapter(self) -> list[str]:
        return self.active_adapters

    @_active_adapter.setter
    def _active_adapter(self, names: str | list[str]) -> None:
        self._local = (tuple([names] if isinstance(names, str) else names), self._key[1])

    @property
    def disable_adapters(self) -> bool:
        return self._key[1]

    @property
    def _disable_adapters(self) -> bool:
        return self._key[1]

    @_disable_adapters.setter
    def _disable_adapters(self, value: bool) -> None:
        self._local = (self._key[0], value)

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    @property
    def mergeable(self) -> bool:
        return bool(self.hooks & WEIGHT_HOOKS) and (self.storage.writable or "replace" in self.hooks)

    @property
    def factored(self) -> bool:
        return "factors" in self.hooks and self.kind.is_linear

    @property
    def quantization_backend(self) -> str | None:
        return self.storage.label

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return self.standalone_delta and self.kind.is_linear and bool(self.hooks & {"delta_weight", "factors"})

    def update_layer(self, name: str, config: Any, **overrides: Any) -> None:
        """Create adapter `name` (again), move it to the base layer's device and dtype, set its gradients."""
        config = config.with_values(**overrides) if overrides else config
        self.make_adapter(name, config)
        self.settle_adapter(name, config)

    def make_adapter(self, name: str, config: Any) -> None:
        """First half of `update_layer`: the tensors, wherever the default device has them made."""
        if name in self._names:
            self.drop(name)
        base = self.get_base_layer()
        with onload_layer(base) if is_offloaded(base) else contextlib.nullcontext():
            self.create(name, config)
        self._names[name] = None
        self._holders.pop(name, None)

    def settle_adapter(self, name: str, config: Any) -> bool:
        """Second half of `update_layer`: mode, device, dtype, gradients. Returns whether `cast_adapter` may find
        something.
        """
        if not self.training:  # new modules come in training mode: dropout would be on in a model that evaluates
            for slot_name in self.module_slots:
                container = self._modules.get(slot_name)
                held = None if container is None or slot_name in self.shared_slots else container._modules.get(name)
                if held is not None:
                    to_eval(held)
        half = self.move_adapter(name)
        self.set_requires_grad(name, name in self._key[0] and not config.inference_mode)
        self.__dict__["_seen"] = None
        return half

    def drop(self, name: str) -> None:
        """Remove adapter `name` from every slot; the switch is not touched."""
        for slot in self.slots.values():
            container = self._held_in(slot.name)
            if slot.role != "shared" and name in container:
                del container[name]
        self._names.pop(name, None)
        self._holders.pop(name, None)
        self._seen = None

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from this layer alone; if it was active, another one of the layer takes its place."""
        if adapter_name not in self:
            return
        self.drop(adapter_name)
        active = [n for n in self.active_adapters if n != adapter_name]
        if adapter_name in self.active_adapters:
            if not active and self._names:
                active = sorted(self._names)[:1]
                warnings.warn(
                    f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {active[0]}.",
                    stacklevel=2,
                )
            self.set_adapter(active)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activate adapters on this layer only, until the model is switched again."""
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        if self.merged:
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=2)
            self.unmerge()
        self.set_requires_grad(list(self._names), False)
        self.set_requires_grad(names, not inference_mode)
        local = (names, self._key[1])
        self._local = None if local == self.switch.key else local

    def enable_adapters(self, enabled: bool) -> None:
        """Turn the adapters of this layer on or off; off also freezes them."""
        self.set_requires_grad(self.active_adapters if enabled else list(self._names), enabled)
        local = (self._key[0], not enabled)
        self._local = None if local == self.switch.key else local

    def parameters_of(self, name: str, trainable: bool = False) -> Iterator[nn.Parameter]:
        """Parameters of adapter `name` on this layer."""
        for slot_name in self.trainable_slots(name) if trainable else self.adapter_layer_names:
            container = self._held_in(slot_name)
            if name not in container:
                continue
            if isinstance(container, nn.ModuleDict):
                yield from container[name].parameters()
            else:
                yield container[name]

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        for name in (adapter_names,) if isinstance(adapter_names, str) else adapter_names:
            for parameters, key in self._holders_of(name) if name in self._names else ():
                for parameter in parameters.values() if key is None else (parameters[key],):
                    if parameter is not None and parameter.requires_grad != requires_grad and parameter.is_leaf:
                        parameter.requires_grad_(requires_grad and self._may_train(name, parameter))

    def _holders_of(self, name: str) -> tuple[tuple[dict, str | None], ...]:
        """Where the parameters of adapter `name` are held: (`_parameters` dict, key or None for all of it), looked
        up once.
        """
        if name not in self._holders:
            found: list[tuple[dict, str | None]] = []
            for slot_name in self.adapter_layer_names:
                container: Any = self._modules.get(slot_name)
                held = None if container is None else container._modules.get(name)
                if held is not None:
                    found += [(m._parameters, None) for m in (tree(held) if held._modules else (held,))]
                elif container is not None and name in container:
                    found.append((container._parameters, name))
            self._holders[name] = tuple(found)
        return self._holders[name]

    def trained_now(self, names: Sequence[str]) -> list[nn.Parameter]:
        """Parameters of the named adapters that require grad."""
        held = [h for n in names if n in self._names for h in self._holders_of(n)]
        found = [p for ps, key in held for p in (ps.values() if key is None else (ps[key],))]
        return [p for p in found if p is not None and p.requires_grad and p.is_leaf]

    def _may_train(self, name: str, parameter: nn.Parameter) -> bool:
        if len(self.trainable_slots(name)) == len(self.adapter_layer_names):
            return True
        return any(p is parameter for p in self.parameters_of(name, trainable=True))

    def _apply(self, fn, recurse: bool = True):
        self._seen = None  # dtypes and devices may change
        return super()._apply(fn, recurse)

    def _get_name(self) -> str:
        return f"{self.method_name}.{type(self).__name__}"

    def extra_repr(self) -> str:
        label = self.storage.label
        return "" if label is None else f"quantization_backend={label!r}"
