"""Which loss teaches what? The demo's model on the demo's patients with the contrast alone, + disease prompts, + localization, and
all three, over several seeds: same patients, window features, recipe and evaluation, other weights of the losses. The window encoder
is the demo's and stays as it is; a seed draws everything else.

    ctvlm demo -o runs/demo                                        makes patients and features of their windows
    python benchmarks/ablation.py --run runs/demo                  trains and evaluates on them
    python benchmarks/ablation.py --run runs/demo --epochs 1 --seeds 1 --train 32   to try it out

Prints one JSON line per run and writes benchmarks/results/ablation.json, which chapter 12 shows, after every run. Runs are kept
in RUN/ablation: the same command goes on where it was interrupted, in the middle of a training too.
"""
import argparse, functools, hashlib, json, time
from pathlib import Path

import torch

from ctvlm.cli import plain
from ctvlm.demo import DEMO_TRAINING, demo_model, demo_text
from ctvlm.core import InputError
from ctvlm.data import Batches, FeatureStore, read_studies, scan_key
from ctvlm.evaluation import compare_results, evaluate_studies, write_result
from ctvlm.findings import FINDINGS
from ctvlm.model import CTVLMModel
from ctvlm.training import TrainingConfig, train
from ctvlm.vision import start_projections
from runs import kept, phantoms_of, side_by_side, write_json

LOSSES = {"contrast": dict(disease=0., localization=0.), "+ disease": dict(localization=0.), "+ localization": dict(disease=0.), "all three": {}}
MEASURES = {"report to scan R@10, %": ("retrieval", "text_to_image", "r10"), "scan to report R@10, %": ("retrieval", "image_to_text", "r10"),
            "zero-shot mean AUC": ("classification", "mean_auroc"), "localization MAE, mm": ("localization", "mae_mm")}
PAIRS = [("contrast", "+ disease"), ("contrast", "+ localization"), ("+ localization", "all three"), ("+ disease", "all three")] # without, with one loss more
BASELINES = {"middle slice, mm": ("localization", "middle_mm"), "text-only prior, mm": ("localization", "text_prior_mm")}


def measure(result, what, path):
    "A measure of an evaluation with its interval."
    for section in path[:-1]: result = result[section]
    scale = 100 if what.endswith("%") else 1
    return {"value": scale * result[path[-1]], "ci95": [scale * x for x in result[f"{path[-1]}_ci95"]]}


def fresh(studies, features, seed):
    "The demo's model before training."
    model = demo_model(studies, seed, shipped=False)
    demo_text(model, seed, quiet=True)
    start_projections(model.scan_encoder, *features)
    return model


@functools.cache
def prepared(run, patients):
    "The demo's store, all studies, those to learn from, the findings that occur there, and features that the scan encoder starts from."
    studies = read_studies(run/"studies.parquet")
    store, learn = FeatureStore(run/"features", CTVLMModel.from_pretrained(run/"model")), studies[studies.split == "train"]
    learn = learn[learn.patient.isin(learn.patient.unique()[:patients])]
    findings = [f for f in FINDINGS if any(labels.get(f) == 1 for labels in learn.labels)]
    some = [store.load(scan_key(r)) for r in learn.head(100).itertuples()]
    return store, studies, learn, findings, [torch.cat([s[name] for s in some]).float() for name in ("cls", "depth_tokens")]


def one(job): # (losses, seed, the arguments) -> a row, the baselines
    name, seed, args = job
    store, studies, learn, findings, features = prepared(args.run, args.train)
    config = TrainingConfig(**DEMO_TRAINING | dict(epochs=args.epochs, seed=seed) | LOSSES[name])
    settings = plain(config) | {"features": store.folder.name, "studies": hashlib.sha256((args.run/"studies.parquet").read_bytes()).hexdigest(), "train": args.train}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    folder = args.run/"ablation"/f"{name.strip('+ ').replace(' ', '-')}-{seed}-{digest}"
    def measured():
        began = time.perf_counter()
        model = fresh(studies, features, seed)
        data = Batches(learn, store, model.processor.tokenizer, config.effective_batch, findings, seed=seed)
        train(model, data, config, folder, about=model.config.trained_on)
        result = evaluate_studies(model, studies, store, findings, tasks=("retrieval", "classification", "localization"), resamples=1000, quiet=True)
        write_result(folder/"evaluation.json", result)
        return {"row": {"losses": name, "seed": seed} | {what: measure(result, what, path) for what, path in MEASURES.items()},
                "baselines": {what: measure(result, what, path) for what, path in BASELINES.items()}, "evaluation": str(folder/"evaluation.json"), "seconds": round(time.perf_counter() - began)}
    return kept(folder/"result.json", settings, measured)


def paired(seed, files): # what one loss more changes on the same patients: rows of `compare_results`, one list per pair
    return [{"seed": seed, "without": a, "with": b, **{k: row[k] for k in ("measure", "difference", "difference_ci95", "p", "n_patients")}}
            for a, b in PAIRS for row in compare_results(files[a], files[b])]


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of `ctvlm demo`")
    ap.add_argument("--epochs", type=int, default=DEMO_TRAINING["epochs"])
    ap.add_argument("--seeds", type=int, default=3)
    ap.add_argument("--train", type=int, help="patients to train on; all if left out")
    ap.add_argument("--processes", type=int, default=2)
    ap.add_argument("--output", type=Path, default=Path(__file__).parent/"results"/"ablation.json")
    args = ap.parse_args()
    if not (args.run/"studies.parquet").exists(): raise InputError(f"found no studies.parquet in {args.run}: run `ctvlm demo -o {args.run}` first")
    _, studies, learn, _, _ = prepared(args.run, args.train)
    about = {"train_patients": int(learn.patient.nunique()), "test_patients": int(studies[studies.split == "test"].patient.nunique()), "epochs": args.epochs, "phantoms": phantoms_of(studies)}
    runs, pairs, files = [], [], {}
    for found in side_by_side(one, [(name, seed, args) for seed in range(args.seeds) for name in LOSSES], args.processes):
        runs.append(found["row"])
        files[found["row"]["losses"]] = found["evaluation"]
        if len(files) == len(LOSSES): pairs += paired(found["row"]["seed"], files); files = {}                    # a seed is complete
        print(json.dumps({"benchmark": "ablation", **runs[-1], "seconds": found["seconds"]}), flush=True)
        write_json(args.output, about | {"baselines": found["baselines"], "runs": runs, "paired": pairs})


if __name__ == "__main__": main()
