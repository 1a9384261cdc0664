"""Generation with prompts: all caches and search modes give what decoding by forward gives."""

import pytest
import torch
from tests.models.prompt_models import IDS, MASK, adapted, base
from tests.versions import since

METHODS = ["prompt", "p_tuning", "multitask", "cpt", "prefix", "cartridge"]
LENGTH = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


def tasks(method):
    return {"task_ids": torch.tensor([0, 1])} if method == "multitask" else {}


def by_hand(model, method, steps=5):
    """Greedy decoding by whole forwards, positions as generate gives them to methods with a cache."""
    ids, mask = IDS.clone(), MASK.clone()
    for _ in range(steps):
        call = {"input_ids": ids, "attention_mask": mask, **tasks(method)}
        if method in ("prefix", "cartridge"):
            call["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(**call).logits[:, -1]
        logits[:, 2] = -1e9  # min_new_tokens
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
    return ids


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("method", METHODS)
def test_causal_lm(method, name):
    model = (
        adapted(name, method, "CAUSAL_LM", num_virtual_tokens=3)
        if method != "cpt"
        else adapted(name, method, "CAUSAL_LM")
    )
    call = {"input_ids": IDS, "attention_mask": MASK, **tasks(method), **LENGTH}
    want = by_hand(model, method).tolist()
    assert model.generate(**call).tolist() == want
    assert model.generate(**call, use_cache=False).tolist() == want
    assert model.generate(**call, cache_implementation="static").tolist() == want
    assert model.generate(IDS, **{k: v for k, v in call.items() if k != "input_ids"}).tolist() == want
    assert "prepare_inputs_for_generation" not in vars(model.base_model)


@since("transformers", "5", "positions of chunks do not count padding")
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("method", METHODS)
def test_prefill_in_chunks(method, name):
    model = adapted(name, method, "CAUSAL_LM")
    call = {"input_ids": IDS, "attention_mask": MASK, **tasks(method), **LENGTH}
    assert model.generate(**call, prefill_chunk_size=3).tolist() == by_hand(model, method).tolist()


@pytest.mark.parametrize("method", METHODS)
def test_beams_and_samples_run_on_expanded_batches(method):
    model = adapted("llama", method, "CAUSAL_LM")
    call = {"input_ids": IDS, "attention_mask": MASK, **tasks(method), **LENGTH}
    assert model.generate(**call, num_beams=3, num_return_sequences=2).shape == (4, IDS.shape[1] + 5)
    one_beam = model.generate(**call, num_beams=2)[:, : IDS.shape[1]]
    assert one_beam.tolist() == IDS.tolist()


def test_one_task_for_all_samples_and_beams():
    model = adapted("llama", "multitask", "CAUSAL_LM")
    call = {"input_ids": IDS, "attention_mask": MASK, **LENGTH, "num_beams": 2}
    both = model.generate(**call, task_ids=torch.tensor([1, 1]))
    assert model.generate(**call, task_ids=torch.tensor([1])).tolist() == both.tolist()
    with pytest.raises(ValueError, match="task_ids cannot be None"):
        model.generate(**call)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_embeddings_as_input(method):
    model = adapted("llama", method, "CAUSAL_LM")
    embeds = model.base_model.get_input_embeddings()(IDS)
    want = model.generate(input_ids=IDS, attention_mask=MASK, **LENGTH)[:, IDS.shape[1] :]
    assert model.generate(inputs_embeds=embeds, attention_mask=MASK, **LENGTH).tolist() == want.tolist()


@since("transformers", "5", "marks caches that users give")
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_a_given_static_cache_is_filled(method):
    from transformers import StaticCache

    model = adapted("llama", method, "CAUSAL_LM")
    cache = StaticCache(config=model.config, max_cache_len=32)
    call = {"input_ids": IDS, "attention_mask": MASK, **LENGTH}
    want = model.generate(**call).tolist()
    assert model.generate(**call, past_key_values=cache).tolist() == want
    assert int(cache.get_seq_length()) == 3 + IDS.shape[1] + 4


@pytest.mark.parametrize("method", ["prompt", "p_tuning", "multitask", "prefix", "cartridge"])
def test_encoder_decoder(method):
    model = adapted("t5", method, "SEQ_2_SEQ_LM", num_transformer_submodules=1 if method == "multitask" else None)
    call = {
        "input_ids": IDS,
        "attention_mask": MASK,
        **tasks(method),
        **{**LENGTH, "max_new_tokens": 4, "min_new_tokens": 4},
    }
    ids = torch.zeros(2, 1).long()
    for _ in range(4):
        with torch.no_grad():
            out = model(input_ids=IDS, attention_mask=MASK, decoder_input_ids=ids, **tasks(method))
        logits = out.logits[:, -1]
        logits[:, 1] = -1e9
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    assert model.generate(**call).tolist() == ids.tolist()
    assert model.generate(**call, num_beams=2).shape == (2, 5)
    with pytest.raises(ValueError, match="input_ids must be provided"):
        model.generate(attention_mask=MASK)
    with pytest.raises(TypeError):
        model.generate(IDS)
    assert "prepare_inputs_for_generation" not in vars(model.base_model)


def test_static_cache_of_an_encoder_decoder():
    model = adapted("t5", "prefix", "SEQ_2_SEQ_LM")
    call = {"input_ids": IDS, "attention_mask": MASK, **LENGTH}
    assert model.generate(**call, cache_implementation="static").tolist() == model.generate(**call).tolist()


@pytest.mark.parametrize(("name", "task"), [("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")])
@pytest.mark.parametrize("method", ["prompt", "prefix", "multitask"])
def test_disabled_generates_as_the_base_model(method, name, task):
    model = adapted(name, method, task)
    call = {"input_ids": IDS, "attention_mask": MASK, **LENGTH}
    with model.disable_adapter():
        got = model.generate(**call, **tasks(method))
    assert got.tolist() == base(name).generate(**call).tolist()


def test_errors_undo_the_patch():
    model = adapted("llama", "prompt", "CAUSAL_LM")
    with pytest.raises(ValueError, match="not_an_argument"):
        model.generate(input_ids=IDS, not_an_argument=torch.ones(1))
    assert "prepare_inputs_for_generation" not in vars(model.base_model)


def test_generation_config_of_the_wrapper_is_used():
    from transformers import GenerationConfig

    model = adapted("llama", "prompt", "CAUSAL_LM")
    model.generation_config = GenerationConfig(max_new_tokens=2, min_new_tokens=2, do_sample=False, pad_token_id=0)
    assert model.generate(input_ids=IDS, attention_mask=MASK).shape == (2, IDS.shape[1] + 2)


def test_multi_query_models_take_the_first_head():
    model = adapted("falcon", "prefix", "CAUSAL_LM")
    call = {"input_ids": IDS, "attention_mask": MASK, **LENGTH}
    assert [tuple(layer.keys.shape) for layer in model.get_prompt(2).layers] == [(2, 1, 3, 4)] * 2
    assert model.generate(**call).tolist() == model.generate(**call, use_cache=False).tolist()
