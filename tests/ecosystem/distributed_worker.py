"""What each of the processes of `test_distributed.py` runs: `python <this> MODE FOLDER CASE ...`.

Every case trains a tiny Llama for a few steps and writes its adapter; the test compares the files with those of one
process that saw both halves of the batches. What needs no second process to judge is asserted here.
"""

import faulthandler
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from tests.ecosystem import tiny
from tests.processes import leave
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

_IDS = {"cpt_token_ids": [5, 6, 7, 8, 9, 10], "cpt_tokens_type_mask": [1, 2, 2, 3, 4, 4]}
PROMPTS: dict[str, Callable[[], peft.PeftConfig]] = {
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=5, prompt_tuning_init="SAMPLE_VOCAB"),
    "p_tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=8),
    "p_lstm": lambda: peft.PromptEncoderConfig(
        num_virtual_tokens=5, encoder_hidden_size=8, encoder_reparameterization_type="LSTM", encoder_num_layers=1
    ),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=5),
    "projected": lambda: peft.PrefixTuningConfig(num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=8),
    "multitask": lambda: peft.MultitaskPromptTuningConfig(num_virtual_tokens=5, num_tasks=2, num_ranks=2),
    "cpt": lambda: peft.CPTConfig(task_type="CAUSAL_LM", **_IDS, opt_weighted_loss_type="decay"),
    "cartridge": lambda: peft.CartridgeConfig(num_virtual_tokens=5, num_frozen_tokens=2),
}


def extras(model: nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the method wants to know besides the tokens."""
    tasks = any(isinstance(m, peft.tuners.MultitaskPromptEmbedding) for m in model.modules())
    return {"task_ids": tokens[:, 0] % 2} if tasks else {}


def made(case: str, base: Any = None) -> peft.PeftModel:
    """The adapted model that all runs of a case start from: weights that have an effect, drawn from a seed."""
    torch.manual_seed(1)
    config = (CONFIGS | PROMPTS)[case]()
    config.task_type = "CAUSAL_LM"
    model = peft.get_peft_model(tiny.llama() if base is None else base, config)
    return tiny.spread(model, 0.05).train()  # type: ignore[return-value]


def batches(rank: int = 0, world: int = 1, steps: int = STEPS) -> Iterator[torch.Tensor]:
    """Every process's rows of each step's batch."""
    tokens = tiny.Texts(ROWS * STEPS).tokens
    for step in range(steps):
        yield tokens[step * ROWS : (step + 1) * ROWS][rank * ROWS // world : (rank + 1) * ROWS // world]


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """With an epsilon above the rounding errors of gradients, which would be normalised to whole steps otherwise."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2, eps=1e-3)


def train(model: nn.Module, rank: int = 0, world: int = 1, steps: int = STEPS) -> None:
    if isinstance(model, Engine):
        for tokens in batches(rank, world, steps):
            model.fit(tokens)
        return
    optim = optimizer(model)
    for tokens in batches(rank, world, steps):
        model(input_ids=tokens, labels=tokens, **extras(model, tokens)).loss.backward()
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


class Engine(nn.Module):
    """A DeepSpeed engine behind the loop of `train`."""

    def __init__(self, model: peft.PeftModel, stage: int):
        super().__init__()
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": ROWS // dist.get_world_size(),
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "gradient_clipping": 0.0,  # 1.0 unless told otherwise
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        self.engine = deepspeed.initialize(model=model, optimizer=optimizer(model), config=config)[0]

    def forward(self, **batch: torch.Tensor) -> Any:
        return self.engine(**batch)

    def fit(self, tokens: torch.Tensor) -> None:
        self.engine.backward(self.engine(input_ids=tokens, labels=tokens, **extras(self, tokens)).loss)
        self.engine.step()


SPREAD: dict[str, Callable[[peft.PeftModel], nn.Module]] = {
    "ddp": ddp,
    "fsdp1": fsdp1,
    "fsdp2": fsdp2,
    "zero2": lambda model: Engine(model, 2),
    "zero3": lambda model: Engine(model, 3),
}


def started(case: str, mode: str) -> tuple[peft.PeftModel, nn.Module]:
    model = made(case)
    if case == "head":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, SPREAD[mode](model)


def trained(mode: str, case: str, folder: Path) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    model, spread = started(case, mode)
    train(spread, rank, world)
    model.save_pretrained(folder, is_main_process=rank == 0)
    dist.barrier()
    with torch.no_grad():
        live = spread.eval()(input_ids=tiny.ids(), **extras(model, tiny.ids())).logits
    fresh = peft.PeftModel.from_pretrained(tiny.llama(), folder)
    again = tiny.logits(fresh, **extras(model, tiny.ids()))
    assert tiny.close(live, again, 1e-5), f"{case}: the file gives other logits than the live model"
    if mode != "ddp" and case in ("lora", "ia3"):
        reloaded_and_merged(model, spread, live, folder)
    if mode in ("fsdp1", "fsdp2") and case == "lora":
        checkpointed_by_accelerate(mode, model, spread, live, folder)


def checkpointed_by_accelerate(
    mode: str, model: peft.PeftModel, spread: nn.Module, live: torch.Tensor, folder: Path
) -> None:
    """accelerate's own checkpoint of a sharded model. Its Accelerator ignores FSDP without a GPU (it says MULTI_CPU, and
    prepares DDP), so a stand-in has the attributes that these functions read.
    """
    from accelerate import PartialState
    from accelerate.utils import FullyShardedDataParallelPlugin, load_fsdp_model, save_fsdp_model

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=int(mode[-1]), state_dict_type="SHARDED_STATE_DICT", cpu_ram_efficient_loading=False
    )
    accelerator = SimpleNamespace(
        num_processes=dist.get_world_size(), process_index=dist.get_rank(), is_main_process=dist.get_rank() == 0,
        wait_for_everyone=dist.barrier, is_fsdp2=mode == "fsdp2", device=torch.device("cpu"),
        state=PartialState(cpu=True), parallelism_config=None,
    )  # fmt: skip
    there = str(folder / "accelerate")
    save_fsdp_model(plugin, accelerator, spread, there, adapter_only=True)
    state = peft.load_peft_weights(str(folder), device="cpu")
    peft.set_peft_model_state_dict(model, {k: torch.zeros_like(v) for k, v in state.items()})
    assert tiny.apart(tiny.logits(spread), live), "zeros loaded"
    load_fsdp_model(plugin, accelerator, spread, there, adapter_only=True)
    assert tiny.close(tiny.logits(spread), live, 1e-6), "accelerate's checkpoint"


def reloaded_and_merged(model: peft.PeftModel, spread: nn.Module, live: torch.Tensor, folder: Path) -> None:
    """Weights that are sharded already are read from a file, merged, and taken out again."""
    state = peft.load_peft_weights(str(folder), device="cpu")
    peft.set_peft_model_state_dict(model, {k: torch.zeros_like(v) for k, v in state.items()})
    assert tiny.apart(tiny.logits(spread), live), "zeros loaded"
    model.load_adapter(folder, "default")
    assert tiny.close(tiny.logits(spread), live, 1e-6), "loaded again"
    model.merge_adapter()
    assert all(layer.merged for layer in model.base_model.layers())
    assert tiny.close(tiny.logits(spread), live, 1e-5), "merged"
    model.unmerge_adapter()
    assert tiny.close(tiny.logits(spread), live, 1e-6), "unmerged"


def partitioned_base() -> None:
    """A base that ZeRO-3 partitions from the start: initialisation reads and changes its weights, heads are copied."""
    import deepspeed

    for options in ({"init_lora_weights": "pissa"}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}):
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=TARGETS, **options)
        zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
        base = tiny.llama()
        with_config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
        deepspeed.zero.Init(module=base, config_dict_or_path=with_config)
        assert base.model.layers[0].mlp.down_proj.weight.numel() == 0
        models = []
        for each in (tiny.llama(), base):
            torch.manual_seed(1)
            models.append(peft.get_peft_model(each, config))
        train(models[0])
        train(Engine(models[1], 3), dist.get_rank(), dist.get_world_size())
        alone, sharded = (peft.get_peft_model_state_dict(m) for m in models)
        assert all(tiny.close(sharded[k], v) for k, v in alone.items()), options


# ---- two adapters


def two_adapters() -> peft.PeftModel:
    model = made("lora")
    model.add_adapter("other", peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["k_proj", "down_proj"]))
    model.set_adapter("other")
    tiny.spread(model, 0.05, seed=9)
    model.set_adapter("default")
    return model


def switch(model: peft.PeftModel, spread: Callable[[], nn.Module], rank: int = 0, world: int = 1) -> None:
    """Train one adapter, then the other; `spread` gives the module to call, anew after a switch."""
    train(spread(), rank, world, 1)
    model.set_adapter("other")
    train(spread(), rank, world, 2)
    model.base_model.set_adapter(["default", "other"])
    train(spread(), rank, world, 1)


def switched(mode: str, folder: Path) -> None:
    model = two_adapters()
    rank, world = dist.get_rank(), dist.get_world_size()
    if mode == "ddp":  # looks at what trains when it is made
        switch(model, lambda: ddp(model), rank, world)
    else:
        spread = SPREAD[mode](model)
        switch(model, lambda: spread, rank, world)
    model.save_pretrained(folder, is_main_process=rank == 0)


# ---- tensor parallelism


def tensor_parallel(folder: Path) -> Any:
    """The tiny Llama, each process with its part, by the plan that transformers has for it."""
    import transformers
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(tp_plan="auto", tp_size=dist.get_world_size())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", distributed_config=config).eval()
    model.name_or_path = ""  # as that of the model in one process
    return model


def trained_in_parts(case: str, folder: Path) -> None:
    base = tensor_parallel(folder)
    assert tuple(base.model.layers[0].mlp.down_proj.weight.to_local().shape) == (tiny.WIDTH, 24)
    torch.manual_seed(dist.get_rank())
    model = made(case, base)
    train(model)
    model.save_pretrained(folder / case, is_main_process=dist.get_rank() == 0)
    dist.barrier()
    live, plain = tiny.logits(model.eval()), peft.PeftModel.from_pretrained(tiny.llama(), folder / case)
    assert tiny.close(live, tiny.logits(plain), 1e-5), "the file in one process"
    again = peft.PeftModel.from_pretrained(tensor_parallel(folder), folder / case)
    assert tiny.close(tiny.logits(again), live, 1e-6), "the file in a model of parts"
    names = ["default", "__base__"]
    if case != "head":
        mixed, alone = (tiny.logits(m, adapter_names=names) for m in (model, plain))
        assert tiny.close(mixed, alone, 1e-5), "a mixed batch"
    before = {k: v.to_local().clone() for k, v in model.named_parameters() if "base_layer.weight" in k}
    model.merge_adapter()
    assert tiny.close(tiny.logits(model), live, 1e-5), "merged"
    model.unmerge_adapter()
    after = dict(model.named_parameters())
    assert before and all(torch.equal(after[k].to_local(), v) for k, v in before.items()), "unmerged"
    assert torch.equal(tiny.logits(model), live)
    with model.disable_adapter():
        assert tiny.close(tiny.logits(model), tiny.logits(tiny.llama()), 1e-5), "disabled"
    assert tiny.close(tiny.logits(model.merge_and_unload()), live, 1e-5), "merged for good"


def loaded_natively(folder: Path) -> None:
    """transformers' own `load_adapter` on a model of parts."""
    native = tensor_parallel(folder)
    native.load_adapter(str(folder / "lora"))
    plain = peft.PeftModel.from_pretrained(tiny.llama(), folder / "lora")
    assert tiny.close(tiny.logits(native), tiny.logits(plain), 1e-5)


def drawn_alike(folder: Path) -> None:
    """Processes that drew different numbers start from the same adapter."""
    torch.manual_seed(dist.get_rank())
    config = peft.LoraConfig(target_modules=TARGETS, init_lora_weights="gaussian")
    model = peft.get_peft_model(tensor_parallel(folder), config)
    drawn = torch.cat([p.flatten() for n, p in model.named_parameters() if "lora_A" in n])
    others = [torch.empty_like(drawn) for _ in range(dist.get_world_size())]
    dist.all_gather(others, drawn)
    assert all(torch.equal(o, drawn) for o in others)


def eva_of_both_halves() -> None:
    """Each process has half of the rows; together they find the components of all."""
    config = peft.LoraConfig(
        r=4, target_modules=TARGETS, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0, tau=0.0)
    )
    halves = next(batches(dist.get_rank(), dist.get_world_size()))
    found, alone, half = (
        peft.get_eva_state_dict(tiny.llama(), [{"input_ids": ids}], config, gather_distributed_inputs=gather)
        for ids, gather in ((halves, True), (next(batches()), False), (halves, False))
    )
    assert all(tiny.close(found[name].abs(), A.abs(), 1e-3) for name, A in alone.items())
    assert not all(tiny.close(half[name].abs(), A.abs(), 1e-2) for name, A in alone.items())


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def every_method() -> None:
    """Every method for linear layers on a colwise and a rowwise layer of torch's own: outputs, gradients, merging."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    from peft import registry
    from peft.core.tuner import TunerModel

    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for method in registry.methods().values():
        kinds = {k.name for k in method.layer.kinds} if method.layer and issubclass(method.tuner, TunerModel) else ()
        if "Linear" not in kinds or "replace" in method.layer.hooks:  # type: ignore[union-attr]
            continue  # copies of norms replace them, and norms are not split
        options = {**method.tuner.example, **getattr(method.tuner, "examples_by_kind", {}).get("Linear", {})}
        if "feedforward_modules" in options:
            options["feedforward_modules"] = ["down"]
        models, seen = [], []
        for plan in ({}, {"up": ColwiseParallel(), "down": RowwiseParallel()}):
            base = parallelize_module(Pair(), mesh, plan) if plan else Pair()
            torch.manual_seed(5)
            config = method.config(**{"target_modules": ["up", "down"], **options})
            model: Any = tiny.spread(peft.get_peft_model(base, config), 0.05).eval()
            x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(3)).requires_grad_()
            y = model(x)
            y.pow(2).sum().backward()
            grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
            seen.append({"y": y.detach(), "x": x.grad, **grads})
            models.append(model)
        assert seen[0].keys() == seen[1].keys(), method.name
        assert all(tiny.close(seen[1][k], v, 2e-5) for k, v in seen[0].items()), method.name
        with torch.no_grad():
            before = models[1](x)
            if all(layer.mergeable for layer in models[1].base_model.layers()):
                models[1].merge_adapter()
                assert tiny.close(models[1](x), before, 2e-5), f"{method.name} merged"
                models[1].unmerge_adapter()
                assert torch.equal(models[1](x), before), f"{method.name} unmerged"


def main(mode: str, folder: Path, *cases: str) -> None:
    if mode.startswith("zero"):
        import deepspeed

        # none of its kernels is needed, and that for communication would be compiled now
        deepspeed.ops.__compatible_ops__.update(dict.fromkeys(deepspeed.ops.__compatible_ops__, False))
        deepspeed.init_distributed("gloo", verbose=False)
    else:
        dist.init_process_group("gloo")
    for case in cases:
        if case == "switch":
            switched(mode, folder / case)
        elif mode == "tp":
            trained_in_parts(case, folder)
        else:
            trained(mode, case, folder / case)
    if mode == "ddp":
        eva_of_both_halves()
    if mode == "zero3":
        partitioned_base()
    if mode == "tp":
        every_method()
        loaded_natively(folder)
        drawn_alike(folder)
    leave()


if __name__ == "__main__":
    faulthandler.enable()
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
