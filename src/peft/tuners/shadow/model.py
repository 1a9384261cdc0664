# SPDX-License-Identifier: Apache-2.0
"""ShadowPEFT on a whole model.

s_0 = P · shadow network(inputs), a small decoder of its own; then each block corrects and updates the state (layer.py)
loss = loss of the model + λ · loss(head(s_0)):  the shadow network alone learns the task too
"""

import copy as copying
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...core.layer import AdapterLayer
from ...core.tuner import TunerModel
from ...registry import register_method
from . import backbone
from .config import ShadowConfig
from .layer import ShadowLayer, ShadowState

NAME_IN_FILES = "default"
_HELD = ("shadow_backbone", "shadow_projection", "shadow_head")
_PASSED = ("attention_mask", "position_ids", "cache_position", "token_type_ids")


@register_method("shadow", config=ShadowConfig)
class ShadowModel(TunerModel):
    """Owns the shadow networks. Hooks on the decoder run them before its blocks, whoever calls the decoder."""

    layer_cls = ShadowLayer
    uses_shared_state = True
    condense_targets = False

    def _surround(self, *args: Any, **kwargs: Any) -> None:
        super()._surround(*args, **kwargs)
        self.shadow_backbone, self.shadow_projection = nn.ModuleDict(), nn.ModuleDict()
        self.shadow_head = nn.ModuleDict()
        self.last_shadow_loss: torch.Tensor | None = None  # upstream makes it in the first forward

    @property
    def decoder(self) -> Any:
        return backbone.find_decoder(self.model)

    # ---- injection
    def check_config(self, name: str, cfg: Any) -> None:
        super().check_config(name, cfg)
        others = [c for n, c in self.peft_config.items() if n != name]
        if others and any(c.task_type == "SEQ_CLS" for c in (cfg, *others)):
            raise ValueError(
                "ShadowPEFT has only one adapter on a model for sequence classification: its head is copied."
            )

    def default_targets(self, cfg: Any, model: nn.Module) -> set[str]:
        """All blocks of the decoder, or those of `layers_to_transform`, under their full names."""
        blocks = backbone.block_list(backbone.find_decoder(model))
        key = next(k for k, m in model.named_modules() if m is blocks)
        wanted = cfg.layers_to_transform
        indices = range(len(blocks)) if wanted is None else {wanted} if isinstance(wanted, int) else set(wanted)
        return {f"{key}.{i}" for i in indices}

    def check_target(self, cfg: Any, key: str, module: nn.Module) -> None:
        if not module._modules:
            raise ValueError(f"Target module {key} ({module}) is no transformer block; ShadowPEFT adapts whole blocks.")

    def layer_config(self, cfg: Any, key: str, module: nn.Module) -> Any:
        return cfg.with_values(hidden_size=backbone.width(self.decoder))

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            self.on_delete(adapter_name)
            raise
        if len(self.shadow_backbone) == 1:
            self.strip(model)
            self.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True)
            self.decoder.register_forward_hook(self._after_decoder)
            model.register_forward_hook(self._after_model, with_kwargs=True)

    def after_inject(self, name: str, cfg: Any, layers: dict[str, AdapterLayer]) -> None:
        """Number the blocks."""
        for i, layer in enumerate(layers.values()):
            layer.place[name] = (i, i == len(layers) - 1)  # type: ignore[operator]

    def shared(self, name: str, cfg: Any, targets: dict[str, nn.Module]) -> None:
        """Make the shadow network before the blocks: the order of the published draws."""
        like = next(self.model.parameters())
        made = backbone.make_backbone(cfg, self.decoder)
        self.shadow_backbone[name], self.shadow_projection[name] = (m.to(like.device, like.dtype) for m in made)
        if cfg.task_type == "SEQ_CLS":
            head = next(getattr(self.model, n) for n in ("score", "classifier") if hasattr(self.model, n))
            self.shadow_head[name] = copying.deepcopy(getattr(head, "original_module", head))

    def _activate(self, name: str, cfg: Any, layers: dict[str, AdapterLayer]) -> None:
        super()._activate(name, cfg, layers)
        self._train_own(name, name in self.switch.active and not cfg.inference_mode)

    # ---- switching
    def own_modules(self, name: str) -> dict[str, nn.Module]:
        return {k: getattr(self, k)[name] for k in _HELD if name in getattr(self, k)}

    def _train_own(self, name: str, requires_grad: bool) -> None:
        for slot, module in self.own_modules(name).items():
            cfg, trained = self.peft_config[name], list(module.parameters())
            module.requires_grad_(False)
            if slot == "shadow_backbone":
                trained = backbone.trained_parameters(cfg, module)
            for parameter in trained:
                parameter.requires_grad_(requires_grad)

    def set_adapter(self, adapter_name: Any, inference_mode: bool = False) -> None:
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if len(names) > 1:
            raise ValueError(f"ShadowPEFT has one active adapter at a time, got {names}.")
        super().set_adapter(adapter_name, inference_mode)
        for name in self.shadow_backbone:
            self._train_own(name, name in names and not inference_mode)

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self._train_own(name, requires_grad)

    def on_delete(self, name: str) -> None:
        for slot in self.own_modules(name):
            del getattr(self, slot)[name]

    # ---- calls
    def call_arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        if self.switch.call.adapter_names is not None:
            raise ValueError(
                "Mixed batches are not possible with ShadowPEFT: its shadow network reads the whole batch."
            )
        return kwargs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)  # with the hooks below

    def _active(self) -> str | None:
        name = next(iter(self.switch.at_work), None)
        return name if name is not None and name in self.shadow_backbone else None

    def _before_decoder(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the shadow network on the same inputs; the decoder gets its own part of a ShadowCache."""
        call, name = self.switch.call, self._active()
        call.shadow = None
        given = arguments(decoder, args, kwargs)
        cache, shadow_cache = given.get("past_key_values"), None
        if cache is not None and hasattr(cache, "shadow"):
            cache, shadow_cache = cache.base, cache.shadow
        elif name is not None and cache is not None and cache.get_seq_length() > 0:
            raise ValueError(
                "The cache was filled without the shadow network; pass the `past_key_values` that this model returned."
            )
        if name is not None:
            call.shadow = self._start(name, decoder, {**given, "past_key_values": shadow_cache})
        return None if cache is given.get("past_key_values") else ((), {**given, "past_key_values": cache})

    def _start(self, name: str, decoder: Any, given: dict[str, Any]) -> ShadowState:
        network: Any = self.shadow_backbone[name]
        known = inspect.signature(network.forward).parameters
        call = {k: given[k] for k in _PASSED if k in known and given.get(k) is not None}
        embeds, cache = given.get("inputs_embeds"), given["past_key_values"]
        if backbone.shares_embeddings(self.peft_config[name], decoder, network):
            call["inputs_embeds"] = decoder.get_input_embeddings()(given["input_ids"]) if embeds is None else embeds
        else:
            call |= {k: given[k] for k in ("input_ids", "inputs_embeds") if given.get(k) is not None}
        if "use_cache" in known:
            use = given.get("use_cache")
            call["use_cache"] = decoder.config.use_cache if use is None else use
            if cache is not None:
                call["past_key_values"] = cache
        mask = call.get("attention_mask")
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 2):
            new = given["input_ids"] if embeds is None else embeds
            call["attention_mask"] = cropped(mask, new.shape[1] + (0 if cache is None else cache.get_seq_length()))
        out = network(**call)
        start = self.shadow_projection[name](out[0])
        return ShadowState(start, {0: start}, getattr(out, "past_key_values", None))

    def _after_decoder(self, decoder: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        """The two caches leave as one; the states are kept until backward is through with them."""
        state = self.switch.call.shadow
        if state is None:
            return out
        if not torch.is_grad_enabled():
            state.before.clear()
        elif state.start.requires_grad:
            state.start.register_hook(lambda grad: state.before.clear())
        cache = getattr(out, "past_key_values", None)
        if cache is not None and state.cache is not None:
            from .cache import ShadowCache

            out.past_key_values = ShadowCache(cache, state.cache)
        return out

    def _after_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """Add the loss of the shadow network alone to that of the model."""
        call, name = self.switch.call, self._active()
        state, call.shadow = call.shadow, call.shadow if torch.is_grad_enabled() else None
        if state is None or name is None:
            return out
        given = arguments(model, args, kwargs)
        weight, labels = self.peft_config[name].auxiliary_loss_weight, given.get("labels")
        self.last_shadow_loss = None
        if not weight or labels is None:
            return out
        aux = self._auxiliary_loss(name, state.start, labels, given)
        if aux is None:
            return out
        self.last_shadow_loss = aux.detach()
        if isinstance(out, tuple):
            return (out[0] + weight * aux.to(out[0].device), *out[1:])
        out.loss = out.loss + weight * aux.to(out.loss.device)
        out.shadow_loss = self.last_shadow_loss  # an attribute, no entry: loops over outputs take entries for logits
        return out

    def _auxiliary_loss(self, name: str, start: torch.Tensor, labels: torch.Tensor, given: dict) -> torch.Tensor | None:
        task = self.peft_config[name].task_type
        if task == "CAUSAL_LM":
            keep = given.get("logits_to_keep", 0)  # the labels are those of the positions kept
            start = start[:, slice(-keep, None) if isinstance(keep, int) else keep]
            logits = self.model.get_output_embeddings()(start)  # type: ignore[operator]
            return causal_loss(logits, labels)
        if task == "SEQ_CLS":
            logits = self.shadow_head[name](start)
            return classification_loss(pooled(logits, given.get("input_ids"), self.model.config), labels)
        return None

    # ---- weights
    def own_tensors(self, name: str) -> Iterator[tuple[str, str, nn.Module, str]]:
        for slot, module in self.own_modules(name).items():
            for path, part in module.named_modules():
                attrs = [a for a, p in part._parameters.items() if p is not None]
                attrs += [a for a in part._buffers if a not in part._non_persistent_buffers_set]
                for attr in attrs:
                    rest = f"{path}.{attr}" if path else attr
                    yield f"{slot}.{NAME_IN_FILES}.{rest}", f"{slot}.{name}.{rest}", part, attr

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError("ShadowPEFT depends on the input: it cannot be merged into the base weights.")

    def unload(self) -> nn.Module:
        self.strip(self.model)
        return super().unload()

    @classmethod
    def strip(cls, model: nn.Module) -> None:
        super().strip(model)
        super().strip(backbone.find_decoder(model))

    def unload_shadow(self, adapter_name: str | None = None, copy: bool = False) -> Any:
        """The shadow network as a model of its own, a DetachedShadowModel.

        It shares modules with this model, and the shared embeddings are not in its state dict; with `copy` it owns all.
        """
        name = adapter_name or self.active_adapters[0]
        if name not in self.shadow_backbone:
            raise ValueError(
                f"No shadow backbone found for adapter {name!r}; there are {sorted(self.shadow_backbone)}."
            )
        from .detached import detach

        return detach(self, name, copy)


# ---- helpers


def arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    return dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs if args else kwargs


def cropped(mask: Any, length: int) -> Any:
    """Prepared masks [.., t, keys] (also one for each type of layer), for the keys that the shadow network has."""
    if isinstance(mask, dict):
        return {k: cropped(v, length) for k, v in mask.items()}
    return mask[..., :length] if isinstance(mask, torch.Tensor) else mask


def causal_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(logits.device))


def pooled(logits: torch.Tensor, input_ids: torch.Tensor | None, config: Any) -> torch.Tensor:
    """Of the last token that is no padding: [b, labels]."""
    if input_ids is None or config.pad_token_id is None:
        return logits[:, -1]
    kept = (input_ids != config.pad_token_id).to(logits.device, torch.int32)
    last = (kept * torch.arange(kept.shape[1], device=kept.device)).argmax(-1)
    return logits[torch.arange(len(logits), device=logits.device), last]


def classification_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Regression, one class or several, by the labels' form."""
    labels = labels.to(logits.device)
    if logits.shape[-1] == 1:
        return F.mse_loss(logits.squeeze(-1).float(), labels.float().view(-1))
    if labels.is_floating_point():
        return F.binary_cross_entropy_with_logits(logits.float(), labels.float())
    return F.cross_entropy(logits.float(), labels.view(-1))
