# SPDX-License-Identifier: Apache-2.0
"""Prompt inputs: the only place that turns a prompt and the arguments of a call into arguments of the base model.

Order of the parts: embeddings, attention mask, labels, token types, positions, key/value cache. Used for the forward of
every task and for each step of generation. Virtual tokens come first: [prompt, pads, text].
"""

import functools
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from .core.prompt import BasePromptEncoder, active_encoder, find_word_embeddings, is_checkpointing
from .prompt_cache import cache_length, new_cache, with_room, write_prefix
from .utils.peft_types import PeftType

Call = dict[str, Any]


@dataclass(frozen=True)
class InputRule:
    """What a task's inputs look like to a prompt."""

    token_labels: bool = False  # `labels` has one entry per token: -100 for virtual tokens
    token_types: bool = False  # token_type_ids are kept, 0 for virtual tokens; otherwise dropped with a warning
    encoder_decoder: bool = False
    pools: bool = False  # one output a sample; decoders take it from the last token that is no padding


def _accepts(method: Any, name: str) -> bool:
    """Whether a (decorated) method has a parameter `name`. Read from its code: this runs in every forward."""
    while hasattr(method, "__wrapped__"):
        method = method.__wrapped__
    code = getattr(getattr(method, "__func__", method), "__code__", None)
    if code is None:
        return name in inspect.signature(method).parameters
    return name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


def _batch_size(call: Call) -> int:
    for name in ("input_ids", "inputs_embeds"):
        if call.get(name) is not None:
            return call[name].shape[0]
    raise ValueError("You have to provide either input_ids or inputs_embeds.")


# ---- the prompt itself
def get_prompt(
    peft_model: Any, batch_size: int, task_ids: torch.Tensor | None = None, max_cache_len: int | None = None
) -> Any:
    """The active prompt for a batch: embeddings [b, n, d], or a cache filled with the prefix."""
    encoder = peft_model.prompt_encoder[peft_model.active_adapter]
    if encoder.produces == "embeds":
        return _embeds(peft_model, encoder, batch_size, task_ids)
    cache = new_cache(peft_model.base_model, peft_model.active_peft_config, max_cache_len)
    return _fill(peft_model, encoder, cache, batch_size)


def _tokens(peft_model: Any, encoder: BasePromptEncoder) -> torch.Tensor:
    """Indices [1, n] on the encoder's device (moved once)."""
    name = peft_model.active_adapter
    tokens = peft_model.prompt_tokens[name]
    if tokens.device != encoder.device:
        tokens = peft_model.prompt_tokens[name] = tokens.to(encoder.device)
    return tokens.unsqueeze(0)


def _embeds(peft_model: Any, encoder: BasePromptEncoder, batch: int, task_ids: torch.Tensor | None) -> torch.Tensor:
    encoder.settle(encoder)
    rows = encoder(_tokens(peft_model, encoder), task_ids)
    if rows.shape[0] not in (1, batch):
        raise ValueError(
            f"task_ids has {rows.shape[0]} entries for a batch of {batch}: give one for all, or one for each sample."
        )
    return rows.expand(batch, -1, -1)


def _fill(peft_model: Any, encoder: BasePromptEncoder, cache: Any, batch: int) -> Any:
    """Write the prefix into an empty cache."""
    config = peft_model.active_peft_config
    rows = encoder(_tokens(peft_model, encoder)[:, : config.num_virtual_tokens])
    dtype = getattr(peft_model.base_model, "dtype", None)
    return write_prefix(cache, rows.to(dtype or rows.dtype), config, peft_model.base_model, batch)


# ---- parts of the inputs
def _extend(values: torch.Tensor, n: int, fill: int) -> torch.Tensor:
    """n columns of `fill` in front, in the dtype of `values`."""
    return torch.cat([values.new_full((*values.shape[:-1], n), fill), values], dim=-1)


def _extend_mask(call: Call, name: str, n: int, embeds: bool) -> None:
    """Let every token see the n virtual ones. A 4-D mask only works with a cache: embeddings need new query rows."""
    mask = call.get(name)
    if mask is None:
        return
    if mask.ndim == 2:
        call[name] = _extend(mask, n, 1)
    elif embeds:
        raise ValueError(f"{name} has shape {list(mask.shape)}: this method needs a 2-D mask [batch, tokens].")
    else:  # boolean: True is visible; float: added to the scores
        call[name] = _extend(mask, n, 1 if mask.dtype == torch.bool else 0)


def _drop(call: Call, name: str, label: str) -> None:
    if call.pop(name, None) is not None:
        warnings.warn(
            f"{label} are not supported for parameter efficient tuning. Ignoring {label.lower()}.", stacklevel=4
        )


def _input_embeds(peft_model: Any, call: Call, name: str = "") -> torch.Tensor:
    """Take the (decoder) embeddings out of the call, made from the ids if need be."""
    ids, embeds = call.pop(f"{name}input_ids", None), call.pop(f"{name}inputs_embeds", None)
    return find_word_embeddings(peft_model)(ids) if embeds is None else embeds


def _join(prompt: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
    return torch.cat([prompt.to(device=embeds.device, dtype=embeds.dtype), embeds], dim=1)


# ---- forward
def prepare_forward(peft_model: Any, rule: InputRule, call: Call) -> Call:
    """Arguments of the base model for a forward with the active prompt. `call` holds what was given, without None."""
    encoder = peft_model.prompt_encoder[peft_model.active_adapter]
    call = dict(call)
    task_ids = call.pop("task_ids", None)
    if not rule.token_types:
        _drop(call, "token_type_ids", "Token type ids")
    if encoder.produces == "kv":
        return _kv_inputs(peft_model, encoder, rule, call)
    if rule.encoder_decoder:
        return _seq2seq_embeds(peft_model, encoder, call, task_ids)
    return _embed_inputs(peft_model, encoder, rule, call, task_ids)


def _kv_inputs(peft_model: Any, encoder: BasePromptEncoder, rule: InputRule, call: Call) -> Call:
    base, nv = peft_model.base_model, peft_model.active_peft_config.num_virtual_tokens
    if peft_model.training and is_checkpointing(base):
        raise RuntimeError(
            "Gradient checkpointing is enabled, which drops the cache that holds the prefix: disable it."
        )
    _extend_mask(call, "decoder_attention_mask" if rule.encoder_decoder else "attention_mask", nv, embeds=False)
    return _with_prefix(peft_model, encoder, call, _batch_size(call))


def _with_prefix(peft_model: Any, encoder: BasePromptEncoder, call: Call, batch: int) -> Call:
    """Positions behind the prefix, and a cache that holds it; one with content comes from an earlier call and does."""
    config, cache = peft_model.active_peft_config, call.get("past_key_values")
    if call.get("position_ids") is not None:
        call["position_ids"] = call["position_ids"] + config.num_virtual_tokens
    if cache_length(cache) == 0:
        cache = new_cache(peft_model.base_model, config) if cache is None else cache
        call["past_key_values"] = _fill(peft_model, encoder, cache, batch)
    return call


def _embed_inputs(peft_model: Any, encoder: BasePromptEncoder, rule: InputRule, call: Call, task_ids: Any) -> Call:
    nv, batch = peft_model.active_peft_config.num_virtual_tokens, _batch_size(call)
    _extend_mask(call, "attention_mask", nv, embeds=True)
    _drop(call, "position_ids", "Position ids")
    if cache_length(call.get("past_key_values")) > 0:
        return call
    if rule.token_labels and call.get("labels") is not None:
        call["labels"] = _extend(call["labels"], nv, -100)
    if call.get("token_type_ids") is not None:
        call["token_type_ids"] = _extend(call["token_type_ids"], nv, 0).long()
    embeds = _input_embeds(peft_model, call)
    call["inputs_embeds"] = _join(_embeds(peft_model, encoder, batch, task_ids), embeds)
    return call


def _encoder_embeds(peft_model: Any, encoder: BasePromptEncoder, call: Call, task_ids: Any) -> torch.Tensor:
    """Put the prompt in front of the encoder inputs; returns the rows for the decoder."""
    nv = peft_model.active_peft_config.num_virtual_tokens
    prompt = _embeds(peft_model, encoder, _batch_size(call), task_ids)
    _extend_mask(call, "attention_mask", nv, embeds=True)
    _drop(call, "position_ids", "Position ids")
    call["inputs_embeds"] = _join(prompt[:, :nv], _input_embeds(peft_model, call))
    return prompt[:, nv:]


def _seq2seq_embeds(peft_model: Any, encoder: BasePromptEncoder, call: Call, task_ids: Any) -> Call:
    config, prompt = peft_model.active_peft_config, _encoder_embeds(peft_model, encoder, call, task_ids)
    if not encoder.feeds_decoder or config.num_transformer_submodules != 2:
        return call
    if call.get("decoder_input_ids") is None and call.get("decoder_inputs_embeds") is None:
        if call.get("labels") is None:
            raise ValueError("You have to provide decoder_input_ids, decoder_inputs_embeds or labels.")
        from .utils.other import shift_tokens_right

        model_config = peft_model.base_model.config
        call["decoder_input_ids"] = shift_tokens_right(
            call["labels"], model_config.pad_token_id, model_config.decoder_start_token_id
        )
    _extend_mask(call, "decoder_attention_mask", config.num_virtual_tokens, embeds=True)
    if call.get("labels") is not None:
        call["labels"] = _extend(call["labels"], config.num_virtual_tokens, -100)
    call["decoder_inputs_embeds"] = _join(prompt, _input_embeds(peft_model, call, "decoder_"))
    return call


def prompt_forward(peft_model: Any, rule: InputRule, call: Call) -> Any:
    """Run the base model with the active prompt; the method's own loss replaces the model's where it has one."""
    encoder = peft_model.prompt_encoder[peft_model.active_adapter]
    arguments = {name: call.pop(name, None) for name in encoder.loss_arguments}
    labels = call.pop("labels", None) if encoder.has_loss() else None
    inputs = prepare_forward(peft_model, rule, call)
    base = peft_model.base_model
    if encoder.produces == "kv" and not _accepts(base.forward, "past_key_values"):
        with _cache_for_backbone(peft_model, inputs.pop("past_key_values")):
            return base(**inputs)
    with _ids_for_pooling(peft_model, rule, inputs) if encoder.produces == "embeds" else nullcontext():
        output = base(**inputs)
    if labels is None:
        return output
    logits = output[0]
    loss = encoder.loss(logits, labels, **arguments)
    if isinstance(output, tuple):
        return (loss, *output)
    output["loss"] = loss
    return output


@contextmanager
def _ids_for_pooling(peft_model: Any, rule: InputRule, inputs: Call) -> Iterator[None]:
    """Show classifying decoders where the padding is: they find it in ids, not in embeddings."""
    base, mask, embeds = peft_model.base_model, inputs.get("attention_mask"), inputs.get("inputs_embeds")
    pad = getattr(base.config, "pad_token_id", None)
    if not rule.pools or not hasattr(base, "score") or pad is None or mask is None or embeds is None:
        yield
        return
    inputs["input_ids"] = torch.where(mask.bool(), 1 if pad == 0 else 0, pad)
    del inputs["inputs_embeds"]
    with shadowed(find_word_embeddings(peft_model), "forward", lambda *args, **kwargs: embeds):
        yield


@contextmanager
def _cache_for_backbone(peft_model: Any, cache: Any) -> Iterator[None]:
    """Hand the cache to the backbone inside a task model whose own forward takes none: head and loss stay its own.

    The forward is shadowed on the instance: local to a replica under data parallelism, unlike hooks.
    """
    base = peft_model.base_model
    name = vars(peft_model).get("transformer_backbone_name")
    backbone = base if name is None else getattr(base, name)
    if backbone is base or not _accepts(backbone.forward, "past_key_values"):
        raise ValueError(
            f"{type(base).__name__} does not work with this method: neither it nor its backbone ({name or 'none'}) "
            "takes past_key_values. Use a method that works on embeddings, e.g. prompt tuning."
        )
    with shadowed(backbone, "forward", functools.partial(backbone.forward, past_key_values=cache)):
        yield


@contextmanager
def shadowed(module: torch.nn.Module, name: str, value: Any) -> Iterator[None]:
    """Set an instance attribute of a module for a while."""
    own = vars(module)
    before = {name: own[name]} if name in own else {}
    own[name] = value
    try:
        yield
    finally:
        own.pop(name, None)
        own.update(before)


# ---- generation
def prepare_generation(peft_model: Any, args: tuple[Any, ...], kwargs: Call, task_ids: Any = None) -> Call:
    """One step of generation: the base model prepares its inputs from a mask, positions and cache with the prompt."""
    prepare = peft_model.base_model_prepare_inputs_for_generation
    encoder = active_encoder(peft_model)
    if encoder is None:
        inputs = prepare(*args, **kwargs)
        if peft_model.peft_type == PeftType.POLY:
            inputs["task_ids"] = task_ids
        inputs.pop("cache_position", None)
        return inputs
    kwargs = dict(kwargs)
    input_ids = args[0] if args else kwargs.pop("input_ids")
    nv, base = peft_model.active_peft_config.num_virtual_tokens, peft_model.base_model
    is_encoder_decoder = bool(getattr(base.config, "is_encoder_decoder", False))
    if kwargs.get("use_cache") is False:  # some models return a cache all the same
        kwargs["past_key_values"] = None
    cache = kwargs.get("past_key_values")
    fresh = cache_length(cache) == 0
    if fresh and cache is not None:
        kwargs["past_key_values"] = cache = with_room(cache, nv, base)
    mask = "decoder_attention_mask" if is_encoder_decoder else "attention_mask"
    _extend_mask(kwargs, mask, nv, embeds=False)
    if encoder.produces == "kv":
        inputs = prepare(input_ids, **_with_prefix(peft_model, encoder, kwargs, len(input_ids)))
        return _without_text_positions(inputs, mask, kwargs)
    kwargs.pop("position_ids", None)  # made by generate from the mask of the text
    kwargs.pop("token_type_ids", None)
    embeds = kwargs.pop("inputs_embeds", None)
    if not fresh:
        inputs = prepare(input_ids, **kwargs)
    else:
        embeds = find_word_embeddings(peft_model)(input_ids) if embeds is None else embeds
        embeds = _join(_embeds(peft_model, encoder, embeds.shape[0], task_ids), embeds)
        kwargs.pop("next_sequence_length", None)  # counts text tokens
        if _accepts(prepare, "is_first_iteration"):
            kwargs["is_first_iteration"] = (
                True  # else the embeddings are ignored; without a cache each step is a first one
            )
        inputs = prepare(input_ids, inputs_embeds=embeds, **kwargs)
        inputs["input_ids"], inputs["inputs_embeds"] = None, embeds
    inputs.pop("position_ids", None)
    return _without_text_positions(inputs, mask, kwargs)


def _without_text_positions(inputs: Call, mask: str, given: Call) -> Call:
    """Positions of transformers 4, and the 4-D masks it makes from them, do not count the prompt: the model's do."""
    inputs.pop("cache_position", None)
    if given.get("cache_position") is not None and given.get(mask) is not None:
        inputs[mask] = given[mask]
    return inputs


def prepare_seq2seq_generation(peft_model: Any, encoder: BasePromptEncoder, kwargs: Call) -> Call:
    """Arguments of `generate` of an encoder-decoder with a prompt in front of the encoder inputs."""
    kwargs = dict(kwargs)
    task_ids = kwargs.pop("task_ids", None)
    if kwargs.pop("encoder_outputs", None) is not None:
        warnings.warn(
            "`encoder_outputs` should not be passed to `generate` when using prompt tuning. Ignoring it.", stacklevel=3
        )
    _drop(kwargs, "token_type_ids", "Token type ids")
    _encoder_embeds(peft_model, encoder, kwargs, task_ids)
    return kwargs
