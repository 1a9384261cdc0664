# SPDX-License-Identifier: Apache-2.0
"""Adapters for experts that were modules once: configurations and weights for stacked parameters."""

import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.io.convert import (
    build_peft_weight_mapping,
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)
from peft.io.experts import fold_a, fold_b
from peft.io.load import load_adapter_state

transformers = pytest.importorskip("transformers", minversion="5.0")
from peft.io.conversion_ops import PeftConcatenate, PermuteDims  # noqa: E402

E, H, F = 3, 16, 8
COMMON = {
    "hidden_size": H,
    "intermediate_size": F,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 16,
}


def mixtral():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**COMMON, num_hidden_layers=2, num_local_experts=E)
    return transformers.MixtralForCausalLM(config).eval()


def qwen3_moe():
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        **COMMON,
        num_hidden_layers=2,
        moe_intermediate_size=F,
        num_experts=E,
        num_experts_per_tok=2,
        mlp_only_layers=[0],
    )
    return transformers.Qwen3MoeForCausalLM(config).eval()


def lora(targets, **options):
    return LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": targets, **options})


# ---- configurations
FUSED = {".*\\.gate_up_proj": 4}


@pytest.mark.parametrize(
    ("targets", "modules", "parameters", "ranks"),
    [
        (["w1", "w2", "w3", "gate", "q_proj"], {"q_proj"}, {"down_proj", "gate_up_proj", "gate.weight"}, FUSED),
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj"}, {"down_proj", "gate_up_proj", "gate.weight"}, FUSED),
        (r".*\.(w1|w3|q_proj)", {"q_proj"}, {"gate_up_proj"}, FUSED),
        (["w1", "w3"], set(), {"gate_up_proj"}, FUSED),
        (["experts.0.w1", "w3"], set(), {"gate_up_proj"}, FUSED),
        (["w2"], set(), {"down_proj"}, {}),
        (["q_proj"], {"q_proj"}, None, {}),
        (r".*q_proj", r".*q_proj", None, {}),
        (r".*block_sparse_moe\.experts\..*w2", set(), {"down_proj"}, {}),
        (r"model\.layers\.1\..*\.w2", set(), {"model.layers.1.mlp.experts.down_proj"}, {}),
        (
            r"model\.layers\.1\..*(q_proj|w2)",
            {"model.layers.1.self_attn.q_proj"},
            {"model.layers.1.mlp.experts.down_proj"},
            {},
        ),
    ],
)
def test_config(targets, modules, parameters, ranks):
    config = lora(targets)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # no spurious warnings about patterns
        warnings.simplefilter("error", UserWarning)
        get_peft_model(mixtral(), config)
    assert config.target_modules == modules
    assert config.target_parameters == parameters
    assert config.rank_pattern == ranks
    assert config.alpha_pattern == dict.fromkeys(ranks, 6)


def test_config_survives_saving(tmp_path):
    model = get_peft_model(mixtral(), lora(["w1", "w2", "w3", "q_proj"]))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(mixtral(), tmp_path)
    old, new = model.peft_config["default"], again.peft_config["default"]
    for field in ("rank_pattern", "alpha_pattern"):
        assert getattr(old, field) == getattr(new, field)
    assert set(new.target_parameters) == {"gate_up_proj", "down_proj"}
    assert get_peft_model_state_dict(again).keys() == get_peft_model_state_dict(model).keys()


def test_half_of_a_fused_pair():
    with pytest.raises(
        ValueError, match=r"target\(s\) w1 without also targeting w3 because they are fused into gate_up_proj"
    ):
        get_peft_model(mixtral(), lora(["w1"]))


def test_default_targets():
    model = get_peft_model(mixtral(), LoraConfig(r=2))
    assert model.peft_config["default"].target_modules == {"q_proj", "v_proj"}


def test_dense_layers_keep_their_adapters():
    """`gate_proj` names projections of experts and of the dense first layer: both are adapted."""
    model = get_peft_model(qwen3_moe(), lora(["gate_proj", "up_proj", "down_proj"]))
    names = {k.removeprefix("base_model.model.model.layers.") for k in get_peft_model_state_dict(model)}
    owners = {n.partition(".lora_")[0] for n in names}
    assert owners == {
        "0.mlp.gate_proj",
        "0.mlp.up_proj",
        "0.mlp.down_proj",
        "1.mlp.experts",
        "1.mlp.experts.base_layer",
    }


def test_other_methods_and_models_are_left_alone():
    config = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    convert_peft_config_for_transformers(config, mixtral(), ["something"])
    assert config.target_modules == {"q_proj"}
    config = lora(["w1"])
    convert_peft_config_for_transformers(config, mixtral(), None)
    convert_peft_config_for_transformers(config, torch.nn.Linear(2, 2), ["something"])
    assert config.target_modules == {"w1"}


def test_patterns_of_the_old_names():
    config = lora(["w1", "w3"], rank_pattern={"w1": 5, "w3": 5}, alpha_pattern={"w1": 1, "w3": 1})
    get_peft_model(mixtral(), config)
    assert config.rank_pattern == {".*\\.gate_up_proj": 10}
    assert config.alpha_pattern == {".*\\.gate_up_proj": 2}


# ---- weights
def test_folding_keeps_the_deltas():
    A = [torch.randn(E, 2, H), torch.randn(E, 2, H)]
    B = [torch.randn(E, F, 2), torch.randn(E, F, 2)]
    a, b = fold_a(A), fold_b(B)
    assert a.shape == (E * 4, H)
    assert b.shape == (2 * F, 4 * E)
    for e in range(E):
        delta = b[:, e::E] @ a[e * 4 : (e + 1) * 4]
        assert torch.allclose(delta, torch.cat([B[0][e] @ A[0][e], B[1][e] @ A[1][e]]))


def old_file(names: dict[str, tuple[int, int]], layers, block: str, prefix: str = "base_model.model."):
    """A file from the time when each expert was a module; names -> (in, out)."""
    torch.manual_seed(1)
    state = {}
    for layer in layers:
        for e in range(E):
            for name, (n_in, n_out) in names.items():
                stem = f"{prefix}model.layers.{layer}.{block}.experts.{e}.{name}"
                state[f"{stem}.lora_A.weight"] = torch.randn(2, n_in)
                state[f"{stem}.lora_B.weight"] = torch.randn(n_out, 2)
    return state


def merged_by_hand(base, state, scale, layers, block, halves, down):
    """The oracle: the old deltas added to slices of a plain model."""
    with torch.no_grad():
        for layer in layers:
            experts = base.model.layers[layer].mlp.experts
            for e in range(E):
                stem = f"base_model.model.model.layers.{layer}.{block}.experts.{e}."
                for i, name in enumerate(halves):
                    if stem + name + ".lora_A.weight" in state:
                        delta = state[stem + name + ".lora_B.weight"] @ state[stem + name + ".lora_A.weight"]
                        experts.gate_up_proj[e, i * F : (i + 1) * F] += scale * delta
                if stem + down + ".lora_A.weight" in state:
                    delta = state[stem + down + ".lora_B.weight"] @ state[stem + down + ".lora_A.weight"]
                    experts.down_proj[e] += scale * delta
    return base


@pytest.mark.parametrize("targets", [["w1", "w2", "w3"], ["w1", "w3"], ["w2"]])
def test_old_mixtral_file(targets, tmp_path):
    shapes = {"w1": (H, F), "w3": (H, F), "w2": (F, H)}
    state = old_file({t: shapes[t] for t in targets}, (0, 1), "block_sparse_moe")
    model = get_peft_model(mixtral(), lora(targets)).eval()
    before = dict(state)
    report = load_adapter_state(model, state)
    assert report.unexpected == []
    assert report.missing == []
    assert state.keys() == before.keys()
    ids = torch.arange(8)[None]
    expected = merged_by_hand(mixtral(), state, 1.5, (0, 1), "block_sparse_moe", ("w1", "w3"), "w2")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, atol=1e-5, rtol=1e-4)
    new = get_peft_model_state_dict(model)
    assert set_peft_model_state_dict(model, new).unexpected_keys == []  # the new layout passes unchanged
    assert all(torch.equal(v, new[k]) for k, v in get_peft_model_state_dict(model).items())


def test_old_qwen3_moe_file():
    names = {"gate_proj": (H, F), "up_proj": (H, F), "down_proj": (F, H)}
    state = old_file(names, (1,), "mlp")
    for name, (n_in, n_out) in names.items():
        state[f"base_model.model.model.layers.0.mlp.{name}.lora_A.weight"] = torch.randn(2, n_in)
        state[f"base_model.model.model.layers.0.mlp.{name}.lora_B.weight"] = torch.zeros(n_out, 2)
    model = get_peft_model(qwen3_moe(), lora(list(names))).eval()
    report = load_adapter_state(model, state)
    assert (report.unexpected, report.missing) == ([], [])
    ids = torch.arange(8)[None]
    expected = merged_by_hand(qwen3_moe(), state, 1.5, (1,), "mlp", ("gate_proj", "up_proj"), "down_proj")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, atol=1e-5, rtol=1e-4)


def test_incomplete_experts_are_reported():
    state = old_file({"w2": (F, H)}, (0, 1), "block_sparse_moe")
    lost = "base_model.model.model.layers.1.block_sparse_moe.experts.1.w2.lora_A.weight"
    del state[lost]
    model = get_peft_model(mixtral(), lora(["w2"]))
    report = load_adapter_state(model, state)
    assert len(report.unexpected) == E - 1
    assert report.missing == ["base_model.model.model.layers.1.mlp.experts.lora_A.default.weight"]


def test_old_file_on_a_plain_model():
    state = old_file({"w2": (F, H)}, (0, 1), "block_sparse_moe", prefix="")
    model = inject_adapter_in_model(lora(["w2"]), mixtral())
    assert load_adapter_state(model, state).unexpected == []


# ---- transformers' own loader
def test_weight_mapping():
    from transformers.conversion_mapping import get_model_conversion_mapping

    conversions = get_model_conversion_mapping(mixtral())
    assert build_peft_weight_mapping([], "x") == build_peft_weight_mapping(None, "x") == []
    mapping = build_peft_weight_mapping(conversions, "x", LoraConfig())
    found = [(m._original_source_patterns, m._original_target_patterns[0]) for m in mapping]
    assert found[:4] == [
        (["base_model.model.model."], "model."),
        (["base_model.model."], ""),
        ([r"(lora_[^\.]*)"], r"\1.x"),
        ([".block_sparse_moe."], ".mlp."),
    ]
    assert found[4:8] == [
        ([".experts.*.w1.lora_A.*", ".experts.*.w3.lora_A.*"], ".experts.base_layer.lora_A.x.weight"),
        ([".experts.*.w1.lora_B.*", ".experts.*.w3.lora_B.*"], ".experts.base_layer.lora_B.x.weight"),
        ([".experts.*.w2.lora_A.*"], ".experts.lora_A.x.weight"),
        ([".experts.*.w2.lora_B.*"], ".experts.lora_B.x.weight"),
    ]
    alone = build_peft_weight_mapping(conversions, "x", lora(["w1", "w3"]))
    assert alone[4]._original_target_patterns == [".experts.lora_A.x.weight"]
    prefixes = [m for m in build_peft_weight_mapping(conversions, "x") if r"\1.x" in m._original_target_patterns]
    assert len(prefixes) > 3


@pytest.mark.parametrize("targets", [["w1", "w2", "w3"], ["w1", "w3"], ["w2", "q_proj"]])
def test_transformers_loads_an_old_adapter(targets, tmp_path):
    """`model.load_adapter` of transformers goes through the mapping."""
    from safetensors.torch import save_file

    shapes = {"w1": (H, F), "w3": (H, F), "w2": (F, H)}
    state = old_file({t: shapes[t] for t in targets if t in shapes}, (0, 1), "block_sparse_moe")
    if "q_proj" in targets:
        for layer in (0, 1):
            stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_"
            state |= {stem + "A.weight": torch.randn(2, H), stem + "B.weight": torch.zeros(H, 2)}
    config = lora(targets, task_type="CAUSAL_LM")
    config.save_pretrained(tmp_path)
    save_file(state, tmp_path / "adapter_model.safetensors")
    model = mixtral()
    model.load_adapter(str(tmp_path), adapter_name="old")
    ids = torch.arange(8)[None]
    expected = merged_by_hand(mixtral(), state, 1.5, (0, 1), "block_sparse_moe", ("w1", "w3"), "w2")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, atol=1e-5, rtol=1e-4)


def test_models_without_stacked_experts_are_left_alone():
    config = transformers.Qwen3MoeConfig(
        **COMMON, num_hidden_layers=1, moe_intermediate_size=F, num_experts=E, mlp_only_layers=[0]
    )
    targets = lora(["gate_proj"])
    get_peft_model(transformers.Qwen3MoeForCausalLM(config), targets)
    assert targets.target_modules == {"gate_proj"} and not targets.target_parameters


def test_a_prefixed_old_file_on_a_plain_model():
    """And the function that transformers calls."""
    model = inject_adapter_in_model(lora(["w2"]), mixtral())
    state = old_file({"w2": (F, H)}, (0, 1), "block_sparse_moe")
    assert load_adapter_state(model, state).unexpected == []
    config = model.peft_config["default"]
    plain = {k.removeprefix("base_model.model."): v for k, v in state.items()}
    new = convert_peft_adapter_state_dict_for_transformers(model, config, plain)
    held = get_peft_model_state_dict(model)
    assert new.keys() == held.keys() and all(torch.equal(new[k], v) for k, v in held.items())
    assert convert_peft_adapter_state_dict_for_transformers(model, IA3Config(), plain) is plain


def test_experts_of_several_ranks_are_reported():
    state = old_file({"w2": (F, H)}, (0, 1), "block_sparse_moe")
    stem = "base_model.model.model.layers.0.block_sparse_moe.experts.1.w2.lora_{}.weight"
    state[stem.format("A")], state[stem.format("B")] = torch.zeros(3, F), torch.zeros(H, 3)
    report = load_adapter_state(get_peft_model(mixtral(), lora(["w2"])), state)
    assert sorted(report.unexpected) == sorted(k for k in state if ".layers.0." in k)


def test_permuting_is_undone():
    operation, x = PermuteDims((2, 0, 1)), torch.randn(2, 3, 4)
    for op in (operation, operation.reverse_op):
        x, before = op.convert({"a": [x]}, ["a"], ["b"])["b"], x
    assert before.shape == (4, 2, 3) and x.shape == (2, 3, 4)
    with pytest.raises(NotImplementedError, match="not taken apart"):
        _ = PeftConcatenate(dim=1).reverse_op


def test_a_model_type_counts_once_transformers_is_there(monkeypatch):
    """Whoever asked before it was imported."""
    modules = {k: v for k, v in sys.modules.items() if k != "transformers"}
    with monkeypatch.context() as patched:
        patched.setattr("peft.io.convert.sys", SimpleNamespace(modules=modules))
        first = lora(["w1"])
        convert_peft_config_for_transformers(first, mixtral(), ["something"])
        assert first.target_modules == {"w1"}
    second = lora(["w2"])
    convert_peft_config_for_transformers(second, mixtral(), ["something"])
    assert second.target_parameters == {"down_proj"}
