"""Do pairs that share a report harm the contrast, and does leaving them out help? A third of a department's reports are one normal text.

    ctvlm demo -o runs/demo
    python benchmarks/equal_reports.py runs/demo                        some minutes of processor time
    python benchmarks/equal_reports.py runs/demo --patients 60 --steps 20 --seeds 1  to try it out

Thirty of a hundred training patients are healthy phantoms, whose report is the one normal text of
their region; the others are the demo's. A map of the scans' features and one of the words of the
reports learn with contrast and disease prompts in batches of 64, once with all pairs (the scan of
one healthy patient and the equal report of another count as a mismatch) and once without the pairs
that share a report (`siglip_loss(groups=...)`). Seeds draw weights and batches, the same for both.
Measured on the demo's test patients, none of whose reports is normal. Prints one JSON line per run
and writes benchmarks/results/equal_reports.json, which chapter 12b shows.
"""
import argparse, json, math
from collections import Counter
from pathlib import Path

import numpy as np, pandas as pd, torch, torch.nn.functional as F
from torch import nn

import ctvlm.phantoms
from ctvlm.core import InputError, seed_everything
from ctvlm.data import FeatureStore, embed_studies, label_matrix, phantom_studies, read_studies
from ctvlm.data import report_text, rule_labels, scan_key
from ctvlm.disease import disease_prompt_loss, positive_weights
from ctvlm.findings import FINDINGS, prompts_for
from ctvlm.metrics import classification_metrics, retrieval_metrics
from ctvlm.model import CTVLMModel
from ctvlm.recipe import fitted_bias
from ctvlm.siglip import siglip_loss
from runs import phantoms_of, write_json

RESULT = Path(__file__).parent/"results"/"equal_reports.json"
HEALTHY_SEED = 77


def healthy(n, folder, model):
    "Studies of `n` patients without a finding, one report for each region, and the store of their features."
    plant = ctvlm.phantoms.plant
    ctvlm.phantoms.plant = lambda anatomy: ()
    try:
        cohort = ctvlm.phantoms.PhantomCohort(n, HEALTHY_SEED, spacing=(6., 6., 3.), languages=("en",))
        studies = phantom_studies(cohort)
        region = [study.region for study in cohort]
        made = embed_studies(studies, model, folder, workers=0, quiet=True)
    finally: ctvlm.phantoms.plant = plant
    first = studies.groupby(np.array(region))[["findings", "impression"]].transform("first")
    return studies.assign(**first, patient="healthy " + studies.patient), FeatureStore(made["store"])


def pooled(stores, studies):
    "Mean, largest and smallest of the window features of each scan, `(n, F)`."
    rows = []
    for r in studies.itertuples():
        found = stores[r.patient.startswith("healthy")].load(scan_key(r))
        tokens = torch.cat([found["cls"].float()[:, None], found["depth_tokens"].float()], 1).flatten(0, 1)
        rows.append(torch.cat([tokens.mean(0), tokens.amax(0), tokens.amin(0)]))
    return torch.stack(rows)


class Words:
    "Weighted counts of the words that three or more training texts have."
    def __init__(self, texts, least=3):
        count = Counter(w for t in texts for w in set(self.words(t)))
        self.place = {w: i for i, w in enumerate(sorted(w for w, n in count.items() if n >= least))}
        self.rare = torch.tensor([math.log(len(texts) / count[w]) + 1 for w in self.place])
    def words(self, text):
        words = text.lower().replace(".", " . ").replace(",", " , ").split()
        return words + [f"{a} {b}" for a, b in zip(words, words[1:])]
    def __call__(self, texts):
        out = torch.zeros(len(texts), len(self.place))
        for row, text in zip(out, texts):
            for w in self.words(text):
                if w in self.place: row[self.place[w]] += 1
        return F.normalize(out * self.rare, dim=-1)


def learn(train, prompts, groups, seed, steps, size=64):
    "Maps of scans and of texts."
    seed_everything(seed)
    scans, texts, labels = train
    middle, spread = scans.mean(0), scans.std(0) + 1e-3
    image = nn.Sequential(nn.Dropout(0.2), nn.Linear(scans.shape[1], 64))
    text = nn.Linear(texts.shape[1], 64)
    t, b = nn.Parameter(torch.tensor(math.log(10.))), nn.Parameter(torch.tensor(0.))
    with torch.no_grad():
        x, y = image((scans[:size] - middle) / spread), text(texts[:size])
        b.fill_(fitted_bias(F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T, 10.))
    optimizer = torch.optim.AdamW([*image.parameters(), *text.parameters(), t, b], 3e-3, weight_decay=5e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    weights = positive_weights(labels)
    for _ in range(steps):
        rows = torch.randperm(len(scans))[:size]
        x, y = image((scans[rows] - middle) / spread), text(texts[rows])
        p = F.normalize(text(prompts), dim=-1).unflatten(0, (-1, 2))
        loss = siglip_loss(x, y, t, b, groups=None if groups is None else groups[rows])
        loss = loss + 0.5 * disease_prompt_loss(F.normalize(x, dim=-1), p, labels[rows], t, weights)
        optimizer.zero_grad(); loss.backward(); optimizer.step(); schedule.step()
    image.eval()
    return lambda scans: image((scans - middle) / spread).detach(), lambda texts: text(texts).detach()


def measure(maps, test, prompts, found):
    "Retrieval and AUC on test patients."
    image, text = maps
    scans, texts, labels = test
    x, y = image(scans), text(texts)
    p = F.normalize(text(prompts), dim=-1).unflatten(0, (-1, 2))
    scores = F.normalize(x, dim=-1) @ (p[:, 0] - p[:, 1]).T
    auc = classification_metrics(scores.numpy(), labels.numpy(), found, min_positives=3)
    r = retrieval_metrics(x, y, ks=(1, 10))
    return {"report to scan R@10": r["text_to_image"]["r10"], "scan to report R@10": r["image_to_text"]["r10"],
            "mean rank of the scan": r["text_to_image"]["meanr"], "mean AUC": auc["mean_auroc"]}


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("run", type=Path, help="folder of `ctvlm demo`")
    ap.add_argument("--patients", type=int, default=400, help="to train on, 30 % of them healthy")
    ap.add_argument("--share", type=float, default=0.3, help="of them that have a normal report")
    ap.add_argument("--steps", type=int, default=600)
    ap.add_argument("--seeds", type=int, default=3)
    ap.add_argument("--output", type=Path, default=RESULT)
    args = ap.parse_args()
    if not (args.run/"studies.parquet").exists():
        raise InputError(f"found no studies.parquet in {args.run}: run `ctvlm demo -o {args.run}` first")
    studies, model = read_studies(args.run/"studies.parquet"), CTVLMModel.from_pretrained(args.run/"model")
    store = FeatureStore(args.run/"features", model)
    normal, store_of_normal = healthy(round(args.share * args.patients), args.run/"healthy", model)
    learned = pd.concat([studies[studies.split == "train"].head(args.patients - len(normal)), normal])
    tested = studies[studies.split == "test"]
    tables = {"train": learned, "test": tested}
    text = {name: [report_text(r.findings, r.impression) for r in s.itertuples()] for name, s in tables.items()}
    found = [f for f in FINDINGS if any(rule_labels(t, "en").get(f) == 1 for t in text["train"])]
    words = Words(text["train"])
    arrays = {}
    for name, s in tables.items():
        s = s.assign(labels=[rule_labels(t, "en") for t in text[name]])
        arrays[name] = pooled((store, store_of_normal), s), words(text[name]), torch.from_numpy(label_matrix(s, found)).long()
    sides = [side for f in found for side in (prompts_for(f).positive[0], prompts_for(f).negative[0])]
    prompts = words(sides)
    _, report = np.unique(text["train"], return_inverse=True)
    groups = torch.stack([torch.from_numpy(report), torch.arange(len(report))], 1)
    out = {"patients": {"train": len(learned), "healthy": len(normal), "test": len(tested)},
           "phantoms": phantoms_of(studies), "reports": len(set(text["train"])), "steps": args.steps, "runs": []}
    for seed in range(args.seeds):
        for name, some in (("all pairs", None), ("without equal reports", groups)):
            row = {"pairs": name, "seed": seed} | measure(learn(arrays["train"], prompts, some, seed, args.steps), arrays["test"], prompts, found)
            out["runs"].append(row)
            print(json.dumps({"benchmark": "equal_reports", **row}), flush=True)
    write_json(args.output, out)


if __name__ == "__main__": main()
