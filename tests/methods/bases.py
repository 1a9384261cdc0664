"""Tiny base models, one a layer kind, for the contract tests. Targeted layers are called lin0 and lin1."""

import os

import torch
from torch import nn

# Where the contract tests run: `PEFT_TEST_DEVICE=cuda make test` runs the same battery on an accelerator.
DEVICE = torch.device(os.environ.get("PEFT_TEST_DEVICE", "cpu"))
torch.backends.cudnn.allow_tf32 = False  # the tolerances are those of float32
if DEVICE.type == "cuda":  # index_add, for one, adds in any order there
    torch.use_deterministic_algorithms(True, warn_only=True)


class Net(nn.Module):
    """in -> lin0 -> tanh -> lin1, of one layer kind."""

    def __init__(self, lin0: nn.Module, lin1: nn.Module, flatten: bool = False):
        super().__init__()
        self.lin0, self.act, self.lin1, self.flatten = lin0, nn.Tanh(), lin1, flatten

    def forward(self, x):
        h = self.lin0(x)
        return self.lin1(self.act(h) if h.is_floating_point() else h)


class AttentionNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0 = nn.MultiheadAttention(16, 2, batch_first=True)
        self.lin1 = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x):
        x = self.lin0(x, x, x, need_weights=False)[0]
        return self.lin1(x, x, x, need_weights=False)[0]


def _linear() -> nn.Module:
    return Net(nn.Linear(16, 24), nn.Linear(24, 16))


def _conv1d_hf() -> nn.Module:
    from transformers.pytorch_utils import Conv1D as HFConv1D

    net = Net(HFConv1D(24, 16), HFConv1D(16, 24))
    for module in (net.lin0, net.lin1):  # its own initialisation is nearly zero
        nn.init.normal_(module.weight, std=0.3)
        nn.init.normal_(module.bias, std=0.1)
    return net


def _conv(cls, kernel: int = 3) -> nn.Module:
    return Net(cls(4, 8, kernel, padding=kernel // 2), cls(8, 4, kernel, padding=kernel // 2))


def _embedding() -> nn.Module:
    return Net(nn.Embedding(10, 16), nn.Linear(16, 24))


BASES = {
    "Linear": _linear,
    "Conv1D": _conv1d_hf,
    "Conv1d": lambda: _conv(nn.Conv1d),
    "Conv2d": lambda: _conv(nn.Conv2d),
    "Conv3d": lambda: _conv(nn.Conv3d),
    "Embedding": _embedding,
    "MultiheadAttention": AttentionNet,
    "Norm": lambda: Net(nn.LayerNorm(16), nn.LayerNorm(16)),
}


def base(kind: str) -> nn.Module:
    torch.manual_seed(7)
    return BASES[kind]().eval().to(DEVICE)


def inputs(kind: str, rows: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    if kind == "Embedding":
        return torch.randint(0, 10, (rows, 5), generator=generator).to(DEVICE)
    shape = {"Conv1d": (4, 7), "Conv2d": (4, 6, 5), "Conv3d": (4, 5, 4, 3), "MultiheadAttention": (5, 16)}.get(
        kind, (5, 16)
    )
    return torch.randn(rows, *shape, generator=generator).to(DEVICE)


def targets(kind: str) -> list[str]:
    return ["lin0"] if kind == "Embedding" else ["lin0", "lin1"]
