"""What to make of findings that reports assert and do not deny: five ways to train the disease questions, compared on phantoms.

    ctvlm demo -o runs/demo
    python benchmarks/disease_unlabelled.py runs/demo                                          about 2 minutes of processor time
    python benchmarks/disease_unlabelled.py runs/demo --train 60 --val 40 --test 40 --seeds 1  to try it out

Takes the demo's patients and the features of their windows, labels their reports by the rules, and learns a map of the features and one of the
sentences with each form of the loss of chapter 9. Choices (weight of silence, prior) are made on validation patients; the AUC of every finding is
that of the planted truth on test patients. Seeds draw the weights and 80 % of the training patients. Prints one JSON line per form and writes
benchmarks/results/disease_unlabelled.json, which chapter 9 shows.
"""
import argparse, json, math
from pathlib import Path

import numpy as np, torch, torch.nn.functional as F
from torch import nn

from ctvlm.core import InputError, seed_everything
from ctvlm.data import FeatureStore, label_matrix, labels_with_silence, read_studies, rule_labels, scan_key
from ctvlm.disease import SILENT
from ctvlm.demo import DEMO_PATIENTS, demo_model, demo_text
from ctvlm.findings import FINDINGS, prompts_for
from ctvlm.metrics import classification_metrics
from ctvlm.phantoms import PhantomCohort
from runs import write_json

RESULT = Path(__file__).parent/"results"/"disease_unlabelled.json"
GROUPS = ("organ", "region")


def cohort(run, sizes):
    "Studies with a split, their truth `(n, Q)`, labels `(n, Q)`, features `(n, F)` of scans and `(Q, 2, E)` of sentences."
    ends = np.cumsum(list(DEMO_PATIENTS.values()))
    free = dict(zip(DEMO_PATIENTS, np.split(np.arange(ends[-1]), ends[:-1])))
    extra = max(0, sizes["test"] - len(free["test"]))                     # the demo tests few: the last to train become tests
    free["train"], more = np.split(free["train"], [len(free["train"]) - extra])
    free["test"] = np.concatenate([more, free["test"]])
    chosen = {name: free[name][:n] for name, n in sizes.items()}
    rows = np.concatenate(list(chosen.values()))
    patients = PhantomCohort(int(ends[-1]), 0, spacing=(6., 6., 3.), languages=("en",))
    drawn = [patients[int(i)] for i in rows]
    studies = read_studies(run/"studies.parquet").set_index("study").loc[[s.study for s in drawn]].reset_index()
    if [s.report.findings for s in drawn] != list(studies.findings):
        raise InputError(f"the reports of {run} are not those that these phantoms have now: run the demo anew")
    studies["split"] = [name for name, some in chosen.items() for _ in some]
    studies["labels"] = [rule_labels(s.report.text, "en") for s in drawn]  # silence stays silence here
    model = demo_model(studies, 0, shipped=False)
    demo_text(model, 0, quiet=True)
    store = FeatureStore(next((run/"features").iterdir()))
    planted = [s.labels for s in drawn]
    found = [f for f in FINDINGS if any(p.get(f) == 1 for p in planted)]
    truth = [[-1 if p.get(f) is None else p[f] for f in found] for p in planted]
    rows = [store.load(scan_key(r)) for r in studies.itertuples()]
    tokens = [torch.cat([r["cls"].float()[:, None], r["depth_tokens"].float()], 1).flatten(0, 1) for r in rows]
    scans = torch.stack([torch.cat([x.mean(0), x.amax(0), x.amin(0)]) for x in tokens])
    prompts = [(prompts_for(f).positive[0], prompts_for(f).negative[0]) for f in found]
    sentences = model.embed_text([side for pair in prompts for side in pair]).unflatten(0, (-1, 2))
    return studies, found, torch.tensor(truth), torch.from_numpy(label_matrix(studies, found)).long(), scans, sentences


def balanced(labels, most=20.):
    "Negatives / positives, as the loss weighs."
    positives, negatives = (labels == 1).sum(0), (labels == 0).sum(0)
    return (negatives / positives.clamp(min=1)).clamp(max=most)


def shipped(d, labels, seen, **_):
    "Never denied: positives weigh 0, and count."
    known = labels >= 0
    loss = torch.where(labels == 1, balanced(labels) * F.softplus(-d), F.softplus(d))
    return (loss * known).sum() / known.sum()


def dropped(d, labels, seen, **_):
    "Questions without a yes and a no leave the sum and the divisor."
    known = (labels >= 0) & (labels == 1).any(0) & (labels == 0).any(0)
    loss = torch.where(labels == 1, balanced(labels) * F.softplus(-d), F.softplus(d))
    return (loss * known).sum() / known.sum()


def weak(d, labels, seen, weight):
    "Silence about what the report covers is a denial of `weight`."
    each = (labels >= 0).float() + weight * seen
    p, n = (each * (labels == 1)).sum(0), (each * (labels != 1)).sum(0)
    balance = (n / p.clamp(min=1)).clamp(max=20)
    loss = torch.where(labels == 1, balance * F.softplus(-d), F.softplus(d))
    each = each * ((p > 0) & (n > 0))
    return (loss * each).sum() / each.sum()


def unlabelled(d, labels, seen, factor):
    "Non-negative risk from positive and unlabelled (Kiryo and others), where a finding is never denied; `factor`: true prior / asserted share."
    never = (labels == 1).any(0) & ~(labels == 0).any(0)
    usual = dropped(d, labels, seen) if (~never).any() else 0
    total = 0
    for q in never.nonzero()[:, 0].tolist():
        yes, all_ = d[labels[:, q] == 1, q], d[(labels[:, q] == 1) | seen[:, q], q]
        if len(yes) == len(all_): continue
        prior = min(0.9, factor * len(yes) / len(all_))
        negative = F.softplus(all_).mean() - prior * F.softplus(yes).mean()
        total = total + min(20, 1 / prior) * prior * F.softplus(-yes).mean() + negative.clamp(min=0)
    return usual + total / max(1, int((~never).sum()))


FORMS = {"as it was": (shipped, "organ", [{}]), "dropped": (dropped, "organ", [{}]),
         **{f"silence in the {g}": (weak, g, [dict(weight=w) for w in (0.1, 0.3, 1.)]) for g in GROUPS},
         **{f"positive-unlabelled, {g}": (unlabelled, g, [dict(factor=f) for f in (1.25, 1.6)]) for g in GROUPS}}


def learn(form, options, scans, sentences, labels, seen, seed, steps=300):
    "A function from features to scores `(n, Q)`."
    seed_everything(seed)
    rows = torch.randperm(len(scans))[:int(0.8 * len(scans))]
    middle, spread = scans[rows].mean(0), scans[rows].std(0) + 1e-3
    image = nn.Sequential(nn.Dropout(0.2), nn.Linear(scans.shape[1], 64))
    text, t = nn.Linear(sentences.shape[-1], 64), nn.Parameter(torch.tensor(math.log(20.)))
    parameters = [*image.parameters(), *text.parameters(), t]
    optimizer = torch.optim.AdamW(parameters, 3e-3, weight_decay=5e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    def scores(x):
        v, p = F.normalize(image((x - middle) / spread), dim=-1), F.normalize(text(sentences), dim=-1)
        return t.exp() * v @ (p[:, 0] - p[:, 1]).T
    for _ in range(steps):
        loss = form(scores(scans[rows]), labels[rows], seen[rows], **options)
        optimizer.zero_grad(); loss.backward(); optimizer.step(); schedule.step()
    image.eval()
    def answer(x):
        with torch.no_grad(): return scores(x)
    return answer


def auc(scores, truth, found):
    "AUC of every finding with three or more of both kinds."
    m = classification_metrics(scores.numpy(), truth.numpy(), found, min_positives=3)
    return {f: m["per_class"][f"{f}_auc"] for f in found if f not in m["left_out"]}


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("run", type=Path, help="folder of `ctvlm demo`")
    for name, n in (("train", 400), ("val", 80), ("test", 200)): ap.add_argument(f"--{name}", type=int, default=n)
    ap.add_argument("--seeds", type=int, default=3)
    ap.add_argument("--output", type=Path, default=RESULT)
    args = ap.parse_args()
    sizes = {name: getattr(args, name) for name in ("train", "val", "test")}
    studies, found, truth, labels, scans, sentences = cohort(args.run, sizes)
    split = {name: torch.from_numpy((studies.split == name).to_numpy()) for name in sizes}
    train = labels[split["train"]]
    census = {f: [int((train[:, q] == v).sum()) for v in (1, 0, -1)] for q, f in enumerate(found)}
    never = [f for f, (yes, no, _) in census.items() if yes and not no]
    out = {"patients": sizes, "seeds": args.seeds, "census": census, "never_denied": never, "forms": {}}
    for name, (form, group, grid) in FORMS.items():
        seen, runs = torch.from_numpy(labels_with_silence(studies, found, group) == SILENT), []
        for seed in range(args.seeds):
            tried = []
            for options in grid:
                answer = learn(form, options, scans[split["train"]], sentences, train, seen[split["train"]], seed)
                val = auc(answer(scans[split["val"]]), truth[split["val"]], found)
                tried.append((float(np.mean(list(val.values()))), options, auc(answer(scans[split["test"]]), truth[split["test"]], found)))
            runs.append(max(tried, key=lambda x: x[0]))
        each = {f: [r[2][f] for r in runs] for f in runs[0][2]}
        mean = lambda chosen: [float(np.mean([each[f][s] for f in each if chosen(f)])) for s in range(args.seeds)]
        out["forms"][name] = {"all": mean(lambda f: True), "never denied": mean(lambda f: f in never), "others": mean(lambda f: f not in never),
                              "chosen": [r[1] for r in runs], "per_finding": each}
        print(json.dumps({"benchmark": "disease_unlabelled", "form": name} | {k: np.round(v, 4).tolist() if k != "chosen" else v for k, v in out["forms"][name].items() if k != "per_finding"}), flush=True)
    write_json(args.output, out)


if __name__ == "__main__": main()
