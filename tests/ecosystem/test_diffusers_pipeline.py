"""diffusers pipelines assembled from tiny parts that denoise, with adapters of UNet and text encoder together, offline."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the `ecosystem` extra (diffusers)")

from diffusers import DDPMScheduler, StableDiffusionPipeline  # noqa: E402
from diffusers.training_utils import _set_state_dict_into_text_encoder  # noqa: E402
from diffusers.utils import convert_unet_state_dict_to_peft  # noqa: E402
from tests.ecosystem import tiny  # noqa: E402
from tests.ecosystem.tiny_diffusion import TEXT, UNET, add, close, layers, parts, run, save, stable_diffusion, weights  # noqa: E402

import peft  # noqa: E402


@pytest.fixture
def pipe(tmp_path: Path) -> Any:
    """A pipeline with adapters "one" and "two" from files."""
    result = stable_diffusion()
    for seed, name in ((1, "one"), (2, "two")):
        save(add(stable_diffusion(), name, seed), tmp_path / name, name)
        result.load_lora_weights(tmp_path / name, adapter_name=name)
    return result


@pytest.mark.parametrize("metadata", [False, True])
def test_save_load_and_denoise(tmp_path: Path, metadata: bool) -> None:
    plain, donor = run(stable_diffusion()), add(stable_diffusion(), "one")
    adapted = run(donor)
    assert not close(adapted, plain, 1e-2)
    save(donor, tmp_path, "one", metadata)
    again = stable_diffusion()
    again.load_lora_weights(tmp_path, adapter_name="x")
    assert again.get_list_adapters() == {"unet": ["x"], "text_encoder": ["x"]}
    assert torch.equal(run(again), adapted)
    again.disable_lora()
    assert torch.equal(run(again), plain)
    again.enable_lora()
    assert torch.equal(run(again), adapted)
    again.unload_lora_weights()
    assert not layers(again.unet) + layers(again.text_encoder)
    assert torch.equal(run(again), plain)
    assert tiny.same(weights(again), weights(stable_diffusion()))


def test_adapters_without_a_name_are_counted(tmp_path: Path) -> None:
    """diffusers numbers them by the adapters that the first layer holds."""
    for seed in (1, 2):
        save(add(stable_diffusion(), "one", seed), tmp_path / str(seed), "one")
    pipe = stable_diffusion()
    for seed in (1, 2):
        pipe.load_lora_weights(tmp_path / str(seed))
    names = ["default_0", "default_1"]
    assert pipe.get_list_adapters() == {"unet": names, "text_encoder": names}
    pipe.set_adapters("default_0")
    assert torch.equal(run(pipe), run(add(stable_diffusion(), "one", 1)))


def test_weights_of_each_component(pipe: Any) -> None:
    one, two = (add(stable_diffusion(), name, seed) for seed, name in ((1, "one"), (2, "two")))
    pipe.set_adapters("one")
    assert torch.equal(run(pipe), run(one)) and pipe.get_active_adapters() == ["one"]
    pipe.set_adapters(["one", "two"], [{"unet": 0.0, "text_encoder": 1.0}, {"unet": 1.0, "text_encoder": 0.0}])
    two.text_encoder = one.text_encoder
    assert close(run(pipe), run(two))
    pipe.set_adapters(["one", "two"], [{"unet": 0.5, "text_encoder": 0.25}, 0.3])
    for part, weight in (("unet", 0.5), ("text_encoder", 0.25)):
        assert {(m.scaling["one"], m.scaling["two"]) for m in layers(getattr(pipe, part))} == {(weight, 0.3)}
    pipe.set_lora_device(["one", "two"], "cpu")
    pipe.set_adapters("one")
    assert torch.equal(run(pipe), run(one))


def test_scale_argument_reaches_unet_and_text_encoder(pipe: Any) -> None:
    whole = run(pipe)
    half = run(pipe, cross_attention_kwargs={"scale": 0.5})
    assert close(run(pipe, cross_attention_kwargs={"scale": 0.0}), run(stable_diffusion()))
    assert torch.equal(run(pipe), whole)
    pipe.set_adapters("two", 0.5)
    assert close(run(pipe), half) and not close(half, whole, 1e-2)


def test_fuse_and_unfuse(pipe: Any, tmp_path: Path) -> None:
    pipe.set_adapters(["one", "two"], [0.7, 0.4])
    before, both = weights(pipe), run(pipe)
    for _ in range(2):
        pipe.fuse_lora(safe_fusing=True)
        assert pipe.fused_loras == {"one", "two"}
        assert close(run(pipe), both) and not tiny.same(weights(pipe), before)
        pipe.unfuse_lora()
        assert pipe.num_fused_loras == 0
        assert tiny.same(weights(pipe), before)
        assert torch.equal(run(pipe), both)
    pipe.fuse_lora(components=["unet"], adapter_names=["two"])
    assert all(m.merged_adapters == ["two"] for m in layers(pipe.unet))
    assert not any(m.merged for m in layers(pipe.text_encoder))
    pipe.unfuse_lora()
    pipe.set_adapters("one", 0.5)
    half = run(pipe)
    pipe.set_adapters("one")
    pipe.fuse_lora(lora_scale=0.5)
    assert close(run(pipe), half)
    # what the documentation of diffusers says: fuse, unload, save the whole pipeline
    pipe.unload_lora_weights()
    assert not layers(pipe.unet) + layers(pipe.text_encoder)
    assert close(run(pipe), half)
    for part, model in parts(pipe).items():
        model.save_pretrained(tmp_path / part)
        setattr(pipe, part, type(model).from_pretrained(tmp_path / part))
    assert close(run(pipe), half)


def test_delete(pipe: Any) -> None:
    pipe.set_adapters("one")
    one = run(pipe)
    pipe.delete_adapters("two")
    assert pipe.get_list_adapters()["unet"] == ["one"]
    assert torch.equal(run(pipe), one)
    assert not [k for k in weights(pipe) if ".two." in k]
    pipe.delete_adapters("one")
    assert not [k for k in weights(pipe) if "lora_" in k]
    assert torch.equal(run(pipe), run(stable_diffusion()))


def test_hotswap_of_the_unet(tmp_path: Path) -> None:
    """diffusers hotswaps denoisers only: text-encoder adapters are refused, and ours keep working."""
    files = []
    for seed in (1, 2):
        donor = add(stable_diffusion(), "x", seed)
        donor.save_lora_weights(tmp_path / str(seed), peft.get_peft_model_state_dict(donor.unet, adapter_name="x"))
        files.append(tmp_path / str(seed))
    swapped, direct = stable_diffusion(), stable_diffusion()
    swapped.load_lora_weights(files[0], adapter_name="x")
    swapped.load_lora_weights(files[1], adapter_name="x", hotswap=True)
    direct.load_lora_weights(files[1], adapter_name="x")
    assert torch.equal(run(swapped), run(direct))


def test_training_script(tmp_path: Path) -> None:
    """The loop of diffusers' DreamBooth script: noise prediction, both parts trained, saved, loaded to go on."""
    pipe = stable_diffusion()
    before, scheduler = weights(pipe), DDPMScheduler()
    for part, targets in ((pipe.unet, UNET[:4]), (pipe.text_encoder, TEXT[:2])):
        part.requires_grad_(False)
        part.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets))
        part.train()
    trained = [p for model in parts(pipe).values() for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=3e-2), []
    torch.manual_seed(0)
    latents, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    time = torch.tensor([100, 700])
    for _ in range(10):
        hidden = pipe.text_encoder(tiny.ids(2, 8))[0]
        loss = (pipe.unet(scheduler.add_noise(latents, noise, time), time, hidden).sample - noise).square().mean()
        loss.backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert tiny.falls(losses, 0.9), losses
    kept = {re.sub(r"\.base_layer", "", k): v for k, v in weights(pipe).items() if "lora_" not in k}
    assert tiny.same(kept, before)
    for model in parts(pipe).values():
        model.eval()
    save(pipe, tmp_path, convert=True)
    again = stable_diffusion()
    again.load_lora_weights(tmp_path)
    assert torch.equal(run(again), run(pipe))
    # to go on training, the scripts put the file into adapters that are there already
    state, _ = StableDiffusionPipeline.lora_state_dict(tmp_path)
    again = stable_diffusion()
    for model, targets in ((again.unet, UNET[:4]), (again.text_encoder, TEXT[:2])):
        model.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets))
    part = {k.removeprefix("unet."): v for k, v in state.items() if k.startswith("unet.")}
    result = peft.set_peft_model_state_dict(again.unet, convert_unet_state_dict_to_peft(part), adapter_name="default")
    assert not result.unexpected_keys
    _set_state_dict_into_text_encoder(state, prefix="text_encoder.", text_encoder=again.text_encoder)
    assert torch.equal(run(again), run(pipe))


def test_wrapped_parts() -> None:
    """Parts may be PeftModels; attributes that pipelines read fall through."""
    pipe, plain = stable_diffusion(), run(stable_diffusion())
    pipe.unet = peft.get_peft_model(pipe.unet, peft.LoraConfig(target_modules=UNET))
    pipe.text_encoder = peft.get_peft_model(pipe.text_encoder, peft.LoraConfig(target_modules=TEXT))
    assert torch.equal(run(pipe), plain)
    tiny.spread(pipe.unet, 0.2), tiny.spread(pipe.text_encoder, 0.2)
    adapted = run(pipe)
    assert not close(adapted, plain, 1e-2)
    pipe.unet, pipe.text_encoder = pipe.unet.merge_and_unload(), pipe.text_encoder.merge_and_unload()
    assert close(run(pipe), adapted)
