# SPDX-License-Identifier: Apache-2.0
"""Trainable tokens (no paper): rows of an embedding are trained, W' = W with rows `token_indices` replaced by delta.

Delta holds replacement values, not differences. The matrix W' is never built for a forward: looked-up rows and output
columns are patched.
"""

from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import nn

from ..config import PeftConfig, option
from ..core import kinds, tied
from ..core.layer import AdapterLayer
from ..core.modules import making_on_meta
from ..core.slots import Aux, BufferDict, Trainable
from ..core.tuner import TunerModel
from ..ops import rows as ops
from ..registry import register_method

_SLOT = "trainable_tokens_delta"


@dataclass
class TrainableTokensConfig(PeftConfig):
    """Options of trainable tokens."""

    token_indices: list[int] = option(help="Rows (token ids) to train.", factory=list)
    target_modules: list[str] | str | None = option(None, "Embeddings to adapt; default: the model's input embedding.")
    init_weights: bool = option(True, "Start from the base rows; False: from standard normal values.")
    _set_fields = ()  # the published configuration keeps lists


class TrainableTokensLayer(AdapterLayer):
    """Replaces rows of an embedding, or of the weight of an output head that is tied to one."""

    trainable_tokens_delta: Trainable[nn.ParameterDict]  # [k, dim]
    token_indices: Aux[dict]  # k ints
    trainable_tokens_original: Aux[BufferDict]  # [k, dim], the base rows

    kinds = (kinds.Embedding, kinds.Linear)
    weight_need = "read"
    method_name = "trainable_tokens"

    def __init__(self, base_layer: nn.Module, adapter_name: str | None = None, config: Any = None, **kwargs: Any):
        self._tied: dict[str, TrainableTokensLayer] = {}  # adapter -> layer that holds its rows
        # adapter -> (sorted distinct token ids, their rows in delta or None for 0..k-1)
        self._rows: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}
        self._tables: dict[str, torch.Tensor] = {}  # adapter -> row of the sorted tokens for each id, -1 for the others
        self._padding: dict[str, int | None] = {}  # adapter -> row of the padding token, which has no gradient
        super().__init__(base_layer, adapter_name, config, **kwargs)

    # ---- state
    def create(self, name: str, cfg: Any) -> None:
        rows = self._register(name, list(cfg.token_indices))
        if making_on_meta():  # low_cpu_mem_usage: the file brings the values
            delta = torch.empty_like(rows, device="meta")
        else:
            delta = rows.clone() if cfg.init_weights else torch.randn_like(rows)
        self.trainable_tokens_delta[name] = nn.Parameter(delta)

    def tie(self, name: str, source: "TrainableTokensLayer") -> None:
        """Use the rows that `source` holds for adapter `name`; nothing is trained or saved here."""
        if name in self:
            self.drop(name)
        self._register(name, source.token_indices[name])
        self._tied[name] = source
        self._names[name] = None
        self._seen = None

    def _register(self, name: str, indices: list[int]) -> torch.Tensor:
        """Note the indices and the present base rows of an adapter; returns the rows. [k, dim]"""
        weight = self.base_weight()
        rows_first = weight.T if self.kind is kinds.Embedding else weight
        size = rows_first.shape[0]
        if wrong := [i for i in indices if not isinstance(i, Integral) or not 0 <= i < size]:
            raise IndexError(f"Token indices {wrong} are out of range for an embedding with {size} rows.")
        rows = rows_first.detach()[torch.tensor(indices, dtype=torch.long, device=weight.device)].contiguous()
        self.token_indices[name] = list(indices)
        self.trainable_tokens_original[name] = rows.clone()
        last = {token: row for row, token in enumerate(indices)}
        tokens = sorted(last)
        order = None if tokens == indices else torch.tensor([last[t] for t in tokens], dtype=torch.long, device="cpu")
        ids = torch.tensor(tokens, dtype=torch.long, device="cpu")
        self._rows[name] = (ids, order)
        if self.kind is kinds.Embedding:
            base: Any = self.get_base_layer()
            self._tables[name] = ops.slots(ids, size)
            self._padding[name] = tokens.index(base.padding_idx) if base.padding_idx in last else None
        return rows

    def drop(self, name: str) -> None:
        super().drop(name)
        for held in (self._tied, self._rows, self._tables, self._padding):
            held.pop(name, None)

    def delta_rows(self, name: str) -> torch.Tensor:
        """The trained rows of an adapter, also when another layer holds them. [k, dim]"""
        return self._tied.get(name, self).trainable_tokens_delta[name]

    def holders(self) -> dict[str, int]:
        """Adapter -> which layer holds its rows."""
        return {n: id(self._tied.get(n, self)) for n in self._names}

    def _patch(self, name: str, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(distinct token ids in ascending order, their rows of `values`), on one device."""
        tokens, order = self._rows[name]
        if tokens.device != values.device:
            tokens, order = tokens.to(values.device), None if order is None else order.to(values.device)
            self._rows[name] = (tokens, order)
        return tokens, values if order is None else values[order]

    def check_together(self, names: tuple[str, ...]) -> None:
        """Adapters that are active or merged together must train different tokens."""
        owner: dict[int, str] = {}
        for name in names if len(names) > 1 else ():
            for token in set(self.token_indices.get(name, ())):
                if token in owner:
                    raise ValueError(
                        f"Adapters {owner[token]!r} and {name!r} both train token {token}: adapters with common token "
                        "indices cannot be active or merged together."
                    )
                owner[token] = name

    # ---- maths
    def _adapt_activations(self, names: tuple[str, ...], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base = self.base_layer
        if self.kind is not kinds.Linear or not self._base_is_plain(base):
            return super()._adapt_activations(names, x, *args, **kwargs)
        patches = [self._patch(n, self.delta_rows(n).to(x.device)) for n in names]  # of different tokens
        tokens, delta = patches[0] if len(patches) == 1 else map(torch.cat, zip(*patches, strict=True))
        return ops.head(x, base.weight, base.bias, tokens, delta)  # type: ignore[arg-type]

    def map_output(self, name: str, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        base: Any = self.get_base_layer()
        tokens, delta = self._patch(name, self.delta_rows(name).to(y.device))
        if not len(tokens):
            return y
        if self.kind is kinds.Linear:
            return ops.patch(y, x, self._current_bias(), tokens, delta)
        if base.max_norm is not None:  # the lookup limits norms without a gradient
            delta = delta + (torch.renorm(delta.detach(), base.norm_type, 0, base.max_norm) - delta.detach())
        if self._tables[name].device != x.device:
            self._tables[name] = self._tables[name].to(x.device)
        scale, padding = kinds.Embedding.scale(base), self._padding.get(name)
        return ops.embed(y, x, self._tables[name], delta, scale=scale, fixed=padding)

    def map_weight(self, name: str, w: torch.Tensor) -> torch.Tensor:
        return self._with_rows(name, w, self.delta_rows(name))

    def unmap_weight(self, name: str, w: torch.Tensor) -> torch.Tensor:
        return self._with_rows(name, w, self.trainable_tokens_original[name])

    def _with_rows(self, name: str, w: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        tokens, rows = self._patch(name, rows.to(w.device, w.dtype))
        return w.index_copy(1, tokens, rows.T) if self.kind is kinds.Embedding else w.index_copy(0, tokens, rows)

    # ---- merging
    def _take_copy(self, base: nn.Module) -> None:
        """The base rows are kept anyway; a copy of the matrix would also go wrong where tied layers share it. Only
        formats that round what is written need one.
        """
        if self.quantization_backend is not None:
            super()._take_copy(base)

    def base_weight(self) -> torch.Tensor:
        weight = super().base_weight()
        for name in reversed(self.merged_adapters):
            weight = self.unmap_weight(name, weight)
        return weight

    def get_merged_weights(self, active_adapters: list[str]) -> torch.Tensor:
        """The weight with the rows of `active_adapters` in place. [vocab, dim]"""
        names = [n for n in active_adapters if n in self and n not in self.merged_adapters]
        self.check_together((*self.merged_adapters, *names))
        weight = self._current_weight()
        for name in names:
            weight = self.map_weight(name, weight)
        return self._to_storage(weight)

    def _get_name(self) -> str:
        return "TrainableTokensLayer"


@register_method("trainable_tokens", config=TrainableTokensConfig)
class TrainableTokensModel(TunerModel):
    """Trains tokens of the targeted embeddings, and of every module tied to the input embedding."""

    layer_cls = TrainableTokensLayer
    ties_weights = True
    example = {"token_indices": [1, 3, 6]}

    def default_targets(self, cfg: Any, model: nn.Module) -> Any:
        return tied.embedding_name(model)

    def after_inject(self, name: str, cfg: Any, layers: dict[str, AdapterLayer]) -> None:
        source = layers.get(str(tied.embedding_name(self.model)))
        if not isinstance(source, TrainableTokensLayer):
            return
        for key in tied._get_module_names_tied_with_embedding(self.model):
            module = self.model.get_submodule(key)
            if module is source:
                continue
            if isinstance(module, TrainableTokensLayer):
                module.tie(name, source)
                continue
            parent, _, leaf = key.rpartition(".")
            layer: Any = TrainableTokensLayer.wrap(module, self.switch)
            layer.tie(name, source)
            setattr(self.model.get_submodule(parent), leaf, layer)

    # ---- files: a tied layer has its own key there
    def _tied_keys(self, name: str) -> dict[str, str]:
        """File key of a tied layer -> file key of the layer that holds its rows, both relative to the model."""
        layers = {k: m for k, m in self.named_layers().items() if isinstance(m, TrainableTokensLayer)}
        keys = {id(m): k for k, m in layers.items()}
        return {
            f"{k}.{_SLOT}": f"{keys[id(m._tied[name])]}.{_SLOT}"
            for k, m in layers.items()
            if name in m._tied and not k.endswith(".token_adapter")
        }

    def export_state(self, name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for key, source in self._tied_keys(name).items():
            found = next((k for k in state if k == source or k.endswith("." + source)), None)
            if found is not None:
                state[found.removesuffix(source) + key] = state[found]
        return state

    def import_state(self, name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Files with or without the keys of tied layers; "base_layer" is found in files of models adapted twice."""
        for key, source in self._tied_keys(name).items():
            for variant in (key, key.replace(_SLOT, f"base_layer.{_SLOT}")):
                found = next((k for k in state if k == variant or k.endswith("." + variant)), None)
                if found is not None:
                    value = state.pop(found)
                    state.setdefault(found.removesuffix(variant) + source, value)
        return state
