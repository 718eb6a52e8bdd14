"""Plant the faults of tools/mutants.toml, one at a time, in a throw-away copy, and say which ones the tests miss.

    python tools/mutants.py                     every fault
    python tools/mutants.py --modules model text
    python tools/mutants.py --check             only whether each fault can still be planted
    python tools/mutants.py --write             also put the table into CONTRIBUTING.md

A fault is a module of ctvlm, what it is in words, a text that occurs exactly once in the exported module, and what
stands in its place. White space does not count, so that a line may be broken elsewhere; where code has moved to another
module it is found there. `by` names the test that notices it and is asked first; where it passes, or there is none, the
tests of the module are asked, those of `TESTS`. Status 1 if any fault survives, or cannot be planted any more: mend the
test, or the fault."""
import argparse, os, re, shutil, subprocess, sys, tempfile, tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FAULTS = tomllib.loads((ROOT / "tools" / "mutants.toml").read_text())
TESTS, FAULTS = FAULTS["tests"], FAULTS["fault"]
BEGIN, END = "<!-- mutants: begin -->", "<!-- mutants: end -->"


def found_in(root, fault):
    "Where the text of a fault stands: (path, match), in its own module, else wherever it is."
    text = re.compile(r"\s*".join(map(re.escape, re.findall(r"\w+|[^\w\s]", fault["old"]))))
    own = root / "ctvlm" / f"{fault['module']}.py"
    def matches(path): return [(path, m) for m in text.finditer(path.read_text())]
    here = matches(own) if own.exists() else []
    return here or [hit for path in sorted((root / "ctvlm").glob("*.py")) if path.name != "_modidx.py" for hit in matches(path)]


def stale(fault):
    "Why a fault cannot be planted; an empty string if it can."
    times = len(found_in(ROOT, fault))
    return "" if times == 1 else f"its text occurs {times} times"


def copy_of(folder):
    "What tests need, without what is large or built; `shared` stays a link."
    here = folder / "repository"
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "_docs", "_proc", "__pycache__", ".*cache")
    shutil.copytree(ROOT, here, ignore=ignored, symlinks=True)
    if (ROOT.parent / "shared").is_dir(): (folder / "shared").symlink_to(ROOT.parent / "shared")
    return here


def passes(here, tests, seconds):
    "Whether `tests` pass in the copy at `here`; `None` where `seconds` were not enough to say."
    environment = {**os.environ, "PYTHONPATH": str(here), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try: done = subprocess.run(command, cwd=here, env=environment, capture_output=True, timeout=seconds)
    except subprocess.TimeoutExpired: return None
    return done.returncode == 0


def plant(here, fault, seconds, broken=frozenset()):
    """Whether the fault is noticed: by the test that it names, else by those of its module, but for the `broken` ones;
    `None` where they took too long."""
    [(path, match)] = found_in(here, fault)
    sound = path.read_text()
    path.write_text(sound[:match.start()] + fault["new"] + sound[match.end():])
    sets = [t for t in ([fault["by"]] if "by" in fault else [], TESTS[fault["module"]]) if t and not broken & set(t)]
    results = (passes(here, tests, seconds) for tests in sets)
    try: return {True: False, False: True, None: None}[next((r for r in results if not r), True)]
    finally: path.write_text(sound)


def table(found):
    "Markdown: a row per module; the survivors, and what stayed open, by name."
    modules = sorted({f["module"] for f, _ in found})
    rows = ["| module | planted | noticed | missed |", "| --- | --- | --- | --- |"]
    for m in modules:
        noticed = [n for f, n in found if f["module"] == m]
        missed = "; ".join(f["what"] + ("" if n is False else " (too slow to say)") for f, n in found if f["module"] == m and not n)
        rows.append(f"| {m} | {len(noticed)} | {noticed.count(True)} | {missed} |")
    rows.append(f"| all | {len(found)} | {sum(n is True for _, n in found)} | |")
    return "\n".join(rows)


def write_table(text):
    "Replace what stands between the marks in CONTRIBUTING.md."
    path = ROOT / "CONTRIBUTING.md"
    before, _, rest = path.read_text().partition(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--modules", nargs="*", help="only faults of these")
    ap.add_argument("--check", action="store_true", help="plant nothing")
    ap.add_argument("--write", action="store_true", help="put the table into CONTRIBUTING.md")
    ap.add_argument("--timeout", type=int, default=900, help="seconds for the tests of one fault")
    args = ap.parse_args()
    faults = [f for f in FAULTS if not args.modules or f["module"] in args.modules]
    old = [f"{f['module']}: {f['what']}: {why}" for f in faults if (why := stale(f))]
    if args.check: sys.exit("\n".join(old) or 0)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        here = copy_of(Path(folder))
        now = [f for f in faults if not stale(f)]
        asked = sorted({f["by"] for f in now if "by" in f})
        asked += sorted({t for f in now if "by" not in f for t in TESTS[f["module"]]})
        broken = set() if passes(here, asked, 4 * args.timeout) else {t for t in asked if not passes(here, [t], args.timeout)}
        if broken: print("fail without any fault, so they can show nothing:", *sorted(broken), sep="\n  ", flush=True)
        for fault in now:
            found.append((fault, plant(here, fault, args.timeout, broken)))
            said = {True: "noticed", False: "MISSED ", None: "OPEN   "}[found[-1][1]]
            print(f"{said} {fault['module']}: {fault['what']}", flush=True)
    print(table(found))
    if args.write: write_table(table(found))
    if old or not all(n for _, n in found): sys.exit("\n".join(["not planted:", *old]) if old else 1)


if __name__ == "__main__": main()
