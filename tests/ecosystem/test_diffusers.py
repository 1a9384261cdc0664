"""diffusers: the adapter methods of a tiny UNet, Flux and SD3 transformer, offline."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the `ecosystem` extra (diffusers)")

from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import peft  # noqa: E402
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402

FILE = {"weight_name": "pytorch_lora_weights.safetensors"}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def unet() -> Any:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()


def flux() -> Any:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    ).eval()


def sd3() -> Any:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
    ).eval()


def inputs(model: Any) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(7)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    time = torch.tensor([10])
    if isinstance(model, UNet2DConditionModel):
        return {"sample": randn(1, 4, 8, 8), "timestep": time, "encoder_hidden_states": randn(1, 5, 16)}
    if isinstance(model, SD3Transformer2DModel):
        return {
            "hidden_states": randn(1, 4, 8, 8),
            "encoder_hidden_states": randn(1, 5, 16),
            "pooled_projections": randn(1, 16),
            "timestep": time,
        }
    return {
        "hidden_states": randn(1, 16, 4),
        "encoder_hidden_states": randn(1, 5, 32),
        "pooled_projections": randn(1, 32),
        "timestep": time / 1000,
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(5, 3),
    }


@torch.no_grad()
def out(model: Any, **more: Any) -> torch.Tensor:
    return model(**inputs(model), return_dict=False, **more)[0]


def config(**more: Any) -> peft.LoraConfig:
    return peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "init_lora_weights": "gaussian", **more}
    )


def add(model: Any, name: str, seed: int = 1, **more: Any) -> Any:
    """Adds an adapter that has an effect."""
    torch.manual_seed(seed)
    model.add_adapter(config(**more), adapter_name=name)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_B" in key and f".{name}." in key:
                p.normal_(std=0.2)
    return model


def layers(model: Any) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, BaseTunerLayer)]


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-5) -> bool:
    return bool((a - b).abs().max() <= atol)


MODELS = pytest.mark.parametrize("build", [unet, flux, sd3])


@MODELS
def test_add_disable_enable_delete(build: Any) -> None:
    model = build()
    before, weights = out(model), {k: v.clone() for k, v in model.state_dict().items()}
    add(model, "one")
    adapted = out(model)
    assert not close(adapted, before, 1e-3)
    assert model.active_adapters() == ["one"]
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in n for n in trainable)
    model.disable_adapters()
    assert torch.equal(out(model), before)
    model.enable_adapters()
    assert torch.equal(out(model), adapted)
    add(model, "two", seed=2)
    model.set_adapter("one")
    assert torch.equal(out(model), adapted)
    model.delete_adapters("two")
    assert list(model.peft_config) == ["one"]
    assert torch.equal(out(model), adapted)
    model.unload_lora()
    assert not layers(model)
    assert torch.equal(out(model), before)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in weights.items()}
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


@MODELS
def test_save_and_load(build: Any, tmp_path: Path) -> None:
    model = add(build(), "one", rank_pattern={"to_k": 2}, alpha_pattern={"to_k": 6})
    expected = out(model)
    model.save_lora_adapter(tmp_path, adapter_name="one")
    path = tmp_path / "pytorch_lora_weights.safetensors"
    for metadata in (True, False):  # with the saved configuration, and with ranks read from the shapes
        state = load_file(path)
        assert all(".one" not in k for k in state)
        again = build()
        if metadata:
            again.load_lora_adapter(tmp_path, prefix=None, **FILE, adapter_name="x")
            assert close(out(again), expected, 1e-6)
        else:
            again.load_lora_adapter(state, prefix=None, adapter_name="x")
        ranks = {layer.r["x"] for layer in layers(again)}
        assert ranks == {2, 4}
        saved = peft.get_peft_model_state_dict(again, adapter_name="x")
        assert all(torch.equal(v, state[k]) for k, v in saved.items())
        assert set(saved) == set(state)


@MODELS
def test_set_adapters_with_weights(build: Any) -> None:
    model = build()
    base = out(model)
    add(add(model, "one"), "two", seed=2)
    model.set_adapters(["one"], [1.0])
    one = out(model)
    model.set_adapters(["one", "two"], [1.0, 0.0])
    assert close(out(model), one)
    model.set_adapters(["one", "two"], [0.0, 0.0])
    assert close(out(model), base)
    for weight in (0.5, 0.5, 2.0):  # idempotent: relative to alpha / r, not to the last value
        model.set_adapters(["one", "two"], [weight, 0.3])
        assert {layer.scaling["one"] for layer in layers(model)} == {2.0 * weight}
        assert all(layer.scaling["two"] == pytest.approx(0.6) for layer in layers(model))
    model.set_adapters(["one"], [1.0])
    assert torch.equal(out(model), one)


def test_per_block_weights_and_scale_argument() -> None:
    model = add(unet(), "one")
    whole = out(model)
    model.set_adapters(["one"], [{"down": 0.5, "mid": 0.0, "up": 1.0}])
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            found.setdefault(name.split("_")[0], set()).add(module.scaling["one"])
    assert found == {"down": {1.0}, "mid": {0.0}, "up": {2.0}}
    model.set_adapters(["one"], [1.0])
    assert torch.equal(out(model), whole)
    model.disable_adapters()
    base = out(model)
    model.enable_adapters()
    assert close(out(model, cross_attention_kwargs={"scale": 0.0}), base)
    half = out(model, cross_attention_kwargs={"scale": 0.5})
    model.set_adapters(["one"], [0.5])
    assert close(out(model), half)
    model.set_adapters(["one"], [1.0])
    assert torch.equal(out(model), whole)


@MODELS
def test_fuse_and_unfuse(build: Any) -> None:
    model = build()
    base = out(model)
    add(add(model, "one"), "two", seed=2)
    model.set_adapters(["one", "two"], [0.7, 0.4])
    both = out(model)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    model.fuse_lora(safe_fusing=True)
    assert all(layer.merged_adapters == ["one", "two"] for layer in layers(model))
    assert close(out(model), both)
    model.unfuse_lora()
    model.unfuse_lora()  # harmless when nothing is fused
    assert torch.equal(out(model), both)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    model.fuse_lora(adapter_names=["two"])
    assert all(layer.merged_adapters == ["two"] for layer in layers(model))
    model.unfuse_lora()
    model.set_adapters(["one"], [0.5])
    half = out(model)
    model.set_adapters(["one"], [1.0])
    model.fuse_lora(lora_scale=0.5)
    assert close(out(model), half)
    model.disable_adapters()
    assert close(out(model), base)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items() if "lora_" not in k)


def test_safe_fusing_refuses_nan() -> None:
    model = add(flux(), "one")
    layer = layers(model)[0]
    before = layer.get_base_layer().weight.clone()
    with torch.no_grad():
        layer.lora_B["one"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN|finite"):
        model.fuse_lora(safe_fusing=True)
    assert torch.equal(layer.get_base_layer().weight, before)
    assert not layer.merged


@MODELS
def test_hotswap(build: Any, tmp_path: Path) -> None:
    add(build(), "a").save_lora_adapter(tmp_path / "a", adapter_name="a")
    small = add(build(), "b", seed=5, r=2, lora_alpha=6)
    expected = out(small)
    small.save_lora_adapter(tmp_path / "b", adapter_name="b")
    model = build()
    model.enable_lora_hotswap(target_rank=8)
    model.load_lora_adapter(tmp_path / "a", prefix=None, **FILE, adapter_name="swap")
    first = out(model)
    places = [layer.lora_A["swap"].weight.data_ptr() for layer in layers(model)]
    assert {tuple(layer.lora_A["swap"].weight.shape)[0] for layer in layers(model)} == {8}
    model.load_lora_adapter(tmp_path / "b", prefix=None, **FILE, adapter_name="swap", hotswap=True)
    assert close(out(model), expected, 1e-4)  # other matrix shapes, other rounding
    model.load_lora_adapter(tmp_path / "a", prefix=None, **FILE, adapter_name="swap", hotswap=True)
    assert torch.equal(out(model), first)
    assert [layer.lora_A["swap"].weight.data_ptr() for layer in layers(model)] == places


def test_hotswap_of_other_targets_is_refused(tmp_path: Path) -> None:
    add(flux(), "b", target_modules=["to_q", "proj_mlp"]).save_lora_adapter(tmp_path, adapter_name="b")
    base = out(flux())
    model = add(flux(), "a")
    with pytest.raises(RuntimeError):
        model.load_lora_adapter(tmp_path, prefix=None, **FILE, adapter_name="a", hotswap=True)
    assert not model.peft_config  # diffusers deletes an adapter whose loading failed
    assert torch.equal(out(model), base)


@MODELS
@pytest.mark.parametrize("fault", ["shape", "dora"])
def test_a_bad_file_leaves_the_model_clean(build: Any, fault: str, tmp_path: Path) -> None:
    donor = add(build(), "one")
    donor.save_lora_adapter(tmp_path, adapter_name="one")
    path = tmp_path / "pytorch_lora_weights.safetensors"
    state = load_file(path)
    key = next(k for k in state if "lora_B" in k)
    if fault == "shape":
        state[key] = torch.zeros(3, 4)
        save_file(state, path)
        error: type[Exception] = RuntimeError
    else:
        stored = {"no_such_option": 1, "peft_type": "LORA", "r": 4}
        save_file(state, path, metadata={"lora_adapter_metadata": json.dumps(stored), "format": "pt"})
        error = TypeError
    model = build()
    before = out(model)
    with pytest.raises(error):
        model.load_lora_adapter(tmp_path, prefix=None, **FILE, adapter_name="bad")
    assert not getattr(model, "peft_config", {})
    assert torch.equal(out(model), before)
    donor.save_lora_adapter(tmp_path, adapter_name="one")
    model.load_lora_adapter(tmp_path, prefix=None, **FILE, adapter_name="bad")  # the name is free again
    assert close(out(model), out(donor), 1e-6)


def test_a_caret_pattern_matches_the_whole_name_only() -> None:
    model = flux()
    targets = ["proj_out", "single_transformer_blocks.0.proj_out"]
    model.add_adapter(config(target_modules=targets, rank_pattern={"^proj_out": 2}), "one")
    ranks = {n: m.r["one"] for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    assert ranks == {"proj_out": 2, "single_transformer_blocks.0.proj_out": 4}


def test_lokr_from_a_state_dict() -> None:
    model = flux()
    base = model.transformer_blocks[0].attn.to_q.weight.detach().clone()
    g = torch.Generator().manual_seed(3)
    w1, w2 = torch.randn(4, 4, generator=g) * 0.1, torch.randn(8, 8, generator=g)
    before = out(model)
    name = "transformer_blocks.0.attn.to_q"
    model.load_lora_adapter(
        {f"transformer.{name}.lokr_w1": w1, f"transformer.{name}.lokr_w2": w2}, prefix="transformer", adapter_name="k"
    )
    layer = model.get_submodule(name)
    assert model.peft_config["k"].peft_type == peft.PeftType.LOKR
    torch.testing.assert_close(layer.get_delta_weight("k"), torch.kron(w1, w2))
    adapted = out(model)
    assert not close(adapted, before, 1e-4)
    model.fuse_lora()
    torch.testing.assert_close(layer.get_base_layer().weight, base + torch.kron(w1, w2))
    assert close(out(model), adapted)
    model.unfuse_lora()
    assert torch.equal(layer.get_base_layer().weight, base)


def test_layerwise_casting_keeps_adapters_and_result() -> None:
    model = add(flux(), "one")
    exact = out(model)
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    layer = model.transformer_blocks[0].attn.to_q
    assert layer.get_base_layer().weight.dtype == torch.bfloat16
    assert layer.lora_A["one"].weight.dtype == torch.float32
    result = out(model)
    assert result.dtype == torch.float32
    assert close(result, exact, 0.1)
    assert not torch.equal(result, exact)


@MODELS
def test_training_step(build: Any) -> None:
    model = build()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.add_adapter(config(), "one")
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    target, losses = torch.randn(out(model).shape, generator=torch.Generator().manual_seed(0)), []
    for _ in range(6):
        loss = (model(**inputs(model), return_dict=False)[0] - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01, losses
    model.unload_lora()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_convolutions_with_dora_fuse() -> None:
    model = add(unet(), "one", target_modules=["to_q", "conv1", "conv2"], use_dora=True)
    adapted = out(model)
    model.fuse_lora(safe_fusing=True)
    assert close(out(model), adapted, 1e-4)
    model.unfuse_lora()
    assert close(out(model), adapted)
