# SPDX-License-Identifier: Apache-2.0
"""The caches of base model and shadow network as one, for `generate`."""

from typing import Any

from transformers.cache_utils import Cache


class ShadowCache(Cache):
    """What base model code sees is the cache `base`; whatever changes rows or lengths is done to `shadow` too."""

    def __init__(self, base: Cache, shadow: Cache):
        self.base, self.shadow = base, shadow  # Cache.__init__ would make layers of its own

    def __getattr__(self, name: str) -> Any:
        if name in ("base", "shadow"):  # while copying or unpickling
            raise AttributeError(name)
        return getattr(self.base, name)

    def __len__(self) -> int:
        return len(self.base)

    @property
    def is_compileable(self) -> bool:
        return False

    def to_legacy_cache(self) -> Any:
        raise NotImplementedError("A ShadowCache has no form as tuples.")


def _forwarding(name: str, *caches: str) -> Any:
    """A method that calls its namesake on these caches and returns what the last one does."""

    def method(self: ShadowCache, *args: Any, **kwargs: Any) -> Any:
        return [getattr(getattr(self, cache), name)(*args, **kwargs) for cache in caches][-1]

    return method


for _name in ("update", "get_seq_length", "get_mask_sizes"):
    setattr(ShadowCache, _name, _forwarding(_name, "base"))
for _name in (
    "reset", "reorder_cache", "crop", "activate_past_recording", "batch_repeat_interleave", "batch_select_indices",
):  # fmt: skip
    setattr(ShadowCache, _name, _forwarding(_name, "base", "shadow"))
