"""accelerate on one process: prepare and unwrap, checkpoints of the whole state, dispatched and offloaded bases, empty models."""

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.utils import is_peft_available, is_peft_model
from tests.ecosystem import tiny

import peft

TARGETS = ["q_proj", "v_proj", "down_proj"]


def adapted(base: Any = None, **options: Any) -> peft.PeftModel:
    base = tiny.llama() if base is None else base
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": TARGETS, **options})
    return peft.get_peft_model(base, config)


def loader(batch_size: int = 4) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(tiny.Texts(), batch_size=batch_size)


class Run:
    """A small training loop of the kind that accelerate's examples show."""

    def __init__(self, model: torch.nn.Module, batch_size: int = 4, **options: Any):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        self.accelerator = accelerate.Accelerator(cpu=True, **options)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=8)
        parts = self.accelerator.prepare(model, optimizer, loader(batch_size), scheduler)
        self.model, self.optimizer, self.loader, self.scheduler = parts

    def epoch(self) -> list[float]:
        self.model.train()
        history = []
        for batch in self.loader:
            with self.accelerator.accumulate(self.model):
                loss = self.model(**batch).loss
                self.accelerator.backward(loss)
                self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            history.append(float(loss.detach()))
        return history


def test_detection() -> None:
    assert is_peft_available() and is_peft_model(adapted()) and not is_peft_model(tiny.llama())


def test_prepare_train_unwrap(tmp_path: Path) -> None:
    model = adapted()
    before = tiny.base_tensors(model)
    run = Run(model)
    assert run.accelerator.unwrap_model(run.model) is model and is_peft_model(run.model)
    history = [loss for _ in range(8) for loss in run.epoch()]
    assert tiny.falls(history, 0.9) and tiny.same(before, tiny.base_tensors(model))
    unwrapped = run.accelerator.unwrap_model(run.model)
    state = run.accelerator.get_state_dict(run.model)
    unwrapped.save_pretrained(
        tmp_path, is_main_process=run.accelerator.is_main_process, save_function=run.accelerator.save, state_dict=state
    )
    again = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert torch.equal(tiny.logits(again), tiny.logits(model.eval()))


def test_accumulation_equals_a_larger_batch() -> None:
    small, large = adapted(), adapted()
    run = Run(small, gradient_accumulation_steps=2)
    run.epoch()
    assert run.scheduler.scheduler.last_epoch == 2
    Run(large, batch_size=8).epoch()
    for (name, a), b in zip(small.named_parameters(), large.parameters(), strict=True):
        assert tiny.close(a, b, 1e-4), name


def test_state_round_trip(tmp_path: Path) -> None:
    run = Run(adapted(lora_dropout=0.2))
    run.epoch()
    run.accelerator.save_state(str(tmp_path / "state"))
    straight = run.epoch()
    torch.manual_seed(99)
    resumed = Run(adapted(lora_dropout=0.2, init_lora_weights=False))
    resumed.accelerator.load_state(str(tmp_path / "state"))
    assert resumed.epoch() == straight
    one, two = run.accelerator.unwrap_model(run.model), resumed.accelerator.unwrap_model(resumed.model)
    assert tiny.same(tiny.tensors(one), tiny.tensors(two))
    assert tiny.files(tmp_path / "state") >= {
        "model.safetensors",
        "optimizer.bin",
        "scheduler.bin",
        "random_states_0.pkl",
    }


def test_adapter_only_hooks(tmp_path: Path) -> None:
    """The hooks with which training scripts save adapters instead of whole models."""
    run = Run(adapted())

    def save(models: list, weights: list, folder: str) -> None:
        for model in models:
            run.accelerator.unwrap_model(model).save_pretrained(folder)
            weights.pop()

    def load(models: list, folder: str) -> None:
        while models:
            run.accelerator.unwrap_model(models.pop()).load_adapter(folder, "default", is_trainable=True)

    run.accelerator.register_save_state_pre_hook(save)
    run.accelerator.register_load_state_pre_hook(load)
    run.epoch()
    run.accelerator.save_state(str(tmp_path))
    assert "adapter_model.safetensors" in tiny.files(tmp_path) and "model.safetensors" not in tiny.files(tmp_path)
    model = run.accelerator.unwrap_model(run.model)
    kept = tiny.tensors(model)
    run.epoch()
    assert not tiny.same(kept, tiny.tensors(model))
    run.accelerator.load_state(str(tmp_path))
    assert tiny.same(kept, tiny.tensors(model))
    assert all(p.requires_grad == ("lora_" in n) for n, p in model.named_parameters())


def test_mixed_precision() -> None:
    model = adapted()
    run = Run(model, mixed_precision="bf16")
    history = [loss for _ in range(4) for loss in run.epoch()]
    assert tiny.falls(history) and {p.dtype for p in model.parameters()} == {torch.float32}
    unwrapped = run.accelerator.unwrap_model(run.model, keep_fp32_wrapper=False)
    model.eval()
    assert unwrapped is model and model(input_ids=tiny.ids()).logits.dtype == torch.float32


# ---- dispatched and offloaded bases

DISK = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    tiny.spread(adapted()).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def dispatched(folder: Path, device_map: dict[str, str] | None = None) -> Any:
    model = tiny.llama()
    return accelerate.dispatch_model(model, device_map or DISK, main_device="cpu", offload_dir=str(folder / "weights"))


def test_adapter_on_a_base_with_a_layer_on_disk(tmp_path: Path, adapter: Path) -> None:
    expected = tiny.logits(peft.PeftModel.from_pretrained(tiny.llama(), adapter))
    base = dispatched(tmp_path)
    assert base.model.layers[0].self_attn.q_proj.weight.device.type == "meta"
    plain = tiny.logits(base)
    assert tiny.close(plain, tiny.logits(tiny.llama()), 1e-6)
    model = peft.PeftModel.from_pretrained(base, adapter, offload_dir=str(tmp_path / "again"))
    assert tiny.close(tiny.logits(model), expected, 1e-6)
    with model.disable_adapter():
        assert tiny.close(tiny.logits(model), plain, 1e-6)
    loaded = model.load_adapter(adapter, "second", offload_dir=str(tmp_path / "more"))
    assert not [k for k in loaded.missing_keys if "second" in k]
    model.set_adapter("second")
    assert tiny.close(tiny.logits(model), expected, 1e-6)
    model.save_pretrained(tmp_path / "saved", selected_adapters=["second"])
    again = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "saved" / "second")
    assert torch.equal(tiny.logits(again), tiny.logits(peft.PeftModel.from_pretrained(tiny.llama(), adapter)))


def test_new_adapter_on_a_dispatched_base(tmp_path: Path) -> None:
    """Every layer in memory, but hooked: training works."""
    model = tiny.llama()
    accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    model = adapted(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    tokens, history = tiny.Texts().tokens, []
    for _ in range(10):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(float(loss.detach()))
    assert tiny.falls(history)


def test_merging_into_a_base_with_a_layer_on_disk(tmp_path: Path, adapter: Path) -> None:
    expected = tiny.logits(peft.PeftModel.from_pretrained(tiny.llama(), adapter).merge_and_unload())
    model = peft.PeftModel.from_pretrained(dispatched(tmp_path), adapter, offload_dir=str(tmp_path / "again"))
    assert tiny.close(tiny.logits(model.merge_and_unload()), expected)


def test_cpu_offload(adapter: Path) -> None:
    expected = tiny.logits(peft.PeftModel.from_pretrained(tiny.llama(), adapter))
    base = accelerate.cpu_offload(tiny.llama(), execution_device=torch.device("cpu"))
    assert base.model.layers[0].self_attn.q_proj.weight.device.type == "meta"
    model = peft.PeftModel.from_pretrained(base, adapter)
    assert tiny.close(tiny.logits(model), expected, 1e-6)


def test_disk_offload(tmp_path: Path, adapter: Path) -> None:
    expected = tiny.logits(peft.PeftModel.from_pretrained(tiny.llama(), adapter))
    base = accelerate.disk_offload(tiny.llama(), str(tmp_path / "weights"), execution_device=torch.device("cpu"))
    model = peft.PeftModel.from_pretrained(base, adapter)
    assert tiny.close(tiny.logits(model), expected, 1e-6)


EXPERTS = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}, EXPERTS], ids=str)
def test_new_adapter_on_offloaded_weights(options: dict[str, Any], tmp_path: Path) -> None:
    """Adapters start, train and merge as on a base in memory; no weight stays in memory."""
    results = []
    for offload in (False, True):
        base = tiny.mixtral() if options is EXPERTS else tiny.llama()
        if offload:
            base = accelerate.dispatch_model(base, DISK, main_device="cpu", offload_dir=str(tmp_path))
        model = adapted(base, **options)
        out = [tiny.logits(model)]
        tokens = tiny.Texts().tokens
        model(input_ids=tokens, labels=tokens).loss.backward()
        out += [p.grad for p in model.parameters() if p.requires_grad]
        tiny.spread(model, only="lora_B")
        out.append(tiny.logits(model))
        model.merge_adapter()
        out.append(tiny.logits(model))
        model.unmerge_adapter()
        out.append(tiny.logits(model))
        out.append(tiny.logits(model.merge_and_unload()))
        assert all(p.is_meta == offload for n, p in base.named_parameters() if ".layers.0." in n)
        results.append(out)
    for want, got in zip(*results, strict=True):
        assert tiny.close(got, want, 1e-5)


# ---- empty models


def test_base_filled_after_adapting(tmp_path: Path, adapter: Path) -> None:
    """Adapt an empty model first, fill the base in afterwards."""
    expected = tiny.logits(peft.PeftModel.from_pretrained(tiny.llama(), adapter))
    tiny.llama().save_pretrained(tmp_path / "base")
    with accelerate.init_empty_weights():
        base = type(tiny.llama())(tiny.llama().config)
    assert {p.device.type for p in base.parameters()} == {"meta"}
    base.tie_weights()
    accelerate.load_checkpoint_and_dispatch(base, str(tmp_path / "base"), device_map={"": "cpu"})
    model = peft.PeftModel.from_pretrained(base.eval(), adapter, low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in model.parameters())
    assert torch.equal(tiny.logits(model), expected)


def test_adapting_on_meta(adapter: Path) -> None:
    """`low_cpu_mem_usage` makes adapters on the meta device, and the file fills them."""
    with accelerate.init_empty_weights():
        base = type(tiny.llama())(tiny.llama().config)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=TARGETS), low_cpu_mem_usage=True)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    state = peft.get_peft_model_state_dict(model)
    assert set(state) == set(peft.load_peft_weights(str(adapter), device="cpu"))


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_transformers_device_map(tmp_path: Path, adapter: Path, where: str) -> None:
    expected = tiny.logits(peft.PeftModel.from_pretrained(tiny.llama(), adapter))
    tiny.llama().save_pretrained(tmp_path / "base")
    places = {**DISK, "model.layers.0": where}
    base = type(tiny.llama()).from_pretrained(
        tmp_path / "base", device_map=places, offload_folder=str(tmp_path / "off")
    )
    model = peft.PeftModel.from_pretrained(base.eval(), adapter, offload_folder=str(tmp_path / "off2"))
    assert tiny.close(tiny.logits(model), expected, 1e-6)


def test_auto_class_with_a_device_map(tmp_path: Path) -> None:
    base = tiny.llama()
    tiny.saved(base, tmp_path / "base")
    model = tiny.spread(adapted(base))
    model.save_pretrained(tmp_path / "adapter")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", device_map={"": "cpu"})
    assert torch.equal(tiny.logits(again.eval()), tiny.logits(model.eval()))
