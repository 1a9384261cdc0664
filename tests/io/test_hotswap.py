# SPDX-License-Identifier: Apache-2.0
"""Swapping LoRA weights in place."""

import re
import weakref

import pytest
import torch
from torch import nn

from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.hotswap import (
    check_hotswap_configs_compatible,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)

from .models import fill, ids, net, snapshot, unchanged


def lora(**options) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["lin0", "a", "emb", "attn"], **options})


def saved(tmp_path, config: LoraConfig, seed: int = 5, make=net):
    model = get_peft_model(make(), config).eval()
    fill(model, "default", seed)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        return model(ids() if make is net else image())


@pytest.mark.parametrize(
    "new",
    [
        lora(),
        lora(r=2),
        lora(r=7, lora_alpha=1),
        lora(r=3, rank_pattern={"lin0": 5, "^block.a": 1}),
        lora(target_modules=["lin0"], lora_alpha=2),
        lora(r=2, modules_to_save=None, target_modules=["a", "emb"]),
    ],
)
def test_swap(tmp_path, new):
    """The output becomes that of the other adapter, whatever its ranks; parameters stay the same objects."""
    expected = saved(tmp_path, new)
    model = get_peft_model(net(), lora(), adapter_name="mine").eval()
    fill(model, "mine")
    objects = [id(p) for p in model.parameters()]
    with torch.no_grad():
        assert not torch.allclose(model(ids()), expected)
        hotswap_adapter(model, tmp_path, adapter_name="mine")
        torch.testing.assert_close(model(ids()), expected)
    assert [id(p) for p in model.parameters()] == objects
    config = model.peft_config["mine"]
    assert (config.r, config.lora_alpha, config.rank_pattern) == (new.r, new.lora_alpha, new.rank_pattern)


@pytest.mark.parametrize("new", [lora(r=2), lora(r=9), lora(r=3, rank_pattern={"lin0": 5})])
def test_saving_after_a_swap(tmp_path, new):
    """The file has the ranks of the configuration, not those of padded storage."""
    expected = saved(tmp_path / "new", new)
    model = get_peft_model(net(), lora()).eval()
    hotswap_adapter(model, tmp_path / "new", adapter_name="default")
    model.save_pretrained(tmp_path / "again")
    loaded = PeftModel.from_pretrained(net(), tmp_path / "again")
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids()), expected)
    assert loaded.base_model.model.lin0.r["default"] == new.rank_pattern.get("lin0", new.r)


def test_alpha_pattern_is_honoured(tmp_path):
    config = lora(alpha_pattern={"lin0": 20}, rank_pattern={"a": 8})
    expected = saved(tmp_path, config)
    model = get_peft_model(net(), lora(alpha_pattern={"lin0": 20})).eval()
    hotswap_adapter(model, tmp_path, adapter_name="default")
    base = model.base_model.model
    assert base.lin0.scaling["default"] == 5.0
    assert base.block["a"].scaling["default"] == 0.75
    assert (base.lin0.lora_alpha["default"], base.block["a"].r["default"]) == (20, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(ids()), expected)


def test_rslora(tmp_path):
    saved(tmp_path, lora(use_rslora=True, r=9))
    model = get_peft_model(net(), lora(use_rslora=True))
    hotswap_adapter(model, tmp_path, adapter_name="default")
    assert model.base_model.model.lin0.scaling["default"] == 2.0


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, groups=2)

    def forward(self, x):
        return self.conv(x)


def grouped() -> nn.Module:
    torch.manual_seed(0)
    return Grouped().eval()


def image() -> torch.Tensor:
    return torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("rank", [2, 4, 8])
def test_grouped_convolution(tmp_path, rank):
    expected = saved(tmp_path / "new", LoraConfig(r=rank, target_modules=["conv"]), make=grouped)
    model = get_peft_model(grouped(), LoraConfig(r=4, target_modules=["conv"])).eval()
    hotswap_adapter(model, tmp_path / "new", adapter_name="default")
    with torch.no_grad():
        torch.testing.assert_close(model(image()), expected)
    model.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        torch.testing.assert_close(PeftModel.from_pretrained(grouped(), tmp_path / "again")(image()), expected)


# ---- refusals change nothing
def test_more_modules_than_loaded(tmp_path):
    saved(tmp_path, lora(target_modules=["lin0", "lora_thing"]))
    model = get_peft_model(net(), lora())
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"unexpected keys found: .*lora_thing\.lora_A\.weight"):
        hotswap_adapter(model, tmp_path, adapter_name="default")
    assert unchanged(model, before)
    assert model.peft_config["default"].target_modules == lora().target_modules


@pytest.mark.parametrize(
    "option", [{"use_rslora": True}, {"lora_dropout": 0.1}, {"use_dora": True}, {"alpha_pattern": {"a": 1}}]
)
def test_incompatible_options(option):
    with pytest.raises(ValueError, match=f"for {next(iter(option))}, "):
        check_hotswap_configs_compatible(lora(), lora(**option))


def test_other_methods_and_names(tmp_path):
    other = IA3Config(target_modules=["lin0"], feedforward_modules=[])
    with pytest.raises(ValueError, match="Incompatible PEFT types found: LORA and IA3"):
        check_hotswap_configs_compatible(lora(), other)
    with pytest.raises(ValueError, match="only supports LORA but IA3"):
        check_hotswap_configs_compatible(other, other)
    saved(tmp_path, lora())
    model = get_peft_model(net(), lora())
    with pytest.raises(RuntimeError, match="did not succeed, there is no adapter 'defualt'.*Did you mean 'default'"):
        hotswap_adapter(model, tmp_path, adapter_name="defualt")


def test_merged_adapter(tmp_path):
    saved(tmp_path, lora(target_modules=["lin0"]))
    model = get_peft_model(net(), lora(target_modules=["lin0"]))
    model.merge_adapter()
    before = snapshot(model)
    with pytest.raises(ValueError, match="Cannot hot-swap adapter 'default' because it is currently merged"):
        hotswap_adapter(model, tmp_path, adapter_name="default")
    assert unchanged(model, before)


def test_shapes_that_cannot_be(tmp_path):
    model = get_peft_model(net(), lora(target_modules=["lin0"]))
    before = snapshot(model)
    state = {k.replace("weight", "default.weight"): v for k, v in get_peft_model_state_dict(model).items()}
    for shape in ((2, 5), (4, 9), (8, 9), (4, 8, 1)):  # a bigger one would not fit the inputs either
        state["base_model.model.lin0.lora_A.default.weight"] = torch.ones(shape)
        with pytest.raises(ValueError, match=rf"lin0\.lora_A.*\(4, 8\).*{re.escape(str(shape))}"):
            hotswap_adapter_from_state_dict(model, state, "default", lora())
        assert unchanged(model, before)


# ---- for compiled models
@pytest.mark.parametrize("rank", [2, 4, 16])
def test_prepared_model_keeps_shapes(tmp_path, rank):
    expected = saved(tmp_path / "new", lora(r=rank, target_modules=["lin0", "a"]))
    model = get_peft_model(net(), lora(target_modules=["lin0", "a"])).eval()
    fill(model, "default")
    with torch.no_grad():
        before = model(ids())
        prepare_model_for_compiled_hotswap(model, target_rank=16)
        prepare_model_for_compiled_hotswap(model, target_rank=16)  # twice is fine
        torch.testing.assert_close(model(ids()), before)
    layer = model.base_model.model.lin0
    assert layer.lora_A["default"].weight.shape == (16, 8)
    assert layer.lora_A["default"].out_features == layer.lora_B["default"].in_features == 16
    assert isinstance(layer.scaling["default"], torch.Tensor)
    assert layer.r["default"] == 4
    places = {n: p.data_ptr() for n, p in model.named_parameters()}
    scaling = layer.scaling["default"]
    hotswap_adapter(model, tmp_path / "new", adapter_name="default")
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == places
    assert layer.scaling["default"] is scaling
    assert float(scaling) == 6 / rank
    with torch.no_grad():
        torch.testing.assert_close(model(ids()), expected)
    model.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        torch.testing.assert_close(PeftModel.from_pretrained(net(), tmp_path / "again")(ids()), expected)


def test_prepare_options():
    model = get_peft_model(net(), lora())
    with pytest.raises(ValueError, match="to the target rank 2, but the original rank is larger \\(4"):
        prepare_model_for_compiled_hotswap(model, target_rank=2)
    config = lora(rank_pattern={"a": 1})
    prepare_model_for_compiled_hotswap(model, target_rank=8, config={"x": config})
    assert (config.r, config.rank_pattern) == (8, {"a": 8})
    with pytest.raises(ValueError, match="No adapter layers found on the model"):
        prepare_model_for_compiled_hotswap(net())
    compiled = torch.compile(model)
    with pytest.raises(ValueError, match=r"\*before\* compiling"):
        prepare_model_for_compiled_hotswap(compiled)
    with pytest.warns(UserWarning, match="was called with a model that is already compiled"):
        prepare_model_for_compiled_hotswap(compiled, check_compiled="warn")
    prepare_model_for_compiled_hotswap(compiled, check_compiled="ignore")
    with pytest.raises(ValueError, match="'error', 'warn', or 'ignore'"):
        prepare_model_for_compiled_hotswap(compiled, check_compiled="wrong")  # pyright: ignore


def test_swap_into_a_compiled_model_does_not_recompile(tmp_path):
    expected = saved(tmp_path, lora(r=2, target_modules=["lin0", "a"]))
    model = get_peft_model(net(), lora(target_modules=["lin0", "a"])).eval()
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        compiled(ids())
        graphs = len(seen)
        hotswap_adapter(compiled, tmp_path, adapter_name="default")
        torch.testing.assert_close(compiled(ids()), expected)
    assert len(seen) == graphs


def test_scalings_prepared_for_swapping_are_changed_in_place():
    """A compiled graph reads these very tensors."""
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, lora_alpha=4, target_modules=["0"]))
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    layer = model.base_model.model[0]
    scaling = layer.scaling["default"]
    for change, want in (
        (lambda: layer.set_scale("default", 3), 6.0),
        (lambda: layer.scale_layer(2.0), 12.0),
        (lambda: layer.unscale_layer(4.0), 3.0),
        (lambda: layer.unscale_layer(), 2.0),
    ):
        change()
        assert layer.scaling["default"] is scaling and float(scaling) == want


# ---- what may come along, and what a swap meets
@pytest.mark.parametrize(
    "options", [{"bias": "all"}, {"use_dora": True}, {"modules_to_save": ["norm"]}, {"trainable_token_indices": [1, 3]}]
)
def test_everything_in_the_file_is_swapped(tmp_path, options):
    targets = ["lin0", "a"]
    if "trainable_token_indices" in options:
        options = {"trainable_token_indices": {"emb": [1, 3]}}
    expected = saved(tmp_path, lora(target_modules=targets, **options))
    model = get_peft_model(net(), lora(target_modules=targets, **options)).eval()
    fill(model, "default")
    with torch.no_grad():
        assert not torch.allclose(model(ids()), expected)
        hotswap_adapter(model, tmp_path, adapter_name="default")
        torch.testing.assert_close(model(ids()), expected)


def test_growing_a_parameter_that_is_referred_to(tmp_path):
    """torch cannot swap it then; only its data can be exchanged."""
    expected = saved(tmp_path, lora(r=9, target_modules=["lin0"]))
    model = get_peft_model(net(), lora(target_modules=["lin0"])).eval()
    held = model.base_model.model.lin0.lora_A["default"].weight
    reference = weakref.ref(held)
    hotswap_adapter(model, tmp_path, adapter_name="default")
    assert model.base_model.model.lin0.lora_A["default"].weight is reference() and held.shape == (9, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(ids()), expected)


def test_part_of_a_model():
    model = get_peft_model(net(), lora(target_modules=["a"]))
    state = {f"a.lora_{x}.default.weight": torch.full((4, 8)[:: 1 if x == "A" else -1], 2.0) for x in "AB"}
    part = model.base_model.model.block
    hotswap_adapter_from_state_dict(part, state, "default", lora(lora_alpha=2))
    layer = part["a"]
    assert (layer.scaling["default"], layer.lora_B["default"].weight[0, 0].item()) == (0.5, 2.0)
    assert model.peft_config["default"].lora_alpha == 6


def test_prepared_convolution(tmp_path):
    config = LoraConfig(r=4, target_modules=["conv"])
    expected = saved(tmp_path / "new", LoraConfig(r=2, target_modules=["conv"]), make=grouped)
    model = get_peft_model(grouped(), config).eval()
    for rank, error in (
        (7, r"multiples of the 2 groups of '.*conv', got 4 \(adapter 'default'\) and the target rank 7"),
        (2, r"original rank is larger \(4, adapter 'default', '.*conv'\)"),
    ):
        with pytest.raises(ValueError, match=error):
            prepare_model_for_compiled_hotswap(model, target_rank=rank)
    prepare_model_for_compiled_hotswap(model, target_rank=8, config=config)
    A, B = model.base_model.model.conv.lora_A["default"], model.base_model.model.conv.lora_B["default"]
    assert (A.out_channels, B.in_channels, A.weight.shape[0], B.weight.shape[1]) == (8, 8, 8, 4)
    model.save_pretrained(tmp_path / "padded")  # the configuration says 8 now
    loaded = PeftModel.from_pretrained(grouped(), tmp_path / "padded")
    assert loaded.base_model.model.conv.lora_A["default"].weight.shape[0] == 8
    hotswap_adapter(model, tmp_path / "new", adapter_name="default")
    assert A.weight.shape[0] == 8
    with torch.no_grad():
        torch.testing.assert_close(model(image()), expected)
