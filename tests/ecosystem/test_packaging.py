"""The distribution: name, version, what a fresh environment gets, and that the libraries find it."""

import csv
import importlib.metadata
import importlib.util
import itertools
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import peft

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = "0.21.2"
CHECKS = {
    "transformers": "from transformers.utils.import_utils import is_peft_available as f; assert f()\n"
    "from transformers.integrations.peft import check_peft_version; check_peft_version(min_version='0.20.0')",
    "accelerate": "from accelerate.utils import is_peft_available as f; assert f()",
    "diffusers": "from diffusers.utils import USE_PEFT_BACKEND as f; assert f",
    "trl": "from trl import SFTTrainer",
    "sentence_transformers": "import sentence_transformers",
}
PINNED = {
    "transformers": "5.23",
    "trl": "1.16",
    "diffusers": "0.42",
    "accelerate": "1.15",
    "sentence-transformers": "6.2",
}


def python(code: str, executable: str = sys.executable, **kwargs: str) -> str:
    done = subprocess.run([executable, "-c", code], capture_output=True, text=True, timeout=300, **kwargs)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, so that no build folder is left in the working tree."""
    installed = {d.name for d in importlib.metadata.distributions()}
    # asking the import system for pip would switch setuptools' distutils off
    if not {"pip", "setuptools"} <= installed:
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


def environment(home: Path, wheel: Path) -> tuple[str, Path]:
    """A new environment with nothing but the wheel: interpreter and folder of scripts."""
    venv.create(home, with_pip=False)
    scripts = home / ("Scripts" if sys.platform == "win32" else "bin")
    Installer([sys.executable, "-m", "pip"], str(scripts / "python")).install(wheel)
    return str(scripts / "python"), scripts


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The dependencies are not needed to ask for the version."""
    return environment(tmp_path_factory.mktemp("fresh"), wheel)


@pytest.fixture(scope="module")
def full(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The wheel in an environment that also sees the libraries of this one; the wheel comes first."""
    executable, _ = environment(tmp_path_factory.mktemp("full"), wheel)
    (site_packages(executable) / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    return executable


def site_packages(executable: str) -> Path:
    return Path(python("import sysconfig; print(sysconfig.get_paths()['purelib'])", executable))


class Installer:
    """pip or uv, working on another environment without asking any index."""

    def __init__(self, command: list[str], executable: str):
        self.is_uv = command[0] != sys.executable
        where = ["--python", executable]
        self.front, self.back = ([*command, "pip"], where) if self.is_uv else ([*command, *where], [])

    def __call__(self, verb: str, *rest: str) -> str:
        index = ["--no-index", "--no-deps"] if verb == "install" else []
        command = [*self.front, verb, *self.back, *index, *rest]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout + done.stderr

    def install(self, *wheels: Path | str) -> str:
        return self("install", *map(str, wheels))

    def uninstall(self) -> None:
        self("uninstall", *(() if self.is_uv else ("-y",)), "peft")


@pytest.fixture(scope="module", params=["pip", pytest.param("uv", marks=pytest.mark.slow)])
def tool(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command; uv is installed into a temporary folder where there is none."""
    if request.param == "pip":
        return [sys.executable, "-m", "pip"]
    if (found := shutil.which("uv")) is not None:
        return [found]
    folder = tmp_path_factory.mktemp("uv")
    command = [sys.executable, "-m", "pip", "install", "-q", "--retries", "0", "--target", str(folder), "uv"]
    if subprocess.run(command, capture_output=True, timeout=300).returncode:
        pytest.skip("needs a package index to install uv")
    return [str(folder / "bin" / "uv")]


def made_wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> Path:
    """A wheel of a few files; without files it is only a name and a version."""
    info = f"{name}-{version}.dist-info"
    entries = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*entries, f"{info}/RECORD"])
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for entry, text in {**entries, f"{info}/RECORD": record}.items():
            archive.writestr(entry, text)
    return path


@pytest.fixture(scope="module", params=["stand-in", pytest.param("published", marks=pytest.mark.slow)])
def peer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published library's wheel, or one that shares some paths with ours and has others of its own."""
    folder = tmp_path_factory.mktemp("peer")
    if request.param == "stand-in":
        names = ("__init__.py", "peft_model.py", "tuners/lora/layer.py", "only_there/__init__.py", "only_there.py")
        return made_wheel(folder, "peft", PUBLISHED, {f"peft/{name}": "their = True\n" for name in names})
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--retries", "0", "-d", str(folder)]
    if subprocess.run([*command, f"peft=={PUBLISHED}"], capture_output=True, timeout=300).returncode:
        pytest.skip("needs a package index to get the published library")
    (wheel,) = folder.iterdir()
    return wheel


def installed_files(executable: str) -> set[str]:
    """Names of all files of anything called peft, below site-packages; those of __pycache__ too."""
    root = site_packages(executable)
    found = {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}
    return {name for name in found if name.split("/")[0].startswith("peft")}


def recorded_files(executable: str) -> tuple[str, set[str]]:
    """Version of the one distribution, and what its RECORD says that it brought."""
    (info,) = site_packages(executable).glob("peft-*.dist-info")
    rows = (info / "RECORD").read_text(encoding="utf-8").splitlines()
    return info.name.split("-")[1].removesuffix(".dist"), {next(csv.reader([row]))[0] for row in rows}


def test_version_is_the_api_level_and_says_whose_it_is() -> None:
    version = Version(peft.__version__)
    assert version.base_version == "0.21.2"
    assert version.local == f"inlay.{peft.__inlay_version__}"
    assert peft.__version__ == f"0.21.2+inlay.{peft.__inlay_version__}"
    assert importlib.metadata.version("peft") == peft.__version__
    assert importlib.metadata.metadata("peft")["Name"] == "peft"


def test_wheel_contents(wheel: Path) -> None:
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


def test_requirements_are_satisfied_and_removal_is_complete(tool: list[str], wheel: Path, tmp_path: Path) -> None:
    executable, _ = environment(tmp_path, wheel)
    run = Installer(tool, executable)
    assert [t for t in run("list", "--format=freeze").split() if "==" in t] == [f"peft=={peft.__version__}"]
    for requirement in ("peft>=0.18", "peft==0.21.2", "peft>=0.21,<0.22"):
        assert re.search("already satisfied|Audited|Checked", run.install(requirement))
    # what the wheel asks for, as names and versions only, makes the environment consistent
    stubs = []
    for text in importlib.metadata.PathDistribution(next(site_packages(executable).glob("peft-*"))).requires or ():
        requirement = Requirement(text)
        if requirement.marker is None:
            name, version = requirement.name.replace("-", "_"), importlib.metadata.version(requirement.name)
            stubs.append(made_wheel(tmp_path, name, version.split("+")[0], {}))
    run.install(*stubs)
    assert re.search("No broken requirements|are compatible", run("check"))
    run.uninstall()
    assert python("import importlib.util as u; print(u.find_spec('peft'))", executable) == "None"
    assert not installed_files(executable)


def test_swap_with_the_published_library(tool: list[str], wheel: Path, peer: Path, tmp_path: Path) -> None:
    """Either over the other in one command, and through uninstalling: what is there is what one RECORD lists."""
    venv.create(tmp_path, with_pip=False)
    executable = str(tmp_path / ("Scripts" if sys.platform == "win32" else "bin") / "python")
    run = Installer(tool, executable)
    forced = "--reinstall" if run.is_uv else "--force-reinstall"
    for new, version, option in (
        (peer, PUBLISHED, ()), (wheel, peft.__version__, ()), (peer, PUBLISHED, (forced,)),
        (wheel, peft.__version__, ()), (None, None, ()), (peer, PUBLISHED, ()), (None, None, ()),
    ):  # fmt: skip
        if new is None:
            run.uninstall()
            assert not installed_files(executable)
            continue
        run.install(new, *option)
        subprocess.run([executable, "-m", "compileall", "-q", site_packages(executable) / "peft"], timeout=300)
        found, recorded = recorded_files(executable)
        left = {n for n in installed_files(executable) if "__pycache__" not in n} - recorded
        assert (found, left) == (version, set())
        sources = {n for n in recorded if n.endswith(".py")}
        caches = {n for n in installed_files(executable) if "__pycache__" in n}
        assert {re.sub(r"__pycache__/(.*)\.cpython-\d+\.pyc", r"\1.py", n) for n in caches} <= sources
        assert ("inlay" in version) == (site_packages(executable) / "peft" / "version.py").is_file()


def test_libraries_are_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {r.name: r for r in (Requirement(line) for line in lines if line and not line.startswith("#"))}
    for name, version in PINNED.items():
        (pin,) = pins[name].specifier
        assert pin.operator == "==" and pin.version.startswith(version + "."), name
        if importlib.util.find_spec(name.replace("-", "_")):
            assert importlib.metadata.version(name) == pin.version
    extra = [Requirement(t) for t in importlib.metadata.requires("peft") or ()]
    names = {r.name for r in extra if r.marker is not None and r.marker.evaluate({"extra": "ecosystem"})}
    assert names and names <= set(pins)


def test_import_is_cheap() -> None:
    code = "import sys, peft; from peft import get_peft_model; print(sorted({'transformers', 'accelerate', 'trl', "
    code += "'diffusers', 'sentence_transformers'} & set(sys.modules)))"
    assert python(code) == "[]"


@pytest.mark.parametrize("library", list(CHECKS))
def test_found_by_a_library_imported_first(library: str, full: str) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"needs the `ecosystem` extra ({library})")
    code = f"{CHECKS[library]}\nimport peft; from peft import PeftModel, LoraConfig; print(peft.__file__)"
    assert Path(python(code, full)).parents[1] == site_packages(full)


@pytest.mark.slow
def test_found_by_all_in_any_order(full: str) -> None:
    present = [name for name in CHECKS if importlib.util.find_spec(name)]
    if len(present) < 2:
        pytest.skip("needs the `ecosystem` extra")
    for first, second in itertools.permutations(present, 2):
        code = f"import {first}, {second}, peft\n{CHECKS[first]}\n{CHECKS[second]}\nassert peft.__inlay_version__"
        python(code, full)
