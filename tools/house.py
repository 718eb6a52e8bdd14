#!/usr/bin/env python
"""How the book is built: cells, lines and imports of every chapter.

    python tools/house.py              a Markdown table of the chapters as they are
    python tools/house.py --ref REF    the same at a commit
    python tools/house.py --write      writes the chapters that exceed a limit, with their numbers,
                                       into tests/house.csv, the table into CONTRIBUTING.md, and
                                       the drawing nbs/images/house.svg"""
import argparse, csv, json, re, subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"over_100": 0.0, "over_88": 0.10, "cells": 70, "lines": 600}
ROOMS = ["core", "phantoms", "mining", "findings", "scans", "vision", "text", "siglip",
         "localization", "disease", "model", "data", "training", "evaluation", "viewer", "command"]
BLUE, ORANGE = "#0173b2", "#de8f05"


def measured(notebook):
    "Cells, exported lines, shares of long code lines of a notebook, and what it imports."
    cells = notebook["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    exported = [s for s in code if s.startswith("#| export")]
    lines = [line for s in code for line in s.split("\n") if line.strip()]
    def share(limit):
        return round(sum(len(line) > limit for line in lines) / max(len(lines), 1), 4)
    heads = "\n".join(exported)
    return {
        "over_100": share(100),
        "over_88": share(88),
        "cells": len(cells),
        "lines": sum(s.count("\n") + 1 for s in exported),
        "imports": sorted(set(re.findall(r"^from ctvlm\.(\w+) import", heads, re.M)))}


def git(*words):
    "What git says."
    command = ["git", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def chapters(ref=None):
    "Stem of each chapter and its numbers, now or at a commit."
    if ref is None:
        paths = sorted((ROOT / "nbs").glob("[0-9][0-9]*_*.ipynb"))
        return {p.stem: measured(json.loads(p.read_text())) for p in paths}
    names = git("ls-tree", "--name-only", ref, "nbs/").split()
    kept = [p for p in names if re.match(r"nbs/\d\d\w*\.ipynb", p)]
    return {Path(p).stem: measured(json.loads(git("show", f"{ref}:{p}"))) for p in kept}


def exceeding(found):
    "The chapters that exceed a limit."
    def over(m): return any(m[k] > limit for k, limit in LIMITS.items())
    return {name: m for name, m in found.items() if over(m)}


def table(found):
    "The chapters as Markdown."
    head = "chapter", "cells", "exported lines", "lines over 88", "over 100", "imports at its head"
    rows = [head, ["---"] * len(head)]
    for name, m in found.items():
        shares = f"{m['over_88']:.1%}", f"{m['over_100']:.1%}"
        rows.append([name, m["cells"], m["lines"], *shares, ", ".join(m["imports"]) or "-"])
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def house(found, left, title):
    "One house as SVG: a floor for each number, a room for each chapter, an arc for each import."
    number = {name.split("_", 1)[1]: int(name[:2]) for name in found}
    def y(floor): return 60 + 26 * floor
    out = [f'<text x="{left}" y="28" font-size="15" font-weight="bold">{title}</text>']
    widest = 0
    for floor, words in enumerate(ROOMS):
        out.append(f'<text x="{left}" y="{y(floor) + 5}">{floor:02d} {words}</text>')
        x = left + 110
        for name, m in found.items():
            if int(name[:2]) != floor: continue
            width = round(m["lines"] / 14)
            large = any(m[k] > LIMITS[k] for k in ("lines", "cells"))
            place = f'x="{x}" y="{y(floor) - 8}" width="{width}" height="16"'
            said = f"{name}: {m['cells']} cells, {m['lines']} lines"
            colour = ORANGE if large else BLUE
            out.append(f'<rect {place} fill="{colour}"><title>{said}</title></rect>')
            x += width + 2
        widest = max(widest, x)
    floors = [(int(name[:2]), number[i]) for name, m in found.items() for i in m["imports"]]
    for above, below in sorted({f for f in floors if f[0] != f[1]}):
        near, a, b = widest + 8, y(above), y(below)
        far = near + 7 * (above - below)
        curve = f"M {near} {a} C {far} {a}, {far} {b}, {near} {b}"
        out.append(f'<path d="{curve}" fill="none" stroke="#777" stroke-opacity="0.55"/>')
    return out


def drawing(before, after):
    "Both houses as one SVG."
    def said(name, found):
        largest = max(m["lines"] for m in found.values())
        lines = sum(m["lines"] for m in found.values())
        return f"{name}: {len(found)} chapters, {lines:,} lines, the largest {largest:,}"
    body = house(before, 20, said("0.3.0", before)) + house(after, 560, said("now", after))
    return "\n".join([
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1120 490" font-family="sans-serif"'
        ' font-size="12" fill="#222">', '<rect width="1120" height="490" fill="white"/>',
        *body, "</svg>"]) + "\n"


def read_numbers(path):
    "Chapters and their numbers from a table."
    rows = csv.DictReader(path.read_text().splitlines())
    return {r["chapter"]: {"cells": int(r["cells"]), "lines": int(r["lines"]),
                           "imports": r["imports"].split()} for r in rows}


def write(found):
    "What depends on the chapters: limits, table, drawing."
    with open(ROOT / "tests" / "house.csv", "w", newline="") as f:
        out = csv.writer(f, lineterminator="\n")
        out.writerow(["chapter", *LIMITS])
        out.writerows([name, *(m[k] for k in LIMITS)] for name, m in exceeding(found).items())
    path = ROOT / "CONTRIBUTING.md"
    between = re.compile(r"(<!-- house: [^\n]* -->\n\n?).*?(\n<!-- /house -->)", re.S)
    def filled(m): return m[1].rstrip() + "\n\n" + table(found) + "\n" + m[2]
    text, n = between.subn(filled, path.read_text())
    if n: path.write_text(text)
    before = read_numbers(ROOT / "tools" / "house_0.3.0.csv")
    (ROOT / "nbs" / "images" / "house.svg").write_text(drawing(before, found))
    print(f"{len(exceeding(found))} of {len(found)} chapters exceed a limit")


def main():
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--ref")
    ap.add_argument("--write", action="store_true")
    args = ap.parse_args()
    found = chapters(args.ref)
    if args.write: write(found)
    else: print(table(found))


if __name__ == "__main__": main()
