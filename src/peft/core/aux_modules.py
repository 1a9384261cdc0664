# SPDX-License-Identifier: Apache-2.0
"""Wrappers of modules trained besides the adapter layers: a full copy for each adapter (`modules_to_save`), or single
rows of an embedding (`trainable_token_indices`). They read the same `Switch` as adapter layers. `core/wrappers.py`
puts them in place.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from ..config import nearest
from . import kinds
from .context import Switch
from .layer import AdapterLayer
from .offload import copy_module, onload_layer

Key = tuple[tuple[str, ...], bool]
FORBIDDEN = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)
# Modules whose rows can be computed apart from each other.
ROW_WISE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def as_names(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def check_module(module: nn.Module, option: str, key: str = "") -> None:
    """Containers cannot be called and adapter layers belong to the adapter: neither can be wrapped. Only embeddings and
    linear layers have rows for tokens.
    """
    if isinstance(module, AdapterLayer):
        how = "Name another module, or take it out of target_modules."
    elif isinstance(module, FORBIDDEN):
        how = "Name another module inside or around it."
    elif option == TrainableTokensWrapper.option and kinds.kind_of(module) not in (kinds.Embedding, kinds.Linear):
        how = "Name an embedding or a linear layer, whose rows belong to tokens."
    else:
        return
    where = f" ({key!r})" if key else ""
    raise TypeError(f"{option} cannot be applied to modules of type {type(module).__name__}{where}. {how}")


class AuxiliaryTrainingWrapper(nn.Module):
    """A base module with something trained for each adapter. Subclasses say what, in `init_modules` and `update`."""

    option: ClassVar[str] = ""  # the configuration option that asks for it
    adapter_layer_names: ClassVar[tuple[str, ...]] = ()
    other_param_names: ClassVar[tuple[str, ...]] = ()
    merged_adapters: ClassVar[list[str]] = []

    def __init__(self, module_to_save: nn.Module, adapter_name: str, *, switch: Switch | None = None, **kwargs: Any):
        super().__init__()
        self.switch = Switch((adapter_name,)) if switch is None else switch
        self._names: dict[str, None] = {}
        self._known: set[str] = set()  # adapters of the model, those without a copy here included
        self._local: Key | None = None
        self.init_modules(module_to_save)
        self.check_module()
        self.update(adapter_name, **kwargs)

    # ---- for subclasses
    def init_modules(self, module: nn.Module) -> None:
        raise NotImplementedError(f"{type(self).__name__} does not implement init_modules")

    def update(self, adapter_name: str, inference_mode: bool = False, **kwargs: Any) -> None:
        """Add (or make again) the part of one adapter."""
        raise NotImplementedError(f"{type(self).__name__} does not implement update")

    def drop(self, name: str) -> None:
        raise NotImplementedError(f"{type(self).__name__} does not implement drop")

    def parameters_of(self, name: str, trainable: bool = False) -> Iterator[nn.Parameter]:
        raise NotImplementedError(f"{type(self).__name__} does not implement parameters_of")

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module that takes the place of the wrapper."""
        raise NotImplementedError(f"{type(self).__name__} does not implement unload_and_optionally_merge_module")

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """File key -> memory key of one adapter, both relative to this module; {} for adapters without a part here."""
        raise NotImplementedError(f"{type(self).__name__} does not implement adapter_state_dict_load_map")

    def _stand_in(self) -> nn.Module:
        """The module that answers for attributes that the wrapper does not have."""
        return self.original_module

    # ---- state
    def check_module(self) -> None:
        check_module(self.original_module, self.option)

    @property
    def adapter_names(self) -> list[str]:
        return list(self._names)

    @property
    def _adapters(self) -> set[str]:
        return set(self._names)

    def _get_available_adapters(self) -> set[str]:
        return self._adapters

    @property
    def _key(self) -> Key:
        return self._local or self.switch.key

    @property
    def active_adapters(self) -> list[str]:
        return [n for n in self._key[0] if n in self._names]

    @property
    def active_adapter(self) -> str | list[str]:
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    _active_adapter = active_adapter

    @property
    def disable_adapters(self) -> bool:
        return self._key[1]

    _disable_adapters = disable_adapters

    def _override(self, key: Key) -> None:
        self._local = None if key == self.switch.key else key

    def check_set_adapter(self, adapter_name: str | Sequence[str]) -> str | None:
        """The adapter that is active here when `adapter_name` is set on the model, None when this module holds none."""
        present = [n for n in as_names(adapter_name) if n in self._names]
        if len(present) > 1:
            raise ValueError(
                f"Only one adapter can be set at a time for {self.option}, but {type(self).__name__} around a "
                f"{type(self.original_module).__name__} holds {present}."
            )
        return present[0] if present else None

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activate an adapter on this module only, until the model is switched again. [] is none."""
        names = self._checked(adapter_names)
        self._flag(names, inference_mode)
        self._override((tuple(names), self._key[1]))

    def _checked(self, adapter_names: str | Sequence[str]) -> list[str]:
        if isinstance(adapter_names, str) and adapter_names not in self._names and adapter_names not in self._known:
            raise ValueError(
                f"Adapter {adapter_names} not found in {sorted(self._names)}.{nearest(adapter_names, self._names)}"
            )
        self.check_set_adapter(adapter_names)
        return as_names(adapter_names)

    def follow_switch(self, names: Sequence[str], inference_mode: bool = False) -> None:
        """The model was switched to `names`."""
        self.check_set_adapter(names)
        self._local = None
        self._flag(names, inference_mode)

    def _flag(self, names: Sequence[str], inference_mode: bool) -> None:
        self.set_requires_grad([n for n in self._names if n not in names], False)
        self.set_requires_grad(names, not inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Turn this module on or off; off also freezes it."""
        self.set_requires_grad(self.active_adapters if enabled else list(self._names), enabled)
        self._override((self._key[0], not enabled))

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        for name in as_names(adapter_names):
            if name in self._names:
                for parameter in self.parameters_of(name, trainable=requires_grad):
                    may_train = parameter.is_floating_point() or parameter.is_complex()
                    if parameter.is_leaf and (may_train or not requires_grad):
                        parameter.requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        """Delete one adapter here; what becomes active is said by the model."""
        self.check_set_adapter(new_active_adapters or ())
        was_here = adapter_name in self._names
        self.drop(adapter_name)
        if was_here and new_active_adapters is not None:
            self.set_adapter(list(new_active_adapters))

    # ---- reading
    def adapter_state_dict(
        self, adapter_name: str, state_dict: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """What a file holds of one adapter; keys (also those of `state_dict`) are relative to this module."""
        state = self.state_dict() if state_dict is None else state_dict
        return {key: state[source] for key, source in self.adapter_state_dict_load_map(adapter_name).items()}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "_names" not in self.__dict__:
                raise
        return getattr(self._stand_in(), name)


class ModulesToSaveWrapper(AuxiliaryTrainingWrapper):
    """A module with one trained copy for each adapter; the original is kept, frozen."""

    option = "modules_to_save"
    adapter_layer_names = ("modules_to_save",)
    original_module: nn.Module
    modules_to_save: nn.ModuleDict

    def __init__(
        self, module_to_save: nn.Module, adapter_name: str, tied_module: nn.Module | None = None, **kwargs: Any
    ):
        super().__init__(module_to_save, adapter_name, tied_module=tied_module, **kwargs)

    def init_modules(self, module: nn.Module) -> None:
        self.original_module = module
        self.modules_to_save = nn.ModuleDict()

    def update(
        self, adapter_name: str, inference_mode: bool = False, tied_module: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Copy the original for `adapter_name`; with `tied_module`, the copy shares the weight of that module."""
        memo: dict[int, Any] = {}
        if tied_module is not None:
            memo[id(self.original_module.weight)] = tied_module.weight
        self.modules_to_save[adapter_name] = copy_module(self.original_module, memo)
        self._names[adapter_name] = None
        self.original_module.requires_grad_(False)
        self.set_requires_grad(adapter_name, adapter_name in self._key[0] and not inference_mode)

    def drop(self, name: str) -> None:
        if name in self._names:
            del self.modules_to_save[name], self._names[name]

    def parameters_of(self, name: str, trainable: bool = False) -> Iterator[nn.Parameter]:
        return self.modules_to_save[name].parameters() if name in self._names else iter(())

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        name = self.check_set_adapter(self._key[0])
        return self.original_module if name is None else self.modules_to_save[name]

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        if adapter_name not in self._names:
            return {}
        return {k: f"modules_to_save.{adapter_name}.{k}" for k in self.modules_to_save[adapter_name].state_dict()}

    def _stand_in(self) -> nn.Module:
        name = None if self._key[1] else next(iter(self.active_adapters), None)
        return self.original_module if name is None else self.modules_to_save[name]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        (active, disabled), call = self._key, self.switch.call
        name = None if disabled else self.check_set_adapter(active)
        if (call.adapter_names is not None or "adapter_names" in kwargs) and not disabled:
            return self._forward_rows(kwargs.pop("adapter_names", call.adapter_names), *args, **kwargs)
        return (self.original_module if name is None else self.modules_to_save[name])(*args, **kwargs)

    def _forward_rows(self, names: Sequence[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Mixed batch: rows use the copy of their adapter; without one ("__base__") the original."""
        if not isinstance(self.original_module, ROW_WISE):
            raise TypeError(
                f"Mixed batching is not supported for {type(self.original_module).__name__} in modules_to_save, "
                f"only for {', '.join(c.__name__ for c in ROW_WISE)}."
            )
        if len(names) != len(x):
            raise ValueError(
                f"Length of `adapter_names` should be the same as the number of inputs, but got {len(names)} and "
                f"{len(x)} respectively."
            )
        groups: dict[str | None, list[int]] = {}
        for i, name in enumerate(names):
            groups.setdefault(name if name in self._names else None, []).append(i)
        parts = []
        for name, index in groups.items():
            module = self.original_module if name is None else self.modules_to_save[name]
            parts.append(module(x[torch.tensor(index, device=x.device)], *args, **kwargs))
        order = torch.tensor([i for index in groups.values() for i in index], device=parts[0].device)
        return torch.cat(parts)[order.argsort()]


class TrainableTokensWrapper(AuxiliaryTrainingWrapper):
    """An embedding (or output head) with trained rows; `token_adapter` is an adapter layer that does all the work."""

    option = "trainable_token_indices"
    adapter_layer_names = ("token_adapter.trainable_tokens_delta",)
    other_param_names = ("token_adapter.token_indices", "token_adapter.trainable_tokens_original")
    token_adapter: Any

    def __init__(
        self,
        module_to_save: nn.Module,
        adapter_name: str,
        token_indices: list[int],
        tied_adapter: AdapterLayer | None = None,
        **kwargs: Any,
    ):
        super().__init__(module_to_save, adapter_name, token_indices=token_indices, tied_adapter=tied_adapter, **kwargs)

    def init_modules(self, module: nn.Module) -> None:
        from ..tuners.trainable_tokens import TrainableTokensLayer

        check_module(module, self.option)
        self.token_adapter = TrainableTokensLayer.wrap(module, self.switch)
        self._names = self.token_adapter._names

    @property
    def original_module(self) -> nn.Module:
        return self.token_adapter.get_base_layer()

    def update(
        self,
        adapter_name: str,
        inference_mode: bool = False,
        token_indices: list[int] | None = None,
        tied_adapter: AdapterLayer | None = None,
        **kwargs: Any,
    ) -> None:
        """Train rows `token_indices` for `adapter_name`; with `tied_adapter`, use the rows of that layer."""
        from ..tuners.trainable_tokens import TrainableTokensConfig

        self.original_module.requires_grad_(False)
        if tied_adapter is not None:
            self.token_adapter.tie(adapter_name, tied_adapter)
        else:
            config = TrainableTokensConfig(token_indices=list(token_indices or ()), inference_mode=inference_mode)
            self.token_adapter.update_layer(adapter_name, config)

    def check_set_adapter(self, adapter_name: str | Sequence[str]) -> str | None:
        """Adapters with different rows can be active together."""
        present = [n for n in as_names(adapter_name) if n in self._names]
        self.token_adapter.check_together(present)
        return present[0] if present else None

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        self.token_adapter.set_adapter(self._checked(adapter_names), inference_mode)

    @property
    def _local(self) -> Key | None:
        return self.token_adapter._local

    @_local.setter
    def _local(self, key: Key | None) -> None:
        if "token_adapter" in self._modules:
            self.token_adapter._local = key

    def drop(self, name: str) -> None:
        self.token_adapter.drop(name)

    def parameters_of(self, name: str, trainable: bool = False) -> Iterator[nn.Parameter]:
        return self.token_adapter.parameters_of(name, trainable)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        layer = self.token_adapter
        with onload_layer(layer):
            if merge:
                wanted = layer.active_adapters if adapter_names is None else adapter_names
                if names := [n for n in wanted if n in layer and n not in layer.merged_adapters]:
                    layer.merge(safe_merge=safe_merge, adapter_names=names, keep=False)
            elif layer.merged:
                layer.unmerge()
        return layer.get_base_layer()

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        if adapter_name not in self.token_adapter.trainable_tokens_delta:  # absent, or the rows of a tied layer
            return {}
        key = "token_adapter.trainable_tokens_delta"
        return {key: f"{key}.{adapter_name}"}

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and "token_adapter" in self.__dict__.get("_modules", {}):
            layer = self.token_adapter
            return layer.weight if layer.disable_adapters else layer.get_merged_weights(self.active_adapters)
        return super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.token_adapter(*args, **kwargs)
