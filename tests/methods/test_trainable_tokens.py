"""Trainable tokens: the patched forward equals the replaced matrix in value and gradient; tying, merging, overlap."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from peft import TrainableTokensConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.trainable_tokens import TrainableTokensLayer, TrainableTokensModel

transformers = pytest.importorskip("transformers")
IDS = torch.tensor([[1, 4, 4, 0], [7, 2, 1, 9]])


class Net(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.emb = nn.Embedding(10, 4, **kwargs)
        self.head = nn.Linear(4, 10)

    def forward(self, x):
        return self.head(self.emb(x))


def config(**kwargs) -> TrainableTokensConfig:
    return TrainableTokensConfig(**({"target_modules": ["emb"], "token_indices": [4, 1]} | kwargs))


def llama(tie: bool = True):
    values = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**values, **heads, tie_word_embeddings=tie)).eval()


def shake(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens" in name:
                parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize("kwargs", [{}, {"padding_idx": 4}, {"max_norm": 1.0}])
def test_embedding_equals_the_replaced_matrix(kwargs):
    model = TrainableTokensModel(Net(**kwargs), config(), "default")
    shake(model)
    layer = model.model.emb
    delta = layer.trainable_tokens_delta["default"]
    weight = layer.weight.detach().clone()
    reference = delta.detach().clone().requires_grad_()
    table = weight.index_copy(0, torch.tensor([4, 1]), reference)
    options = {"padding_idx": kwargs.get("padding_idx"), "max_norm": kwargs.get("max_norm")}
    if options["max_norm"]:  # the function changes its table in place
        table = table + (torch.renorm(table.detach(), 2, 0, options["max_norm"]) - table.detach())
        options["max_norm"] = None
    want = F.embedding(IDS, table, **options)
    got = layer(IDS)
    torch.testing.assert_close(got, want)
    upstream = torch.randn_like(got)
    got.backward(upstream)
    want.backward(upstream)
    torch.testing.assert_close(delta.grad, reference.grad)
    assert layer.weight.grad is None


def test_head_equals_the_replaced_matrix_and_keeps_its_bias():
    model = TrainableTokensModel(Net(), config(target_modules=["head"]), "default")
    shake(model)
    layer, x = model.model.head, torch.randn(3, 4, requires_grad=True)
    delta = layer.trainable_tokens_delta["default"]
    got = layer(x)
    got.pow(2).sum().backward()
    grads = x.grad.clone(), delta.grad.clone()
    x.grad = None
    reference = delta.detach().clone().requires_grad_()
    want = F.linear(x, layer.weight.index_copy(0, torch.tensor([4, 1]), reference), layer.bias)
    want.pow(2).sum().backward()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grads[0], x.grad)
    torch.testing.assert_close(grads[1], reference.grad)
    torch.testing.assert_close(
        layer.get_merged_weights(["default"]), layer.weight.index_copy(0, torch.tensor([4, 1]), delta)
    )


def test_scaled_embedding():
    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, x):
            return super().forward(x) * self.embed_scale

    net = Net()
    net.emb = Scaled(10, 4)
    before = net.emb(IDS)
    model = TrainableTokensModel(net, config(), "default")
    torch.testing.assert_close(model.model.emb(IDS), before)
    shake(model)
    delta = model.model.emb.trainable_tokens_delta["default"]
    torch.testing.assert_close(model.model.emb(torch.tensor([1]))[0], delta[1] * 3)


def test_initial_values_and_odd_indices():
    model = TrainableTokensModel(Net(), config(init_weights=False), "default")
    assert (model.model.emb.trainable_tokens_delta["default"] - model.model.emb.weight[[4, 1]]).abs().max() > 0.1
    net = Net()
    before = net(IDS)
    torch.testing.assert_close(TrainableTokensModel(net, config(token_indices=[]), "default")(IDS), before)
    model = TrainableTokensModel(Net(), config(token_indices=[4, 1, 4]), "default")
    shake(model)
    out = model(IDS)
    model.merge_adapter()
    torch.testing.assert_close(model(IDS), out)
    for wrong in ([10], [-1], ["a"], [1.0]):
        with pytest.raises(IndexError, match="out of range"):
            TrainableTokensModel(Net(), config(token_indices=wrong), "default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_is_bitwise(dtype):
    model = TrainableTokensModel(Net().to(dtype), config(target_modules=["emb", "head"]), "default")
    before = copy.deepcopy(model.state_dict())
    shake(model)
    model._cast_adapter_dtype("default")
    out = model(IDS)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(IDS), out)
    model.unmerge_adapter()
    for name in ("emb", "head"):
        key = f"model.{name}.base_layer.weight"
        assert torch.equal(model.state_dict()[key], before[key])


def test_safe_merge_refuses_nan():
    model = TrainableTokensModel(Net(), config(), "default")
    model.model.emb.trainable_tokens_delta["default"].data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter(safe_merge=True)


def test_adapters_with_common_tokens_cannot_be_combined():
    model = TrainableTokensModel(Net(), config(), "a")
    model.add("b", config(token_indices=[1, 2]))
    model.add("c", config(token_indices=[7]))
    shake(model)
    model.set_adapter(["a", "b"])
    with pytest.raises(ValueError, match="both train token 1"):
        model(IDS)
    model.set_adapter(["a", "c"])
    out = model.model.emb(torch.tensor([1, 7]))
    deltas = model.model.emb.trainable_tokens_delta
    torch.testing.assert_close(out, torch.stack([deltas["a"][1], deltas["c"][0]]))
    model.merge_adapter(["a"])
    with pytest.raises(ValueError, match="both train token 1"):
        model.merge_adapter(["b"])


def test_an_adapter_added_while_another_is_merged_sees_the_base_rows():
    model = TrainableTokensModel(Net(), config(), "a")
    rows = model.model.emb.weight[[1, 2]].clone()
    shake(model)
    model.merge_adapter()
    model.add("b", config(token_indices=[1, 2]))
    assert torch.equal(model.model.emb.trainable_tokens_original["b"], rows)


def test_mixed_batch():
    model = get_peft_model(Net(), config(), "a").eval()
    model.add_adapter("b", config(token_indices=[1, 7]))
    shake(model)
    out = model(IDS, adapter_names=["b", "__base__"])
    model.set_adapter("b")
    torch.testing.assert_close(out[0], model(IDS)[0])
    with model.disable_adapter():
        torch.testing.assert_close(out[1], model(IDS)[1])


def test_default_target_is_the_input_embedding():
    model = get_peft_model(llama(False), TrainableTokensConfig(token_indices=[1, 2]))
    assert model.peft_config["default"].target_modules == "model.embed_tokens"
    assert isinstance(model.base_model.model.model.embed_tokens, TrainableTokensLayer)
    assert type(model.base_model.model.lm_head) is nn.Linear


@pytest.mark.parametrize("targets", [None, ["embed_tokens", "lm_head"]])
def test_tied_model_with_two_adapters(targets):
    model = get_peft_model(llama(), TrainableTokensConfig(token_indices=[1, 2], target_modules=targets), "a")
    model.add_adapter("b", TrainableTokensConfig(token_indices=[2, 3], target_modules=targets))
    base = model.base_model.model
    names = [n for n, _ in model.named_parameters() if "tokens_delta" in n]
    assert names == [f"base_model.model.model.embed_tokens.trainable_tokens_delta.{n}" for n in "ab"]
    assert isinstance(base.lm_head, TrainableTokensLayer) and not isinstance(
        base.lm_head.base_layer, TrainableTokensLayer
    )
    shake(model)
    outs = {}
    for name in "ab":
        model.set_adapter(name)
        outs[name] = model(input_ids=IDS).logits
    assert (outs["a"] - outs["b"]).abs().max() > 0.01
    state = get_peft_model_state_dict(model, adapter_name="a")
    head, emb = (
        "base_model.model.lm_head.trainable_tokens_delta",
        "base_model.model.model.embed_tokens.trainable_tokens_delta",
    )
    assert set(state) == {head, emb} and torch.equal(state[head], state[emb])
    merged = model.merge_and_unload(adapter_names=["b"])
    torch.testing.assert_close(merged(input_ids=IDS).logits, outs["b"])
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_files_with_and_without_the_keys_of_tied_layers():
    model = get_peft_model(llama(), TrainableTokensConfig(token_indices=[1, 2]))
    shake(model)
    state = get_peft_model_state_dict(model)
    for drop in ("lm_head", "embed_tokens", "nothing"):
        other = get_peft_model(llama(), TrainableTokensConfig(token_indices=[1, 2]))
        result = set_peft_model_state_dict(other, {k: v for k, v in state.items() if drop not in k})
        assert not result.unexpected_keys
        delta = other.base_model.model.model.embed_tokens.trainable_tokens_delta["default"]
        assert torch.equal(delta, next(iter(state.values())))


def test_tied_encoder_decoder():
    values = {"vocab_size": 20, "d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 2, "d_kv": 4}
    base = transformers.T5ForConditionalGeneration(transformers.T5Config(**values)).eval()
    model = get_peft_model(base, TrainableTokensConfig(token_indices=[1, 4]))
    shake(model)
    kwargs = {"input_ids": IDS, "decoder_input_ids": IDS}
    out = model(**kwargs).logits
    with model.disable_adapter():
        assert (model(**kwargs).logits - out).abs().max() > 0.01
    assert len(get_peft_model_state_dict(model)) == 4
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**kwargs).logits, out)


def test_low_cpu_mem_usage_leaves_delta_on_meta():
    model = TrainableTokensModel(Net(), config(), "default", low_cpu_mem_usage=True)
    assert model.model.emb.trainable_tokens_delta["default"].device.type == "meta"
    assert model.model.emb.trainable_tokens_original["default"].device.type == "cpu"


def test_compiles_without_graph_break():
    model = TrainableTokensModel(Net(), config(target_modules=["emb", "head"]), "default")
    shake(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS), model(IDS))
