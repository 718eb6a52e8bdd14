"""Run notebooks from top to bottom and keep their outputs in place.

Cells marked `#| eval: false`, or with a flag of `tst_flags` in settings.ini (`#| cuda`, `#| slow`, `#| orthanc`), keep the
outputs that they have, unless the flag is named with --flags."""
import argparse, re, sys, time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbdev.clean import clean_nb
from nbdev.config import get_config

ROOT = Path(__file__).resolve().parent.parent


def skipped(cell, flags):
    "Whether `cell` is not to be run: no code, `eval: false`, or a flag that was not asked for."
    if cell.cell_type != "code" or not cell.source.strip(): return True
    marks = re.findall(r"^#\|\s*(.+?)\s*$", cell.source, re.M)
    return any(m.replace(" ", "") == "eval:false" or m in flags for m in marks)


def keep(output):
    "Outputs that are the same on every run: no standard error, no progress bars, no widgets, whose state is not kept."
    widget = "application/vnd.jupyter.widget-view+json" in output.get("data", {})
    return not widget and not (output.output_type == "stream" and output.name == "stderr")


def run(path, flags):
    "Execute the notebook at `path` in its own folder, clean it and write it back."
    nb = nbformat.read(path, as_version=4)
    client = NotebookClient(nb, timeout=1800, coalesce_streams=True, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}})
    with client.setup_kernel():
        for i, cell in enumerate(nb.cells):
            if skipped(cell, flags): continue
            client.execute_cell(cell, i)
            cell.outputs = [o for o in cell.outputs if keep(o)]
    clean_nb(nb)
    nb.nbformat, nb.nbformat_minor = 4, 5
    nb.metadata = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    temporary = path.with_suffix(".tmp")
    nbformat.write(nb, temporary)
    temporary.replace(path)


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("notebooks", nargs="*", type=Path, help="default: all of nbs/")
    ap.add_argument("--flags", default="", help="flags whose cells run too, e.g. 'cuda slow'")
    args = ap.parse_args()
    flags = set(get_config(path=ROOT).tst_flags.split()) - set(args.flags.split())
    every = [p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if not any(x.startswith((".", "_")) for x in p.relative_to(ROOT).parts)]
    for path in args.notebooks or every:
        start = time.perf_counter()
        try: run(path.resolve(), flags)
        except CellExecutionError as e: sys.exit(f"{path}: {e}")
        print(f"{path.name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__": main()
