# SPDX-License-Identifier: Apache-2.0
"""Small tools around adapted models: signatures, temporary switches, choice of targets by condition number.

KappaTune: the condition numbers S_max / S_min of base weights tell which matrices can be changed at little cost.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from .peft_model import PeftModel


# ---- signatures
def _show_base_signature(model: Any, method: str, base_method: Callable) -> None:
    """Give the instance a copy of its wrapping method that shows name, doc and signature of the base model's one."""
    wrapper = getattr(type(model), method)
    copied = FunctionType(
        wrapper.__code__, wrapper.__globals__, wrapper.__name__, wrapper.__defaults__, wrapper.__closure__
    )
    copied.__kwdefaults__ = wrapper.__kwdefaults__
    functools.update_wrapper(copied, base_method, assigned=("__doc__", "__name__", "__annotations__"))
    setattr(model, method, MethodType(copied, model))


def _hides_signature(function: Callable, *allowed: set[str]) -> bool:
    return set(inspect.signature(function).parameters) in allowed


def update_forward_signature(model: "PeftModel") -> None:
    """Let `model.forward` show the signature of the base model's forward, if it shows nothing but *args, **kwargs."""
    if _hides_signature(model.forward, {"args", "kwargs"}):
        _show_base_signature(model, "forward", type(model.get_base_model()).forward)


def update_generate_signature(model: "PeftModel") -> None:
    """The same for `generate`; models without it are left alone."""
    if hasattr(model, "generate") and _hides_signature(model.generate, {"args", "kwargs"}, {"kwargs"}):
        generate = getattr(type(model.get_base_model()), "generate", None)
        if generate is not None:
            _show_base_signature(model, "generate", generate)


def update_signature(model: "PeftModel", method: str = "all") -> None:
    """Update the signature of "forward", "generate" or "all" of them."""
    if method not in ("forward", "generate", "all"):
        raise ValueError(f"method {method} is not supported please choose one of ['forward', 'generate', 'all']")
    if method in ("forward", "all"):
        update_forward_signature(model)
    if method in ("generate", "all"):
        update_generate_signature(model)


def check_if_peft_model(model_name_or_path: str) -> bool:
    """Whether a folder or Hub repository holds an adapter, that is, a loadable configuration of one."""
    from .config import PeftConfig

    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except Exception:  # noqa: BLE001 - whatever goes wrong, it is not a usable adapter
        return False
    return True


# ---- temporary switches
@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float | int) -> Iterator[None]:
    """Inside, the scaling of all LoRA adapters is multiplied by `multiplier`; the old values come back on any exit."""
    if not isinstance(multiplier, (float, int)):
        raise TypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    from .tuners.adalora import AdaLoraLayer
    from .tuners.lora import LoraLayer

    layers: list[Any] = [m for m in model.modules() if isinstance(m, (LoraLayer, AdaLoraLayer))]
    before = {module: module.scaling for module in layers}
    if not before:
        raise ValueError("scaling is only supported for models with `LoraLayer`s")
    try:
        for module, scaling in before.items():
            module.scaling = {name: value * multiplier for name, value in scaling.items()}
        yield
    finally:
        for module, scaling in before.items():
            module.scaling = scaling


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Inside, adapter layers take their input as it comes instead of casting it to the dtype of their weights."""
    from .core.layer import AdapterLayer

    layers: list[Any] = [m for m in model.modules() if isinstance(m, AdapterLayer)] if active else []
    before = [layer.cast_input_dtype_enabled for layer in layers]
    try:
        for layer in layers:
            layer.cast_input_dtype_enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.cast_input_dtype_enabled = enabled


class DoraCaching:
    """Cache what DoRA computes from frozen weights while in eval mode: `with DoraCaching(): ...`, or for good by
    `DoraCaching()(enabled=True)`."""

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.prev_value: bool | None = None

    @staticmethod
    def _switch() -> Any:
        return importlib.import_module("peft.tuners.lora.dora")

    def __call__(self, enabled: bool = True) -> None:
        self._switch().ENABLE_DORA_CACHING = enabled

    def __enter__(self) -> None:
        self.prev_value = self._switch().ENABLE_DORA_CACHING
        self(self.enabled)

    def __exit__(self, *exc: Any) -> None:
        self._switch().ENABLE_DORA_CACHING = self.prev_value


class MontecloraTrainerMixin:
    """Put before a transformers Trainer in the bases of a class: adds the MonteCLoRA loss to the loss of the model."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        from .tuners.lora import LoraModel

        result = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)  # type: ignore[misc]
        loss, outputs = result if return_outputs else (result, None)
        losses: list[Any] = [m._get_monteclora_loss() for m in model.modules() if isinstance(m, LoraModel)]
        loss = loss + sum(losses) / len(losses) if losses else loss
        return (loss, outputs) if return_outputs else loss


# ---- targets by condition number
_EXPERT_SUFFIXES = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")


class KappaTuneSelector:
    """Ranks the linear layers and stacked expert parameters of a model by the condition number of their weights.

    Weights with a dimension above `max_dim_size_to_analyze` are left out. `moe_param_suffixes`: names of 3-D parameters
    [experts, ., .] to rank by their mean over the experts.
    """

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: tuple[str, ...] | None = None,
        show_progress: bool = True,
    ):
        self.model = model
        self.max_dim_size_to_analyze = max_dim_size_to_analyze
        self.moe_param_suffixes = _EXPERT_SUFFIXES if moe_param_suffixes is None else tuple(moe_param_suffixes)
        self.show_progress = show_progress

    @functools.cached_property
    def _module_kappas(self) -> dict[str, float]:
        from .utils.integrations import dequantize_module_weight

        linears = [(name, m) for name, m in self.model.named_modules() if isinstance(m, nn.Linear)]
        return self._measured("layers", linears, dequantize_module_weight)

    @functools.cached_property
    def _parameter_kappas(self) -> dict[str, float]:
        named, suffixes = self.model.named_parameters(), self.moe_param_suffixes
        experts = [(name, p) for name, p in named if p.dim() == 3 and name.endswith(suffixes)]
        return self._measured("experts", experts, lambda parameter: parameter)

    def _measured(self, kind: str, named: list[tuple[str, Any]], weight_of: Callable) -> dict[str, float]:
        from tqdm import tqdm

        kappas = {}
        for name, held in tqdm(named, desc=f"Condition numbers of {kind}", disable=not self.show_progress):
            weight = weight_of(held)
            if max(weight.shape) <= self.max_dim_size_to_analyze:
                kappas[name] = _kappa(weight)
        return kappas

    def get_best_targets(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Names of linear layers, smallest condition number first: `num_modules` of them, or a share `top_p`, or those
        up to `threshold` (in this order of precedence), or all."""
        return _best(self._module_kappas, top_p, num_modules, threshold)

    def get_best_target_parameters(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """The same for expert parameters."""
        return _best(self._parameter_kappas, top_p, num_modules, threshold)


@torch.no_grad()
def _kappa(weight: torch.Tensor) -> float:
    """Condition number of a matrix, mean over the first dimension for a stack of matrices."""
    S = torch.linalg.svdvals(weight.detach().float())
    return (S[..., 0] / (S[..., -1] + 1e-8)).mean().item()


def _best(kappas: dict[str, float], top_p: float | None, num_modules: int | None, threshold: float | None) -> list[str]:
    names = sorted(kappas, key=lambda name: kappas[name])
    if num_modules is not None:
        return names[:num_modules]
    if top_p is not None:
        return names[: max(1, int(len(names) * top_p))]
    if threshold is not None:
        return [name for name in names if kappas[name] <= threshold]
    return names


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: tuple[str, ...] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """`target_modules` and `target_parameters` (or None) for a LoraConfig: the best-conditioned share `top_p`."""
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    return {
        "target_modules": selector.get_best_targets(top_p=top_p),
        "target_parameters": selector.get_best_target_parameters(top_p=top_p) or None,
    }
