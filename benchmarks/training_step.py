"""One optimiser step in three ways, from the same weights and batches, with the same result:

    cached    ours: gradient caching, prompts once per step, localization in the second pass, texts grouped by length,
              windows and texts in pieces that stay in the processor's cache
    plain     the same with one graph over the whole effective batch (small sizes only)
    compiled  ours with compiled text layers (on a card only)
    separate  three passes, each with forward passes of its own, as the published trainer works: contrast (gradient caching,
              reports padded per micro-batch), disease prompts (re-encoded for every sixteenth of the effective batch, as for
              every 256 of 4,096), localization

Proportions are those of the published run, a sixteenth of it: 28 questions and 256 scans for 442 and 4,096.

    python benchmarks/training_step.py                     windows are trained end to end
    python benchmarks/training_step.py --features          frozen windows, cached features
    python benchmarks/training_step.py --results           both, into benchmarks/results/training_step.jsonl for chapter 12
    python benchmarks/training_step.py --device cuda --size large --effective 1024 --micro 64 --repeats 1 --results
                                                           a quarter of the published step: frozen windows, 36 a scan, 442 questions

Prints one JSON line per way: seconds, CPU seconds, MiB held for backward at once (on a card: MiB at most), largest
difference of a gradient, seconds (CPU: CPU seconds) as a multiple of ours, on a card how often a micro-batch waits for it and which share of
the measured peak of matrix products the text encoder's products make alone, and with `large` the hours that the published
schedule would take at that pace: 159,000 pairs, 10 epochs, 4,096 a step.
"""
import argparse, json, time, warnings
from pathlib import Path

import numpy as np, torch, torch.nn.functional as F

from ctvlm.core import pick_device, write_atomically
from ctvlm.disease import disease_prompt_loss
from ctvlm.localization import localization_loss
from ctvlm.model import CTVLMConfig, CTVLMModel, fast_dtype
from ctvlm.siglip import siglip_loss
from ctvlm.training import TrainingConfig, effective_batch_backward

VOCAB = 2048
QUESTIONS = dict(tiny=28, large=442)
PUBLISHED_STEPS = 10 * 159_000 / 4096


def fast(device): # the precision of a card's products
    return torch.autocast(device.type, fast_dtype(device), enabled=device.type == "cuda")


def made_up_text(n, middle, most, rng, g): # ids, mask `(n, longest)`
    length = torch.tensor(np.clip(rng.lognormal(np.log(middle), 0.5, n), 8, most).astype(int))
    longest = int(length.max())
    return torch.randint(1, VOCAB, (n, longest), generator=g), (torch.arange(longest) < length[:, None]).long()


def made_up(scans, seed, size, width, features):
    "A micro-batch with lengths as in hospitals: reports of some 160 tokens with a long tail, one snippet per scan."
    g, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    if size == "large": grid = torch.tensor([[3, 3, 4]]).repeat(scans, 1)
    else: grid = torch.tensor([[2, 2, n] for n in rng.integers(2, 5, scans)])
    N = int(grid.prod(1).sum())
    out = dict(grid=grid,
               labels=torch.randint(-1, 2, (scans, QUESTIONS[size]), generator=g),
               snippet_scan=torch.arange(scans),
               snippet_bin=torch.rand(scans, generator=g) * 8 * grid[:, 2] - 0.5)
    for name, shape in (("report", (160, 1024)), ("snippet", (20, 80))):
        out[f"{name}_ids"], out[f"{name}_mask"] = made_up_text(scans, *shape, rng, g)
    if not features: return out | dict(windows=torch.rand(N, 1, 32, 32, 32, generator=g).half())
    cls, depth_tokens = torch.randn(N, width, generator=g), torch.randn(N, 8, width, generator=g)
    return out | dict(cls=cls.half(), depth_tokens=depth_tokens.half())


def prompts(questions):
    shape = (questions, 1, 2, 12)
    ids = torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(0))
    return dict(ids=ids, mask=torch.ones(shape, dtype=torch.long), pos_weight=torch.full((questions,), 3.), question_weight=None)


def scans(model, b, slices):
    if "windows" in b: return model.encode_scan(b["windows"], b["grid"], slices=slices)
    return model.encode_features(b["cls"], b["depth_tokens"], b["grid"], slices=slices)


def contrast(model, batches, config):
    "The first pass: embeddings without graphs, the loss's gradients, and everything again for them."
    with torch.no_grad():
        images = torch.cat([scans(model, b, False).scan for b in batches])
        texts = torch.cat([model.encode_text(b["report_ids"], b["report_mask"]) for b in batches])
    keep = torch.cat([b["report_mask"].sum(1) >= config.shortest_report for b in batches])
    images, texts = images.float().requires_grad_(), texts.float().requires_grad_()
    siglip_loss(images[keep], texts[keep], model.t, model.b).backward()
    at = 0
    for b in batches:
        here = slice(at, at := at + len(b["grid"]))
        image, text = scans(model, b, False).scan, model.encode_text(b["report_ids"], b["report_mask"])
        ((image * images.grad[here]).sum() + (text * texts.grad[here]).sum()).backward()


def asked_prompts(model, batches, asked, config, group):
    "The second pass: prompts embedded for every group of scans."
    known, per = sum(int((b["labels"] >= 0).sum()) for b in batches), max(1, group // len(batches[0]["grid"]))
    for i in range(0, len(batches), per):
        prompt = model.encode_text(asked["ids"].flatten(0, 2), asked["mask"].flatten(0, 2))
        prompt = F.normalize(prompt.float(), dim=-1).view(len(asked["ids"]), 2, -1)
        leaf = prompt.detach().requires_grad_()
        for b in batches[i:i + per]:
            share = config.disease * int((b["labels"] >= 0).sum()) / known
            found = F.normalize(scans(model, b, False).disease.float(), dim=-1)
            (share * disease_prompt_loss(found, leaf, b["labels"], model.t, asked["pos_weight"])).backward()
        prompt.backward(leaf.grad)


def places(model, batches, config):
    "The third pass: slices and snippets."
    total = sum(len(b["snippet_scan"]) for b in batches)
    for b in batches:
        out, which = scans(model, b, True), b["snippet_scan"]
        snippet = model.encode_text(b["snippet_ids"], b["snippet_mask"], head="snippet")
        found = localization_loss(out.slices[which].float(), snippet.float(), b["snippet_bin"], out.valid[which], padding_free=True)
        (config.localization * len(which) / total * found).backward()


def separate(model, batches, asked, config, group, device):
    "The three passes, one after the other, adding to the gradients."
    batches = [{k: v.to(device) for k, v in b.items()} for b in batches]
    asked = {k: v if v is None else v.to(device) for k, v in asked.items()}
    model.zero_grad()
    with fast(device):
        contrast(model, batches, config)
        asked_prompts(model, batches, asked, config, group)
        places(model, batches, config)


class Held:
    "Bytes that autograd holds now, and at most."
    now = most = 0
    def __init__(self, x):
        self.x, self.size = x, x.numel() * x.element_size()
        Held.now += self.size
        Held.most = max(Held.most, Held.now)
    def __del__(self): Held.now -= self.size


def memory_and_gradients(model, way, device):
    "MiB, and all gradients in a row."
    model.zero_grad()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        way()
        mib = torch.cuda.max_memory_allocated() / 2**20
    else:
        Held.now = Held.most = 0
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda h: h.x): way()
        mib = Held.most / 2**20
    return round(mib), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def compile_text(model):
    "Layers of the text encoder, for any length."
    for layer in model.text_encoder.model.layers: layer.compile(dynamic=True)


def text_share(model, device, side=8192): # of the peak of matrix products, forward and backward
    ids, a = torch.randint(1, VOCAB, (51, 160)), torch.randn(side, side, device=device, dtype=fast_dtype(device))
    weights = [p.numel() for name, p in model.text_encoder.named_parameters() if p.ndim == 2 and "embed" not in name and "lora" not in name]
    def step():
        with fast(device): model.encode_text(ids, torch.ones_like(ids)).float().square().sum().backward()
    def rate(flop, f): return flop / min(timed(f, device)[0] for _ in range(6))
    return round(rate(4 * sum(weights) * ids.numel(), step) / rate(2 * side**3, lambda: a @ a), 3) # frozen weights have no gradient


def waits(way): # how often the processor waited for the card to end what it had
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        way()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(w.message) for w in said)


def timed(way, device): # seconds, and seconds of the CPU
    began, used = time.perf_counter(), time.process_time()
    way()
    if device.type == "cuda": torch.cuda.synchronize()
    return time.perf_counter() - began, time.process_time() - used


def measure(args, features, device):
    "One line per way."
    torch.manual_seed(0)
    text = dict(getattr(CTVLMConfig, args.size)().text, vocab_size=VOCAB)
    config = getattr(CTVLMConfig, args.size)(text=text)
    with device: model = CTVLMModel(config).eval()   # eval: the same function in all, so that gradients can be compared
    model.window_encoder.requires_grad_(not features)
    training = TrainingConfig(localization=0.3, text_tokens=4096)
    width = config.window_encoder["width"]
    batches = [made_up(args.micro, seed, args.size, width, features) for seed in range(args.effective // args.micro)]
    asked, group = prompts(QUESTIONS[args.size]), max(args.micro, args.effective // 16)
    def ours(keep): return effective_batch_backward(model, batches, asked, training, 0, device, lambda: fast(device), keep)
    ways = {"cached": lambda: ours(1), "plain": lambda: ours(1000),
            "separate": lambda: separate(model, batches, asked, training, group, device)}
    if args.size == "large": del ways["plain"]       # its graph would fill any card
    if device.type == "cuda": ways["compiled"] = ways["cached"]
    rows, seconds, first = {}, {name: [] for name in ways}, None
    for name, way in ways.items():
        if name == "compiled": compile_text(model)
        mib, gradients = memory_and_gradients(model, way, device)
        first = gradients if first is None else first
        off = float((gradients - first).abs().max() / first.abs().max())
        rows[name] = {"held_mib": mib, "largest_difference": float(f"{off:.2g}")}
        if device.type == "cuda":                    # one after the other: what is compiled stays so
            rows[name]["waits_per_micro_batch"] = round(waits(way) / len(batches), 1)
            rows[name]["text_share_of_peak"] = text_share(model, device)
            seconds[name] += [timed(way, device) for _ in range(args.repeats)]
    for _ in range(args.repeats if device.type == "cpu" else 0): # in turn, so that all see the same machine
        for name, way in ways.items():
            model.zero_grad()
            seconds[name].append(timed(way, device))
    fastest = {name: [min(t[i] for t in times) for i in (0, 1)] for name, times in seconds.items()}
    counts = 0 if device.type == "cuda" else 1       # on a busy CPU its own seconds are what compares
    for name in ways:
        took = fastest[name]
        line = {"benchmark": "training_step", "way": name, "windows": "features" if features else "trained",
                "effective_batch": args.effective, "micro_batch": args.micro, "threads": args.threads,
                "seconds": round(took[0], 2), "cpu_seconds": round(took[1], 2), **rows[name],
                "times_ours": round(took[counts] / fastest["cached"][counts], 2)}
        if args.size != "tiny": line |= {"size": args.size, "hours": round(took[0] * PUBLISHED_STEPS * 4096 / args.effective / 3600, 1)}
        if device.type == "cuda": line |= {"machine": torch.cuda.get_device_name(), "torch": torch.__version__}
        yield line


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--features", action="store_true", help="frozen windows: cls and depth tokens are given")
    ap.add_argument("--results", action="store_true", help="keep the lines for chapter 12")
    ap.add_argument("--device", default="cpu", help="cpu or cuda")
    ap.add_argument("--size", default="tiny", choices=QUESTIONS, help="large: always from features")
    ap.add_argument("--effective", type=int, default=256, help="scans per optimiser step")
    ap.add_argument("--micro", type=int, default=16, help="scans embedded at a time")
    ap.add_argument("--threads", type=int, default=1, help="several wait for each other on a busy machine, which counts as CPU seconds")
    ap.add_argument("--repeats", type=int, default=3, help="the fastest counts")
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    device, lines = pick_device(args.device), []
    kinds = (True,) if args.size == "large" else (False, True) if args.results else (args.features,)
    for features in kinds:
        for line in measure(args, features, device):
            lines.append(json.dumps(line))
            print(lines[-1], flush=True)
    if args.results:
        name = "training_step.jsonl" if device.type == "cpu" else f"training_step_{device.type}.jsonl"
        with write_atomically(Path(__file__).parent / "results" / name) as t: t.write_text("\n".join(lines) + "\n")


if __name__ == "__main__": main()
