# SPDX-License-Identifier: Apache-2.0
"""A model that routes tokens to LoRA experts (Arrow, arXiv 2405.11157; GenKnowSub, ACL 2025).

The routing is in `variants/arrow.py`.
"""

from pathlib import Path
from typing import Any

from torch import nn

from ...config import CONFIG_NAME
from .config import ArrowConfig, LoraConfig
from .variants.arrow import Arrow as Arrow

_TASK, _GENERAL, _ROUTER = "task", "gks", "arrow_router"


def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: list[str],
    arrow_config: ArrowConfig,
    general_adapter_paths: list[str] | None = None,
    **adapter_kwargs: Any,
) -> Any:
    """Load LoRA experts ("task_0", ...; general ones "gks_0", ...) and activate a router over them, the adapter
    "arrow_router".

    A path is a local folder, or a hub repository with an optional subfolder ("user/name/sub/folder"). The experts
    must be LoRAs of linear layers with equal ranks and targets.
    """
    from ...peft_model import PeftModel

    if not task_specific_adapter_paths:
        raise ValueError("`task_specific_adapter_paths` should contain at least one adapter path.")
    if arrow_config.use_gks and not general_adapter_paths:
        raise ValueError(
            "You should provide general LoRA paths (`general_adapter_paths`) if you want to use GenKnowSub."
        )
    general = list(general_adapter_paths or ()) if arrow_config.use_gks else []
    names = [f"{_TASK}_{i}" for i in range(len(task_specific_adapter_paths))]
    general_names = [f"{_GENERAL}_{i}" for i in range(len(general))]
    model: Any = None
    try:
        for name, path in zip(names + general_names, [*task_specific_adapter_paths, *general], strict=True):
            where = {**adapter_kwargs, **_location(path)}
            source = where.pop("path")
            if model is None:
                model = PeftModel.from_pretrained(base_model, source, adapter_name=name, **where)
            else:
                model.load_adapter(source, adapter_name=name, **where)
        rank, targets = _check_experts(model, names + general_names)
        arrow_config.task_adapter_names = names
        arrow_config.gks_adapter_names = general_names
        model.add_adapter(_ROUTER, LoraConfig(r=rank, target_modules=targets, arrow_config=arrow_config))
    except BaseException:
        if model is not None:
            model.unload()
        raise
    model.set_adapter(_ROUTER)
    return model


def _location(path: str) -> dict[str, Any]:
    """A local folder, or hub repository and subfolder."""
    local = Path(path)
    if local.is_dir():
        if not (local / CONFIG_NAME).is_file():
            raise ValueError(f"The folder {path!r} holds no {CONFIG_NAME}: it is no adapter.")
        return {"path": str(local)}
    parts = str(path).split("/")
    if len(parts) < 2 or local.is_absolute():
        raise ValueError(f"{path!r} is neither a folder with {CONFIG_NAME} nor a hub repository ('user/name').")
    subfolder = {"subfolder": "/".join(parts[2:])} if len(parts) > 2 else {}
    return {"path": "/".join(parts[:2]), **subfolder}


def _check_experts(model: Any, names: list[str]) -> tuple[int, set[str]]:
    """Rank and target names (last parts) that all experts share."""
    shapes: dict[str, dict[str, Any]] = {n: {} for n in names}
    for key, layer in model.base_model.named_layers().items():
        for name in names:
            if name not in layer:
                continue
            if not layer.kind.is_linear:
                what = type(layer.get_base_layer()).__name__
                raise TypeError(f"Arrow only supports linear layers, but {name!r} adapts {key!r}, a {what}.")
            shapes[name][key] = tuple(tuple(t.shape) for t in layer.factor_tensors(name))
    first, *others = names
    for name in others:
        if differ := shapes[name].keys() ^ shapes[first].keys():
            raise ValueError(
                f"All experts must target the same modules: {first!r} and {name!r} differ in {sorted(differ)}."
            )
        if shapes[name] != shapes[first]:
            raise ValueError(
                f"All experts must have equal ranks and shapes, but those of {first!r} and {name!r} differ."
            )
    ranks = {A[0] for A, _ in shapes[first].values()}
    if len(ranks) != 1:
        raise ValueError(f"All layers of an expert must have the same rank, {first!r} has {sorted(ranks)}.")
    return ranks.pop(), {key.rpartition(".")[2] for key in shapes[first]}
