"""diffusers: LoRA files of other trainers, through the converters of diffusers, against weights changed by hand."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the `ecosystem` extra (diffusers)")

from safetensors.torch import save_file  # noqa: E402
from tests.ecosystem.tiny_diffusion import close, flux, layers, run, stable_diffusion, weights  # noqa: E402


def pair(model: Any, name: str, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices (down, up) for this layer; convolutions go down with the kernel and up with 1 x 1."""
    weight, g = model.get_submodule(name).weight, torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *weight.shape[1:], generator=g) * 0.2
    return down, torch.randn(weight.shape[0], rank, *(1,) * (weight.ndim - 2), generator=g) * 0.2


@torch.no_grad()
def shift(model: Any, name: str, down: torch.Tensor, up: torch.Tensor, scale: float) -> None:
    weight = model.get_submodule(name).weight
    weight += scale * (up.flatten(1) @ down.flatten(1)).view_as(weight)


def kohya(oracle: Any, files: dict[str, str]) -> dict[str, torch.Tensor]:
    """A file of kohya's trainer with different ranks and alphas; `oracle` is changed alike by hand.

    Attention and text layers share an alpha: diffusers 0.42 looks for others under names that they do not have.

    `files` maps names in the file to "part:module".
    """
    state = {}
    for i, (file, place) in enumerate(files.items()):
        part, name = place.split(":")
        rank, alpha = 2 + i % 3, 2.0 if "attn" in file or part != "unet" else 1.0 + i % 4
        down, up = pair(getattr(oracle, part), name, rank, i)
        state[f"{file}.lora_down.weight"], state[f"{file}.lora_up.weight"] = down, up
        state[f"{file}.alpha"] = torch.tensor(alpha)
        shift(getattr(oracle, part), name, down, up, alpha / rank)
    return state


_DOWN, _UP = "down_blocks_1_attentions_0", "up_blocks_0_attentions_1"
_BLOCK = "transformer_blocks_0"
SD_LAYERS = {
    **{f"{_DOWN}_{_BLOCK}_{x}": f"down_blocks.1.attentions.0.transformer_blocks.0.{y}" for x, y in (
        ("attn1_to_q", "attn1.to_q"), ("attn2_to_k", "attn2.to_k"), ("attn2_to_out_0", "attn2.to_out.0"),
        ("ff_net_0_proj", "ff.net.0.proj"), ("ff_net_2", "ff.net.2"),
    )},
    f"{_DOWN}_proj_in": "down_blocks.1.attentions.0.proj_in",
    f"{_UP}_{_BLOCK}_attn1_to_v": "up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_v",
    "down_blocks_0_resnets_0_conv1": "down_blocks.0.resnets.0.conv1",
    "down_blocks_1_resnets_0_conv_shortcut": "down_blocks.1.resnets.0.conv_shortcut",
    "down_blocks_0_downsamplers_0_conv": "down_blocks.0.downsamplers.0.conv",
    "mid_block_resnets_1_time_emb_proj": "mid_block.resnets.1.time_emb_proj",
}  # fmt: skip
# the names that the original UNet has for the same layers
SGM_LAYERS = {
    "input_blocks_3_1_transformer_blocks_0_attn1_to_q": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "input_blocks_1_0_out_layers_3": "down_blocks.0.resnets.0.conv2",
    "input_blocks_1_0_emb_layers_1": "down_blocks.0.resnets.0.time_emb_proj",
    "input_blocks_3_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks_2_0_op": "down_blocks.0.downsamplers.0.conv",
    "middle_block_1_transformer_blocks_0_attn2_to_out_0": "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0",
    "middle_block_2_in_layers_2": "mid_block.resnets.1.conv1",
    "output_blocks_1_1_proj_out": "up_blocks.0.attentions.1.proj_out",
    "output_blocks_0_1_transformer_blocks_0_ff_net_2": "up_blocks.0.attentions.0.transformer_blocks.0.ff.net.2",
}
_TE = "text_model_encoder_layers_1"
TEXT_LAYERS = {
    f"{_TE}_self_attn_q_proj": "encoder.layers.1.self_attn.q_proj",
    f"{_TE}_self_attn_out_proj": "encoder.layers.1.self_attn.out_proj",
    f"{_TE}_mlp_fc1": "encoder.layers.1.mlp.fc1",
    f"{_TE}_mlp_fc2": "encoder.layers.1.mlp.fc2",
}


@pytest.mark.parametrize("names", ["diffusers", "original"])
def test_kohya_file(names: str, tmp_path: Path) -> None:
    pipe, oracle, plain = stable_diffusion(), stable_diffusion(), run(stable_diffusion())
    unet = SD_LAYERS if names == "diffusers" else SGM_LAYERS
    files = {f"lora_unet_{k}": f"unet:{v}" for k, v in unet.items()}
    files.update({f"lora_te_{k}": f"text_encoder:{v}" for k, v in TEXT_LAYERS.items()})
    save_file(kohya(oracle, files), tmp_path / "kohya.safetensors")
    more = {"unet_config": pipe.unet.config} if names == "original" else {}
    pipe.load_lora_weights(tmp_path, weight_name="kohya.safetensors", adapter_name="k", **more)
    assert len(layers(pipe.unet)) == len(unet) and len(layers(pipe.text_encoder)) == len(TEXT_LAYERS)
    assert len({(m.r["k"], m.lora_alpha["k"]) for m in layers(pipe.unet)}) > 4
    result = run(pipe)
    assert not close(result, plain, 1e-2)
    assert close(result, run(oracle))
    pipe.fuse_lora()
    assert close(run(pipe), result)
    before = weights(oracle)
    fused = {re.sub(r"\.base_layer", "", k): v for k, v in weights(pipe).items() if "lora_" not in k}
    assert all(close(v, before[k], 1e-5) for k, v in fused.items())
    pipe.unfuse_lora()
    assert torch.equal(run(pipe), result)


def test_old_diffusers_file() -> None:
    """The attention-processor names that diffusers' own scripts wrote before it used this package."""
    pipe, oracle = stable_diffusion(), stable_diffusion()
    state = {}
    for i, layer in enumerate(["to_q", "to_k", "to_v", "to_out"]):
        name = f"mid_block.attentions.0.transformer_blocks.0.attn1.{layer}".replace("to_out", "to_out.0")
        down, up = pair(oracle.unet, name, 4, i)
        key = f"unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.{layer}_lora"
        state.update({f"{key}.down.weight": down, f"{key}.up.weight": up})
        shift(oracle.unet, name, down, up, 1.0)
        text = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}[layer]
        down, up = pair(oracle.text_encoder, f"encoder.layers.0.self_attn.{text}", 4, i)
        key = f"text_encoder.text_model.encoder.layers.0.self_attn.{layer}_lora"
        state.update({f"{key}.down.weight": down, f"{key}.up.weight": up})
        shift(oracle.text_encoder, f"encoder.layers.0.self_attn.{text}", down, up, 1.0)
    pipe.load_lora_weights(state)
    assert len(layers(pipe.unet)) == len(layers(pipe.text_encoder)) == 4
    assert close(run(pipe), run(oracle)) and not close(run(pipe), run(stable_diffusion()), 1e-2)


_DOUBLE, _SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
# file names of the original Flux model -> our layers; three names mean a projection that is one matrix there
FLUX_LAYERS = {
    "double_blocks_0_img_attn_qkv": [f"{_DOUBLE}.attn.{x}" for x in ("to_q", "to_k", "to_v")],
    "double_blocks_0_txt_attn_qkv": [f"{_DOUBLE}.attn.{x}" for x in ("add_q_proj", "add_k_proj", "add_v_proj")],
    "double_blocks_0_img_attn_proj": [f"{_DOUBLE}.attn.to_out.0"],
    "double_blocks_0_txt_attn_proj": [f"{_DOUBLE}.attn.to_add_out"],
    "double_blocks_0_img_mlp_0": [f"{_DOUBLE}.ff.net.0.proj"],
    "double_blocks_0_img_mlp_2": [f"{_DOUBLE}.ff.net.2"],
    "double_blocks_0_txt_mlp_2": [f"{_DOUBLE}.ff_context.net.2"],
    "double_blocks_0_img_mod_lin": [f"{_DOUBLE}.norm1.linear"],
    "single_blocks_0_linear2": [f"{_SINGLE}.proj_out"],
    "single_blocks_0_modulation_lin": [f"{_SINGLE}.norm.linear"],
}
XLABS_LAYERS = {
    "double_blocks.0.processor.qkv_lora1": FLUX_LAYERS["double_blocks_0_img_attn_qkv"],
    "double_blocks.0.processor.qkv_lora2": FLUX_LAYERS["double_blocks_0_txt_attn_qkv"],
    "double_blocks.0.processor.proj_lora1": FLUX_LAYERS["double_blocks_0_img_attn_proj"],
    "double_blocks.0.processor.proj_lora2": FLUX_LAYERS["double_blocks_0_txt_attn_proj"],
    "single_blocks.0.processor.qkv_lora": [f"{_SINGLE}.attn.{x}" for x in ("to_q", "to_k", "to_v")],
    "single_blocks.0.processor.proj_lora": [f"{_SINGLE}.proj_out"],
}


def flux_file(oracle: Any, kind: str) -> dict[str, torch.Tensor]:
    """kohya: names with underscores and alphas; comfy: the same with dots; xlabs: processors, without alphas."""
    state = {}
    for i, (file, names) in enumerate((XLABS_LAYERS if kind == "xlabs" else FLUX_LAYERS).items()):
        rank, alpha = (4, 4.0) if kind == "xlabs" else (4 + i % 3, 1.0 + i % 4)
        down, _ = pair(oracle.transformer, names[0], rank, i)
        ups = [pair(oracle.transformer, name, rank, 50 * i + j)[1] for j, name in enumerate(names)]
        for name, up in zip(names, ups, strict=True):
            shift(oracle.transformer, name, down, up, alpha / rank)
        if kind == "xlabs":
            state.update({f"{file}.down.weight": down, f"{file}.up.weight": torch.cat(ups)})
            continue
        if kind == "comfy":
            file = "diffusion_model." + re.sub(
                r"_(?=\d|img|txt|attn|mlp|mod|linear2|lin$|qkv|proj)|(?<=\d)_", ".", file
            )
        else:
            file = f"lora_unet_{file}"
        state.update({f"{file}.lora_down.weight": down, f"{file}.lora_up.weight": torch.cat(ups)})
        state[f"{file}.alpha"] = torch.tensor(alpha)
    return state


@pytest.mark.parametrize("kind", ["kohya", "comfy", "xlabs"])
def test_flux_file(kind: str) -> None:
    pipe, oracle, plain = flux(), flux(), run(flux())
    state = flux_file(oracle, kind)
    if kind == "kohya":
        state.update(kohya(oracle, {f"lora_te1_{k}": f"text_encoder:{v}" for k, v in TEXT_LAYERS.items()}))
    pipe.load_lora_weights(state, adapter_name="k")
    table = XLABS_LAYERS if kind == "xlabs" else FLUX_LAYERS
    assert len(layers(pipe.transformer)) == sum(map(len, table.values()))
    assert len(layers(pipe.text_encoder)) == (len(TEXT_LAYERS) if kind == "kohya" else 0)
    result = run(pipe)
    assert not close(result, plain, 1e-2)
    assert close(result, run(oracle))
    pipe.fuse_lora()
    assert close(run(pipe), result)
    pipe.unfuse_lora()
    assert torch.equal(run(pipe), result)
    pipe.unload_lora_weights()
    assert torch.equal(run(pipe), plain)


def test_flux_control_file() -> None:
    """A control file widens the input projection and trains biases; unloading takes both back."""
    pipe, plain = flux(), run(flux())
    base = pipe.transformer.x_embedder
    g = torch.Generator().manual_seed(1)
    shapes = {"x_embedder": (2 * base.in_features, 32), f"{_DOUBLE}.attn.to_q": (32, 32)}
    state = {}
    for name, (n_in, n_out) in shapes.items():
        key = f"transformer.{name}.lora_"
        state[f"{key}A.weight"] = torch.randn(4, n_in, generator=g) * 0.2
        state[f"{key}B.weight"] = torch.randn(n_out, 4, generator=g) * 0.2
        state[f"{key}B.bias"] = torch.randn(n_out, generator=g) * 0.2
    pipe.load_lora_weights(state, adapter_name="control")
    assert pipe.transformer.peft_config["control"].lora_bias
    layer, x = pipe.transformer.x_embedder, torch.randn(2, 2 * base.in_features, generator=g)
    assert layer.in_features == 2 * base.in_features
    A, B, bias = (state[f"transformer.x_embedder.lora_{k}"] for k in ("A.weight", "B.weight", "B.bias"))
    expected = base(x[:, : base.in_features]) + x @ A.T @ B.T + bias
    torch.testing.assert_close(layer(x), expected)
    pipe.fuse_lora()
    torch.testing.assert_close(layer(x), expected)
    pipe.unfuse_lora()
    pipe.unload_lora_weights(reset_to_overwritten_params=True)
    assert torch.equal(run(pipe), plain)
