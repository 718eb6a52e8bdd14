"""Does a trained model know where, and does it know how well it knows? Fresh phantoms, then a real scan with organ masks.

    ctvlm demo -o runs/demo
    python benchmarks/depth.py runs/demo --real ../shared/data/thorax_abdomen     minutes: 500 patients are rendered
    python benchmarks/depth.py runs/demo --calibration 20 --test 20               to try it out

Coverage and length of intervals, refusals, errors beside baselines, organ names against organ masks. Prints one JSON line per measurement, writes
benchmarks/results/depth.json and nbs/images/depth.png, worst_cases.png, which chapter 13 shows.
"""
import argparse, json
from pathlib import Path

import numpy as np, torch

from ctvlm.demo import demo_cohort
from ctvlm.core import stable_rng, write_atomically
from ctvlm.data import Batches, FeatureStore, embed_studies, read_studies
from ctvlm.evaluation import (ORGANS, TOTALSEGMENTATOR, bootstrap_ci, calibrate_depth, embed_batches, error_analysis, evaluate_localization, organ_check, organ_extents,
                              organ_of, phantom_extents, read_depths, snippet_table, weighted_auc, worst_cases)
from ctvlm.depth import flatness
from ctvlm.model import CTVLMModel
from ctvlm.preprocessing import load_volume
from runs import write_json

ROOT = Path(__file__).parent.parent
LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


def say(what, **more): print(json.dumps({"benchmark": "depth", "what": what, **more}), flush=True)


def with_interval(values, patients): # mean, low, high
    return [round(float(x), 4) for x in bootstrap_ci(np.asarray(values, float), list(patients))]


def coverage(e, calibration):
    "Share of snippets inside their interval, by snippet and by patient, and its length in mm."
    found, _ = read_depths(e, calibration)
    held, length = (found.interval_low_mm <= found.depth_mm) & (found.depth_mm <= found.interval_high_mm), found.interval_high_mm - found.interval_low_mm
    by_patient = held.groupby(found.patient).mean()
    return {"patients": calibration.n_patients, "promised": calibration.coverage, "covered": with_interval(held, found.patient),
            "covered_by_patient": with_interval(by_patient, by_patient.index), "length_mm": with_interval(length, found.patient),
            "median_length_mm": float(length.median())}


def place(study, organ): # lower and upper end of an organ, scanned or not, by its name in `ORGANS`
    return next((study.organ_heights[n] for n in (organ, f"{organ}s") if n in study.organ_heights), None)


def foreign(cohort, studies, each=5, seed=0):
    "The same scans with findings of other patients, in organs that these scans do not show."
    donors, template = {}, next(p for pairs in studies.pairs for p in pairs if p["depth_mm"] is not None)
    for text in dict.fromkeys(p["cleaned"] for pairs in studies.pairs for p in pairs if p["cleaned"] and not p["prior"]):
        donors.setdefault(organ_of(text), []).append(text)
    def asked(study):
        low, high = study.scan.low, study.scan.high
        gone = [o for o in ORGANS if o in donors and (ends := place(study, o)) and (ends[1] < low or ends[0] > high)]
        rng, texts = stable_rng(seed, "foreign", study.study), [t for o in gone for t in donors[o]]
        return [{**template, "snippet": t, "cleaned": t, "depth_mm": (low + high) / 2, "prior": False} for t in rng.choice(texts, min(each, len(texts)), replace=False).tolist()] if texts else []
    return studies.assign(pairs=[asked(study) for study in cohort])


def signs_of_absence(e, posterior): # `(S, D)`; name -> `(S,)`, higher: rather not in this scan
    "What might tell that a scan does not show what a snippet says: a flat posterior, little resemblance anywhere, mass in the lowest and the highest bin."
    valid = np.isfinite(e.bin_depths_mm)
    top = np.take_along_axis(posterior, valid.sum(1)[:, None] - 1, 1)[:, 0]
    return {"flatness": flatness(torch.from_numpy(posterior), torch.from_numpy(valid)).numpy(), "best similarity": -np.nanmax(e.similarity, 1), "mass at the ends": posterior[:, 0] + top}


def pictures(localization, load, folder):
    "Four panels of the errors, and the ten worst cases on their scans."
    import matplotlib.pyplot as plt
    from ctvlm.core import use_theme
    from ctvlm.viewer import draw_cases, plot_baselines, plot_depths, plot_errors, plot_reliability
    use_theme()
    fig, axes = plt.subplots(2, 2, figsize=(11, 8.4), layout="constrained")
    plot_depths(localization, axes[0, 0]); plot_baselines(localization, axes[0, 1]); plot_reliability(localization, axes[1, 0])
    plot_errors(error_analysis(localization), "organ", axes[1, 1])
    for name, figure in (("depth", fig), ("worst_cases", draw_cases(worst_cases(localization), load))):
        with write_atomically(folder/f"{name}.png") as t: figure.savefig(t, format="png", dpi=80)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("run", type=Path, help="folder of `ctvlm demo`: studies.parquet, features, model")
    ap.add_argument("--calibration", type=int, default=200, help="fresh patients to calibrate on, beside the run's own")
    ap.add_argument("--test", type=int, default=300, help="fresh patients to test on")
    ap.add_argument("--seed", type=int, default=2026, help="of the fresh cohort")
    ap.add_argument("--real", type=Path, help="folder with example_ct_sm.nii.gz and example_seg.nii.gz")
    ap.add_argument("--work", type=Path, help="where features of the fresh patients are kept (RUN/fresh)")
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--output", type=Path, default=ROOT/"benchmarks"/"results"/"depth.json")
    ap.add_argument("--images", type=Path, default=ROOT/"nbs"/"images")
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    model, work = CTVLMModel.from_pretrained(args.run/"model"), args.work or args.run/"fresh"
    cohort, fresh = demo_cohort({"calibration": args.calibration, "test": args.test}, args.seed)
    kept, store = FeatureStore(args.run/"features"), embed_studies(fresh, model, work, workers=args.threads)["store"]
    split, tested = dict(list(fresh.groupby("split"))), [cohort[i] for i in range(args.calibration, args.calibration + args.test)]
    embed = lambda table, store=store: embed_batches(model, Batches(table, store, model.processor.tokenizer, 8, training=False), quiet=True)
    e, wrong, held_out, table = embed(split["test"]), embed(foreign(tested, split["test"])), embed(split["calibration"]), read_studies(args.run/"studies.parquet")
    own, many = calibrate_depth(embed(table[table.split == "val"], kept)), {c: calibrate_depth(held_out, c) for c in LEVELS}
    out = {"model": model.config.trained_on, "seed": args.seed, "test_patients": args.test, "intervals": [coverage(e, c) for c in (own, many[0.9])], "levels": [coverage(e, c) for c in many.values()]}
    model.config.interval_calibration = own.to_dict()
    for row in out["intervals"]: say("interval", **row)

    signs, out["refused"] = [], {}
    for name, said in (("finding is in the scan", e), ("organ is not in the scan", wrong)):
        found, posterior = read_depths(said, many[0.9])
        signs.append(signs_of_absence(said, posterior))
        out["refused"][name] = {"snippets": len(found), "share": with_interval(found.abstains, found.patient)}
        say("refused", case=name, **out["refused"][name])
    absent = np.repeat([0, 1], [len(s["flatness"]) for s in signs])
    out["absence_auc"] = {k: float(weighted_auc(np.concatenate([s[k] for s in signs]), absent, np.ones((len(absent), 1)))[0]) for k in signs[0]}
    say("AUC of absent against present", **out["absence_auc"])

    training, validation = (snippet_table(table[table.split == name], kept) for name in ("train", "val"))
    reports = fresh.set_index("study").pipe(lambda t: t.findings + "\n" + t.impression)
    e.snippets = e.snippets.assign(report=e.snippets.study.map(reports))
    localization = evaluate_localization(e, training, many[0.9], validation, phantom_extents(tested))
    out["localization"] = {k: v for k, v in localization.items() if k != "items"}
    out["errors"], out["worst"] = error_analysis(localization).round(2).to_dict("records"), worst_cases(localization)[["snippet", "depth_mm", "pred_mm", "error_mm", "abstains"]].to_dict("records")
    say("error", **{k: localization[k] for k in ("mae_mm", "random_mm", "middle_mm", "organ_mm", "text_prior_mm", "beyond_mm", "middle_beyond_mm", "cited_mm")})

    if args.real:
        extents = organ_extents(args.real/"example_seg.nii.gz")
        out["organs"] = {"real scan": organ_check(model, load_volume(args.real/"example_ct_sm.nii.gz"), extents).round(1).to_dict("records"), "phantoms": []}
        for study in tested[:20]:
            inside = {n: ends for n in TOTALSEGMENTATOR.values() if (ends := study.organ_heights.get(n)) and study.scan.low < ends[0] and ends[1] < study.scan.high}
            if inside: out["organs"]["phantoms"] += organ_check(model, study.volume, inside).round(1).to_dict("records")
        for name, rows in out["organs"].items():
            say("organs", scan=name, organs=len(rows), **{k: round(float(np.mean([r[k] for r in rows])), 1) for k in ("outside_mm", "from_middle_mm", "scan_middle_outside_mm", "scan_middle_from_middle_mm")})

    scans = {s.study: s for s in tested}
    pictures(localization, lambda name: scans[name].volume, args.images)
    write_json(args.output, out)


if __name__ == "__main__": main()
