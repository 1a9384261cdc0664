"""LLaMA-Adapter: the formula, several adapters, freezing, and what upstream gets wrong."""

import copy
import pickle

import pytest
import torch
from tests.models.prompt_models import IDS, base, close

import peft
from peft import AdaptionPromptConfig, PeftModel
from peft.tuners import adaption_prompt
from peft.tuners.adaption_prompt import AdaptedAttention

OPTIONS = {"adapter_len": 3, "adapter_layers": 1, "task_type": "CAUSAL_LM"}


def filled(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator))
    return model


def adapted(net=None, **kwargs):
    net = base("llama") if net is None else net
    return filled(peft.get_peft_model(net, AdaptionPromptConfig(**{**OPTIONS, **kwargs})).eval())


def llama(**kwargs):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **kwargs)).eval()


@torch.no_grad()
def test_formula_with_an_explicit_head_dim():
    """Upstream derives the groups from the hidden size, which fails for an explicit head_dim."""
    model = adapted(llama(head_dim=6))
    wrapper = model.get_base_model().model.layers[1].self_attn
    assert isinstance(wrapper, AdaptedAttention)
    attention, x = wrapper.model, torch.randn(2, 5, 16)
    cos, sin = model.get_base_model().model.rotary_emb(x, torch.arange(5)[None])
    call = {"hidden_states": x, "position_embeddings": (cos, sin), "attention_mask": None}
    q = attention.q_proj(x).view(2, 5, 4, 6).transpose(1, 2)
    q = q * cos[:, None] + torch.cat((-q[..., 3:], q[..., :3]), -1) * sin[:, None]
    k, v = (p(wrapper.adaption_prompt).view(3, 2, 6).transpose(0, 1) for p in (attention.k_proj, attention.v_proj))
    heads = []
    for h in range(4):  # two query heads share a key head
        scores = (q[:, h] @ k[h // 2].T / 6**0.5).softmax(-1)
        heads.append(wrapper.adaption_gate * scores @ v[h // 2])
    expected = attention(**call)[0] + attention.o_proj(torch.cat(heads, -1))
    close(wrapper(**call)[0], expected)
    close(wrapper(x, (cos, sin), None)[0], expected)  # upstream takes keyword arguments only


def test_output_bias(monkeypatch):
    """Published adapters add the bias of the output projection twice; the paper's formula is one constant away."""
    net = llama(attention_bias=True)
    with torch.no_grad():
        for layer in net.model.layers:
            layer.self_attn.o_proj.bias.fill_(0.5)
    expected = net(input_ids=IDS).logits
    model = peft.get_peft_model(net, AdaptionPromptConfig(**OPTIONS)).eval()
    assert (model(input_ids=IDS).logits - expected).abs().max() > 1e-3
    monkeypatch.setattr(adaption_prompt, "OUTPUT_BIAS_TWICE", False)
    close(model(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_generation_with_cache_is_generation_without(name):
    model = adapted(base(name), adapter_layers=2)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": 2}
    cached = model.generate(input_ids=IDS.clip(min=3), **options)
    assert torch.equal(cached, model.generate(input_ids=IDS.clip(min=3), use_cache=False, **options))


def test_loading_freezes(tmp_path):
    """Upstream leaves both parameters trainable."""
    model = adapted()
    model.save_pretrained(tmp_path)
    expected = model(input_ids=IDS).logits
    loaded = PeftModel.from_pretrained(base("llama"), tmp_path)
    assert not any(p.requires_grad for p in loaded.parameters())
    close(loaded(input_ids=IDS).logits, expected)
    loaded = PeftModel.from_pretrained(base("llama"), tmp_path, is_trainable=True, adapter_name="other")
    assert sum(p.requires_grad for p in loaded.parameters()) == 2
    close(loaded(input_ids=IDS).logits, expected)


def test_several_adapters(tmp_path):
    model = adapted()
    plain = base("llama")(input_ids=IDS).logits
    first = model(input_ids=IDS).logits
    model.add_adapter("second", AdaptionPromptConfig(**{**OPTIONS, "adapter_layers": 2, "adapter_len": 2}))
    assert torch.equal(model(input_ids=IDS).logits, first)
    assert model.active_adapters == ["default"]
    model.set_adapter("second")
    close(model(input_ids=IDS).logits, plain)
    filled(model, 2)
    second = model(input_ids=IDS).logits
    assert sum(p.requires_grad for p in model.parameters()) == 4
    model.set_adapter("default")
    assert torch.equal(model(input_ids=IDS).logits, first)
    assert sum(p.requires_grad for p in model.parameters()) == 2
    model.set_adapter("default", inference_mode=True)  # upstream: ValueError
    assert not any(p.requires_grad for p in model.parameters())

    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base("llama"), tmp_path)
    again.load_adapter(tmp_path / "second", "second")
    assert torch.equal(again(input_ids=IDS).logits, first)
    again.set_adapter("second")
    close(again(input_ids=IDS).logits, second)

    with pytest.warns(UserWarning, match="Setting active adapter to second"):
        model.delete_adapter("default")
    close(model(input_ids=IDS).logits, second)
    model.delete_adapter("second")
    close(model(input_ids=IDS).logits, plain)
    model.add_adapter("third", AdaptionPromptConfig(**OPTIONS))  # upstream: the model is unusable now
    assert model.active_adapters == ["third"]
    assert sum(p.requires_grad for p in model.parameters()) == 2


def test_inactive_adapters_move_with_the_model():
    model = adapted()
    model.add_adapter("second", AdaptionPromptConfig(**OPTIONS))
    model.double()
    model.set_adapter("second")
    wrapper = model.get_base_model().model.layers[1].self_attn
    assert wrapper.adaption_prompt.dtype == torch.float64
    assert model(input_ids=IDS).logits.dtype == torch.float64


def test_disabling_and_unloading_restore_the_base():
    plain = base("llama")
    expected, state = plain(input_ids=IDS).logits, {k: v.clone() for k, v in plain.state_dict().items()}
    model = adapted(plain)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, expected)
    assert (model(input_ids=IDS).logits - expected).abs().max() > 1e-3
    found = peft.get_base_model_state_dict(model)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[k], state[k]) for k in state)
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        model.merge_and_unload()
    net = model.unload()
    assert net is plain
    assert net.state_dict().keys() == state.keys()
    assert torch.equal(net(input_ids=IDS).logits, expected)


def test_copies_and_checkpointing():
    model = adapted(adapter_layers=2)
    expected = model(input_ids=IDS).logits
    assert torch.equal(copy.deepcopy(model)(input_ids=IDS).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(input_ids=IDS).logits, expected)
    model(input_ids=IDS, labels=IDS).loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert len(grads) == 4
    model.zero_grad()
    model.train()
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(input_ids=IDS, labels=IDS).loss.backward()
    for name, p in model.named_parameters():
        if name in grads:
            close(p.grad, grads[name])


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="more adapter layers '3'"):
        adapted(adapter_layers=3)
    for wrong in ({"adapter_layers": 0}, {"adapter_layers": None}, {"adapter_len": 0}):  # upstream: 0 means all layers
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}`"):
            adapted(**wrong)
    with pytest.raises(ValueError, match="model type"):
        adapted(base("t5"))
    net = base("llama")
    with pytest.raises(ValueError, match=r"layers.0.mlp.*no attention of llama: they have no q_proj"):
        adapted(net, target_modules="mlp")
    assert all(p.requires_grad for p in net.parameters())
    assert not any(isinstance(m, AdaptedAttention) for m in net.modules())
    with pytest.raises(ValueError, match="inject_adapter_in_model"):
        peft.inject_adapter_in_model(AdaptionPromptConfig(**OPTIONS), base("llama"))
    model = adapted()
    with pytest.raises(TypeError, match="adaption prompt"):
        model.get_layer_status()
    with pytest.raises(ValueError, match="one active adapter"):
        model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="no adapter layers"):
        model(input_ids=IDS, adapter_names=["default", "default"])
    model.save_pretrained(tmp_path)
    net, config = base("llama"), AdaptionPromptConfig(**{**OPTIONS, "adapter_len": 4})
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(net, tmp_path, config=config)
    assert not any(isinstance(m, AdaptedAttention) for m in net.modules())
    assert all(p.requires_grad for p in net.parameters())


def test_published_addresses():
    from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG
    from peft.tuners.adaption_prompt.utils import llama_apply_rotary_pos_emb, llama_rotate_half

    assert set(TRANSFORMERS_MODEL_CONFIG) == {"llama", "mistral", "gpt2"}
    assert torch.equal(llama_rotate_half(torch.tensor([1.0, 2.0])), torch.tensor([-2.0, 1.0]))
    q, table = torch.randn(1, 2, 3, 4), torch.randn(1, 1, 9, 4)
    ids = torch.tensor([[4, 0, 2]])
    expected = llama_apply_rotary_pos_emb(q, table[0, :, ids[0]], table[0, :, ids[0]])
    assert torch.equal(llama_apply_rotary_pos_emb(q, table, table, ids), expected)


def test_switching():
    model = adapted().base_model
    assert model.active_adapter == ["default"]  # as with the other methods
    model.set_requires_grad(["default"], False)
    assert not any(p.requires_grad for p in model.parameters())
    model.set_requires_grad("default")
    assert [n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad] == [
        "adaption_prompt",
        "adaption_gate",
    ]
    with pytest.raises(ValueError, match=r"'defualt' does not exist; there are \['default'\]. Did you mean 'default'"):
        model.set_adapter("defualt")
    model.set_adapter("default")
    assert model.active_adapter == "default" and model.active_adapters == ["default"]
