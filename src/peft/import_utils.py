# SPDX-License-Identifier: Apache-2.0
"""Which optional packages are there, and in which version. Packages are looked up, not imported."""

import functools
import importlib.util
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from packaging.version import Version

GPTQMODEL_MINIMUM = "7.0.0"
OPTIMUM_MINIMUM = "1.24.0"
TORCHAO_MINIMUM = "0.16.0"
# Optional packages by import name: the requirement as it stands in pyproject.toml, and the extra that it stands in.
OPTIONAL = {
    "transformers": ("transformers>=4.57", "cli"),
    "accelerate": ("accelerate>=1.3", "cli"),
    "gguf": ("gguf>=0.10", "demo"),
    "sklearn": ("scikit-learn>=1.3", "adamss"),
    "bitsandbytes": ("bitsandbytes", "quantization"),
    "eetq": ("eetq", None),
}


def _is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # a broken parent package, or an entry of sys.modules without a spec
        return False


def _version(distribution: str) -> Version:
    return Version(metadata.version(distribution))


def _require(distribution: str, minimum: str) -> None:
    version = _version(distribution)
    if version < Version(minimum):
        raise ImportError(
            f"Found an incompatible version of {distribution}. Found version {version}, but only versions "
            f">= {minimum} are supported. Please upgrade or uninstall it."
        )


@functools.lru_cache
def require(purpose: str, *packages: str, error: type[Exception] = ImportError) -> None:
    """One message about all `packages` that are missing or too old for `purpose`: what is there, what is needed."""
    from packaging.requirements import Requirement

    wrong, install = [], {}
    for package in packages:
        text, extra = OPTIONAL[package]
        needed = Requirement(text)
        try:
            found = _version(needed.name) if _is_there(package) else None
        except metadata.PackageNotFoundError:  # an importable package without metadata has no version to judge
            continue
        if found is None or not needed.specifier.contains(found, prereleases=True):
            wrong.append(f"{text} ({f'{found} is' if found else 'not'} installed)")
            install[f"'peft[{extra}]'" if extra else needed.name] = None
    if wrong:
        raise error(f"{purpose} needs {' and '.join(wrong)}: pip install {' '.join(install)}")


def _finder(package: str) -> Callable[[], bool]:
    return functools.lru_cache(lambda: _is_there(package))


is_aqlm_available = _finder("aqlm")
is_bnb_available = _finder("bitsandbytes")
is_diffusers_available = _finder("diffusers")
is_eetq_available = _finder("eetq")
is_hqq_available = _finder("hqq")
is_inc_available = _finder("neural_compressor")
is_optimum_available = _finder("optimum")
is_te_available = _finder("transformer_engine")
is_te_pytorch_available = _finder("transformer_engine.pytorch")


@functools.lru_cache
def is_bnb_4bit_available() -> bool:
    if not is_bnb_available():
        return False
    import bitsandbytes as bnb  # type: ignore[import-not-found]

    return hasattr(bnb.nn, "Linear4bit")


@functools.lru_cache
def is_gptqmodel_available() -> bool:
    """Whether gptqmodel can be used; ImportError if it is too old or optimum is missing or too old."""
    if not _is_there("gptqmodel"):
        return False
    _require("gptqmodel", GPTQMODEL_MINIMUM)
    if not is_optimum_available():
        raise ImportError(f"gptqmodel requires optimum version `{OPTIMUM_MINIMUM}` or higher to be installed.")
    _require("optimum", OPTIMUM_MINIMUM)
    return True


@functools.lru_cache
def is_torchao_available() -> bool:
    """Whether torchao can be used; ImportError if it is too old."""
    if not _is_there("torchao"):
        return False
    _require("torchao", TORCHAO_MINIMUM)
    return True


@functools.lru_cache
def is_torchao_ge_v0_18_0() -> bool:
    return _is_there("torchao") and _version("torchao") >= Version("0.18.0")


@functools.lru_cache
def is_torch_tpu_available(check_device: bool = True) -> bool:
    """Whether torch_xla is there and, with `check_device`, a device of it."""
    if not _is_there("torch_xla"):
        return False
    if not check_device:
        return True
    import torch_xla.core.xla_model as xm  # type: ignore[import-not-found]

    try:
        xm.xla_device()
    except RuntimeError:
        return False
    return True


@functools.lru_cache
def is_xpu_available(check_device: bool = False) -> bool:
    """Whether torch can use an Intel GPU; with `check_device`, whether a tensor can be put on one."""
    if not torch.xpu.is_available():
        return False
    if check_device:
        try:
            torch.zeros(1, device="xpu")
        except RuntimeError:
            return False
    return True


# ---- transformers, by the version of the installed distribution
_TRANSFORMERS = {
    "is_transformers_le_4_53": "<4.54.0.dev0",
    "is_transformers_ge_v5": ">=5.0.0.dev0",
    "is_transformers_ge_v5_1_0": ">=5.1.0.dev0",
    "is_transformers_ge_v5_4_0": ">=5.4.0.dev0",
    "is_transformers_ge_v5_6_0": ">=5.6.0.dev0",
    "is_transformers_ge_v5_13_0": ">=5.13.0.dev0",
    "is_transformers_ge_v5_17_0": ">=5.17.0.dev0",
    "is_transformers_dtensor_tp": ">=5.17.0.dev0",
}


def __getattr__(name: str) -> Any:
    if name not in _TRANSFORMERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from packaging.specifiers import SpecifierSet

    try:
        value = SpecifierSet(_TRANSFORMERS[name]).contains(_version("transformers"), prereleases=True)
    except metadata.PackageNotFoundError:
        value = False
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_TRANSFORMERS})
