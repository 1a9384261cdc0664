"""torch.compile of adapted models: one graph, and graphs are found again after adapters were switched or changed.

What a switch costs is counted in frames that Dynamo compiles. A setting that was never traced needs one graph (other adapters
are other parameters of other shapes); going back to any setting that was traced before needs none.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo
import transformers as tf
from tests.ecosystem import tiny
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

import peft
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    dynamo.reset()
    yield
    dynamo.reset()


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": TARGETS, **options})


def adapted(config: Any = None, seed: int = 5, **sizes: Any) -> Any:
    base = tiny.llama(**sizes)
    torch.manual_seed(0)
    return tiny.spread(peft.get_peft_model(base, config or lora()), seed=seed).eval()


class Compiled:
    """A compiled model next to the same model uncompiled."""

    def __init__(self, model: Any, **options: Any):
        self.counter = CompileCounter()
        self.model = model
        self.compiled = torch.compile(model, **{"fullgraph": True, "backend": self.counter, **options})

    def frames(self, reference: Any = None, tolerance: float = 0.0) -> int:
        """How many frames one call compiles; the output must be right."""
        before = self.counter.frame_count
        found, expected = tiny.logits(self.compiled), tiny.logits(reference or self.model)
        assert torch.equal(found, expected) if not tolerance else tiny.close(found, expected, tolerance)
        return self.counter.frame_count - before


def two(config: Any = None) -> Any:
    model = adapted(config)
    model.add_adapter("other", lora(r=2, target_modules=["q_proj", "k_proj"]))
    model.set_adapter("other")
    tiny.spread(model, seed=6)
    model.set_adapter("default")
    return model


# ---- no graph break

METHODS: dict[str, Callable[[], Any]] = {
    "lora": lora,
    "dora": lambda: lora(use_dora=True),
    "lora dropout": lambda: lora(lora_dropout=0.1),
    "lora embedding": lambda: lora(target_modules=["embed_tokens", "lm_head", "q_proj"]),
    "modules_to_save": lambda: lora(modules_to_save=["lm_head"]),
    "tokens": lambda: lora(trainable_token_indices={"embed_tokens": [4, 5, 6]}),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=TARGETS),
    "lokr": lambda: peft.LoKrConfig(r=2, target_modules=TARGETS, decompose_factor=4),
    "oft": lambda: peft.OFTConfig(target_modules=TARGETS, oft_block_size=8),
    "boft": lambda: peft.BOFTConfig(target_modules=["q_proj"], boft_block_size=4),
    "hra": lambda: peft.HRAConfig(target_modules=["q_proj"], r=4),
    "vera": lambda: peft.VeraConfig(target_modules=["q_proj", "o_proj"], r=4),
    "miss": lambda: peft.MissConfig(target_modules=["q_proj"], r=4),
    "fourierft": lambda: peft.FourierFTConfig(target_modules=["q_proj"], n_frequency=20),
    "ln": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("method", METHODS)
def test_one_graph(method: str) -> None:
    """Inference and training without a graph break, with the gradients of the uncompiled model."""
    model = adapted(METHODS[method](), num_hidden_layers=1)
    case = Compiled(model)
    assert case.frames(tolerance=1e-5) == 1 and case.frames(tolerance=1e-5) == 0
    tokens, gradients = tiny.ids(), []
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for each in (model, compiled):
        model.zero_grad()
        each(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0] and gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert tiny.close(gradients[1][name], gradient, 1e-4), name


def test_no_graph_break_is_reported() -> None:
    explanation = dynamo.explain(adapted())(input_ids=tiny.ids())
    assert explanation.graph_count == 1 and explanation.graph_break_count == 0


def test_native_adapter_and_modules() -> None:
    model = tiny.llama()
    model.add_adapter(lora(), "one")
    tiny.spread(model)
    model.add_adapter(lora(r=2), "two")
    tiny.spread(model, seed=8, only=".two")
    case = Compiled(model)
    assert case.frames() == 1
    model.set_adapter("one")
    assert case.frames() == 1
    model.disable_adapters()
    assert case.frames() == 1
    for change in (
        model.enable_adapters,
        model.disable_adapters,
        model.enable_adapters,
        lambda: model.set_adapter("two"),
    ):
        change()
        assert case.frames() == 0


# ---- switching


def test_set_adapter_and_disable() -> None:
    model = two()
    case = Compiled(model)
    for name in ("default", "other"):
        model.set_adapter(name)
        assert case.frames() == 1
        with model.disable_adapter():
            assert case.frames() == 1
    model.base_model.set_adapter(["default", "other"])
    assert case.frames() == 1
    for _ in range(2):  # from here on everything is known
        for name in ("default", "other"):
            model.set_adapter(name)
            assert case.frames() == 0
            with model.disable_adapter():
                assert case.frames() == 0
        model.base_model.set_adapter(["default", "other"])
        assert case.frames() == 0


def test_eager_calls_between_do_not_matter() -> None:
    model = two()
    tiny.logits(model)
    case = Compiled(model)
    assert case.frames() == 1
    model.set_adapter("other")
    tiny.logits(model)
    model.set_adapter("default")
    assert case.frames() == 0


def test_modules_to_save_switch() -> None:
    model = adapted(lora(modules_to_save=["lm_head"]))
    model.add_adapter("other", lora(modules_to_save=["lm_head"]))
    case = Compiled(model)
    assert case.frames() == 1
    model.set_adapter("other")
    assert case.frames() == 1
    model.set_adapter("default")
    assert case.frames() == 0


def test_merged_and_back() -> None:
    model = adapted()
    case = Compiled(model)
    assert case.frames() == 1
    model.merge_adapter()
    assert case.frames() == 1
    model.unmerge_adapter()
    assert case.frames() == 0
    model.merge_adapter()
    assert case.frames() == 0


def test_loading_over_an_adapter(tmp_path: Path) -> None:
    adapted(seed=9).save_pretrained(tmp_path)
    model = adapted()
    case = Compiled(model)
    assert case.frames() == 1
    model.load_adapter(tmp_path, "default")
    assert case.frames(adapted(seed=9)) == 0
    model.load_adapter(tmp_path, "more")  # one more adapter, not active: a new structure, so one graph
    assert case.frames() == 1 and case.frames() == 0


# ---- scaling


def test_rescaling_with_numbers() -> None:
    """One more graph for the first change: Dynamo then takes the number for a variable."""
    model = adapted()
    case = Compiled(model)
    assert case.frames() == 1
    counts = []
    for factor in (0.5, 0.25, 0.75, 0.1):
        with rescale_adapter_scale(model, factor):
            counts.append(case.frames())
    for factor in (0.3, 0.6):
        for layer in model.base_model.layers():
            layer.set_scale("default", factor)
        counts.append(case.frames())
    assert counts == [1, 0, 0, 0, 0, 0]


def test_rescaling_prepared_models() -> None:
    model = adapted()
    prepare_model_for_compiled_hotswap(model)
    case = Compiled(model, dynamic=False)
    assert case.frames() == 1
    layers = model.base_model.layers()
    for factor in (0.5, 0.25):
        with rescale_adapter_scale(model, factor):
            assert case.frames() == 0
        for layer in layers:
            layer.set_scale("default", factor)
        assert case.frames() == 0
        for layer in layers:
            layer.scale_layer(3.0)
        assert case.frames() == 0
        for layer in layers:
            layer.unscale_layer(3.0)
        assert case.frames() == 0
    for layer in layers:
        layer.unscale_layer()
    assert case.frames(adapted(), tolerance=1e-6) == 0
    assert all(isinstance(layer.scaling["default"], torch.Tensor) for layer in layers)


# ---- hot swapping


@pytest.mark.parametrize("dynamic", [False, None])
def test_hotswap(tmp_path: Path, dynamic: bool | None) -> None:
    """Smaller and larger ranks up to the prepared one, other alphas, patterns: always the first graph."""
    others = {
        "smaller": lora(r=2), "larger": lora(r=8), "alpha": lora(r=4, lora_alpha=1),
        "pattern": lora(r=4, rank_pattern={"q_proj": 2}),
    }  # fmt: skip
    expected = {}
    for i, (name, config) in enumerate(others.items()):
        expected[name] = adapted(config, seed=20 + i)
        expected[name].save_pretrained(tmp_path / name)
    model = adapted()
    prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config["default"])
    case = Compiled(model, dynamic=dynamic)
    assert case.frames(adapted(), tolerance=1e-5) == 1
    for name in [*others, *others]:
        hotswap_adapter(model, str(tmp_path / name), adapter_name="default")
        assert case.frames(expected[name], tolerance=1e-5) == 0, name
    # on the compiled wrapper, and what is saved afterwards
    hotswap_adapter(case.compiled, str(tmp_path / "smaller"), adapter_name="default")
    assert case.frames(expected["smaller"], tolerance=1e-5) == 0
    case.compiled.save_pretrained(tmp_path / "again")
    again = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "again")
    assert tiny.close(tiny.logits(again), tiny.logits(expected["smaller"]))


def test_transformers_hotswap(tmp_path: Path) -> None:
    first, second = tiny.llama(), tiny.llama()
    for i, model in enumerate((first, second)):
        torch.manual_seed(i)
        model.add_adapter(lora())
        tiny.spread(model, seed=i + 30)
        model.save_pretrained(tmp_path / str(i))
    model = tiny.llama()
    model.load_adapter(str(tmp_path / "0"), adapter_name="live")
    case = Compiled(model)
    assert case.frames(first) == 1
    model.load_adapter(str(tmp_path / "1"), adapter_name="live", hotswap=True)
    assert case.frames(second) == 0


def test_compiled_model_is_refused() -> None:
    model = torch.compile(adapted(), backend="eager")
    with pytest.raises(ValueError, match="before\\* compiling"):
        prepare_model_for_compiled_hotswap(model)


# ---- with a code generator


@pytest.mark.slow
def test_inductor_forward_and_training() -> None:
    model, plain = two(), two()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        plain.set_adapter(name)
        assert tiny.close(tiny.logits(compiled), tiny.logits(plain), 1e-4)
    with model.disable_adapter():
        assert tiny.close(tiny.logits(compiled), tiny.logits(tiny.llama()), 1e-4)
    assert counter.frame_count == 3
    tokens = tiny.Texts().tokens
    histories = []
    for target, each in ((model, compiled), (plain, plain)):
        target.train()
        optimizer = torch.optim.SGD([p for p in target.parameters() if p.requires_grad], lr=0.3)
        history = []
        for _ in range(4):
            loss = each(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            history.append(float(loss.detach()))
        histories.append(history)
    assert counter.frame_count == 4 and tiny.falls(histories[0])
    assert histories[0] == pytest.approx(histories[1], rel=1e-4)


def test_trainer_compiles(tmp_path: Path) -> None:
    model = adapted()
    arguments = tf.TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=8, learning_rate=2e-2, logging_steps=1,
        report_to="none", use_cpu=True, disable_tqdm=True, save_steps=6, dataloader_pin_memory=False, torch_compile=True,
        torch_compile_backend="aot_eager",
    )  # fmt: skip
    trainer = tf.Trainer(model=model, args=arguments, train_dataset=tiny.Texts())
    trainer.train()
    assert tiny.falls(tiny.losses(trainer))
    again = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "checkpoint-6")
    assert tiny.close(tiny.logits(again), tiny.logits(model.eval()))
