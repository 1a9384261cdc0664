# SPDX-License-Identifier: Apache-2.0
"""Published address of LoRA over AQLM linear layers; see `bnb.py`."""

from .bnb import Linear8bitLt


class AqlmLoraLinear(Linear8bitLt):
    """Stands for LoRA over a AQLM layer."""

    labels = ("aqlm",)
