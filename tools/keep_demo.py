"""Keep what a run of `ctvlm demo` gave: its numbers for the front page, its model in the package.

    python tools/keep_demo.py runs/demo

Writes benchmarks/results/demo.json (the rows of `demo_table`, findings one by one left out) and ctvlm/data/tiny/, the model that
`ready_model` loads."""
import json, shutil, sys
from pathlib import Path

from ctvlm.core import write_atomically
from ctvlm.demo import demo_table

ROOT = Path(__file__).resolve().parent.parent


def main(run):
    metrics = json.loads((run / "metrics.json").read_text())
    rows = [{k: v.strip() for k, v in r.items()} for r in demo_table(metrics) if r["measured"].strip() not in metrics["classification"]["per_class"]]
    rows.append({"measured": "whole demo, s", "value": f"{metrics['seconds']:.0f}", "95 % interval": "", "beside": f"without installation; peak memory {metrics['peak_memory_mb']:.0f} MB"})
    with write_atomically(ROOT / "benchmarks/results/demo.json") as t: t.write_text(json.dumps(rows, indent=1) + "\n")
    with write_atomically(ROOT / "ctvlm/data/tiny") as t: shutil.copytree(run / "model", t)
    size = sum(f.stat().st_size for f in (ROOT / "ctvlm/data/tiny").iterdir())
    print(f"{len(rows)} rows, a model of {size / 1e6:.1f} MB")


if __name__ == "__main__": main(Path(sys.argv[1]))
