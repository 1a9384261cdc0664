# SPDX-License-Identifier: Apache-2.0
"""What surrounds one call of an adapted model: data for the layers (mixed batches), repeated for beam search."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .config import nearest
from .core.tuner import TunerModel

# Arguments for layers; the base model never sees them.
SPECIAL_ARGUMENTS = frozenset({"adapter_names", "alora_offsets"})
BASE = "__base__"


@contextlib.contextmanager
def adapter_call(
    peft_model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], generate: bool = False
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Open the call's data for the layers and yield the arguments that the base model gets.

    Cleared on errors and after inference. While gradients are on it stays until the next call, since backward may
    recompute layers.
    """
    kwargs = dict(kwargs)
    names = kwargs.pop("adapter_names", None)
    tuner = peft_model.base_model
    if not isinstance(tuner, TunerModel):
        if names is not None:
            raise ValueError(
                "`adapter_names` is not possible with prompt learning: a prompt belongs to the whole batch."
            )
        kwargs.pop("alora_offsets", None)
        yield args, kwargs
        return
    call = tuner.switch.call
    call.clear()
    call.generating = generate
    with contextlib.ExitStack() as stack:
        stack.callback(_clear_if_done, call)
        if names is not None and not tuner.switch.disabled:
            names = check_adapter_names(peft_model, names)
            call.adapter_names = names
            if generate and (beams := _expansion(peft_model, kwargs)) > 1:
                stack.enter_context(_repeated(peft_model, call, names, beams))
        try:
            kwargs = stack.enter_context(tuner.call_context(kwargs))
            yield args, {k: v for k, v in kwargs.items() if k not in SPECIAL_ARGUMENTS}
        except BaseException:
            call.clear()
            raise


def _user_model(peft_model: Any) -> Any:
    return getattr(peft_model.base_model, "model", peft_model.base_model)


def _clear_if_done(call: Any) -> None:
    if not torch.is_grad_enabled():
        call.clear()


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


def _expansion(peft_model: Any, kwargs: dict[str, Any]) -> int:
    """How often `generate` repeats each sample."""
    config = kwargs.get("generation_config") or getattr(_user_model(peft_model), "generation_config", None)
    values = (kwargs.get(n) or getattr(config, n, None) or 1 for n in ("num_beams", "num_return_sequences"))
    return max(values)


@contextlib.contextmanager
def _repeated(peft_model: Any, call: Any, names: tuple[str, ...], beams: int) -> Iterator[None]:
    """Names for repeated samples; the encoder of an encoder-decoder runs once a sample, before they are repeated."""

    def set_names(new: tuple[str, ...]) -> None:
        call.adapter_names, call.rows = new, None

    many = tuple(n for n in names for _ in range(beams))
    set_names(many)
    base = _user_model(peft_model)
    config = getattr(base, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        yield
        return
    encoder: nn.Module = base.get_encoder()
    before = encoder.register_forward_pre_hook(lambda *_: set_names(names))
    after = encoder.register_forward_hook(lambda *_: set_names(many))
    try:
        yield
    finally:
        before.remove()
        after.remove()
