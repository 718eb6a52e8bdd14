"""Keep the numbers that a run of `ctvlm demo` gave, for the front page.

    python tools/keep_demo.py runs/demo

Writes benchmarks/results/demo.json: the rows of `demo_table`, findings one by one left out. The model that ships is made by
tools/train_tiny.py."""
import json
import sys
from pathlib import Path

from ctvlm.core import write_atomically
from ctvlm.demo import demo_table

ROOT = Path(__file__).resolve().parent.parent


def main(run):
    metrics = json.loads((run / "metrics.json").read_text())
    single = metrics["classification"]["per_class"]
    rows = [{k: v.strip() for k, v in r.items()} for r in demo_table(metrics) if r["measured"].strip() not in single]
    memory = f"without installation; peak memory {metrics['peak_memory_mb']:.0f} MB"
    rows.append({"measured": "whole demo, s", "value": f"{metrics['seconds']:.0f}", "95 % interval": "", "beside": memory})
    with write_atomically(ROOT / "benchmarks/results/demo.json") as t: t.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{len(rows)} rows")


if __name__ == "__main__": main(Path(sys.argv[1]))
