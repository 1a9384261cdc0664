# SPDX-License-Identifier: Apache-2.0
"""ShadowPEFT: a small trained network runs beside a frozen transformer and corrects each of its blocks.

What needs transformers (`ShadowCache`, `DetachedShadowModel`) is imported on first use.
"""

from ...utils._lazy import lazy_attributes, owners
from .config import ShadowConfig as ShadowConfig
from .layer import ShadowLayer as ShadowLayer
from .model import ShadowModel as ShadowModel

__getattr__, __dir__ = lazy_attributes(
    __name__,
    owners(
        {
            "peft.tuners.shadow.cache": "ShadowCache",
            "peft.tuners.shadow.detached": "DetachedShadowModel",
        }
    ),
)
