"""Adapters that the published library wrote and the numbers it computed: files must load, be written back alike and
compute alike.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import transformers
from packaging.version import Version

FOLDER = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("inlay_check_golden", FOLDER / "check_golden.py")
check_golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(check_golden)

CASES = sorted(p.name for p in (FOLDER / "cases").iterdir() if (p / "case.json").exists())
# One case a method in the quick run (torch nets first, they are faster); all of them with -m slow.
QUICK: dict[str, str] = {}
for _name in sorted(CASES, key=lambda n: ("llama" in n, n)):
    _method = json.loads((FOLDER / "cases" / _name / "case.json").read_text())["method"]
    QUICK.setdefault(_method, _name)


@pytest.mark.parametrize("name", [n if n in QUICK.values() else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_case(name):
    if name == "generate_prefix" and Version(transformers.__version__) < Version("5"):
        pytest.skip("transformers 4 searches beams in another order")
    rows = check_golden.check_case(FOLDER, FOLDER / "cases" / name)
    failed = [f"{check}: {detail}" for check, ok, detail in rows if not ok]
    assert rows
    assert not failed, failed
