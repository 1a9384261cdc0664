# SPDX-License-Identifier: Apache-2.0
"""Published address of DoRA.

`DoraCaching` (in `peft.helpers`) sets ENABLE_DORA_CACHING: row norms are then kept in eval mode.
"""

from .variants.dora import Dora as Dora
from .variants.dora import Magnitude

ENABLE_DORA_CACHING = False
DoraLinearLayer = DoraEmbeddingLayer = DoraConv1dLayer = DoraConv2dLayer = DoraConv3dLayer = Magnitude
