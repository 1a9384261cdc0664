"""Tiny diffusers pipelines, and what the tests ask of them. Import after `pytest.importorskip("diffusers")`."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import convert_state_dict_to_diffusers
from tests.ecosystem import tiny
from transformers import CLIPTextConfig, CLIPTextModel

import peft
from peft.tuners.tuners_utils import BaseTunerLayer

UNET = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "ff.net.2", "time_emb_proj"]  # the first four: attention
TEXT = ["q_proj", "out_proj", "fc1"]


def text_encoder(width: int = 16) -> Any:
    sizes = {"hidden_size": width, "projection_dim": width, "intermediate_size": 24, "num_hidden_layers": 2}
    config = CLIPTextConfig(
        **sizes, vocab_size=tiny.VOCAB, num_attention_heads=2, max_position_embeddings=8, eos_token_id=2, bos_token_id=1
    )
    return tiny._make(CLIPTextModel, config, scale=20.0)


def vae() -> Any:
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4, sample_size=8).eval()


def tokenizer() -> Any:
    result = tiny.tokenizer()
    result.model_max_length = 8
    return result


def stable_diffusion() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()
    parts = {"vae": vae(), "text_encoder": text_encoder(), "tokenizer": tokenizer(), "unet": unet}
    pipe = StableDiffusionPipeline(
        **parts,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux() -> FluxPipeline:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=[4, 4, 8],
    ).eval()  # fmt: skip
    parts = {"text_encoder": text_encoder(), "tokenizer": tokenizer(), "text_encoder_2": None, "tokenizer_2": None}
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), vae(), transformer=transformer, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


PARTS = ("unet", "transformer", "text_encoder")


def parts(pipe: Any) -> dict[str, Any]:
    return {name: getattr(pipe, name) for name in PARTS if hasattr(pipe, name)}


@torch.no_grad()
def run(pipe: Any, **more: Any) -> torch.Tensor:
    """Three denoising steps; the latents that come out."""
    more = {"num_inference_steps": 3, "output_type": "latent", "generator": torch.Generator().manual_seed(0), **more}
    if isinstance(pipe, FluxPipeline):
        embeds = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1))
        pooled = pipe.text_encoder(tiny.ids(1, 8)).pooler_output
        return pipe(prompt_embeds=embeds, pooled_prompt_embeds=pooled, height=8, width=8, **more).images
    return pipe("w4 w5 w6", height=8, width=8, **more).images


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-4) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= atol)


def weights(pipe: Any) -> dict[str, torch.Tensor]:
    return {f"{part}.{k}": v.clone() for part, model in parts(pipe).items() for k, v in model.state_dict().items()}


def layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def add(pipe: Any, name: str, seed: int = 1) -> Any:
    """An adapter of this name on the UNet and on the text encoder."""
    for part, targets in ((pipe.unet, UNET), (pipe.text_encoder, TEXT)):
        part.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets), adapter_name=name)
        tiny.spread(part, 0.2, seed, only=f".{name}.")
    return pipe


def save(pipe: Any, folder: Path, name: str = "default", metadata: bool = False, convert: bool = False) -> None:
    """`convert` to the names that the training scripts of diffusers write; that converter knows attention layers only."""
    options: dict[str, Any] = {}
    for part, model in parts(pipe).items():
        state = peft.get_peft_model_state_dict(model, adapter_name=name)
        options[f"{part}_lora_layers"] = convert_state_dict_to_diffusers(state) if convert else state
        if metadata:
            options[f"{part}_lora_adapter_metadata"] = _collate(model.peft_config[name])
    pipe.save_lora_weights(folder, **options)


def _collate(config: Any) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
