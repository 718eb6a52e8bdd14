"Speed of the miner: reports a second of one core, as a ratio to one regular expression for `series N, image N`; length of hostile texts against time; agreement with the phantoms' truth."
import argparse, json, re, statistics, time
from collections import Counter

import numpy as np

from ctvlm.core import stable_rng
from ctvlm.mining import SeriesIndex, mine_report

PLAIN = re.compile(r"series \d+, image \d+", re.I)
FINDINGS = ["There is a {n} mm nodule in the right upper lobe", "Simple cyst of the left kidney, {n} mm", "Enlarged mediastinal lymph node measuring {n} mm", "Small hiatal hernia", "Calcified granuloma in the lingula", "Hypodense lesion in segment {k} of the liver, {n} mm"]
NORMAL = ["The heart is normal in size without pericardial effusion.", "No pleural effusion or pneumothorax is seen on either side.", "The gallbladder, spleen, pancreas and adrenal glands are unremarkable.", "Degenerative changes of the lumbar spine, most at L4/5.",
          "The bowel is of normal calibre without wall thickening.", "No free fluid and no free intraperitoneal air are identified in the abdomen or pelvis.", "The visualized vessels are patent, aorta 2.{k} cm in diameter."]
FORMS = [" (series {s}, image {i}).", " (Se {s} Im {i}).", " ({s}/{i}).", " ({s}:{i}).", ", best seen on image {i} of series {s}.", " (series {s}, images {i}-{j}).", " (image {i}).", " (series {s}, image {i}), previously 5 mm (series 2, image {j})."]


def reports(n, seed=0):
    "Reports of about 250 words with 2 to 9 references, one after the other."
    rng = stable_rng(seed, "reports")
    for _ in range(n):
        lines, words, target = ["CT CHEST AND ABDOMEN.", "FINDINGS:"], 5, int(rng.normal(250, 60))
        left = int(rng.integers(2, 10))
        while words < target:
            if left and rng.random() < .25: line, left = FINDINGS[rng.integers(len(FINDINGS))] + FORMS[rng.integers(len(FORMS))], left - 1
            else: line = NORMAL[rng.integers(len(NORMAL))]
            i = int(rng.integers(20, 300))
            lines.append(line.format(n=rng.integers(3, 40), k=rng.integers(1, 9), s=rng.integers(2, 7), i=i, j=i + 9))
            words += len(lines[-1].split())
        yield " ".join(lines)


def rate(function, texts): # reports a second of processor time
    total = n = 0
    for text in texts:
        start = time.process_time(); function(text); total += time.process_time() - start
        n += 1
    return n / total


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--reports", type=int, default=200_000)
    ap.add_argument("--phantoms", type=int, default=2000); args = ap.parse_args()
    sample = list(reports(min(args.reports, 500)))
    print(json.dumps({"benchmark": "mining", "case": "speed", "reports": args.reports, "median_words": statistics.median(len(t.split()) for t in sample), "references_per_report": round(sum(len(mine_report(t)) for t in sample) / len(sample), 2),
        "reports_per_second": round(ours := rate(mine_report, reports(args.reports))), "baseline": "one regular expression for `series N, image N`", "ratio": round(ours / rate(PLAIN.findall, sample), 5)}))
    for name, unit in {"digits": "7", "slashes": "4/", "brackets": "(", "pairs": "(4/38) ", "dashes": "4-38-"}.items():
        seconds = []
        for n in (50_000, 100_000):
            start = time.process_time(); mine_report(unit * (n // len(unit))); seconds.append(time.process_time() - start)
        print(json.dumps({"benchmark": "mining", "case": f"100 kB of {name}", "seconds": round(seconds[1], 3), "baseline": "50 kB of the same", "ratio": round(seconds[1] / max(seconds[0], 1e-6), 2)}))
    if args.phantoms:
        from ctvlm.phantoms import PhantomCohort
        hits = found = typed = far = resolved = plain = 0
        for study in PhantomCohort(args.phantoms, seed=1, spacing=(48., 48., None)):
            key = lambda r: (r.series, r.image, r.image_end, r.plane, r.prior)
            got, index, truth = mine_report(study.report.text), SeriesIndex(study.series_table), {key(r): r.depth_mm for r in study.report.references}
            hits += sum((Counter(map(key, got)) & Counter(map(key, study.report.references))).values()); found += len(got); typed += len(study.report.references); plain += len(PLAIN.findall(study.report.text))
            for r in got:
                if truth.get(key(r)) is None: continue
                step = np.abs(np.diff(study.series_table.query("series == @r.series").depth_mm)).min()
                depth = index.resolve(study.study, r).depth_mm
                resolved += 1; far += depth is None or abs(depth - truth[key(r)]) > step / 2
        print(json.dumps({"benchmark": "mining", "case": "phantoms", "reports": args.phantoms, "precision": round(hits / found, 5), "recall": round(hits / typed, 5), "depths": resolved, "further_than_half_a_slice": int(far), "baseline": "references of the one regular expression", "ratio": round(hits / max(plain, 1), 2)}))


if __name__ == "__main__": main()
