# SPDX-License-Identifier: Apache-2.0
"""Published address of LoRA over GPTQ linear layers; see `bnb.py`."""

from .bnb import Linear8bitLt


class GPTQLoraLinear(Linear8bitLt):
    """Stands for LoRA over a GPTQ layer."""

    labels = ("gptq",)
