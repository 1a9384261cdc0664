"""The distribution: name, version, what a fresh environment gets, and that the libraries find it."""

import importlib.metadata
import importlib.util
import itertools
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from packaging.version import Version

import peft

ROOT = Path(__file__).resolve().parents[2]
CHECKS = {
    "transformers": "from transformers.utils.import_utils import is_peft_available as f; assert f()\n"
    "from transformers.integrations.peft import check_peft_version; check_peft_version(min_version='0.20.0')",
    "accelerate": "from accelerate.utils import is_peft_available as f; assert f()",
    "diffusers": "from diffusers.utils import USE_PEFT_BACKEND as f; assert f",
    "trl": "from trl import SFTTrainer",
    "sentence_transformers": "import sentence_transformers",
}


def python(code: str, executable: str = sys.executable, **kwargs: str) -> str:
    done = subprocess.run([executable, "-c", code], capture_output=True, text=True, timeout=300, **kwargs)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, so that no build folder is left in the working tree."""
    if importlib.util.find_spec("pip") is None or importlib.util.find_spec("setuptools") is None:
        pytest.skip("needs pip and setuptools to build a wheel without a network")
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    shutil.copytree(ROOT / "src" / "peft", copy / "src" / "peft", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    done = subprocess.run([*command, "-w", str(out), str(copy)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (file,) = out.iterdir()
    return file


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A new environment with nothing but the wheel; its dependencies are not needed to ask for its version."""
    home = tmp_path_factory.mktemp("fresh")
    venv.create(home, with_pip=False)
    bin_folder = "Scripts" if sys.platform == "win32" else "bin"
    executable = str(home / bin_folder / "python")
    command = [sys.executable, "-m", "pip", "--python", executable, "install", "--no-deps", "--no-index", "-q"]
    subprocess.run([*command, str(wheel)], check=True, timeout=300)
    return executable, home / bin_folder


def test_version_is_the_api_level_and_says_whose_it_is() -> None:
    version = Version(peft.__version__)
    assert version.base_version == "0.21.2"
    assert version.local == f"inlay.{peft.__inlay_version__}"
    assert peft.__version__ == f"0.21.2+inlay.{peft.__inlay_version__}"
    assert importlib.metadata.version("peft") == peft.__version__
    assert importlib.metadata.metadata("peft")["Name"] == "peft"


def test_wheel_contents(wheel: Path) -> None:
    import zipfile

    assert wheel.name == f"peft-{peft.__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"peft", f"peft-{peft.__version__}.dist-info"}
    assert {"peft/py.typed", "peft/__init__.pyi"} <= set(names)
    modules = {str(p.relative_to(ROOT / "src")) for p in (ROOT / "src" / "peft").rglob("*.py")}
    assert {n for n in names if n.endswith(".py")} == modules


def test_fresh_environment(fresh: tuple[str, Path]) -> None:
    executable, scripts = fresh
    code = "import importlib.metadata as m, peft; print(m.version('peft'), peft.__version__, peft.__inlay_version__)"
    assert python(code, executable).split() == [peft.__version__, peft.__version__, peft.__inlay_version__]
    said = subprocess.run([scripts / "peft", "--version"], capture_output=True, text=True, timeout=60, check=True)
    assert "Inlay" in said.stdout
    assert peft.__inlay_version__ in said.stdout
    assert "0.21.2" in said.stdout


def test_requirements_are_satisfied_and_removal_is_complete(fresh: tuple[str, Path], wheel: Path) -> None:
    executable, _ = fresh
    pip = [sys.executable, "-m", "pip", "--python", executable]
    listed = subprocess.run([*pip, "list", "--format=freeze"], capture_output=True, text=True, check=True, timeout=120)
    assert listed.stdout.split() == [f"peft=={peft.__version__}"]
    for requirement in ("peft>=0.18", "peft==0.21.2", "peft>=0.21,<0.22"):
        command = [*pip, "install", "--no-deps", "--no-index", requirement]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "already satisfied" in done.stdout
    subprocess.run([*pip, "uninstall", "-y", "-q", "peft"], check=True, timeout=120)
    assert python("import importlib.util as u; print(u.find_spec('peft'))", executable) == "None"
    assert not [p for p in Path(executable).parents[1].rglob("*peft*") if p.is_file()]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "-q", str(wheel)], check=True, timeout=120)


def test_import_is_cheap() -> None:
    code = "import sys, peft; from peft import get_peft_model; print(sorted({'transformers', 'accelerate', 'trl', "
    code += "'diffusers', 'sentence_transformers'} & set(sys.modules)))"
    assert python(code) == "[]"


@pytest.mark.parametrize("library", list(CHECKS))
def test_found_by_a_library_imported_first(library: str) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"needs the `ecosystem` extra ({library})")
    python(f"{CHECKS[library]}\nimport peft; assert peft.__inlay_version__\nfrom peft import PeftModel, LoraConfig")


@pytest.mark.slow
def test_found_by_all_in_any_order() -> None:
    present = [name for name in CHECKS if importlib.util.find_spec(name)]
    if len(present) < 2:
        pytest.skip("needs the `ecosystem` extra")
    for first, second in itertools.permutations(present, 2):
        python(f"import {first}, {second}, peft\n{CHECKS[first]}\n{CHECKS[second]}")
