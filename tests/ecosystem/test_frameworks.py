"""What other frameworks read of adapter layers and replace on our classes (unsloth, axolotl, LLaMA-Factory, ms-swift, liger)."""

import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ecosystem import tiny
from torch import nn

import peft
from peft.tuners import lora
from peft.tuners.lora.layer import ParamWrapper, _LoraParameterProxy
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

TARGETS = ["q_proj", "v_proj", "down_proj"]


def config(**more: Any) -> peft.LoraConfig:
    options = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**{**options, **more})


def adapted(**more: Any) -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(tiny.llama(), config(**more)).eval()


# ---- reading


def test_fast_kernels_compute_a_layer_from_its_attributes() -> None:
    """As the fused kernels of unsloth and axolotl do it."""
    layer = adapted().base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 3, tiny.WIDTH, generator=torch.Generator().manual_seed(1))
    base = layer.base_layer if hasattr(layer, "base_layer") else layer
    assert layer.weight is base.weight and layer.bias is base.bias and not layer.disable_adapters and not layer.merged
    (name,) = layer.active_adapters
    A, B, s = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    assert isinstance(layer.lora_dropout[name], nn.Identity) and type(s) is float
    assert (layer.in_features, layer.out_features) == (tiny.WIDTH, tiny.WIDTH)
    assert (layer.r[name], layer.lora_alpha[name], layer.use_dora[name]) == (4, 8, False)
    assert not layer.lora_embedding_A and not layer.lora_embedding_B and not layer.lora_magnitude_vector
    expected = nn.functional.linear(x, base.weight, base.bias) + s * (x @ A.T) @ B.T
    torch.testing.assert_close(layer(x), expected)


def test_dora_layers_show_their_magnitude() -> None:
    layer = adapted(use_dora=True).base_model.model.model.layers[0].self_attn.q_proj
    name = layer.active_adapters[0]
    magnitude = layer.lora_magnitude_vector[name]
    assert layer.use_dora[name] and magnitude.weight.shape == (tiny.WIDTH,)


def test_speech_models_know_lora_layers(caplog: pytest.LogCaptureFixture) -> None:
    """The time-delay layers of transformers' speech models read the kernel past an adapter, and say so."""
    from transformers.models.wav2vec2 import modeling_wav2vec2 as speech

    sizes = {"tdnn_dim": [8, 8], "tdnn_kernel": [2, 1], "tdnn_dilation": [1, 1]}
    model = nn.Sequential(speech.TDNNLayer(tiny.tf.Wav2Vec2Config(**sizes), 0))
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["kernel"], init_lora_weights=False))
    x = torch.randn(1, 6, 8)
    with model.disable_adapter(), pytest.warns(UserWarning, match="LoRA"):
        plain = model(x)
    with pytest.warns(UserWarning, match="LoRA"):
        assert torch.equal(model(x), plain)


def test_a_speech_model_adapts_its_text_part_to_audio_only(tmp_path: Path) -> None:
    """transformers' granite-speech switches its native adapter in `generate`, and names the folder it is saved to."""
    torch.manual_seed(0)
    text = {
        "model_type": "granite",
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
    }
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    audio = {"input_dim": 6, "num_layers": 2, "hidden_dim": 8, "num_heads": 2, "output_dim": 4, "context_size": 16}
    audio |= {"max_pos_emb": 16, "conv_kernel_size": 3, "feedforward_mult": 2}
    bridge = {"model_type": "blip_2_qformer", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    bridge |= {"intermediate_size": 8, "encoder_hidden_size": 8, "cross_attention_frequency": 1, "vocab_size": 8}
    parts = {"text_config": text, "encoder_config": audio, "projector_config": bridge}
    sizes = tiny.tf.GraniteSpeechConfig(**parts, audio_token_index=31)
    model = tiny.tf.GraniteSpeechForConditionalGeneration(sizes).eval()
    model.add_adapter(config(target_modules=["q_proj"], task_type=None), "speech")
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    tokens, options = torch.tensor([[3, 31, 31, 31, 5]]), {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
    sound = {"input_features": torch.randn(1, 15, 6), "input_features_mask": torch.ones(1, 3, dtype=torch.bool)}
    for given, disabled in ((sound, False), ({}, True), (sound, False)):
        model.generate(tokens if given else tokens[:, :1], **given, **options)
        assert len(layers) == 2 and {m.disable_adapters for m in layers} == {disabled}
    assert model.active_adapters() == ["speech"]
    model.save_pretrained(str(tmp_path))
    assert peft.PeftConfig.from_pretrained(tmp_path).base_model_name_or_path == str(tmp_path)


def test_an_evaluation_harness_loads_and_merges(tmp_path: Path) -> None:
    """lm-eval and LLaMA-Factory: arguments of the hub and of dispatching for a local folder; further training."""
    trained = adapted()
    trained.save_pretrained(tmp_path)
    options = {"revision": "main", "is_trainable": False, "offload_folder": "offload"}
    model = peft.PeftModel.from_pretrained(tiny.llama(), str(tmp_path), **options)
    assert isinstance(model, (tiny.tf.PreTrainedModel, peft.PeftModel)) and not model.training
    assert torch.equal(tiny.logits(model), tiny.logits(trained))
    model.load_adapter(str(tmp_path), "more", is_trainable=True)
    model.set_adapter("more")
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"more"}
    merged = model.merge_and_unload()
    assert type(merged) is type(tiny.llama()) and tiny.close(tiny.logits(merged), tiny.logits(trained))


def test_trackers_and_offloaders_look_through_the_wrapper() -> None:
    """SwanLab goes by the class name and counts; TRL's activation offloading looks for the head."""
    model = adapted(task_type=None)
    assert type(model).__name__ == "PeftModel" and model.get_nb_trainable_parameters()[0] > 0
    assert hasattr(model, "base_model") and hasattr(model, "peft_config")
    assert model.base_model.lm_head is model.get_base_model().lm_head
    assert model.get_output_embeddings() is model.lm_head and not isinstance(model.lm_head, BaseTunerLayer)
    assert dict(model.peft_config) == {"default": model.active_peft_config}


def test_signature_is_searched_for_options() -> None:
    text = str(inspect.signature(peft.LoraConfig))
    assert all(option in text for option in ("loftq_config", "use_rslora", "ensure_weight_tying"))


def forwards() -> list[tuple[str, str]]:
    """unsloth lists the files of the folder and takes every class that is called a linear layer."""
    found = []
    for path in sorted(Path(lora.__file__).parent.glob("[!_]*.py")):
        module = f"peft.tuners.lora.{path.stem}"
        __import__(module)
        for name, value in vars(sys.modules[module]).items():
            if re.fullmatch(r"Linear.*|.*Linear", name) and isinstance(value, type) and "forward" in dir(value):
                found.append((module, name))
    return found


@pytest.mark.parametrize(("module", "name"), forwards())
def test_copied_source_of_a_forward_runs(module: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its text is renamed and run with no more than the names of the module that the class was found in."""
    cls = getattr(sys.modules[module], name)
    source = textwrap.dedent(inspect.getsource(cls.forward))
    assert not re.search(r"\bsuper\(\)|__class__", source)
    source = re.sub(r"^def forward", "def copied_forward", source)
    names = dict(vars(sys.modules[module]))
    exec(compile(source, "copied", "exec"), names)
    model = adapted()
    expected = tiny.logits(model)
    monkeypatch.setattr(cls, "forward", names["copied_forward"])
    assert torch.equal(tiny.logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model), tiny.logits(tiny.llama()))


# ---- replacing


def mixture() -> Any:
    names = ["experts.gate_up_proj", "experts.down_proj"]
    torch.manual_seed(0)
    return peft.get_peft_model(tiny.mixtral(), config(target_modules=["q_proj"], target_parameters=names))


def wrap() -> Any:
    return adapted()


def merge() -> None:
    model = adapted()
    model.merge_adapter()
    model.unmerge_adapter()
    model.merge_and_unload()


def merge_experts() -> None:
    model = mixture()
    model.merge_adapter()
    model.unmerge_adapter()


def run() -> None:
    tiny.logits(adapted())


def run_experts() -> None:
    tiny.logits(mixture())


def files(folder: Path) -> None:
    adapted().save_pretrained(folder)
    peft.PeftModel.from_pretrained(tiny.llama(), folder).load_adapter(folder, "more")


def adalora() -> None:
    options = {"target_modules": TARGETS, "task_type": "CAUSAL_LM", "total_step": 10}
    peft.get_peft_model(tiny.llama(), peft.AdaLoraConfig(**options))(input_ids=tiny.ids(), labels=tiny.ids())


PATCHES = [
    (peft.LoraModel, "__init__", wrap), (peft.LoraModel, "_cast_adapter_dtype", wrap),
    (peft.LoraModel, "_create_and_replace", wrap), (BaseTuner, "_check_target_module_compatiblity", wrap),
    (BaseTuner, "_check_target_module_exists", wrap), (BaseTuner, "_inject_parameters", mixture),
    (BaseTuner, "_unload_and_optionally_merge", merge),
    (ParamWrapper, "__init__", mixture), (ParamWrapper, "merge", merge_experts),
    (ParamWrapper, "unmerge", merge_experts), (ParamWrapper, "forward", run_experts),
    (peft.PeftModel, "save_pretrained", files), (peft.PeftModel, "load_adapter", files),
    (peft.PeftModelForCausalLM, "forward", run), (peft.AdaLoraModel, "forward", adalora),
    (peft.config.PeftConfigMixin, "from_pretrained", files),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "name", "use"), PATCHES, ids=[f"{c.__name__}.{n}" for c, n, _ in PATCHES])
def test_replaced_methods_are_called(
    cls: Any, name: str, use: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = []
    kind = type(inspect.getattr_static(cls, name))
    original = getattr(cls, name)
    original = getattr(original, "__func__", original)

    def patched(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(cls, name, kind(patched) if kind in (classmethod, staticmethod) else patched)
    use(tmp_path) if use is files else use()
    assert calls


def test_a_framework_makes_its_own_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """ms-swift and LLaMA-Factory take over the targets that they know and leave the rest to the original."""
    original, seen = peft.LoraModel._create_and_replace, []

    def patched(self: Any, lora_config: Any, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module, *args: Any, **kwargs: Any) -> None:  # fmt: skip
        seen.append(target_name)
        if target_name == "v_proj":
            parent.own = True
            return None
        return original(self, lora_config, adapter_name, target, target_name, parent, *args, **kwargs)

    monkeypatch.setattr(peft.LoraModel, "_create_and_replace", patched)
    model = adapted()
    block = model.base_model.model.model.layers[1]
    assert sorted(set(seen)) == sorted(TARGETS) and len(seen) == 6
    assert isinstance(block.self_attn.q_proj, BaseTunerLayer) and type(block.self_attn.v_proj) is nn.Linear
    assert block.self_attn.own


def test_a_framework_decides_what_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        BaseTuner, "_check_target_module_exists", staticmethod(lambda cfg, key: "layers.1.mlp.up" in key)
    )
    model = adapted()
    assert [n for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)] == [
        "base_model.model.model.layers.1.mlp.up_proj"
    ]


def test_parametrizations_add_the_delta() -> None:
    """axolotl replaces `_LoraParameterProxy.forward` by the plain sum that it is."""
    proxy, W = _LoraParameterProxy(torch.ones(2, 2)), torch.full((2, 2), 3.0)
    assert torch.equal(proxy(W), W + proxy.delta_weight)
