"""Two processes on gloo: DDP, FSDP1, FSDP2, ZeRO and tensor parallelism train what one process trains, and save it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.ecosystem import distributed_worker as worker
from tests.ecosystem import tiny

import peft

ROOT = Path(__file__).parents[2]
WORLD = 2


def launch(mode: str, folder: Path, *cases: str, seconds: int = 240) -> str:
    """Run the worker in two processes to the end; returns what they printed. None of them outlives this call."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    env = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD),
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "tests/ecosystem/distributed_worker.py"), mode, str(folder), *cases]
    folder.mkdir(parents=True, exist_ok=True)
    logs = [folder / f"rank{rank}.log" for rank in range(WORLD)]
    with contextlib.ExitStack() as stack:
        processes = []
        for rank, log in enumerate(logs):
            out = stack.enter_context(open(log, "w"))
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = subprocess.Popen(
                command,
                env=env | ranks,
                stdout=out,
                stderr=out,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            processes.append(stack.enter_context(_ended(process)))
        deadline = time.monotonic() + seconds
        while (codes := [p.poll() for p in processes]).count(None) and not any(codes) and time.monotonic() < deadline:
            time.sleep(0.05)
    text = "\n".join(f"== rank {rank}\n{log.read_text()[-6000:]}" for rank, log in enumerate(logs))
    assert codes == [0] * WORLD, f"{mode}: exit codes {codes} (None: ran longer than {seconds} s)\n{text}"
    return text


@contextlib.contextmanager
def _ended(process: subprocess.Popen) -> Iterator[subprocess.Popen]:
    """At the end, the process and everything that it started is gone."""
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapters of all cases, trained by one process on whole batches."""
    folder = tmp_path_factory.mktemp("alone")
    for case in worker.CONFIGS:
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
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_switching_adapters_between_steps(mode: str, alone: Path, tmp_path: Path) -> None:
    launch(mode, tmp_path, "switch")
    same_files(tmp_path / "switch", alone / "switch")
    same_files(tmp_path / "switch" / "other", alone / "switch" / "other")


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
