"""Which loss teaches what? The demo's model on the demo's patients with the contrast alone, + disease prompts, + localization, and
all three, over several seeds: same patients, window features, recipe and evaluation, other weights of the losses. The window encoder
is the demo's, which no loss has trained; a seed draws everything else.

    ctvlm demo -o runs/demo                                        makes patients and features of their windows
    python benchmarks/ablation.py --run runs/demo                  trains and evaluates on them
    python benchmarks/ablation.py --run runs/demo --epochs 1 --seeds 1 --train 32   to try it out

Runs continue where they were interrupted. Prints one JSON line per run and writes benchmarks/results/ablation.json, which
chapter 12 shows.
"""
import argparse, json, time
from pathlib import Path

import torch

from ctvlm.cli import DEMO_TRAINING, demo_model
from ctvlm.core import InputError, seed_everything, write_atomically
from ctvlm.data import Batches, FeatureStore, read_studies, scan_key
from ctvlm.evaluation import evaluate_studies
from ctvlm.findings import FINDINGS
from ctvlm.model import CTVLMModel
from ctvlm.training import TrainingConfig, train
from ctvlm.vision import start_projections

LOSSES = {"contrast": dict(disease=0., localization=0.), "+ disease": dict(localization=0.), "+ localization": dict(disease=0.), "all three": {}}
MEASURES = {"report to scan R@10, %": ("retrieval", "text_to_image", "r10"), "scan to report R@10, %": ("retrieval", "image_to_text", "r10"),
            "zero-shot mean AUC": ("classification", "mean_auroc"), "localization MAE, mm": ("localization", "mae_mm")}
BASELINES = {"middle slice, mm": ("localization", "middle_mm"), "text-only prior, mm": ("localization", "text_prior_mm")}


def measured(result, what, path):
    "A measure of an evaluation with its interval."
    for section in path[:-1]: result = result[section]
    scale = 100 if what.endswith("%") else 1
    return {"value": scale * result[path[-1]], "ci95": [scale * x for x in result[f"{path[-1]}_ci95"]]}


def fresh(start, features, seed):
    "The demo's model before training: its window encoder as it is, everything else drawn anew."
    seed_everything(seed)
    model = CTVLMModel(start.config)
    model.processor = start.processor
    model.window_encoder.load_state_dict(start.window_encoder.state_dict())
    start_projections(model.scan_encoder, *features)
    return model


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of `ctvlm demo`")
    ap.add_argument("--epochs", type=int, default=6)
    ap.add_argument("--seeds", type=int, default=3)
    ap.add_argument("--train", type=int, help="patients to train on; all if left out")
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--output", type=Path, default=Path(__file__).parent/"results"/"ablation.json")
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    if not (args.run/"studies.parquet").exists(): raise InputError(f"found no studies.parquet in {args.run}: run `ctvlm demo -o {args.run}` first")
    studies = read_studies(args.run/"studies.parquet")
    start = demo_model(studies, 0)
    store = FeatureStore(args.run/"features", start)
    learn = studies[studies.split == "train"]
    learn = learn[learn.patient.isin(learn.patient.unique()[:args.train])]
    findings = [f for f in FINDINGS if any(labels.get(f) == 1 for labels in learn.labels)]
    some = [store.load(scan_key(r)) for r in learn.head(100).itertuples()]
    features = [torch.cat([s[name] for s in some]).float() for name in ("cls", "depth_tokens")]
    runs, baselines = [], {}
    for seed in range(args.seeds):
        for name, weights in LOSSES.items():
            began = time.perf_counter()
            model = fresh(start, features, seed)
            config = TrainingConfig(**DEMO_TRAINING | dict(epochs=args.epochs, seed=seed) | weights)
            data = Batches(learn, store, model.processor.tokenizer, config.effective_batch, findings, seed=seed)
            train(model, data, config, args.run/"ablation"/f"{name.strip('+ ').replace(' ', '-')}-{seed}")
            result = evaluate_studies(model, studies, store, findings, tasks=("retrieval", "classification", "localization"), resamples=1000, quiet=True)
            baselines = {what: measured(result, what, path) for what, path in BASELINES.items()}
            runs.append({"losses": name, "seed": seed} | {what: measured(result, what, path) for what, path in MEASURES.items()})
            print(json.dumps({"benchmark": "ablation", **runs[-1], "seconds": round(time.perf_counter() - began)}), flush=True)
            about = {"train_patients": int(learn.patient.nunique()), "test_patients": int(studies[studies.split == "test"].patient.nunique()), "epochs": args.epochs}
            with write_atomically(args.output) as t: t.write_text(json.dumps(about | {"baselines": baselines, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__": main()
