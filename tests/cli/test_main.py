"""The command itself: help, version, the list of methods."""

import os
import re
import subprocess
import sys
import warnings

import pytest

from peft.cli import main


def test_no_arguments_show_help(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    for command in ("train", "methods", "inspect", "merge"):
        assert command in out


def test_version_says_what_this_is(capsys):
    assert main(["--version"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("peft 0.21.2 (Inlay")


def test_nobody_reads_what_is_printed():
    """`peft --version | true`, also where nothing is written before the interpreter ends."""
    read, write = os.pipe()
    os.close(read)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "peft.cli", "--version"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=env, timeout=120)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [(KeyboardInterrupt(), 130, "peft methods: interrupted\n"), (OSError("disk full"), 2, "peft methods: disk full\n")],
)
def test_what_ends_a_command(capsys, monkeypatch, error, code, text):
    """Meanwhile a warning is its text, without a place in the library."""

    def run(args):
        print(warnings.formatwarning("old file", UserWarning, "a.py", 3), end="")
        raise error

    before = warnings.formatwarning
    monkeypatch.setattr("peft.cli.methods.run", run)
    assert main(["methods"]) == code
    assert capsys.readouterr() == ("warning: old file\n", text)
    assert warnings.formatwarning is before


def test_unknown_command_is_an_error(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["tran"])
    assert stop.value.code == 2
    assert "invalid choice: 'tran'" in capsys.readouterr().err


def test_module_form_and_light_import():
    code = (
        "import sys; from peft.cli import main; main([]); "
        "assert not {'transformers', 'accelerate', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "usage: peft" in done.stdout


def test_methods_lists_the_registry(capsys):
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = {line.split()[0] for line in lines[1:] if line and not line[0].isdigit()}
    assert names == {str(kind.value).lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    row = {line.split()[0]: line.split() for line in lines if line}
    assert row["lora"][1:3] == ["layers", "yes"]
    assert row["prompt_tuning"][1:3] == ["prompt", "no"]


def test_methods_shows_options(capsys):
    assert main(["methods", "lora"]) == 0
    out = capsys.readouterr().out
    assert "lora_alpha = 8" in out
    assert "peft_version" not in out
    assert main(["methods", "lorra"]) == 2
    assert "did you mean 'lora'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["tran"], "invalid choice: 'tran'.*, did you mean 'train'\\?"),
        (["mrege", "x"], "invalid choice: 'mrege'.*, did you mean 'merge'\\?"),
        (
            ["train", "--modell", "x"],
            "peft train: error: unrec.*: --modell x, did you mean '--model'\\?",
        ),
        (["train", "--stepz=3"], "unrecognized arguments: --stepz=3, did you mean '--steps'\\?"),
        (["merge", "a", "--out", "o", "--bsae", "b"], "unrecognized arguments: --bsae b, did you mean '--base'\\?"),
        (["--verzion"], "peft: error: unrecognized arguments: --verzion, did you mean '--version'\\?"),
        (["methods", "--zzzzzz"], "peft methods: error: unrecognized arguments: --zzzzzz$"),
        (["inspect", "a", "b"], "unrecognized arguments: b$"),
    ],
)
def test_misspelled_names(argv, text, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert re.search(text, capsys.readouterr().err, re.MULTILINE)
