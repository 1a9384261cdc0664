# SPDX-License-Identifier: Apache-2.0
"""Old address of `peft.io.hotswap`."""

from ._lazy import lazy_attributes, owners

_HOMES = owners(
    {
        "peft.io.hotswap": (
            "CONFIG_KEYS_TO_CHECK check_hotswap_configs_compatible hotswap_adapter hotswap_adapter_from_state_dict "
            "prepare_model_for_compiled_hotswap"
        )
    }
)

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]
__getattr__, __dir__ = lazy_attributes(__name__, _HOMES)
