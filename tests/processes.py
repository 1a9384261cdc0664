"""Tests that need several processes: started together, watched, and gone at the end whatever happens."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_ranks(command: Sequence[str], folder: Path, world: int = 2, seconds: int = 240, gpu: bool = False) -> str:
    """Run `command` once for each rank, with the variables that torch.distributed reads; returns what they printed.

    Fails as soon as one of them fails, or when they take longer than `seconds`.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    env = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}",
    }  # fmt: skip
    if not gpu:
        env["CUDA_VISIBLE_DEVICES"] = ""
    folder.mkdir(parents=True, exist_ok=True)
    logs = [folder / f"rank{rank}.log" for rank in range(world)]
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(process(command, log, env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}))
            for rank, log in enumerate(logs)
        ]
        deadline = time.monotonic() + seconds
        while (codes := [p.poll() for p in processes]).count(None) and not any(codes) and time.monotonic() < deadline:
            time.sleep(0.05)
    text = "\n".join(f"== rank {rank}\n{log.read_text()[-6000:]}" for rank, log in enumerate(logs))
    assert codes == [0] * world, f"exit codes {codes} (None: ran longer than {seconds} s)\n{text}"
    return text


def leave() -> None:
    """The last call of a rank. Threads of gloo sometimes abort a process while its interpreter is taken down
    ("terminate called without an active exception", no Python frame): all is judged by then, so that is left out.
    """
    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@contextlib.contextmanager
def process(command: Sequence[str], log: Path, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen]:
    """A process that writes to `log`; at the end, it and what it started is gone."""
    with open(log, "w") as out:
        started = subprocess.Popen(
            command, env=env, stdout=out, stderr=out, cwd=ROOT, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            yield started
        finally:
            if started.poll() is None:  # launchers end their workers, which are in sessions of their own
                started.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    started.wait(5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
            started.wait()
