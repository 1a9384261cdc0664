# SPDX-License-Identifier: Apache-2.0
"""Injection: one walk over the module tree makes a plan, all checks run on the plan, then the layers are wrapped.

A failing injection leaves the model as it was: checks come first, and what was applied is undone when a later step
raises.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..storage.base import resolve
from ..utils.collector import without_collector
from ..utils.error import NoMatchingPeftModuleError
from . import kinds, match
from .layer import AdapterLayer
from .modules import OnMeta
from .wrappers import AuxiliaryTrainingWrapper

if TYPE_CHECKING:
    from .tuner import TunerModel


_META = torch.device("meta")


@dataclass
class Node:
    """A module of the tree with its place."""

    key: str
    module: nn.Module
    parent: nn.Module
    leaf: str


@dataclass
class Target:
    node: Node
    parameter: str | None = None  # adapt this raw parameter instead of the module

    @property
    def key(self) -> str:
        return self.node.key if self.parameter is None else f"{self.node.key}.{self.parameter}"


@dataclass
class InjectionReport:
    """What a configuration matched: `counts` per target entry, entries that matched nothing, excluded module names."""

    modules: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    unmatched: list[str] = field(default_factory=list)
    excluded: list[str] = field(default_factory=list)


def walk(model: nn.Module) -> Iterator[Node]:
    """Every module once (under its first name), the root left out, with parents at hand.

    Adapter layers are shown, their insides are not; nor are those of auxiliary wrappers.
    """
    seen: set[int] = {id(model)}
    stack = [(name, child, model, name) for name, child in reversed(model._modules.items()) if child is not None]
    while stack:
        key, module, parent, leaf = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield Node(key, module, parent, leaf)
        if isinstance(module, (AdapterLayer, AuxiliaryTrainingWrapper)):
            continue
        stack += [(f"{key}.{name}", c, module, name) for name, c in reversed(module._modules.items()) if c is not None]


class Injection:
    """One run of injecting adapter `name` of configuration `cfg` into the model of `tuner`."""

    def __init__(
        self, tuner: "TunerModel", model: nn.Module, name: str, cfg: Any, low_cpu: bool, state_dict: dict | None
    ):
        self.tuner, self.model, self.name, self.cfg = tuner, model, name, cfg
        self.low_cpu, self.state_dict = low_cpu, state_dict
        self.nodes = list(walk(model))
        self.report = InjectionReport()
        self.layers: dict[str, AdapterLayer] = {}
        self.half: list[AdapterLayer] = []  # whose adapters may be in half precision
        self.undo: list[Callable[[], Any]] = []
        self.wraps = False  # whether modules were wrapped that were not before

    def run(self) -> dict[str, AdapterLayer]:
        targets = self.plan()
        for target in targets:
            self.check(target)
        self.tuner.shared(self.name, self.cfg, {t.key: t.node.module for t in targets})
        try:
            with without_collector():
                self.apply(targets)
            self.tuner.after_inject(self.name, self.cfg, self.layers)
        except BaseException:
            self.roll_back()
            raise
        return self.layers

    # ---- the plan
    def plan(self) -> list[Target]:
        cfg = self.cfg
        if getattr(cfg, "target_modules", None) == match.DUMMY_TARGET_MODULES:
            return []
        if getattr(cfg, "target_parameters", None) and self.state_dict is not None:
            raise ValueError(
                f"A {self.tuner.method_label} adapter with `target_parameters` cannot be injected from a state_dict."
            )
        self._expand_all_linear()
        self._condense()
        matcher = match.Matcher(cfg)
        targets = self._from_config(matcher) if self.state_dict is None else self._from_state_dict(matcher)
        self.whole = {t.key for t in targets}
        targets += self._parameters()
        self._conclude(matcher)
        return targets

    def _expand_all_linear(self) -> None:
        cfg = self.cfg
        if not (isinstance(cfg.target_modules, str) and cfg.target_modules.lower() == match.ALL_LINEAR):
            return
        heads = set(self._output_heads())
        cfg.target_modules = {
            n.key for n in self.nodes if id(n.module) not in heads and self._is_linear(n.module)
        }  # fmt: skip

    @staticmethod
    def _is_linear(module: nn.Module) -> bool:
        if isinstance(module, AdapterLayer):
            return module.kind.is_linear
        kind = kinds.kind_of(module)
        return kind is not None and kind.is_linear

    def _output_heads(self) -> Iterator[int]:
        """Heads that "all-linear" leaves alone on transformers models."""
        if not hasattr(self.model, "get_output_embeddings") or not hasattr(self.model, "config"):
            return
        head = self.model.get_output_embeddings()  # type: ignore
        if head is not None:
            yield id(head)
        elif self.cfg.task_type == "SEQ_CLS":
            head = next((getattr(self.model, n) for n in ("score", "classifier") if hasattr(self.model, n)), None)
            yield id(head)

    def _condense(self) -> None:
        names = self.cfg.target_modules
        if isinstance(names, str) or not names or not self.tuner.condense_targets:
            return
        if len(names) < match.MIN_TARGET_MODULES_FOR_OPTIMIZATION:
            return
        wanted = match.Names(names)
        others = {n.key for n in self.nodes if not wanted.match(n.key)}
        shorter = match.find_minimal_target_modules(names, others)
        if len(shorter) < len(names):
            self.cfg.target_modules = shorter

    def _from_config(self, matcher: match.Matcher) -> list[Target]:
        targets, excluded = [], self.report.excluded
        replaced = self.tuner._check_target_module_exists is not match.check_target_module_exists
        for node in self.nodes:
            hit = matcher.match(node.key)
            if replaced:
                hit = self.tuner._check_target_module_exists(self.cfg, node.key)
            if hit is match.EXCLUDED:
                excluded.append(node.key)
            elif hit:
                targets.append(Target(node))
        return targets

    def _from_state_dict(self, matcher: match.Matcher) -> list[Target]:
        """Adapt exactly the modules that the keys of the state dict belong to."""
        wanted = {k.rsplit("." + self.tuner.prefix, 1)[0].removeprefix("_orig_mod.") for k in self.state_dict or ()}
        targets = [Target(n) for n in self.nodes if n.key in wanted]
        by_config = {n.key for n in self.nodes if matcher.match(n.key)}
        found = {t.key for t in targets}
        if found != by_config:
            warnings.warn(
                "While injecting the PEFT adapters, an inconsistency was discovered between the PEFT config and the "
                "provided state_dict. "
                f"Only in the config: {sorted(by_config - found)[:10]}; only in the state_dict: "
                f"{sorted(found - by_config)[:10]}.",
                RuntimeWarning,
                stacklevel=5,
            )
        return targets

    def _parameters(self) -> list[Target]:
        names = getattr(self.cfg, "target_parameters", None)
        if not names:
            return []
        if not self.tuner.supports_parameters:
            raise NotImplementedError(f"{self.tuner.method_label} cannot adapt raw parameters (`target_parameters`).")
        wanted, found = match.Names(set(names)), []
        self.parameter_names = wanted
        for name in self.model._parameters:
            if wanted.match(name):
                raise ValueError(
                    f"Parameter {name!r} belongs to the top-level module, which cannot be replaced; wrap the model "
                    "in another module."
                )
        for node in self.nodes:
            module = node.module
            base = module.get_base_layer() if isinstance(module, AdapterLayer) else module
            for parameter in base._parameters:
                key = f"{node.key}.{parameter}"
                if hit := wanted.match(key):
                    wanted.count(hit)
                    found.append(Target(node, parameter))
        return found

    # ---- nothing or not everything matched
    def _conclude(self, matcher: match.Matcher) -> None:
        report, cfg = self.report, self.cfg
        counts = matcher.targets.hits
        report.counts = {**counts, **getattr(getattr(self, "parameter_names", None), "hits", {})}
        modules = len(self.whole)
        parameters = sum(getattr(getattr(self, "parameter_names", None), "hits", {}).values())
        if not modules and not parameters:
            raise NoMatchingPeftModuleError(self._nothing_matched())
        if getattr(cfg, "exclude_modules", None) and not report.excluded:
            warnings.warn(
                f"You have passed exclude_modules={cfg.exclude_modules} but no modules were excluded. Please check "
                "that it is set correctly.",
                stacklevel=6,
            )
        elif cfg.target_modules and not modules:
            warnings.warn(
                f"target_modules={cfg.target_modules} were set but no module was matched.", RuntimeWarning, stacklevel=6
            )
        elif getattr(cfg, "target_parameters", None) and not parameters:
            warnings.warn(
                f"target_parameters={cfg.target_parameters} were set but no parameter was matched.",
                RuntimeWarning,
                stacklevel=6,
            )
        report.unmatched = matcher.targets.unmatched if self.state_dict is None else []
        if report.unmatched and modules and self.tuner.user_targets:
            hint = match.suggestions(report.unmatched, [n.key for n in self.nodes])
            layers = " within layers_to_transform" if getattr(cfg, "layers_to_transform", None) is not None else ""
            warnings.warn(
                f"target_modules entries {report.unmatched} matched no module{layers}. {hint}".strip(), stacklevel=6
            )

    def _nothing_matched(self) -> str:
        cfg, keys = self.cfg, [n.key for n in self.nodes]
        layers = getattr(cfg, "layers_to_transform", None)
        notes = (
            ""
            if layers is None
            else f" Note: You specified 'layers_to_transform': {layers}, only those layers were looked at."
        )
        if getattr(cfg, "layers_pattern", None):
            notes += f" You also specified 'layers_pattern': {cfg.layers_pattern}."
        if self.report.excluded and len(self.report.excluded) == len(keys):
            return (
                "All modules were excluded. This is likely unintended. Check your `target_modules`, `exclude_modules` "
                "and `modules_to_save`."
            )
        if self.report.excluded:
            text = (
                "No modules were targeted for adaptation. This might be caused by a combination of mismatched target "
                "modules and excluded modules, or by targets that are all in modules_to_save."
            )
        elif not cfg.target_modules:
            return (
                f"No `target_modules` passed and no `target_parameters` found for {self.tuner.method_label}; "
                "name the modules to adapt."
            )
        else:
            text = (
                f"Target modules {cfg.target_modules} not found in the base model. "
                "Please check the target modules and try again."
            )
        regex = isinstance(cfg.target_modules, str)
        hint = match.suggestions([cfg.target_modules] if regex else sorted(cfg.target_modules or ()), keys)
        if regex:
            hint += " A string is a regex for whole names of modules; give a list for the last parts of names."
        return f"{text}{notes} {hint}".strip()

    # ---- checks before anything changes
    def check(self, target: Target) -> None:
        module, tuner = target.node.module, self.tuner
        tuner._check_target_module_compatiblity(self.cfg, self.model, target.node.leaf)
        if target.parameter is not None:
            adapted = isinstance(module, AdapterLayer) and not issubclass(module.kind, kinds.Parameter)
            if adapted or target.node.key in self.whole:
                raise ValueError(
                    f"Parameter {target.key!r} belongs to a module that is adapted as a whole: target either the "
                    "module or its parameters."
                )
            tuner.check_target(self.cfg, target.key, module)
            return
        base = module.get_base_layer() if isinstance(module, AdapterLayer) else module
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise ValueError(
                f"Target module {target.key!r} is trained in full or has trainable tokens already; take it out of "
                "target_modules or out of modules_to_save."
            )
        if not tuner.accepts(base, self.cfg):
            raise tuner.unsupported_error(
                f"Target module {target.key} ({base}) is not supported by {tuner.method_label}. Currently, only the "
                "following kinds of modules are supported: "
                f"{', '.join('`' + k + '`' for k in tuner.supported_kinds())}.{self._near_supported(target.key)}"
            )
        storage, need = resolve(base), tuner.layer_cls.weight_need
        if storage.label is not None and (need == "train" or (need == "read" and not storage.readable)):
            raise TypeError(
                f"Target module {target.key}: {tuner.method_label} has to {need} the weight, which the {storage.label} "
                "format does not allow. Load the base model unquantised, or use a method such as LoRA."
            )
        tuner.check_target(self.cfg, target.key, base)

    def _near_supported(self, key: str) -> str:
        inside = [n.key for n in self.nodes if n.key.startswith(key + ".") and self.tuner.accepts(n.module, self.cfg)]
        return f" Inside it there are {inside[:4]}." if inside else ""

    # ---- changing the model
    def apply(self, targets: list[Target]) -> None:
        """Through the methods of the tuner that other frameworks replace."""
        tuner, cfg = self.tuner, self.cfg
        self.parameters = [t for t in targets if t.parameter is not None]
        tuner._injection = self
        try:
            for node in (t.node for t in targets if t.parameter is None):
                module: Any = node.parent._modules[node.leaf]
                tuner._create_and_replace(cfg, self.name, module, node.leaf, node.parent, node.key)
            if self.parameters:
                tuner._inject_parameters(cfg, self.model, self.name, self.low_cpu)
        finally:
            del tuner._injection

    def apply_parameters(self) -> None:
        for target in self.parameters:
            node = target.node
            module: Any = node.parent._modules[node.leaf]  # of several parameters of one module: a wrapper by now
            self.tuner._create_and_replace(
                self.cfg, self.name, module, node.leaf, node.parent, node.key, parameter_name=target.parameter
            )

    def place(
        self, cfg: Any, module: Any, leaf: str, parent: nn.Module, key: str, parameter: str | None = None
    ) -> None:
        target = Target(Node(key, module, parent, leaf), parameter)
        tuner, name = self.tuner, self.name
        cfg = tuner.layer_config(cfg, target.key, module)
        layer = self._existing(module, target)
        if layer is None:
            kind = kinds.parameter_kind(parameter) if parameter is not None else None
            try:
                layer = tuner.make_layer(module, kind, cfg, target.key)
            except ValueError as error:  # of a kind, which does not know where the module is
                raise ValueError(f"Target {target.key!r}: {error}") from error
            self._replace(target.node, layer, module)
        else:
            self.undo.append(lambda layer=layer: layer.drop(name))
        tuner.link_shared(layer)
        with OnMeta() if self.low_cpu or layer.home() == _META else contextlib.nullcontext():
            layer.make_adapter(name, cfg)
        if layer.settle_adapter(name, cfg):
            self.half.append(layer)
        self.layers[target.key] = layer
        (self.report.modules if parameter is None else self.report.parameters).append(target.key)

    def _existing(self, module: nn.Module, target: Target) -> AdapterLayer | None:
        """The layer of this method (and this parameter) that already wraps the module, at any depth of nesting."""
        layer = module
        while isinstance(layer, AdapterLayer):
            same_part = not issubclass(layer.kind, kinds.Parameter) or layer.kind.weight_name == target.parameter
            if isinstance(layer, self.tuner.layer_cls) and same_part:
                return layer
            layer = layer.base_layer
        return None

    def _replace(self, node: Node, new: nn.Module, old: nn.Module) -> None:
        setattr(node.parent, node.leaf, new)
        self.wraps = True
        self.undo.append(lambda: setattr(node.parent, node.leaf, old))

    def roll_back(self) -> None:
        for step in reversed(self.undo):
            step()
        self.tuner.forget_layers()
