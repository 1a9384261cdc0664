"""Prefix tuning: projection, start, loading of rows."""

import pytest
import torch
from tests.models.prompt_models import IDS, adapted, base, close, config

import peft


def encoder(**kwargs):
    return peft.get_peft_model(base("llama"), config("prefix", "CAUSAL_LM", **kwargs)).prompt_encoder["default"]


def test_shapes():
    assert {n: tuple(p.shape) for n, p in encoder().named_parameters()} == {"embedding.weight": (3, 32)}
    found = {n: tuple(p.shape) for n, p in encoder(prefix_projection=True, encoder_hidden_size=5).named_parameters()}
    assert found["embedding.weight"] == (3, 8)
    assert (found["transform.0.weight"], found["transform.2.weight"]) == ((5, 8), (32, 5))
    assert list(dict(encoder(prefix_projection=True, inference_mode=True).named_parameters())) == ["embedding.weight"]


@pytest.mark.parametrize("projection", [False, True])
def test_zero_start(projection):
    made = encoder(init_weights="zero", prefix_projection=projection)
    assert made(torch.arange(3)[None]).abs().max() == 0


def test_stored_is_the_projected_prefix():
    model = adapted("llama", "prefix", "CAUSAL_LM", prefix_projection=True)
    rows = model.get_prompt_embedding_to_save("default")
    plain = adapted("llama", "prefix", "CAUSAL_LM")
    plain.prompt_encoder["default"].load_prompt_embeddings(rows)
    close(plain(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_rows_that_do_not_fit():
    with pytest.raises(ValueError, match="shape"):
        encoder().load_prompt_embeddings(torch.zeros(2, 32))
    with pytest.raises(ValueError, match="prefix_projection"):
        encoder(prefix_projection=True).load_prompt_embeddings(torch.zeros(3, 32))
    with pytest.raises(KeyError, match="prompt_embeddings"):
        encoder().load({"x": torch.zeros(1)})


def test_a_stored_prefix_has_no_projection_to_train(tmp_path):
    model = adapted("llama", "prefix", "CAUSAL_LM", prefix_projection=True)
    model.save_pretrained(tmp_path)
    close(peft.PeftModel.from_pretrained(base("llama"), tmp_path)(input_ids=IDS).logits, model(input_ids=IDS).logits)
    with pytest.raises(ValueError, match="Can't load rows into a prefix with prefix_projection=True"):
        peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(model))
