"""Inputs that a prompt makes for the forward of every task, against what they should be computed from."""

import copy
import functools
import pickle
import warnings

import pytest
import torch
from tests.models.prompt_models import IDS, LENGTH, MASK, adapted, base, close, config

import peft
from peft.core.prompt import prepare_prompt_config
from peft.prompt_inputs import _accepts

EMBED = ["prompt", "p_tuning", "multitask", "cpt"]
KV = ["prefix", "cartridge"]


def tasks(method):
    return {"task_ids": torch.tensor([0, 1])} if method == "multitask" else {}


@pytest.mark.parametrize("method", EMBED)
def test_embeddings_and_mask_of_causal_lm(method):
    model = adapted("llama", method, "CAUSAL_LM")
    prompt = model.get_prompt(2, **tasks(method))
    nv = prompt.shape[1]
    embeds = torch.cat([prompt, model.base_model.get_input_embeddings()(IDS)], dim=1)
    want = model.base_model(inputs_embeds=embeds, attention_mask=torch.cat([torch.ones(2, nv).long(), MASK], 1)).logits
    got = model(input_ids=IDS, attention_mask=MASK, **tasks(method)).logits
    close(got, want)
    assert got.shape == (2, nv + LENGTH, 50)
    given = model(inputs_embeds=model.base_model.get_input_embeddings()(IDS), attention_mask=MASK, **tasks(method))
    close(given.logits, want)


@pytest.mark.parametrize("method", KV)
def test_kv_prefix_is_padding_aware(method):
    model = adapted("llama", method, "CAUSAL_LM")
    padded = model(input_ids=IDS, attention_mask=MASK).logits
    positions = (MASK.cumsum(1) - 1).clamp(min=0)
    exact = model(input_ids=IDS, attention_mask=MASK, position_ids=positions).logits
    alone = model(input_ids=IDS[:1, 2:]).logits
    assert padded.shape == (2, LENGTH, 50)
    close(exact[0, 2:], alone[0])


def test_row_layout_of_the_prefix():
    model = adapted("llama", "prefix", "CAUSAL_LM")  # 2 layers, 2 key/value heads of 4
    rows = model.prompt_encoder["default"].embedding.weight.view(3, 2, 2, 2, 4)
    cache = model.get_prompt(2)
    for i, layer in enumerate(cache.layers):
        close(layer.keys[1], rows[:, i, 0].transpose(0, 1))
        close(layer.values[0], rows[:, i, 1].transpose(0, 1))


def test_encoder_decoder_layers_use_slots_modulo():
    model = adapted("t5", "prefix", "SEQ_2_SEQ_LM")  # both layers use slots 0 and 1
    rows = model.prompt_encoder["default"].embedding.weight.view(3, 4, 4, 4)
    cache = model.get_prompt(1)
    for layer in cache.self_attention_cache.layers:
        close(layer.keys[0], rows[:, 0].transpose(0, 1))
        close(layer.values[0], rows[:, 1].transpose(0, 1))
    assert cache.cross_attention_cache.get_seq_length() == 0


def test_mask_keeps_its_dtype(monkeypatch):
    model = adapted("llama", "prompt", "CAUSAL_LM")
    seen = {}
    forward = model.base_model.forward
    monkeypatch.setattr(model.base_model, "forward", lambda **kw: seen.update(kw) or forward(**kw))
    for dtype in (torch.int64, torch.bool, torch.float32):
        model(input_ids=IDS, attention_mask=MASK.to(dtype))
        assert seen["attention_mask"].dtype == dtype
        assert seen["attention_mask"].tolist() == torch.cat([torch.ones(2, 3), MASK], 1).to(dtype).tolist()
    model(input_ids=IDS)
    assert "attention_mask" not in seen or seen["attention_mask"] is not None


@pytest.mark.parametrize("method", EMBED + KV)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_no_mask_is_a_mask_of_ones(method, name):
    model = adapted(name, method, "CAUSAL_LM")
    want = model(input_ids=IDS, attention_mask=torch.ones_like(MASK), **tasks(method)).logits
    close(model(input_ids=IDS, **tasks(method)).logits, want)


def test_4d_masks():
    mask = torch.zeros(2, 1, LENGTH, LENGTH).masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -1e9)
    model = adapted("llama", "prefix", "CAUSAL_LM")
    close(model(input_ids=IDS, attention_mask=mask).logits, model(input_ids=IDS).logits)
    with pytest.raises(ValueError, match="2-D mask"):
        adapted("llama", "prompt", "CAUSAL_LM")(input_ids=IDS, attention_mask=mask)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_manual_decoding_with_the_returned_cache(method):
    """A cache that comes from an earlier call already holds the prompt."""
    model = adapted("llama", method, "CAUSAL_LM")
    full = model(input_ids=IDS).logits[:, -1]
    first = model(input_ids=IDS[:, :-1], use_cache=True)
    ones = torch.ones_like(IDS)
    second = model(input_ids=IDS[:, -1:], attention_mask=ones, past_key_values=first.past_key_values)
    close(second.logits[:, -1], full)
    assert second.logits.shape[1] == 1


def test_positions_and_token_types_without_effect_warn():
    model = adapted("llama", "prompt", "CAUSAL_LM")
    with pytest.warns(UserWarning, match="Position ids are not supported"):
        model(input_ids=IDS, position_ids=torch.arange(LENGTH).expand(2, -1))
    with pytest.warns(UserWarning, match="Token type ids are not supported"):
        model(input_ids=IDS, token_type_ids=torch.zeros_like(IDS))
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model(attention_mask=MASK)


# ---- tasks


def test_labels_of_causal_lm_count_only_the_text():
    model = adapted("llama", "prompt", "CAUSAL_LM")
    out = model(input_ids=IDS, attention_mask=MASK, labels=IDS)
    want = torch.nn.functional.cross_entropy(out.logits[:, 2:-1].flatten(0, 1), IDS.flatten())
    close(out.loss, want)


@pytest.mark.parametrize("name", ["bert_tok", "gpt2_tok"])
def test_labels_of_token_classification_are_extended(name):
    model = adapted(name, "prompt", "TOKEN_CLS")
    out = model(input_ids=IDS, attention_mask=MASK, labels=IDS % 3)
    assert out.logits.shape == (2, 3 + LENGTH, 3)
    close(out.loss, torch.nn.functional.cross_entropy(out.logits[:, 3:].flatten(0, 1), (IDS % 3).flatten()))


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("name", ["bert_cls", "bert_qa"])
def test_token_types_reach_the_model(name, method):
    task = "SEQ_CLS" if name == "bert_cls" else "QUESTION_ANS"
    model = adapted(name, method, task)
    types = torch.ones_like(IDS)
    field = "logits" if task == "SEQ_CLS" else "start_logits"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        a, b = model(input_ids=IDS, token_type_ids=types), model(input_ids=IDS)
    assert (getattr(a, field) - getattr(b, field)).abs().max() > 1e-3
    ids, kinds = model.base_model.get_input_embeddings()(IDS), torch.cat([torch.zeros(2, 3).long(), types], 1)
    if method == "prompt":
        embeds = torch.cat([model.get_prompt(2), ids], 1)
        close(getattr(a, field), getattr(model.base_model(inputs_embeds=embeds, token_type_ids=kinds), field))


def test_question_answering_passes_types_and_positions_for_layer_methods():
    model = peft.get_peft_model(
        base("bert_qa"), peft.LoraConfig(task_type="QUESTION_ANS", target_modules=["query"])
    ).eval()
    types, positions = torch.ones_like(IDS), torch.arange(LENGTH).flip(0).expand(2, -1)
    want = base("bert_qa")(input_ids=IDS, token_type_ids=types, position_ids=positions).start_logits
    close(model(input_ids=IDS, token_type_ids=types, position_ids=positions).start_logits, want)


@pytest.mark.parametrize(
    ("name", "task"), [("bert_cls", "SEQ_CLS"), ("bert_tok", "TOKEN_CLS"), ("bert_qa", "QUESTION_ANS")]
)
def test_prefix_through_the_backbone_keeps_head_and_loss_of_the_model(name, task):
    """Task models of BERT take no cache; the head gets the backbone's states, the loss is the model's own."""
    model = adapted(name, "prefix", task)
    labels = {
        "SEQ_CLS": {"labels": torch.tensor([0, 2])},
        "TOKEN_CLS": {"labels": IDS % 3},
        "QUESTION_ANS": {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 60])},
    }[task]
    out = model(input_ids=IDS, attention_mask=MASK, **labels)
    bert = model.base_model.bert
    mask = torch.cat([torch.ones(2, 3).long(), MASK], 1)
    states = bert(input_ids=IDS, attention_mask=mask, past_key_values=model.get_prompt(2))
    cross = torch.nn.functional.cross_entropy
    if task == "QUESTION_ANS":
        start, end = model.base_model.qa_outputs(states[0]).split(1, dim=-1)
        close(out.start_logits, start.squeeze(-1))
        ends = torch.tensor([3, LENGTH])  # clamped, then ignored
        loss = cross(start.squeeze(-1), labels["start_positions"]) + cross(end.squeeze(-1), ends, ignore_index=LENGTH)
        close(out.loss, loss / 2)
    else:
        logits = model.base_model.classifier(states[1] if task == "SEQ_CLS" else states[0])
        close(out.logits, logits)
        close(out.loss, cross(logits.flatten(0, -2), labels["labels"].flatten()))
    assert "forward" not in vars(bert)


def test_prefix_needs_a_cache():
    model = adapted("distilbert", "prefix", "SEQ_CLS")
    with pytest.raises(ValueError, match="takes past_key_values"):
        model(input_ids=IDS)
    assert adapted("distilbert", "prompt", "SEQ_CLS")(input_ids=IDS).logits.shape == (2, 3)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_decoder_classification_ignores_right_padding(method):
    model = adapted("llama_cls", method, "SEQ_CLS")
    alone = model(input_ids=IDS[:1, 2:], attention_mask=MASK[:1, 2:]).logits
    right = (
        torch.cat([IDS[:1, 2:], torch.zeros(1, 2).long()], 1),
        torch.cat([MASK[:1, 2:], torch.zeros(1, 2).long()], 1),
    )
    close(model(input_ids=right[0], attention_mask=right[1]).logits, alone)
    assert "forward" not in vars(model.base_model.get_input_embeddings())


def test_feature_extraction():
    model = adapted("bert", "prompt", "FEATURE_EXTRACTION")
    assert model(input_ids=IDS).last_hidden_state.shape == (2, 3 + LENGTH, 16)
    model = adapted("bert", "prefix", "FEATURE_EXTRACTION")
    assert model(input_ids=IDS).last_hidden_state.shape == (2, LENGTH, 16)
    model = adapted("bert", "multitask", "FEATURE_EXTRACTION")
    assert model(input_ids=IDS, task_ids=torch.tensor([0])).last_hidden_state.shape == (2, 3 + LENGTH, 16)


def test_arguments_of_a_task_by_position():
    model = adapted("llama", "prompt", "CAUSAL_LM")
    want = model(input_ids=IDS, attention_mask=MASK, labels=IDS)
    assert torch.equal(model(IDS, MASK, None, IDS).loss, want.loss)
    for wrong in ({"input_ids": IDS}, {"attention_mask": MASK}):
        with pytest.raises(TypeError, match="each once"):
            model(IDS, MASK, **wrong)
    with pytest.raises(TypeError, match="9 arguments by position"):
        model(*[IDS] * 9)


def test_heads_enter_modules_to_save_once():
    given = config("prompt", "SEQ_CLS", modules_to_save=["classifier"])
    model = peft.get_peft_model(base("bert_cls"), given)
    assert model.peft_config["default"].modules_to_save == ["classifier", "score"]
    assert model.cls_layer_name == "classifier"
    model.add_adapter("other", config("prompt", "SEQ_CLS"))
    assert model.peft_config["other"].modules_to_save == ["classifier", "score"]
    again = peft.get_peft_model(base("bert_cls"), given)
    assert again.peft_config["default"].modules_to_save == ["classifier", "score"]


@pytest.mark.parametrize(
    ("name", "task", "head"), [("bert_tok", "TOKEN_CLS", "classifier"), ("bert_qa", "QUESTION_ANS", "qa_outputs")]
)
def test_all_linear_leaves_the_head_alone(name, task, head):
    model = peft.get_peft_model(base(name), peft.LoraConfig(task_type=task, target_modules="all-linear"))
    wrapped = getattr(model.get_base_model(), head)
    assert type(wrapped).__name__ == "ModulesToSaveWrapper"
    assert not any(head in n for n, _ in model.named_parameters() if "lora_" in n)


# ---- life of an adapter


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, m) for name in ("llama", "bert_cls", "t5") for m in EMBED + KV if m != "cpt" or name == "llama"],
)  # CPT is for causal language models
@torch.no_grad()  # kernels may differ with gradients, and only the bare base model wants them
def test_disabled_is_the_base_model(name, method):
    task = {"llama": "CAUSAL_LM", "bert_cls": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}[name]
    model = adapted(name, method, task)
    call = {"input_ids": IDS, "attention_mask": MASK} | ({"labels": IDS[:, :3].contiguous()} if name == "t5" else {})
    want = base(name)(**call).logits
    on = model(**call, **tasks(method)).logits
    with model.disable_adapter():
        off = model(**call, **tasks(method)).logits
    assert torch.equal(off, want)
    assert torch.equal(model(**call, **tasks(method)).logits, on)
    assert on.shape != off.shape or (on - off).abs().max() > 1e-4


def test_several_adapters():
    model = adapted("llama", "prompt", "CAUSAL_LM")
    one = model(input_ids=IDS).logits
    torch.manual_seed(3)
    model.add_adapter("longer", config("prompt", "CAUSAL_LM", num_virtual_tokens=5))
    assert torch.equal(model(input_ids=IDS).logits, one)
    model.set_adapter("longer")
    assert model(input_ids=IDS).logits.shape[1] == 5 + LENGTH
    with pytest.warns(UserWarning, match="default"):
        model.delete_adapter("longer")
    assert model.active_adapter == "default" and list(model.prompt_encoder) == ["default"]
    assert torch.equal(model(input_ids=IDS).logits, one)
    model.delete_adapter("default")
    close(model(input_ids=IDS).logits, base("llama")(input_ids=IDS).logits)


@pytest.mark.parametrize("method", EMBED + KV)
def test_copies_and_files_give_the_same_output(method, tmp_path):
    model = adapted("llama", method, "CAUSAL_LM")
    want = model(input_ids=IDS, attention_mask=MASK, **tasks(method)).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(input_ids=IDS, attention_mask=MASK, **tasks(method)).logits, want)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base("llama"), tmp_path, adapter_name="x")
    close(loaded(input_ids=IDS, attention_mask=MASK, **tasks(method)).logits, want, 1e-6)
    with pytest.raises(ValueError):
        peft.PeftModel.from_pretrained(base("llama"), tmp_path, is_trainable=True)


@pytest.mark.parametrize("method", EMBED + KV)
def test_only_the_prompt_is_trained(method):
    model = adapted("llama", method, "CAUSAL_LM").train()
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained and all(n.startswith("prompt_encoder.default.") for n in trained)
    model(input_ids=IDS, attention_mask=MASK, labels=IDS, **tasks(method)).loss.backward()
    assert all(p.grad is None for p in model.base_model.parameters())
    assert all(p.grad is not None for p in model.prompt_encoder.parameters() if p.requires_grad)
    assert "word_embeddings.weight" not in model.state_dict()


@pytest.mark.parametrize("method", KV)
def test_gradient_checkpointing_is_refused(method):
    model = base("llama")
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        peft.get_peft_model(model, config(method, "CAUSAL_LM"))
    late = adapted("llama", method, "CAUSAL_LM").train()
    late.base_model.gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match="[Gg]radient checkpointing"):
        late(input_ids=IDS)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_bfloat16_base(method):
    torch.manual_seed(1)
    model = peft.get_peft_model(base("llama").bfloat16(), config(method, "CAUSAL_LM")).eval()
    assert model.prompt_encoder["default"].embedding.weight.dtype == torch.float32
    assert model(input_ids=IDS).logits.dtype == torch.bfloat16


# ---- configuration


def test_sizes_come_from_the_model():
    llama = base("llama").config
    embeds, kv = config("prompt", "CAUSAL_LM"), config("prefix", "CAUSAL_LM")
    prepare_prompt_config(embeds, llama)
    prepare_prompt_config(kv, llama)
    sizes = [(c.num_layers, c.token_dim, c.num_attention_heads, c.num_transformer_submodules) for c in (embeds, kv)]
    assert sizes == [(2, 16, 4, 1), (2, 8, 2, 1)]
    assert kv.encoder_hidden_size == 8
    t5 = prepare_prompt_config(config("prompt", "SEQ_2_SEQ_LM"), base("t5").config)
    assert (t5.num_layers, t5.token_dim, t5.num_attention_heads, t5.num_transformer_submodules) == (2, 16, 4, 2)
    nested = prepare_prompt_config(config("prompt", "CAUSAL_LM"), {"text_config": llama.to_dict()})
    assert (nested.num_layers, nested.token_dim) == (2, 16)
    own = prepare_prompt_config(config("prompt", "CAUSAL_LM", token_dim=8, num_layers=7), llama)
    assert (own.num_layers, own.token_dim, own.num_attention_heads) == (7, 8, 4)
    with pytest.raises(ValueError, match="num_layers"):
        prepare_prompt_config(config("prompt", "CAUSAL_LM"), {"hidden_size": 4})


@pytest.mark.parametrize(
    ("extra", "want"),
    [
        ({}, (8, 2)),
        ({"head_dim": 6}, (12, 2)),
        ({"head_dim": 6, "global_head_dim": 10, "num_global_key_value_heads": 1}, (10, 1)),
        ({"head_dim": 6, "per_layer_config": {"1": {"head_dim": 12, "num_key_value_heads": 1}}}, (12, 1)),
    ],
)
def test_cache_shape_of_grouped_query_models(extra, want):
    values = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, **extra}
    done = prepare_prompt_config(config("prefix", "CAUSAL_LM", token_dim=99, num_attention_heads=9), values)
    assert (done.token_dim, done.num_attention_heads) == want


class Silent(torch.nn.Module):
    """A model that does not say which module embeds its tokens; the first parameters are others."""

    def __init__(self, rows: int):
        super().__init__()
        self.config = {"vocab_size": 9, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.first, self.words = torch.nn.Linear(4, 4), torch.nn.Embedding(rows, 4)

    def get_input_embeddings(self):
        raise NotImplementedError

    def enable_input_require_grads(self):
        """As in transformers, which looks for the embeddings too."""

    def forward(self, inputs_embeds, **arguments):
        return self.scale * inputs_embeds


def test_word_embeddings_are_found_by_the_size_of_the_vocabulary():
    options = {"num_virtual_tokens": 2, "task_type": "FEATURE_EXTRACTION"}
    model = peft.get_peft_model(Silent(9), peft.PromptTuningConfig(**options))
    assert model.word_embeddings is model.base_model.words
    out = model(input_ids=torch.tensor([[3, 8]]))
    close(out[0, 2:], model.base_model.words.weight[[3, 8]])
    close(out[0, :2], model.prompt_encoder["default"].embedding.weight)
    with pytest.raises(ValueError, match="no word embeddings in Silent.* with 9 rows"):
        peft.get_peft_model(Silent(8), peft.PromptTuningConfig(**options))


def test_a_prompt_belongs_to_the_whole_batch():
    with pytest.raises(ValueError, match="`adapter_names` is not possible with prompt learning"):
        adapted("llama", "prompt", "CAUSAL_LM")(input_ids=IDS, adapter_names=["default", "default"])


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_heads_of_several_adapters(method):
    model = adapted("bert_cls", method, "SEQ_CLS")
    model.add_adapter("two", config(method, "SEQ_CLS", num_virtual_tokens=4))
    heads = model.base_model.classifier.modules_to_save
    with torch.no_grad():
        heads["two"].bias.fill_(100)
    one = model(input_ids=IDS).logits
    model.set_adapter("two")
    assert model(input_ids=IDS).logits.min() > 90
    assert [heads[name].bias.requires_grad for name in ("default", "two")] == [False, True]
    model.set_adapter("two", inference_mode=True)
    assert not heads["two"].bias.requires_grad
    model.set_adapter("default")
    model.delete_adapter("two")
    assert list(heads) == ["default"] and torch.equal(model(input_ids=IDS).logits, one)
    configs = model.peft_config
    model.peft_config = {"renamed": configs["default"]}
    assert list(model.peft_config) == ["renamed"]


def test_what_prompts_refuse():
    model = adapted("llama", "prompt", "CAUSAL_LM")
    with pytest.raises(TypeError, match="not supported for prompt learning"):
        model.set_requires_grad("default")
    for name in ("", "a.b"):
        with pytest.raises(KeyError, match=f"Adapter name '{name}' can't be empty or contain a dot"):
            model.add_adapter(name, config("prompt", "CAUSAL_LM"))
    with pytest.raises(ValueError, match="`adapter_names` is not possible with prompt learning"):
        model(input_ids=IDS, adapter_names=["default"] * len(IDS))
    assert list(model.peft_config) == ["default"]


def test_steps_without_a_prompt_are_those_of_the_base_model():
    lora = peft.get_peft_model(base("llama"), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    poly = peft.get_peft_model(base("llama"), peft.PolyConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    call = {"attention_mask": MASK, "use_cache": True}
    want = base("llama").prepare_inputs_for_generation(IDS, **call)
    want.pop("cache_position", None)
    for model, more in ((lora, {}), (poly, {"task_ids": torch.tensor([1, 0])})):
        given = model.prepare_inputs_for_generation(IDS, **call, **more)
        assert given.keys() == want.keys() | more.keys() and torch.equal(given["attention_mask"], MASK)
        assert all(given[name] is value for name, value in more.items())


def test_parameters_of_any_callable():
    def forward(x, *, past_key_values=None, **more):
        more["extra"] = x

    class Callable:
        __call__ = staticmethod(forward)

    for function in (forward, functools.partial(forward, 1), Callable(), functools.wraps(forward)(lambda *a: a)):
        assert _accepts(function, "past_key_values") and not _accepts(function, "extra")


def test_encoder_outputs_are_not_taken():
    model = adapted("t5", "prompt", "SEQ_2_SEQ_LM")
    want = model.generate(input_ids=IDS, max_new_tokens=3)
    with pytest.warns(UserWarning, match="`encoder_outputs` should not be passed"):
        assert torch.equal(model.generate(input_ids=IDS, max_new_tokens=3, encoder_outputs=("x",)), want)
