# SPDX-License-Identifier: Apache-2.0
"""Training data: read the user's files, turn examples into token ids with labels, pad batches.

An example is a list of spans `(text, learn)`; the loss is taken only on spans that are to be learned, so a prompt, the
user's turns of a conversation and padding carry the label -100.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
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
        raise CliError(f"--data {path}: {'is a folder, expected a file' if path.is_dir() else 'no such file'}")
    if path.suffix not in (".txt", ".jsonl", ".json", ".ndjson"):
        raise CliError(f"--data {path}: expected .jsonl, .json or .txt, got '{path.suffix}'")


def load_examples(path: Path, tokenizer: Any, max_length: int) -> list[Example]:
    """Examples of a .jsonl, .json or .txt file; a broken line is reported as `file:line: what is wrong`."""
    check_data_file(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CliError(f"{path}: not UTF-8 text at byte {error.start}") from error
    if path.suffix == ".txt":
        blocks = _blocks(text.splitlines(keepends=True), tokenizer, max_length)
        examples = [Example(((block, True),), end=False) for block in blocks]
    else:
        examples = [_record_example(record, where, tokenizer) for where, record in _records(text, path)]
    if not examples:
        raise CliError(f"--data {path}: the file has no examples")
    return examples


def _records(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    """(place, value) of each: lines, or the entries of a list that is the whole .json file."""
    if path.suffix == ".json" and text.lstrip().startswith("["):
        yield from ((f"{path}: entry {n}", record) for n, record in enumerate(_parsed(text, path, 1), 1))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", _parsed(line, path, number)


def _parsed(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where, what = f"{path}:{first_line + error.lineno - 1}", error.msg.removesuffix(" at")
        hint = "" if text.lstrip().startswith("[") else " (each line is one object)"
        raise CliError(f"{where}: not valid JSON: {what} at column {error.colno}{hint}") from error


def _record_example(record: Any, where: str, tokenizer: Any) -> Example:
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
        raise CliError(f"{where}: 'messages' must be a list of {{role, content}}, texts, at least one role 'assistant'")
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
    """Plain text, cut into blocks of about `max_length` tokens: at line ends, lines longer than that at words."""

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    blocks, block, size = [], "", 0
    for line in lines:
        for part in [line] if count(line) <= max_length else re.findall(r"\s*\S+|\s+$", line):
            length = count(part)
            if block and size + length > max_length:
                blocks.append(block)
                block, size = "", 0
            block, size = block + part, size + length
    return [text for text in (*blocks, block) if text.strip()]


def encode(example: Example, tokenizer: Any) -> dict[str, list[int]]:
    """Token ids and labels."""
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
    return {"input_ids": ids, "labels": labels}


def encode_all(
    examples: Sequence[Example], tokenizer: Any, max_length: int
) -> tuple[list[dict[str, list[int]]], int, int]:
    """Examples within `max_length`, how many have nothing to learn there and are left out, how many are cut off."""
    whole = [encode(example, tokenizer) for example in examples]
    cut = [{name: values[:max_length] for name, values in row.items()} for row in whole]
    kept = [row for row in cut if any(label != IGNORE for label in row["labels"][1:])]
    left_out = len(cut) - len(kept)
    return kept, left_out, sum(len(row["input_ids"]) > max_length for row in whole) - left_out


def split_examples(examples: list[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Shuffled train and held-out parts; at least one example in each."""
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
        return {"task_ids": torch.zeros(rows, dtype=torch.long)}
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
