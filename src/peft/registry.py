# SPDX-License-Identifier: Apache-2.0
"""The registry of methods: one record a method, filled by `@register_method`; everything else is looked up here.

Method modules are imported on first use of the registry as a whole (`methods()`), or one by one through
`method(peft_type)`, so that `import peft` stays cheap.
"""

import functools
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from .config import PeftConfig, nearest
from .core.targets import table_of_method, target_table
from .utils.peft_types import PeftType

C = TypeVar("C", bound=type)


@dataclass(frozen=True)
class Method:
    """What is known of one method. `tuner`: a TunerModel or PromptEncoder; `layer`: an AdapterLayer or None."""

    peft_type: PeftType
    config: type[PeftConfig]
    tuner: type
    prefix: str
    mixed: bool = False

    @property
    def name(self) -> str:
        return self.peft_type.value.lower()

    @property
    def layer(self) -> type | None:
        return getattr(self.tuner, "layer_cls", None)

    @property
    def is_prompt(self) -> bool:
        return getattr(self.tuner, "produces", None) in ("embeds", "kv")


_records: dict[PeftType, Method] = {}


def register_method(
    name: str, *, config: type[PeftConfig], prefix: str | None = None, mixed: bool = False
) -> Callable[[C], C]:
    """Class decorator for the tuner (or prompt encoder) of a method; `name.upper()` must be a PeftType.

    `prefix` starts the names of the method's parameters (default `name + "_"`). `mixed`: listed in the published
    mapping of methods for mixed models.
    """

    def register(tuner: C) -> C:
        register_peft_method(name=name, config_cls=config, model_cls=tuner, prefix=prefix, is_mixed_compatible=mixed)
        _alias_addresses(tuner)
        return tuner

    return register


def register_peft_method(
    *,
    name: str,
    config_cls: type[PeftConfig],
    model_cls: Any,
    prefix: str | None = None,
    is_mixed_compatible: bool = False,
) -> None:
    """Register a method; the published function below `register_method`, for methods outside the library."""
    if name.endswith("_"):
        raise ValueError(f"Please pass the name of the method without the underscore at the end: {name!r}.")
    if not name.islower():
        raise ValueError(f"The name of the method must be in lower case, got {name!r}.")
    if name.upper() not in list(PeftType):
        raise ValueError(
            f"Unknown method {name!r}: add it to the PeftType enum "
            f"first.{nearest(name.upper(), list(PeftType.__members__))}"
        )
    peft_type = PeftType[name.upper()]
    if peft_type in _records:
        raise KeyError(f"The method {name!r} is already registered, by {_records[peft_type].tuner.__name__}.")
    prefix = name + "_" if prefix is None else prefix
    own = getattr(model_cls, "prefix", None)
    if own is not None and own != prefix:
        raise ValueError(f"Inconsistent prefixes for {name!r}: {own!r} on {model_cls.__name__}, {prefix!r} given.")
    model_cls.prefix = prefix
    config_cls._method = peft_type
    _name_unknown_options(config_cls)
    layer = getattr(model_cls, "layer_cls", None)
    if layer is not None:
        if "prefix" not in vars(layer):
            layer.prefix, layer.method_name = prefix, name
        model_cls.tuner_layer_cls = layer
        if not hasattr(model_cls, "target_module_mapping"):
            model_cls.target_module_mapping = target_table(table) if (table := table_of_method(name)) else {}
    _records[peft_type] = Method(peft_type, config_cls, model_cls, prefix, is_mixed_compatible)


def _name_unknown_options(config: type[PeftConfig]) -> None:
    """Let `LoraConfig(lora_aplha=1)` name the nearest valid option."""
    init = config.__init__
    valid = {f.name for f in fields(config) if f.init}

    @functools.wraps(init)
    def checked(self, *args: Any, **kwargs: Any) -> None:
        for key in kwargs:
            if key not in valid:
                raise TypeError(
                    f"{type(self).__name__}.__init__() got an unexpected keyword argument {key!r}.{nearest(key, valid)}"
                )
        init(self, *args, **kwargs)

    config.__init__ = checked


def _alias_addresses(tuner: type) -> None:
    """Enter a one-file method under its published addresses `peft.tuners.<method>.{config,layer,model}`."""
    module = sys.modules.get(tuner.__module__)
    if module is None or module.__name__.rpartition(".")[0] != f"{__package__}.tuners" or hasattr(module, "__path__"):
        return
    for leaf in ("config", "layer", "model"):
        sys.modules.setdefault(f"{module.__name__}.{leaf}", module)
        if leaf not in vars(module):
            setattr(module, leaf, module)


def methods() -> dict[PeftType, Method]:
    """All methods, in the order of the PeftType enum."""
    return {t: method(t) for t in PeftType}


def method(peft_type: PeftType | str) -> Method:
    """The record of one method; KeyError with the nearest name when unknown."""
    try:
        peft_type = PeftType(peft_type)
    except ValueError:
        raise KeyError(
            f"Unknown PEFT type passed: {peft_type!r}.{nearest(str(peft_type).upper(), list(PeftType.__members__))}"
        ) from None
    if peft_type not in _records:
        importlib.import_module(f"{__package__}.tuners.{peft_type.value.lower()}")
    return _records[peft_type]


def method_of(config: PeftConfig) -> Method:
    """The record of the method that `config` belongs to."""
    if config.peft_type is None:
        raise KeyError(f"{type(config).__name__} belongs to no registered method (peft_type is None).")
    return method(config.peft_type)


def name_warning(adapter_name: str, prefix: str) -> str:
    return (
        f"Adapter name '{adapter_name}' should not be contained in the prefix '{prefix}'. This may lead to "
        "reinitialization of the adapter weights during loading."
    )


class RecordView(dict):
    """A published mapping PeftType -> something, filled from the registry on first access."""

    def __init__(self, value: Callable[[Method], Any], keep: Callable[[Method], bool] = lambda m: True):
        super().__init__()
        self._value, self._keep, self._count = value, keep, -1

    def _fill(self) -> None:
        if len(_records) != self._count:
            for peft_type, record in methods().items():
                if self._keep(record):
                    super().setdefault(peft_type, self._value(record))
            self._count = len(_records)


def _filled(name: str) -> Callable[..., Any]:
    plain = getattr(dict, name)

    @functools.wraps(plain)
    def call(self: RecordView, *args: Any, **kwargs: Any) -> Any:
        self._fill()
        return plain(self, *args, **kwargs)

    return call


for _name in (
    "__getitem__", "__contains__", "__iter__", "__len__", "__repr__", "__eq__", "get", "items", "keys", "values",
):  # fmt: skip
    setattr(RecordView, _name, _filled(_name))
