"""Everything that needs a graphics card, part after part, each with a time limit of its own.

    python tools/gpu.py                 all parts, within 8 minutes on an H100
    python tools/gpu.py encoder tests   these

Parts: tests (tests/test_cuda.py), encoder, features, training (benchmarks; their lines are kept in benchmarks/results/*_cuda.jsonl),
cells (the CUDA cells of the notebooks, outputs kept in place). What a part prints stands in runs/gpu/PART.log as it comes.
A part that fails does not stop the next one. No network is needed: data are made up, weights are random.
"""
import json, os, re, subprocess, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "runs" / "gpu"
STEP = "--device cuda --size large --effective 1024 --micro 64 --repeats 1 --results"


def cuda_notebooks():
    "Notebooks with a cell for a card."
    marked = re.compile(r'"#\|\s*cuda')
    return [str(p.relative_to(ROOT)) for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if marked.search(p.read_text())]


def parts(): # name -> (seconds, words after python)
    return {
        "tests": (100, ["-m", "pytest", "-q", "tests/test_cuda.py"]),
        "encoder": (90, ["benchmarks/encoders.py", "--device", "cuda", "--results"]),
        "features": (90, ["benchmarks/gpu_features.py", "--device", "cuda", "--results"]),
        "training": (100, ["benchmarks/training_step.py", *STEP.split()]),
        "cells": (100, ["tools/run_notebooks.py", "--flags", "cuda", *cuda_notebooks()])}


def run(name, seconds, words):
    "Run one part, and say how it ended: `ok`, `failed` or `over time`."
    LOGS.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with open(LOGS / f"{name}.log", "w") as log:
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                                   env=environment, start_new_session=True)
        try: ended = "ok" if process.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired: ended = "over time"
        finally:
            if process.poll() is None: os.killpg(process.pid, 9)
    return dict(part=name, ended=ended, seconds=round(time.monotonic() - began), limit=seconds)


def told(name):
    "The last lines of a part's log: measurements in short, or what pytest says."
    lines = (LOGS / f"{name}.log").read_text(errors="replace").splitlines()
    rows = []
    for line in lines:
        try: row = json.loads(line)
        except ValueError: continue
        if isinstance(row, dict): rows.append("  ".join(f"{k} {v}" for k, v in row.items() if k != "benchmark")[:150])
    return (rows or [line[:150] for line in lines if line.strip()])[-6:]


def main(names):
    known = parts()
    if wrong := [n for n in names if n not in known]:
        sys.exit(f"no part is called {', '.join(wrong)}: choose from {', '.join(known)}")
    done = []
    for name in names or known:
        print(f"{name} ...", flush=True)
        done.append(run(name, *known[name]))
    for row in done:                                       # at most 40 lines
        print("{part:10} {ended:10} {seconds:4} of {limit} s".format(**row))
        for line in told(row["part"]): print("    " + line)
    return any(row["ended"] != "ok" for row in done)


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
