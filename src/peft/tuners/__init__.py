# SPDX-License-Identifier: Apache-2.0
"""The methods, one file (or folder) each. Names are imported on first use."""

from ..exports import TUNER_NAMES, public_attributes, tuner_modules

__all__ = TUNER_NAMES  # pyright: ignore[reportUnsupportedDunderAll]
__getattr__, __dir__ = public_attributes(__name__, TUNER_NAMES, [*tuner_modules().values()])
