"""X-LoRA: the mixture, files, generation, what upstream gets wrong, and a small task that it really learns."""

import copy
import json
import pickle
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.prompt_models import IDS, base, close

import peft
from peft import LoraConfig, PeftModel, XLoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer


def net():
    model = base("llama")
    model.config.use_cache = False
    return model


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Two experts of different rank, layers and scaling."""
    folder, found = tmp_path_factory.mktemp("experts"), {}
    for i, (name, options) in enumerate(
        {
            "math": {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 3},
            "code": {"r": 3, "target_modules": ["q_proj", "down_proj", "embed_tokens"], "lora_alpha": 6},
        }.items()
    ):
        model = peft.get_peft_model(net(), LoraConfig(task_type="CAUSAL_LM", **options))
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.4 * torch.randn(p.shape, generator=generator))
        model.save_pretrained(folder / name, save_embedding_layers=False)
        found[name] = str(folder / name)
    return found


def adapted(experts, seed=3, size=1.0, **kwargs):
    options = {"task_type": "CAUSAL_LM", "hidden_size": 16, "adapters": dict(experts), **kwargs}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(net(), XLoraConfig(**options)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.base_model.internal_xlora_classifier.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator))
    return model


def logits(model, **kwargs):
    return model(input_ids=IDS, **kwargs).logits


def by_hand(model, S, factor=1.0):
    """The base model with every expert's output weighted token by token, in hooks."""
    plain, handles = net(), []
    lora, sources = model.base_model.lora_model, dict(model.base_model.named_layers())
    for i, (key, layer) in enumerate(sources.items()):

        def hook(module, args, out, layer=layer, i=i):
            for e, name in enumerate(("code", "math")):
                if name not in layer:
                    continue
                A, B, s, _ = layer.factors(name)
                low = A.T[args[0]] if isinstance(module, torch.nn.Embedding) else args[0] @ A.T
                out = out + factor * S[:, :, i, e, None] * s * (low @ B.T)
            return out

        handles.append(plain.get_submodule(key).register_forward_hook(hook))
    assert list(lora.peft_config) == ["code", "math"]  # sorted, since a file does not keep their order
    return plain(input_ids=IDS).logits


# ---- the maths


@torch.no_grad()
@pytest.mark.parametrize("layerwise", [False, True])
def test_formula(experts, layerwise):
    """Names of experts are free (upstream: KeyError), layers may lack some of them."""
    model = adapted(experts, layerwise_scalings=layerwise, softmax_temperature=2.0, global_scaling_weight=1.5)
    out = logits(model)
    hidden = net()(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
    layer = model.base_model.internal_xlora_classifier.layers[0]
    assert layer.weight.shape == (2 * 7 if layerwise else 2, 16)
    S = (layer(hidden).view(2, 7, -1, 2) / 2.0).softmax(-1).expand(-1, -1, 7, -1)
    close(model.get_latest_scalings(), S)
    close(out, by_hand(model, S, 1.5))
    assert (out - logits(net())).abs().max() > 1e-2


@torch.no_grad()
def test_expert_dropout_and_bias_take_the_general_path(experts, tmp_path):
    expert = peft.get_peft_model(
        net(), LoraConfig(target_modules=["q_proj"], r=2, lora_dropout=0.5, init_lora_weights=False)
    )
    expert.save_pretrained(tmp_path)
    model = adapted({"a": str(tmp_path)})
    expected = logits(model)
    layer = model.base_model.layers()[0]
    layer.lora_A["a"].register_forward_hook(lambda *_: None)  # hooked factors must be called as modules
    close(logits(model), expected)
    model.train()
    torch.manual_seed(0)
    assert (logits(model) - expected).abs().max() > 1e-3


@torch.no_grad()
def test_top_k(experts):
    model = adapted(experts)
    logits(model)
    S = model.get_latest_scalings()
    model.set_topk_lora(1)
    first = S.argmax(-1, keepdim=True)
    close(logits(model), by_hand(model, torch.zeros_like(S).scatter(-1, first, S.gather(-1, first))))
    assert torch.equal(model.get_latest_scalings(), S)  # before top-k
    model.base_model.xlora_config.enable_softmax_topk = True
    close(logits(model), by_hand(model, torch.zeros_like(S).scatter(-1, first, 1.0)))
    model.set_topk_lora(None)  # one more softmax over all of them, as published
    close(logits(model), by_hand(model, S.softmax(-1)))


@torch.no_grad()
def test_scaling_pass_value(experts):
    model = adapted(experts)
    model.set_scaling_pass_value(None)
    out = logits(model)
    S = model.get_latest_scalings()
    close(out, by_hand(model, S))
    plain = net()
    model.set_scaling_pass_value(0.0)
    logits(model)
    assert (model.get_latest_scalings() - S).abs().max() > 1e-3
    hidden = plain(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
    close(model.get_latest_scalings(), model.internal_xlora_classifier(hidden))


@torch.no_grad()
def test_first_pass_computes_no_head_and_no_experts(experts):
    model, calls = adapted(experts), []
    core = model.get_base_model()
    layer = core.model.layers[0].self_attn.q_proj
    layer.base_layer.register_forward_hook(lambda *_: calls.append("base"))
    core.lm_head.register_forward_hook(lambda *_: calls.append("head"))
    layer.lora_A["math"].register_forward_hook(lambda *_: calls.append("expert"))
    logits(model)
    assert sorted(calls) == ["base", "base", "expert", "head"]
    calls.clear()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(net()))
    assert sorted(calls) == ["base", "head"]


@torch.no_grad()
def test_every_entrance_is_mixed(experts):
    model = adapted(experts)
    expected = logits(model)
    close(model.base_model(input_ids=IDS).logits, expected)
    close(model.get_base_model()(IDS).logits, expected)
    close(logits(adapted(experts, task_type=None)), expected)
    embeds = net().get_input_embeddings()(IDS)
    assert model(inputs_embeds=embeds).logits.shape == expected.shape
    close(model(input_ids=IDS, logits_to_keep=1).logits, expected[:, -1:])
    flat = copy.deepcopy(model)  # as mixtures of experts give tokens to their layers
    mlp, shape = flat.get_base_model().model.layers[1].mlp, (*IDS.shape, 16)
    forward = mlp.forward
    mlp.forward = lambda x: forward(x.flatten(0, 1)).view(shape)
    close(logits(flat), expected)
    mlp.forward = lambda x: forward(x[:1]).expand(shape)
    with pytest.raises(ValueError, match=r"for 2 x 7 tokens, but an adapted layer got an input of shape \(1, 7,"):
        logits(flat)


# ---- use


@torch.no_grad()
def test_generation(experts):
    model, ids = adapted(experts), IDS.clip(min=3)
    found = model.generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    expected = ids
    for _ in range(4):
        step = model(input_ids=expected).logits[:, -1]
        step[:, 2] = -torch.inf  # no end
        expected = torch.cat([expected, step.argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, expected)
    assert model.generate(input_ids=ids, max_new_tokens=3, num_beams=2).shape[0] == 2
    with pytest.raises(RuntimeError, match="use_cache=False"):
        model.get_base_model().generate(input_ids=ids, max_new_tokens=3, use_cache=True)


@torch.no_grad()
def test_log(experts):
    model = adapted(experts)
    model.enable_scalings_logging()
    logits(model)
    model(input_ids=IDS[:, :3])
    logits(model)
    model.disable_scalings_logging()
    logits(model)
    log = model.get_scalings_log()
    assert [tuple(S.shape) for S in log] == [(2, 7, 7, 2), (2, 3, 7, 2), (2, 7, 7, 2)]
    buckets = model.get_bucketed_scalings_log()
    assert {n: positions for n, (positions, _) in buckets.items()} == {7: [0, 2], 3: [1]}
    assert torch.equal(buckets[3][1][0], log[1])
    model.clear_scalings_log()
    assert model.get_scalings_log() == []


def test_gradients_reach_the_classifier_only(experts):
    model = adapted(experts, xlora_depth=2, xlora_size=8, xlora_dropout_p=0.0).train()
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained == [
        f"base_model.internal_xlora_classifier.layers.{i}.{n}" for i in (0, 2) for n in ("weight", "bias")
    ]
    model(input_ids=IDS, labels=IDS).loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert list(grads) == trained
    model.zero_grad()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model(input_ids=IDS, labels=IDS).loss.backward()
    for name, p in model.named_parameters():
        if name in grads:
            close(p.grad, grads[name])


@torch.no_grad()
def test_copies_and_unloading(experts):
    model = adapted(experts)
    expected = logits(model)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)
    other.internal_xlora_classifier.layers[0].bias += torch.tensor([3.0, -3.0])
    assert (logits(other) - expected).abs().max() > 1e-3
    assert torch.equal(logits(model), expected)
    plain = model.unload()
    assert not any(isinstance(m, LoraLayer) for m in plain.modules())
    assert torch.equal(logits(plain), logits(net()))
    adapted_again = peft.get_peft_model(plain, XLoraConfig(hidden_size=16, adapters=experts))
    assert len(adapted_again.base_model.layers()) == 7


# ---- files


def test_columns_do_not_depend_on_the_order_of_the_dict(experts):
    places = dict.fromkeys(("10", "b", "2", "a"), experts["math"])
    model = adapted(places)
    assert list(model.base_model.xlora_config.adapters) == list(model.base_model.switch.active) == ["2", "10", "a", "b"]


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("names", [("0", "1"), ("math", "code")])
def test_save_and_load(experts, tmp_path, depth, names):
    """Upstream drops the layers of the classifier whose number is the name of an expert."""
    places = dict(zip(names, experts.values(), strict=True))
    model = adapted(places, xlora_depth=depth, xlora_size=8)
    model.set_topk_lora(1)  # upstream does not save what the setters change
    model.set_global_scaling_weight(0.7)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert len(state) == 2 * depth
    assert all(k.startswith("base_model.internal_xlora_classifier.layers.") for k in state)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(classifier|missing).*")
        again = PeftModel.from_pretrained(net(), tmp_path)
    assert again.get_global_scaling_weight() == 0.7
    assert torch.equal(logits(again), logits(model))
    assert not any(p.requires_grad for p in again.parameters())
    moved = PeftModel.from_pretrained(net(), tmp_path, adapters=places, is_trainable=True, adapter_name="other")
    assert sum(p.requires_grad for p in moved.parameters()) == 2 * depth


@torch.no_grad()
def test_incomplete_published_files_load_with_a_warning(experts, tmp_path):
    model = adapted(experts, xlora_depth=2, xlora_size=8)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    kept = {k: v for k, v in state.items() if ".layers.3." in k}
    save_file(kept, tmp_path / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match="2 of the 4 tensors of the X-LoRA classifier"):
        again = PeftModel.from_pretrained(net(), tmp_path)
    assert torch.equal(
        again.internal_xlora_classifier.layers[3].weight, model.internal_xlora_classifier.layers[3].weight
    )


@torch.no_grad()
def test_trained_experts_are_saved(experts, tmp_path):
    model = adapted(experts, use_trainable_adapters=True)
    trained = [n for n, p in model.named_parameters() if p.requires_grad and ".lora_" in n]
    assert len(trained) == 2 * (4 + 2 + 2 + 1)
    for name, p in model.named_parameters():
        if name in trained:
            p.mul_(1.3)
    expected = logits(model)
    model.save_pretrained(tmp_path / "first")
    assert json.loads((tmp_path / "first" / "adapter_config.json").read_text())["adapters"] == {
        "math": "experts/math",
        "code": "experts/code",
    }
    (tmp_path / "first").rename(tmp_path / "second")  # places are relative
    assert torch.equal(logits(PeftModel.from_pretrained(net(), tmp_path / "second")), expected)
    alone = PeftModel.from_pretrained(net(), tmp_path / "second" / "experts" / "math")
    assert alone.peft_config["default"].peft_type == "LORA"


# ---- errors


def test_architectures_without_an_attribute_called_model(tmp_path):
    """Upstream cuts prefixes off the keys of experts until they start with `model.`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def gpt2():
        torch.manual_seed(0)
        sizes = {"vocab_size": 20, "n_embd": 16, "n_layer": 1, "n_head": 4, "n_positions": 16, "use_cache": False}
        return GPT2LMHeadModel(GPT2Config(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2))

    options = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True, "init_lora_weights": False}
    expert = peft.get_peft_model(gpt2(), LoraConfig(**options))
    expert.save_pretrained(tmp_path)
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=16, adapters={"any name": str(tmp_path)}, xlora_depth=1)
    model = peft.get_peft_model(gpt2(), config).eval()
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():  # a single expert has the weight 1
        close(model(input_ids=ids).logits, expert.eval()(input_ids=ids).logits)


def test_errors(experts, tmp_path):
    with pytest.raises(ValueError, match="use_cache"):
        peft.get_peft_model(base("llama"), XLoraConfig(hidden_size=16, adapters=experts))
    with pytest.raises(ValueError, match="xlora_depth"):
        adapted(experts, xlora_depth=0)
    with pytest.raises(ValueError, match="`softmax_temperature` must not be 0"):
        adapted(experts, softmax_temperature=0)
    with pytest.raises(ValueError, match="at least one expert"):
        adapted({})
    with pytest.raises(ValueError, match="no_such_folder"):
        adapted({"a": "no_such_folder"})
    with pytest.warns(UserWarning, match="4096"):
        XLoraConfig(adapters=experts)
    with pytest.warns(UserWarning, match="adapters"):
        XLoraConfig(hidden_size=16)
    model = adapted(experts)
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError, match="cannot be merged"):
            call()
    with pytest.raises(ValueError, match="adapter_names"):
        model(input_ids=IDS, adapter_names=["default", "__base__"])
    with pytest.raises(ValueError, match="only one X-LoRA"):
        model.add_adapter("second", XLoraConfig(hidden_size=16, adapters=experts))
    with pytest.raises(ValueError, match="unload"):
        model.delete_adapter("default")
    dora = peft.get_peft_model(net(), LoraConfig(target_modules=["q_proj"], use_dora=True))
    dora.save_pretrained(tmp_path)
    model = net()
    names = [n for n, _ in model.named_modules()]
    with pytest.raises(ValueError, match="plain LoRA"):
        peft.get_peft_model(model, XLoraConfig(hidden_size=16, adapters={**experts, "dora": str(tmp_path)}))
    assert [n for n, _ in model.named_modules()] == names
    assert not hasattr(model, "peft_config")
    assert all(p.requires_grad for p in model.parameters())


# ---- learning


def test_learns_to_choose_the_expert_by_the_input(tmp_path):
    """Expert "up" continues sequences by +1, expert "down" by -3. The first token says which rule holds; only the
    classifier can connect it with an expert.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    V, generator = 12, torch.Generator().manual_seed(1)

    def model():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
        return LlamaForCausalLM(LlamaConfig(vocab_size=V + 2, use_cache=False, initializer_range=0.2, **sizes))

    def batch(steps):
        start = torch.randint(0, V, (len(steps), 1), generator=generator)
        return (start + steps[:, None] * torch.arange(6)) % V

    def run(model, markers, rows):
        ids = torch.cat([markers[:, None], rows], 1)
        out = model(input_ids=ids, labels=torch.where(torch.arange(7) < 2, -100, ids))
        return out.loss, float((out.logits[:, 1:-1].argmax(-1) == ids[:, 2:]).float().mean())

    def train(model, count, lr, draw):
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
        for _ in range(count):
            optimizer.zero_grad()
            run(model.train(), *draw())[0].backward()
            optimizer.step()
        return model.eval()

    def both_rules():
        steps = torch.where(torch.rand(24, generator=generator) < 0.5, 1, -3)
        return torch.where(steps > 0, V, V + 1), batch(steps)

    config = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 16, "target_modules": "all-linear"}
    alone = []
    for name, step in (("up", 1), ("down", -3)):
        expert = peft.get_peft_model(model(), LoraConfig(**config))

        def any_marker(step=step):
            return torch.randint(V, V + 2, (24,), generator=generator), batch(torch.full((24,), step))

        train(expert, 50, 1e-2, any_marker)
        with torch.no_grad():
            assert run(expert, *any_marker())[1] > 0.95
            alone.append(run(expert, *both_rules())[1])
        expert.save_pretrained(tmp_path / name)
    adapters = {name: str(tmp_path / name) for name in ("up", "down")}
    mixed = peft.get_peft_model(
        model(), XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=adapters, xlora_depth=2, xlora_size=32)
    )
    train(mixed, 40, 2e-2, both_rules)
    mixed.save_pretrained(tmp_path / "mixed")
    again = PeftModel.from_pretrained(model(), tmp_path / "mixed")
    markers, rows = both_rules()
    with torch.no_grad():
        loss, accuracy = run(again, markers, rows)
        S = again.get_latest_scalings()[:, 2:, 0]  # [b, t, experts]
    assert max(alone) < 0.8
    assert accuracy > 0.95, (accuracy, float(loss), alone)
    assert (S.argmax(-1) == (V + 1 - markers)[:, None]).float().mean() > 0.9


def test_only_its_own_configuration_is_loaded_beside_it(experts, tmp_path):
    get_peft_model(net(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="Expected 'XLoraConfig', got 'LoraConfig' instead"):
        PeftModel.from_pretrained(adapted(experts), tmp_path)


# ---- entrances, places and targets that are less common


@torch.no_grad()
def test_generation_of_the_tuner_leaves_the_cache_alone(experts):
    model, options = adapted(experts), {"input_ids": IDS.clip(min=3), "max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.base_model.generate(**options, use_cache=True), model.generate(**options))


@torch.no_grad()
def test_a_model_without_a_head(tmp_path):
    """The first pass reads the model itself, past the hooks."""
    torch.manual_seed(0)
    options = {"target_modules": ["q_proj"], "r": 2, "init_lora_weights": False}
    peft.get_peft_model(net().model, LoraConfig(**options)).save_pretrained(tmp_path)
    experts = {"a": str(tmp_path), "b": str(tmp_path)}
    config = XLoraConfig(task_type="FEATURE_EXTRACTION", hidden_size=16, adapters=experts)
    model = peft.get_peft_model(net().model, config).eval()
    found = model(input_ids=IDS).last_hidden_state
    S = model.internal_xlora_classifier(net().model(input_ids=IDS).last_hidden_state)
    close(model.get_latest_scalings(), S)
    assert (found - net().model(input_ids=IDS).last_hidden_state).abs().max() > 1e-2


def test_experts_in_folders_of_a_repository(experts, monkeypatch):
    asked = []

    def download(repo_id, filename, subfolder=None, **kwargs):
        asked.append((repo_id, subfolder))
        return f"{experts['math']}/{filename}"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.file_exists", lambda *args, **kwargs: True)
    model = adapted({"a": "owner/repo/experts/math"})
    assert set(asked) == {("owner/repo", "experts/math")}
    close(logits(model), logits(adapted({"a": experts["math"]})))


def test_switching_gradients(experts):
    model = adapted(experts, use_trainable_adapters=True).base_model
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    model.set_requires_grad("other", False)  # not its name
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    assert any(".lora_" in n for n in trained) and any("classifier" in n for n in trained)
    model.set_requires_grad(["default"], False)
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match=r"only the X-LoRA adapter 'default', got \['math'\]"):
        model.set_adapter("math")


def test_experts_that_do_not_fit(experts, tmp_path):
    model = peft.get_peft_model(net(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="a model without adapters"):
        peft.get_peft_model(model, XLoraConfig(hidden_size=16, adapters=experts))
    peft.get_peft_model(net(), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match=f"must be LoRA adapters, expert 'a' in {tmp_path} is .*IA3"):
        adapted({"a": str(tmp_path)})
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    lost, module = min(state), "base_model.model.model.layers.0.self_attn.q_proj"
    save_file({k: v for k, v in state.items() if k != lost}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(
        ValueError, match=rf"expert 'a' in {tmp_path} does not fit the model: missing \['{module}.lora_A.a"
    ):
        adapted({"a": str(tmp_path)})
    convolution = torch.nn.Sequential(torch.nn.Conv1d(4, 4, 3), torch.nn.Linear(5, 5))
    expert = peft.get_peft_model(convolution, LoraConfig(target_modules=["0", "1"], r=2))
    expert.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="token by token, which a Conv1d layer does not allow: 0"):
        peft.get_peft_model(expert.unload(), XLoraConfig(hidden_size=5, adapters={"a": str(tmp_path)}))
