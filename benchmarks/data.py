"""Scans per second from a feature store, with 0, 1 and 2 workers; time and memory against the number of scans; one JSON line each.

    python benchmarks/data.py                        1,000 and 10,000 scans of 2 windows at full width (about 0.4 GB in a temporary folder)
    python benchmarks/data.py --scans 500 --windows 36
"""
import argparse, gc, json, subprocess, sys, tempfile, time
from pathlib import Path

import numpy as np, pandas as pd, psutil, torch
from safetensors.torch import save

from ctvlm.data import Batches, FeatureStore, read_studies, scan_key, write_studies
from ctvlm.text import train_tokenizer

WIDTH = 1080


def synthetic(folder, scans, windows):
    "A table of studies and a store of noise, without the disk being waited for."
    rng = np.random.default_rng(0)
    words = [" ".join(rng.choice("liver lung nodule cyst normal right left effusion no of the".split(), 120)) for _ in range(50)]
    pair = dict(snippet="nodule in the right lung", cleaned="nodule in the right lung", series=2, image=5, image_end=None, depth_mm=40., plane=None, prior=False, rule="", status="ok")
    rows = [dict(study=f"s{i}", patient=f"p{i}", scan=f"/data/s{i}.nii.gz", series="", language="en", findings=words[i % 50], impression="Nodule.", labels={"Lung nodule": i % 2, "Emphysema": 0},
                 pairs=[pair], split="train", source="synthetic", label_version="none") for i in range(scans)]
    studies = pd.DataFrame(rows)
    write_studies(studies, folder / "studies.parquet")
    store = FeatureStore.create(folder / "features", "0" * 16, kind="features")
    tensors = dict(cls=torch.randn(windows, WIDTH).half(), depth_tokens=torch.randn(windows, 8, WIDTH).half(), grid=torch.tensor([1, 1, windows]), patch_mask=torch.ones(windows, 8, dtype=torch.bool),
                   bin_depths_mm=torch.arange(8. * windows) * 12 + 6)
    data = save(tensors, {"ctvlm": json.dumps(dict(scan="", size=0, windows=windows, low_mm=0., high_mm=96. * windows))})
    for r in studies.itertuples():
        path = store.path(scan_key(r)); path.parent.mkdir(exist_ok=True); path.write_bytes(data)
    train_tokenizer(words, 400).save_pretrained(folder / "tokenizer")
    return len(data)


def measure(folder, workers, batch_size):
    "One epoch, after a first one that starts the workers and warms the page cache."
    from transformers import AutoTokenizer
    torch.set_num_threads(1)
    mib = lambda: round(psutil.Process().memory_full_info().uss / 2**20)
    began = time.perf_counter()
    tokenizer, studies, before = AutoTokenizer.from_pretrained(folder / "tokenizer"), read_studies(folder / "studies.parquet"), mib()
    batches = Batches(studies, folder / "features", tokenizer, batch_size=batch_size, findings=("Lung nodule", "Emphysema"), workers=workers)
    n = len(studies); del studies; gc.collect()
    prepared = time.perf_counter() - began
    seconds, first = [], time.perf_counter()
    for _ in range(2):
        for k, batch in enumerate(batches):
            if k == 0: began, start = time.perf_counter(), time.perf_counter() - first
            batch["cls"].sum()
        seconds.append(time.perf_counter() - began); first = time.perf_counter()
    counted = (len(batches) - 1) * batch_size
    print(json.dumps({"benchmark": "data", "what": "epoch from the store", "scans": n, "workers": workers, "batch_size": batch_size, "scans_per_second": round(counted / seconds[-1]),
                      "ms_per_batch": round(1000 * seconds[-1] / (len(batches) - 1), 2), "seconds_to_prepare": round(prepared, 2), "seconds_to_first_batch": round(start, 2),
                      "mib_before": before, "mib_after": mib()}), flush=True)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--scans", type=int, nargs="+", default=[1000, 10_000])
    ap.add_argument("--windows", type=int, default=2)
    ap.add_argument("--batch-size", type=int, default=16)
    ap.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    ap.add_argument("--folder", help="measure here (used by the script itself)")
    args = ap.parse_args()
    if args.folder: return measure(Path(args.folder), args.workers[0], args.batch_size)
    for scans in args.scans:
        with tempfile.TemporaryDirectory() as folder:
            size = synthetic(Path(folder), scans, args.windows)
            print(json.dumps({"benchmark": "data", "what": "store", "scans": scans, "windows": args.windows, "bytes_per_scan": size}), flush=True)
            for workers in args.workers:
                subprocess.run([sys.executable, __file__, "--folder", folder, "--workers", str(workers), "--batch-size", str(args.batch_size)], check=True)


if __name__ == "__main__": main()
