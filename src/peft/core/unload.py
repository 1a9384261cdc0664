# SPDX-License-Identifier: Apache-2.0
"""Merging the adapters of a whole model and taking the layers away again: the merging half of TunerModel."""

import warnings
from typing import Any

from torch import nn

from . import tied
from .inject import walk
from .layer import AdapterLayer
from .merge import refuse_str
from .offload import onload_layer, unsharded
from .wrappers import AuxiliaryTrainingWrapper


class WholeModelMerge:
    """See the methods."""

    def _check_merge_allowed(self: Any) -> None:
        """Raise when merging is impossible for the model as a whole."""
        tied.untie_for_merge(self)

    def merge_adapter(self: Any, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters (default: the active ones) into the base weights; the layers stay, to be unmerged."""
        refuse_str(adapter_names)
        self._check_merge_allowed()
        self.switch.call.clear()
        with unsharded(self.model, write=True):
            for layer in reversed(self.layers()):  # of nested layers the inner one first
                with onload_layer(layer):
                    layer.merge(adapter_names=adapter_names, safe_merge=safe_merge)

    def unmerge_adapter(self: Any) -> None:
        """Take merged adapters out again, last merged first: tied weights and nested layers become what they were."""
        with unsharded(self.model, write=True):
            for layer in self.layers():
                with onload_layer(layer):
                    layer.unmerge()

    def merge_and_unload(
        self: Any, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Merge and take all adapter layers away; returns the base model (the same object, changed in place)."""
        return self._unload_and_optionally_merge(True, progressbar, safe_merge, adapter_names)

    def unload(self: Any) -> nn.Module:
        """Take all adapter layers away without merging; returns the base model."""
        return self._unload_and_optionally_merge(False)

    def _unload_and_optionally_merge(
        self: Any,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """Other frameworks replace this method."""
        from tqdm import tqdm

        refuse_str(adapter_names)
        if merge:
            self._check_merge_allowed()
            if safe_merge:  # nothing is taken away when one layer refuses
                self.merge_adapter(adapter_names, safe_merge=True)
        nodes = [n for n in walk(self.model) if isinstance(n.module, (AdapterLayer, AuxiliaryTrainingWrapper))]
        text = "Unloading " + ("and merging " if merge else "") + "model"
        for node in tqdm(nodes, disable=not progressbar, desc=text):
            self._unload_node(node.parent, node.leaf, node.module, merge, adapter_names)
        self.forget_layers()
        tied.after_unload(self.model)
        self.model.__dict__.pop("peft_config", None)
        return self.model

    def _unload_node(
        self: Any, parent: nn.Module, leaf: str, module: nn.Module, merge: bool, names: list[str] | None
    ) -> None:
        if isinstance(module, AuxiliaryTrainingWrapper):
            setattr(parent, leaf, module.unload_and_optionally_merge_module(merge, False, names))
            return
        assert isinstance(module, AdapterLayer)
        chain = [module]
        while isinstance(chain[-1].base_layer, AdapterLayer):
            chain.append(chain[-1].base_layer)
        with onload_layer(module):
            for layer in reversed(chain):
                if merge and layer.mergeable is False and any(n in layer for n in (names or self.active_adapters)):
                    raise layer._cannot_merge()
                if merge:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # "already merged" is what safe_merge just did
                        keep = layer is not module  # outer ones may need the pristine weight
                        layer.merge(adapter_names=names, keep=keep)
                elif layer.merged:
                    layer.unmerge()
        base = module.get_base_layer()
        setattr(parent, leaf, base)
        for name, child in list(base.named_children()):
            if isinstance(child, AdapterLayer):  # out_proj of an attention module
                self._unload_node(base, name, child, merge, names)
