# SPDX-License-Identifier: Apache-2.0
"""Small base models of these tests."""

import torch
from torch import nn


class Net(nn.Module):
    """Linear, embedding, convolution, attention, norm, nested blocks, and names that look like adapter slots."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(10, 8)
        self.lin0 = nn.Linear(8, 8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.block = nn.ModuleDict({"a": nn.Linear(8, 8, bias=False), "lora_thing": nn.Linear(8, 8)})
        self.conv = nn.Conv1d(8, 8, 1)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.lin0(self.emb(ids))
        x = x + self.attn(x, x, x, need_weights=False)[0]
        x = self.block["lora_thing"](self.block["a"](x))
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.head(self.norm(x))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


def ids() -> torch.Tensor:
    return torch.arange(10).view(2, 5)


def fill(model: nn.Module, name: str, seed: int = 1) -> None:
    """Random values for everything that belongs to one adapter."""
    from peft.io.keys import adapter_entries

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for entry in adapter_entries(model, name):
            if entry.tensor.is_floating_point():
                entry.tensor.copy_(torch.randn(entry.tensor.shape, generator=generator) * 0.3)


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[k], v) for k, v in before.items())
