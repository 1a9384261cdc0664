"""Tests of other libraries running on this one. Offline, on one core, on tiny models made from configurations."""

import os

import pytest

os.environ.setdefault("WANDB_DISABLED", "true")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

pytest.importorskip("transformers", reason="the `ecosystem` extra is not installed")
pytest.importorskip("accelerate", reason="the `ecosystem` extra is not installed")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
