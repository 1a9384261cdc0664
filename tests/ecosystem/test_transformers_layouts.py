"""Adapter files of other layouts and places: vision-language models from before transformers 5, subfolders, key mappings."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import save_file
from tests.ecosystem import tiny

import peft

# model -> where transformers 4 had the language model's layers
OLD = {"qwen2_vl": (tiny.qwen2_vl, "model.layers"), "llava": (tiny.llava, "language_model.model.layers")}
TEXT = tiny.ids().clamp(max=50)  # no image tokens


def factors(layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(layer)
    a, b = (torch.randn(s, generator=generator) * 0.3 for s in ((4, tiny.WIDTH), (tiny.WIDTH, 4)))
    return a, b


def old_folder(folder: Path, old: str, targets: Any) -> Path:
    tensors = {}
    for layer in range(2):
        for factor, tensor in zip("AB", factors(layer), strict=True):
            tensors[f"base_model.model.{old}.{layer}.self_attn.q_proj.lora_{factor}.weight"] = tensor
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", OLD)
@pytest.mark.parametrize("native", [False, True])
def test_vision_language_model_of_transformers_4(tmp_path: Path, kind: str, native: bool) -> None:
    make, old = OLD[kind]
    by_hand = make()
    with torch.no_grad():
        for layer in range(2):
            a, b = factors(layer)
            by_hand.get_submodule(f"model.language_model.layers.{layer}.self_attn.q_proj").weight += 2 * b @ a
    expected = tiny.logits(by_hand, TEXT)
    assert tiny.apart(expected, tiny.logits(make(), TEXT))
    folder = old_folder(tmp_path / "old", old, r".*language_model.*\.q_proj")
    model = make()
    if native:
        info = model.load_adapter(str(folder))
        assert not info.missing_keys and not info.unexpected_keys
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = peft.PeftModel.from_pretrained(model, folder)
    assert tiny.close(tiny.logits(model, TEXT), expected)
    model.save_pretrained(tmp_path / "new")
    again = peft.PeftModel.from_pretrained(make(), tmp_path / "new")
    assert torch.equal(tiny.logits(again, TEXT), tiny.logits(model, TEXT))


def test_generation_with_an_image() -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny.llava(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    tiny.spread(model, std=0.05).eval()
    tokens = torch.cat([torch.full((1, 4), 60), TEXT[:1]], 1)  # four patches
    inputs = {"input_ids": tokens, "pixel_values": torch.randn(1, 3, 8, 8), "attention_mask": torch.ones_like(tokens)}
    found = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with model.disable_adapter():
        plain = tiny.logits(model, tokens, pixel_values=inputs["pixel_values"])
    assert tiny.apart(tiny.logits(model, tokens, pixel_values=inputs["pixel_values"]), plain)
    assert torch.equal(model.merge_and_unload().generate(**inputs, max_new_tokens=4, do_sample=False), found)


def adapter(folder: Path, base: Any = None) -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"])
    model = tiny.spread(peft.get_peft_model(base or tiny.llama(), config))
    model.save_pretrained(folder)
    return model


def test_subfolder(tmp_path: Path) -> None:
    expected = tiny.logits(adapter(tmp_path / "root" / "sub"))
    wrapped = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "root", subfolder="sub")
    assert torch.equal(tiny.logits(wrapped), expected)
    native = tiny.llama()
    native.load_adapter(str(tmp_path / "root" / "sub"), adapter_name="named")
    assert torch.equal(tiny.logits(native), expected) and list(native.peft_config) == ["named"]


def test_key_mapping(tmp_path: Path) -> None:
    expected = tiny.logits(adapter(tmp_path))
    weights = peft.load_peft_weights(str(tmp_path), device="cpu")
    save_file(
        {k.replace("model.layers", "decoder.blocks"): v for k, v in weights.items()},
        tmp_path / "adapter_model.safetensors",
    )
    model = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path, key_mapping={r"^decoder\.blocks": "model.layers"})
    assert torch.equal(tiny.logits(model), expected)


def test_pickled_weights(tmp_path: Path) -> None:
    model = adapter(tmp_path / "safe")
    model.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert "adapter_model.bin" in tiny.files(tmp_path / "bin")
    native = tiny.llama()
    native.load_adapter(str(tmp_path / "bin"), use_safetensors=False)
    assert torch.equal(tiny.logits(native), tiny.logits(model))


def test_adapter_for_another_head(tmp_path: Path) -> None:
    """An adapter of a causal model on the classifier of the same family, as reward models are made."""
    adapter(tmp_path)
    model = tiny.llama(tf.LlamaForSequenceClassification, num_labels=1)
    before = tiny.logits(model)
    info = model.load_adapter(str(tmp_path))
    assert not info.missing_keys and not info.unexpected_keys and tiny.apart(tiny.logits(model), before)


@pytest.mark.parametrize("broken", ["not json", "{}", '{"peft_type": "NOTHING"}'])
def test_broken_configuration(tmp_path: Path, broken: str) -> None:
    adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(broken)
    model = tiny.llama()
    names = {n for n, _ in model.named_modules()}
    with pytest.raises((ValueError, KeyError)):
        model.load_adapter(str(tmp_path))
    assert {n for n, _ in model.named_modules()} == names and not model._hf_peft_config_loaded
