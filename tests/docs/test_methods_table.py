"""docs/methods.md is generated from the registry and from what storage formats allow; `python -m tests.docs.test_methods_table` writes it."""

from pathlib import Path

from tests.storage.formats import FORMATS, installed
from tests.storage.test_contract import METHODS, outcome

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


STORAGE = """
## Quantised bases

Adapters on quantised linear layers, cell by cell from the tests of tests/storage. "merge": trains and merges; merging rounds to
the format again, unmerging puts the very bytes back. "train": trains, and merging is refused with a TypeError that says whether method or format is
the cause: lily and poly depend on the input, AQLM's codebooks come from optimisation over data, EETQ, INC and TE weights are known to their kernels only.
"no": refused when the adapter is made, because the method reads the weight in training (or, LN tuning, trains a copy of it). Single options
that read it (MiSS 'bat', DoRA, PiSSA ...) are refused in the same way: tests/storage/test_unreadable.py tries every setting of every method.

- bitsandbytes, torchao, HQQ, quanto and AQLM are tested with their packages on a CPU. torchao's packed Int4 formats need an
  accelerator or a further package: its 4 bits are tested as `IntxWeightOnlyConfig`.
- **Stand-ins**: `gptq` and `awq` (GPTQModel) and `eetq` are tested with stand-ins that have the documented tensors of the packages'
  layers where these are not installed, as in CI: GPTQModel pins numpy or torch against the other packages and has a dependency
  without wheels. Where it is installed, the same tests use its own torch kernels. Kernels that rearrange the weight (Marlin, ExLlama ...)
  are forward only, like `eetq`; so are Intel Neural Compressor (`inc`) and Transformer Engine (`te`), which are found by package and class name
  and tested with stand-ins of the documented classes. Adapters on a LayerNormLinear or LayerNormMLP see the input before the norm.
- **compressed-tensors** needs no column: the package makes the layers dense at the first forward, Inlay when it adapts the model.
- A base that transformers marks `quantization_method == "gptq"` can be merged layer by layer, but LoRA's `merge_and_unload` refuses it, as
  the published library does.

"""


def storage_table(known: str) -> str:
    """The outcomes; columns of packages that are not installed are taken from the page as it is."""
    head = f"| method | {' | '.join(FORMATS)} |"
    lines = {line.split(" | ")[0]: line for line in known.partition(head)[2].splitlines() if line.startswith("| ")}
    rows = [head, "|---" * (len(FORMATS) + 1) + "|"]
    for method in METHODS:
        before = lines.get(f"| {method}", "").strip("| ").split(" | ")[1:] or ["?"] * len(FORMATS)
        cells = [
            outcome(method, name) if installed(fmt.package) else old
            for (name, fmt), old in zip(FORMATS.items(), before, strict=True)
        ]
        rows.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def test_page_is_up_to_date():
    text = PAGE.read_text(encoding="utf-8")
    assert text == page() + STORAGE + storage_table(text)


if __name__ == "__main__":
    PAGE.write_text(page() + STORAGE + storage_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
