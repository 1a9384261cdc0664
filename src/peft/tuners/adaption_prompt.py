# SPDX-License-Identifier: Apache-2.0
"""LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention (arXiv 2303.16199).

The top attention modules also attend to a trained prompt P, behind a gate g that starts at zero:
    y = attention(x) + O( g · softmax(Q Kᵀ / √d) V ),   Q = rotary(q(x)),  K = k(P),  V = v(P)
All positions see the whole prompt, which has no positions itself. GPT-2: q, k, v are parts of c_attn, there is no O.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..config import PeftConfig, nearest, option
from ..core.context import Switch
from ..core.inject import Node, walk
from ..core.tuner import TunerModel
from ..registry import register_method

# Published: the bias of O is added once more, so with such a bias a new adapter is no identity. False: not added.
OUTPUT_BIAS_TWICE = True
NAMES = ("adaption_gate", "adaption_prompt")  # parameters of an adapter


@dataclass
class AdaptionPromptConfig(PeftConfig):
    """Options of LLaMA-Adapter."""

    target_modules: str | None = option(None, "Name of the attention modules; known for the model type.")
    adapter_len: int | None = option(None, "Number of prompt tokens.")
    adapter_layers: int | None = option(None, "Number of attention modules adapted, counted from the top.")

    @property
    def is_adaption_prompt(self) -> bool:
        return True


# ---- the attention of each model type


def llama_rotate_half(x: torch.Tensor) -> torch.Tensor:
    """(x1, x2) -> (-x2, x1) on the halves of the last dimension."""
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def llama_apply_rotary_pos_emb(
    q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, position_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """Rotate q [b, heads, t, d]. cos, sin [b, t, d], or tables [.., n, d] that `position_ids` [b, t] picks from."""
    if position_ids is not None:
        cos, sin = (table.reshape(-1, table.shape[-1])[position_ids] for table in (cos, sin))
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + llama_rotate_half(q) * sin


def heads(x: torch.Tensor, attention: Any) -> torch.Tensor:
    """[b, t, heads · d] -> [b, heads, t, d]"""
    return x.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)


def llama_query(attention: Any, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    positions = kwargs["position_embeddings"] if "position_embeddings" in kwargs else args[1]
    return llama_apply_rotary_pos_emb(heads(attention.q_proj(hidden), attention), *positions)


def llama_keys(attention: Any, prompt: torch.Tensor) -> Iterator[torch.Tensor]:
    for projection in (attention.k_proj, attention.v_proj):
        yield heads(projection(prompt), attention).repeat_interleave(attention.num_key_value_groups, 1)


def gpt2_query(attention: Any, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    crossed = attention.is_cross_attention
    q = attention.q_attn(hidden) if crossed else attention.c_attn(hidden)[..., : attention.embed_dim]
    return heads(q, attention)


def gpt2_keys(attention: Any, prompt: torch.Tensor) -> Iterator[torch.Tensor]:
    for part in attention.c_attn(prompt)[..., -2 * attention.embed_dim :].chunk(2, -1):
        yield heads(part, attention)


class Architecture(NamedTuple):
    """Attention of a model type. `compute_query_states` -> [b, heads, t, d]; `keys` -> K and V [1, heads, n, d]."""

    compute_query_states: Callable[..., torch.Tensor]
    keys: Callable[..., Iterator[torch.Tensor]]
    target_modules: str
    dtype_from: str  # the projection whose weight gives the prompt its device and dtype
    o_proj_layer: str | None


_LLAMA = Architecture(llama_query, llama_keys, "self_attn", "q_proj", "o_proj")
TRANSFORMERS_MODEL_CONFIG = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "gpt2": Architecture(gpt2_query, gpt2_keys, "attn", "c_proj", None),
}


class AdaptedAttention(nn.Module):
    """An attention module (`model`) with prompts. The active adapter's parameters have the published names, without the
    adapter's; those of the others are kept in `others`.
    """

    base_attribute = "model"

    def __init__(self, model: nn.Module, model_type: str, switch: Switch):
        super().__init__()
        self.model = model
        self.model_type, self.switch = model_type, switch
        self.name: str | None = None  # of the adapter in adaption_prompt, adaption_gate
        self.register_parameter("adaption_prompt", None)  # [1, n, hidden]
        self.register_parameter("adaption_gate", None)  # [1]
        self.others = nn.ModuleDict()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def __contains__(self, name: str) -> bool:
        return name == self.name or name in self.others

    def create(self, name: str, cfg: Any) -> None:
        """A new adapter, among the others."""
        weight = self.model.get_submodule(TRANSFORMERS_MODEL_CONFIG[self.model_type].dtype_from).weight
        assert isinstance(weight, torch.Tensor)
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        prompt = torch.empty(1, cfg.adapter_len, self.model.config.hidden_size, device=weight.device, dtype=dtype)  # type: ignore[union-attr]
        gate = torch.zeros(1, device=weight.device, dtype=dtype)
        self.others[name] = nn.ParameterDict({"adaption_prompt": prompt.normal_(), "adaption_gate": gate})

    def activate(self, name: str | None) -> None:
        """Move the parameters of adapter `name` to the published place; none if it is not on this module."""
        if self.name is not None and name != self.name:
            self.others[self.name] = nn.ParameterDict({n: getattr(self, n) for n in NAMES})
            self.adaption_prompt = self.adaption_gate = self.name = None
        if name is not None and name in self.others:
            for n, parameter in self.others.pop(name).items():  # type: ignore[operator]
                setattr(self, n, parameter)
            self.name = name

    def holder(self, name: str) -> tuple[nn.Module, str]:
        """(module that holds the parameters of adapter `name`, its path below this one)."""
        return (self, "") if name == self.name else (self.others[name], f"others.{name}.")

    def drop(self, name: str) -> None:
        if name in self:
            self.activate(None if name == self.name else self.name)
            del self.others[name]

    def set_requires_grad(self, name: str, requires_grad: bool) -> None:
        if name in self:
            for n in NAMES:
                getattr(self.holder(name)[0], n).requires_grad_(requires_grad)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.model(*args, **kwargs)
        if self.adaption_prompt is None or not self.switch.at_work:
            return out
        added = self.attend(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0], args, kwargs)
        return out[0] + added.to(out[0].dtype), *out[1:]

    def attend(self, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """What the prompt adds to the output [b, t, hidden]. Its keys are computed once, for the whole batch."""
        arch, attention = TRANSFORMERS_MODEL_CONFIG[self.model_type], self.model
        q = arch.compute_query_states(attention, hidden, args, kwargs)
        k, v = (s.to(q.dtype).expand(len(q), -1, -1, -1) for s in arch.keys(attention, self.adaption_prompt))
        seen = F.scaled_dot_product_attention(q, k, v) * self.adaption_gate.to(q.dtype)  # type: ignore[union-attr]
        seen = seen.transpose(1, 2).flatten(2)
        if arch.o_proj_layer is None:
            return seen
        project = attention.get_submodule(arch.o_proj_layer)
        return project(seen) if project.bias is None or OUTPUT_BIAS_TWICE else project(seen) - project.bias


@register_method("adaption_prompt", config=AdaptionPromptConfig)
class AdaptionPromptModel(TunerModel):
    """Puts `AdaptedAttention` around the top attention modules; one adapter is active at a time."""

    method_label = "LLaMA-Adapter"  # type: ignore[assignment]

    def wrapped(self) -> dict[str, AdaptedAttention]:
        return {k: m for k, m in self.model.named_modules() if isinstance(m, AdaptedAttention)}

    # ---- injection
    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Add an adapter; all checks come first. The parameters are few: `low_cpu_mem_usage` makes no difference."""
        cfg = self.peft_config[adapter_name]
        self.check_name(adapter_name)
        nodes = self._targets(cfg, model)
        active = adapter_name in self.switch.active
        if not self.wrapped():
            model.requires_grad_(False)
        for node in nodes:
            module = node.module
            if not isinstance(module, AdaptedAttention):
                module = AdaptedAttention(module, self._model_type(model), self.switch).train(module.training)
                setattr(node.parent, node.leaf, module)
            module.create(adapter_name, cfg)
            module.set_requires_grad(adapter_name, active and not cfg.inference_mode)
            if active:
                module.activate(adapter_name)
        self._note(self.targeted_module_names, [n.key for n in nodes])
        self.active_adapter = self.active_adapters

    def _targets(self, cfg: Any, model: nn.Module) -> list[Node]:
        """The attention modules to adapt; completes the configuration."""
        model_type = self._model_type(model)
        if model_type not in TRANSFORMERS_MODEL_CONFIG:
            known = sorted(TRANSFORMERS_MODEL_CONFIG)
            raise ValueError(
                f"Unsupported model type for adaption prompt: {model_type!r}. Supported are {', '.join(known)}."
                f"{nearest(model_type, known)}"
            )
        for option_name in ("adapter_len", "adapter_layers"):
            value = getattr(cfg, option_name)
            if not isinstance(value, int) or value <= 0:
                raise ValueError(f"`{option_name}` of AdaptionPromptConfig must be a positive integer, got {value!r}.")
        arch = TRANSFORMERS_MODEL_CONFIG[model_type]
        if cfg.target_modules is None:
            cfg.target_modules = arch.target_modules
        found = [n for n in walk(model) if n.leaf == cfg.target_modules]
        if cfg.adapter_layers > len(found):
            raise ValueError(
                f"Config specifies more adapter layers '{cfg.adapter_layers}' than the model has: {len(found)} modules "
                f"are called {cfg.target_modules!r}."
            )
        if lost := [n.key for n in found if not hasattr(n.module, arch.dtype_from)]:
            raise ValueError(f"Target modules {lost} are no attention of {model_type}: they have no {arch.dtype_from}.")
        return found[-cfg.adapter_layers :]

    def _model_type(self, model: nn.Module) -> str:
        return self.get_model_config(model).get("model_type", "custom")

    # ---- switching
    def set_adapter(self, adapter_name: Any, inference_mode: bool = False) -> None:
        """Activate one adapter: trainable (unless `inference_mode`), the others frozen."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if len(names) > 1:
            raise ValueError(f"{self.method_label} has one active adapter at a time, got {names}.")
        if unknown := [n for n in names if n not in self.peft_config]:
            known = sorted(self.peft_config)
            raise ValueError(f"Adapter {unknown[0]!r} does not exist; there are {known}.{nearest(unknown[0], known)}")
        for module in self.wrapped().values():
            for name in self.peft_config:
                module.set_requires_grad(name, name in names and not inference_mode)
            module.activate(names[0] if names else None)
        self.switch.set_active(names)
        self.active_adapter = names[0] if names else []

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            for module in self.wrapped().values():
                module.set_requires_grad(name, requires_grad)

    def on_delete(self, name: str) -> None:
        for module in self.wrapped().values():
            module.drop(name)

    # ---- the rest
    def own_tensors(self, name: str) -> Iterator[tuple[str, str, nn.Module, str]]:
        for key, module in self.wrapped().items():
            if name in module:
                holder, path = module.holder(name)
                for attr in NAMES:
                    yield f"model.{key}.{attr}", f"model.{key}.{path}{attr}", holder, attr

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(f"{self.method_label} depends on the input: it cannot be merged into base weights.")

    def unload(self) -> nn.Module:
        """Put the original attention modules back; returns the base model."""
        self.strip(self.model)
        self.model.__dict__.pop("peft_config", None)
        return self.model

    @classmethod
    def strip(cls, model: nn.Module) -> None:
        for node in list(walk(model)):
            if isinstance(node.module, AdaptedAttention):
                setattr(node.parent, node.leaf, node.module.model)


sys.modules[f"{__name__}.utils"] = sys.modules[__name__]  # a published address
