"""What only an accelerator can show. The contract tests run there too: `PEFT_TEST_DEVICE=cuda make test`."""

import copy
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ecosystem import accelerate_fsdp_worker as worker
from tests.ecosystem import tiny
from tests.processes import run_ranks
from torch import nn

import peft
from peft import registry
from peft.core import kinds
from peft.core.tuner import TunerModel
from peft.ops import checks, dispatch
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = torch.device("cuda", 0)
TARGETS = ["q_proj", "v_proj", "down_proj"]
METHODS = {
    m.name: m
    for m in registry.methods().values()
    if m.layer is not None and issubclass(m.tuner, TunerModel) and kinds.Linear in getattr(m.layer, "kinds", ())
}
LORA: dict[str, dict[str, Any]] = {"lora": {}, "dropout": {"lora_dropout": 0.3}, "dora": {"use_dora": True}}


def config(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": TARGETS, **options})


def adapted(base: Any = None, **options: Any) -> Any:
    base = tiny.llama() if base is None else base
    torch.manual_seed(0)
    return tiny.spread(peft.get_peft_model(base, config(**options)), 0.05)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.lin0, self.act, self.lin1 = nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin1(self.act(self.lin0(x)))


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(got.cpu(), expected.cpu(), rtol=tolerance, atol=tolerance)


def test_every_op_equals_its_plain_path_here() -> None:
    assert "low_rank.linear" in checks.run("cuda")


@pytest.mark.parametrize("name", METHODS)
def test_moved_there_and_back(name: str, tmp_path: Path) -> None:
    """Outputs and gradients of the CPU, files from one device to the other, and bit by bit the same model at home."""
    tuner, x = METHODS[name].tuner, torch.randn(4, 16)
    options = {"target_modules": ["lin0", "lin1"], **tuner.example}
    if "feedforward_modules" in options:
        options["feedforward_modules"] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = peft.get_peft_model(Net(), METHODS[name].config(**options)).eval()
    tiny.spread(model, 0.05)
    expected = model(x)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(expected.square().sum(), parameters, allow_unused=True)
    model.to(CUDA)
    assert {p.device for p in model.parameters()} == {CUDA}
    there = model(x.to(CUDA))
    close(there, expected)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(torch.autograd.grad(there.square().sum(), parameters, allow_unused=True), gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            close(a, b)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(Net(), tmp_path)
    assert {p.device.type for p in again.parameters()} == {"cpu"}
    close(again(x), expected, 1e-5)
    again = peft.PeftModel.from_pretrained(Net().to(CUDA), tmp_path, low_cpu_mem_usage=True)
    assert {p.device for p in again.parameters()} == {CUDA}
    close(again(x.to(CUDA)), there, 1e-5)
    assert torch.equal(model.to("cpu")(x), expected)


@pytest.mark.parametrize("case", LORA)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_training(case: str, dtype: torch.dtype) -> None:
    model = adapted(**LORA[case]).to(CUDA).train()
    tokens = tiny.Texts().tokens.to(CUDA)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    scaler, history = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16), []
    for _ in range(12):
        with torch.autocast("cuda", dtype):
            loss = model(input_ids=tokens, labels=tokens).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        history.append(float(loss.detach()))
    assert tiny.falls(history, 0.9)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("case", LORA)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_base(case: str, dtype: torch.dtype) -> None:
    """float32 adapters on a half base: fused products in the base's dtype stay near the plain float32 ones."""
    model = adapted(tiny.llama().to(dtype), **LORA[case]).to(CUDA).eval()
    tokens, found = tiny.ids().to(CUDA), []
    for plain in (False, True):
        model.zero_grad()
        with dispatch.plain(plain):
            model(input_ids=tokens, labels=tokens).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert all(bool(torch.isfinite(g).all()) for g in found)
    assert nn.functional.cosine_similarity(*found, dim=0) > 0.99


@pytest.mark.parametrize("case", LORA)
def test_a_captured_training_step_replays(case: str) -> None:
    """A CUDA graph of forward, backward and optimiser step; dropout draws anew at every replay."""
    model = adapted(**LORA[case]).to(CUDA).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, capturable=True)
    tokens = tiny.Texts().tokens.to(CUDA)

    def step() -> torch.Tensor:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    history = []
    for _ in range(20):
        graph.replay()
        history.append(float(loss))
    assert tiny.falls(history, 0.9)


def test_dropout_draws_anew_in_a_captured_forward() -> None:
    model = adapted(lora_dropout=0.5).to(CUDA).train()
    tokens = tiny.ids().to(CUDA)
    for _ in range(2):
        model(input_ids=tokens)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = model(input_ids=tokens).logits
    graph.replay()
    first = out.clone()
    graph.replay()
    assert tiny.apart(out, first)


@pytest.mark.parametrize("case", ["lora", "dora"])
def test_inductor_trains_like_eager(case: str) -> None:
    torch._dynamo.reset()
    model = adapted(**LORA[case]).to(CUDA)
    tokens, found = tiny.ids().to(CUDA), []
    for run in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        loss = run(input_ids=tokens, labels=tokens).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for got, expected in zip(*found, strict=True):
        close(got, expected, 1e-3)


def test_hotswap_of_a_compiled_model(tmp_path: Path) -> None:
    torch._dynamo.reset()
    for rank, folder in ((4, "a"), (8, "b")):
        tiny.spread(adapted(r=rank), 0.2, seed=rank).save_pretrained(tmp_path / folder)
    tokens = tiny.ids().to(CUDA)
    expected = [
        tiny.logits(peft.PeftModel.from_pretrained(tiny.llama().to(CUDA), tmp_path / folder), tokens) for folder in "ab"
    ]
    model: Any = peft.PeftModel.from_pretrained(tiny.llama().to(CUDA), tmp_path / "a")
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    compiled = torch.compile(model, mode="reduce-overhead")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            close(tiny.logits(compiled, tokens), expected[0], 1e-3)
        hotswap_adapter(model, str(tmp_path / "b"), adapter_name="default", torch_device="cuda")
        for _ in range(3):
            close(tiny.logits(compiled, tokens), expected[1], 1e-3)


def test_mixed_batch() -> None:
    model = adapted().eval()
    model.add_adapter("other", config(r=8))
    model.set_adapter("other")
    tiny.spread(model, 0.05, seed=9)
    model.to(CUDA)
    tokens, names = tiny.ids(6).to(CUDA), ["other", "default", "__base__", "default", "other", "other"]
    mixed = tiny.logits(model, tokens, adapter_names=names)
    for i, name in enumerate(names):
        alone = tiny.logits(model, tokens[i : i + 1], adapter_names=[name])
        close(mixed[i : i + 1], alone)


def test_adapters_follow_the_base(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    model: Any = peft.PeftModel.from_pretrained(tiny.llama().to(CUDA, torch.bfloat16), tmp_path)
    model.load_adapter(tmp_path, "low", low_cpu_mem_usage=True)
    model.load_adapter(tmp_path, "named", torch_device="cuda:0")
    model.add_adapter("new", config())
    assert {p.device for p in model.parameters()} == {CUDA}
    half = {n: p.dtype for n, p in model.named_parameters() if "lora_" in n}
    assert set(half.values()) == {torch.float32}


@pytest.mark.parametrize("offloaded", ["cpu", "disk"])
def test_offloaded_base_computes_on_the_accelerator(offloaded: str, tmp_path: Path) -> None:
    import accelerate

    adapted().save_pretrained(tmp_path / "adapter")
    expected = tiny.logits(peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "adapter"))
    tiny.llama().save_pretrained(tmp_path / "base")
    places: Any = {"model.embed_tokens": 0, "model.layers.0": offloaded, "model.layers.1": 0, "model.norm": 0}
    places |= {"model.rotary_emb": 0, "lm_head": 0}
    base = accelerate.load_checkpoint_and_dispatch(
        tiny.llama(), str(tmp_path / "base"), places, offload_folder=str(tmp_path / "off")
    )
    model: Any = peft.PeftModel.from_pretrained(
        base, tmp_path / "adapter", device_map=places, offload_folder=str(tmp_path / "off2")
    )
    close(tiny.logits(model, tiny.ids().to(CUDA)), expected)
    merged = model.merge_and_unload()
    close(tiny.logits(merged, tiny.ids().to(CUDA)), expected)


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4", "mica", "kasa"])
def test_decompositions_on_the_accelerator(init: str) -> None:
    """With `ephemeral_gpu_offload` a base on the CPU stays there, and so do the factors."""
    options: dict[str, Any] = (
        {"init_lora_weights": init} if init != "kasa" else {"kasa_config": peft.tuners.lora.KasaConfig()}
    )
    outputs = []
    for offload in (False, True):
        torch.manual_seed(0)
        runtime = peft.LoraRuntimeConfig(ephemeral_gpu_offload=offload)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.max_memory_allocated()
        model = peft.get_peft_model(tiny.llama(), config(runtime_config=runtime, **options))
        assert (torch.cuda.max_memory_allocated() > before) == offload
        assert {p.device.type for p in model.parameters()} == {"cpu"}
        outputs.append(tiny.logits(model))
    close(*outputs, 1e-3)


def test_dora_keeps_no_more_than_lora_does() -> None:
    """Peak memory of one training step over that of the frozen base, on the allocator's own account."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 512}
    tokens = torch.randint(3, 500, (8, 128), device=CUDA)

    def peak(model: Any) -> int:
        model = model.to(CUDA).train()
        for parameter in model.get_input_embeddings().parameters():
            parameter.requires_grad_(True)
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model(input_ids=tokens, labels=tokens).loss.backward()
            model.zero_grad()
        return torch.cuda.max_memory_allocated() - before

    base = peak(tiny.llama(**sizes).requires_grad_(False))
    lora, dora = (peak(adapted(tiny.llama(**sizes), target_modules="all-linear", use_dora=d)) for d in (False, True))
    assert lora < 1.45 * base and dora < 1.9 * base, (lora / base, dora / base)


def test_copies_and_pickles_stay_there() -> None:
    model = adapted().to(CUDA).eval()
    expected = tiny.logits(model, tiny.ids().to(CUDA))
    assert torch.equal(tiny.logits(copy.deepcopy(model), tiny.ids().to(CUDA)), expected)


def test_fsdp_driven_by_accelerate(tmp_path: Path) -> None:
    """One process shards nothing with FSDP1, and torch's own state dict of that fails after a step if parameters are
    frozen, with or without adapters; two processes on CPUs are in `test_distributed.py`.
    """
    run_ranks([sys.executable, worker.__file__, "2", str(tmp_path)], tmp_path, world=1, gpu=True)
