"""docs/methods.md is generated from the registry; `python -m tests.docs.test_methods_table` writes it."""

from pathlib import Path

from peft import registry
from peft.core.layer import AdapterLayer

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
KINDS = ("Linear", "Conv1D", "Conv1d", "Conv2d", "Conv3d", "Embedding", "MultiheadAttention", "Norm")
HEAD = """# Methods

Generated from the registry by `python -m tests.docs.test_methods_table`; a test keeps it up to date. Layer kinds: L linear, T
transformers' Conv1D, 1 2 3 convolutions, E embedding, M attention, N norm. Every cell with a letter is tried by the contract tests.
"merge": has a weight form. "LoRA": converts to a LoRA of given rank. "start": a new adapter changes no output.

| method | configuration | kinds | merge | LoRA | start |
|---|---|---|---|---|---|
"""
LETTERS = dict(zip(KINDS, "LT123EMN", strict=True))


def page() -> str:
    rows = []
    for record in registry.methods().values():
        layer = record.layer
        if layer is None or not issubclass(layer, AdapterLayer):
            kind = "prompt" if record.is_prompt else "whole model"
            rows.append(f"| {record.name} | `{record.config.__name__}` | {kind} | - | - | - |")
            continue
        kinds = " ".join(LETTERS[k.name] for k in layer.kinds if k.name in LETTERS)
        weight = layer.hooks & {"delta_weight", "factors", "delta_bias", "map_weight", "map_bias", "replace"}
        lora = layer.standalone_delta and layer.hooks & {"delta_weight", "factors"}
        start = getattr(record.tuner, "identity_at_init", True)
        marks = ["yes" if flag else "no" for flag in (weight, lora, start)]
        rows.append(f"| {record.name} | `{record.config.__name__}` | {kinds} | {' | '.join(marks)} |")
    return HEAD + "\n".join(rows) + "\n"


def test_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
