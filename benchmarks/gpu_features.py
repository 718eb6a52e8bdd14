"""From files to features: how many scans a second, and which share of the time, from its first window on, the encoder computes.

    python benchmarks/gpu_features.py                  32 scans of 512 x 512 x 300 (hard links of one file), `large`, random weights
    python benchmarks/gpu_features.py --size tiny --scans 3 --side 96 --slices 60      on a CPU, to see that it runs

One JSON line per number of workers. With --results they go to benchmarks/results/features_DEVICE.jsonl.
"""
import argparse, json, os, tempfile
from pathlib import Path

import nibabel, numpy as np, pandas as pd, torch

from ctvlm.core import pick_device, seed_everything, write_atomically
from ctvlm.data import embed_studies
from ctvlm.features import busy
from ctvlm.model import CTVLMConfig, CTVLMModel


def archive(folder, scans, side, slices):
    "A folder of `scans` files, one scan with as many names, and its table of studies."
    rng = np.random.default_rng(0)
    x, y = np.indices((side, side)) * 2 / side - 1
    r = np.hypot(x, y * 1.3)[..., None]
    body = np.where(r > 0.9, -1000, np.where(r > 0.75, -100, 40))   # air, a ring of fat, soft tissue
    voxels = (body + rng.normal(0, 20, (side, side, slices))).astype(np.int16)
    first = folder / "scan0.nii.gz"
    affine = np.diag([-384 / side, -384 / side, 450 / slices, 1])   # 0.75 x 0.75 x 1.5 mm at full size
    nibabel.save(nibabel.Nifti1Image(voxels, affine), first)
    for i in range(1, scans): os.link(first, folder / f"scan{i}.nii.gz")
    rows = [dict(source="made up", study=f"s{i}", patient=f"p{i}", scan=str(folder / f"scan{i}.nii.gz"), series="")
            for i in range(scans)]
    return pd.DataFrame(rows)


def measure(model, studies, workers):
    with tempfile.TemporaryDirectory() as output:
        made = embed_studies(studies, model, output, workers=workers, quiet=True)
    if made["failed"]: raise SystemExit(f"{made['failed']} scans failed: {made['reasons']}")
    keys = ("reading", "copying", "cutting", "encoding", "writing", "waiting")
    return dict(workers=workers, scans=len(studies), seconds=round(made["seconds"], 2),
                scans_per_s=round(len(studies) / made["seconds"], 2),
                computing=round(busy(made["profile"]), 3), **{k: round(made[k], 2) for k in keys})


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--device", default=None, help="cpu, cuda; the best one present")
    ap.add_argument("--size", default="large", choices=("tiny", "base", "large"))
    ap.add_argument("--scans", type=int, default=32)
    ap.add_argument("--side", type=int, default=512, help="voxels along x and y")
    ap.add_argument("--slices", type=int, default=300)
    ap.add_argument("--results", action="store_true")
    args = ap.parse_args()
    device, lines = pick_device(args.device), []
    seed_everything(0)
    model = CTVLMModel(getattr(CTVLMConfig, args.size)()).eval().to(device)
    with tempfile.TemporaryDirectory() as folder:
        studies = archive(Path(folder), args.scans, args.side, args.slices)
        for workers in sorted({2, max(2, (os.cpu_count() or 2) - 2)}):
            name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
            line = dict(benchmark="features", machine=name, size=args.size) | measure(model, studies, workers)
            lines.append(json.dumps(line))
            print(lines[-1], flush=True)
    if args.results:
        path = Path(__file__).parent / "results" / f"features_{device.type}.jsonl"
        with write_atomically(path) as t: t.write_text("\n".join(lines) + "\n")


if __name__ == "__main__": main()
