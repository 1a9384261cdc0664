"""FSDP driven by accelerate's Accelerator, which needs an accelerator: `python <this> VERSION FOLDER`, one process."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from tests.ecosystem import distributed_worker as cases
from tests.ecosystem import tiny
from tests.processes import leave

import peft


def alone(case: str) -> dict[str, torch.Tensor]:
    model = cases.made(case).to("cuda")
    optimizer = cases.optimizer(model)
    for tokens in cases.batches():
        model(input_ids=tokens.cuda(), labels=tokens.cuda()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return peft.get_peft_model_state_dict(model)


def prepared(case: str, version: int) -> tuple[Accelerator, Any, Any]:
    accelerator: Accelerator = Accelerator(fsdp_plugin=plugin(version))
    assert "FSDP" in str(accelerator.distributed_type), accelerator.distributed_type
    model = cases.made(case)
    accelerator.state.fsdp_plugin.auto_wrap_policy = peft.utils.other.fsdp_auto_wrap_policy(model)
    model, optimizer = accelerator.prepare(model, cases.optimizer(model))
    return accelerator, model, optimizer


def plugin(version: int) -> FullyShardedDataParallelPlugin:
    more = {"use_orig_params": True} if version == 1 else {}
    return FullyShardedDataParallelPlugin(
        fsdp_version=version, state_dict_type="SHARDED_STATE_DICT", cpu_ram_efficient_loading=False, **more
    )


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tiny.ids().cuda()).logits.clone()


def main(version: int, folder: Path) -> None:
    """One process shards nothing with FSDP1, and torch's own state dict of that fails after a step if parameters are
    frozen, with or without adapters: there, only what the library gathers itself is looked at.
    """
    accelerator, model, optimizer = prepared("lora", version)
    for tokens in cases.batches():
        tokens = tokens.to(accelerator.device)
        accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
        optimizer.step()
        optimizer.zero_grad()
    inner: Any = accelerator.unwrap_model(model)
    state = accelerator.get_state_dict(model) if version == 2 else None
    inner.save_pretrained(folder / "adapter", state_dict=state, is_main_process=accelerator.is_main_process)
    found, expected = peft.load_peft_weights(str(folder / "adapter"), device="cpu"), alone("lora")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert tiny.close(found[key], value.cpu(), 1e-4), key
    if version == 2:
        accelerator.save_state(str(folder / "state"))
        before = logits(model)
        peft.set_peft_model_state_dict(inner, {k: torch.zeros_like(v) for k, v in found.items()})
        assert tiny.apart(logits(model), before)
        accelerator.load_state(str(folder / "state"))
        assert tiny.close(logits(model), before, 1e-5)
    leave()


if __name__ == "__main__":
    os.environ.setdefault("ACCELERATE_USE_FSDP", "true")
    os.environ["FSDP_VERSION"] = sys.argv[1]
    torch.cuda.set_device(0)
    main(int(sys.argv[1]), Path(sys.argv[2]))
