"Speed of the report labeller: reports a second, and as a ratio to one regular expression of all synonyms (which finds words and denies nothing); labels that rewriting turns."
import argparse, json, os, re, time

from ctvlm.sites import read_sentence
from ctvlm.core import stable_rng
from ctvlm.findings import FINDINGS, label_report, label_reports
from ctvlm.phantoms import PhantomCohort, PhantomStudy
from ctvlm.rewriting import augment_report, contradictions


def rate(function, texts):
    "Reports a second of processor time of this process."
    start = time.process_time()
    for t in texts: function(t)
    return len(texts) / (time.process_time() - start)


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--reports", type=int, default=300)
    ap.add_argument("--rewritten", type=int, default=3000); args = ap.parse_args()
    cohort = PhantomCohort(args.reports, seed=7)
    texts = [cohort[i].report.text for i in range(args.reports)]
    words = sorted({re.escape(x.strip("*").lower()) for f in FINDINGS.values() for x in (f.name, *f.en, *f.de)}, key=len, reverse=True)
    baseline = rate(lambda t, p=re.compile("|".join(words)): p.findall(t.lower()), texts[:max(len(texts) // 10, 1)])
    cold = rate(label_report, texts)                           # nothing known yet, neither words nor sentences
    read_sentence.cache_clear()
    warm = rate(label_report, texts)                           # words known, every sentence new
    again = rate(label_report, texts)                          # sentences known, as in a hospital's phrases
    start = time.perf_counter(); label_reports(texts * 4, workers=2); two = 4 * len(texts) / (time.perf_counter() - start)
    length = sum(map(len, texts)) / len(texts)
    for name, value in (("cold", cold), ("words known", warm), ("sentences known", again), ("two processes, wall clock", two)):
        print(json.dumps({"benchmark": "findings", "case": name, "reports_per_second": round(value), "characters_per_report": round(length),
                          "baseline": "one regular expression of all synonyms", "ratio": round(value / baseline, 2), "cores": os.cpu_count()}))
    turned = 0
    for i in range(args.rewritten):                            # one of the three ways for each report
        r = PhantomStudy(17, i, language="de" if i % 2 else "en").report
        new = augment_report(r.findings, r.impression, stable_rng(2, i), *(float(k == i % 3) for k in range(3)))
        turned += bool(contradictions(f"{r.findings}\n{r.impression}", "\n".join(new)))
    print(json.dumps({"benchmark": "findings", "case": "rewritten phantom reports", "reports": args.rewritten, "labels_turned": turned}))


if __name__ == "__main__": main()
