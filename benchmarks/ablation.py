"""Which loss teaches what? The tiny model on phantoms with contrast alone, + disease prompts, + localization, and all three, over several seeds.

    python benchmarks/ablation.py                                  about an hour on two cores
    python benchmarks/ablation.py --patients 40 --epochs 1 --seeds 1   to try it out

Windows are kept in --work and runs continue where they were interrupted. Prints one JSON line per run and writes benchmarks/results/ablation.json,
which chapter 12 shows.
"""
import argparse, json, time
from dataclasses import replace
from pathlib import Path

import torch

from ctvlm.core import seed_everything, write_atomically
from ctvlm.data import Batches, phantom_studies, report_text, split_patients, window_studies
from ctvlm.evaluation import evaluate_model
from ctvlm.findings import CT_RATE_CLASSES
from ctvlm.model import CTVLMConfig, CTVLMModel, CTVLMProcessor
from ctvlm.phantoms import PhantomCohort
from ctvlm.text import train_tokenizer
from ctvlm.training import TrainingConfig, augment_report, train

LOSSES = {"contrast": dict(disease=0., localization=0.), "+ disease": dict(localization=0.), "+ localization": dict(disease=0.), "all three": {}}
MEASURES = {"text-to-image R@10": ("retrieval", "text_to_image", "r10"), "image-to-text R@10": ("retrieval", "image_to_text", "r10"),
            "mean AUC": ("classification", "mean_auroc"), "localization error, mm": ("localization", "mae_mm")}


def number(result, path):
    "A measure of an evaluation with its interval."
    for section in path[:-1]: result = result[section]
    return {"value": result[path[-1]], "ci95": result.get(f"{path[-1]}_ci95")}


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--patients", type=int, default=400)
    ap.add_argument("--epochs", type=int, default=8)
    ap.add_argument("--seeds", type=int, default=3)
    ap.add_argument("--batch", type=int, default=8)
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--work", type=Path, default=Path("runs/ablation"))
    ap.add_argument("--output", type=Path, default=Path(__file__).parent/"results"/"ablation.json")
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    spec = CTVLMConfig.tiny().window_spec
    studies = split_patients(phantom_studies(PhantomCohort(args.patients, seed=12, spacing=(3., 3., None)), quiet=False), {"test": 0.25}, seed=0)
    store = window_studies(studies, spec, args.work/"windows", workers=args.threads)["store"]
    split = {name: studies[studies.split == name] for name in ("train", "test")}
    tokenizer = train_tokenizer([report_text(r.findings, r.impression) for r in split["train"].itertuples()], 2048)
    config = TrainingConfig(epochs=args.epochs, effective_batch=args.batch, learning_rate=2e-3, localization=0.5, layer_decay=1., checkpoint_every=20, trackers=())
    runs = []
    for seed in range(args.seeds):
        for name, weights in LOSSES.items():
            began = time.perf_counter()
            seed_everything(seed)
            model = CTVLMModel(CTVLMConfig.tiny(len(tokenizer)))
            model.processor = CTVLMProcessor(tokenizer, spec)
            data = Batches(split["train"], store, tokenizer, args.batch, tuple(CT_RATE_CLASSES), augment=augment_report, variants=args.epochs, seed=seed)
            train(model, data, replace(config, seed=seed, **weights), args.work/f"{name.strip('+ ').replace(' ', '-')}-{seed}")
            result = evaluate_model(model, Batches(split["test"], store, tokenizer, args.batch, tuple(CT_RATE_CLASSES), training=False), tokenizer,
                                    ("retrieval", "classification", "localization"), tuple(CT_RATE_CLASSES), resamples=1000)
            runs.append({"losses": name, "seed": seed, **{m: number(result, path) for m, path in MEASURES.items()}})
            print(json.dumps({"benchmark": "ablation", **runs[-1], "seconds": round(time.perf_counter() - began)}), flush=True)
            with write_atomically(args.output) as t:
                t.write_text(json.dumps({"patients": {k: int(v.patient.nunique()) for k, v in split.items()}, "epochs": args.epochs, "seeds": args.seeds, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__": main()
