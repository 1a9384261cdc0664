# SPDX-License-Identifier: Apache-2.0
"""Published address of LoRA over AWQ linear layers; see `bnb.py`."""

from .bnb import Linear8bitLt


class AwqLoraLinear(Linear8bitLt):
    """Stands for LoRA over a AWQ layer."""

    labels = ("awq",)
