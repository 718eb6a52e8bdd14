"""What makes localization better? Variants of the loss and of the reading, each trained over several seeds on cached window features.

    ctvlm demo -o runs/demo
    python benchmarks/improvements.py runs/demo                                      about 12 minutes on two cores
    python benchmarks/improvements.py runs/demo --patients 32 --epochs 1 --seeds 1   to try it out

Scan encoder, text encoder and heads start from new weights for every seed and learn localization alone; the window encoder is the run's.
Each variant is compared with the first, patient by patient. Prints one JSON line per run and writes benchmarks/results/improvements.json, which
chapter 13 shows, after every seed. Runs are kept in RUN/improvements: the same command goes on where it was interrupted.
"""
import argparse, functools, hashlib, json, math, time
from pathlib import Path
from types import SimpleNamespace

import numpy as np, torch
import torch.nn.functional as F

from ctvlm.core import InputError, seed_everything, stable_rng
from ctvlm.data import Batches, FeatureStore, read_studies
from ctvlm.evaluation import calibrate_depth, embed_batches, encode_batch, paired_difference, read_depths
from ctvlm.localization import depth_similarity, localization_loss
from ctvlm.model import CTVLMModel
from ctvlm.vision import start_projections
from runs import kept, side_by_side, write_json

TAU = 0.1


def cross_entropy(b, sigma=2., on_bins=False):
    "The loss of chapter 8 against a Gaussian around the cited depth, or around the bin that holds it."
    return localization_loss(b.slices, b.snippets, b.bin.round() if on_bins else b.bin, b.valid, sigma, TAU, padding_free=True)


def cdf_distance(b, power, places=4):
    "Integral over depth of |F(z) - [z >= truth]|^power in bins: 1 the earth mover's distance to the cited depth, 2 the CRPS."
    logits = (depth_similarity(b.slices, b.snippets) / TAU).masked_fill(~b.valid, -torch.inf)              # (S, D)
    p = torch.softmax(logits, 1)[:, :, None]
    inside = (torch.arange(places) + 0.5) / places                                                        # of a bin, from its lower end
    below = p.cumsum(1) - p + p * inside                                                                  # (S, D, places)
    above_truth = torch.arange(p.shape[1])[:, None] + inside - 0.5 >= b.bin[:, None, None]
    return ((below - above_truth.float()).abs()**power * b.valid[:, :, None]).sum((1, 2)).mean() / places


def other_scans(b, share=1.):
    "Cross-entropy in which the depth bins of the batch's other scans compete with a scan's own."
    own = (depth_similarity(b.slices, b.snippets) / TAU).masked_fill(~b.valid, -torch.inf)                 # (S, D)
    foreign = torch.einsum("bdp,sp->sbd", F.normalize(b.all_slices, dim=-1), F.normalize(b.snippets, dim=-1)) / TAU
    foreign = foreign.masked_fill(~b.all_valid | (torch.arange(len(b.all_valid))[:, None] == b.scan[:, None, None]), -torch.inf)
    against = torch.logaddexp(own.logsumexp(1), foreign.flatten(1).logsumexp(1) + math.log(share)) - own.logsumexp(1)
    return cross_entropy(b) + against.mean()


LOSSES = {"Gaussian in mm, 24 mm": cross_entropy,
          "Gaussian on bins": lambda b: cross_entropy(b, on_bins=True),
          "Gaussian in mm, 12 mm": lambda b: cross_entropy(b, 1.),
          "Gaussian in mm, 48 mm": lambda b: cross_entropy(b, 4.),
          "+ CRPS": lambda b: cross_entropy(b) + cdf_distance(b, 2),
          "+ earth mover": lambda b: cross_entropy(b) + cdf_distance(b, 1),
          "earth mover alone": lambda b: cdf_distance(b, 1),
          "+ negatives from other scans": other_scans}


def parabola(posterior, depths, bin_mm):
    "The best bin, moved to the top of the parabola through its logarithm and its neighbours'."
    k = posterior.argmax(1)
    rows, last = np.arange(len(k)), np.isfinite(depths).sum(1) - 1
    log = np.log(np.maximum(posterior, 1e-30))
    low, mid, high = (log[rows, np.clip(k + d, 0, last)] for d in (-1, 0, 1))
    curve = low - 2 * mid + high
    shift = np.where((k > 0) & (k < last) & (curve < 0), 0.5 * (low - high) / np.where(curve < 0, curve, -1), 0)
    return depths[rows, k] + bin_mm * shift


def train(model, data, loss, epochs, rate, seed):
    "AdamW with a short warm-up and a cosine, on the parts that localization needs; the batches come in another order each epoch."
    parts = [p for name, p in model.named_parameters() if not name.startswith("window_encoder")]
    optimiser, steps, step = torch.optim.AdamW(parts, lr=rate, betas=(0.9, 0.95), weight_decay=1e-2), epochs * len(data), 0
    model.train()
    for epoch in range(epochs):
        for i in stable_rng(seed, "order", epoch).permutation(len(data)):
            step, batch = step + 1, data[i]
            if not len(batch["snippet_scan"]): continue
            for group in optimiser.param_groups: group["lr"] = rate * min(1, step / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
            scans, where = encode_batch(model, batch), batch["snippet_scan"]
            b = SimpleNamespace(slices=scans.slices[where], valid=scans.valid[where], bin=batch["snippet_bin"].float(), scan=where, all_slices=scans.slices,
                                all_valid=scans.valid, snippets=model.encode_text(batch["snippet_ids"], batch["snippet_mask"], head="snippet"))
            optimiser.zero_grad()
            loss(b).backward()
            torch.nn.utils.clip_grad_norm_(parts, 1.)
            optimiser.step()


def measure(model, batches):
    "Errors of every snippet under each reading, whether the interval held it and how long it was."
    calibration = calibrate_depth(embed_batches(model, batches["val"], quiet=True))
    e = embed_batches(model, batches["test"], quiet=True)
    found, posterior = read_depths(e, calibration)
    truth = found.depth_mm.to_numpy()
    readings = {"median": found.pred_mm, "best bin": found.argmax_mm, "parabola": parabola(posterior, e.bin_depths_mm, calibration.bin_mm)}
    held = (found.interval_low_mm <= truth) & (truth <= found.interval_high_mm)
    return found.patient.tolist(), {k: np.abs(np.asarray(v) - truth) for k, v in readings.items()}, float(held.mean()), float((found.interval_high_mm - found.interval_low_mm).mean())


def summarise(runs, patients):
    "Each variant's mean error per seed, and its paired difference to the first: seeds averaged, patients resampled."
    variants, rows = list(dict.fromkeys(r["variant"] for r in runs)), []
    errors = {v: np.stack([r["error"] for r in runs if r["variant"] == v]) for v in variants}                # (seeds, S)
    first = errors[variants[0]]
    for v, e in errors.items():
        d = paired_difference(first.mean(0), e.mean(0), patients)
        rows.append({"variant": v, "mae_mm": e.mean(1).round(2).tolist(), "mean_mm": float(e.mean()), "difference_mm": d["difference"], "difference_ci95": d["difference_ci95"],
                     "better_in_every_seed": bool((e.mean(1) < first.mean(1)).all()), **{k: float(np.mean([r[k] for r in runs if r["variant"] == v])) for k in ("coverage", "length_mm")}})
    return rows


@functools.cache
def prepared(run, patients, batch):
    "The run's configuration, and its patients in batches: split -> list."
    studies, model = read_studies(run/"studies.parquet"), CTVLMModel.from_pretrained(run/"model")
    split = dict(list(studies.groupby("split")))
    if not {"train", "val", "test"} <= set(split): raise InputError(f"{run}/studies.parquet has the splits {', '.join(split)}, expected train, val and test: run `ctvlm demo`")
    split["train"], store = split["train"][:patients], FeatureStore(run/"features")
    def batches(studies): # scans of like length share a batch: attention over padding is most of the time otherwise
        return list(Batches(studies.iloc[store.table(studies).windows.argsort(kind="stable")], store, model.processor.tokenizer, batch, training=False))
    return model.config, {name: batches(split[name]) for name in ("train", "val", "test")}


def one(job): # (variant, seed, the arguments, settings that its result depends on) -> a line to print, and a row for each reading of the answer
    name, seed, args, settings = job
    def measured():
        began, (config, data) = time.perf_counter(), prepared(args.run, args.patients, args.batch)
        seed_everything(seed)
        model = CTVLMModel(config)
        start_projections(model.scan_encoder, *(torch.cat([b[part] for b in data["train"][:6]]).float() for part in ("cls", "depth_tokens")))
        train(model, data["train"], LOSSES[name], args.epochs, args.rate, seed)
        patients, errors, coverage, length = measure(model, data)
        readings = errors if LOSSES[name] is cross_entropy else {"median": errors["median"]}
        rows = [{"variant": name if reading == "median" else f"{name}, read at the {reading}", "seed": seed, "error": error.tolist(), "coverage": coverage, "length_mm": length}
                for reading, error in readings.items()]
        line = {"benchmark": "improvements", "variant": name, "seed": seed, "mae_mm": {k: round(float(e.mean()), 2) for k, e in readings.items()},
                "coverage": round(coverage, 3), "length_mm": round(length, 1), "seconds": round(time.perf_counter() - began)}
        return {"line": line, "rows": rows, "patients": patients}
    return kept(args.run/"improvements"/f"{list(LOSSES).index(name)}-{seed}.json", {"variant": name, "seed": seed} | settings, measured)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("run", type=Path, help="folder of `ctvlm demo`: studies.parquet, features, model")
    ap.add_argument("--patients", type=int, default=400, help="to train on")
    ap.add_argument("--epochs", type=int, default=6)
    ap.add_argument("--seeds", type=int, default=3)
    ap.add_argument("--batch", type=int, default=16)
    ap.add_argument("--rate", type=float, default=2e-3)
    ap.add_argument("--processes", type=int, default=2)
    ap.add_argument("--output", type=Path, default=Path(__file__).parent/"results"/"improvements.json")
    args = ap.parse_args()
    config, data = prepared(args.run, args.patients, args.batch)
    settings = {k: getattr(args, k) for k in ("patients", "epochs", "batch", "rate")} | {
        "batches": "by length", "features": FeatureStore(args.run/"features").folder.name, "studies": hashlib.sha256((args.run/"studies.parquet").read_bytes()).hexdigest()}
    jobs, runs = [(name, seed, args, settings) for seed in range(args.seeds) for name in LOSSES], []
    for job, found in zip(jobs, side_by_side(one, jobs, args.processes)):
        print(json.dumps(found["line"]), flush=True)
        runs += found["rows"]
        if job[0] == list(LOSSES)[-1]: # a seed is complete
            patients = {name: len({p for b in batches for p in b["patient"]}) for name, batches in data.items()}
            write_json(args.output, {"patients": patients, "snippets": len(found["patients"]), "epochs": args.epochs, "seeds": job[1] + 1, "window_encoder": config.trained_on,
                                     "rows": summarise(runs, found["patients"])})


if __name__ == "__main__": main()
