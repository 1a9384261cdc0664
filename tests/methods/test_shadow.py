"""ShadowPEFT: the formula, generation, losses, files, the detached network, what upstream gets wrong."""

import copy
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tests.models.prompt_models import IDS, MASK, base, close

import peft
from peft import PeftModel, ShadowConfig
from peft.tuners.shadow import DetachedShadowModel, ShadowCache, ShadowLayer


def filled(model, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def adapted(name="llama", **kwargs):
    torch.manual_seed(0)
    options = {"task_type": "CAUSAL_LM", "r": 3, "shadow_alpha": 0.7, **kwargs}
    return filled(peft.get_peft_model(base(name), ShadowConfig(**options)).eval())


def run(model, **kwargs):
    return model(input_ids=IDS, attention_mask=MASK, **kwargs)


def logits(model, **kwargs):
    return run(model, **kwargs).logits


# ---- the maths


@torch.no_grad()
def test_formula():
    model = adapted(update_hidden_size=5)
    net, tuner = base("llama"), model.base_model
    embeds = net.get_input_embeddings()(IDS)
    states, layers = [], list(tuner.layers())
    network = tuner.shadow_backbone["default"]
    assert [n for n, _ in network.named_children()] == ["layers", "norm", "rotary_emb"]  # embeddings are shared
    states.append(network(inputs_embeds=embeds, attention_mask=MASK)[0])

    def before(i):
        def hook(module, args):
            s, layer = states[-1], layers[i]
            change = layer.shadow_up["default"](layer.shadow_down["default"](args[0] - s))
            return (args[0] + 0.7 * change, *args[1:])

        return hook

    def after(i):
        def hook(module, args, out):
            s, layer = states[-1], layers[i]
            g = layer.shadow_update_gate["default"](out).sigmoid()
            states.append((1 - g) * s + g * layer.shadow_update_transform["default"](out))

        return hook

    for i, block in enumerate(net.model.layers):
        block.register_forward_pre_hook(before(i))
        block.register_forward_hook(after(i))
    close(logits(model), logits(net))
    assert (logits(model) - logits(base("llama"))).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_starts_at_the_base_model_and_can_be_turned_off(name):
    expected = logits(base(name))
    model = peft.get_peft_model(base(name), ShadowConfig(task_type="CAUSAL_LM")).eval()
    close(logits(model), expected)
    filled(model)
    assert (logits(model) - expected).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    plain = model.unload()
    assert torch.equal(logits(plain), expected)
    assert not plain.model._forward_pre_hooks and not any(isinstance(m, ShadowLayer) for m in plain.modules())


@torch.no_grad()
@pytest.mark.parametrize("targets", [["layers.1"], ["layers.0"]])
def test_some_blocks(targets):
    model = adapted(target_modules=targets)
    assert list(model.base_model.named_layers()) == ["model." + targets[0]]
    assert (logits(model) - logits(base("llama"))).abs().max() > 1e-3


def test_layers_to_transform_holds_without_targets():
    """Upstream adapts all blocks."""
    model = adapted(layers_to_transform=[1])
    assert list(model.base_model.named_layers()) == ["model.layers.1"]
    assert model.peft_config["default"].target_modules == {"model.layers.1"}


def test_sizes_of_the_mirror():
    options = {"shadow_hidden_size": 8, "shadow_num_attention_heads": 2, "shadow_intermediate_size": 6}
    model = adapted(shadow_num_hidden_layers=3, **options)
    network = model.base_model.shadow_backbone["default"]
    shapes = {n: tuple(p.shape) for n, p in network.named_parameters()}
    assert len(network.layers) == 3
    assert shapes["embed_tokens.weight"] == (50, 8)  # another width: embeddings of its own
    assert shapes["layers.2.mlp.down_proj.weight"] == (8, 6)
    assert model.base_model.shadow_projection["default"].weight.shape == (16, 8)
    one_head = adapted(shadow_num_attention_heads=1)  # upstream: no query head for two key heads
    assert logits(one_head).shape == (2, 7, 50)


# ---- generation


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("llama", {"num_beams": 3}),
        ("llama", {"cache_implementation": "static"}),
        ("gemma2", {"cache_implementation": "static"}),  # a mask for each type of layer
    ],
)
def test_generation_with_cache_is_generation_without(name, options):
    model, inputs = adapted(name), {"input_ids": IDS, "attention_mask": MASK}
    length = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    found = model.generate(**inputs, **length, **options)
    beams = {k: v for k, v in options.items() if k == "num_beams"}
    assert torch.equal(found, model.generate(**inputs, **length, **beams, use_cache=False))


@torch.no_grad()
def test_cache():
    model = adapted()
    out = model(input_ids=IDS[:, :4], use_cache=True)
    cache = out.past_key_values
    assert isinstance(cache, ShadowCache)
    assert cache.get_seq_length() == cache.shadow.get_seq_length() == 4
    assert len(cache) == 2 and len(cache.shadow) == 1
    rest = model(input_ids=IDS[:, 4:], past_key_values=cache).logits
    close(rest, model(input_ids=IDS).logits[:, 4:])
    cache.crop(-2)
    assert (cache.base.get_seq_length(), cache.shadow.get_seq_length()) == (5, 5)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 1, 3]))
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    assert {c.layers[0].keys.shape[0] for c in (cache.base, cache.shadow)} == {3}
    assert not cache.is_compileable
    copied = copy.deepcopy(cache)
    cache.crop(-2)
    assert [c.layers[0].keys.shape[2] for c in (cache, cache.shadow, copied, copied.shadow)] == [3, 3, 5, 5]
    with pytest.raises(NotImplementedError, match="no form as tuples"):
        cache.to_legacy_cache()
    with model.disable_adapter():
        filled_alone = model(input_ids=IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="filled without the shadow network"):
        model(input_ids=IDS, past_key_values=filled_alone)


# ---- training


def test_causal_loss():
    model = adapted(auxiliary_loss_weight=0.3)
    labels = IDS.masked_fill(MASK == 0, -100)
    out = run(model, labels=labels)
    expected_start = model.base_model.shadow_backbone["default"](
        inputs_embeds=base("llama").get_input_embeddings()(IDS), attention_mask=MASK
    )[0]
    aux = F.cross_entropy(base("llama").lm_head(expected_start)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    main = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    close(out.loss, main + 0.3 * aux)
    close(out.shadow_loss, aux.detach())
    assert model.last_shadow_loss is out.shadow_loss
    assert "shadow_loss" not in out  # evaluation loops would take an entry for logits
    close(run(model, labels=labels, return_dict=False)[0], out.loss)
    out.loss.backward()
    none = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert none and all("layers.1.shadow_update" in n for n in none)  # the last state is not used
    off = adapted(auxiliary_loss_weight=0.0)
    close(run(off, labels=labels).loss, main)
    assert off.last_shadow_loss is None


def test_attribute_exists_before_the_first_forward():
    assert adapted().base_model.last_shadow_loss is None


@pytest.mark.parametrize("task", [None, "FEATURE_EXTRACTION"])
def test_other_tasks_have_no_loss_of_their_own(task):
    model = adapted(task_type=task)
    out = run(model, labels=IDS)
    close(out.loss, F.cross_entropy(out.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()))
    assert model.base_model.last_shadow_loss is None


def test_regression_on_embeddings():
    """One label is a number; without ids the last position counts, as in transformers."""
    net = base("llama_cls")
    net.score, net.num_labels, net.config.num_labels = torch.nn.Linear(16, 1, bias=False), 1, 1
    embeds, labels = net.get_input_embeddings()(IDS).detach(), torch.tensor([0.5, -1.0])
    model = filled(peft.get_peft_model(net, ShadowConfig(task_type="SEQ_CLS", r=3, auxiliary_loss_weight=0.5)).eval())
    out = model(inputs_embeds=embeds, labels=labels)
    start = model.base_model.shadow_backbone["default"](inputs_embeds=embeds)[0]
    aux = model.base_model.shadow_head["default"](start)[:, -1, 0]
    close(out.loss, F.mse_loss(out.logits[:, 0], labels) + 0.5 * F.mse_loss(aux, labels))


@pytest.mark.parametrize("labels", [torch.tensor([0, 2]), torch.rand(2, 3)])
def test_classification(labels):
    model = adapted("llama_cls", task_type="SEQ_CLS", auxiliary_loss_weight=0.5)
    out = run(model, labels=labels)
    start = model.base_model.shadow_backbone["default"](
        inputs_embeds=base("llama_cls").get_input_embeddings()(IDS), attention_mask=MASK
    )[0]
    aux_logits = model.base_model.shadow_head["default"](start)[:, -1]
    loss = F.binary_cross_entropy_with_logits if labels.is_floating_point() else F.cross_entropy
    close(out.loss, loss(out.logits, labels) + 0.5 * loss(aux_logits, labels))
    trained = [n for n, p in model.named_parameters() if p.requires_grad and "head" in n or "score.modules" in n]
    assert trained == ["base_model.model.score.modules_to_save.default.weight", "base_model.shadow_head.default.weight"]
    with pytest.raises(ValueError, match="sequence classification"):
        model.add_adapter("second", ShadowConfig(task_type="SEQ_CLS"))


def test_checkpointing_gives_the_same_gradients():
    found = []
    for kind in ("none", "model", "outside"):
        model = adapted(shadow_dropout=0.0).train()
        if kind == "model":
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        if kind == "outside":  # also the wrappers are recomputed
            for i, layer in enumerate(model.get_base_model().model.layers):
                plain = layer.forward

                def recomputed(*args, plain=plain, **kwargs):
                    return torch.utils.checkpoint.checkpoint(plain, *args, use_reentrant=False, **kwargs)

                model.get_base_model().model.layers[i].forward = recomputed
        out = run(model, labels=IDS, use_cache=False)
        out.loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert model.base_model.switch.call.shadow.before == {}  # nothing is kept after backward
    assert len(found[0]) > 15
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, grad in other.items():
            close(grad, found[0][name])


def test_training_reduces_the_loss():
    model = peft.get_peft_model(base("llama"), ShadowConfig(task_type="CAUSAL_LM", r=4, shadow_alpha=1.0)).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = run(model, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


# ---- adapters and files


@torch.no_grad()
def test_save_and_load(tmp_path):
    model = adapted(shadow_hidden_size=8)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    prefixes = {k.split(".default.")[0] for k in state}
    assert "base_model.shadow_projection" in prefixes and "base_model.model.model.layers.0.shadow_down" in prefixes
    assert all(".default." in k for k in state)
    assert torch.equal(logits(PeftModel.from_pretrained(base("llama"), tmp_path)), expected)
    other = PeftModel.from_pretrained(base("llama"), tmp_path, adapter_name="other", is_trainable=True)
    assert torch.equal(logits(other.eval()), expected)
    assert peft.get_peft_model_state_dict(other, adapter_name="other").keys() == state.keys()
    assert sum(p.requires_grad for p in other.parameters()) == len(state)
    lazy = PeftModel.from_pretrained(base("llama"), tmp_path, low_cpu_mem_usage=True)  # upstream fails
    assert torch.equal(logits(lazy), expected)
    assert not any(p.requires_grad for p in lazy.parameters())


@torch.no_grad()
def test_several_adapters():
    model = adapted()
    first = logits(model)
    model.add_adapter("second", ShadowConfig(task_type="CAUSAL_LM", r=2, target_modules=["layers.1"]))
    model.eval()
    assert torch.equal(logits(model), first)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "second" in n)
    model.set_adapter("second")
    close(logits(model), logits(base("llama")))
    filled(model)
    second = logits(model)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".default" in n)
    with pytest.raises(ValueError, match="one active adapter"):
        model.base_model.set_adapter(["default", "second"])
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    with pytest.warns(UserWarning, match="Setting active adapter to second"):
        model.delete_adapter("default")
    assert torch.equal(logits(model), second)
    assert list(model.base_model.shadow_backbone) == ["second"]


@torch.no_grad()
def test_copies_status_and_dtypes():
    model = adapted()
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)
    status = model.get_model_status()
    assert (status.num_adapter_layers, status.active_adapters) == (2, ["default"])
    half = peft.get_peft_model(base("llama").bfloat16(), ShadowConfig(task_type="CAUSAL_LM")).eval()
    dtypes = {n.split(".default")[0].split(".")[-1]: p.dtype for n, p in half.named_parameters() if ".default" in n}
    assert dtypes["shadow_down"] == torch.float32 and dtypes["shadow_backbone"] == torch.bfloat16
    assert logits(filled(half)).dtype == torch.bfloat16


def test_merging_is_refused_and_harmless():
    """Upstream turns the adapter off before it raises."""
    model = adapted()
    expected = logits(model)
    for call in (model.merge_adapter, model.merge_and_unload, model.base_model.merge_and_unload):
        with pytest.raises(NotImplementedError, match="cannot be merged"):
            call()
    assert torch.equal(logits(model), expected)


def test_autocast():
    model = adapted()
    want = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        got = logits(model)
    torch.testing.assert_close(got.float(), want, rtol=5e-2, atol=5e-2)


def test_excluded_blocks_are_left_alone():
    assert list(adapted(exclude_modules=["layers.0"]).base_model.holders("default")) == ["model.layers.1"]
    assert list(adapted(layers_to_transform=0).base_model.holders("default")) == ["model.layers.0"]


def test_errors():
    with pytest.raises(ValueError, match="shadow_hidden_size"):
        ShadowConfig(shadow_model="some/model", shadow_hidden_size=8)
    with pytest.raises(ValueError, match="layers_pattern"):
        ShadowConfig(layers_pattern="layers")
    with pytest.raises(ValueError, match="layers_to_transform"):
        ShadowConfig(target_modules="layers.0", layers_to_transform=0)
    with pytest.raises(ValueError, match="`r`"):
        adapted(r=0)
    with pytest.raises(ValueError, match="`auxiliary_loss_weight` must not be negative, got -1"):
        adapted(auxiliary_loss_weight=-1)
    with pytest.raises(ValueError, match="no transformer block"):
        adapted(target_modules=["q_proj"])
    with pytest.raises(AttributeError, match="no transformer blocks"):
        adapted("bert", task_type=None)
    model = adapted()
    with pytest.raises(ValueError, match="Mixed batches"):
        run(model, adapter_names=["default", "__base__"])
    with pytest.raises(ValueError, match="inject_adapter_in_model"):
        peft.inject_adapter_in_model(ShadowConfig(), base("llama"))


# ---- pretrained and detached networks


@torch.no_grad()
def test_pretrained_shadow(tmp_path):
    small = base("llama").model
    small.save_pretrained(tmp_path / "small")
    model = adapted("mistral", shadow_model=str(tmp_path / "small"))
    network = model.base_model.shadow_backbone["default"]
    embeddings = network.embed_tokens.weight
    assert not embeddings.requires_grad and torch.equal(embeddings, small.embed_tokens.weight)
    assert network.layers[0].mlp.up_proj.weight.requires_grad
    assert (logits(model) - logits(base("mistral"))).abs().max() > 1e-3


@torch.no_grad()
def test_pretrained_shadow_with_projection(tmp_path):
    from transformers import LlamaConfig, LlamaModel

    sizes = {"vocab_size": 50, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    small = LlamaModel(config)
    values = {"model_type": "causal_lm_with_hidden_projection", "shadow_model_config": config.to_dict()}
    (tmp_path / "config.json").write_text(json.dumps(values))
    weights = {f"shadow_model.{k}": v.clone() for k, v in small.state_dict().items()}
    projection = torch.randn(16, 8)
    save_file({**weights, "shadow_hidden_projection.weight": projection}, tmp_path / "model.safetensors")
    torch.manual_seed(0)
    model = peft.get_peft_model(base("llama"), ShadowConfig(task_type="CAUSAL_LM", shadow_model=str(tmp_path)))
    tuner = model.base_model
    assert torch.equal(tuner.shadow_projection["default"].weight, projection)
    assert all(torch.equal(v, small.state_dict()[k]) for k, v in tuner.shadow_backbone["default"].state_dict().items())
    save_file({**weights, "shadow_hidden_projection.weight": projection[:4].clone()}, tmp_path / "model.safetensors")
    net = base("llama")
    with pytest.raises(ValueError, match=r"shape \(4, 8\), the base model needs \(16, 8\)"):
        peft.get_peft_model(net, ShadowConfig(task_type="CAUSAL_LM", shadow_model=str(tmp_path)))
    assert not any(isinstance(m, ShadowLayer) for m in net.modules()) and not net.model._forward_hooks


@torch.no_grad()
@pytest.mark.parametrize("sizes", [{}, {"shadow_hidden_size": 8}])
def test_detached(sizes, tmp_path):
    model = adapted(**sizes)
    tuner = model.base_model
    network, project = tuner.shadow_backbone["default"], tuner.shadow_projection["default"]
    inputs = {"input_ids": IDS} if sizes else {"inputs_embeds": base("llama").get_input_embeddings()(IDS)}
    expected = base("llama").lm_head(project(network(**inputs, attention_mask=MASK)[0]))
    alone, copied = model.unload_shadow(), model.unload_shadow(copy=True)
    assert isinstance(alone, DetachedShadowModel) and alone.backbone is network and copied.backbone is not network
    for one in (alone, copied):
        close(logits(one), expected)
        found = one.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert torch.equal(
            found,
            one.generate(
                input_ids=IDS, attention_mask=MASK, max_new_tokens=3, min_new_tokens=3, do_sample=False, use_cache=False
            ),
        )
    assert ("backbone.embed_tokens.weight" in alone.state_dict()) is bool(sizes)
    assert "backbone.embed_tokens.weight" in copied.state_dict() and "head.weight" in copied.state_dict()
    assert ("shadow_hidden_projection.weight" in copied.state_dict()) is bool(sizes)
    copied.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == copied.state_dict().keys()
    with pytest.raises(ValueError, match="No shadow backbone"):
        model.unload_shadow("other")
    classifier = adapted("llama_cls", task_type="SEQ_CLS").unload_shadow()
    assert classifier(input_ids=IDS, attention_mask=MASK).logits.shape == (2, 3)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval()


@torch.no_grad()
def test_embeddings_of_a_detached_network():
    for net in (base("llama"), gpt2()):
        model = filled(peft.get_peft_model(net, ShadowConfig(task_type="CAUSAL_LM", r=3)).eval())
        shared, copied = model.unload_shadow(), model.unload_shadow(copy=True)
        assert shared.get_input_embeddings() is net.get_input_embeddings()
        assert shared.get_output_embeddings() is net.get_output_embeddings()
        own = copied.get_input_embeddings()
        assert own is copied.backbone.get_input_embeddings() and own is not net.get_input_embeddings()
        assert torch.equal(own.weight, net.get_input_embeddings().weight)
        close(copied(input_ids=IDS).logits, shared(input_ids=IDS).logits)
    alone = adapted(shadow_hidden_size=8).unload_shadow()
    assert alone.get_input_embeddings() is alone.backbone.embed_tokens
    assert adapted("llama_cls", task_type="SEQ_CLS").unload_shadow().get_output_embeddings() is None
    headless = peft.get_peft_model(base("llama").model, ShadowConfig())
    with pytest.raises(ValueError, match="LlamaModel has no output embeddings"):
        headless.unload_shadow()


@torch.no_grad()
def test_pretrained_shadow_in_parts(tmp_path):
    """A checkpoint with a projection, in several files; what it lacks is named."""
    small = base("llama").model
    values = {"model_type": "causal_lm_with_hidden_projection", "shadow_model_config": small.config.to_dict()}
    (tmp_path / "config.json").write_text(json.dumps(values))
    weights = {f"shadow_model.{k}": v.clone() for k, v in small.state_dict().items()}
    lost, names = "shadow_model.norm.weight", sorted(weights)
    weights["shadow_hidden_projection.weight"] = torch.eye(16)
    parts = {"a.safetensors": names[::2], "b.safetensors": [*names[1::2], "shadow_hidden_projection.weight"]}
    for file, keys in parts.items():
        save_file({k: weights[k] for k in keys}, tmp_path / file)
    index = {"weight_map": {k: file for file, keys in parts.items() for k in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    config = ShadowConfig(task_type="CAUSAL_LM", shadow_model=str(tmp_path))
    network = peft.get_peft_model(base("llama"), config).base_model.shadow_backbone["default"]
    assert all(torch.equal(v, small.state_dict()[k]) for k, v in network.state_dict().items())
    file = next(f for f, keys in parts.items() if lost in keys)
    save_file({k: weights[k] for k in parts[file] if k != lost}, tmp_path / file)
    with pytest.raises(ValueError, match=r"lacks the weights \['norm.weight'\]\."):
        peft.get_peft_model(base("llama"), config)


def test_sizes_of_windows_shrink_with_the_mirror():
    from transformers import Qwen2Config

    from peft.tuners.shadow.backbone import mirror_config

    whole = Qwen2Config(num_hidden_layers=6, max_window_layers=4, use_sliding_window=True)
    made = mirror_config(ShadowConfig(shadow_num_hidden_layers=3), whole)
    assert (made.num_hidden_layers, made.max_window_layers, len(made.layer_types)) == (3, 3, 3)
    assert (whole.num_hidden_layers, whole.max_window_layers, len(whole.layer_types)) == (6, 4, 6)


def test_switching_gradients():
    model = adapted()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    model.set_requires_grad("default", False)
    assert not any(p.requires_grad for p in model.parameters())
    model.set_requires_grad(["default"])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained


def test_states_that_are_gone_or_do_not_fit():
    model = adapted()
    model.get_base_model().enable_input_require_grads()
    layer = model.get_base_model().model.layers[1]
    plain = layer.forward
    layer.forward = lambda x, **kwargs: torch.utils.checkpoint.checkpoint(
        lambda x: plain(x, **kwargs), x, use_reentrant=True
    )
    out = run(model, labels=IDS, use_cache=False)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        out.loss.backward()
    model = adapted()
    run(model)  # with gradients: the states are kept for backward
    with pytest.raises(
        ValueError, match=r"state has shape \(2, 7, 16\), but the block got hidden states of \(2, 5, 16\)"
    ):
        model.get_base_model().model.layers[0](torch.zeros(2, 5, 16))


@torch.no_grad()
def test_blocks_called_with_keywords():
    model = adapted()
    want = logits(model)
    for layer in model.base_model.layers():
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: ((), {**kwargs, "hidden_states": args[0]}), with_kwargs=True
        )
    assert torch.equal(logits(model), want)
