# SPDX-License-Identifier: Apache-2.0
"""MiCA (arXiv 2604.01694): B holds the minor left singular vectors of W and stays frozen, A is trained.

See `init.mica`.
"""

from ....core import kinds
from .base import LoraVariant


class Mica(LoraVariant):
    name = "MiCA"
    kinds = (kinds.Linear, kinds.Conv1D, kinds.Embedding)
    frozen = ("lora_B", "lora_embedding_B")
