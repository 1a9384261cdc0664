# SPDX-License-Identifier: Apache-2.0
"""Inlay: parameter-efficient fine-tuning. Public names are imported on first use, so `import peft` costs next to
nothing.
"""

from .exports import PUBLIC_NAMES, public_attributes, words
from .version import __inlay_version__ as __inlay_version__
from .version import __version__ as __version__

_SUBMODULES = words(
    "auto cli config core exports functional helpers import_utils io mapping mapping_func mixed_model model_card ops "
    "optimizers peft_model registry status storage task_models tuners utils version"
)

__all__ = PUBLIC_NAMES  # pyright: ignore[reportUnsupportedDunderAll]
__getattr__, __dir__ = public_attributes(__name__, PUBLIC_NAMES, _SUBMODULES)
