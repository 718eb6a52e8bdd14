"""Exact ranks of many pairs without their matrix, bootstraps, and a wheel step of the viewer; one JSON line each.

    python benchmarks/evaluation.py                 ranks of 100,000 pairs at 512 dimensions (goal: 180 s, 2,048 MiB on 2 cores)
    python benchmarks/evaluation.py --n 20000       fewer

With --results the lines go to benchmarks/results/evaluation.jsonl too.
"""
import argparse, json, resource, time
from pathlib import Path

import numpy as np

from ctvlm.core import CTVolume, write_atomically
from ctvlm.evaluation import bootstrap_ci, classification_metrics, pair_ranks, pool_retrieval_metrics


def clock(): return time.perf_counter(), time.process_time()


def report(lines, name, began, **more):
    "One JSON line, printed and added to `lines`: what it took since `began`."
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    lines.append(json.dumps({"benchmark": "evaluation", "what": name, **more, "seconds": round(time.perf_counter() - began[0], 3),
                             "cpu_seconds": round(time.process_time() - began[1], 3), "peak_mib": round(peak)}))
    print(lines[-1], flush=True)


def pairs(n, width): # half-trained: the right partner is near the top; every tenth report is a copy of the one before
    rng = np.random.default_rng(0)
    text = rng.standard_normal((n, width), dtype=np.float32)
    image = rng.standard_normal((n, width), dtype=np.float32)
    image += 0.15 * text
    text[10::10] = text[9:-1:10][:len(text[10::10])]
    return image, text


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--n", type=int, default=100_000)
    ap.add_argument("--width", type=int, default=512)
    ap.add_argument("--results", action="store_true", help="keep the lines in benchmarks/results/evaluation.jsonl")
    args, lines = ap.parse_args(), []

    image, text = pairs(args.n, args.width)
    began = clock()
    ranks = pair_ranks(image, text)
    report(lines, "ranks", began, n=args.n, width=args.width, tied=int((ranks["image_to_text"][1] > 1).sum()))
    del image, text

    rng = np.random.default_rng(0)
    ranks = rng.integers(3039, size=3039)
    for name, statistic in (("mean", np.mean), ("median", np.median)):
        began = clock()
        bootstrap_ci(ranks, np.arange(3039) // 2, statistic)
        report(lines, f"bootstrap of a {name}", began, n=3039, resamples=10_000)

    labels = (rng.random((3039, 18)) < 0.2).astype(int)
    scores = rng.normal(size=labels.shape) + labels
    began = clock()
    classification_metrics(scores, labels, [str(c) for c in range(18)], patients=np.arange(3039) // 2)
    report(lines, "bootstrap of 18 AUCs and operating points", began, n=3039, resamples=10_000)

    image, text = pairs(5137, 512)
    began = clock()
    pool_retrieval_metrics(image, text)
    report(lines, "pools of 32, 64, 128, 100 shuffles", began, n=5137)

    from ctvlm.viewer import Planes
    volume = CTVolume(rng.integers(-1000, 1000, size=(512, 512, 300), dtype=np.int16).astype(np.float32), np.diag([0.7, 0.7, 1.2, 1.]))
    planes = Planes(volume)
    planes.draw(256, 256, 150)
    began = clock()
    for k in range(100, 120): planes.draw(256, 256, k)
    report(lines, "20 wheel steps", began, voxels=list(volume.array.shape))
    if args.results:
        with write_atomically(Path(__file__).parent/"results"/"evaluation.jsonl") as t: t.write_text("\n".join(lines) + "\n")


if __name__ == "__main__": main()
