# SPDX-License-Identifier: Apache-2.0
"""Configuration classes: one dataclass a method, json <-> config, option helpers shared by all methods.

A method's options are dataclass fields made with `option(default, help)`; the help text lives there and nowhere else
(the command line reads it). Fields that many methods share (`targets()`, `excludes()`, `layer_range()` ...) are
one-line calls so that every method keeps its published field order.
"""

import copy
import dataclasses
import difflib
import enum
import inspect
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin

from .utils.peft_types import PeftType, TaskType
from .version import __version__

CONFIG_NAME = "adapter_config.json"
MISSING = dataclasses.MISSING


def option(default: Any = MISSING, help: str = "", *, factory: Callable[[], Any] | None = None, **metadata: Any) -> Any:
    """A dataclass field with a help text. Pass `factory` for mutable defaults."""
    metadata = {"help": help, **metadata}
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


# Options that many methods share: call them in the class body, for a field of its own.
targets = partial(option, None, "Modules to adapt: names (exact or dotted suffix), one regex string, or 'all-linear'.")
excludes = partial(option, None, "Modules never adapted; same matching rules as target_modules, and stronger.")
saves = partial(
    option, None, "Further modules trained in full and stored with the adapter, e.g. a classification head."
)
layer_range = partial(option, None, "Only adapt the layers with these indices (int or list).")
layer_names = partial(
    option, None, "Name of the ModuleList that layers_to_transform counts in, if it is not a common one."
)
fan_in_fan_out = partial(
    option, False, "The base weight is stored as [in, out] (found out by itself; kept for old files)."
)


def biases(only: str) -> Any:
    return option("none", f"Which base biases are trained and saved: 'none', 'all' or '{only}'.")


def nearest(name: str, valid: Any, prefix: str = " Did you mean ") -> str:
    """Text like " Did you mean 'lora_alpha'?" or "" when nothing is close."""
    found = difflib.get_close_matches(str(name), [str(v) for v in valid], n=3, cutoff=0.6)
    return prefix + " or ".join(repr(f) for f in found) + "?" if found else ""


def choices(annotation: Any) -> list[Any]:
    """The values of a `Literal`, an enum, bool, None, or a union of them."""
    if annotation in (known := {bool: [True, False], type(None): [None]}):
        return known[annotation]
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return [member.value for member in annotation]
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [value for part in get_args(annotation) for value in choices(part)]


def positive(name: str, value: Any) -> Any:
    """`value` of the option `name`, which must be above 0."""
    if value is None or value <= 0:
        kind = "value" if isinstance(value, float) else "integer value"
        raise ValueError(f"`{name}` should be a positive {kind} but the value passed is {value}")
    return value


class Checked:
    """Options that are checked when an object is made, by what their class declares."""

    # Options that must be above 0 (or None, where that is the default).
    _positive: ClassVar[tuple[str, ...]] = ()
    _not_negative: ClassVar[tuple[str, ...]] = ()
    # Options that must be between 0 and 1; dropouts are.
    _shares: ClassVar[tuple[str, ...]] = ()
    # Options whose value must be one that their type names (`Literal`, bool).
    _choices: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        types: dict[str, Any] = {f.name: f.type for f in fields(self)}  # type: ignore[arg-type]
        for name in self._positive:
            if (value := getattr(self, name)) is not None or getattr(type(self), name) is not None:
                positive(name, value)
        for name in self._not_negative:
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"`{name}` must not be negative, got {value}.")
        for name in (*self._shares, *(n for n in types if n.endswith(("dropout", "dropout_p")))):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"`{name}` must be between 0 and 1, got {value}.")
        for name in (n for n in types if n.endswith("_pattern") and n != "layers_pattern"):
            if not isinstance(value := getattr(self, name), (dict, type(None))):
                raise TypeError(f"`{name}` must be a dict {{name or regex: value}}, got {value!r}.")
        for name in self._choices:
            value, valid = getattr(self, name), choices(types[name])
            if value not in valid:
                raise ValueError(
                    f"Unknown `{name}` {value!r}; use one of {', '.join(map(str, valid))}.{nearest(value, valid)}"
                )


@cache
def hub_parameters() -> frozenset[str]:
    from huggingface_hub import hf_hub_download

    return frozenset(inspect.signature(hf_hub_download).parameters)


@dataclass
class PeftConfigMixin(Checked):
    """Reading and writing of configurations; `PeftConfig` adds what all methods share."""

    task_type: TaskType | str | None = option(None, "Task of the model, see TaskType; picks the PeftModel class.")
    peft_type: PeftType | str | None = option(None, "The method; set by the configuration class.")
    auto_mapping: dict | None = option(None, "Base model class and library, filled on saving when task_type is None.")
    peft_version: str | None = option(None, "Version that wrote the file.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task_type is not None and self.task_type not in list(TaskType):
            valid = [t.value for t in TaskType]
            raise ValueError(
                f"Invalid task type: {self.task_type!r}. Must be one of {', '.join(valid)}, or None."
                f"{nearest(str(self.task_type), valid)}"
            )
        if self.peft_version is None:
            self.peft_version = self._get_peft_version()

    @staticmethod
    def _get_peft_version() -> str:
        # Files say the API level only: the local label would make other readers see an unknown version.
        return __version__.split("+")[0]

    # ---- dict and json
    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write `adapter_config.json` into `save_directory` (created when missing), atomically."""
        directory = Path(save_directory)
        if directory.is_file():
            raise AssertionError(f"Provided path ({save_directory}) should be a directory, not a file")
        directory.mkdir(parents=True, exist_ok=True)
        output = self.to_dict()
        if kwargs.get("auto_mapping_dict") is not None:
            output["auto_mapping"] = kwargs["auto_mapping_dict"]
        # inner dicts keep their order: the first pattern that matches counts; sets get one
        output = {k: sorted(v) if isinstance(v, (set, frozenset)) else v for k, v in sorted(output.items())}
        text = json.dumps(output, indent=2)
        from .io.files import write_text_atomic

        write_text_atomic(directory / CONFIG_NAME, text)

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike, **kwargs: Any) -> dict[str, Any]:
        """Read a configuration file as a dict."""
        with open(path_json_file, encoding="utf-8") as file:
            values = json.load(file)
        if not isinstance(values, dict):
            raise ValueError(f"{path_json_file} holds a JSON {type(values).__name__}, expected an object of options.")
        if values.pop("runtime_config", None) is not None:
            warnings.warn(
                "runtime_config in the configuration file is ignored: it only makes sense at run time.", stacklevel=2
            )
        return values

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> "PeftConfigMixin":
        """The configuration of the method `peft_type`; unknown keys (newer files) are dropped with a warning."""
        target = cls._class_of(kwargs)
        known = {f.name for f in fields(target) if f.init}
        unknown = sorted(set(kwargs) - known)
        if not unknown:
            return target(**kwargs)
        if "peft_type" not in kwargs:
            raise TypeError(
                f"The configuration lacks the required key 'peft_type' and holds unknown keys {unknown}: "
                "this does not look like an adapter configuration."
            )
        hints = "; ".join(f"{k}:{nearest(k, known)}" for k in unknown if nearest(k, known))
        warnings.warn(
            f"Unexpected keyword arguments {unknown} for class {target.__name__}, these are ignored. This probably "
            "means that you're loading a configuration file that was saved by a newer version of the library; upgrade "
            f"it. {hints}".strip(),
            stacklevel=3,
        )
        return target(**{k: v for k, v in kwargs.items() if k in known})

    # ---- files and hub
    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, **kwargs: Any
    ):
        """Load from a local folder or a hub repository. The class returned is the one of the file's `peft_type`."""
        hub_kwargs, class_kwargs, _ = cls._split_kwargs(kwargs)
        path = cls._find_config(pretrained_model_name_or_path, subfolder, hub_kwargs)
        values = {**class_kwargs, **cls.from_json_file(path)}
        return cls.from_peft_type(**cls.check_kwargs(**values))

    @staticmethod
    def _find_config(name: str | os.PathLike, subfolder: str | None, hub_kwargs: dict[str, Any]) -> str:
        from .io.atomic import current

        local = current(Path(name, subfolder or ""), CONFIG_NAME)
        if local.is_file():
            return str(local)
        try:
            from huggingface_hub import hf_hub_download

            return hf_hub_download(str(name), CONFIG_NAME, subfolder=subfolder, **hub_kwargs)
        except Exception as exc:
            raise ValueError(
                f"Can't find '{CONFIG_NAME}' at '{Path(name, subfolder or '')}' ({type(exc).__name__}: {exc})"
            ) from exc

    @classmethod
    def _get_peft_type(cls, model_id: str, **hf_hub_download_kwargs: Any) -> str:
        subfolder = hf_hub_download_kwargs.pop("subfolder", None)
        hub_kwargs, _, _ = cls._split_kwargs(hf_hub_download_kwargs)
        return cls.from_json_file(cls._find_config(model_id, subfolder, hub_kwargs))["peft_type"]

    @classmethod
    def _split_kwargs(cls, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """(arguments for hf_hub_download, options of this class, the others)."""
        hub, own = hub_parameters(), set(inspect.get_annotations(cls))
        if PeftConfigMixin in cls.__bases__:
            own |= set(inspect.get_annotations(PeftConfigMixin))
        return (
            {k: v for k, v in kwargs.items() if k in hub},
            {k: v for k, v in kwargs.items() if k in own and k not in hub},
            {k: v for k, v in kwargs.items() if k not in own and k not in hub},
        )

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Last check of the values read from a file; the method named in the file may refuse old formats."""
        return cls._class_of(kwargs).check_file_values(kwargs)

    @classmethod
    def _class_of(cls, values: dict[str, Any]) -> Any:
        """The configuration class of the method that `values` name."""
        from .registry import method

        return method(values["peft_type"]).config if "peft_type" in values else cls

    @classmethod
    def check_file_values(cls, values: dict[str, Any]) -> dict[str, Any]:
        return values

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload `adapter_config.json` to a hub repository."""
        from .io.files import push_folder

        return push_folder(self.save_pretrained, repo_id, **kwargs)

    @property
    def is_prompt_learning(self) -> bool:
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        return False


@dataclass
class PeftConfig(PeftConfigMixin):
    """Base of all method configurations.

    `target_modules` and `exclude_modules` lists become sets; a `layers_pattern` needs `layers_to_transform`, and
    neither goes with a regex.
    """

    base_model_name_or_path: str | None = option(None, "Name or path of the base model.")
    revision: str | None = option(None, "Revision of the base model.")
    inference_mode: bool = option(False, "Create the adapter frozen.")

    # Filled by @register_method.
    _method: ClassVar[PeftType | None] = None
    # Fields whose lists become sets; methods that keep lists (LN tuning) or have more of them override it.
    _set_fields: ClassVar[tuple[str, ...]] = ("target_modules", "exclude_modules")
    # What a regex together with layers_to_transform / layers_pattern does: "error", or "warn" for methods that always
    # accepted it.
    _regex_with_layers: ClassVar[Literal["error", "warn"]] = "error"
    # Methods that always accepted a layers_pattern without layers_to_transform.
    _pattern_alone: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self._method is not None:
            self.peft_type = self._method
        for name in self._set_fields:
            if isinstance(getattr(self, name, None), list):
                setattr(self, name, set(getattr(self, name)))
        self._check_layer_range()

    def _check_layer_range(self) -> None:
        layers, pattern = getattr(self, "layers_to_transform", None), getattr(self, "layers_pattern", None)
        if pattern and layers is None and not self._pattern_alone:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
        if isinstance(getattr(self, "target_modules", None), str) and (layers is not None or pattern):
            given = "layers_to_transform" if layers is not None else "layers_pattern"
            text = (
                f"`{given}` cannot be used when `target_modules` is a str (a regex): "
                "put the layer indices into the regex."
            )
            if self._regex_with_layers == "error":
                raise ValueError(text)
            warnings.warn(text + " It has no effect.", stacklevel=4)

    def locate(self, model_id: str | os.PathLike, options: dict[str, Any]) -> None:
        """Before a file of `model_id` is loaded with `options`: complete the paths of further files, in place."""

    def with_values(self, **values: Any):
        """A shallow copy with other values, not validated again: what a layer gets when a pattern names it."""
        other = copy.copy(self)
        for name, value in values.items():
            setattr(other, name, value)
        return other


@dataclass
class PromptLearningConfig(PeftConfig):
    """Base of the prompt methods. Values left None are read from the base model's configuration and written back."""

    num_virtual_tokens: int | None = option(None, "Number of virtual tokens.")
    token_dim: int | None = option(None, "Width of the base model's embeddings.")
    num_transformer_submodules: int | None = option(None, "1 for decoders and encoders, 2 for encoder-decoders.")
    num_attention_heads: int | None = option(None, "Number of attention heads of the base model.")
    num_layers: int | None = option(None, "Number of layers of the base model.")
    modules_to_save: list[str] | None = saves()

    @property
    def is_prompt_learning(self) -> bool:
        return True
