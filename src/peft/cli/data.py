# SPDX-License-Identifier: Apache-2.0
"""Training data: read the user's files, turn examples into token ids with labels, pad batches.

An example is a list of spans `(text, learn)`; the loss is taken only on spans that are to be learned, so a prompt, the
user's turns of a conversation and padding carry the label -100.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CliError, nearest

IGNORE = -100
_KEYS = ("text", "prompt", "completion", "messages")


@dataclass(frozen=True)
class Example:
    """Text spans in order, and whether the tokenizer's start and end of text are added (the end is learned)."""

    spans: tuple[tuple[str, bool], ...]
    start: bool = True
    end: bool = True


def pair_example(prompt: str, completion: str) -> Example:
    return Example(((prompt, False), (completion, True)))


def check_data_file(path: Path) -> None:
    if not path.is_file():
        raise CliError(f"--data {path}: no such file")
    if path.suffix not in (".txt", ".jsonl", ".json", ".ndjson"):
        raise CliError(f"--data {path}: expected .jsonl or .txt, got '{path.suffix}'")


def load_examples(path: Path, tokenizer: Any, max_length: int) -> list[Example]:
    """Examples of a .jsonl, .json or .txt file; a broken line is reported as `file:line: what is wrong`."""
    check_data_file(path)
    try:
        with path.open(encoding="utf-8") as file:
            lines = list(file)
    except UnicodeDecodeError as error:
        raise CliError(f"{path}: not UTF-8 text at byte {error.start}") from error
    if path.suffix == ".txt":
        examples = [Example(((text, True),), end=False) for text in _blocks(lines, tokenizer, max_length)]
    else:
        examples = [
            _record_example(line, f"{path}:{number}", tokenizer) for number, line in enumerate(lines, 1) if line.strip()
        ]
    if not examples:
        raise CliError(f"--data {path}: the file has no examples")
    return examples


def _record_example(line: str, where: str, tokenizer: Any) -> Example:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise CliError(f"{where}: not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}") from error
    if not isinstance(record, dict):
        raise CliError(f"{where}: expected a JSON object, got {type(record).__name__}")
    if "messages" in record:
        return _chat_example(record["messages"], where, tokenizer)
    if "completion" in record:
        prompt, completion = record.get("prompt", ""), record["completion"]
        if not isinstance(prompt, str) or not isinstance(completion, str) or not completion:
            raise CliError(f"{where}: 'prompt' and 'completion' must be text, and 'completion' not empty")
        return pair_example(prompt, completion)
    if "text" in record:
        if not isinstance(record["text"], str) or not record["text"]:
            raise CliError(f"{where}: 'text' must be text and not empty")
        return Example(((record["text"], True),))
    hint = next((nearest(key, _KEYS) for key in record if nearest(key, _KEYS)), "")
    raise CliError(
        f"{where}: expected 'text', 'prompt' and 'completion', or 'messages'; got {sorted(record) or 'nothing'}{hint}"
    )


def _chat_example(messages: Any, where: str, tokenizer: Any) -> Example:
    """Spans of a conversation; the loss is on what the assistant says."""
    ok = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not ok or not any(m["role"] == "assistant" for m in messages):
        raise CliError(f"{where}: 'messages' must be a list of {{role, content}} with at least one role 'assistant'")
    if not getattr(tokenizer, "chat_template", None):
        raise CliError(f"{where}: the model's tokenizer has no chat template, use 'prompt' and 'completion' instead")
    spans: list[tuple[str, bool]] = []
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
        if not (before.startswith(done) and after.startswith(before)):
            raise CliError(f"{where}: the chat template rewrites earlier turns; give one assistant turn per example")
        spans += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    return Example(tuple(spans), start=False, end=False)  # the template has them


def _blocks(lines: list[str], tokenizer: Any, max_length: int) -> list[str]:
    """Plain text, cut at line ends into blocks of about `max_length` tokens."""
    blocks, block, size = [], "", 0
    for line in lines:
        length = len(tokenizer(line, add_special_tokens=False)["input_ids"])
        if block and size + length > max_length:
            blocks.append(block)
            block, size = "", 0
        block, size = block + line, size + length
    return [text for text in (*blocks, block) if text.strip()]


def encode(example: Example, tokenizer: Any, max_length: int) -> dict[str, list[int]] | None:
    """Token ids and labels; None if nothing to learn is left within `max_length`."""
    ids: list[int] = []
    labels: list[int] = []
    for index, (text, learn) in enumerate(example.spans):
        piece = tokenizer(text, add_special_tokens=index == 0 and example.start)["input_ids"]
        if piece and piece[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token or "\0"):
            piece = piece[:-1]
        ids += piece
        labels += piece if learn else [IGNORE] * len(piece)
    if example.end and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
        labels.append(tokenizer.eos_token_id)
    ids, labels = ids[:max_length], labels[:max_length]
    if all(label == IGNORE for label in labels[1:]):
        return None
    return {"input_ids": ids, "labels": labels}


def encode_all(examples: Sequence[Example], tokenizer: Any, max_length: int) -> tuple[list[dict[str, list[int]]], int]:
    """Encoded examples and how many had to be left out."""
    encoded = [encode(example, tokenizer, max_length) for example in examples]
    kept = [item for item in encoded if item is not None]
    return kept, len(encoded) - len(kept)


def split_examples(examples: list[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Shuffled train and held-out parts; at least one example in each."""
    if not 0 < fraction < 1:
        raise CliError(f"--eval-split {fraction}: expected a share between 0 and 1")
    if len(examples) < 2:
        raise CliError("--data: at least two examples are needed, one of them is held out")
    order = list(examples)
    random.Random(seed).shuffle(order)
    held_out = min(max(1, round(len(order) * fraction)), len(order) - 1)
    return order[held_out:], order[:held_out]


def method_inputs(model: Any, rows: int) -> dict[str, Any]:
    """What a method wants beside tokens: multitask prompts a task for each sequence, here one task for all."""
    import torch

    config = model.peft_config[model.active_adapter]
    if config.is_prompt_learning and getattr(config, "num_tasks", None):
        return {"task_ids": torch.zeros(rows, dtype=torch.long, device=model.device)}
    return {}


def collator(pad_id: int, last_logits_only: bool) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Pads a batch.

    With `last_logits_only` sequences end flush right and the model computes logits only from the first learned token
    on, which saves the output layer for prompts: one position more than the labels need, since the token at position
    t is predicted at t - 1. The positions are given as indices, not as a count: models slice with them, and the output
    layer of a strided slice is a batched product that first copies the weight once per sequence.
    """
    import torch

    def padded(rows: list[dict[str, Any]], name: str, fill: int) -> torch.Tensor:
        width = max(len(row[name]) for row in rows)
        gaps = [[fill] * (width - len(row[name])) for row in rows]
        lines = [gap + row[name] if last_logits_only else row[name] + gap for row, gap in zip(rows, gaps, strict=True)]
        return torch.tensor(lines)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        rows = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows]
        fills = {"input_ids": pad_id, "labels": IGNORE, "attention_mask": 0}
        batch = {name: padded(rows, name, fill) for name, fill in fills.items()}
        if last_logits_only:
            mask, labels = batch["attention_mask"], batch["labels"]
            # nothing predicts a first token, and here padding would stand before it
            labels = labels.masked_fill(mask.cumsum(1) <= 1, IGNORE)
            width = labels.shape[1]
            first = max(0, int((labels != IGNORE).any(0).nonzero()[0]) - 1)
            batch["labels"] = labels[:, first:]
            batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
            batch["logits_to_keep"] = torch.arange(first, width)
        return batch

    return collate
