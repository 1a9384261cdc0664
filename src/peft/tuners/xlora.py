# SPDX-License-Identifier: Apache-2.0
"""X-LoRA: Mixture of Low-Rank Adapter Experts (arXiv 2402.07148).

Frozen LoRA experts e are mixed for each token t and each layer l, by a classifier that has read the whole input first:
    pass 1:  h = last hidden state of the base model      S = softmax(classifier(h) / τ)  [b, T, L, E]
    pass 2:  y_t = W x_t + g · Σ_e S[t, l, e] · s_e · B_e (A_e x_t)
"""

import inspect
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import PeftConfig, option
from ..core import kinds
from ..core.gates import EqualGates, TokenGates
from ..core.layer import AdapterLayer
from ..core.tuner import TunerModel
from ..registry import register_method
from .lora.model import LoraModel

EXPERT_FOLDER = "experts"


@dataclass
class XLoraConfig(PeftConfig):
    """Options of X-LoRA."""

    hidden_size: int | None = option(None, "Width of the base model's last hidden state.")
    adapters: dict[str, str] | None = option(None, "The experts: name -> folder or hub repository of a LoRA adapter.")
    enable_softmax: bool = option(True, "Softmax over the experts.")
    enable_softmax_topk: bool = option(False, "Softmax once more over the experts kept by top_k_lora.")
    layerwise_scalings: bool = option(False, "A mixture for each adapted layer instead of one for all.")
    xlora_depth: int = option(1, "Linear layers of the classifier.")
    xlora_size: int = option(2048, "Hidden width of the classifier, for a depth above 1.")
    xlora_dropout_p: float = option(0.2, "Dropout inside the classifier, for a depth above 1.")
    use_trainable_adapters: bool = option(False, "Train the experts too.")
    softmax_temperature: float = option(1.0, "Temperature of the softmax.")
    top_k_lora: int | None = option(None, "Use only so many experts for each token and layer.")
    scaling_pass_value: float | None = option(0.0, "Scaling of the experts in the first pass; None: 1 / experts.")
    global_scaling_weight: float = option(1.0, "Factor of every expert's output.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size is None:
            self._warn(
                "No value was provided for `hidden_size`. This will be set to 4096 by default, please ensure that this "
                "is correct."
            )
            self.hidden_size = 4096
        if self.adapters is None:
            self._warn(
                "No value was provided for `adapters`. This will be set to empty, please ensure that this is correct."
            )
            self.adapters = {}
        if self.enable_softmax_topk and self.top_k_lora is None:
            self._warn("`enable_softmax_topk` without `top_k_lora` is one more softmax over all experts.")
        if self.enable_softmax_topk and self.enable_softmax:
            self._warn(
                "`enable_softmax_topk` and `enable_softmax` are both on: the mixture goes through two softmaxes."
            )
        if self.softmax_temperature == 0:
            raise ValueError("`softmax_temperature` must not be 0: the logits are divided by it.")
        if self.top_k_lora is not None and self.top_k_lora < 1:
            self._warn(f"`top_k_lora` should be at least 1, got {self.top_k_lora}.")

    def locate(self, model_id: str | os.PathLike, options: dict[str, Any]) -> None:
        """The experts are where `adapters={name: folder}` or the configuration says; paths may be relative to the
        adapter's folder.
        """
        if options.get("adapters") is not None:
            self.adapters = dict(options["adapters"])
        for name, place in (self.adapters or {}).items():
            in_hub = str(place).startswith(EXPERT_FOLDER + "/") and not Path(model_id).is_dir()
            if in_hub or Path(model_id, place).is_dir():
                self.adapters[name] = os.path.join(model_id, place)  # type: ignore[index]

    @staticmethod
    def _warn(text: str) -> None:
        warnings.warn(text, stacklevel=5)


class XLoraClassifier(nn.Module):
    """Hidden states [b, T, hidden] -> mixture [b, T, layers, experts]."""

    def __init__(self, cfg: XLoraConfig, n_experts: int, n_layers: int, like: torch.Tensor):
        super().__init__()
        if cfg.xlora_depth <= 0:
            raise ValueError(f"`xlora_depth` must be at least 1, got {cfg.xlora_depth}.")
        self.cfg, self.n_experts, self.n_layers = cfg, n_experts, n_layers
        widths = [cfg.hidden_size, *[cfg.xlora_size] * (cfg.xlora_depth - 1)]
        layers: list[nn.Module] = []
        for n_in, n_out in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(n_in, n_out), nn.ReLU()]  # type: ignore[arg-type]
            layers += [nn.Dropout(cfg.xlora_dropout_p)] if cfg.xlora_dropout_p > 0 else []
        mixtures = n_layers if cfg.layerwise_scalings else 1
        layers.append(nn.Linear(widths[-1], n_experts * mixtures))  # type: ignore[arg-type]
        self.layers = nn.Sequential(*layers).to(like.device, like.dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        dtype: Any = self.layers[0].weight.dtype
        logits = self.layers(hidden.to(dtype)).unflatten(-1, (-1, self.n_experts))
        if self.cfg.enable_softmax:
            logits = (logits / self.cfg.softmax_temperature).softmax(-1)
        return logits.expand(-1, -1, self.n_layers, -1)


def keep_top(S: torch.Tensor, k: int, softmax: bool) -> torch.Tensor:
    """The k largest of the experts, the others 0."""
    values, index = S.topk(max(min(k, S.shape[-1]), 0), -1)
    return torch.zeros_like(S).scatter(-1, index, values.softmax(-1) if softmax else values)


@register_method("xlora", config=XLoraConfig)
class XLoraModel(TunerModel):
    """Experts as adapters of a LoraModel on the same base model, and the classifier that mixes them."""

    method_label = "X-LoRA"  # type: ignore[assignment]
    only_config = XLoraConfig  # nothing else is loaded beside it

    def __init__(
        self,
        model: nn.Module,
        config: dict[str, XLoraConfig] | XLoraConfig,
        adapter_name: str,
        torch_device: str | None = None,
        ephemeral_gpu_offload: bool = False,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        **kwargs: Any,
    ):
        nn.Module.__init__(self)
        configs = dict(config) if isinstance(config, dict) else {adapter_name: config}
        cfg: XLoraConfig = configs[adapter_name]
        self.check_name(adapter_name)
        self._check(cfg, model)
        cfg.adapters = {n: cfg.adapters[n] for n in sorted(cfg.adapters or (), key=column)}  # type: ignore[index]
        like = next(model.parameters())
        try:
            # The LoraModel shares `model` with this module, so it is no child of it.
            lora = load_experts(model, cfg, torch_device or "cpu", ephemeral_gpu_offload, low_cpu_mem_usage, kwargs)
            self.__dict__["lora_model"] = lora
            self._surround(model, configs, lora.switch)  # type: ignore[arg-type]
            check_experts(lora)
            self.internal_xlora_classifier = XLoraClassifier(cfg, len(cfg.adapters or ()), len(self.layers()), like)
        except BaseException:
            if "lora_model" in self.__dict__:
                self.lora_model.unload()
            model.__dict__.pop("peft_config", None)
            raise
        self.adapter_name = self.active_adapter = adapter_name
        self.internal_xlora_scalings: torch.Tensor | None = None
        self.scalings_log: list[torch.Tensor] | None = None
        self.scalings_logging = False
        self.casts = autocast_adapter_dtype  # the PeftModel around this casts, unless it is forbidden here
        self.set_adapter(adapter_name, inference_mode=cfg.inference_mode)
        model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        model.register_forward_hook(self._after_forward)
        model.peft_config = self.peft_config  # type: ignore[assignment]

    def _check(self, cfg: XLoraConfig, model: nn.Module) -> None:
        if not cfg.adapters:
            raise ValueError("X-LoRA needs at least one expert: set `adapters` to a dict from names to LoRA adapters.")
        if any(isinstance(m, AdapterLayer) for m in model.modules()):
            raise ValueError("X-LoRA needs a model without adapters; it loads its experts itself.")
        if getattr(getattr(model, "config", None), "use_cache", False):
            raise ValueError(
                "`use_cache` must be False in the configuration of the base model: X-LoRA reads all tokens each time."
            )

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        raise ValueError("There can be only one X-LoRA adapter on a model.")

    @property
    def xlora_config(self) -> XLoraConfig:
        return self.peft_config[self.adapter_name]

    @property
    def active_adapters(self) -> list[str]:
        """The X-LoRA adapter; the switch of the layers names the experts."""
        return [self.adapter_name] if "adapter_name" in self.__dict__ else []

    # ---- calls
    def call_arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        if self.switch.call.adapter_names is not None:
            raise ValueError("X-LoRA mixes its experts for each token by itself: `adapter_names` is not possible.")
        if self.switch.call.generating:
            kwargs = {**kwargs, "use_cache": False}
        return kwargs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)  # with the hooks below

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.generate(*args, **{**kwargs, "use_cache": False})  # type: ignore[operator]

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Around every forward of the base model, whoever calls it: read the input, then set the gates."""
        cfg, call = self.xlora_config, self.switch.call
        if not self.switch.at_work:
            return
        past = kwargs.get("past_key_values")
        if past is not None and past.get_seq_length() > 0:
            raise RuntimeError("X-LoRA reads all tokens at each step: call with `use_cache=False`.")
        value = 1 / len(self.switch.active) if cfg.scaling_pass_value is None else cfg.scaling_pass_value
        call.gates = EqualGates(value * cfg.global_scaling_weight)
        try:
            with torch.no_grad():
                hidden = last_hidden_state(module, args, kwargs)
        finally:
            call.gates = None
        S = self.internal_xlora_scalings = self.internal_xlora_classifier(hidden)
        if self.scalings_logging:
            self.scalings_log = [*(self.scalings_log or ()), S]
        if cfg.top_k_lora is not None or cfg.enable_softmax_topk:
            k = S.shape[-1] if cfg.top_k_lora is None else cfg.top_k_lora
            S = keep_top(S, k, cfg.enable_softmax_topk)
        call.gates = TokenGates(S, self.layers(), list(self.switch.active), cfg.global_scaling_weight)

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if not torch.is_grad_enabled():  # otherwise backward may recompute layers
            self.switch.call.gates = None

    # ---- switching
    def set_adapter(self, adapter_name: Any, inference_mode: bool = False) -> None:
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if names != [self.adapter_name]:
            raise ValueError(f"There is only the X-LoRA adapter {self.adapter_name!r}, got {names}.")
        experts = list(self.xlora_config.adapters or ())
        self.lora_model.set_adapter(experts, inference_mode=True)
        self.set_requires_grad(names, not inference_mode)

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        """The classifier, and the experts if they are trained too."""
        if self.adapter_name not in ([adapter_names] if isinstance(adapter_names, str) else adapter_names):
            return
        self.internal_xlora_classifier.requires_grad_(requires_grad)
        train_experts = requires_grad and self.xlora_config.use_trainable_adapters
        self._may_train = set(self.switch.active) if train_experts else set()
        for layer in self.layers():
            layer.set_requires_grad(self.switch.active, train_experts)

    def delete_adapter(self, adapter_name: str) -> None:
        raise ValueError("An X-LoRA adapter cannot be deleted; `unload()` takes it off the base model.")

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        for expert in self.switch.active if autocast_adapter_dtype and self.casts else ():
            self.lora_model._cast_adapter_dtype(expert)

    # ---- weights
    def _check_merge_allowed(self) -> None:
        raise NotImplementedError("X-LoRA depends on the input: it cannot be merged into the base weights.")

    def unload(self) -> nn.Module:
        """Take experts and hooks off; returns the base model."""
        self.strip(self.model)
        return self.lora_model.unload()

    def own_tensors(self, name: str) -> Iterator[tuple[str, str, nn.Module, str]]:
        """The classifier only; the experts have their own files."""
        for path, module in self.internal_xlora_classifier.named_modules(prefix="internal_xlora_classifier"):
            for attr in module._parameters:
                yield f"{path}.{attr}", f"{path}.{attr}", module, attr

    def import_state(self, name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Published files keep only some layers of the classifier, or none."""
        kept = [k for k in state if "internal_xlora_classifier." in k]
        own = [key for key, *_ in self.own_tensors(name)]
        if len(kept) < len(own):
            warnings.warn(
                f"The file holds {len(kept)} of the {len(own)} tensors of the X-LoRA classifier, the rest is random: "
                "the published library loses layers whose number is the name of an expert. Train the classifier again.",
                stacklevel=3,
            )
        return state

    def save_parts(self, folder: Path, config: Any, safe_serialization: bool = True) -> None:
        """Trained experts are saved beside the classifier, as ordinary LoRA adapters."""
        if not self.xlora_config.use_trainable_adapters:
            return
        from ..io.files import save_adapter
        from ..io.state_dict import get_peft_model_state_dict

        root = as_root(self.lora_model)
        for name in self.switch.active:
            own = self.lora_model.peft_config[name].with_values(inference_mode=True)
            (folder / EXPERT_FOLDER / name).mkdir(parents=True, exist_ok=True)
            state = get_peft_model_state_dict(root, adapter_name=name)
            save_adapter(folder / EXPERT_FOLDER / name, state, own, safe_serialization=safe_serialization)
        config.adapters = {name: f"{EXPERT_FOLDER}/{name}" for name in self.switch.active}

    # ---- options at run time
    def set_topk_lora(self, value: int | None) -> None:
        """Use only so many experts for each token and layer; None: all."""
        self.xlora_config.top_k_lora = value

    def set_global_scaling_weight(self, weight: float) -> None:
        self.xlora_config.global_scaling_weight = weight

    def get_global_scaling_weight(self) -> float:
        return self.xlora_config.global_scaling_weight

    def set_scaling_pass_value(self, value: float | None) -> None:
        """Scaling of the experts in the first pass; None: 1 / number of experts."""
        self.xlora_config.scaling_pass_value = value

    # ---- the mixtures
    def get_latest_scalings(self) -> torch.Tensor | None:
        """Mixture [b, T, layers, experts] of the last call, before top-k."""
        return self.internal_xlora_scalings

    def enable_scalings_logging(self) -> None:
        self.scalings_logging = True

    def disable_scalings_logging(self) -> None:
        """Stop logging; what was logged stays."""
        self.scalings_logging = False

    def get_scalings_log(self) -> list[torch.Tensor]:
        """The mixtures of all calls while logging was on."""
        return list(self.scalings_log or ())

    def clear_scalings_log(self) -> None:
        self.scalings_log = None

    def get_bucketed_scalings_log(self) -> dict[int, tuple[list[int], list[torch.Tensor]]]:
        """Sequence length -> (positions in the log, mixtures)."""
        buckets: dict[int, tuple[list[int], list[torch.Tensor]]] = {}
        for i, S in enumerate(self.scalings_log or ()):
            positions, found = buckets.setdefault(S.shape[1], ([], []))
            positions.append(i)
            found.append(S)
        return buckets


# ---- the experts


def column(name: str) -> tuple[bool, int, str]:
    """Sorts experts into the columns of the classifier. Numbers as published; files do not keep the order of a dict."""
    return (False, int(name), "") if name.isdecimal() else (True, 0, name)


def as_root(lora: LoraModel) -> Any:
    """What a PeftModel would be, for reading and writing files of experts."""
    root = nn.Module()
    root.base_model, root.peft_config = lora, lora.peft_config  # type: ignore[assignment]
    return root


def load_experts(
    model: nn.Module, cfg: XLoraConfig, device: str, offload: bool, low_cpu: bool, hub: dict[str, Any]
) -> LoraModel:
    """A LoraModel with one adapter for each expert, in the order of the configuration."""
    from ..io.files import load_peft_weights
    from ..io.load import load_adapter_state

    lora: LoraModel | None = None
    for name, place in (cfg.adapters or {}).items():
        place, where = str(place), dict(hub)
        if not Path(place).is_dir() and place.count("/") > 1:  # a folder in a hub repository
            owner, repo, where["subfolder"] = place.split("/", 2)
            place = f"{owner}/{repo}"
        config: Any = PeftConfig.from_pretrained(place, **where)
        if config.peft_type != "LORA":
            raise ValueError(
                f"Experts of X-LoRA must be LoRA adapters, expert {name!r} in {place} is {config.peft_type}."
            )
        config.inference_mode = True
        config.runtime_config.ephemeral_gpu_offload = offload
        if lora is None:
            lora = LoraModel(model, {name: config}, name, low_cpu_mem_usage=low_cpu)
        else:
            lora.add(name, config, low_cpu_mem_usage=low_cpu)
        state = load_peft_weights(place, device=device, **where)
        report = load_adapter_state(as_root(lora), state, name, low_cpu_mem_usage=low_cpu, source=place)
        if report.missing or report.unexpected:
            raise ValueError(
                f"The file of expert {name!r} in {place} does not fit the model: missing {report.missing[:4]}, "
                f"unexpected {report.unexpected[:4]}."
            )
    assert lora is not None
    return lora


def check_experts(lora: LoraModel) -> None:
    for key, layer in lora.named_layers().items():
        if not (layer.kind.is_linear or layer.kind is kinds.Embedding):
            raise ValueError(
                f"X-LoRA mixes experts token by token, which a {layer.kind.name} layer does not allow: {key}."
            )
        variants: dict[str, Any] = layer.lora_variant  # type: ignore[assignment]
        if variants:
            name, variant = next(iter(variants.items()))
            raise ValueError(f"Experts of X-LoRA must be plain LoRA, but {name!r} uses {variant.name} (module {key}).")


# ---- the first pass


def last_hidden_state(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Of the backbone where there is one (no head is computed), otherwise of the whole model."""
    transformers = sys.modules.get("transformers")
    backbone = model.base_model if transformers and isinstance(model, transformers.PreTrainedModel) else model
    if backbone is model:
        out = model.forward(*args, **{k: v for k, v in kwargs.items() if k != "labels"}, output_hidden_states=True)
        return out.hidden_states[-1]
    given = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | kwargs
    known = inspect.signature(backbone.forward).parameters
    own = ("labels", "use_cache", "return_dict", "output_hidden_states", "output_attentions")
    call = {k: v for k, v in given.items() if k in known and k not in own}
    if "use_cache" in known:
        call["use_cache"] = False
    return backbone(**call)[0]
