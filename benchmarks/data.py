"""Scans per second from a feature store, with 0, 1 and 2 workers; time and memory against the number of scans; how reading and encoding overlap.
One JSON line each.

    python benchmarks/data.py                        1,000 and 10,000 scans of 2 windows at full width (about 0.4 GB in a temporary folder)
    python benchmarks/data.py --scans 500 --windows 36
    python benchmarks/data.py --profile              12 phantoms read from NIfTI and encoded; the chapter draws benchmarks/results/embed_profile.json
    python benchmarks/data.py --costs                what checksum and content cost, as ratios; kept in benchmarks/results/data_costs.json
    python benchmarks/data.py --archive              a DICOM archive of 5,000 to 50,000 studies whose headers are made up; kept there, too
"""
import argparse, gc, json, shutil, subprocess, sys, tempfile, time
from pathlib import Path

import numpy as np, pandas as pd, psutil, torch
from safetensors import safe_open

import ctvlm.adaptors, ctvlm.collection
from ctvlm.core import write_atomically
from ctvlm.data import (
    Batches, FeatureStore, embed_studies, read_dicom_root, read_phantoms, read_studies, scan_content, scan_key, spent, write_studies)
from ctvlm.features import busy
from ctvlm.model import CTVLMConfig, CTVLMModel
from ctvlm.phantoms import PhantomCohort, write_cohort
from ctvlm.text import train_tokenizer

WIDTH = 1080
RESULT = Path(__file__).parent / "results" / "embed_profile.json"
COSTS = RESULT.with_name("data_costs.json")


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
    store.save("first", tensors, dict(scan="", content="", windows=windows, low_mm=0., high_mm=96. * windows))
    data = store.path("first").read_bytes()
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
            if k == 0: began, start, busy = time.perf_counter(), time.perf_counter() - first, time.process_time()
            batch["cls"].sum()
        seconds.append(time.perf_counter() - began); first, busy = time.perf_counter(), time.process_time() - busy
    counted = (len(batches) - 1) * batch_size
    print(json.dumps({"benchmark": "data", "what": "epoch from the store", "scans": n, "workers": workers, "batch_size": batch_size, "scans_per_second": round(counted / seconds[-1]),
                      "ms_per_batch": round(1000 * seconds[-1] / (len(batches) - 1), 2), "cpu_ms_per_batch_here": round(1000 * busy / (len(batches) - 1), 2), "seconds_to_prepare": round(prepared, 2), "seconds_to_first_batch": round(start, 2),
                      "mib_before": before, "mib_after": mib()}), flush=True)


def profile(workers=(0, 1, 2), scans=12):
    "Where the time goes when features are computed: one thread encodes, `workers` processes read."
    torch.set_num_threads(1); torch.manual_seed(0)
    model, runs = CTVLMModel(CTVLMConfig.tiny(300)), {}
    with tempfile.TemporaryDirectory() as folder:
        write_cohort(PhantomCohort(scans), folder, quiet=True)
        studies, _ = read_phantoms(folder)
        for w in workers:
            found = embed_studies(studies, model, Path(folder) / f"features {w}", workers=w, quiet=True)
            p = found["profile"]
            print(json.dumps({"benchmark": "data", "what": "features of phantoms", "scans": scans, "workers": w, **{k: round(found[k], 2) for k in ("seconds", *spent(p))},
                              "encoder_busy": round(busy(p), 2)}), flush=True)
            runs[w] = p.round(3).to_dict("list")
    with write_atomically(RESULT) as t: t.write_text(json.dumps(runs) + "\n")


def cpu(function, repeats):
    "Seconds of this process for one call, the least of three rounds."
    rounds = []
    for _ in range(3):
        began = time.process_time()
        for _ in range(repeats): function()
        rounds.append((time.process_time() - began) / repeats)
    return min(rounds)


def kept(**numbers):
    "Print numbers and put them beside those of earlier runs."
    known = json.loads(COSTS.read_text()) if COSTS.exists() else {}
    with write_atomically(COSTS) as t: t.write_text(json.dumps(known | numbers, indent=1) + "\n")
    print(json.dumps({"benchmark": "data", **numbers}), flush=True)


def costs():
    "Ratios of processor time: loading with and without the checksum, the content of a scan to reading and encoding it."
    torch.set_num_threads(1); torch.manual_seed(0)
    model = CTVLMModel(CTVLMConfig.tiny(300))
    def plain(path): # what `load` did before there was a checksum
        with safe_open(path, "pt") as f: return {name: f.get_tensor(name).sum() for name in f.keys()}
    def checked(store, key): return [x.sum() for x in store.load(key).values()]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        large = {}
        for windows in (36, 108):
            store = FeatureStore.create(folder / "large", str(windows) * 8, kind="features")
            store.save("ab", dict(cls=torch.randn(windows, WIDTH).half(), depth_tokens=torch.randn(windows, 8, WIDTH).half()), dict(content=""))
            large[windows] = round(cpu(lambda: checked(store, "ab"), 50) / cpu(lambda: plain(store.path("ab")), 50) - 1, 2)
        patient = PhantomCohort(1, seed=5)[0]
        scans = {"NIfTI": patient.write_nifti(folder / "scan.nii.gz")}
        real = Path(__file__).parents[2] / "shared" / "data" / "chest_dicom"
        if real.is_dir(): scans["148 DICOM slices"] = real
        shares = {}
        for name, scan in scans.items():
            row = dict(study=name, patient="p", scan=str(scan), series="", language="en", findings="", impression="", labels={}, pairs=[], split="train", source="", label_version="", file="")
            def embed():
                embed_studies(pd.DataFrame([row]), model, folder / "f", workers=0, quiet=True)
                shutil.rmtree(folder / "f")
            shares[name] = round(cpu(lambda: scan_content(str(scan)), 5) / cpu(embed, 1), 4)
    kept(checksum_to_load=large, content_to_embed=shares)


def archive(sizes=(5_000, 10_000, 25_000, 50_000)):
    "Processor time per study of `read_dicom_root`, as a multiple of that in the smallest archive."
    seconds = {}
    sound = ctvlm.collection.scan_problem, ctvlm.adaptors.dicom_studies
    with tempfile.TemporaryDirectory() as folder:
        for n in sizes:
            studies = {f"1.2.{k}": ({Path(folder) / f"{k // 500}" / f"{k}" / series for series in ("2", "3")}, f"A{k}", f"p{k // 2}") for k in range(n)}
            ctvlm.collection.scan_problem, ctvlm.adaptors.dicom_studies = (lambda *a: ""), (lambda *a: studies)
            pd.DataFrame(dict(study=[f"A{k}" for k in range(n)], report="Normal.", language="en")).to_csv(Path(folder) / "reports.csv", index=False)
            began = time.process_time()
            table, refused = read_dicom_root(folder)
            seconds[n] = (time.process_time() - began) / n
            assert len(table) == n and not len(refused)
    ctvlm.collection.scan_problem, ctvlm.adaptors.dicom_studies = sound
    kept(archive={n: round(s / seconds[sizes[0]], 2) for n, s in seconds.items()})


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--scans", type=int, nargs="+", default=[1000, 10_000])
    ap.add_argument("--windows", type=int, default=2)
    ap.add_argument("--batch-size", type=int, default=16)
    ap.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    ap.add_argument("--folder", help="measure here (used by the script itself)")
    for name in ("--profile", "--costs", "--archive"): ap.add_argument(name, action="store_true")
    args = ap.parse_args()
    if args.profile: return profile()
    if args.costs: return costs()
    if args.archive: return archive()
    if args.folder: return measure(Path(args.folder), args.workers[0], args.batch_size)
    for scans in args.scans:
        with tempfile.TemporaryDirectory() as folder:
            size = synthetic(Path(folder), scans, args.windows)
            print(json.dumps({"benchmark": "data", "what": "store", "scans": scans, "windows": args.windows, "bytes_per_scan": size}), flush=True)
            for workers in args.workers:
                subprocess.run([sys.executable, __file__, "--folder", folder, "--workers", str(workers), "--batch-size", str(args.batch_size)], check=True)


if __name__ == "__main__": main()
