"""What each process of the tests of split torch layers runs: `python <this> CASE`.

Layers are split by torch's own `parallelize_module`: unevenly, over one axis of a mesh whose other axis shares the
batch, and compiled. One process with the whole layers and the whole batch is what each case is compared with.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from tests.ecosystem import tiny
from tests.processes import leave
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import peft

CONFIGS: dict[str, Callable[..., peft.PeftConfig]] = {
    "lora": lambda **kw: peft.LoraConfig(r=4, **kw),
    "dora": lambda **kw: peft.LoraConfig(r=4, use_dora=True, **kw),
    "ia3": lambda **kw: peft.IA3Config(feedforward_modules=["down"], **kw),
    "loha": lambda **kw: peft.LoHaConfig(r=4, **kw),
    "vera": lambda **kw: peft.VeraConfig(r=4, **kw),
    "hra": lambda **kw: peft.HRAConfig(r=4, **kw),
    "fourierft": lambda **kw: peft.FourierFTConfig(n_frequency=40, **kw),
}
STEPS, ROWS = 3, 8


class Pair(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(15, hidden), nn.Linear(hidden, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def made(case: str, hidden: int, mesh: DeviceMesh | None = None) -> Any:
    base = Pair(hidden)
    if mesh is not None:
        # torch takes the parts of activations that come in as equal, so between uneven layers they are whole
        between = {} if hidden % mesh.size() == 0 else {"output_layouts": Replicate()}
        back = {} if hidden % mesh.size() == 0 else {"input_layouts": Replicate()}
        base = parallelize_module(base, mesh, {"up": ColwiseParallel(**between), "down": RowwiseParallel(**back)})
    torch.manual_seed(5)
    return tiny.spread(peft.get_peft_model(base, CONFIGS[case](target_modules=["up", "down"])), 0.05)


def batch(step: int) -> torch.Tensor:
    return torch.randn(ROWS, 5, 15, generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, rank: int = 0, world: int = 1) -> torch.Tensor:
    """Some steps on this process's share of the rows; the output for all rows."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2, eps=1e-3)
    for step in range(STEPS):
        model(batch(step).chunk(world)[rank]).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return model.eval()(batch(STEPS))


def same_adapter(model: Any, alone: Any, what: str) -> None:
    one, two = (peft.get_peft_model_state_dict(m) for m in (model, alone))
    assert one.keys() == two.keys(), what
    assert all(tiny.close(one[k], v, 2e-5) for k, v in two.items()), what


def merged_and_back(model: Any, spread: nn.Module, y: torch.Tensor, what: str) -> None:
    before = {k: v.to_local().clone() for k, v in model.named_parameters() if "base_layer.weight" in k}
    model.merge_adapter()
    with torch.no_grad():
        assert tiny.close(spread(batch(STEPS)), y, 2e-5), f"{what} merged"
    model.unmerge_adapter()
    after = dict(model.named_parameters())
    assert before and all(torch.equal(after[k].to_local(), v) for k, v in before.items()), f"{what} unmerged"
    with torch.no_grad():
        assert tiny.close(spread(batch(STEPS)), y, 1e-6), f"{what} unmerged"


def uneven() -> None:
    """33 = 17 + 16 rows and columns."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for case in CONFIGS:
        model, alone = made(case, 33, mesh), made(case, 33)
        assert model.base_model.model.up.weight.to_local().shape[0] == (17, 16)[dist.get_rank()]
        y, expected = train(model), train(alone)
        assert tiny.close(y, expected), case
        same_adapter(model, alone, case)
        merged_and_back(model, model, y, case)


def shared(spread: str) -> None:
    """A mesh of two axes: one shares the rows of the batch, the other splits the layers."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    rank, world = mesh.get_local_rank("dp"), mesh["dp"].size()
    for case in CONFIGS:
        model, alone = made(case, 32, mesh["tp"]), made(case, 32)
        if spread == "ddp":
            group = mesh.get_group("dp")  # torch does not copy DTensors over one by one, and all start alike
            wrapped: nn.Module = nn.parallel.DistributedDataParallel(model, process_group=group, init_sync=False)
        else:
            from torch.distributed.fsdp import fully_shard

            for layer in (model.base_model.model.up, model.base_model.model.down):
                fully_shard(layer, mesh=mesh["dp"])
            wrapped = fully_shard(model, mesh=mesh["dp"])
        y, expected = train(wrapped, rank, world), train(alone)
        assert tiny.close(y, expected), f"{case} {spread}"
        same_adapter(model, alone, f"{case} {spread}")
        merged_and_back(model, wrapped, y, f"{case} {spread}")


def compiled() -> None:
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for case in ("lora", "ia3", "dora"):
        model, alone = made(case, 32, mesh), made(case, 32)
        y, expected = train(torch.compile(model, backend="aot_eager")), train(alone)
        assert tiny.close(y, expected), case
        same_adapter(model, alone, case)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    case = sys.argv[1]
    {"uneven": uneven, "compiled": compiled}.get(case, lambda: shared(case))()
    leave()
