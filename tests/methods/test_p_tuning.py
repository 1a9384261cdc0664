"""P-tuning: the networks, and what is stored of them."""

import pytest
import torch
from tests.models.prompt_models import adapted, base, close, config

import peft


def names(**kwargs):
    model = peft.get_peft_model(base("llama"), config("p_tuning", "CAUSAL_LM", encoder_hidden_size=6, **kwargs))
    return {n: tuple(p.shape) for n, p in model.prompt_encoder["default"].named_parameters()}


def test_mlp():
    assert names() == {
        "embedding.weight": (3, 16),
        "mlp_head.0.weight": (6, 16),
        "mlp_head.0.bias": (6,),
        "mlp_head.2.weight": (6, 6),
        "mlp_head.2.bias": (6,),
        "mlp_head.4.weight": (16, 6),
        "mlp_head.4.bias": (16,),
    }


def test_lstm():
    found = names(encoder_reparameterization_type="LSTM", encoder_num_layers=1)
    assert found["mlp_head.0.weight"] == (12, 12) and found["mlp_head.2.weight"] == (16, 12)
    assert found["lstm_head.weight_ih_l0_reverse"] == (24, 16)


def test_inference_has_no_network():
    assert list(names(inference_mode=True)) == ["embedding.weight"]


def test_hidden_size_defaults_to_the_width():
    model = peft.get_peft_model(base("llama"), config("p_tuning", "CAUSAL_LM"))
    assert model.prompt_encoder["default"].hidden_size == 16


def test_unknown_network():
    with pytest.raises(ValueError, match="encoder_reparameterization_type.*use one of MLP, LSTM.*Did you mean 'LSTM'"):
        names(encoder_reparameterization_type="LSTN")


def test_layers_of_the_mlp_are_fixed():
    with pytest.warns(UserWarning, match="encoder_num_layers=3 has no effect"):
        names(encoder_num_layers=3)


def test_stored_is_the_output_without_dropout():
    model = adapted("llama", "p_tuning", "CAUSAL_LM", encoder_reparameterization_type="LSTM", encoder_dropout=0.5)
    want = model.get_prompt(1)[0].detach()
    model.train()
    close(model.get_prompt_embedding_to_save("default"), want, 1e-6)
    assert model.prompt_encoder["default"].training and model.prompt_encoder["default"].lstm_head.training
    assert list(model.prompt_encoder["default"].export()) == ["prompt_embeddings"]


def test_loading_into_a_network_warns():
    model = adapted("llama", "p_tuning", "CAUSAL_LM")
    with pytest.warns(UserWarning, match="which is not stored"):
        model.prompt_encoder["default"].load({"prompt_embeddings": torch.zeros(3, 16)})
