# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer, set up for an adapter: arguments, live progress, stopping that can be resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect as pyinspect
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from .data import IGNORE, collator, method_inputs
from .models import quiet


def training_arguments(args: Any) -> TrainingArguments:
    """TrainingArguments for the options of `peft train`, for the installed release of transformers."""
    cpu = not torch.accelerator.is_available()
    values: dict[str, Any] = {
        "output_dir": str(args.output),
        "per_device_train_batch_size": args.batch_size,
        "gradient_accumulation_steps": args.accumulate,
        "learning_rate": args.lr,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 10 if args.steps is None or args.steps > 50 else 0,
        "max_steps": args.steps or -1,
        "num_train_epochs": args.epochs or 1.0,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if args.save_steps else "no",
        "save_steps": args.save_steps or 500,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,  # there is a bar of our own
        "remove_unused_columns": False,
        "seed": args.seed,
        "use_cpu": cpu,
        "dataloader_pin_memory": not cpu,
    }
    if "train_sampling_strategy" in {field.name for field in dataclasses.fields(TrainingArguments)}:
        values |= {"train_sampling_strategy": "group_by_length", "include_num_input_tokens_seen": "non_padding"}
    else:  # transformers 4
        values |= {"group_by_length": True, "include_num_input_tokens_seen": True}
    return TrainingArguments(**values)


class Progress(ProgressCallback):
    """The progress bar of transformers, with loss, tokens/s and time left in it instead of a line for each step."""

    tokens_per_second = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.current_step, self._seen_before = state.global_step, state.num_input_tokens_seen
        if self.training_bar is not None:
            self.training_bar.initial = self.training_bar.n = state.global_step
            self.training_bar.mininterval = 0.1 if sys.stderr.isatty() else 10.0  # a log keeps every line
            self.training_bar.bar_format = (
                "training {percentage:3.0f}% {bar:24} {n_fmt}/{total_fmt} [{elapsed}, left {remaining}{postfix}]"
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and "loss" in logs:
            seconds = self.training_bar.format_dict["elapsed"]
            self.tokens_per_second = (state.num_input_tokens_seen - self._seen_before) / max(seconds, 1e-9)
            text = f"loss {logs['loss']:.3f}, {self.tokens_per_second:,.0f} tokens/s"
            self.training_bar.set_postfix_str(text, refresh=False)


class GracefulStop(TrainerCallback):
    """Ctrl-C or the time limit ends training after the running step; Ctrl-C leaves a checkpoint to resume from, and a
    resumed run goes on as if it had not been stopped.

    Processes of one job agree on it, since a process that stops alone leaves the others waiting for its gradients.
    """

    def __init__(self, limit_seconds: float | None = None):
        self.interrupted = False
        self.out_of_time = False
        self._asked = False
        self._limit = limit_seconds
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        def ask(signum: int, frame: Any) -> None:
            if self._asked:
                raise KeyboardInterrupt
            self._asked = True
            print("\nstopping after this step (again to stop at once)", flush=True)

        before = signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The order of an epoch is drawn from torch's generator: seeded here, a resumed run sees the same order."""
        torch.manual_seed(args.seed + int(state.epoch or 0))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        late = self._limit is not None and time.perf_counter() - self._start > self._limit
        asked, late = map(any, zip(*gather_object([(self._asked, late)]), strict=True))
        if (asked or late) and state.global_step < state.max_steps:
            self.interrupted, self.out_of_time = asked, not asked
            control.should_training_stop = True
            control.should_save = control.should_save or asked


class RankBudget(TrainerCallback):
    """Methods that move their parameter budget during training (AdaLoRA, AdaMSS) are told of each step."""

    def __init__(self, update: Any):
        self._update = update

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._update(state.global_step)


def build_trainer(
    model: Any, arguments: TrainingArguments, tokenizer: Any, train: list[Any], stop: GracefulStop
) -> tuple[Trainer, Progress]:
    progress = Progress()
    callbacks: list[TrainerCallback] = [progress, stop]
    update = getattr(model.base_model, "update_and_allocate", None)
    if update is not None:
        callbacks.append(RankBudget(update))
    pad = collator(tokenizer.pad_token_id, last_logits_only=arguments.n_gpu <= 1 and _takes_last_logits(model))
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=lambda rows: pad(rows) | method_inputs(model, len(rows)),
        train_dataset=train,  # type: ignore[arg-type]  # a list is a map-style data set
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, progress


def held_out_loss(trainer: Trainer, rows: list[Any]) -> float:
    """Loss per learned token, exact for any batch size and number of processes.

    (`Trainer.evaluate` averages over batches, and repeats examples where processes would get unequal shares.)
    """
    args, model = trainer.args, trainer.model
    size = 2 * args.per_device_train_batch_size
    mine = sorted(rows, key=lambda row: len(row["input_ids"]))[args.process_index :: args.world_size]
    total, learned = 0.0, 0
    assert model is not None
    training = model.training
    model.eval()
    with torch.no_grad():
        for start in range(0, len(mine), size):
            batch = trainer.data_collator(mine[start : start + size])
            count = int((batch["labels"][:, 1:] != IGNORE).sum())
            loss = model(**{name: value.to(args.device) for name, value in batch.items()}).loss
            total, learned = total + float(loss) * count, learned + count
    model.train(training)
    parts = gather_object([(total, learned)])
    return sum(part[0] for part in parts) / sum(part[1] for part in parts)


def sample(model: Any, tokenizer: Any, prompts: list[str], longest: int) -> list[str]:
    """Short greedy continuations, to see what training changed; with their prompts at most `longest` tokens."""
    said, tokens = [], min(24, max(1, longest // 2))
    training = model.training
    model.eval()
    with torch.no_grad(), quiet():
        for prompt in prompts:
            ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)["input_ids"]
            ids = ids[:, tokens - longest :].to(model.device)
            options = {"max_new_tokens": tokens, "do_sample": False, "use_cache": True}
            options |= {"attention_mask": torch.ones_like(ids), "pad_token_id": tokenizer.pad_token_id}
            found = model.generate(input_ids=ids, **method_inputs(model, 1), **options)
            said.append(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True).strip())
    model.train(training)
    return said


def _takes_last_logits(model: Any) -> bool:
    """Prompt methods lengthen the sequence themselves and need whole labels."""
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        return False
    accepted = pyinspect.signature(type(model.get_base_model()).forward).parameters
    return {"logits_to_keep", "position_ids"} <= set(accepted)
