# SPDX-License-Identifier: Apache-2.0
"""Gates: factors on the deltas of single tokens, for one call (`switch.call.gates`).

y_t = W x_t + g · Σ_e S[t, l, e] · delta_e(x_t) in layer l, for the low-rank adapters e of the layer.
"""

from typing import Any

import torch
import torch.nn.functional as F

from .layer import AdapterLayer


class EqualGates:
    """The same factor for all tokens and experts: the first pass."""

    def __init__(self, factor: float):
        self.factor = factor

    def forward(
        self, layer: AdapterLayer, names: tuple[str, ...], x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        y = layer._base_output(x, *args, **kwargs)
        if self.factor == 0:
            return y
        deltas = (layer.delta(n, layer._cast_input(n, x), y) for n in names)
        return (y + self.factor * sum(deltas)).to(y.dtype)


class TokenGates:
    """The mixture S [b, T, L, E] of one call, applied by the layers."""

    def __init__(self, S: torch.Tensor, layers: list[AdapterLayer], experts: list[str], factor: float):
        self.S, self.factor = S, factor
        self.rows = {id(layer): i for i, layer in enumerate(layers)}
        self.columns = {name: i for i, name in enumerate(experts)}

    def forward(
        self, layer: AdapterLayer, names: tuple[str, ...], x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        y = layer._base_output(x, *args, **kwargs)
        S = self._aligned(self.S[:, :, self.rows[id(layer)]], x if layer.kind.float_input else x.unsqueeze(-1))
        columns = [self.columns[n] for n in names]
        if layer.kind.is_linear and all(self._plain(layer, n) for n in names):
            return self._stacked(layer, names, S[..., columns], x, y)
        out = y
        for name, column in zip(names, columns, strict=True):
            s = S[..., column : column + 1]
            if layer.kind.float_input:
                xs = layer._cast_input(name, x)
                delta = layer.delta(name, xs * s.to(xs.dtype), y)
            else:  # token ids
                delta = layer.delta(name, x, y) * s
            out = out + self.factor * delta
        return out.to(y.dtype)

    @staticmethod
    def _plain(layer: Any, name: str) -> bool:
        """Only A and B matter: no bias, no dropout now."""
        return layer._is_factored(name) and not layer.factors(name).dropout

    def _stacked(
        self, layer: Any, names: tuple[str, ...], S: torch.Tensor, x: torch.Tensor, y: torch.Tensor
    ) -> torch.Tensor:
        """All experts in two products: A and B side by side, the mixture on the ranks between them."""
        factors = [layer.factors(n) for n in names]
        A, B = torch.cat([f.A for f in factors]), torch.cat([f.B for f in factors], 1)
        ranks, scales = [len(f.A) for f in factors], [f.scale * self.factor for f in factors]
        if len(set(ranks)) == len(set(scales)) == 1:  # nothing to send to the device
            gate = (S * scales[0]).repeat_interleave(ranks[0], -1)
        else:
            each = torch.tensor(ranks, device=S.device)
            gate = (S * S.new_tensor(scales)).repeat_interleave(each, -1, output_size=len(A))
        delta = F.linear(F.linear(layer._cast_input(names[0], x), A) * gate.to(A.dtype), B)
        return y + delta.to(y.dtype)

    @staticmethod
    def _aligned(S: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """S [b, T, E] for the tokens that the layer sees: all, flattened, or the last ones (head)."""
        b, T, _ = S.shape
        if x.dim() == 2 and x.shape[0] == b * T:
            return S.flatten(0, 1)
        if x.dim() == 3 and x.shape[0] == b and x.shape[1] <= T:
            return S[:, T - x.shape[1] :]
        raise ValueError(
            f"X-LoRA has a mixture for {b} x {T} tokens, but an adapted layer got an input of shape {tuple(x.shape)}: "
            "it can only mix experts in layers that see the tokens of the model's output."
        )
