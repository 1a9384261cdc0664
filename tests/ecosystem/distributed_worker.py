"""What each of the processes of `test_distributed.py` runs: `python -m torch.distributed.run ... <this> MODE FOLDER`.

Every case trains a tiny Llama for a few steps and writes its adapter; the test compares the files with those of one
process that saw both halves of the batches. What needs no second process to judge is asserted here.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.ecosystem import tiny
from torch import nn

import peft

ROWS, STEPS = 8, 3
TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]
CONFIGS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules=TARGETS),
    "head": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["lm_head"]),
    "dora": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=TARGETS),
    "vera": lambda: peft.VeraConfig(r=8, target_modules=TARGETS),
}


def made(case: str, base: Any = None) -> peft.PeftModel:
    """The adapted model that all runs of a case start from: weights that have an effect, drawn from a seed."""
    torch.manual_seed(1)
    config = CONFIGS[case]()
    config.task_type = "CAUSAL_LM"
    model = peft.get_peft_model(tiny.llama() if base is None else base, config)
    return tiny.spread(model, 0.05).train()  # type: ignore[return-value]


def batches(rank: int = 0, world: int = 1, steps: int = STEPS) -> Iterator[torch.Tensor]:
    """Every process's rows of each step's batch."""
    tokens = tiny.Texts(ROWS * STEPS).tokens
    for step in range(steps):
        yield tokens[step * ROWS : (step + 1) * ROWS][rank * ROWS // world : (rank + 1) * ROWS // world]


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train(model: nn.Module, rank: int = 0, world: int = 1, steps: int = STEPS) -> None:
    optim = optimizer(model)
    for tokens in batches(rank, world, steps):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optim.step()
        optim.zero_grad()


# ---- how each mode spreads a model over the processes


def ddp(model: peft.PeftModel) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def fsdp1(model: peft.PeftModel) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    policy = peft.utils.other.fsdp_auto_wrap_policy(model)
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True)


def fsdp2(model: peft.PeftModel) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    policy = peft.utils.other.fsdp_auto_wrap_policy(model)
    for module in [m for m in reversed(list(model.modules())) if m is not model]:
        if policy(module, False, 0):
            fully_shard(module)
    return fully_shard(model)


SPREAD = {"ddp": ddp, "fsdp1": fsdp1, "fsdp2": fsdp2}


def trained(mode: str, case: str, folder: Path, **options: Any) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    model = made(case)
    if options.get("checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    spread = SPREAD[mode](model)
    train(spread, rank, world)
    model.save_pretrained(folder, is_main_process=rank == 0)
    dist.barrier()
    with torch.no_grad():
        live = spread.eval()(input_ids=tiny.ids()).logits
    fresh = peft.PeftModel.from_pretrained(tiny.llama(), folder)
    assert tiny.close(live, tiny.logits(fresh), 1e-5), f"{case}: the file gives other logits than the live model"


def main(mode: str, folder: Path) -> None:
    dist.init_process_group("gloo")
    for case in sys.argv[3:] or CONFIGS:
        trained(mode, case, folder / case, checkpointing=case == "head")
        print("ok", case, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
