"""TRL: SFT, DPO, reward, KTO, GRPO and RLOO on a tiny Llama with adapters, offline."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="needs the `ecosystem` extra (trl)")
pytest.importorskip("datasets", reason="needs the `ecosystem` extra (datasets)")

import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

import peft  # noqa: E402

WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    *("the", "a", "red", "green", "blue", "cat", "dog", "bird", "runs", "sleeps", "sings", "and", "not", "very"),
    *("is", "was", "here", "there"),
]
SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def tiny(cls: type = LlamaForCausalLM, **more: Any) -> Any:
    torch.manual_seed(0)
    return cls(LlamaConfig(**SIZES, **more))


def text_rows(n: int = 32) -> Dataset:
    lines = ["the red cat sleeps here", "a blue dog runs there", "the green bird sings and the cat is here"]
    return Dataset.from_dict({"text": [lines[i % 3] for i in range(n)]})


def pair_rows(n: int = 16) -> Dataset:
    rows = {"prompt": ["the red cat", "a blue dog"], "chosen": [" sleeps here", " runs there"]}
    rows["rejected"] = [" sings very", " is not a bird"]
    return Dataset.from_dict({k: [v[i % 2] for i in range(n)] for k, v in rows.items()})


def args(cls: type, folder: Path, **more: Any) -> Any:
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 0,
        "lr_scheduler_type": "constant",
    }
    return cls(**{**options, **more})


def logged(trainer: Any, key: str) -> list[float]:
    return [row[key] for row in trainer.state.log_history if key in row]


def plain_weights(model: Any) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def assert_base_kept(adapted: Any, before: dict[str, torch.Tensor]) -> None:
    """Every weight of the base, found under the adapter's names, is bit-identical to what it was."""
    names = {}
    for name, value in adapted.get_base_model().state_dict().items():
        names[re.sub(r"\.(token_adapter|base_layer|original_module)\b", "", name)] = value
    for name, value in before.items():
        assert torch.equal(names[name], value), name


def assert_reload(trainer: Any, folder: Path, base: Any, **inputs: torch.Tensor) -> None:
    """Saving through the trainer and loading onto a new base gives the same logits bit for bit."""
    trainer.save_model(str(folder))
    assert (folder / "adapter_model.safetensors").is_file()
    assert not (folder / "model.safetensors").exists()
    again = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    model = trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, again(**inputs).logits)


def ids() -> torch.Tensor:
    return torch.tensor([[4, 6, 9, 13, 20], [5, 8, 10, 12, 21]])


def lora(**more: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **more})


# ---- SFT
METHODS = {
    "lora": lambda: lora(),
    "dora": lambda: lora(use_dora=True),
    "head_and_tokens": lambda: lora(modules_to_save=["lm_head"], trainable_token_indices=[4, 5]),
    "prompt_tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefix_tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "ia3": lambda: peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "oft": lambda: peft.OFTConfig(task_type="CAUSAL_LM", target_modules=TARGETS, oft_block_size=8),
}


@pytest.mark.parametrize("method", list(METHODS))
def test_sft(method: str, tokenizer: Any, tmp_path: Path) -> None:
    base = tiny()
    before = plain_weights(base)
    prompt = method in ("prompt_tuning", "prefix_tuning")
    rate = {"lora": 1e-2, "dora": 1e-2, "ia3": 5e-2, "oft": 1e-2}.get(method, 1e-1 if prompt else 1e-2)
    trainer = trl.SFTTrainer(
        model=base,
        args=args(trl.SFTConfig, tmp_path / "run", learning_rate=rate, max_steps=12),
        train_dataset=text_rows(),
        processing_class=tokenizer,
        peft_config=METHODS[method](),
    )
    assert isinstance(trainer.model, peft.PeftModelForCausalLM)
    trainer.train()
    losses = logged(trainer, "loss")
    assert sum(losses[-3:]) / 3 < losses[0] - 0.01, losses
    assert_base_kept(trainer.model, before)
    assert_reload(trainer, tmp_path / "out", tiny(), input_ids=ids())


@pytest.mark.parametrize("reentrant", [True, False])
def test_sft_gradient_checkpointing_gives_the_same_adapter(reentrant: bool, tokenizer: Any, tmp_path: Path) -> None:
    results = []
    for extra in ({}, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}):
        torch.manual_seed(1)
        trainer = trl.SFTTrainer(
            model=tiny(),
            args=args(trl.SFTConfig, tmp_path, max_steps=3, **extra),
            train_dataset=text_rows(),
            processing_class=tokenizer,
            peft_config=lora(),
        )
        trainer.train()
        results.append(peft.get_peft_model_state_dict(trainer.model))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=0, atol=1e-6, msg=name)
    assert any(v.abs().sum() > 0 for k, v in results[0].items() if "lora_B" in k)


def test_sft_refuses_a_wrapped_model_with_a_config_a_dict_and_an_adapted_head(tokenizer: Any, tmp_path: Path) -> None:
    common = {"args": args(trl.SFTConfig, tmp_path), "train_dataset": text_rows(), "processing_class": tokenizer}
    with pytest.raises(ValueError, match="PeftModel"):
        trl.SFTTrainer(model=peft.get_peft_model(tiny(), lora()), peft_config=lora(), **common)
    with pytest.raises((TypeError, ValueError), match="peft_config"):
        trl.SFTTrainer(model=tiny(), peft_config={"r": 4}, **common)
    with pytest.raises(ValueError, match="lm_head"):  # found by `get_output_embeddings` and the type of layers
        trl.SFTTrainer(model=tiny(), peft_config=lora(target_modules=["q_proj", "lm_head"]), **common)


def test_sft_checkpoint_and_resume(tokenizer: Any, tmp_path: Path) -> None:
    def run(steps: int, resume: str | None = None) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        options = args(trl.SFTConfig, tmp_path, max_steps=steps, save_strategy="steps", save_steps=2)
        trainer = trl.SFTTrainer(
            model=tiny(), args=options, train_dataset=text_rows(), processing_class=tokenizer, peft_config=lora()
        )
        trainer.train(resume_from_checkpoint=resume)
        return peft.get_peft_model_state_dict(trainer.model)

    whole = run(4)
    resumed = run(4, str(tmp_path / "checkpoint-2"))
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


# ---- DPO
def dpo(model: Any, tokenizer: Any, folder: Path, config: Any = None, ref_model: Any = None, **more: Any) -> Any:
    return trl.DPOTrainer(
        model=model,
        ref_model=ref_model,
        args=args(trl.DPOConfig, folder, **more),
        train_dataset=pair_rows(),
        processing_class=tokenizer,
        peft_config=config,
    )


@pytest.mark.parametrize("precomputed", [False, True])
def test_dpo_reference_is_the_model_without_its_adapter(precomputed: bool, tokenizer: Any, tmp_path: Path) -> None:
    base = tiny()
    before = plain_weights(base)
    options = {"learning_rate": 5e-2, "beta": 0.5, "precompute_ref_log_probs": precomputed}
    trainer = dpo(base, tokenizer, tmp_path / "run", lora(), **options)
    assert trainer.ref_model is None
    assert list(trainer.model.peft_config) == ["default"]
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)  # policy and reference are equal at the first step
    assert losses[-1] < 0.7 * losses[0], losses
    assert_base_kept(trainer.model, before)
    assert_reload(trainer, tmp_path / "out", tiny(), input_ids=ids())


def test_dpo_on_a_trained_adapter_keeps_a_frozen_copy(tokenizer: Any, tmp_path: Path) -> None:
    model = peft.get_peft_model(tiny(), lora())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    start = peft.get_peft_model_state_dict(model)
    start = {k: v.clone() for k, v in start.items()}
    trainer = dpo(model, tokenizer, tmp_path / "run", learning_rate=5e-2, beta=0.5)
    assert list(trainer.model.peft_config) == ["default", "ref"]
    assert trainer.model.active_adapter == "default"
    trainable = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".default." in n for n in trainable)
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[-1] < 0.5 * losses[0], losses
    assert trainer.model.active_adapter == "default"
    assert {n for n, p in trainer.model.named_parameters() if p.requires_grad} == trainable
    reference = peft.get_peft_model_state_dict(trainer.model, adapter_name="ref")
    policy = peft.get_peft_model_state_dict(trainer.model, adapter_name="default")
    assert set(reference) == set(start)
    assert all(torch.equal(v, start[k]) for k, v in reference.items())
    assert any(not torch.equal(v, start[k]) for k, v in policy.items())


# ---- reward model
def test_reward_model(tokenizer: Any, tmp_path: Path) -> None:
    base = tiny(LlamaForSequenceClassification, num_labels=1)
    before = plain_weights(base)
    trainer = trl.RewardTrainer(
        model=base,
        args=args(trl.RewardConfig, tmp_path / "run"),
        train_dataset=pair_rows(),
        processing_class=tokenizer,
        peft_config=lora(task_type="SEQ_CLS", modules_to_save=["score"]),
    )
    assert isinstance(trainer.model, peft.PeftModelForSequenceClassification)
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < 0.5 * losses[0], losses
    assert logged(trainer, "accuracy")[-1] == 1.0
    assert_base_kept(trainer.model, before)
    fresh = tiny(LlamaForSequenceClassification, num_labels=1)
    assert_reload(trainer, tmp_path / "out", fresh, input_ids=ids())


# ---- KTO, GRPO, RLOO
def test_kto(tokenizer: Any, tmp_path: Path) -> None:
    rows = pair_rows(16)
    data = {
        "prompt": [p for p in rows["prompt"] for _ in (0, 1)],
        "completion": [c for pair in zip(rows["chosen"], rows["rejected"], strict=True) for c in pair],
        "label": [True, False] * len(rows),
    }
    base = tiny()
    before = plain_weights(base)
    trainer = trl.KTOTrainer(
        model=base,
        args=args(trl.KTOConfig, tmp_path / "run", learning_rate=5e-2, beta=0.5, max_steps=12),
        train_dataset=Dataset.from_dict(data),
        processing_class=tokenizer,
        peft_config=lora(),
    )
    assert trainer.ref_model is None
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[0] == pytest.approx(0.5, abs=1e-3)  # sigmoid(0) for equal policy and reference
    assert losses[-1] < losses[0] - 0.05, losses
    assert_base_kept(trainer.model, before)
    assert_reload(trainer, tmp_path / "out", tiny(), input_ids=ids())


def cats(completions: list[str], **_: Any) -> list[float]:
    return [float(len(re.findall("cat|dog|bird", text))) for text in completions]


def online(cls: type, options: type, model: Any, tokenizer: Any, folder: Path, config: Any, **more: Any) -> Any:
    return cls(
        model=model,
        reward_funcs=cats,
        args=args(options, folder, num_generations=4, max_completion_length=6, **more),
        train_dataset=Dataset.from_dict({"prompt": ["the red", "a blue", "the green", "not very"] * 4}),
        processing_class=tokenizer,
        peft_config=config,
    )


@pytest.mark.parametrize("given", ["config", "adapter"])
def test_grpo(given: str, tokenizer: Any, tmp_path: Path) -> None:
    base = tiny()
    before = plain_weights(base)
    model, config = (base, lora()) if given == "config" else (peft.get_peft_model(base, lora()), None)
    if given == "adapter":
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.05)
    trainer = online(trl.GRPOTrainer, trl.GRPOConfig, model, tokenizer, tmp_path, config, beta=0.05, max_steps=6)
    assert ("ref" in trainer.model.peft_config) == (given == "adapter")
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    kl = logged(trainer, "kl")
    assert kl[0] == pytest.approx(0.0, abs=1e-6)  # the reference is the policy before its first step
    assert kl[-1] > 1e-6
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, start[n])}
    assert moved
    assert all(".default." in n and "lora_" in n for n in moved), moved
    assert_base_kept(trainer.model, before)


def test_rloo(tokenizer: Any, tmp_path: Path) -> None:
    base = tiny()
    before = plain_weights(base)
    trainer = online(trl.RLOOTrainer, trl.RLOOConfig, base, tokenizer, tmp_path / "run", lora(), beta=0.05, max_steps=6)
    trainer.train()
    assert all(math.isfinite(v) for v in logged(trainer, "loss"))
    state = peft.get_peft_model_state_dict(trainer.model)
    assert any(v.abs().sum() > 0 for k, v in state.items() if "lora_B" in k)
    assert_base_kept(trainer.model, before)
    assert_reload(trainer, tmp_path / "out", tiny(), input_ids=ids())


def test_names_of_merged_weights_sent_to_an_inference_server() -> None:
    """TRL's recipe: merge in place, drop names holding `model.prefix`, make the rest canonical, unmerge."""
    base = tiny()
    before = plain_weights(base)
    model = peft.get_peft_model(base, lora(modules_to_save=["lm_head"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                p.normal_(std=0.05)
    expected = model(input_ids=ids()).logits
    model.merge_adapter()
    sent = {}
    for name, p in model.named_parameters():
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if model.prefix in name or "original_module" in name:
            continue
        sent[name.replace("modules_to_save.default.", "")] = p.detach().clone()
    model.unmerge_adapter()
    assert set(sent) == set(before)
    server = tiny()
    server.load_state_dict(sent)
    torch.testing.assert_close(server(input_ids=ids()).logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(input_ids=ids()).logits, expected, rtol=1e-4, atol=1e-5)
