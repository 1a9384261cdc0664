# SPDX-License-Identifier: Apache-2.0
"""Steps of the published injection that other frameworks replace on the class, or call: injection goes through them."""

import warnings
from typing import Any

from torch import nn

from . import match, tied


class PatchPoints:
    """Names, arguments and the odd spelling are the published ones."""

    _injection: Any = None  # the one that is running

    _check_target_module_exists = staticmethod(match.check_target_module_exists)

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        """Nothing: `check_target` refuses what does not fit."""

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        """Adapt one module, or one parameter of it."""
        self._injection.place(peft_config, target, target_name, parent, current_key, parameter_name)

    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> None:
        """Adapt the `target_parameters`, after all modules."""
        self._injection.apply_parameters()

    def _add_modules_to_save_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        """`ensure_weight_tying`: the modules tied to the input embedding share its trained copy."""
        tied.add_modules_to_save_to_tie(peft_config, tied_weight_keys, self.model)  # type: ignore[attr-defined]

    def _add_targets_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        """`ensure_weight_tying` for targets: methods that can tie adapters override it."""
        warnings.warn(
            f"`ensure_weight_tying` was requested, but {type(self).__name__} cannot tie the adapters of the targets "
            f"and of {', '.join(tied_weight_keys)}.",
            stacklevel=5,
        )
