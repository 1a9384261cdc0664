"""Signature and docstring pairs."""

import pytest

from peft.cli.errors import CliError
from peft.cli.harvest import Pair, harvest, split

SOURCE = '''
def plain(a, b=1, *, c: int = 2) -> str:
    """Say what it does.

    And more.
    """

class K:
    async def method(self):
        """Wait for the thing."""

    def short(self):
        """Two words"""

    def silent(self):
        pass

def broken_escape():
    """Match digits \\d in text."""
'''


def test_pairs_of_a_small_library(tmp_path):
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text(SOURCE)
    (tmp_path / "again.py").write_text(SOURCE)  # same pairs: kept once
    (tmp_path / "bad.py").write_text("def (:\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "x.py").write_text(SOURCE.replace("what", "something else"))
    pairs = harvest(tmp_path)
    assert Pair("again", "plain(a, b=1, *, c: int=2)", "Say what it does.") in pairs
    assert {p.signature.split("(")[0] for p in pairs} == {"plain", "method", "broken_escape"}
    assert len(pairs) == 3 and {p.module for p in pairs} == {"again"}
    assert pairs[0].prompt == '# again\ndef plain(a, b=1, *, c: int=2):\n    """'
    assert pairs[0].completion == 'Say what it does."""'


def test_nothing_found_is_said(tmp_path):
    with pytest.raises(CliError, match="--data"):
        harvest(tmp_path)


def test_real_library_is_large_and_split_by_module():
    pairs = harvest()
    assert len(pairs) > 2000
    assert pairs[0].module == min(p.module for p in pairs)  # a fixed order
    train, held_out = split(pairs, 0.1)
    assert len(train) + len(held_out) == len(pairs)
    assert 0.05 * len(pairs) < len(held_out) <= 0.1 * len(pairs)
    top = [{p.module.split(".")[0] for p in part} for part in (train, held_out)]
    assert not top[0] & top[1]
    assert len({(p.signature, p.summary) for p in pairs}) == len(pairs)
