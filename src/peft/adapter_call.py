# SPDX-License-Identifier: Apache-2.0
"""What surrounds one call of an adapted model: data for the layers (mixed batches), repeated for beam search."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .config import nearest
from .core.tuner import TunerModel

# Arguments for layers; the base model never sees them.
SPECIAL_ARGUMENTS = frozenset({"adapter_names", "alora_offsets"})
BASE = "__base__"


class AdapterCall:
    """Opens the call's data for the layers; `with` gives the arguments that the base model gets.

    The data are cleared on errors and after inference. While gradients are on they stay until the next call, since
    backward may recompute layers. A class, not a generator: every release of torch.compile traces it.
    """

    def __init__(self, peft_model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], generate: bool = False):
        self.peft_model, self.args, self.kwargs, self.generate = peft_model, args, dict(kwargs), generate
        self.call: Any = None
        self.hooks: list[RemovableHandle] = []

    def __enter__(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs, tuner = self.kwargs, self.peft_model.base_model
        names = kwargs.pop("adapter_names", None)
        if not isinstance(tuner, TunerModel):
            if names is not None:
                raise ValueError(
                    "`adapter_names` is not possible with prompt learning: a prompt belongs to the whole batch."
                )
            kwargs.pop("alora_offsets", None)
            return self.args, kwargs
        self.call = call = tuner.switch.call
        call.clear()
        call.generating = self.generate
        try:
            if names is not None and not tuner.switch.disabled:
                call.adapter_names = check_adapter_names(self.peft_model, names)
                if self.generate:
                    self._repeat(call.adapter_names)
            kwargs = tuner.call_arguments(kwargs)
        except BaseException:
            self._close(failed=True)
            raise
        return self.args, {k: v for k, v in kwargs.items() if k not in SPECIAL_ARGUMENTS}

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._close(failed=kind is not None)

    def _close(self, failed: bool) -> None:
        for hook in self.hooks:
            hook.remove()
        if self.call is not None and (failed or not torch.is_grad_enabled()):
            self.call.clear()

    def _repeat(self, names: tuple[str, ...]) -> None:
        """Names for repeated samples; the encoder of an encoder-decoder runs before they are repeated."""
        base = getattr(self.peft_model.base_model, "model", self.peft_model.base_model)
        beams = _expansion(base, self.kwargs)
        if beams <= 1:
            return
        many = tuple(n for n in names for _ in range(beams))
        self._set_names(many)
        if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
            encoder: nn.Module = base.get_encoder()  # type: ignore[operator]
            self.hooks.append(encoder.register_forward_pre_hook(lambda *_: self._set_names(names)))
            self.hooks.append(encoder.register_forward_hook(lambda *_: self._set_names(many)))

    def _set_names(self, names: tuple[str, ...]) -> None:
        self.call.adapter_names, self.call.rows = names, None


def check_adapter_names(peft_model: Any, names: Sequence[str]) -> tuple[str, ...]:
    """The adapter of each row of a mixed batch, after all checks."""
    tuner = peft_model.base_model
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(
            f"`adapter_names` must be a list or tuple with one name for each sample, got {type(names).__name__}."
        )
    if peft_model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    known = set(peft_model.peft_config)
    missing = [n for n in dict.fromkeys(names) if n not in known and n != BASE]
    if missing:
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(sorted(map(str, missing)))}. Available: "
            f"{', '.join(sorted(known))}, or {BASE!r} for none.{''.join(nearest(n, known) for n in missing)}"
        )
    layers = tuner.layers()
    if not layers:
        raise ValueError(f"{type(tuner).__name__} has no adapter layers, so `adapter_names` is not possible with it.")
    if any(layer.merged_adapters for layer in layers):
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    return tuple(names)


def _expansion(base: Any, kwargs: dict[str, Any]) -> int:
    """How often `generate` repeats each sample."""
    config = kwargs.get("generation_config") or getattr(base, "generation_config", None)
    values = (kwargs.get(n) or getattr(config, n, None) or 1 for n in ("num_beams", "num_return_sequences"))
    return max(values)
