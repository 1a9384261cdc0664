"""One side of the exchange: runs under our Python or under the peer's, with whichever `peft` that one imports.

    worker.py write OWN_FOLDER            every case: adapter with random values, its inputs' outputs, saved
    worker.py read OTHER_FOLDER RESULT    every case there: load it, compare the outputs; one JSON line a case

Bases, inputs and most configurations are those of tests/golden; `EXTRA` in cases.py adds options.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import sys
import warnings
from pathlib import Path

import torch
from cases import cases
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
_spec = importlib.util.spec_from_file_location("check_golden", GOLDEN / "check_golden.py")
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)


def runner(case: dict):
    made = golden.Runner(GOLDEN, GOLDEN / "cases" / case["like"])
    made.case = {**made.case, **case["change"]}
    return made


def perturb(model, case: dict, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += (case["sigma"] * noise).to(parameter.dtype)


def arrow(run, folder: Path):
    import peft
    from peft.tuners.lora.config import ArrowConfig

    golden.seed_all(0)
    options = ArrowConfig(top_k=2, rng_seed=7, router_temperature=0.5)
    experts = [str(folder / str(i)) for i in range(3)]
    return peft.create_arrow_model(run.base(), experts, options)


def write(case: dict, folder: Path, seed: int) -> dict:
    run = runner(case)
    experts = range(3) if case["how"] == "arrow" else [None]
    for i in experts:
        model = run.get_peft()
        perturb(model, run.case, seed + (i or 0))
        model.save_pretrained(str(folder if i is None else folder / str(i)))
        if case["how"] == "xlora":  # the published file lacks the gates; they are handed over by name as well
            values = {n: p.detach().clone() for n, p in model.named_parameters() if "internal_xlora" in n}
            save_file(values, folder / "params.safetensors")
    if case["how"] == "arrow":
        model = arrow(run, folder)
    outputs = {k: v.contiguous() for k, v in run.outputs(model).items()}
    plain = run.outputs(run.base())
    save_file(outputs, folder / "outputs.safetensors")
    return {"effect": max(golden.rel_diff(outputs[k], plain[k]) for k in outputs)}


def read(case: dict, folder: Path, seed: int) -> dict:
    import peft

    run = runner(case)
    if case["how"] == "arrow":
        model = arrow(run, folder)
    else:
        base = run.base()
        golden.seed_all(0)  # initialisations that draw are repeated on load
        model = peft.PeftModel.from_pretrained(base, str(folder))
    whole = True
    if case["how"] == "xlora":
        named, given = dict(model.named_parameters()), load_file(folder / "params.safetensors")
        whole = all(torch.equal(named[k], v) for k, v in given.items())
        with torch.no_grad():
            for k, v in given.items():
                named[k].copy_(v)
    expected = load_file(folder / "outputs.safetensors")
    got = run.outputs(model)
    return {
        "abs": max(float((got[k].double() - expected[k].double()).abs().max()) for k in expected),
        "rel": max(golden.rel_diff(got[k], expected[k]) for k in expected),
        "tolerance": run.case["tolerances"].get("load", 2e-5),
        **({} if whole else {"note": "the file lacks the gates"}),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=["write", "read"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cases", default="")
    args = parser.parse_args()
    torch.set_num_threads(1)
    act = write if args.action == "write" else read
    with args.result.open("w") as lines:
        for case in cases(GOLDEN, args.cases):
            folder = args.folder / case["name"]
            folder.mkdir(parents=True, exist_ok=True)
            row = {"case": case["name"], "method": case["method"]}
            try:
                with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                    warnings.simplefilter("ignore")
                    row.update(act(case, folder, args.seed))
            except Exception as exc:  # noqa: BLE001 - the other cases go on, the table shows it
                row["error"] = f"{type(exc).__name__}: {' '.join(str(exc).split())[:200]}"
            print(json.dumps(row), file=lines, flush=True)
            print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


if __name__ == "__main__":
    main()
