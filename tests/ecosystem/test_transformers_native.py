"""Adapters on transformers models without a wrapper: add_adapter, load_adapter, set_adapter and what belongs to
them.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from tests.ecosystem import tiny
from tests.versions import since

import peft
from peft.tuners.tuners_utils import BaseTunerLayer


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **options})


def native(config: Any = None, name: str = "default", base: Any = None) -> Any:
    model = tiny.llama() if base is None else base
    torch.manual_seed(0)
    model.add_adapter(config or lora(), name)
    return tiny.spread(model)


def add(model: Any, config: Any, name: str, seed: int) -> None:
    model.add_adapter(config, name)
    tiny.spread(model, seed=seed, only=f".{name}")


@pytest.fixture
def two() -> Any:
    model = native(name="one")
    add(model, lora(r=2, target_modules=["v_proj", "down_proj"]), "two", 6)
    return model


# ---- life cycle


def test_add_and_train() -> None:
    base = tiny.llama()
    before = tiny.tensors(base)
    model = base
    torch.manual_seed(0)
    assert model.add_adapter(lora()) is None
    assert (
        model._hf_peft_config_loaded
        and list(model.peft_config) == ["default"]
        and model.active_adapters() == ["default"]
    )
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 8 and all(".default.weight" in n for n in trained)
    assert torch.equal(tiny.logits(model), tiny.logits(tiny.llama()))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    tokens = tiny.Texts().tokens
    history = []
    for _ in range(30):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(float(loss.detach()))
    assert tiny.falls(history, 0.8)
    after = {k.replace(".base_layer", ""): v for k, v in tiny.tensors(model).items() if "lora_" not in k}
    assert tiny.same(before, after)


def test_refusals() -> None:
    model = tiny.llama()
    for call in (lambda: model.set_adapter("a"), model.disable_adapters, model.enable_adapters, model.active_adapters):
        with pytest.raises(ValueError, match="No adapter loaded"):
            call()
    with pytest.raises(TypeError, match="PeftConfig"):
        tiny.llama().add_adapter({"r": 4})
    model = native()
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter(lora())
    with pytest.raises(ValueError, match="not found"):
        model.set_adapter("other")
    with pytest.raises(ValueError, match="not present"):
        model.delete_adapter("other")
    with pytest.raises(ValueError, match="prompt learning"):
        tiny.llama().add_adapter(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="shared"):
        tiny.llama().add_adapter(peft.VeraConfig(target_modules=["q_proj"]))


def test_failed_add_leaves_nothing() -> None:
    model = native()
    before, names = tiny.logits(model), {n for n, _ in model.named_modules()}
    with pytest.raises(ValueError):
        model.add_adapter(lora(target_modules=["nothing_like_it"]), "bad")
    assert torch.equal(tiny.logits(model), before) and {n for n, _ in model.named_modules()} == names
    assert list(model.peft_config) == ["default"] and model.active_adapters() == ["default"]


def test_switching(two: Any) -> None:
    alone = {name: tiny.logits(_only(name)) for name in ("one", "two")}
    base = tiny.logits(tiny.llama())
    assert two.active_adapters() == ["two"]
    assert torch.equal(tiny.logits(two), alone["two"])
    two.set_adapter("one")
    assert two.active_adapters() == ["one"] and torch.equal(tiny.logits(two), alone["one"])
    assert {n.split(".")[-2] for n, p in two.named_parameters() if p.requires_grad} == {"one"}
    two.disable_adapters()
    assert torch.equal(tiny.logits(two), base)
    assert not any(p.requires_grad for p in two.parameters())
    two.enable_adapters()
    assert torch.equal(tiny.logits(two), alone["one"])
    assert {n.split(".")[-2] for n, p in two.named_parameters() if p.requires_grad} == {"one"}


def _only(name: str) -> Any:
    model = native(name="one")
    if name == "one":
        return model
    add(model, lora(r=2, target_modules=["v_proj", "down_proj"]), "two", 6)
    model.delete_adapter("one")
    return model


def test_list_of_adapters(two: Any) -> None:
    two.set_adapter(["one", "two"])
    assert two.active_adapters() == ["one", "two"]
    both = tiny.logits(two)
    with torch.no_grad():
        merged = tiny.llama()
        layers = {n: m for n, m in two.named_modules() if isinstance(m, BaseTunerLayer)}
        for name, layer in layers.items():
            for adapter in layer.lora_A:
                merged.get_submodule(name).weight += layer.get_delta_weight(adapter)
    assert tiny.close(both, tiny.logits(merged))
    two.set_adapter("two")
    assert tiny.apart(tiny.logits(two), both)


def test_delete(two: Any) -> None:
    two.delete_adapter("two")
    assert list(two.peft_config) == ["one"] and two.active_adapters() == ["one"]
    assert not any(".two." in n for n, _ in two.named_parameters())
    assert torch.equal(tiny.logits(two), tiny.logits(_only("one")))
    two.delete_adapter(["one"])
    assert not two._hf_peft_config_loaded and not hasattr(two, "peft_config")
    assert torch.equal(tiny.logits(two), tiny.logits(tiny.llama()))
    two.add_adapter(lora(r=3), "third")
    assert two.active_adapters() == ["third"]


def test_state_dict_of_one(two: Any) -> None:
    state = two.get_adapter_state_dict("one")
    assert len(state) == 8 and all(k.startswith("model.layers.") and "one" not in k for k in state)
    assert tiny.same(two.get_adapter_state_dict(), two.get_adapter_state_dict("two"))
    whole = two.state_dict()
    doubled = {k: v * 2 for k, v in whole.items()}
    given = two.get_adapter_state_dict("one", state_dict=doubled)
    assert tiny.same({k: v * 2 for k, v in state.items()}, given)


def test_modules_to_save_and_tokens() -> None:
    model = native(lora(modules_to_save=["lm_head"], trainable_token_indices={"embed_tokens": [4, 5, 6]}), "one")
    one = tiny.logits(model)
    assert tiny.apart(one, tiny.logits(tiny.llama()))
    add(model, lora(modules_to_save=["lm_head"]), "two", 8)
    two = tiny.logits(model)
    model.set_adapter("one")
    assert torch.equal(tiny.logits(model), one)
    model.set_adapter("two")
    assert torch.equal(tiny.logits(model), two)
    model.disable_adapters()
    model.set_adapter("two")
    state = model.get_adapter_state_dict("one")
    assert {"lm_head.weight", "model.embed_tokens.token_adapter.trainable_tokens_delta"} <= set(state)
    model.delete_adapter("one")
    assert set(model.lm_head.modules_to_save) == {"two"}


# ---- folders

METHODS = {
    "lora": lora,
    "dora": lambda: lora(use_dora=True),
    "lora all-linear": lambda: lora(target_modules="all-linear"),
    "lora embedding": lambda: lora(target_modules=["embed_tokens", "q_proj"]),
    "head and tokens": lambda: lora(modules_to_save=["lm_head"], trainable_token_indices={"embed_tokens": [4, 5, 6]}),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=["q_proj"]),
    "lokr": lambda: peft.LoKrConfig(r=2, target_modules=["q_proj"], decompose_factor=4),
    "adalora": lambda: peft.AdaLoraConfig(init_r=3, target_r=2, total_step=10, target_modules=["q_proj"]),
    "oft": lambda: peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8),
    "boft": lambda: peft.BOFTConfig(target_modules=["q_proj"], boft_block_size=4),
    "hra": lambda: peft.HRAConfig(target_modules=["q_proj"], r=4),
    "fourierft": lambda: peft.FourierFTConfig(target_modules=["q_proj"], n_frequency=20),
    "ln": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "miss": lambda: peft.MissConfig(target_modules=["q_proj"], r=4),
    "randomized road": lambda: peft.RoadConfig(target_modules=["q_proj"], group_size=4),
    "c3a": lambda: peft.C3AConfig(target_modules=["q_proj"], block_size=8),
    "shira": lambda: peft.ShiraConfig(target_modules=["q_proj"], r=2),
    "gralora": lambda: peft.GraloraConfig(target_modules=["q_proj"], r=4, gralora_k=2),
    "delora": lambda: peft.DeloraConfig(target_modules=["q_proj"], r=4),
    "tokens": lambda: peft.TrainableTokensConfig(token_indices=[3, 4, 5], target_modules=["embed_tokens"]),
}


HEADS = since("transformers", "5.18", "trained heads of native adapters")


@pytest.mark.parametrize("method", [pytest.param(m, marks=HEADS) if m == "head and tokens" else m for m in METHODS])
def test_folder_of_each_method(tmp_path: Path, method: str) -> None:
    """Written by the native path, read by the native path and by PeftModel; written by PeftModel, read natively."""
    model = native(METHODS[method](), base=_named(tmp_path / "base"))
    expected = tiny.logits(model)
    assert tiny.apart(expected, tiny.logits(tiny.llama()))
    model.save_pretrained(tmp_path / "native")
    assert {"adapter_model.safetensors", "adapter_config.json"} <= tiny.files(tmp_path / "native")
    assert not {"model.safetensors", "config.json"} & tiny.files(tmp_path / "native")

    wrapped = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "native")
    assert torch.equal(tiny.logits(wrapped), expected)
    wrapped.save_pretrained(tmp_path / "wrapped")

    for folder in ("native", "wrapped"):
        again = tiny.llama()
        info = again.load_adapter(str(tmp_path / folder), adapter_name="other")
        missing = {k for k in info.missing_keys if ".ranknum." not in k}  # AdaLoRA keeps it in the model only
        assert not missing and not info.unexpected_keys and not info.mismatched_keys, info
        assert torch.equal(tiny.logits(again), expected)
        auto = tf.AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert auto._hf_peft_config_loaded and torch.equal(tiny.logits(auto.eval()), expected)


def _named(folder: Path) -> Any:
    model = tiny.llama()
    tiny.saved(model, folder)
    return model


def test_saved_folder(tmp_path: Path) -> None:
    model = native(lora(task_type="CAUSAL_LM"), base=_named(tmp_path / "base"))
    model.save_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base") and config["peft_type"] == "LORA"
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert tiny.same(
        {k.removeprefix("base_model.model."): v for k, v in stored.items()}, model.get_adapter_state_dict()
    )
    assert all(k.startswith("base_model.model.model.layers.") for k in stored)
    add(model, lora(r=2), "second", 3)
    model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="active"):
        model.save_pretrained(tmp_path / "more")


def test_load_adapter_flags(tmp_path: Path) -> None:
    native().save_pretrained(tmp_path)
    frozen, trainable = tiny.llama(), tiny.llama()
    frozen.load_adapter(str(tmp_path))
    trainable.load_adapter(str(tmp_path), is_trainable=True)
    assert not any(p.requires_grad for p in frozen.parameters() if p.ndim == 2 and "lora" in str(p))
    assert {n.split(".")[-3] for n, p in trainable.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert frozen.peft_config["default"].inference_mode and not trainable.peft_config["default"].inference_mode
    assert {n for n, p in frozen.named_parameters() if p.requires_grad and "lora_" in n} == set()
    with pytest.raises(ValueError, match="already exists"):
        frozen.load_adapter(str(tmp_path))
    with pytest.raises((ValueError, OSError)):
        tiny.llama().load_adapter(str(tmp_path / "nothing"))


def test_load_from_memory() -> None:
    model = native()
    again = tiny.llama()
    state = {f"base_model.model.{k}": v for k, v in model.get_adapter_state_dict().items()}
    info = again.load_adapter(peft_config=lora(), adapter_state_dict=state, adapter_name="memory")
    assert not info.missing_keys and torch.equal(tiny.logits(again), tiny.logits(model))


def test_missing_and_unexpected_keys() -> None:
    state = {f"base_model.model.{k}": v for k, v in native().get_adapter_state_dict().items()}
    lost = sorted(state)[0]
    del state[lost]
    info = tiny.llama().load_adapter(peft_config=lora(), adapter_state_dict=state, adapter_name="short")
    name = lost.removeprefix("base_model.model.").replace(".weight", ".short.weight")
    assert info.missing_keys == {name} and not info.unexpected_keys
    state["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, tiny.WIDTH)
    info = tiny.llama().load_adapter(peft_config=lora(), adapter_state_dict=state, adapter_name="more")
    assert len(info.unexpected_keys) == 1


def test_half_precision_base(tmp_path: Path) -> None:
    native().save_pretrained(tmp_path)
    base = tiny.llama().to(torch.bfloat16)
    base.load_adapter(str(tmp_path))
    assert {p.dtype for n, p in base.named_parameters() if "lora_" in n} <= {torch.bfloat16, torch.float32}
    wrapped = peft.PeftModel.from_pretrained(tiny.llama().to(torch.bfloat16), tmp_path)
    assert tiny.close(tiny.logits(base).float(), tiny.logits(wrapped).float(), 0.05)


def test_folder_with_base_and_adapter(tmp_path: Path) -> None:
    """A complete model with an adapter beside it loads its own weights, not those that the configuration names."""
    model = native(base=_named(tmp_path / "elsewhere"))
    expected = tiny.logits(model)
    model.save_pretrained(tmp_path / "both")
    tiny.llama().save_pretrained(tmp_path / "both")
    (tmp_path / "elsewhere" / "model.safetensors").unlink()
    auto = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "both")
    assert torch.equal(tiny.logits(auto.eval()), expected)


# ---- hot swapping


def test_hotswap(tmp_path: Path) -> None:
    first, second = native(), tiny.spread(native(), seed=9)
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    model = tiny.llama()
    model.load_adapter(str(tmp_path / "first"), adapter_name="live")
    assert torch.equal(tiny.logits(model), tiny.logits(first))
    model.load_adapter(str(tmp_path / "second"), adapter_name="live", hotswap=True)
    assert torch.equal(tiny.logits(model), tiny.logits(second))
    with pytest.raises(RuntimeError, match="mismatch"):
        tiny.spread(native(lora(r=2)), seed=9).save_pretrained(tmp_path / "smaller")
        model.load_adapter(str(tmp_path / "smaller"), adapter_name="live", hotswap=True)
    with pytest.raises(ValueError, match="existing adapter"):
        model.load_adapter(str(tmp_path / "second"), adapter_name="unknown", hotswap=True)
    other = native(METHODS["ia3"]())
    with pytest.raises(ValueError, match="LoRA"):
        other.load_adapter(str(tmp_path / "second"), adapter_name="default", hotswap=True)


def test_enable_hotswap(tmp_path: Path) -> None:
    native().save_pretrained(tmp_path / "first")
    second = tiny.spread(native(), seed=9)
    second.save_pretrained(tmp_path / "second")
    model = tiny.llama()
    model.enable_peft_hotswap(target_rank=8)
    model.load_adapter(str(tmp_path / "first"), adapter_name="live")
    model.load_adapter(str(tmp_path / "second"), adapter_name="live")  # "auto"
    assert torch.equal(tiny.logits(model), tiny.logits(second))


# ---- Trainer and generation on a natively adapted model


def test_trainer(tmp_path: Path) -> None:
    def arguments(**options: Any) -> tf.TrainingArguments:
        return tf.TrainingArguments(
            output_dir=str(tmp_path), max_steps=24, save_steps=12, per_device_train_batch_size=4, learning_rate=2e-2, logging_steps=1,
            report_to="none", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, **options,
        )  # fmt: skip

    model = tiny.llama()
    torch.manual_seed(0)
    model.add_adapter(lora())
    trainer = tf.Trainer(model=model, args=arguments(), train_dataset=tiny.Texts())
    trainer.train()
    assert tiny.falls(tiny.losses(trainer))
    found = tiny.files(tmp_path / "checkpoint-12")
    assert "adapter_model.safetensors" in found and "model.safetensors" not in found
    again = tf.AutoModelForCausalLM.from_pretrained(_named(tmp_path / "base").name_or_path)
    again.load_adapter(str(tmp_path / "checkpoint-24"))
    assert torch.equal(tiny.logits(again), tiny.logits(model.eval()))


def test_gradient_checkpointing() -> None:
    tokens = tiny.ids()
    gradients = []
    for mode in (None, True, False):
        model = native()
        if mode is not None:
            # the name that transformers 5.23 prefers
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": mode})
            model.enable_input_require_grads()
        model.train()
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert len(gradients[0]) == 8
    assert tiny.same(gradients[0], gradients[1]) and tiny.same(gradients[0], gradients[2])


def test_generation(two: Any) -> None:
    two.set_adapter("one")
    prompt = tiny.ids(2, 5)
    found = two.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
    merged = _merged(two, "one").generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False
    )
    assert torch.equal(found, merged)


def _merged(model: Any, name: str) -> Any:
    plain = tiny.llama()
    with torch.no_grad():
        for key, layer in model.named_modules():
            if isinstance(layer, BaseTunerLayer) and name in layer:
                plain.get_submodule(key).weight += layer.get_delta_weight(name)
    return plain


def test_deepcopy_and_full_state_dict(two: Any) -> None:
    copied = tiny.clone(two)
    assert torch.equal(tiny.logits(copied), tiny.logits(two))
    copied.set_adapter("one")
    assert two.active_adapters() == ["two"]
    fresh = native(name="one")
    add(fresh, lora(r=2, target_modules=["v_proj", "down_proj"]), "two", 99)
    result = fresh.load_state_dict(two.state_dict())
    assert not result.missing_keys and torch.equal(tiny.logits(fresh), tiny.logits(two))
