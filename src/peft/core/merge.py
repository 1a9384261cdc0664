# SPDX-License-Identifier: Apache-2.0
"""Merging of adapters into base weights and back, for one layer.

The first merge keeps a copy of the base tensors on the CPU, and unmerging puts it back: bit by bit the same, whatever
the dtype and however often. `merge_and_unload` never unmerges and keeps nothing.
"""

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from ..storage.dtensor import put, whole
from .offload import loaded

if TYPE_CHECKING:
    from .layer import AdapterLayer


def refuse_str(adapter_names: Iterable[str] | None) -> None:
    if isinstance(adapter_names, str):
        raise TypeError(f"adapter_names should be a list of strings, got the str {adapter_names!r}.")


def check_adapters_to_merge(module: "AdapterLayer", adapter_names: Iterable[str] | None = None) -> list[str]:
    """The adapters to merge now: the given ones (default: the active ones) that are not merged yet."""
    refuse_str(adapter_names)
    names = list(module.active_adapters if adapter_names is None else adapter_names)
    if module.merged:
        done = set(module.merged_adapters)
        names = [n for n in names if n not in done]
        if names:
            how = "instead" if "replace" in module.hooks else "additionally"
            warnings.warn(
                f"Already following adapters were merged {','.join(done)}. You are now {how} merging "
                f"{','.join(names)}.",
                stacklevel=3,
            )
        else:
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=3)
    return names


class Mergeable:
    """The merging half of AdapterLayer."""

    def merge(
        self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None, *, keep: bool = True
    ) -> None:
        """Write the adapters into the base layer.

        `safe_merge` refuses results that are not finite, before anything is written. `keep=False` saves the memory of
        the copy that `unmerge` needs.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self]
        if "replace" in self.hooks and len(names) > 1:
            raise ValueError(f"{self.method_name} adapters replace the layer: only one can be merged, got {names}.")
        forget = not keep and len(names) > 1  # later adapters may need the pristine weight
        for name in names:
            if not self.mergeable:
                raise self._cannot_merge()
            if "replace" in self.hooks:
                if safe_merge:
                    self._check_finite(name, *self.parameters_of(name))
                if self.merged:
                    self.unmerge()
                self._swap(name)
            else:
                self._merge_one(name, safe_merge, keep or forget)
            self.merged_adapters.append(name)
        if forget:
            self._saved_weights.clear()
        self._seen = None

    def _cannot_merge(self: Any) -> Exception:
        if not self.storage.writable:
            return TypeError(
                f"Cannot merge into a {self.storage.label} weight. Load the base model unquantised to merge."
            )
        return NotImplementedError(
            f"{self.method_name} adapters depend on the input, they cannot be merged into a weight."
        )

    @torch.no_grad()
    def _merge_one(self: Any, name: str, safe_merge: bool, keep: bool) -> None:
        base, kind, storage = self.get_base_layer(), self.kind, self.storage
        self.check_merge(name)
        self.check_together((*self.merged_adapters, name))
        has_bias = self._merged_bias_changes(name)
        additive = self.additive(name) and storage.label is None and not safe_merge
        if additive:  # no full-size copies: deltas are added in place
            delta, delta_bias = self._weight_delta(name), self.delta_bias(name)
            self._check_bias(base, delta_bias)
        else:
            weight, bias = self._applied(name, self._current_weight(), self._current_bias() if has_bias else None)
            if safe_merge:
                self._check_finite(name, weight, bias)
        if keep and not self._saved_weights:
            self._take_copy(base)
        if additive:
            if delta is not None:
                self._rebase(storage.add_(base, self._to_storage(delta), kind.weight_name))
            if delta_bias is not None:
                put(kind.bias(base), self._current_bias() + delta_bias)
            return
        self._rebase(storage.write(base, self._to_storage(weight), kind.weight_name))
        if has_bias and bias is not None:
            put(kind.bias(self.get_base_layer()), bias)

    def check_merge(self: Any, name: str) -> None:
        """Raise when this layer's adapter has no weight form (grouped convolutions ...)."""
        if getattr(self.get_base_layer(), "max_norm", None) is not None:
            raise NotImplementedError(
                f"A {self.method_name} adapter cannot be merged into an embedding with max_norm: the merged rows would "
                "be renormalised, and the adapter's are not."
            )

    def check_together(self: Any, names: tuple[str, ...]) -> None:
        """Raise when these adapters cannot be active, or merged, at the same time."""

    def additive(self: Any, name: str) -> bool:
        """Whether merging adapter `name` only adds to the weight and bias."""
        return not self.hooks & {"map_weight", "map_bias"}

    def _merged_bias_changes(self: Any, name: str) -> bool:
        return bool(self.hooks & {"delta_bias", "map_bias"})

    def _weight_delta(self: Any, name: str) -> torch.Tensor | None:
        return self.delta_weight(name) if self.hooks & {"delta_weight", "factors"} else None

    def _check_bias(self: Any, base: Any, delta_bias: torch.Tensor | None) -> None:
        if delta_bias is not None and self.kind.bias(base) is None:
            raise RuntimeError(
                f"Impossible to merge a {self.method_name} adapter with a bias into a layer without one."
            )

    def _applied(
        self: Any, name: str, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Canonical weight and bias after adapter `name`."""
        weight = weight.float() if weight.dtype.itemsize == 1 else weight  # float8 has no arithmetic
        delta = self._weight_delta(name)
        if delta is not None:
            weight = weight + delta
        if "map_weight" in self.hooks:
            weight = self.map_weight(name, weight)
        if "delta_bias" in self.hooks and (delta_bias := self.delta_bias(name)) is not None:
            if bias is None:
                self._check_bias(self.get_base_layer(), delta_bias)
            bias = delta_bias if bias is None else bias + delta_bias
        if bias is not None and "map_bias" in self.hooks:
            bias = self.map_bias(name, bias)
        return weight, bias

    def _check_finite(self: Any, name: str, *tensors: torch.Tensor | None) -> None:
        if any(t is not None and not torch.isfinite(t).all() for t in tensors):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")

    def _rebase(self: Any, base: torch.nn.Module) -> None:
        """Storages whose writing makes a new base module return it."""
        if base is not self.get_base_layer():
            layer = self
            while hasattr(layer.base_layer, "base_layer"):
                layer = layer.base_layer
            layer.base_layer = base

    def _swap(self: Any, name: str) -> None:
        """Replacement methods merge by exchanging the modules."""
        module = self.replace(name)
        self._saved_weights["module"] = self._saved_weights.get("module", self.base_layer)
        self.base_layer = module

    def pristine_module(self: Any) -> torch.nn.Module:
        """The base layer of a replacement method, whatever is merged now."""
        return self._saved_weights.get("module", self.base_layer)

    # ---- copies of the base --------------------------------------------------------------------------------
    def _take_copy(self: Any, base: torch.nn.Module) -> None:
        self._saved_weights["weight"] = self.storage.snapshot(base, self.kind.weight_name)
        bias = self.kind.bias(base)
        if bias is not None and self.hooks & {"delta_bias", "map_bias"}:
            self._saved_weights["bias"] = bias.detach().to("cpu", copy=True)

    def unmerge(self: Any) -> None:
        """Take all merged adapters out again; the base is bit by bit what it was before the first merge."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base, saved = self.get_base_layer(), self._saved_weights
        if "module" in saved:
            self.base_layer = saved["module"]
        elif saved:
            self._rebase(self.storage.restore(base, saved["weight"], self.kind.weight_name))
            if "bias" in saved:
                with torch.no_grad():
                    put(self.kind.bias(base), saved["bias"])
        else:
            self._subtract()
        self._saved_weights = {}
        self.merged_adapters.clear()
        self._seen = None

    @torch.no_grad()
    def _subtract(self: Any) -> None:
        """Without a copy (merged with keep=False): the inverse maps, equal up to rounding."""
        base, kind = self.get_base_layer(), self.kind
        inverse = "unmap_weight" in self.hooks or "map_weight" not in self.hooks
        if not (inverse and self.standalone_delta):  # a delta of the pristine weight cannot be had from the merged one
            raise RuntimeError(f"{self.method_name} adapters merged with keep=False cannot be unmerged.")
        for name in reversed(self.merged_adapters):
            weight, bias = self._current_weight(), kind.bias(base)
            weight = self.unmap_weight(name, weight)
            delta = self._weight_delta(name)
            weight = weight if delta is None else weight - delta
            self._rebase(self.storage.write(base, self._to_storage(weight), kind.weight_name))
            if bias is not None and (delta_bias := self.delta_bias(name)) is not None:
                put(bias, self._current_bias() - delta_bias)

    def base_weight(self: Any) -> torch.Tensor:
        """The pristine canonical base weight, whatever is merged now. [out, in, *kernel]"""
        saved = self._pristine("weight")
        if saved is not None:
            return self.kind.canonical(self.storage.thaw(saved, self.get_base_layer()))
        return self._current_weight()

    def get_base_weight(self: Any) -> torch.Tensor:
        """The base weight as it is now, in floats and in the orientation in which the layer stores it."""
        return self._stored_weight().detach()

    def set_base_weight(self: Any, weight_data: torch.Tensor) -> None:
        """Write the base weight, given in the orientation in which the layer stores it."""
        if self.merged or self._pristine("weight") is not None:
            raise RuntimeError(
                "The base weight has adapters merged into it: call `unmerge_adapter` before changing it."
            )
        base, shape = self.get_base_layer(), self.get_base_weight().shape
        if weight_data.shape != shape:
            raise ValueError(
                f"The base weight of this {type(base).__name__} is stored as {list(shape)}, got a tensor of shape "
                f"{list(weight_data.shape)}. Give it in the orientation of `get_base_weight`."
            )
        self._rebase(self.storage.write(base, weight_data, self.kind.weight_name))
        weight = getattr(self.get_base_layer(), self.kind.weight_name)
        if isinstance(weight, torch.nn.Parameter) and not weight.is_inference():
            torch.autograd.graph.increment_version(weight)  # DoRA keeps norms of the version it saw

    def _pristine(self: Any, name: str) -> Any:
        """The copy of the tensor that was taken first: by the innermost layer around it that has merged."""
        found, layer, innermost = None, self, self.get_base_layer()
        while layer is not innermost:
            if layer.kind.weight_name == self.kind.weight_name:
                found = layer._saved_weights.get(name, found)
            layer = layer.base_layer
        return found

    def base_bias(self: Any) -> torch.Tensor | None:
        """The pristine base bias."""
        bias = self.kind.bias(self.get_base_layer())
        saved = self._pristine("bias")
        return self._current_bias() if saved is None or bias is None else whole(saved.to(bias.device))

    def _stored_weight(self: Any) -> torch.Tensor:
        base, name = self.get_base_layer(), self.kind.weight_name
        weight = self.storage.read(base, name)
        if weight.is_meta:
            with loaded(base):
                weight = self.storage.read(base, name)
        return weight

    def _current_weight(self: Any) -> torch.Tensor:
        return self.kind.canonical(self._stored_weight())

    def _current_bias(self: Any) -> torch.Tensor | None:
        base = self.get_base_layer()
        bias = self.kind.bias(base)
        if bias is not None and bias.is_meta:
            with loaded(base):
                bias = self.kind.bias(base)
        return None if bias is None else whole(bias)

    def _to_storage(self: Any, weight: torch.Tensor) -> torch.Tensor:
        return self.kind.stored(weight)

    @torch.no_grad()
    def get_delta_weight(self: Any, adapter: str) -> torch.Tensor:
        """What merging the adapter adds to the base weight, in the orientation of the base weight."""
        if not self.hooks & {"delta_weight", "factors", "map_weight"}:
            raise NotImplementedError(f"{self.method_name} adapters have no delta weight.")
        if self.hooks & {"delta_weight", "factors"} and self.additive(adapter):
            return self._to_storage(self.delta_weight(adapter))
        weight = self.base_weight()
        merged, _ = self._applied(adapter, weight, None)
        return self._to_storage(merged - weight.to(merged.dtype))
