"""Exchange adapters with the published library, run as a black box in its own Python: each side writes an adapter of
every method, the other one loads it and must compute the same.

    python benchmarks/interop/run.py --peer /path/to/python [--cases lora_] [--keep FOLDER]

PEER_PYTHON in the environment stands for --peer. Writes results.md beside this file unless --cases narrows the run.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def worker(python: str, *words: object) -> list[dict]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    subprocess.run([python, str(HERE / "worker.py"), *map(str, words)], check=True, env=env)
    return [json.loads(line) for line in Path(words[2]).read_text().splitlines()]


def exchange(ours: str, peer: str, folder: Path, containing: str) -> dict[str, dict]:
    """case -> {"method", "ours": {"effect"}, "peer", "ours_to_peer": {"abs", "rel", ...}, "peer_to_ours"}."""
    table: dict[str, dict] = {}
    sides = {"ours": ours, "peer": peer}
    for seed, (side, python) in enumerate(sides.items(), 1):
        print(f"{side} writes", file=sys.stderr)
        rows = worker(python, "write", folder / side, folder / f"{side}.json", "--seed", seed, "--cases", containing)
        for row in rows:
            table.setdefault(row["case"], {"method": row["method"]})[side] = row
    for source, target in (("ours", "peer"), ("peer", "ours")):
        way = f"{source}_to_{target}"
        print(f"{target} reads what {source} wrote", file=sys.stderr)
        for row in worker(sides[target], "read", folder / source, folder / f"{way}.json", "--cases", containing):
            table[row["case"]][way] = row
    return table


# What the peer cannot read, and why that is not ours to change.
KNOWN = {
    ("boft_llama+0", "ours_to_peer"): "peer has one butterfly factor without a CUDA compiler",
    ("hira_llama+0", "ours_to_peer"): "peer ignores `rank_pattern`",
}


def verdict(row: dict, written: dict, known: str | None) -> tuple[bool, str]:
    if known is not None:
        return "error" in row, known
    if "error" in written:
        return False, "not written: " + written["error"]
    if "error" in row:
        return False, row["error"]
    ok = row["rel"] <= row["tolerance"] and written["effect"] > max(1e-3, 2 * row["tolerance"])
    return ok, f"{row['abs']:.1e}" + (f" ({row['note']})" if "note" in row else "")


def report(table: dict[str, dict]) -> tuple[str, int]:
    lines = [
        "| method | case | ours → peer | peer → ours |",
        "|---|---|---|---|",
    ]
    failed = 0
    for name, row in sorted(table.items(), key=lambda item: (item[1]["method"], item[0])):
        cells = []
        for side, way in (("ours", "ours_to_peer"), ("peer", "peer_to_ours")):
            ok, text = verdict(row[way], row[side], KNOWN.get((name, way)))
            failed += not ok
            cells.append(text if ok else f"**{text}**")
        lines.append(f"| {row['method']} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines), failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", default=os.environ.get("PEER_PYTHON"), help="python that imports the published peft")
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--keep", type=Path, help="folder for the adapters (default: a temporary one)")
    args = parser.parse_args()
    if not args.peer:
        parser.error("give --peer or set PEER_PYTHON")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        table = exchange(sys.executable, args.peer, folder, args.cases)
    text, failed = report(table)
    methods = len({row["method"] for row in table.values()})
    known = sum(name in table for name, _ in KNOWN)
    summary = (
        f"{len(table)} adapters of {methods} methods, both ways: {2 * len(table) - failed - known} equal, "
        f"{known} cannot be read by the peer, {failed} differ."
    )
    print(text + "\n\n" + summary)
    if not args.cases:
        (HERE / "results.md").write_text(HEADER + summary + "\n\n" + text + "\n")
    return int(failed > 0)


HEADER = """# Exchange with the published library

Written by `run.py` (see there). Each side made every adapter with its own random values and saved it; the other side
loaded it from the files. Cells: largest absolute difference of the outputs, float32 unless the case's name says bf16.

"""

if __name__ == "__main__":
    sys.exit(main())
