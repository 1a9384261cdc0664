"""transformers.Trainer with a PeftModel: training, evaluation, checkpoints, resuming, the best model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from tests.ecosystem import tiny

import peft

TARGETS = ["q_proj", "v_proj", "down_proj"]


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": TARGETS, **options})


def train(model: torch.nn.Module, folder: Path, data: Any = None, resume: Any = None, **options: Any) -> tf.Trainer:
    arguments = tf.TrainingArguments(
        **{
            "output_dir": str(folder), "max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 2e-2, "logging_steps": 1,
            "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "seed": 3,
            "dataloader_pin_memory": False, **options,
        }
    )  # fmt: skip
    data = tiny.Texts() if data is None else data
    trainer = tf.Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def adapted(config: Any = None, name: str = "default", base: Any = None) -> peft.PeftModel:
    base = tiny.llama() if base is None else base
    torch.manual_seed(0)
    return peft.get_peft_model(base, config or lora(), adapter_name=name)


def test_trains_only_the_adapter(tmp_path: Path) -> None:
    model = adapted()
    before, adapter = tiny.base_tensors(model), tiny.tensors(model, "lora_")
    trainer = train(model, tmp_path, max_steps=40)
    assert tiny.falls(tiny.losses(trainer), 0.8)
    assert tiny.same(before, tiny.base_tensors(model))
    assert not any(torch.equal(adapter[k], v) for k, v in tiny.tensors(model, "lora_").items())
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model), tiny.logits(tiny.llama()))


def test_evaluate_and_predict(tmp_path: Path) -> None:
    model = adapted()
    data = tiny.Texts(8)
    trainer = train(model, tmp_path, data)
    metrics = trainer.evaluate()
    model.eval()
    batch = {k: torch.stack([data[i][k] for i in range(len(data))]) for k in data[0]}
    with torch.no_grad():
        out = model(**batch)
    assert metrics["eval_loss"] == pytest.approx(float(out.loss), rel=1e-5)
    prediction = trainer.predict(data)
    assert tiny.close(torch.tensor(prediction.predictions), out.logits)
    assert prediction.label_ids.shape == (8, 12)


def test_checkpoint_holds_the_adapter_only(tmp_path: Path) -> None:
    model = adapted(base=_named(tmp_path / "base"))
    train(model, tmp_path / "run", max_steps=4, save_strategy="steps", save_steps=4)
    folder = tmp_path / "run" / "checkpoint-4"
    found = tiny.files(folder)
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
        "trainer_state.json",
        "optimizer.pt",
    } <= found
    assert not found & {"model.safetensors", "config.json", "pytorch_model.bin"}
    assert "library_name: peft" in (folder / "README.md").read_text()
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tmp_path / "base")
    stored = load_file(folder / "adapter_model.safetensors")
    assert len(stored) == 2 * 2 * len(TARGETS)
    assert all(k.startswith("base_model.model.model.layers.") and "default" not in k for k in stored)
    again = peft.PeftModel.from_pretrained(tiny.llama(), folder)
    assert torch.equal(tiny.logits(again), tiny.logits(model.eval()))
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
    assert torch.equal(tiny.logits(auto), tiny.logits(model))


def _named(folder: Path) -> Any:
    model = tiny.llama()
    tiny.saved(model, folder)
    return model


@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"lora_dropout": 0.3}, {"modules_to_save": ["lm_head"]}], ids=str
)
def test_resume_is_bitwise(tmp_path: Path, options: dict) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    whole = adapted(lora(**options))
    straight = train(whole, tmp_path, **saving)
    torch.manual_seed(123)  # other random initial values, which the checkpoint replaces
    second = peft.get_peft_model(tiny.llama(), lora(**options, init_lora_weights=False))
    resumed = train(second, tmp_path, resume=str(tmp_path / "checkpoint-3"), **saving)
    assert tiny.losses(straight)[3:] == tiny.losses(resumed)[3:]
    assert tiny.same(tiny.tensors(whole), tiny.tensors(second))


def test_resume_finds_the_last_checkpoint(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    train(adapted(), tmp_path, max_steps=4, **saving)
    model = adapted()
    trainer = train(model, tmp_path, max_steps=6, resume=True, **saving)
    assert trainer.state.global_step == 6
    assert tiny.same(tiny.tensors(model), tiny.tensors(_trained(tmp_path / "six", 6, saving)))


def _trained(folder: Path, steps: int, options: dict) -> torch.nn.Module:
    model = adapted()
    # the learning rate follows the number of steps, so the reference takes the same two legs
    train(model, folder, max_steps=4, **options)
    model = adapted()
    train(model, folder, max_steps=steps, resume=str(folder / "checkpoint-4"), **options)
    return model


def test_resume_with_two_adapters(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}

    def two() -> peft.PeftModel:
        model = adapted(name="one")
        torch.manual_seed(7)
        model.add_adapter("two", lora(r=2))
        model.set_adapter("two")
        return model

    model = two()
    frozen = tiny.tensors(model, ".one.")
    train(model, tmp_path, **saving)
    assert {"one/adapter_model.safetensors", "two/adapter_model.safetensors"} <= tiny.files(tmp_path / "checkpoint-2")
    second = two()
    train(second, tmp_path, resume=str(tmp_path / "checkpoint-2"), **saving)
    assert second.active_adapters == ["two"]
    assert tiny.same(frozen, tiny.tensors(second, ".one.")) and tiny.same(tiny.tensors(model), tiny.tensors(second))
    assert {n.split(".")[-2] for n, p in second.named_parameters() if p.requires_grad} == {"two"}


def test_best_model_at_end(tmp_path: Path) -> None:
    model = adapted()
    # "best" is the highest loss here, so that it is not the last checkpoint
    trainer = train(
        model, tmp_path, max_steps=6, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    best = trainer.state.best_model_checkpoint
    evaluations = tiny.losses(trainer, "eval_loss")
    assert best is not None and Path(best).name != "checkpoint-6"
    assert trainer.evaluate()["eval_loss"] == max(evaluations) != evaluations[-1]
    stored = load_file(Path(best) / "adapter_model.safetensors")
    live = peft.get_peft_model_state_dict(model)
    assert tiny.same(stored, live)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        n for n, _ in model.named_parameters() if "lora_" in n
    ]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(tmp_path: Path, reentrant: bool) -> None:
    plain, checkpointed = adapted(), adapted()
    train(plain, tmp_path, max_steps=3)
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    train(checkpointed, tmp_path, max_steps=3, **options)
    assert checkpointed.base_model.model.is_gradient_checkpointing
    assert tiny.same(tiny.tensors(plain), tiny.tensors(checkpointed))


def test_gradient_checkpointing_switched_on_before(tmp_path: Path) -> None:
    base = tiny.llama()
    base.gradient_checkpointing_enable({"use_reentrant": True})
    model, plain = adapted(base=base), adapted()
    train(model, tmp_path, max_steps=2)
    train(plain, tmp_path, max_steps=2)
    assert tiny.same(tiny.tensors(plain), tiny.tensors(model))


def test_label_smoothing(tmp_path: Path) -> None:
    model = adapted()
    trainer = train(model, tmp_path, label_smoothing_factor=0.2)
    assert trainer.label_smoother.epsilon == 0.2 and tiny.falls(tiny.losses(trainer))
    batch = {k: v[None] for k, v in tiny.Texts()[0].items()}
    model.eval()
    with torch.no_grad():
        loss, out = trainer.compute_loss(model, dict(batch), return_outputs=True)
    logp = out.logits[:, :-1].log_softmax(-1)
    nll = -logp.gather(-1, batch["labels"][:, 1:, None]).mean()
    assert float(loss) == pytest.approx(float(0.8 * nll - 0.2 * logp.mean()), rel=1e-5)


def test_neftune(tmp_path: Path) -> None:
    plain, noisy = adapted(), adapted()
    train(plain, tmp_path, max_steps=2)
    trainer = train(noisy, tmp_path, max_steps=2, neftune_noise_alpha=5.0)
    assert not tiny.same(tiny.tensors(plain, "lora_"), tiny.tensors(noisy, "lora_"))
    assert tiny.same(tiny.base_tensors(plain), tiny.base_tensors(noisy))
    embedding = trainer.model.base_model.model.get_input_embeddings()
    assert not embedding._forward_hooks


def test_classification_head(tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
    model = adapted(config, base=tiny.bert())
    head = model.base_model.model.classifier
    original = head.original_module.weight.detach().clone()
    trainer = train(model, tmp_path, tiny.Classes(), max_steps=24, save_strategy="steps", save_steps=24)
    assert trainer.label_names == ["labels"] and tiny.falls(tiny.losses(trainer))
    assert torch.equal(original, head.original_module.weight) and not torch.equal(
        original, head.modules_to_save.default.weight
    )
    again = peft.PeftModel.from_pretrained(tiny.bert(), tmp_path / "checkpoint-24")
    assert isinstance(again, peft.PeftModelForSequenceClassification)
    assert torch.equal(tiny.logits(again), tiny.logits(model.eval()))


METHODS = {
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "ia3": lambda: peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "oft": lambda: peft.OFTConfig(task_type="CAUSAL_LM", target_modules=TARGETS, oft_block_size=8),
    "vera": lambda: peft.VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "o_proj"], r=4),
    "tokens": lambda: peft.TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=list(range(3, 60))),
}


@pytest.mark.parametrize("method", METHODS)
def test_other_methods(tmp_path: Path, method: str) -> None:
    model = adapted(METHODS[method]())
    before = tiny.base_tensors(model)
    trainer = train(
        model, tmp_path, max_steps=6, learning_rate=0.1, save_strategy="steps", save_steps=3, eval_strategy="steps", eval_steps=3,
        lr_scheduler_type="constant",
        # p-tuning stores the output of its network: loading it into the model that trains cannot restore the network
        load_best_model_at_end=method != "p-tuning",
    )  # fmt: skip
    assert tiny.falls(tiny.losses(trainer), 0.99), tiny.losses(trainer)
    assert tiny.same(before, tiny.base_tensors(model))
    again = peft.PeftModel.from_pretrained(
        tiny.llama(), trainer.state.best_model_checkpoint if method != "p-tuning" else tmp_path / "checkpoint-6"
    )
    assert tiny.close(tiny.logits(again), tiny.logits(model.eval()), 1e-6)


def test_best_model_of_another_size(tmp_path: Path) -> None:
    """A prompt of another length in the folder: Trainer explains the RuntimeError."""
    trainer = train(adapted(METHODS["prompt"]()), tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    other = adapted(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6))
    with pytest.raises(RuntimeError):
        other.load_adapter(tmp_path / "checkpoint-1", "default")
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
    trainer._load_best_model()


def test_mixed_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny.llama(), lora(task_type=None), mixed=True)
    model.add_adapter("other", peft.LoHaConfig(r=2, target_modules=["k_proj"]))
    model.set_adapter(["default", "other"])
    trainer = train(model, tmp_path, tiny.Texts())
    assert tiny.falls(tiny.losses(trainer)) and trainer.label_names == ["labels"]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("hada_w1_a" in n for n in trained) and any("lora_A" in n for n in trained)


def test_model_card(tmp_path: Path) -> None:
    trainer = train(adapted(), tmp_path, max_steps=1)
    trainer.save_model()
    trainer.create_model_card(model_name="counting", tags=["mine"])
    text = (tmp_path / "README.md").read_text()
    assert "library_name: peft" in text and "mine" in text and "counting" in text


def test_seq2seq_trainer(tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, target_modules=["q", "v"])
    model = adapted(config, base=tiny.t5())
    arguments = tf.Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), max_steps=16, per_device_train_batch_size=4, learning_rate=3e-2, logging_steps=1, report_to="none",
        use_cpu=True, predict_with_generate=True, generation_max_length=6, save_strategy="no", disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = tf.Seq2SeqTrainer(model=model, args=arguments, train_dataset=tiny.Texts(), eval_dataset=tiny.Texts(4))
    trainer.train()
    assert tiny.falls(tiny.losses(trainer))
    prediction = trainer.predict(tiny.Texts(4), max_length=6)
    expected = model.generate(
        input_ids=tiny.Texts(4).tokens, attention_mask=torch.ones(4, 12, dtype=torch.long), max_length=6
    )
    assert (torch.tensor(prediction.predictions)[:, : expected.shape[1]] == expected).all()


def test_mixed_precision_and_accumulation(tmp_path: Path) -> None:
    model = adapted(base=tiny.llama().to(torch.bfloat16))
    trainer = train(model, tmp_path, bf16=True, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    assert tiny.falls(tiny.losses(trainer))
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if "lora_" not in n} == {torch.bfloat16}
