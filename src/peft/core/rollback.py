# SPDX-License-Identifier: Apache-2.0
"""A failed call changes nothing: configuration and gradients as they were."""

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

from .modules import parameters

if TYPE_CHECKING:
    from ..config import PeftConfig


@contextlib.contextmanager
def unchanged_on_error(model: nn.Module | None, config: "PeftConfig | None") -> Iterator[None]:
    """Give the configuration its values and the parameters their requires_grad back when the body raises."""
    values = (
        {}
        if config is None
        else {k: copy.copy(v) if isinstance(v, (list, dict, set)) else v for k, v in vars(config).items()}
    )
    trainable = [] if model is None else [(p, p.requires_grad) for p in parameters(model)]
    attributes = {} if model is None else model.__dict__
    had_configs = attributes.get("peft_config")
    try:
        yield
    except BaseException:
        if config is not None:
            vars(config).clear()
            vars(config).update(values)
        for parameter, flag in trainable:
            if parameter.is_leaf:
                parameter.requires_grad_(flag)
        if had_configs is None:
            attributes.pop("peft_config", None)
        raise
