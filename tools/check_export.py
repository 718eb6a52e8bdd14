"Clean and export the notebooks; fail when that changes a file, naming it."
import subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def contents():
    "Bytes of every notebook and exported module."
    return {p: p.read_bytes() for d, e in (("nbs", "*.ipynb"), ("ctvlm", "*.py")) for p in (ROOT / d).rglob(e) if ".ipynb_checkpoints" not in p.parts}


def main():
    before = contents()
    for command in ("nbdev_clean", "nbdev_export"): subprocess.run([command], cwd=ROOT, check=True)
    after = contents()
    changed = sorted(str(p.relative_to(ROOT)) for p in before.keys() | after.keys() if before.get(p) != after.get(p))
    if changed: sys.exit(f"nbdev_clean and nbdev_export changed {', '.join(changed)}: commit what they write")
    print(f"{len(after)} notebooks and modules are as exported")


if __name__ == "__main__": main()
