# SPDX-License-Identifier: Apache-2.0
"""What the initialisations from data share: the target layers before injection, cache files, eval mode."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...core import kinds
from ...core.match import Matcher
from ...core.targets import default_targets
from ...core.tuner import TunerModel
from ...storage.base import is_quantised
from ..tuners_utils import _maybe_include_all_linear_layers


def target_layers(model: nn.Module, cfg: Any) -> dict[str, nn.Module]:
    """The linear layers that the configuration targets, by name.

    `target_modules` is filled from the defaults if it is None.
    """
    if cfg.target_modules is None:
        model_type = TunerModel.get_model_config(model).get("model_type", "custom")
        found = default_targets("lora", model_type)
        if found is None:
            raise ValueError(
                f"Please specify `target_modules` in `peft_config`: no defaults for model type {model_type!r}."
            )
        cfg.target_modules = found if isinstance(found, str) else set(found)
    matcher = Matcher(_maybe_include_all_linear_layers(cfg.with_values(), model))
    matched = ((name, module) for name, module in model.named_modules() if matcher.match(name))
    return {n: m for n, m in matched if (kind := kinds.kind_of(m)) is not None and kind.is_linear}


def refuse_quantised(layers: dict[str, nn.Module], what: str) -> None:
    for name, module in layers.items():
        if is_quantised(module):
            raise ValueError(f"{what} needs float weights, {name!r} is quantised. Load the base model unquantised.")


def cached(path: str | None, names: Iterable[str]) -> dict[str, torch.Tensor] | None:
    """What the file at `path` holds for `names`; None if there is no such file yet, or an empty one."""
    if not (path and os.path.exists(path) and os.path.getsize(path)):
        return None
    stored = torch.load(path, map_location="cpu", weights_only=True)
    if missing := [n for n in names if n not in stored]:
        raise ValueError(
            f"The file {path} lacks {missing[0]!r}: it was made for other layers. Delete it to compute it again."
        )
    return stored


def save(path: str | None, value: dict[str, torch.Tensor]) -> None:
    """Write what `cached` reads, if there is a path."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        partial = f"{path}.{os.getpid()}.part"
        torch.save({name: tensor.cpu() for name, tensor in value.items()}, partial)
        os.replace(partial, path)


@contextlib.contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Train or eval mode within the block; every module gets its own mode back."""
    before = [(m, m.training) for m in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, flag in before:
            module.training = flag
