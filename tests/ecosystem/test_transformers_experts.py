"""LoRA on the fused experts of transformers computes low-rank products of the routed tokens instead of new stacks."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.ecosystem import tiny
from torch.utils.flop_counter import FlopCounterMode

import peft
from peft.ops import experts
from peft.tuners.lora.layer import ParamWrapper

TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
EXPERTS = ("eager", "batched_mm", "grouped_mm")


def gpt_oss() -> Any:
    sizes = {**tiny._SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    return tiny._make(tiny.tf.GptOssForCausalLM, tiny.tf.GptOssConfig(**sizes))


FAMILIES: dict[str, Callable[[], Any]] = {"mixtral": tiny.mixtral, "qwen3_moe": tiny.qwen3_moe, "gpt_oss": gpt_oss}


def adapted(family: str, implementation: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    base = FAMILIES[family]().to(dtype)
    base.set_experts_implementation(implementation)
    options = {"r": 3, "target_modules": [], "target_parameters": TARGETS, "init_lora_weights": False}
    torch.manual_seed(0)
    return peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **{**options, **more}))


def results(model: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    found = model(input_ids=tiny.ids(), labels=tiny.ids())
    found.loss.backward()
    return found.logits.detach(), [p.grad for _, p in model.named_parameters() if p.requires_grad]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many stacks have been replaced by factored ones."""
    count, start = [], experts.LowRankWeight.__init__
    monkeypatch.setattr(experts.LowRankWeight, "__init__", lambda *a: (count.append(1), start(*a))[1])
    return count


def same(model: Any, **tolerance: float) -> None:
    with peft.ops.plain():
        expected, gradients = results(model)
    found, derived = results(model)
    torch.testing.assert_close(found, expected, **tolerance)
    assert gradients
    for a, b in zip(derived, gradients, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("implementation", EXPERTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_those_of_the_dense_form(family: str, implementation: str, made: list[int]) -> None:
    model = adapted(family, implementation)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=[], target_parameters=TARGETS, init_lora_weights=False))  # fmt: skip
    with peft.ops.plain():
        results(model)
    assert not made
    same(model, rtol=2e-3, atol=2e-5)
    assert made
    model.base_model.set_adapter(["default", "second"])
    same(model, rtol=2e-3, atol=2e-5)
    model.merge_adapter()
    merged = tiny.logits(model)
    model.unmerge_adapter()
    torch.testing.assert_close(merged, tiny.logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", EXPERTS)
def test_half_precision_and_autocast(implementation: str, made: list[int]) -> None:
    model = adapted("mixtral", implementation, torch.bfloat16)
    assert all(g.dtype == torch.float32 for g in results(model)[1])
    exact = adapted("mixtral", implementation)
    exact.load_state_dict(model.state_dict())
    expected = tiny.logits(exact)
    error = (tiny.logits(model).float() - expected).abs().mean()
    with peft.ops.plain():
        assert error < 1.2 * (tiny.logits(model).float() - expected).abs().mean()
    with torch.autocast("cpu", torch.bfloat16):
        assert (tiny.logits(exact).float() - expected).abs().mean() < 2 * error
    assert made


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_and_dropout(reentrant: bool, made: list[int]) -> None:
    model = adapted("qwen3_moe", "eager", lora_dropout=0.5).train()
    gradients = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(1)
        gradients.append(results(model)[1])
    with peft.ops.plain():
        torch.manual_seed(1)
        gradients.append(results(model)[1])
    assert made
    for a, b, c in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c, rtol=2e-3, atol=2e-5)


def test_compiled_models_get_the_dense_form(made: list[int]) -> None:
    model = adapted("mixtral", "grouped_mm")
    expected = tiny.logits(model)
    del made[:]
    torch._dynamo.reset()
    experts_of = model.base_model.model.model.layers[0].mlp.experts
    x, chosen, weights = torch.randn(6, tiny.WIDTH), torch.tensor([[0, 1]] * 6), torch.rand(6, 2)
    compiled = torch.compile(lambda *a: experts_of(*a), fullgraph=True, backend="eager")(x, chosen, weights)
    assert not made
    torch.testing.assert_close(compiled, experts_of(x, chosen, weights), rtol=1e-4, atol=1e-5)
    assert made and torch.equal(tiny.logits(model), expected)


def cost(model: Any) -> tuple[float, int]:
    """FLOPs of a training step, and bytes kept for its backward beside parameters."""
    owned, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage
        return t

    x = torch.randn(2, 16, tiny.WIDTH, requires_grad=True)
    with FlopCounterMode(display=False) as flops:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = model(inputs_embeds=x).logits.sum()
        loss.backward()
    return flops.get_total_flops(), sum(s.nbytes() for s in kept.values())


@pytest.mark.parametrize("implementation", EXPERTS)
def test_cost(implementation: str) -> None:
    base = FAMILIES["qwen3_moe"]().requires_grad_(False)
    base.set_experts_implementation(implementation)
    flops, saved = cost(base)
    model = adapted("qwen3_moe", implementation, r=1)
    with peft.ops.plain():
        dense = cost(model)
    found = cost(model)
    assert found[0] < 1.25 * flops and found[1] < 1.6 * saved
    assert found[0] < dense[0] and (found[1] < 0.8 * dense[1] or implementation == "batched_mm")


# ---- methods of the wrapper that frameworks replace


def wrapper() -> tuple[Any, ParamWrapper, torch.Tensor]:
    model = adapted("mixtral", "eager")
    layer = model.base_model.model.model.layers[1].mlp.experts
    assert isinstance(layer, ParamWrapper) and isinstance(layer.base_layer, ParamWrapper)
    return model, layer, tiny.logits(model)


@pytest.mark.parametrize("where", ["class", "instance"])
@pytest.mark.parametrize("name", ["get_param", "get_delta_weight", "_activate_lora"])
def test_replaced_methods_are_used(name: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, layer, before = wrapper()
    original, calls = getattr(ParamWrapper, name), []

    def same_result(self: Any, *args: Any) -> Any:
        calls.append(self)
        return original(self, *args)

    changed: dict[str, Any] = {
        "get_param": lambda self: original(self) * 0.5,
        "get_delta_weight": lambda self, adapter: original(self, adapter) * 3,
        "_activate_lora": lambda self, names: contextlib.nullcontext(),
    }

    def put(function: Callable[..., Any]) -> None:
        if where == "class":
            monkeypatch.setattr(ParamWrapper, name, function)
        else:
            monkeypatch.setattr(layer, name, function.__get__(layer))

    put(same_result)
    torch.testing.assert_close(tiny.logits(model), before, rtol=1e-4, atol=1e-4)
    assert calls and (where == "class" or set(calls) == {layer})
    gradients = results(model)[1]
    assert all(g.abs().sum() > 0 for g in gradients)
    put(changed[name])
    assert tiny.apart(tiny.logits(model), before)
    if name == "get_delta_weight":  # and what is merged is what the forward adds
        expected = tiny.logits(model)
        torch.testing.assert_close(tiny.logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


def test_the_module_computes_with_the_adapters_named() -> None:
    """`_activate_lora` around the module below is what our own forward does."""
    model, layer, _ = wrapper()
    x, chosen, weights = torch.randn(6, tiny.WIDTH), torch.tensor([[0, 3]] * 6), torch.rand(6, 2)
    inner, module = layer.base_layer, layer.get_base_layer()
    plain, expected = module(x, chosen, weights), layer(x, chosen, weights)
    with layer._activate_lora(["default"]), inner._activate_lora(["default"]):
        assert all(type(p) is experts.LowRankWeight for p in (module.down_proj, module.gate_up_proj))
        assert torch.equal(module(x, chosen, weights), expected)
    assert torch.equal(module(x, chosen, weights), plain)
    with layer._activate_lora(["another"]):
        assert torch.equal(module(x, chosen, weights), plain)
    assert type(module.down_proj) is torch.nn.Parameter
