# SPDX-License-Identifier: Apache-2.0
"""`peft train`: fine-tune a causal language model, measure, save, verify, report."""

from __future__ import annotations

import argparse
import contextlib
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .data import check_data_file
from .errors import CliError, check_place, number, positive

# Chosen so that the built-in run trains for three to five minutes on two cores.
DEMO_STEPS = 160
DEMO_SECONDS = 270.0
DEMO_HELD_OUT = 256

# Initialisations that look at data first.
_DATA_DRIVEN = ("eva", "corda", "lora_ga")


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "train",
        help="fine-tune a model (without options: a small one, on the docstrings of Python's standard library)",
        description="Fine-tunes a causal language model and saves an adapter. Starts in several processes under "
        "torchrun or accelerate launch: torchrun --nproc-per-node 2 -m peft.cli train ...",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    what = parser.add_argument_group("what to train")
    what.add_argument("--model", help="folder, hub id or .gguf file", default=None)
    what.add_argument(
        "--data", type=Path, help=".jsonl or .json (text | prompt, completion | messages), or .txt", default=None
    )
    what.add_argument("--method", default="lora", help="any name that `peft methods` lists")
    what.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an option of the method")
    what.add_argument("--output", type=Path, default=Path("peft-output"), help="folder for everything written")
    above_zero = number(float, "a positive number", lambda value: 0 < value < math.inf)
    share = number(float, "a share between 0 and 1", lambda value: 0 < value < 1)
    seed = number(int, f"a whole number from 0 to {2**32 - 1}", lambda value: 0 <= value < 2**32)
    how = parser.add_argument_group("how to train")
    how.add_argument("--steps", type=positive, default=None, help="optimizer steps")
    how.add_argument("--epochs", type=above_zero, default=None, help="passes over the data, 1 without --steps")
    how.add_argument("--lr", type=above_zero, default=None, help="learning rate, by default one that suits the method")
    how.add_argument("--batch-size", type=positive, default=16, help="sequences per process and step")
    how.add_argument("--accumulate", type=positive, default=1, help="batches per optimizer step")
    how.add_argument("--max-length", type=positive, default=None, help="tokens per sequence (demo 96, else 512)")
    how.add_argument("--max-seconds", type=above_zero, default=None, help="end training after this time")
    how.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    how.add_argument("--seed", type=seed, default=0)
    how.add_argument("--eval-split", type=share, default=0.1, help="share of the data that is held out")
    how.add_argument("--save-steps", type=positive, default=None, help="write a checkpoint every so many steps")
    how.add_argument("--resume", nargs="?", const="", default=None, metavar="CHECKPOINT", help="go on after a stop")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..import_utils import require
    from . import options

    started = time.perf_counter()
    require("peft train", "transformers", "accelerate", error=CliError)
    _check(args)
    config_cls = options.config_class(args.method)
    chosen = options.parse_assignments(config_cls, args.set)
    if chosen.get("task_type", "CAUSAL_LM") != "CAUSAL_LM":
        raise CliError("--set task_type: this command trains causal language models, CAUSAL_LM only")
    init = chosen.get("init_lora_weights")
    if init in _DATA_DRIVEN:
        raise CliError(f"--set init_lora_weights={init}: looks at data before training, which needs a call from Python")
    _fill_defaults(args, config_cls)
    job = _prepare(args)
    job.timings["load and prepare"] = time.perf_counter() - started
    _adapt(args, job, config_cls, chosen)
    if not _train(args, job):
        _say(job, f"\ninterrupted; go on with the same command and --resume (checkpoints are in {args.output})")
        return 130
    if job.main:
        _save_verify_report(args, job, started)
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.steps is not None and args.epochs is not None:
        raise CliError("give --steps or --epochs, not both")
    check_place("--output", args.output, folder=True)
    if args.data is not None:
        check_data_file(args.data)
    if args.resume is not None:
        args.resume = _checkpoint(args.resume, args.output)


def _checkpoint(resume: str, output: Path) -> str:
    """Folder for `--resume` (the newest in the output folder) or `--resume FOLDER`."""
    found = [Path(resume)] if resume else output.glob("checkpoint-*")
    found = [path for path in found if (path / "trainer_state.json").is_file()]
    if not found:
        raise CliError(f"--resume: no checkpoint in {resume or output}, one is written on Ctrl-C or with --save-steps")
    return str(max(found, key=lambda path: (len(path.name), path.name)))


def _fill_defaults(args: argparse.Namespace, config_cls: type) -> None:
    """The built-in job is bounded in steps and time; the user's own runs one epoch unless told otherwise."""
    from peft import PromptLearningConfig

    demo = args.data is None
    if demo and args.steps is None and args.epochs is None:
        args.steps = DEMO_STEPS
        args.max_seconds = args.max_seconds or DEMO_SECONDS
    args.max_length = args.max_length or (96 if demo else 512)
    args.lr = args.lr or (5e-3 if issubclass(config_cls, PromptLearningConfig) else 1e-3)


def _say(job: Any, *lines: str) -> None:
    if job.main:
        print(*lines, sep="\n", flush=True)


@contextlib.contextmanager
def _timed(job: SimpleNamespace, what: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    job.timings[what] = time.perf_counter() - start


def _prepare(args: argparse.Namespace) -> SimpleNamespace:
    """Distributed state, tokenizer, data and base model."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list
    from transformers import set_seed

    from . import models, training

    arguments = training.training_arguments(args)
    job = SimpleNamespace(arguments=arguments, main=arguments.process_index == 0, timings={})
    set_seed(args.seed)
    # timing decides, so the first process decides for all
    (job.dtype,) = broadcast_object_list([models.resolve_dtype(args.dtype)])
    job.source = args.model or str(models.demo_gguf())
    job.model_text = f"{args.model or models.DEMO_NAME}, {str(job.dtype).removeprefix('torch.')}"
    _say(job, f"model    {job.model_text}")
    job.tokenizer = models.load_tokenizer(job.source)
    _load_data(args, job)
    if job.source.endswith(".gguf"):
        # kept as a folder, once, so that the adapter names a base that loads quickly
        base = args.output / "base"
        if job.main and not (args.resume and (base / "config.json").is_file()):
            models.keep_dense_copy(models.load_model(job.source, job.dtype), job.tokenizer, base)
        PartialState().wait_for_everyone()
        job.source = str(base)
    job.model = models.load_model(job.source, job.dtype)
    return job


def _load_data(args: argparse.Namespace, job: SimpleNamespace) -> None:
    from . import data, harvest

    if args.data is None:
        pairs = harvest.harvest()
        parts = harvest.split(pairs, args.eval_split)
        names = [len({pair.module.split(".")[0] for pair in part}) for part in parts]
        train, held_out = ([data.pair_example(pair.prompt, pair.completion) for pair in part] for part in parts)
        held_out = held_out[:: max(1, len(held_out) // DEMO_HELD_OUT)][:DEMO_HELD_OUT]
        job.data_text = (
            f"{len(pairs):,} functions of the standard library: {len(train):,} of {names[0]} modules to train, "
            f"{len(held_out)} of {names[1]} other modules held out"
        )
    else:
        examples = data.load_examples(args.data, job.tokenizer, args.max_length)
        train, held_out = data.split_examples(examples, args.eval_split, args.seed)
        job.data_text = f"{args.data}: {len(train):,} examples to train, {len(held_out):,} held out"
    job.train, left_out, cut = data.encode_all(train, job.tokenizer, args.max_length)
    job.held_out, *_ = data.encode_all(held_out, job.tokenizer, args.max_length)
    if not job.train or not job.held_out:
        raise CliError(f"nothing to learn within --max-length {args.max_length} tokens: prompts are longer than that")
    prompts = [text for example in held_out for text, learn in example.spans[:1] if text.strip() and not learn]
    job.samples = prompts[:: max(1, len(held_out) // 2)][:2] or ["".join(text for text, _ in held_out[0].spans)[:80]]
    _say(job, f"data     {job.data_text}")
    if left_out:
        _say(job, f"         {left_out} have nothing to learn within --max-length {args.max_length} and are left out")
    if cut:
        _say(job, f"         {cut} are longer than --max-length {args.max_length} and cut off")


def _adapt(args: argparse.Namespace, job: SimpleNamespace, config_cls: type, chosen: dict[str, Any]) -> None:
    """Wrap the model: the user's options over defaults that make every method start."""
    from peft import get_peft_model
    from peft.status import trainable_line

    from .describe import describe_targets
    from .options import settable_fields

    config = job.model.config
    defaults = {
        "num_virtual_tokens": 16,
        "adapter_len": 10,
        "adapter_layers": getattr(config, "num_hidden_layers", None),
        "hidden_size": getattr(config, "hidden_size", None),
        "total_step": args.steps or max(1, len(job.train) // (args.batch_size * args.accumulate)),
    }
    defaults = {name: value for name, value in defaults.items() if name in settable_fields(config_cls)}
    if args.method.lower() == "lora":
        defaults |= {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    try:
        job.config = config_cls(**{"task_type": "CAUSAL_LM", **defaults, **chosen})
        job.peft_model = get_peft_model(job.model, job.config)
    except (ValueError, TypeError) as error:
        raise CliError(f"{args.method}: {error}") from error
    except re.error as error:
        raise CliError(f"{args.method}: {error.pattern!r} is not a regular expression: {error.msg}") from error
    _check_length(args, job)
    if args.resume:
        _check_resumed(args.resume, job.config)
    counts = job.peft_model.get_nb_trainable_parameters()
    if counts[0] == 0:
        raise CliError(f"{args.method}: nothing is trainable with these options, see `peft methods {args.method}`")
    job.targets = describe_targets(job.peft_model)
    job.parameters = trainable_line(counts)
    _say(job, f"method   {args.method}", *job.targets.lines, job.parameters)


def _check_length(args: argparse.Namespace, job: SimpleNamespace) -> None:
    """Sets `job.longest`, the tokens that the model takes."""
    limit = getattr(job.model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    virtual = job.config.num_virtual_tokens if job.config.is_prompt_learning else 0
    longest = max(len(row["input_ids"]) for row in (*job.train, *job.held_out))
    if longest + virtual > limit:
        prompt = f" and {virtual} virtual ones" if virtual else ""
        raise CliError(f"examples have up to {longest} tokens{prompt}, the model takes {limit}: lower --max-length")
    job.longest = int(min(args.max_length, limit - virtual))


def _check_resumed(checkpoint: str, config: Any) -> None:
    """A checkpoint goes on only under the options that it was written with."""
    from peft import PeftConfig

    from .options import FIXED

    old, new = PeftConfig.from_pretrained(checkpoint).to_dict(), config.to_dict()
    for name in ["peft_type", *(name for name in new if name not in FIXED | {"total_step"})]:
        was, now = (getattr(config.get(name), "value", config.get(name)) for config in (old, new))
        if was != now:
            raise CliError(f"--resume: {checkpoint} was written with {name}={was!s:.80}, this command says {now!s:.80}")


def _train(args: argparse.Namespace, job: SimpleNamespace) -> bool:
    """Held-out loss and samples, training, both again; False if the user stopped it."""
    from . import training

    stop = training.GracefulStop(args.max_seconds)
    trainer, progress = training.build_trainer(job.peft_model, job.arguments, job.tokenizer, job.train, stop)

    def measure() -> tuple[float, list[str]]:
        loss = training.held_out_loss(trainer, job.held_out)
        return loss, training.sample(job.peft_model, job.tokenizer, job.samples, job.longest) if job.main else []

    with _timed(job, "held-out loss before"):
        job.before, job.said_before = measure()
    if not math.isfinite(job.before):
        raise CliError(f"{args.method}: the loss is {job.before} before training, with this model, data and options")
    _say(job, f"held-out loss before: {job.before:.4f}")
    with _timed(job, "training"), stop.watching():
        trainer.train(resume_from_checkpoint=args.resume)
    if stop.interrupted:
        return False
    state = trainer.state
    if stop.out_of_time:
        _say(job, f"stopped after {state.global_step} steps: --max-seconds {args.max_seconds:g} are over")
    with _timed(job, "held-out loss after"):
        job.after, job.said_after = measure()
    if not math.isfinite(job.after):
        raise CliError(
            f"the loss is {job.after} after {state.global_step} steps, nothing is saved: --lr {args.lr:g} is too high?"
        )
    trainer.accelerator.wait_for_everyone()
    job.steps, job.tokens = state.global_step, state.num_input_tokens_seen
    job.tokens_per_second = progress.tokens_per_second
    keys = ("step", "loss", "learning_rate")
    job.history = [{key: log[key] for key in keys if key in log} for log in state.log_history if "loss" in log]
    job.drop = 100 * (1 - job.after / job.before)
    job.change = f"{job.drop:.1f} % lower" if job.drop >= 0 else f"it rose by {-job.drop:.1f} %"
    _say(job, f"held-out loss after:  {job.after:.4f} ({job.change})")
    return True


def _save_verify_report(args: argparse.Namespace, job: SimpleNamespace, started: float) -> None:
    from . import report, verify

    adapter = args.output / "adapter"
    job.peft_model.save_pretrained(str(adapter))
    job.tokenizer.save_pretrained(str(adapter))
    with _timed(job, "reload, merge, verify"):
        job.checks = verify.verify(job.peft_model, adapter, job.source, job.dtype, job.held_out)
    _say(job, *(f"verified {check.text}" for check in job.checks))
    seconds = job.timings["whole command"] = time.perf_counter() - started
    written = report.write(args, job)
    _say(job, "", report.samples_text(job), f"wrote    {args.output}: {', '.join(written)} ({seconds:.0f} s in all)")
    failed = [check.text for check in job.checks if not check.ok]
    if failed:
        raise CliError("verification failed: " + "; ".join(failed))
