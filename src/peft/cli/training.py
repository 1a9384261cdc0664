# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer, set up for an adapter: arguments, live progress, stopping that can be resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect as pyinspect
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from .data import IGNORE, collator, method_inputs


def training_arguments(args: Any, output: Path) -> TrainingArguments:
    """TrainingArguments for the options of `peft train`, for the installed release of transformers."""
    known = {f.name for f in dataclasses.fields(TrainingArguments)}
    cpu = not torch.accelerator.is_available()
    values: dict[str, Any] = {
        "output_dir": str(output),
        "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": 2 * args.batch_size,
        "gradient_accumulation_steps": args.accumulate,
        "learning_rate": args.lr,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 10 if args.steps is None or args.steps > 50 else 0,
        "weight_decay": 0.0,
        "max_steps": -1 if args.steps is None else args.steps,
        "num_train_epochs": args.epochs or 1.0,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if args.save_steps else "no",
        "save_steps": args.save_steps or 500,
        "save_total_limit": 2,
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "prediction_loss_only": True,
        "seed": args.seed,
        "data_seed": args.seed,
        "use_cpu": cpu,
        "dataloader_pin_memory": not cpu,
        "include_num_input_tokens_seen": "non_padding",
    }
    if cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        values["ddp_backend"] = "gloo"
    if "train_sampling_strategy" in known:
        values["train_sampling_strategy"] = "group_by_length"
    else:
        values |= {"group_by_length": True, "include_num_input_tokens_seen": True}
    return TrainingArguments(**values)


class Recorder(TrainerCallback):
    """Progress bar with loss, tokens/s and time left."""

    def __init__(self, shown: bool):
        self.shown = shown
        self.seconds = 0.0
        self.tokens = 0
        self._bar: tqdm | None = None
        self._start = 0.0
        self._seen_before = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start, self._seen_before = time.perf_counter(), int(state.num_input_tokens_seen)
        if self.shown:
            layout = "{desc} {percentage:3.0f}% {bar:24} {n_fmt}/{total_fmt} [{elapsed}, left {remaining}{postfix}]"
            self._bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="training", bar_format=layout, mininterval=0.5
            )

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The order of an epoch is drawn from torch's generator: seeded here, a resumed run sees the same order."""
        torch.manual_seed(args.seed + int(state.epoch or 0))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = time.perf_counter() - self._start
        self.tokens = int(state.num_input_tokens_seen) - self._seen_before
        if self._bar is not None:
            losses = [log["loss"] for log in state.log_history[-1:] if "loss" in log]
            loss = f"loss {losses[0]:.3f}, " if losses else ""
            self._bar.set_postfix_str(f"{loss}{self.tokens_per_second:,.0f} tokens/s", refresh=False)
            self._bar.update(state.global_step - self._bar.n)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)


class GracefulStop(TrainerCallback):
    """Ctrl-C or the time limit ends training after the running step; Ctrl-C leaves a checkpoint to resume from.

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

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        late = self._limit is not None and time.perf_counter() - self._start > self._limit
        asked, late = _any_process(self._asked, args), _any_process(late, args)
        if asked and state.global_step < state.max_steps:
            self.interrupted = True
            control.should_save = True
        if (asked or late) and state.global_step < state.max_steps:
            self.out_of_time = late and not asked
            control.should_training_stop = True


class RankBudget(TrainerCallback):
    """Methods that move their parameter budget during training (AdaLoRA, AdaMSS) are told of each step."""

    def __init__(self, update: Any):
        self._update = update

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._update(state.global_step)


def _any_process(flag: bool, args: TrainingArguments) -> bool:
    if args.world_size == 1:
        return flag
    votes = torch.tensor([float(flag)], device=args.device)
    torch.distributed.all_reduce(votes)
    return bool(votes.item())


def build_trainer(
    model: Any, arguments: TrainingArguments, tokenizer: Any, train: list[Any], stop: GracefulStop
) -> tuple[Trainer, Recorder]:
    recorder = Recorder(shown=arguments.process_index == 0)
    callbacks: list[TrainerCallback] = [recorder, stop]
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
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    return trainer, recorder


def held_out_loss(trainer: Trainer, rows: list[Any]) -> float:
    """Loss per learned token, exact for any batch size and number of processes.

    (`Trainer.evaluate` averages over batches, and repeats examples where processes would get unequal shares.)
    """
    args, model = trainer.args, trainer.model
    mine = sorted(rows, key=lambda row: len(row["input_ids"]))[args.process_index :: args.world_size]
    total = torch.zeros(2, dtype=torch.float64)
    assert model is not None
    training = model.training
    model.eval()
    with torch.no_grad():
        for start in range(0, len(mine), args.eval_batch_size):
            batch = trainer.data_collator(mine[start : start + args.eval_batch_size])
            count = int((batch["labels"][:, 1:] != IGNORE).sum())
            loss = model(**{name: value.to(args.device) for name, value in batch.items()}).loss
            total += torch.tensor([float(loss) * count, count], dtype=torch.float64)
    model.train(training)
    if args.world_size > 1:
        total = total.to(args.device)
        torch.distributed.all_reduce(total)
    return float(total[0] / total[1])


def _takes_last_logits(model: Any) -> bool:
    """Prompt methods lengthen the sequence themselves and need whole labels."""
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        return False
    accepted = pyinspect.signature(type(model.get_base_model()).forward).parameters
    return {"logits_to_keep", "position_ids"} <= set(accepted)
