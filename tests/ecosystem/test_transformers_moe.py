"""Mixture-of-experts models whose experts transformers 5 holds in stacked parameters, and adapters made before that."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tests.ecosystem import tiny

import peft
from peft.utils.transformers_weight_conversion import build_peft_weight_mapping

SCALE = 2.0  # lora_alpha / r
FAMILIES = {
    "mixtral": (tiny.mixtral, "block_sparse_moe", ("w1", "w3", "w2"), 48),
    "qwen3_moe": (tiny.qwen3_moe, "mlp", ("gate_proj", "up_proj", "down_proj"), 24),
}
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


def old_factors(family: str, leaves: list[str], ranks: dict[str, int] | None = None, experts: int = 4) -> Factors:
    """{module name of transformers 4: (A, B)}"""
    _, block, (gate, up, _), inner = FAMILIES[family]
    generator, found = torch.Generator().manual_seed(11), {}
    for layer in range(2):
        for leaf in leaves:
            sizes = (tiny.WIDTH, inner) if leaf in (gate, up) else (inner, tiny.WIDTH)
            names = [f"model.layers.{layer}.{block}.experts.{e}.{leaf}" for e in range(experts)]
            if leaf == "gate":
                sizes, names = (tiny.WIDTH, 4), [f"model.layers.{layer}.{block}.gate"]
            elif leaf == "q_proj":
                sizes, names = (tiny.WIDTH, tiny.WIDTH), [f"model.layers.{layer}.self_attn.q_proj"]
            r = (ranks or {}).get(leaf, 4)
            for name in names:
                a, b = torch.randn(r, sizes[0], generator=generator), torch.randn(sizes[1], r, generator=generator)
                found[name] = (a, b) if leaf == "gate" else (a * 0.2, b * 0.2)
    return found


def old_folder(folder: Path, factors: Factors, targets: Any, **options: Any) -> Path:
    """An adapter as transformers 4 and the peft of that time wrote it."""
    folder.mkdir()
    tensors = {}
    for name, (a, b) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": targets,
        **options,
    }
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": None, "inference_mode": True, **config})
    )
    return folder


@torch.no_grad()
def by_hand(family: str, factors: Factors) -> Any:
    """The deltas added to the right slices of the base weights."""
    make, block, (gate, up, down), inner = FAMILIES[family]
    model = make()
    for name, (a, b) in factors.items():
        parts, delta = name.split("."), SCALE * b @ a
        layer = model.model.layers[int(parts[2])]
        if parts[-1] == "q_proj":
            layer.self_attn.q_proj.weight += delta
        elif parts[-1] == "gate":
            layer.mlp.gate.weight += delta
        elif parts[-1] == down:
            layer.mlp.experts.down_proj[int(parts[-2])] += delta
        else:
            rows = slice(0, inner) if parts[-1] == gate else slice(inner, None)
            layer.mlp.experts.gate_up_proj[int(parts[-2])][rows] += delta
    return model


def cases() -> list[Any]:
    found = []
    for family, (_, _, (gate, up, down), _) in FAMILIES.items():
        for leaves in ([gate, up, down], [gate, up], [down], ["q_proj", "gate", gate, up, down], ["gate"]):
            found.append(pytest.param(family, leaves, id=f"{family}-{'+'.join(leaves)}"))
    return found


@pytest.mark.parametrize(("family", "leaves"), cases())
def test_old_checkpoint(tmp_path: Path, family: str, leaves: list[str]) -> None:
    if family == "mixtral" and leaves == ["w2"]:
        leaves = ["w2", "q_proj"]
    make = FAMILIES[family][0]
    factors = old_factors(family, leaves)
    expected = tiny.logits(by_hand(family, factors))
    assert tiny.apart(expected, tiny.logits(make()))
    folder = old_folder(tmp_path / "old", factors, leaves)

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing missing, nothing unexpected, no pattern without a match
        model = peft.PeftModel.from_pretrained(make(), folder)
    assert tiny.close(tiny.logits(model), expected, 1e-4)
    native = make()
    info = native.load_adapter(str(folder))
    assert not info.missing_keys and not info.unexpected_keys, info
    assert tiny.close(tiny.logits(native), expected, 1e-4)

    # The new layout makes the round trip too, in every direction.
    model.save_pretrained(tmp_path / "new")
    again = peft.PeftModel.from_pretrained(make(), tmp_path / "new")
    assert torch.equal(tiny.logits(again), tiny.logits(model))
    native = make()
    info = native.load_adapter(str(tmp_path / "new"))
    assert not info.missing_keys and not info.unexpected_keys
    assert torch.equal(tiny.logits(native), tiny.logits(model))
    merged = again.merge_and_unload()
    assert tiny.close(tiny.logits(merged), expected, 1e-4)


@pytest.mark.parametrize("pattern", ["all-linear", r".*\.experts\..*\.w[123]", r".*(w1|w2|w3)"])
def test_old_checkpoint_with_pattern(tmp_path: Path, pattern: str) -> None:
    leaves = ["q_proj", "gate", "w1", "w2", "w3"] if pattern == "all-linear" else ["w1", "w2", "w3"]
    factors = old_factors("mixtral", leaves)
    if pattern == "all-linear":
        for layer in range(2):
            for leaf, size in (("k_proj", 16), ("v_proj", 16), ("o_proj", 32)):
                factors[f"model.layers.{layer}.self_attn.{leaf}"] = (torch.zeros(4, tiny.WIDTH), torch.zeros(size, 4))
    expected = tiny.logits(
        by_hand("mixtral", {k: v for k, v in factors.items() if "k_proj v_proj o_proj".find(k[-6:]) < 0})
    )
    folder = old_folder(tmp_path / "old", factors, pattern)
    model = peft.PeftModel.from_pretrained(tiny.mixtral(), folder)
    assert tiny.close(tiny.logits(model), expected, 1e-4)


def test_auto_model_on_old_checkpoint(tmp_path: Path) -> None:
    tiny.mixtral().save_pretrained(tmp_path / "base")
    factors = old_factors("mixtral", ["w1", "w2", "w3"])
    folder = old_folder(tmp_path / "old", factors, ["w1", "w2", "w3"], base_model_name_or_path=str(tmp_path / "base"))
    expected = tiny.logits(by_hand("mixtral", factors))
    assert tiny.close(tiny.logits(tf.AutoModelForCausalLM.from_pretrained(folder).eval()), expected, 1e-4)
    assert tiny.close(tiny.logits(peft.AutoPeftModelForCausalLM.from_pretrained(folder).eval()), expected, 1e-4)


def test_incomplete_checkpoint_is_reported(tmp_path: Path) -> None:
    factors = old_factors("mixtral", ["w1", "w2", "w3"])
    lost = {k: v for k, v in factors.items() if not k.endswith("layers.1.block_sparse_moe.experts.2.w2")}
    folder = old_folder(tmp_path / "old", lost, ["w1", "w2", "w3"])
    with pytest.warns(UserWarning, match="missing"):
        peft.PeftModel.from_pretrained(tiny.mixtral(), folder)


@pytest.mark.parametrize(("family", "half"), [("mixtral", "w1"), ("mixtral", "w3"), ("qwen3_moe", "up_proj")])
def test_half_of_a_fused_pair(family: str, half: str) -> None:
    partner = {"w1": "w3", "w3": "w1", "up_proj": "gate_proj"}[half]
    model = FAMILIES[family][0]()
    before = {n for n, _ in model.named_modules()}
    with pytest.raises(ValueError, match=f"{half} without also targeting {partner}"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", half]))
    assert {n for n, _ in model.named_modules()} == before


def test_default_targets() -> None:
    """The defaults of the model type hold for models with fused experts too."""
    model = peft.get_peft_model(tiny.mixtral(), peft.LoraConfig(r=4))
    assert (
        set(model.peft_config["default"].target_modules) == {"q_proj", "v_proj"}
        and len(model.targeted_module_names) == 4
    )


def test_configuration_after_conversion() -> None:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "gate", "w1", "w2", "w3"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = peft.get_peft_model(tiny.mixtral(), config)
    assert config.target_modules == {"q_proj"} and config.target_parameters == {
        "gate.weight",
        "gate_up_proj",
        "down_proj",
    }
    assert config.rank_pattern == {r".*\.gate_up_proj": 8} and config.alpha_pattern == {r".*\.gate_up_proj": 16}
    experts = model.base_model.model.model.layers[0].mlp.experts
    inner = experts.base_layer
    assert inner.lora_A["default"].weight.shape == (4 * 8, tiny.WIDTH) and inner.lora_B["default"].weight.shape == (
        96,
        4 * 8,
    )
    assert experts.lora_A["default"].weight.shape == (4 * 4, 48) and experts.lora_B["default"].weight.shape == (
        tiny.WIDTH,
        4 * 4,
    )
    assert inner.scaling["default"] == experts.scaling["default"] == SCALE
    # a second model with the same configuration object, then a second adapter
    again = peft.get_peft_model(tiny.mixtral(), config)
    assert len(again.base_model.targeted_parameter_names) == len(model.base_model.targeted_parameter_names) == 6
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["gate", "w1", "w2", "w3"]))
    assert inner.lora_A["second"].weight.shape == (4 * 4, tiny.WIDTH)
    with pytest.raises(ValueError, match="same `target_parameters`"):
        model.add_adapter("third", peft.LoraConfig(r=2, target_modules=["w1", "w3"]))


PATTERNS = {
    "one rank for each": ({"w1": 6, "w3": 6, "w2": 2}, {"rank_pattern": {"w1": 6, "w3": 6, "w2": 2}, "alpha_pattern": {"w1": 12, "w3": 12, "w2": 4}}),
    "two ranks fused": ({"w1": 6, "w3": 3}, {"rank_pattern": {"w1": 6, "w3": 3}, "alpha_pattern": {"w1": 12, "w3": 6}}),
    "rslora": ({}, {"use_rslora": True, "lora_alpha": 4}),
}  # fmt: skip


@pytest.mark.parametrize("case", PATTERNS)
def test_old_checkpoint_with_ranks(tmp_path: Path, case: str) -> None:
    ranks, options = PATTERNS[case]
    leaves = ["w1", "w2", "w3"]
    factors = old_factors("mixtral", leaves, ranks)
    folder = old_folder(tmp_path / "old", factors, leaves, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = peft.PeftModel.from_pretrained(tiny.mixtral(), folder)
    expected = tiny.logits(by_hand("mixtral", factors))
    assert tiny.close(tiny.logits(model), expected, 1e-4)
    model.save_pretrained(tmp_path / "new")
    again = tiny.mixtral()
    again.load_adapter(str(tmp_path / "new"))
    assert torch.equal(tiny.logits(again), tiny.logits(model))
    native = tiny.mixtral()
    native.load_adapter(str(folder))
    assert tiny.close(tiny.logits(native), expected, 1e-4)


def test_fused_projections_with_two_scalings() -> None:
    config = peft.LoraConfig(r=4, target_modules=["w1", "w2", "w3"], alpha_pattern={"w1": 3})
    with pytest.raises(ValueError, match="w1 and w3 the scalings"):
        peft.get_peft_model(tiny.mixtral(), config)
    assert config.target_modules == {"w1", "w2", "w3"} and config.target_parameters is None


def test_two_old_checkpoints(tmp_path: Path) -> None:
    leaves = ["w1", "w2", "w3"]
    first, second = old_factors("mixtral", leaves), old_factors("mixtral", leaves, dict.fromkeys(leaves, 2))
    model = peft.PeftModel.from_pretrained(
        tiny.mixtral(), old_folder(tmp_path / "first", first, leaves), adapter_name="first"
    )
    model.load_adapter(old_folder(tmp_path / "second", second, leaves, r=2, lora_alpha=4), "second")
    model.add_adapter("plain", peft.LoraConfig(target_modules=["q_proj"]))
    for name, factors in (("second", second), ("first", first)):
        model.set_adapter(name)
        assert tiny.close(tiny.logits(model), tiny.logits(by_hand("mixtral", factors)), 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_and_merging(tmp_path: Path, family: str) -> None:
    make, _, leaves, _ = FAMILIES[family]
    torch.manual_seed(0)
    model = peft.get_peft_model(make(), peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", *leaves]))
    before, data = tiny.base_tensors(model), tiny.Texts()
    assert tiny.close(tiny.logits(model), tiny.logits(make()), 1e-6)
    arguments = tf.TrainingArguments(
        output_dir=str(tmp_path), max_steps=20, per_device_train_batch_size=8, learning_rate=2e-2, logging_steps=1, report_to="none",
        use_cpu=True, disable_tqdm=True, save_steps=20, dataloader_pin_memory=False, gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    trainer = tf.Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    assert tiny.falls(tiny.losses(trainer), 0.95) and tiny.same(before, tiny.base_tensors(model))
    model.eval()
    trained = tiny.logits(model)
    again = peft.PeftModel.from_pretrained(make(), tmp_path / "checkpoint-20")
    assert tiny.close(tiny.logits(again), trained)
    with again.disable_adapter():
        assert torch.equal(tiny.logits(again), tiny.logits(make()))
    again.merge_adapter()
    assert tiny.close(tiny.logits(again), trained, 1e-4)
    again.unmerge_adapter()
    assert tiny.same(tiny.base_tensors(again), before)


def test_target_parameters(tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=4, target_parameters=["experts.gate_up_proj", "experts.down_proj", "gate.weight"], target_modules=[]
    )
    torch.manual_seed(0)
    model = tiny.mixtral()
    model.add_adapter(config)
    tiny.spread(model)
    expected = tiny.logits(model)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert sum("experts.base_layer.lora_" in k for k in stored) == 4 and sum("gate.lora_" in k for k in stored) == 4
    again = tiny.mixtral()
    info = again.load_adapter(str(tmp_path))
    assert not info.missing_keys and not info.unexpected_keys and torch.equal(tiny.logits(again), expected)
    wrapped = peft.PeftModel.from_pretrained(tiny.mixtral(), tmp_path)
    assert tiny.close(tiny.logits(wrapped.merge_and_unload()), expected, 1e-4)


def test_generation() -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(
        tiny.mixtral(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["w1", "w2", "w3"])
    )
    tiny.spread(model).eval()
    inputs = {
        "input_ids": tiny.ids(2, 5),
        "attention_mask": torch.ones(2, 5, dtype=torch.long),
        "max_new_tokens": 6,
        "do_sample": False,
    }
    found = [model.generate(**inputs, **options) for options in ({}, {"cache_implementation": "static"})]
    merged = model.merge_and_unload().generate(**inputs)
    assert torch.equal(found[0], merged) and torch.equal(found[1], merged)


def test_other_methods_are_left_alone() -> None:
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    model = peft.get_peft_model(tiny.mixtral(), config)
    assert config.target_modules == {"k_proj"} and len(model.targeted_module_names) == 2


def test_weight_mapping() -> None:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    assert build_peft_weight_mapping(None, "a") == [] == build_peft_weight_mapping([], "a")
    conversions = get_checkpoint_conversion_mapping("mixtral")
    assert conversions is not None
    mapping = build_peft_weight_mapping(
        conversions, "a", peft_config=peft.LoraConfig(target_modules=["w1", "w2", "w3"])
    )
    kinds = [type(m).__name__ for m in mapping]
    assert kinds == ["WeightRenaming"] * 4 + ["WeightConverter"] * 4
    assert [m.target_patterns for m in mapping[-4:]] == [
        [".experts.base_layer.lora_A.a.weight"], [".experts.base_layer.lora_B.a.weight"],
        [".experts.lora_A.a.weight"], [".experts.lora_B.a.weight"],
    ]  # fmt: skip
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    for renaming in mapping[:4]:
        key = renaming.rename_source_key(key)[0]
    assert key == "model.layers.0.self_attn.q_proj.lora_A.a.weight"
