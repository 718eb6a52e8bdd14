"""One optimiser step in three ways, from the same weights and batches, with the same result:

    cached    ours: gradient caching, prompts once per step, localization in the second pass, texts grouped by length,
              windows and texts in pieces that stay in the processor's cache
    plain     the same with one graph over the whole effective batch
    separate  three passes, each with forward passes of its own, as the published trainer works: contrast (gradient caching,
              reports padded per micro-batch), disease prompts (re-encoded for every sixteenth of the effective batch, as for
              every 256 of 4,096), localization

Proportions are those of the published run, a sixteenth of it: 28 questions and 256 scans for 442 and 4,096.

    python benchmarks/training_step.py                     windows are trained end to end
    python benchmarks/training_step.py --features          frozen windows, cached features
    python benchmarks/training_step.py --results           both, into benchmarks/results/training_step.jsonl for chapter 12

Prints one JSON line per way: seconds, CPU seconds, MiB held for backward at once, largest difference of a gradient, and
CPU seconds as a multiple of ours.
"""
import argparse, json, time
from pathlib import Path

import numpy as np, torch, torch.nn.functional as F

from ctvlm.core import write_atomically
from ctvlm.disease import disease_prompt_loss
from ctvlm.localization import localization_loss
from ctvlm.model import CTVLMConfig, CTVLMModel
from ctvlm.siglip import siglip_loss
from ctvlm.training import TrainingConfig, effective_batch_backward

VOCAB, QUESTIONS = 2048, 28


def made_up(scans, seed, size, features):
    "A micro-batch with lengths as in hospitals: reports of some 160 tokens with a long tail, one snippet per scan."
    g, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    grid = torch.tensor([[2, 2, n] for n in rng.integers(2, 5, scans)])
    N = int(grid.prod(1).sum())
    def text(n, middle, most):
        length = torch.tensor(np.clip(rng.lognormal(np.log(middle), 0.5, n), 8, most).astype(int))
        return torch.randint(1, VOCAB, (n, int(length.max())), generator=g), (torch.arange(int(length.max())) < length[:, None]).long()
    out = dict(grid=grid, labels=torch.randint(-1, 2, (scans, QUESTIONS), generator=g), snippet_scan=torch.arange(scans), snippet_bin=torch.rand(scans, generator=g) * 8 * grid[:, 2] - 0.5)
    for name, (ids, mask) in (("report", text(scans, 160, 1024)), ("snippet", text(scans, 20, 80))): out |= {f"{name}_ids": ids, f"{name}_mask": mask}
    if features: return out | dict(cls=torch.randn(N, size, generator=g), depth_tokens=torch.randn(N, 8, size, generator=g))
    return out | dict(windows=torch.rand(N, 1, 32, 32, 32, generator=g).half())


def prompts():
    g = torch.Generator().manual_seed(0)
    return dict(ids=torch.randint(1, VOCAB, (QUESTIONS, 1, 2, 12), generator=g), mask=torch.ones(QUESTIONS, 1, 2, 12, dtype=torch.long), pos_weight=torch.full((QUESTIONS,), 3.), question_weight=None)


def scans(model, b, slices):
    return model.encode_scan(b["windows"], b["grid"], slices=slices) if "windows" in b else model.encode_features(b["cls"], b["depth_tokens"], b["grid"], slices=slices)


def separate(model, batches, asked, config, group):
    "The three passes, one after the other, adding to the gradients."
    model.zero_grad()
    with torch.no_grad():
        images = torch.cat([scans(model, b, False).scan for b in batches])
        texts = torch.cat([model.encode_text(b["report_ids"], b["report_mask"]) for b in batches])
    keep = torch.cat([b["report_mask"].sum(1) >= config.shortest_report for b in batches])
    images, texts = images.requires_grad_(), texts.requires_grad_()
    siglip_loss(images[keep], texts[keep], model.t, model.b).backward()
    at = 0
    for b in batches:
        n = len(b["grid"])
        ((scans(model, b, False).scan * images.grad[at:at + n]).sum() + (model.encode_text(b["report_ids"], b["report_mask"]) * texts.grad[at:at + n]).sum()).backward()
        at += n
    known, per = sum(int((b["labels"] >= 0).sum()) for b in batches), max(1, group // len(batches[0]["grid"]))
    for i in range(0, len(batches), per):
        prompt = F.normalize(model.encode_text(asked["ids"].flatten(0, 2), asked["mask"].flatten(0, 2)), dim=-1).view(QUESTIONS, 2, -1)
        leaf = prompt.detach().requires_grad_()
        for b in batches[i:i + per]:
            here = int((b["labels"] >= 0).sum())
            (config.disease * here / known * disease_prompt_loss(F.normalize(scans(model, b, False).disease, dim=-1), leaf, b["labels"], model.t, asked["pos_weight"])).backward()
        prompt.backward(leaf.grad)
    total = sum(len(b["snippet_scan"]) for b in batches)
    for b in batches:
        out, which = scans(model, b, True), b["snippet_scan"]
        snippet = model.encode_text(b["snippet_ids"], b["snippet_mask"], head="snippet")
        (config.localization * len(which) / total * localization_loss(out.slices[which], snippet, b["snippet_bin"], out.valid[which], padding_free=True)).backward()


def measure(args, features):
    "One line per way."
    torch.manual_seed(0)
    model = CTVLMModel(CTVLMConfig.tiny(VOCAB)).eval()                        # eval: the same function in all three, so that gradients can be compared
    model.window_encoder.requires_grad_(not features)
    config = TrainingConfig(localization=0.3, text_tokens=4096)
    batches = [made_up(args.micro, seed, model.config.window_encoder["width"], features) for seed in range(args.effective // args.micro)]
    asked, cpu = prompts(), torch.device("cpu")
    ways = {"cached": lambda: effective_batch_backward(model, batches, asked, config, 0, cpu, keep=1),
            "plain": lambda: effective_batch_backward(model, batches, asked, config, 0, cpu, keep=1000),
            "separate": lambda: separate(model, batches, asked, config, max(args.micro, args.effective // 16))}
    rows, seconds, first = {}, {name: [] for name in ways}, None
    for name, way in ways.items():
        held = [0, 0]                                                        # bytes that autograd holds now, and at most
        class Held:
            def __init__(self, x): self.x, self.size = x, x.numel() * x.element_size(); held[0] += self.size; held[1] = max(held)
            def __del__(self): held[0] -= self.size
        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda h: h.x): way()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        first = gradients if first is None else first
        rows[name] = {"held_mib": round(held[1] / 2**20), "largest_difference": float(f"{float((gradients - first).abs().max() / first.abs().max()):.2g}")}
    for _ in range(args.repeats):                                            # in turn, so that all see the same machine
        for name, way in ways.items():
            model.zero_grad()
            began, used = time.perf_counter(), time.process_time()
            way()
            seconds[name].append((time.perf_counter() - began, time.process_time() - used))
    fastest = {name: [min(t[i] for t in times) for i in (0, 1)] for name, times in seconds.items()}
    for name in ways:
        yield {"benchmark": "training_step", "way": name, "windows": "features" if features else "trained", "effective_batch": args.effective, "micro_batch": args.micro, "threads": args.threads,
               "seconds": round(fastest[name][0], 2), "cpu_seconds": round(fastest[name][1], 2), **rows[name], "times_ours": round(fastest[name][1] / fastest["cached"][1], 2)}


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--features", action="store_true", help="frozen windows: cls and depth tokens are given")
    ap.add_argument("--results", action="store_true", help="both, and keep the lines for chapter 12")
    ap.add_argument("--effective", type=int, default=256, help="scans per optimiser step")
    ap.add_argument("--micro", type=int, default=16, help="scans embedded at a time")
    ap.add_argument("--threads", type=int, default=1, help="several wait for each other on a busy machine, which counts as CPU seconds")
    ap.add_argument("--repeats", type=int, default=3, help="the fastest counts")
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    lines = []
    for features in ((False, True) if args.results else (args.features,)):
        for line in measure(args, features): lines.append(json.dumps(line)); print(lines[-1], flush=True)
    if args.results:
        with write_atomically(Path(__file__).parent/"results"/"training_step.jsonl") as t: t.write_text("\n".join(lines) + "\n")


if __name__ == "__main__": main()
