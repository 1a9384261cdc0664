# SPDX-License-Identifier: Apache-2.0
"""`add_weighted_adapter` of LoRA: which layers and factors go into a combination; the arithmetic is in
`core/combine.py`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...core.combine import combine_factors, resolve_combination
from ...core.weighted import combined_config
from .layer import LoraLayer

if TYPE_CHECKING:
    from .model import LoraModel

# Options of variants that change the factors' form: the combination is a plain LoRA.
_PLAIN = {"use_bdlora": None, "monteclora_config": None, "velora_config": None}


def combine(
    tuner: "LoraModel",
    adapters: Sequence[str],
    weights: Sequence[float],
    name: str,
    kind: str,
    svd_rank: int | None,
    options: dict[str, Any],
) -> None:
    """Add adapter `name`: on each layer, the combination of the sources that are there.

    Nothing stays behind on an error.
    """
    if missing := [n for n in adapters if n not in tuner.peft_config]:
        raise ValueError(f"Adapter(s) {missing} not found in {sorted(tuner.peft_config)}.")
    configs: list[Any] = [tuner.peft_config[n] for n in adapters]
    if with_parameters := [n for n, c in zip(adapters, configs, strict=True) if c.target_parameters]:
        raise ValueError(f"add_weighted_adapter does not support target_parameters, which {with_parameters} use.")
    if any(c.kasa_config or c.arrow_config for c in configs):
        raise ValueError(
            "KaSA and Arrow adapters cannot be combined: they belong to a changed base or route to other adapters."
        )
    ranks = [max([c.r, *(c.rank_pattern or {}).values()]) for c in configs]
    cfg = combined_config(tuner, adapters, weights)
    kind, rank = resolve_combination(kind, ranks, svd_rank)
    init = cfg.init_lora_weights if isinstance(cfg.init_lora_weights, bool) else True  # others may change the base
    bias = any(c.lora_bias for c in configs)
    cfg = cfg.with_values(
        r=rank, lora_alpha=rank, use_rslora=False, rank_pattern={}, alpha_pattern={}, init_lora_weights=init,
        lora_bias=bias, **_PLAIN,
    )  # fmt: skip
    tuner.add(name, cfg)
    try:
        tuner.set_requires_grad([name], False)
        for layer in tuner.layers():
            if isinstance(layer, LoraLayer) and name in layer:
                _combine_layer(layer, adapters, weights, name, kind, rank, options)
    except BaseException:
        tuner.delete_adapter(name)
        raise


@torch.no_grad()
def _combine_layer(
    layer: LoraLayer,
    adapters: Sequence[str],
    weights: Sequence[float],
    name: str,
    kind: str,
    rank: int,
    options: dict[str, Any],
) -> None:
    sources = [(n, w) for n, w in zip(adapters, weights, strict=True) if n in layer]
    parameters = layer.factor_tensors(name)
    if not isinstance(parameters[0], nn.Parameter):  # a tied layer follows its embedding
        return
    if layer.delta_bias(name) is not None:
        bias: Any = layer.lora_B[name].bias
        bias.zero_()
        for n, w in sources:
            if (added := layer.delta_bias(n)) is not None:
                bias.add_(added, alpha=w)
    if not sources:
        parameters[1].zero_()
        return
    factors = [layer.static_factors(n) for n, _ in sources]
    own_rank = rank if "svd" in kind else None
    parts = [(f.A, f.B, float(f.scale)) for f in factors]
    A, B = combine_factors(kind, parts, [w for _, w in sources], rank=own_rank, **options)
    missing = rank - A.shape[0]
    if missing > 0:  # ranks that differ by layer
        A = torch.cat([A, A.new_zeros(missing, *A.shape[1:])])
        B = torch.cat([B, B.new_zeros(B.shape[0], missing, *B.shape[2:])], dim=1)
    for parameter, value in zip(parameters, (A, B), strict=True):
        parameter.data = value.to(parameter.device)
    magnitudes: list[tuple[float, Any]] = [
        (w, layer.lora_magnitude_vector[n].weight) for n, w in sources if n in layer.lora_magnitude_vector
    ]
    if name in layer.lora_magnitude_vector and magnitudes:
        total = sum(abs(w) for w, _ in magnitudes) or 1.0
        mean: Any = sum(abs(w) / total * m for w, m in magnitudes)
        layer.lora_magnitude_vector[name].weight.data.copy_(mean)  # type: ignore[union-attr, operator]
