"""Bases that transformers quantises while it loads them, with the quantisers that run on a CPU (its version 5 cannot
quantise with HQQ).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tests.ecosystem import tiny

import peft
from peft.storage.base import resolve

SIZES = {"hidden_size": 64, "intermediate_size": 128}


def _bnb(bits: int) -> Any:
    pytest.importorskip("bitsandbytes")
    if bits == 8:
        return tf.BitsAndBytesConfig(load_in_8bit=True)
    return tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def _torchao(bits: int) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    if bits == 8:
        return tf.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    granularity = quantization.granularity.PerGroup(32)
    return tf.TorchAoConfig(quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=granularity))


def _quanto() -> Any:
    pytest.importorskip("optimum.quanto")
    return tf.QuantoConfig(weights="int8")  # its 4 bits compile an extension first


def _compressed() -> Any:
    pytest.importorskip("compressed_tensors")  # a checkpoint that says so itself, see `compressed`


CONFIGS = {
    "bnb 8 bit": lambda: _bnb(8), "bnb 4 bit": lambda: _bnb(4), "torchao int8": lambda: _torchao(8),
    "torchao int4": lambda: _torchao(4), "quanto int8": _quanto, "compressed-tensors": _compressed,
}  # fmt: skip
LAYERS = ["q_proj", "down_proj"]
METHODS = {
    "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "down_proj"]),
    "dora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], use_dora=True),
    "oft": lambda: peft.OFTConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], oft_block_size=8),
    "ia3": lambda: peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "vera": lambda: peft.VeraConfig(task_type="CAUSAL_LM", r=16, target_modules=LAYERS),
    "loha": lambda: peft.LoHaConfig(task_type="CAUSAL_LM", r=4, alpha=8, target_modules=LAYERS),
}
# Relative: some CPUs have 4-bit kernels of bitsandbytes that work in bfloat16.
CLOSE = {"bnb 4 bit": 3e-2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp("quantized") / "base"
    tiny.llama(**SIZES).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: Any) -> Path:
    """A checkpoint with packed 4-bit weights, written by compressed-tensors."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors import ModelCompressor

    model, path = tiny.llama(**SIZES), tmp_path_factory.mktemp("quantized") / "compressed"
    weights = quantization.QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=32)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    config = quantization.QuantizationConfig(
        config_groups={"all": scheme}, ignore=["lm_head"], quantization_status="frozen", format="pack-quantized"
    )
    quantization.apply_quantization_config(model, config)
    for layer in model.modules():
        if hasattr(layer, "weight_scale"):
            groups = layer.weight.data.view(len(layer.weight), -1, 32)
            layer.weight_scale.data.copy_(groups.abs().amax(-1) / 7.5)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(path)
    compressor.update_config(path)
    return path


@pytest.fixture
def load(request: Any, folder: Path) -> Callable[[str], Any]:
    """Loads the base, quantised the given way."""

    def from_folder(kind: str) -> Any:
        config = CONFIGS[kind]()
        source = folder if config is not None else request.getfixturevalue("compressed")
        options = {} if config is None else {"quantization_config": config}
        return tf.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options).eval()

    return from_folder


def _cases() -> list[Any]:
    """All pairs, the less common ones marked slow. The Trainer refuses torchao's other formats by itself."""
    kinds = [k for k in CONFIGS if k != "torchao int4"]
    slow = {(k, m) for k in kinds for m in ("dora", "vera", "loha") if k != "bnb 4 bit"}
    return [pytest.param(k, m, marks=pytest.mark.slow if (k, m) in slow else ()) for k in kinds for m in METHODS]


@pytest.mark.parametrize(("kind", "method"), _cases())
def test_trainer(tmp_path: Path, load: Any, kind: str, method: str) -> None:
    model = load(kind)
    tiny.logits(model)  # evaluation before training must not change what training does
    if kind != "compressed-tensors":
        assert resolve(model.model.layers[0].self_attn.q_proj).label is not None
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
    again = peft.prepare_model_for_kbit_training(load(kind), use_gradient_checkpointing=False)
    again = peft.PeftModel.from_pretrained(again, tmp_path / "run" / f"checkpoint-{steps}")
    assert tiny.close(tiny.logits(again), trained, CLOSE.get(kind, 1e-4))
    with again.disable_adapter():
        assert tiny.close(tiny.logits(again), plain, CLOSE.get(kind, 1e-6))


def test_trainer_refuses_a_bare_quantised_base(tmp_path: Path, load: Any) -> None:
    arguments = tf.TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="quantized"):
        tf.Trainer(model=load("bnb 8 bit"), args=arguments, train_dataset=tiny.Texts())


@pytest.mark.parametrize("kind", CONFIGS)
def test_native_adapter(tmp_path: Path, load: Any, kind: str) -> None:
    torch.manual_seed(0)
    plain = tiny.spread(peft.get_peft_model(tiny.llama(**SIZES), METHODS["lora"]()))
    plain.save_pretrained(tmp_path)
    before = tiny.logits(load(kind))
    # Not evaluated before: on some CPUs bitsandbytes' state_dict(), which transformers calls, breaks an evaluated 4-bit layer.
    model = load(kind)
    info = model.load_adapter(str(tmp_path))
    assert not info.missing_keys and not info.unexpected_keys
    wrapped = peft.PeftModel.from_pretrained(load(kind), tmp_path)
    # bitsandbytes evaluates 4-bit layers in bfloat16 on some CPUs
    assert tiny.close(tiny.logits(model), tiny.logits(wrapped), CLOSE.get(kind, 1e-4))
    assert tiny.close(tiny.logits(wrapped), tiny.logits(plain), 0.3 if "8" in kind else 1.0) and tiny.apart(
        tiny.logits(wrapped), before
    )
    model.disable_adapters()
    assert torch.equal(tiny.logits(model), before)


@pytest.mark.parametrize("kind", CONFIGS)
def test_merge(load: Any, kind: str) -> None:
    torch.manual_seed(0)
    model = tiny.spread(peft.get_peft_model(load(kind), METHODS["lora"]()))
    adapted, plain = tiny.logits(model), tiny.logits(load(kind))
    model.merge_adapter()
    assert _near(tiny.logits(model), adapted, plain)
    model.unmerge_adapter()
    assert torch.equal(tiny.logits(model), adapted)
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model), plain)
    merged = model.merge_and_unload()
    layer, other = (m.model.layers[0].self_attn.q_proj for m in (merged, load(kind)))
    assert type(layer) is type(other) and (kind == "compressed-tensors" or type(layer.weight) is type(other.weight))
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
