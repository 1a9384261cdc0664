# SPDX-License-Identifier: Apache-2.0
"""The published calls that change the scaling of adapters, for layers with a `scaling` slot."""

import warnings
from typing import Any

import torch


class Rescaling:
    """`_initial_scaling(name)` is what the configuration says."""

    def set_scale(self: Any, adapter: str, scale: float | int) -> None:
        """Scaling of one adapter: `scale` times the initial one. Unknown adapters are ignored."""
        if adapter in self.scaling:
            self._put_scaling(adapter, scale * self._initial_scaling(adapter))

    def _put_scaling(self: Any, name: str, value: float) -> None:
        """Scalings that are tensors (prepared for hot swapping) stay the tensors that a compiled graph reads."""
        if isinstance(self.scaling[name], torch.Tensor):
            self.scaling[name].fill_(value)
        else:
            self.scaling[name] = value

    def scale_layer(self: Any, scale: float | int) -> None:
        """Multiply the scaling of the active adapters."""
        for name in self.active_adapters if scale != 1 else ():
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self: Any, scale: float | int | None = None) -> None:
        """Divide the scaling of the active adapters; without a number set it back to the initial one."""
        for name in self.active_adapters:
            if name in self.scaling:
                if scale is None:
                    self._put_scaling(name, self._initial_scaling(name))
                else:
                    self.scaling[name] /= scale


class FixedScale:
    """For methods without a scale: the calls that other libraries make on every layer warn and change nothing."""

    def scale_layer(self: Any, scale: float | int) -> None:
        if scale != 1:
            warnings.warn(
                f"{self.method_name} has no scale to change: scale_layer({scale}) does nothing.", stacklevel=2
            )

    def unscale_layer(self: Any, scale: float | int | None = None) -> None:
        warnings.warn(f"{self.method_name} has no scale to change: unscale_layer does nothing.", stacklevel=2)
