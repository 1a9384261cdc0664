"""Seconds and bytes on a CUDA device of whichever package is importable as `peft`: `benchmarks/device.py [CASE...]`.

A Llama of 1.1 billion parameters in bfloat16 with random weights: `train` is one step (forward, backward) over 4 x 1024
tokens, `token` one forward of one token without a cache (dominated by launches), `mixed` one token for 32 rows that
use 8 adapters. "base" is the frozen model alone, whose inputs get gradients. Kernels are counted by torch's profiler.
One JSON line a case.
"""

import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

import peft

warnings.filterwarnings("ignore")
SIZES = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
         "num_key_value_heads": 4, "vocab_size": 32000, "use_cache": False}  # fmt: skip
ROWS, LENGTH = 4, 1024
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, Callable[[], Any]] = {
    "base": lambda: None,
    "lora": lambda: peft.LoraConfig(r=16, target_modules=TARGETS),
    "lora dropout": lambda: peft.LoraConfig(r=16, lora_dropout=0.1, target_modules=TARGETS),
    "dora": lambda: peft.LoraConfig(r=16, use_dora=True, target_modules=TARGETS),
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "vera": lambda: peft.VeraConfig(r=256, target_modules=["q_proj", "o_proj"]),
    "oft": lambda: peft.OFTConfig(oft_block_size=32, target_modules=TARGETS),
    "hra": lambda: peft.HRAConfig(r=8, target_modules=TARGETS),
    "miss": lambda: peft.MissConfig(r=64, target_modules=TARGETS),
    "loha": lambda: peft.LoHaConfig(r=8, target_modules=TARGETS),
    "c3a": lambda: peft.C3AConfig(block_size=256, target_modules=TARGETS),
}


def base() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, attn_implementation="sdpa", dtype="bfloat16")
    with torch.device("cuda"):
        return transformers.LlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False)


def milliseconds(run: Callable[[], Any], times: int = 20, warm: int = 3) -> float:
    for _ in range(warm):
        run()
    found = []
    for _ in range(times):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        found.append(1000 * (time.perf_counter() - start))
    return round(statistics.median(found), 3)


def kernels(run: Callable[[], Any]) -> int:
    """How many kernels and copies one run launches."""
    from torch.profiler import ProfilerActivity, profile

    run()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profiler.events())  # type: ignore[union-attr]


def measure(name: str, model: nn.Module) -> dict[str, float]:
    tokens = torch.randint(0, 32000, (ROWS, LENGTH), device="cuda")
    embeddings = model.get_input_embeddings()(tokens).detach().requires_grad_()  # type: ignore[operator]
    found: dict[str, float] = {}
    if name != "base":
        start = time.perf_counter()
        model = peft.get_peft_model(model, CASES[name]())  # type: ignore[arg-type]
        found["inject_ms"] = round(1000 * (time.perf_counter() - start), 1)
    model.train()

    def step() -> None:
        model(inputs_embeds=embeddings).logits[:, -1].float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.reset_peak_memory_stats()
    found["train_ms"] = milliseconds(step)
    found["train_kernels"] = kernels(step)
    found["train_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20)
    model.eval()
    with torch.no_grad():
        found["token_ms"] = milliseconds(lambda: model(input_ids=tokens[:1, :1]), 60)
        found["token_kernels"] = kernels(lambda: model(input_ids=tokens[:1, :1]))
        if name == "lora":
            names = ["default", *(f"a{i}" for i in range(7))]
            for other in names[1:]:
                model.add_adapter(other, CASES[name]())  # type: ignore[operator, arg-type]
            rows = [names[i % 8] for i in range(32)]
            ids = torch.randint(0, 32000, (32, 1), device="cuda")
            found["mixed_ms"] = milliseconds(lambda: model(input_ids=ids, adapter_names=rows), 40)
            found["unmixed_ms"] = milliseconds(lambda: model(input_ids=ids), 40)
            found["switch_ms"] = milliseconds(lambda: (model.set_adapter("a1"), model.set_adapter("default")), 5)  # type: ignore
    return found


def main(*cases: str) -> None:
    card = {"card": torch.cuda.get_device_name(), "torch": torch.__version__, "peft": peft.__version__}
    print(json.dumps(card), flush=True)
    for name in cases or CASES:
        try:
            print(json.dumps({"case": name, **measure(name, base())}), flush=True)
        except Exception as error:
            print(json.dumps({"case": name, "error": f"{type(error).__name__}: {error}"[:300]}), flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main(*sys.argv[1:])
