# SPDX-License-Identifier: Apache-2.0
"""Published address of LoRA over EETQ linear layers; see `bnb.py`."""

from .bnb import Linear8bitLt


class EetqLoraLinear(Linear8bitLt):
    """Stands for LoRA over a EETQ layer."""

    labels = ("eetq",)
