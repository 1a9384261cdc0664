"""Packages that are not required: one message says what is installed, what is needed and which extra brings it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

import peft
from peft import import_utils

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable]:
    """Call it with versions by package name: what is not named is not there."""

    def only(**versions: str) -> None:
        by_distribution = {Requirement(import_utils.OPTIONAL[k][0]).name: Version(v) for k, v in versions.items()}
        monkeypatch.setattr(import_utils, "_is_there", versions.__contains__)
        monkeypatch.setattr(import_utils, "_version", by_distribution.__getitem__)

    import_utils.require.cache_clear()
    yield only
    import_utils.require.cache_clear()


def test_table_is_what_the_extras_say() -> None:
    tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for text, extra in import_utils.OPTIONAL.values():
        assert extra is None or text in project["optional-dependencies"][extra]


def test_one_message_for_all_that_is_missing_or_too_old(installed: Callable) -> None:
    installed(transformers="4.30.2", accelerate="1.15.0")
    with pytest.raises(ImportError) as caught:
        import_utils.require("This", "transformers", "accelerate", "bitsandbytes")
    wanted = "This needs transformers>=4.57 (4.30.2 is installed) and bitsandbytes (not installed): "
    assert str(caught.value) == wanted + "pip install 'peft[cli]' 'peft[quantization]'"
    installed(transformers="5.23.0.dev0", accelerate="1.3")
    import_utils.require("This", "transformers", "accelerate")


def _auto(folder: Path) -> None:
    peft.PeftConfig(task_type="CAUSAL_LM", peft_type="LORA", base_model_name_or_path="x").save_pretrained(folder)
    peft.AutoPeftModelForCausalLM.from_pretrained(folder)


def _text(folder: Path) -> None:
    from peft.tuners.prompt_tuning import text_token_ids

    options = {"prompt_tuning_init_text": "a", "tokenizer_name_or_path": "x", "num_virtual_tokens": 2}
    text_token_ids(peft.PromptTuningConfig(prompt_tuning_init="TEXT", **options), 2)


def _activation(folder: Path) -> None:
    peft.PeanutConfig(act_fn="quick_gelu")


def _cache(folder: Path) -> None:
    from peft.prompt_cache import new_cache

    new_cache(torch.nn.Linear(2, 2), peft.PrefixTuningConfig())


@pytest.mark.parametrize("use", [_auto, _text, _activation, _cache])
@pytest.mark.parametrize(("version", "said"), [(None, "not installed"), ("4.30.2", "4.30.2 is installed")])
def test_transformers(installed: Callable, tmp_path: Path, use: Callable, version: str | None, said: str) -> None:
    installed(**({} if version is None else {"transformers": version}))
    with pytest.raises(ImportError, match=rf"needs transformers>=4\.57 \({said}\): pip install 'peft\[cli\]'"):
        use(tmp_path)


def test_command_line(installed: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from peft.cli import main

    installed(accelerate="0.20.0")
    assert main(["train", "--model", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    wanted = "transformers>=4.57 (not installed) and accelerate>=1.3 (0.20.0 is installed): pip install 'peft[cli]'"
    assert f"peft train needs {wanted}" in said


def test_adamss(installed: Callable) -> None:
    installed(sklearn="1.0")
    with pytest.raises(ImportError, match=r"AdaMSS needs scikit-learn>=1\.3 \(1\.0 is installed\): .*peft\[adamss\]"):
        peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(16, 16)), peft.AdamssConfig(target_modules=["0"]))


def test_quantised_layer_names(installed: Callable) -> None:
    from peft.tuners import lora

    installed()
    assert not hasattr(lora, "Linear4bit")
    with pytest.raises(
        AttributeError, match=r"Linear4bit needs bitsandbytes \(not installed\): .*peft\[quantization\]"
    ):
        lora.Linear4bit  # noqa: B018
    with pytest.raises(AttributeError, match=r"EetqLoraLinear needs eetq \(not installed\): pip install eetq"):
        lora.EetqLoraLinear  # noqa: B018
