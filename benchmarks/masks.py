"""Do pairs from masks teach what mined pairs teach, and does the whole interval teach more than one slice? Three targets for the
same texts of the same scans: the slice that the report cites, the slice of largest area of the mask, all intervals of the mask.

    ctvlm demo -o runs/demo
    python benchmarks/masks.py runs/demo                                      some minutes of processor time
    python benchmarks/masks.py runs/demo --patients 32 --test 32 --epochs 1 --seeds 1   to try it out

Scan encoder, text encoder and heads start from new weights for every seed and learn localization alone; the window encoder is the
run's. Answers are scored against the masks of test patients: mm to the nearest interval and to the nearest centroid, and the share
inside; beside them the middle of the scan. Each variant is compared with the first, patient by patient. Prints one JSON line per
run and writes benchmarks/results/masks.json, which chapter 11f shows. Runs are kept in RUN/masks: the same command goes on where it
was interrupted.
"""
import argparse, hashlib, json, time
from pathlib import Path

import numpy as np, torch

from ctvlm.core import InputError, progress, seed_everything
from ctvlm.data import Batches, FeatureStore, read_studies, scan_key
from ctvlm.evaluation import embed_batches, paired_difference, read_depths
from ctvlm.grounding import centroid_error, interval_error
from ctvlm.localization import depth_similarity
from ctvlm.masks import mask_components
from ctvlm.model import CTVLMModel
from ctvlm.studies import phantom_study
from ctvlm.vision import start_projections
from improvements import TAU, train
from runs import kept, write_json

RESULT = Path(__file__).parent/"results"/"masks.json"
TARGETS = ("cited slice", "largest slice", "whole interval")
SIGMA = 2. # bins of 12 mm
SCORES = ("interval_mm", "centroid_mm", "inside")


def target(intervals, valid, sigma):
    "Flat over `intervals` `(S, K, 2)` in bins, a Gaussian flank beyond; `(S, D)`, normalised over the scan's bins."
    columns = torch.arange(valid.shape[1])[:, None]
    low, high = intervals[:, None, :, 0], intervals[:, None, :, 1]                     # (S, 1, K)
    away = torch.maximum(low - columns, columns - high).clamp(min=0).amin(2)           # (S, D) bins
    away = away.masked_fill(~valid, torch.inf)
    nearest = away.amin(1, keepdim=True)
    return torch.softmax((nearest**2 - away**2) / (2 * sigma**2), 1)


def cross_entropy(b, sigma=SIGMA):
    "The loss of chapter 8 against intervals; of an interval without length it is that loss to the digit."
    logits = (depth_similarity(b.slices, b.snippets) / TAU).masked_fill(~b.valid, -torch.inf)
    log_p = torch.log_softmax(logits, 1).masked_fill(~b.valid, 0)
    return -(target(b.bin, b.valid, sigma) * log_p).sum(1).mean()


def masked(scan):
    "What a phantom's report cites, and the components of its masks."
    study = phantom_study(scan)
    cited = {r.snippet: r.finding for r in study.report.references if r.finding and not r.prior}
    found = {text: mask_components(study.mask(f) > 0.5, study.volume.affine)[0] for text, f in cited.items()}
    return {text: components for text, components in found.items() if components}


def masks_of(studies, folder):
    "(study, text) -> components; kept on disk, a file a scan."
    folder.mkdir(parents=True, exist_ok=True)
    out = {}
    for s in progress(list(studies.itertuples()), "masks"):
        found = kept(folder/f"{scan_key(s)}.json", {"scan": s.scan}, lambda: masked(s.scan))
        out |= {(s.study, text): components for text, components in found.items()}
    return out


def ends(name, components, cited):
    "The intervals that a snippet is taught, `(K, 2)` mm."
    if name == "cited slice": return [[cited, cited]]
    if name == "largest slice": return [[components[0]["largest_mm"]] * 2]
    return [[c["low_mm"], c["high_mm"]] for c in components]


def taught(batch, masks, name):
    "The batch with `snippet_bin` `(S, K, 2)`, intervals in bins; snippets without a mask are left out."
    names = [(batch["study"][b], text) for b, text in zip(batch["snippet_scan"].tolist(), batch["snippet_text"])]
    keep = [i for i, n in enumerate(names) if n in masks]
    rows = []
    for i in keep:
        bins = batch["bin_depths_mm"][batch["snippet_scan"][i]]
        bins = bins[bins.isfinite()]
        step = float(bins[-1] - bins[0]) / (len(bins) - 1)
        mm = torch.tensor(ends(name, masks[names[i]], float(batch["snippet_depth_mm"][i])))
        rows.append((mm - bins[0]) / step)
    most = max(map(len, rows), default=1)
    padded = [torch.cat([r, r[-1:].expand(most - len(r), 2)]) for r in rows]           # the last one again: no other target
    out = {k: v[keep] for k, v in batch.items() if k in ("snippet_ids", "snippet_mask", "snippet_scan", "snippet_depth_mm")}
    text = [batch["snippet_text"][i] for i in keep]
    return batch | out | {"snippet_text": text, "snippet_bin": torch.stack(padded) if padded else torch.zeros(0, 1, 2)}


def score(model, data, masks):
    "Errors of every test snippet that has a mask."
    found, _ = read_depths(embed_batches(model, data, quiet=True))
    rows = []
    for r in found.itertuples():
        components = masks.get((r.study, r.snippet))
        if components is None: continue
        off = [float(f([z], components)[0]) for z in (r.pred_mm, (r.low_mm + r.high_mm) / 2) for f in (interval_error, centroid_error)]
        rows.append((r.patient, *off, abs(r.pred_mm - r.depth_mm)))
    names = ("patient", "interval_mm", "centroid_mm", "middle_interval_mm", "middle_centroid_mm", "cited_mm")
    out = {name: list(column) for name, column in zip(names, zip(*rows))}
    return out | {"inside": [float(e == 0) for e in out["interval_mm"]]}


def one(name, seed, args, model, data, masks):
    "Train one variant from new weights, and score it."
    seed_everything(seed)
    fresh = CTVLMModel(model.config)
    fresh.window_encoder.load_state_dict(model.window_encoder.state_dict())
    some = data["train"][:6]
    start_projections(fresh.scan_encoder, *(torch.cat([b[part] for b in some]).float() for part in ("cls", "depth_tokens")))
    batches = [taught(b, masks["train"], name) for b in data["train"]]
    train(fresh, batches, cross_entropy, args.epochs, args.rate, seed)
    return score(fresh, data["test"], masks["test"])


def summarise(runs):
    "Each variant's means per seed, and its paired difference to the first: seeds averaged, patients resampled."
    rows, first = [], None
    for name in TARGETS:
        of = [r["errors"] for r in runs if r["target"] == name]
        stacked = {k: np.array([e[k] for e in of]) for k in (*SCORES, "cited_mm")}         # (seeds, S)
        first, patients = first or stacked, of[0]["patient"]
        row = {"target": name} | {k: v.mean(1).round(4).tolist() for k, v in stacked.items()}
        for k in SCORES:
            d = paired_difference(first[k].mean(0), stacked[k].mean(0), patients)
            row |= {f"{k}_difference": d["difference"], f"{k}_difference_ci95": d["difference_ci95"]}
        rows.append(row)
    return rows


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("run", type=Path, help="folder of `ctvlm demo`: studies.parquet, features, model")
    ap.add_argument("--patients", type=int, default=200, help="to train on")
    ap.add_argument("--test", type=int, default=100, help="patients to test on")
    ap.add_argument("--epochs", type=int, default=4)
    ap.add_argument("--seeds", type=int, default=3)
    ap.add_argument("--batch", type=int, default=8)
    ap.add_argument("--rate", type=float, default=2e-3)
    ap.add_argument("--output", type=Path, default=RESULT)
    args = ap.parse_args()
    torch.set_num_threads(1)
    studies, model = read_studies(args.run/"studies.parquet"), CTVLMModel.from_pretrained(args.run/"model")
    if not studies.scan.str.startswith("phantom:").all(): raise InputError(
        f"{args.run} holds scans that are no phantoms, whose masks nobody knows: give the folder of `ctvlm demo`")
    store = FeatureStore(args.run/"features", model)
    split = {"train": studies[studies.split == "train"][:args.patients], "test": studies[studies.split == "test"][:args.test]}
    masks, data = {}, {}
    for name, some in split.items():
        masks[name] = masks_of(some, args.run/"masks"/"components")
        by_length = some.iloc[store.table(some).windows.argsort(kind="stable")]
        data[name] = list(Batches(by_length, store, model.processor.tokenizer, args.batch, training=False))
    settings = {k: getattr(args, k) for k in ("patients", "test", "epochs", "batch", "rate")} | {"features": store.folder.name}
    settings["studies"] = hashlib.sha256((args.run/"studies.parquet").read_bytes()).hexdigest()
    runs = []
    for seed in range(args.seeds):
        for k, name in enumerate(TARGETS):
            began, what = time.perf_counter(), {"target": name, "seed": seed} | settings
            errors = kept(args.run/"masks"/f"{k}-{seed}.json", what, lambda: one(name, seed, args, model, data, masks))
            runs.append({"target": name, "errors": errors})
            means = {s: round(float(np.mean(errors[s])), 3) for s in (*SCORES, "cited_mm")}
            print(json.dumps({"benchmark": "masks", "target": name, "seed": seed, **means, "seconds": round(time.perf_counter() - began)}), flush=True)
    first = runs[0]["errors"]
    about = {"train_patients": len(split["train"]), "test_patients": len(set(first["patient"])), "snippets": len(first["patient"]),
             "epochs": args.epochs, "seeds": args.seeds, "window_encoder": model.config.trained_on}
    about |= {k: float(np.mean(first[k])) for k in ("middle_interval_mm", "middle_centroid_mm")}
    write_json(args.output, about | {"rows": summarise(runs)})


if __name__ == "__main__": main()
