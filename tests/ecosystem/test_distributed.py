"""Two processes on gloo: DDP, FSDP1, FSDP2, ZeRO and tensor parallelism train what one process trains, and save it."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.ecosystem import accelerate_fsdp_worker, tiny
from tests.ecosystem import distributed_worker as worker
from tests.processes import run_ranks

import peft


def launch(mode: str, folder: Path, *cases: str) -> None:
    run_ranks([sys.executable, str(Path(worker.__file__)), mode, str(folder), *cases], folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapters of all cases, trained by one process on whole batches."""
    folder = tmp_path_factory.mktemp("alone")
    for case in worker.CONFIGS | worker.PROMPTS:
        model = worker.made(case)
        worker.train(model)
        model.save_pretrained(folder / case)
    model = worker.two_adapters()
    worker.switch(model, lambda: model)
    model.save_pretrained(folder / "switch")
    return folder


def same_files(one: Path, two: Path, tolerance: float = 1e-5) -> None:
    """The same keys, shapes and (up to rounding) values, and the same configuration."""
    a, b = load_file(one / "adapter_model.safetensors"), load_file(two / "adapter_model.safetensors")
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype
        assert tiny.close(a[key], b[key], tolerance), (one.name, key, float((a[key] - b[key]).abs().max()))
    assert (one / "adapter_config.json").read_text() == (two / "adapter_config.json").read_text()


def test_the_cases_train(alone: Path) -> None:
    """The comparison below would also hold for adapters that nothing moves."""
    for case in worker.CONFIGS:
        before = peft.get_peft_model_state_dict(worker.made(case))
        after = load_file(alone / case / "adapter_model.safetensors")
        moved = [float((after[k] - v).abs().max()) for k, v in before.items() if v.is_floating_point()]
        assert max(moved) > 5e-3 and torch.tensor(moved).count_nonzero() > len(moved) // 2, case


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp1", "fsdp2"])
def test_sharded_training_equals_one_process(mode: str, alone: Path, tmp_path: Path) -> None:
    """With a trained head and gradient checkpointing as case "head"; the file gives one process the same logits."""
    launch(mode, tmp_path, *worker.CONFIGS)
    for case in worker.CONFIGS:
        same_files(tmp_path / case, alone / case)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp1", "fsdp2", "zero3"])
def test_prompts_train_sharded_as_in_one_process(mode: str, alone: Path, tmp_path: Path) -> None:
    if mode == "zero3":
        pytest.importorskip("deepspeed")
    launch(mode, tmp_path, *worker.PROMPTS)
    for case in worker.PROMPTS:
        same_files(tmp_path / case, alone / case)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_switching_adapters_between_steps(mode: str, alone: Path, tmp_path: Path) -> None:
    launch(mode, tmp_path, "switch")
    same_files(tmp_path / "switch", alone / "switch")
    same_files(tmp_path / "switch" / "other", alone / "switch" / "other")


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_fsdp_driven_by_accelerate(version: int, tmp_path: Path) -> None:
    """Prepared, trained, saved, checkpointed and gathered by Accelerator: see the worker."""
    run_ranks([sys.executable, accelerate_fsdp_worker.__file__, str(version), str(tmp_path)], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["zero2", "zero3"])
def test_deepspeed_equals_one_process(mode: str, alone: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    cases = ["lora", "head", "ia3", "oft"]
    launch(mode, tmp_path, *cases)
    for case in cases:
        same_files(tmp_path / case, alone / case)


@pytest.mark.slow
def test_tensor_parallel_training_equals_one_process(alone: Path, tmp_path: Path) -> None:
    """Colwise and rowwise targets; merged equals unmerged, saved and loaded equals live: see the worker."""
    pytest.importorskip("transformers.distributed")
    tiny.llama().save_pretrained(tmp_path / "base")
    launch("tp", tmp_path, *worker.CONFIGS)
    for case in worker.CONFIGS:
        same_files(tmp_path / case, alone / case, 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "world"), [("uneven", 2), ("compiled", 2), ("ddp", 4), ("fsdp2", 4)])
def test_split_layers_equal_whole_ones(case: str, world: int, tmp_path: Path) -> None:
    """Uneven parts, torch.compile, and a mesh whose other axis shares the batch (DDP, FSDP2): see the worker."""
    script = Path(worker.__file__).with_name("distributed_tensor_worker.py")
    run_ranks([sys.executable, str(script), case], tmp_path, world)


def test_adapters_are_whole_under_tensor_parallelism(alone: Path) -> None:
    """What other libraries import to split a file: there is nothing to split."""
    from peft.utils.save_and_load import _maybe_shard_state_dict_for_tp

    model = worker.made("lora")
    for module in model.get_base_model().modules():
        module._hf_tp_plan = "colwise"
    state = load_file(alone / "lora" / "adapter_model.safetensors")
    before = dict(state)
    assert _maybe_shard_state_dict_for_tp(model, state, "default") is None
    assert state.keys() == before.keys() and all(state[k] is v for k, v in before.items())
    peft.set_peft_model_state_dict(model, state)
    assert tiny.same(peft.get_peft_model_state_dict(model), before)
