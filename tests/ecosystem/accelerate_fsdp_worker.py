"""FSDP driven by accelerate's Accelerator: `python <this> VERSION FOLDER`, once for each rank.

Accelerator wants an accelerator for that (without one it says MULTI_CPU and prepares DDP), so on CPUs it is told that
it has found several; nothing else is replaced.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from tests.ecosystem import distributed_worker as cases
from tests.ecosystem import tiny
from tests.processes import leave

import peft

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pretend() -> None:
    def set_device(state: Any) -> None:
        state.device = DEVICE

    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)  # type: ignore[assignment]
    PartialState.set_device = set_device  # type: ignore[method-assign]


def prepared(version: int) -> tuple[Accelerator, Any, Any]:
    options: dict[str, Any] = {"use_orig_params": True} if version == 1 else {}
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version, state_dict_type="SHARDED_STATE_DICT", cpu_ram_efficient_loading=False, **options
    )
    accelerator = Accelerator(fsdp_plugin=plugin)
    assert accelerator.distributed_type == DistributedType.FSDP
    model = cases.made("lora")
    plugin.auto_wrap_policy = peft.utils.other.fsdp_auto_wrap_policy(model)
    return accelerator, *accelerator.prepare(model, cases.optimizer(model))


def alone() -> dict[str, torch.Tensor]:
    """What one process trains on whole batches, without accelerate."""
    model = cases.made("lora")
    cases.train(model)
    return peft.get_peft_model_state_dict(model)


def same(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = peft.load_peft_weights(str(folder), device="cpu")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert tiny.close(found[key], value, 1e-5 if DEVICE.type == "cpu" else 1e-4), key


def main(version: int, folder: Path) -> None:
    accelerator, model, optimizer = prepared(version)
    for tokens in cases.batches(accelerator.process_index, accelerator.num_processes):
        tokens = tokens.to(accelerator.device)
        accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
        optimizer.step()
        optimizer.zero_grad()
    inner: Any = accelerator.unwrap_model(model)
    expected, where = alone(), {"is_main_process": accelerator.is_main_process}
    inner.save_pretrained(folder / "gathered", **where)
    accelerator.wait_for_everyone()
    same(folder / "gathered", expected)
    accelerator.save_state(str(folder / "state"))
    before = tiny.logits(model)
    peft.set_peft_model_state_dict(inner, {k: torch.zeros_like(v) for k, v in expected.items()})
    assert tiny.apart(tiny.logits(model), before)
    accelerator.load_state(str(folder / "state"))
    assert tiny.close(tiny.logits(model), before, 1e-5)
    if version == 2:  # of FSDP1, torch reads memory on a CPU that it has freed, with or without adapters
        inner.save_pretrained(folder / "given", state_dict=accelerator.get_state_dict(model), **where)
        accelerator.wait_for_everyone()
        same(folder / "given", expected)
    leave()


if __name__ == "__main__":
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": sys.argv[1]}
    if DEVICE.type == "cpu":
        pretend()
    main(int(sys.argv[1]), Path(sys.argv[2]))
