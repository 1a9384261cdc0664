"""generate with the caches of transformers, and pipelines."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tests.ecosystem import tiny
from tests.versions import since

import peft


def adapted(base: Any = None, **options: Any) -> peft.PeftModel:
    base = tiny.llama() if base is None else base
    torch.manual_seed(0)
    config = peft.LoraConfig(
        **{"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], **options}
    )
    return tiny.spread(peft.get_peft_model(base, config)).eval()


def prompt() -> dict[str, torch.Tensor]:
    tokens, mask = tiny.ids(2, 6), torch.ones(2, 6, dtype=torch.long)
    tokens[1, :2], mask[1, :2] = 0, 0  # padded on the left
    return {"input_ids": tokens, "attention_mask": mask}


def generate(model: Any, **options: Any) -> torch.Tensor:
    return model.generate(**prompt(), **{"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, **options})


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    return generate(tiny.clone(adapted()).merge_and_unload(), use_cache=False)


@pytest.mark.parametrize("cache", ["dynamic", "static", "quantized", None])
def test_caches(expected: torch.Tensor, cache: str | None) -> None:
    model = adapted()
    if cache == "quantized":
        pytest.importorskip("hqq")
        found = generate(
            model, cache_implementation="quantized", cache_config={"backend": "hqq", "nbits": 8, "residual_length": 64}
        )
    else:
        found = generate(model, **({"use_cache": False} if cache is None else {"cache_implementation": cache}))
    assert torch.equal(found, expected)
    with model.disable_adapter():
        base = generate(model)
    assert torch.equal(base, generate(tiny.llama())) and not torch.equal(base, expected)


def test_cache_objects(expected: torch.Tensor) -> None:
    model = adapted()
    for cache in (
        tf.DynamicCache(config=model.config), tf.StaticCache(config=model.config, max_cache_len=32), tf.DynamicCache(),
    ):  # fmt: skip
        assert torch.equal(generate(model, past_key_values=cache), expected)
    out = model.generate(
        **prompt(),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert torch.equal(out.sequences, expected) and len(out.scores) == 8
    assert out.past_key_values.get_seq_length() == 13


def test_static_cache_step_by_step() -> None:
    model = adapted()
    tokens = tiny.ids(2, 9)
    whole = tiny.logits(model, tokens)
    cache, parts = tf.StaticCache(config=model.config, max_cache_len=16), []
    for chunk in (tokens[:, :4], tokens[:, 4:5], tokens[:, 5:]):
        with torch.no_grad():
            parts.append(model(input_ids=chunk, past_key_values=cache, use_cache=True).logits)
    assert tiny.close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize(
    "mode", [{"num_beams": 3}, {"do_sample": True, "top_k": 5, "seed": 1}, {"prompt_lookup_num_tokens": 2}], ids=str
)
def test_decoding_modes(mode: dict) -> None:
    model, merged = adapted(), tiny.clone(adapted()).merge_and_unload()
    options = dict(mode)
    seed = options.pop("seed", 0)
    if "prompt_lookup_num_tokens" in options:  # one sequence at a time
        one = {"input_ids": tiny.ids(1, 6), "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        assert torch.equal(model.generate(**one, **options), merged.generate(**one))
        return
    found = []
    for each in (model, merged):
        torch.manual_seed(seed)
        found.append(generate(each, **options))
    assert torch.equal(*found)


def test_assistant_model() -> None:
    model = adapted()
    one = {"input_ids": tiny.ids(1, 6), "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(**one, assistant_model=tiny.llama(num_hidden_layers=1)), model.generate(**one))


def test_mixed_batch() -> None:
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["k_proj"]))
    model.set_adapter("other")
    tiny.spread(model, seed=7)
    other = generate(model)
    model.set_adapter("default")
    default = generate(model)
    mixed = generate(model, adapter_names=["default", "other"], cache_implementation="static")
    assert torch.equal(mixed, torch.stack([default[0], other[1]]))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_prompt_methods(cache: str) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(
        tiny.llama(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ).eval()
    torch.nn.init.normal_(model.prompt_encoder.default.embedding.weight)
    slow = prompt()["input_ids"][:1]
    for _ in range(5):
        slow = torch.cat([slow, tiny.logits(model, slow)[:, -1:].argmax(-1)], 1)
    options = {} if cache == "dynamic" else {"cache_implementation": cache}
    found = model.generate(
        input_ids=prompt()["input_ids"][:1], max_new_tokens=5, do_sample=False, eos_token_id=None, **options
    )
    assert torch.equal(found, slow)


def test_encoder_decoder() -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, target_modules=["q", "v", "wo"])
    model = tiny.spread(peft.get_peft_model(tiny.t5(), config)).eval()
    merged = tiny.clone(model).merge_and_unload()
    for options in ({}, {"cache_implementation": "static"}, {"num_beams": 2}):
        inputs = {"input_ids": tiny.ids(2, 6), "max_new_tokens": 6, "do_sample": False}
        assert torch.equal(model.generate(**inputs, **options), merged.generate(**inputs, **options))


# ---- pipelines


@pytest.fixture(scope="module")
def folders(tmp_path_factory: Any) -> tuple[Path, Path]:
    """A base model with its tokenizer, and an adapter for it."""
    root = tmp_path_factory.mktemp("pipelines")
    base = tiny.llama()
    tiny.saved(base, root / "base")
    tiny.tokenizer().save_pretrained(root / "base")
    adapted(base).save_pretrained(root / "adapter")
    tiny.tokenizer().save_pretrained(root / "adapter")
    return root / "base", root / "adapter"


def test_text_generation(folders: tuple[Path, Path]) -> None:
    tokenizer, text = tiny.tokenizer(), "w5 w6 w7"
    options = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False, "suppress_tokens": [0, 1, 2]}
    wrapped = tf.pipeline("text-generation", model=adapted(), tokenizer=tokenizer)
    native = tf.pipeline("text-generation", model=str(folders[1]))
    base = tf.pipeline("text-generation", model=str(folders[0]))
    merged = tf.pipeline("text-generation", model=adapted().merge_and_unload(), tokenizer=tokenizer)
    expected = merged(text, **options)
    assert wrapped(text, **options) == expected == native(text, **options) != base(text, **options)
    assert native.model._hf_peft_config_loaded and type(wrapped.model).__name__ == "PeftModelForCausalLM"
    batch = wrapped([text, "w9"], batch_size=2, **options)
    assert batch[0] == expected


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=since("transformers", "5.18", "trained heads"))])
def test_text_classification(tmp_path: Path, native: bool) -> None:
    base = tiny.bert()
    tiny.saved(base, tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
    model = tiny.spread(peft.get_peft_model(base, config)).eval()
    tokens = tiny.tokenizer()("w5 w6 w7", return_tensors="pt")
    with torch.no_grad():
        expected = model(**{k: tokens[k] for k in ("input_ids", "attention_mask")}).logits.softmax(-1)[0]
    model.save_pretrained(tmp_path / "adapter")
    if native:
        tiny.tokenizer().save_pretrained(tmp_path / "adapter")
        model = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3)
    pipe = tf.pipeline("text-classification", model=model, tokenizer=tiny.tokenizer())
    scores = {s["label"]: s["score"] for s in pipe("w5 w6 w7", top_k=None)}
    assert torch.allclose(torch.tensor([scores[f"LABEL_{i}"] for i in range(3)]), expected, atol=1e-5)


def test_feature_extraction_and_tokens() -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="FEATURE_EXTRACTION", r=4, target_modules=["query"])
    model = tiny.spread(peft.get_peft_model(tiny.bert(tf.BertModel), config)).eval()
    pipe = tf.pipeline("feature-extraction", model=model, tokenizer=tiny.tokenizer())
    features = torch.tensor(pipe("w5 w6 w7"))
    with torch.no_grad():
        assert tiny.close(features, model(input_ids=torch.tensor([[5, 6, 7]])).last_hidden_state)
    config = peft.LoraConfig(task_type="TOKEN_CLS", r=4, target_modules=["query"])
    model = tiny.spread(peft.get_peft_model(tiny.bert(tf.BertForTokenClassification), config)).eval()
    pipe = tf.pipeline("token-classification", model=model, tokenizer=tiny.tokenizer(), ignore_labels=[])
    with torch.no_grad():
        best = model(input_ids=torch.tensor([[5, 6, 7]])).logits.argmax(-1)[0]
    assert [r["entity"] for r in pipe("w5 w6 w7")] == [f"LABEL_{i}" for i in best]
