#!/usr/bin/env python
"""How the book is built: cells, lines and imports of every chapter.

    python tools/house.py              a Markdown table of the chapters as they are
    python tools/house.py --ref REF    the same at a commit
    python tools/house.py --write      writes the chapters that exceed a limit, with their numbers, into tests/house.csv,
                                       and the table into CONTRIBUTING.md"""
import argparse, ast, csv, json, re, subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"over_100": 0.0, "over_88": 0.10, "cells": 70, "lines": 600}


def measured(notebook):
    "Cells, exported lines and shares of code lines over 88 and 100 characters of a notebook, and what it imports."
    cells = notebook["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    exported = [s for s in code if s.startswith("#| export")]
    lines = [line for s in code for line in s.split("\n") if line.strip()]
    def share(limit): return round(sum(len(line) > limit for line in lines) / max(len(lines), 1), 4)
    names = sorted({m for s in exported for m in re.findall(r"^from ctvlm\.(\w+) import", s, re.M)})
    return {"over_100": share(100), "over_88": share(88), "cells": len(cells), "lines": sum(s.count("\n") + 1 for s in exported), "imports": names}


def chapters(ref=None):
    "Stem of each chapter and its numbers, now or at a commit."
    if ref is None: return {p.stem: measured(json.loads(p.read_text())) for p in sorted((ROOT / "nbs").glob("[0-9][0-9]*_*.ipynb"))}
    names = subprocess.run(["git", "ls-tree", "--name-only", ref, "nbs/"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    shown = lambda p: subprocess.run(["git", "show", f"{ref}:{p}"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {Path(p).stem: measured(json.loads(shown(p))) for p in names if re.match(r"nbs/\d\d\w*\.ipynb", p)}


def exceeding(found):
    "The chapters that exceed a limit."
    return {name: m for name, m in found.items() if any(m[k] > limit for k, limit in LIMITS.items())}


def table(found):
    rows = [f"| {name} | {m['cells']} | {m['lines']} | {m['over_88']:.1%} | {m['over_100']:.1%} | {', '.join(m['imports']) or '-'} |" for name, m in found.items()]
    return "\n".join(["| chapter | cells | exported lines | lines over 88 | over 100 | imports at its head |", "| --- | --- | --- | --- | --- | --- |", *rows])


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--ref"); ap.add_argument("--write", action="store_true")
    args = ap.parse_args()
    found = chapters(args.ref)
    if not args.write: return print(table(found))
    with open(ROOT / "tests" / "house.csv", "w", newline="") as f:
        out = csv.writer(f, lineterminator="\n")
        out.writerow(["chapter", *LIMITS])
        out.writerows([name, *(m[k] for k in LIMITS)] for name, m in exceeding(found).items())
    path = ROOT / "CONTRIBUTING.md"
    text, n = re.subn(r"(<!-- house: [^\n]* -->\n\n?).*?(\n<!-- /house -->)", lambda m: m[1].rstrip() + "\n\n" + table(found) + "\n" + m[2], path.read_text(), flags=re.S)
    if n: path.write_text(text)
    print(f"{len(exceeding(found))} of {len(found)} chapters exceed a limit")


if __name__ == "__main__": main()
