# SPDX-License-Identifier: Apache-2.0
"""Adapters of other methods as a LoRA."""

import pytest
import torch

from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    MissConfig,
    PeftModel,
    VeraConfig,
    convert_to_lora,
    get_peft_model,
    inject_adapter_in_model,
    save_as_lora,
    set_peft_model_state_dict,
)
from peft.io.to_lora import decompose, decompose_product

from .models import fill, ids, net


def loha(**options) -> LoHaConfig:
    return LoHaConfig(**{"r": 2, "target_modules": ["lin0", "a", "head.2"], "init_weights": False, **options})


def converted(model, rank, base=None):
    config, state = convert_to_lora(model, rank)
    lora = get_peft_model(base or net(), config)
    result = set_peft_model_state_dict(lora, state)
    assert result.unexpected_keys == []
    return lora.eval(), config, state


def delta(model, name: str) -> torch.Tensor:
    return model.get_base_model().get_submodule(name).get_delta_weight("default")


def test_full_rank_is_exact():
    model = get_peft_model(net(), loha()).eval()
    lora, config, state = converted(model, 4)
    assert (config.r, config.lora_alpha, config.rank_pattern) == (4, 4, {})
    assert config.target_modules == {"lin0", "a", "head.2", "block.a"}
    assert {k.removeprefix("base_model.model.") for k in state} == {
        f"{m}.lora_{f}.weight" for m in ("lin0", "block.a", "head.2") for f in "AB"
    }
    torch.testing.assert_close(delta(lora, "head.2"), delta(model, "head.2"), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_best_approximation(rank):
    model = get_peft_model(net(), loha()).eval()
    lora, _, _ = converted(model, rank)
    for name in ("lin0", "block.a"):
        U, S, Vh = torch.linalg.svd(delta(model, name))
        torch.testing.assert_close(delta(lora, name), (U[:, :rank] * S[:rank]) @ Vh[:rank], atol=1e-5, rtol=1e-4)


def test_share_of_the_energy():
    model = get_peft_model(net(), loha()).eval()
    lora, config, _ = converted(model, 0.9)
    assert (config.r, config.lora_alpha) == (1, 1)
    assert config.rank_pattern.keys() == {"lin0", "block.a", "head.2"}
    assert config.alpha_pattern == config.rank_pattern
    for name, rank in config.rank_pattern.items():
        S = torch.linalg.svdvals(delta(model, name)).square()
        share = S.cumsum(0) / S.sum()
        assert share[rank - 1] >= 0.9
        assert rank == 1 or share[rank - 2] < 0.9
    everything, _, _ = converted(model, 1.0)
    torch.testing.assert_close(delta(everything, "lin0"), delta(model, "lin0"), atol=1e-5, rtol=1e-4)


def test_low_rank_factors_give_the_same_without_the_full_matrix():
    torch.manual_seed(0)
    B, A = torch.randn(60, 4), torch.randn(4, 50)
    U, S, Vh = decompose(B @ A)
    u, s, vh = decompose_product(B, A)
    torch.testing.assert_close(s, S[:4], rtol=1e-5, atol=1e-5)
    for k in (1, 3, 4):
        torch.testing.assert_close((u[:, :k] * s[:k]) @ vh[:k], (U[:, :k] * S[:k]) @ Vh[:k], atol=1e-4, rtol=1e-4)


def test_vera_uses_its_factors(monkeypatch):
    model = get_peft_model(net(), VeraConfig(r=3, target_modules=["lin0", "a"])).eval()
    fill(model, "default")
    full, _, _ = converted(model, 6)  # more than VeRA has: the rest is zero
    torch.testing.assert_close(delta(full, "lin0"), delta(model, "lin0"), atol=1e-6, rtol=1e-5)
    monkeypatch.setattr("peft.io.to_lora.decompose", lambda delta: pytest.fail("formed the full matrix"))
    with torch.no_grad():
        torch.testing.assert_close(converted(model, 3)[0](ids()), model(ids()), atol=1e-5, rtol=1e-4)


def test_miss_is_exact_at_its_own_rank():
    model = get_peft_model(net(), MissConfig(r=3, target_modules=["lin0"], init_weights=False)).eval()
    lora, config, state = converted(model, 2)
    assert (config.r, config.rank_pattern) == (2, {"lin0": 3})
    torch.testing.assert_close(delta(lora, "lin0"), delta(model, "lin0"))


def test_lora_to_a_smaller_lora():
    model = get_peft_model(net(), LoraConfig(r=6, target_modules=["lin0"], init_lora_weights=False)).eval()
    with pytest.warns(UserWarning, match="LoRA adapter to a LoRA adapter"):
        config, state = convert_to_lora(model, 6)
    lora = get_peft_model(net(), config)
    set_peft_model_state_dict(lora, state)
    torch.testing.assert_close(delta(lora, "lin0"), delta(model, "lin0"), atol=1e-6, rtol=1e-5)


def test_the_magnitude_of_dora_is_part_of_the_delta():
    model = get_peft_model(
        net(), LoraConfig(r=2, target_modules=["lin0"], use_dora=True, init_lora_weights=False)
    ).eval()
    fill(model, "default")
    with pytest.warns(UserWarning):
        config, state = convert_to_lora(model, 8)
    lora = get_peft_model(net(), config).eval()
    set_peft_model_state_dict(lora, state)
    with torch.no_grad():
        torch.testing.assert_close(lora(ids()), model(ids()), atol=1e-5, rtol=1e-4)


def test_plain_model_scales_by_one():
    """Without a PeftModel the keys have no prefix, and alpha equals the rank."""
    model = inject_adapter_in_model(loha(), net())
    config, state = convert_to_lora(model, 3)
    assert (config.r, config.lora_alpha) == (3, 3)
    assert "block.a.lora_A.weight" in state
    del model.peft_config
    assert convert_to_lora(model, 3)[0].lora_alpha == 3


def test_nested_modules_to_save_keep_their_names():
    model = get_peft_model(net(), loha(target_modules=["lin0"], modules_to_save=["head"]))
    model.add_adapter("other", loha(target_modules=["lin0"], modules_to_save=["head"]))
    fill(model, "default", 3)
    lora, _, state = converted(model.eval(), 8)
    saved = {k.removeprefix("base_model.model."): v for k, v in state.items() if "lora" not in k}
    assert saved.keys() == {"head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"}
    with torch.no_grad():
        torch.testing.assert_close(lora(ids()), model(ids()), atol=1e-5, rtol=1e-4)


def test_regex_targets_go_to_the_patterns():
    model = get_peft_model(net(), loha(target_modules=r"lin0|block\.a"))
    config, _ = convert_to_lora(model, 3)
    assert config.target_modules == r"lin0|block\.a"
    assert config.rank_pattern == config.alpha_pattern == {"lin0": 3, "block.a": 3}


def test_conv1d_orientation():
    from transformers import GPT2Config, GPT2LMHeadModel

    def gpt2():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=16)).eval()

    model = get_peft_model(gpt2(), VeraConfig(r=3, target_modules=["c_attn"])).eval()
    fill(model, "default")
    lora, _, state = converted(model, 3, gpt2())
    assert [tuple(v.shape) for v in state.values()] == [(3, 16), (48, 3)]
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        torch.testing.assert_close(lora(tokens).logits, model(tokens).logits, atol=1e-4, rtol=1e-4)


def test_saved_folder_loads(tmp_path):
    model = get_peft_model(net(), loha()).eval()
    save_as_lora(tmp_path, model, 4)
    loaded = PeftModel.from_pretrained(net(), tmp_path)
    torch.testing.assert_close(delta(loaded, "head.2"), delta(model, "head.2"), atol=1e-6, rtol=1e-5)
    assert loaded.peft_config["default"].inference_mode


@pytest.mark.parametrize(
    ("rank", "error"),
    [
        (0, "rank of 0"),
        (-1, "must be positive"),
        (0.0, "between 0 and 1"),
        (1.5, "between 0 and 1"),
        (9, r"rank 9 is larger than the weight shape \(\d\) of '.*'"),
    ],
)
def test_wrong_ranks(rank, error):
    with pytest.raises(ValueError, match=error):
        convert_to_lora(get_peft_model(net(), loha()), rank)


def test_refusals():
    with pytest.raises(TypeError, match="Could not detect any layer"):
        convert_to_lora(net(), 2)
    with pytest.raises(TypeError, match=r"do not support LoRA conversion: .*lin0.*ia3"):
        convert_to_lora(get_peft_model(net(), IA3Config(target_modules=["lin0"], feedforward_modules=[])), 2)
    with pytest.raises(ValueError, match=r"no adapter 'defalt'.*'default'"):
        convert_to_lora(get_peft_model(net(), loha()), 2, adapter_name="defalt")
    with pytest.raises(ValueError, match="trains biases"):
        convert_to_lora(get_peft_model(net(), VeraConfig(r=2, target_modules=["lin0"], bias="vera_only")), 2)
    with pytest.raises(ValueError, match="trains biases \\(lora_bias=True"):
        convert_to_lora(get_peft_model(net(), LoraConfig(r=2, target_modules=["lin0"], lora_bias=True)), 2)


def test_trained_tokens_are_refused_and_progress_is_shown(capsys):
    tokens = get_peft_model(net(), LoraConfig(r=2, target_modules=["lin0"], trainable_token_indices={"emb": [1]}))
    with pytest.raises(TypeError, match="trained tokens of 'base_model.model.emb' cannot be converted"):
        convert_to_lora(tokens, 2)
    model = get_peft_model(net(), LoHaConfig(r=2, target_modules=["lin0"], init_weights=False))
    shown = []
    for progressbar in (False, True):
        convert_to_lora(model, 2, progressbar=progressbar)
        shown.append(capsys.readouterr().err)
    assert shown[0] == "" and "1/1" in shown[1]
