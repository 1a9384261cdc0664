# SPDX-License-Identifier: Apache-2.0
"""The caches of base model and shadow network as one, for `generate`."""

from typing import Any

import torch
from transformers.cache_utils import Cache


class ShadowCache(Cache):
    """What base model code sees is the cache `base`; whatever changes rows or lengths is done to `shadow` too."""

    def __init__(self, base: Cache, shadow: Cache):
        self.base, self.shadow = base, shadow  # Cache.__init__ would make layers of its own

    @property
    def layers(self) -> list:  # type: ignore[override]
        return self.base.layers

    def __getattr__(self, name: str) -> Any:
        if name in ("base", "shadow"):  # while unpickling
            raise AttributeError(name)
        return getattr(self.base, name)

    def __repr__(self) -> str:
        return f"ShadowCache(base={self.base}, shadow={self.shadow})"

    def __len__(self) -> int:
        return len(self.base)

    def update(self, *args: Any, **kwargs: Any) -> Any:
        return self.base.update(*args, **kwargs)

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return self.base.get_seq_length(*args, **kwargs)

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> Any:
        return self.base.get_mask_sizes(*args, **kwargs)

    @property
    def is_compileable(self) -> bool:
        return False

    def to_legacy_cache(self) -> Any:
        raise NotImplementedError("A ShadowCache has no form as tuples.")

    # ---- both
    def reset(self) -> None:
        for cache in (self.base, self.shadow):
            cache.reset()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        for cache in (self.base, self.shadow):
            cache.reorder_cache(beam_idx)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        for cache in (self.base, self.shadow):
            cache.crop(*args, **kwargs)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for cache in (self.base, self.shadow):
            cache.batch_repeat_interleave(repeats)

    def activate_past_recording(self) -> None:
        for cache in (self.base, self.shadow):
            cache.activate_past_recording()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        for cache in (self.base, self.shadow):
            cache.batch_select_indices(indices)
