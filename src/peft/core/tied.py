# SPDX-License-Identifier: Apache-2.0
"""Tied weights: which modules share the input embedding, what an adapter on one means, `ensure_weight_tying`."""

import re
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..utils.constants import EMBEDDING_LAYER_NAMES
from .layer import AdapterLayer
from .offload import loaded, onload_layer

if TYPE_CHECKING:
    from .tuner import TunerModel

_UNTIE = (
    "untie the weights before adapting the model: load it with `tie_word_embeddings=False` in its configuration and "
    "give the output embedding its own copy, `head.weight = torch.nn.Parameter(head.weight.detach().clone())`"
)


def _option(config: Any, name: str, default: Any) -> Any:
    return config.get(name, default) if isinstance(config, dict) else getattr(config, name, default)


def embedding_name(model: nn.Module, default: str | None = "embed_tokens") -> str | None:
    """Dotted name of what the model calls its input embedding (the place, also when it is wrapped by now)."""
    getter = getattr(model, "get_input_embeddings", None)
    try:
        found = getter() if getter is not None else None
    except NotImplementedError:
        return default
    return next((name for name, module in model.named_modules() if module is found), default)


def _get_module_names_tied_with_embedding(model: nn.Module) -> list[str]:
    """Sorted names of the modules whose weight is tied to the input embedding, e.g. ["lm_head"]."""
    if not _option(getattr(model, "config", None), "tie_word_embeddings", True):
        return []
    groups = [(n, keys) for n, m in model.named_modules() if (keys := getattr(m, "_tied_weights_keys", None))]
    names: set[str] = set()
    embedding: str | None = None
    for prefix, keys in groups:
        prefix = prefix + "." if prefix else ""
        if not isinstance(keys, dict):
            names.update(prefix + key.rpartition(".")[0] for key in keys)
            continue
        if embedding is None:
            embedding = embedding_name(model, None)
            if embedding is None:
                raise ValueError(
                    f"{type(model).__name__} has tied weights but no `get_input_embeddings`, so what they are tied to "
                    "is unknown."
                )
        names.update(
            prefix + source.rpartition(".")[0] for source, target in keys.items() if _is_at(prefix, target, embedding)
        )
    present = {name for name, _ in model.named_modules(remove_duplicate=False)}
    return sorted((names & present) - {embedding})


def _is_at(prefix: str, target: str, embedding: str) -> bool:
    module = target.rpartition(".")[0]
    return prefix + module == embedding or (
        embedding.startswith(prefix) and re.fullmatch(module, embedding[len(prefix) :]) is not None
    )


def _embedding_entries(entries: Any) -> list[str]:
    """Entries of target_modules or modules_to_save that mean an input or output embedding."""
    if not entries:
        return []
    if isinstance(entries, str):
        try:
            return [name for name in EMBEDDING_LAYER_NAMES if re.fullmatch(entries, name)]
        except re.error:
            return []
    return [entry for entry in entries if entry.rpartition(".")[2] in EMBEDDING_LAYER_NAMES]


def check(tuner: "TunerModel", cfg: Any, model: nn.Module) -> None:
    """Before targets are matched: warn about adapters on tied layers, or have them tied (`ensure_weight_tying`)."""
    targeted = _embedding_entries(getattr(cfg, "target_modules", None))
    saved = _embedding_entries(getattr(cfg, "modules_to_save", None))
    ensure = getattr(cfg, "ensure_weight_tying", None)
    if not (targeted or saved or ensure) or getattr(tuner, "ties_weights", False):
        return
    names = _get_module_names_tied_with_embedding(model)
    if not ensure:
        if names and (targeted or saved):
            how = (
                "but no implementation exists to tie the adapters"
                if ensure is None
                else "but `ensure_weight_tying` is not set to True"
            )
            warnings.warn(
                f"The model ties {', '.join(names)} to its input embedding, and a tied layer is part of the adapter "
                f"({', '.join(targeted + saved)}), {how}. The layers get different weights, which can go wrong when "
                "merging or when exporting to other formats.",
                stacklevel=4,
            )
        return
    if not names:
        warnings.warn(
            "You have requested `ensure_weight_tying`, but no tied modules were found in the model.", stacklevel=4
        )
    elif not (targeted or saved):
        if not getattr(cfg, "trainable_token_indices", None):
            warnings.warn(
                "You have requested `ensure_weight_tying`, but no tied modules are part of the adapter.", stacklevel=4
            )
    elif saved:
        tuner._add_modules_to_save_to_tie(cfg, names)
    else:
        tuner._add_targets_to_tie(cfg, names)


def add_modules_to_save_to_tie(cfg: Any, names: Iterable[str], model: nn.Module) -> None:
    """Train the input embedding in full and let the modules `names` share its copy (`cfg.modules_to_tie`)."""
    names = set(names)
    embedding = embedding_name(model)
    saved = [entry for entry in cfg.modules_to_save if not _means_any(entry, names)]
    if embedding not in saved:
        saved.append(embedding)
    cfg.modules_to_save = saved
    cfg.modules_to_tie = names


def add_targets_to_tie(cfg: Any, names: Iterable[str], model: nn.Module) -> None:
    """Adapt the input embedding; the modules `names` are left to the tuner, in `cfg.target_modules_to_tie`."""
    names = set(names)
    embedding = embedding_name(model)
    assert embedding is not None
    if isinstance(cfg.target_modules, str):
        cfg.target_modules = f"(?:{cfg.target_modules}|^{re.escape(embedding)}$)"
    else:
        cfg.target_modules = {e for e in cfg.target_modules if not _means_any(e, names)} | {embedding}
    cfg.target_modules_to_tie = names


def _means_any(entry: str, names: Iterable[str]) -> bool:
    return any(name == entry or name.endswith("." + entry) for name in names)


# ---- merging
def _layer_at(module: nn.Module) -> AdapterLayer | None:
    found = getattr(module, "token_adapter", module)
    return found if isinstance(found, AdapterLayer) else None


def _base(module: nn.Module) -> Any:
    layer = _layer_at(module)
    return module if layer is None else layer.get_base_layer()


def _weight(module: nn.Module) -> Any:
    """The base weight, also where accelerate keeps it elsewhere."""
    base = _base(module)
    with loaded(base):
        return base.weight


def _group(model: nn.Module) -> dict[str, nn.Module]:
    """The input embedding and the modules tied to it, by name; {} when nothing is tied."""
    embedding = embedding_name(model, None)
    names = _get_module_names_tied_with_embedding(model) if embedding else []
    return {n: model.get_submodule(n) for n in [embedding, *names]} if names else {}


def _one_set_of_rows(group: dict[str, nn.Module]) -> bool:
    """Trained tokens that all members share: merging them keeps the tie."""
    layers = [_layer_at(m) for m in group.values()]
    if any(layer is None or layer.method_name != "trainable_tokens" for layer in layers):
        return False
    holders = [layer.holders() for layer in layers]  # type: ignore[union-attr]
    return all(h == holders[0] for h in holders)


def untie_for_merge(tuner: "TunerModel") -> None:
    """Merging into a shared weight would change every module that shares it: adapted ones get a weight of their own."""
    group = _group(tuner.model)
    adapted = {n: m for n, m in group.items() if (layer := _layer_at(m)) is not None and layer.adapter_names}
    if not adapted or _one_set_of_rows(group):
        return
    shared = []
    for name, module in adapted.items():
        base, weight = _base(module), _weight(module)
        others = [m for m in group.values() if _base(m) is not base]
        if any(_same_storage(weight, _weight(other)) for other in others):
            with onload_layer(base):  # keeps what is put there
                base.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
            shared.append(name)
    if shared:
        warnings.warn(
            f"The model ties {', '.join(group)}, and {', '.join(adapted)} is adapted: the weights are untied for "
            f"merging, which needs memory for each of them. To decide about it yourself, {_UNTIE}.",
            stacklevel=4,
        )


def _same_storage(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)) or "meta" in (a.device.type, b.device.type):
        return False
    return a.device == b.device and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def after_unload(model: nn.Module) -> None:
    """Tie again what is equal; correct `config.tie_word_embeddings` when the embeddings differ now."""
    config = getattr(model, "config", None)
    if not _option(config, "tie_word_embeddings", False):
        return
    modules = list(_group(model).values())
    if not modules:
        return
    source, *others = modules
    weight = _weight(source)
    apart = [m for m in others if not _same_storage(weight, _weight(m))]
    different = [m for m in apart if not _equal(weight, _weight(m))]
    for module in apart:
        if not different:
            module.weight = source.weight
    if different:
        warnings.warn(
            "The input and output embeddings of the merged model differ, so `tie_word_embeddings` was set to False in "
            "its configuration.",
            stacklevel=4,
        )
        if isinstance(config, dict):
            config["tie_word_embeddings"] = False
        else:
            config.tie_word_embeddings = False  # type: ignore[union-attr]


def _equal(a: Any, b: Any) -> bool:
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)) or "meta" in (a.device.type, b.device.type):
        return True  # out of reach: leave things as they are
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.to(b.device), b)
