"""TRL: distillation, moving-average teachers, added tokens, offloaded activations, ORPO and CPO with adapters, offline."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="needs the `ecosystem` extra (trl)")
pytest.importorskip("datasets", reason="needs the `ecosystem` extra (datasets)")

import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from tests.ecosystem import test_trl as plain  # noqa: E402
from tests.ecosystem.test_trl import args, assert_base_kept, assert_reload, ids, logged, lora, plain_weights, tiny  # noqa: E402
from trl.experimental.cpo import CPOConfig, CPOTrainer  # noqa: E402
from trl.experimental.orpo import ORPOConfig, ORPOTrainer  # noqa: E402
from trl.experimental.sdft.teacher_sync import PEFTAdapterEMACallback, is_pure_lora_training  # noqa: E402

import peft  # noqa: E402

tokenizer = plain.tokenizer  # a fixture


def distillation(config: Any, tokenizer: Any, folder: Path) -> Any:
    torch.manual_seed(0)
    teacher = tiny()
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return trl.DistillationTrainer(
        model=tiny(),
        teacher_model=teacher,
        args=args(trl.DistillationConfig, folder, max_completion_length=6, learning_rate=2e-2, max_steps=8),
        train_dataset=Dataset.from_dict({"prompt": ["the red", "a blue", "the green", "not very"] * 4}),
        processing_class=tokenizer,
        peft_config=config,
    )


def test_distillation(tokenizer: Any, tmp_path: Path) -> None:
    before = plain_weights(tiny())
    trainer = distillation(lora(), tokenizer, tmp_path / "run")
    trainer.train()
    losses = logged(trainer, "loss")
    assert sum(losses[-2:]) < sum(losses[:2]), losses
    assert_base_kept(trainer.model, before)
    assert_reload(trainer, tmp_path / "out", tiny(), input_ids=ids())


@pytest.mark.parametrize("kind", ["prompt", "head"])
def test_distillation_refuses_what_its_loss_would_pass_by(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    config, said = (prompt, "Prompt-learning") if kind == "prompt" else (lora(target_modules=["lm_head"]), "lm_head")
    with pytest.raises(ValueError, match=said):
        distillation(config, tokenizer, tmp_path)


def test_moving_average_teacher(tokenizer: Any, tmp_path: Path) -> None:
    """A second adapter made from the first one's configuration follows it, and is never trained itself."""
    model = peft.get_peft_model(tiny(), lora())
    trainer = trl.SFTTrainer(
        model=model,
        args=args(trl.SFTConfig, tmp_path, max_steps=3),
        train_dataset=plain.text_rows(),
        processing_class=tokenizer,
        callbacks=[PEFTAdapterEMACallback(model, update_rate=0.5)],
    )
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert is_pure_lora_training(model)
    seen, step = [], trainer.training_step

    def watched(*a: Any, **k: Any) -> Any:
        seen.append({k: v.clone() for k, v in peft.get_peft_model_state_dict(model).items()})
        return step(*a, **k)

    trainer.training_step = watched
    trainer.train()
    seen.append(peft.get_peft_model_state_dict(model))
    teacher = peft.get_peft_model_state_dict(model, adapter_name="teacher")
    for name, value in teacher.items():
        expected = sum(0.5 ** (3 - i) * seen[i + 1][name] for i in range(3))
        torch.testing.assert_close(value, expected)
    assert model.active_adapter == "default"
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable


def test_added_tokens_become_trainable(tokenizer: Any, tmp_path: Path) -> None:
    """As SFT does after it gave the tokenizer new tokens of a chat template: it edits the configuration."""
    config = lora(modules_to_save=["norm"])
    config.trainable_token_indices = {"embed_tokens": [20, 21]}
    config.trainable_token_indices["embed_tokens"].extend([22])
    config.modules_to_save.append("lm_head")
    before = plain_weights(tiny())
    trainer = trl.SFTTrainer(
        model=tiny(),
        args=args(trl.SFTConfig, tmp_path / "run"),
        train_dataset=Dataset.from_dict({"input_ids": [[4, 20, 21, 22, 9]] * 16}),
        processing_class=tokenizer,
        peft_config=config,
    )
    trainer.train()
    rows = trainer.model.get_input_embeddings().weight.detach()
    changed = (rows != before["model.embed_tokens.weight"]).any(dim=1).nonzero().flatten().tolist()
    assert changed == [20, 21, 22]
    assert_base_kept(trainer.model, before)
    assert_reload(trainer, tmp_path / "out", tiny(), input_ids=torch.tensor([[4, 20, 22, 9]]))


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="TRL offloads from an accelerator")
def test_offloaded_activations_give_the_same_adapter(tokenizer: Any, tmp_path: Path) -> None:
    from trl.models.activation_offloading import get_act_offloading_ctx_manager

    model, results = peft.get_peft_model(tiny(), lora(init_lora_weights=False)), []
    for offload in (False, True):
        manager = get_act_offloading_ctx_manager(model, use_streams=False) if offload else torch.enable_grad()
        with manager:
            loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        results.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
        model.zero_grad()
    assert results[0]
    assert all(torch.equal(v, results[1][n]) for n, v in results[0].items())


@pytest.mark.parametrize(("cls", "options"), [(ORPOTrainer, ORPOConfig), (CPOTrainer, CPOConfig)])
def test_preferences_without_a_reference(cls: type, options: type, tokenizer: Any, tmp_path: Path) -> None:
    before = plain_weights(tiny())
    trainer = cls(
        model=tiny(),
        args=args(options, tmp_path / "run", learning_rate=2e-2, max_length=16, remove_unused_columns=False),
        train_dataset=plain.pair_rows(),
        processing_class=tokenizer,
        peft_config=lora(),
    )
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0] - 0.15, losses
    assert_base_kept(trainer.model, before)
    assert_reload(trainer, tmp_path / "out", tiny(), input_ids=ids())


def test_adapter_sent_to_a_server(tmp_path: Path) -> None:
    """Asynchronous trainers gather the weights themselves and save one adapter from that dictionary."""
    model = peft.get_peft_model(tiny(), lora(init_lora_weights=False)).eval()
    model.add_adapter("ref", lora(init_lora_weights=False))
    state = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n and ".default." in n}
    model.save_pretrained(tmp_path, selected_adapters=["default"], state_dict=state, safe_serialization=True)
    assert not (tmp_path / "ref").exists()
    again = peft.PeftModel.from_pretrained(tiny(), tmp_path).eval()
    assert torch.equal(again(input_ids=ids()).logits, model(input_ids=ids()).logits)
