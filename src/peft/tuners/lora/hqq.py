# SPDX-License-Identifier: Apache-2.0
"""Published address of LoRA over HQQ linear layers; see `bnb.py`."""

from .bnb import Linear8bitLt


class HqqLoraLinear(Linear8bitLt):
    """Stands for LoRA over a HQQ layer."""

    labels = ("hqq",)
