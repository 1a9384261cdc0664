"""Bases that transformers quantises while it loads them, with the quantisers that run on a CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tests.ecosystem import tiny

import peft

SIZES = {"hidden_size": 64, "intermediate_size": 128}


def _bnb(bits: int) -> Any:
    pytest.importorskip("bitsandbytes")
    if bits == 8:
        return tf.BitsAndBytesConfig(load_in_8bit=True)
    return tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def _torchao() -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    return tf.TorchAoConfig(quantization.Int8WeightOnlyConfig())


CONFIGS = {"bnb 8 bit": lambda: _bnb(8), "bnb 4 bit": lambda: _bnb(4), "torchao int8": _torchao}
METHODS = {
    "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "down_proj"]),
    "dora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], use_dora=True),
    "oft": lambda: peft.OFTConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], oft_block_size=8),
    "ia3": lambda: peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp("quantized") / "base"
    tiny.llama(**SIZES).save_pretrained(path)
    return path


def base(folder: Path, kind: str) -> Any:
    return tf.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=CONFIGS[kind](), dtype=torch.float32
    ).eval()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_trainer(tmp_path: Path, folder: Path, kind: str, method: str) -> None:
    model = base(folder, kind)
    tiny.logits(model)  # evaluation before training must not change what training does
    layer = model.model.layers[0].self_attn.q_proj
    assert type(layer) is not torch.nn.Linear or type(layer.weight) is not torch.nn.Parameter or kind == "torchao int8"
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
    plain = tiny.logits(model)
    torch.manual_seed(0)
    model = peft.get_peft_model(model, METHODS[method]())
    steps = 8
    arguments = tf.TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=steps, per_device_train_batch_size=16, learning_rate=3e-2, logging_steps=1,
        report_to="none", use_cpu=True, disable_tqdm=True, save_steps=steps, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = tf.Trainer(model=model, args=arguments, train_dataset=tiny.Texts())
    trainer.train()
    assert tiny.falls(tiny.losses(trainer), 0.99), tiny.losses(trainer)
    model.eval()
    trained = tiny.logits(model)
    again = peft.prepare_model_for_kbit_training(base(folder, kind), use_gradient_checkpointing=False)
    again = peft.PeftModel.from_pretrained(again, tmp_path / "run" / f"checkpoint-{steps}")
    assert tiny.close(tiny.logits(again), trained, 1e-4 if kind != "bnb 4 bit" else 3e-2)
    with again.disable_adapter():
        assert tiny.close(tiny.logits(again), plain, 1e-6 if kind != "bnb 4 bit" else 3e-2)


def test_trainer_refuses_a_bare_quantised_base(tmp_path: Path, folder: Path) -> None:
    arguments = tf.TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="quantized"):
        tf.Trainer(model=base(folder, "bnb 8 bit"), args=arguments, train_dataset=tiny.Texts())


@pytest.mark.parametrize("kind", CONFIGS)
def test_native_adapter(tmp_path: Path, folder: Path, kind: str) -> None:
    torch.manual_seed(0)
    plain = tiny.spread(peft.get_peft_model(tiny.llama(**SIZES), METHODS["lora"]()))
    plain.save_pretrained(tmp_path)
    before = tiny.logits(base(folder, kind))
    # Not evaluated before: on some CPUs bitsandbytes' state_dict(), which transformers calls, breaks an evaluated 4-bit layer.
    model = base(folder, kind)
    info = model.load_adapter(str(tmp_path))
    assert not info.missing_keys and not info.unexpected_keys
    wrapped = peft.PeftModel.from_pretrained(base(folder, kind), tmp_path)
    # bitsandbytes evaluates 4-bit layers in bfloat16 on some CPUs
    assert tiny.close(tiny.logits(model), tiny.logits(wrapped), 1e-4 if kind != "bnb 4 bit" else 3e-2)
    assert tiny.close(tiny.logits(wrapped), tiny.logits(plain), 0.3 if kind != "bnb 4 bit" else 1.0) and tiny.apart(
        tiny.logits(wrapped), before
    )
    model.disable_adapters()
    assert torch.equal(tiny.logits(model), before)


@pytest.mark.parametrize("kind", ["bnb 8 bit", "bnb 4 bit"])
def test_merge(folder: Path, kind: str) -> None:
    torch.manual_seed(0)
    model = tiny.spread(peft.get_peft_model(base(folder, kind), METHODS["lora"]()))
    adapted, plain = tiny.logits(model), tiny.logits(base(folder, kind))
    model.merge_adapter()
    assert _near(tiny.logits(model), adapted, plain)
    model.unmerge_adapter()
    assert torch.equal(tiny.logits(model), adapted)
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model), plain)
    merged = model.merge_and_unload()
    assert "bitsandbytes" in type(merged.model.layers[0].self_attn.q_proj).__module__
    assert _near(tiny.logits(merged), adapted, plain)


def _near(merged: torch.Tensor, adapted: torch.Tensor, plain: torch.Tensor) -> bool:
    """Merging rounds again, which moves outputs far less than the adapter does."""
    return float((merged - adapted).norm() / (plain - adapted).norm()) < 0.25


def test_weight_packed_by_evaluation() -> None:
    """Where bitsandbytes packs 4-bit weights for evaluation on this CPU, they can still be read and differentiated."""
    bnb = pytest.importorskip("bitsandbytes")
    from peft.storage.bnb import INT4, keep_differentiable

    layer = bnb.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    weight = torch.randn(64, 128)
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    layer = layer.to("cpu").eval()
    plain = INT4.read(layer)
    x = torch.randn(3, 128)
    layer(x)
    assert tiny.close(INT4.read(layer).float(), plain, 1e-2)
    keep_differentiable(layer)
    layer(x)
    assert tiny.close(INT4.read(layer).float(), plain, 1e-2)
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None and tiny.close(x.grad[0], plain.sum(0), 1e-2)
