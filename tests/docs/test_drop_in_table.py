"""The table "library x scenario" in README.md is read off tests/ecosystem; `python -m tests.docs.test_drop_in_table` writes it.

A test stands in a column if it calls one of the functions listed there, itself or through helpers of its file.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
START, END = "<!-- drop-in table: written by python -m tests.docs.test_drop_in_table -->", "<!-- end of the table -->"
LIBRARIES = {  # file names begin with these; a version stands in constraints.txt
    "transformers": "transformers", "accelerate": "accelerate", "trl": "trl", "diffusers": "diffusers",
    "sentence_transformers": "sentence-transformers", "compile": "torch.compile", "distributed": "two processes",
}  # fmt: skip
SCENARIOS = {
    "trains": {"train", "backward", "epoch"},
    "saves": {
        "save", "save_pretrained", "save_model", "save_state", "save_lora_adapter", "save_lora_weights", "get_peft_model_state_dict",
    },
    "loads": {
        "from_pretrained", "load_adapter", "load_lora_adapter", "load_lora_weights", "set_peft_model_state_dict",
        "SentenceTransformer",
    },
    "resumes": {"resume_from_checkpoint=", "load_state"},
    "switches": {"set_adapter", "set_adapters", "disable_adapter", "disable_adapters", "disable_lora", "delete_adapter", "delete_adapters"},
    "merges": {"merge_and_unload", "merge_adapter", "fuse_lora"},
    "hotswaps": {"hotswap_adapter", "prepare_model_for_compiled_hotswap", "enable_lora_hotswap", "hotswap="},
    "generates": {"generate", "pipeline", "encode", "predict", "pipe"},
    "refuses": {"raises"},
}  # fmt: skip


def calls(node: ast.AST) -> Iterator[str]:
    """Names of called functions and methods, keyword arguments of these as `name=`, and fixtures asked for."""
    for part in ast.walk(node):
        if isinstance(part, ast.Call):
            yield getattr(part.func, "attr", None) or getattr(part.func, "id", "")
            yield from (f"{k.arg}=" for k in part.keywords)
        elif isinstance(part, ast.arg):
            yield part.arg


def reached(name: str, bodies: dict[str, set[str]], seen: set[str]) -> set[str]:
    if name in seen:
        return set()
    seen.add(name)
    return bodies[name].union(*(reached(other, bodies, seen) for other in bodies[name] & bodies.keys()))


def scenarios(paths: list[Path]) -> set[str]:
    found: set[str] = set()
    for path in paths:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        bodies = {n.name: set(calls(n)) for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        for name in bodies:
            if name.startswith("test_") or path.stem.endswith("_worker"):
                found |= {s for s, words in SCENARIOS.items() if words & reached(name, bodies, set())}
    return found


def table() -> str:
    pins = dict(re.findall(r"^([\w-]+)==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))
    rows = [["library", *SCENARIOS], ["---"] + [":-:"] * len(SCENARIOS)]
    for stem, name in LIBRARIES.items():
        found = scenarios(sorted((ROOT / "tests/ecosystem").glob(f"*{stem}*.py")))
        rows.append([f"{name} {pins.get(name, '')}".strip()] + ["yes" if s in found else "-" for s in SCENARIOS])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def readme(text: str) -> str:
    before, _, rest = text.partition(START)
    return f"{before}{START}\n{table()}\n{END}{rest.partition(END)[2]}"


def test_readme_is_up_to_date() -> None:
    text = README.read_text(encoding="utf-8")
    assert START in text and END in text
    assert text == readme(text), "python -m tests.docs.test_drop_in_table writes it again"


def test_every_file_has_a_library() -> None:
    known = re.compile("test_(" + "|".join([*LIBRARIES, "packaging", "frameworks"]) + r")(_\w+)?\.py")
    assert all(known.fullmatch(path.name) for path in (ROOT / "tests/ecosystem").glob("test_*.py"))


@pytest.mark.parametrize("word", sorted(set().union(*SCENARIOS.values())))
def test_every_word_counts(word: str) -> None:
    """A word that no test calls any more would make the table say less than it seems to."""
    text = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests/ecosystem").glob("*.py"))
    assert re.search(rf"\b{word.rstrip('=')}\s*[(=]", text)


if __name__ == "__main__":
    README.write_text(readme(README.read_text(encoding="utf-8")), encoding="utf-8")
