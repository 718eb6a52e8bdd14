"""Pretrain the window encoder of the demo on masks of phantoms that no other part of the project uses.

    python tools/pretrain_tiny.py            # writes ctvlm/data/tiny_window_encoder.safetensors, benchmarks/results/pretrain_tiny.json

The paper's window encoder comes trained from elsewhere and is frozen. The demo's has nobody to get it from, and twelve minutes on two
cores are too few to learn from patient labels what a cyst looks like. So it is trained once, here, on what phantoms know and reports do
not: for every patch which findings and organs fill it. Its patients have a seed of their own. The committed weights were made
with the phantoms of version 0.2.0, whose masks were not yet cut where another organ lies over them.
"""
import argparse, json, math, multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
import numpy as np, torch, torch.nn as nn, torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score
from ctvlm.demo import DEMO_SIZES
from ctvlm.core import CTVolume, progress, seed_everything, write_atomically
from ctvlm.model import CTVLMConfig
from ctvlm.phantoms import PLANTERS, PhantomCohort
from ctvlm.preprocessing import make_windows
from ctvlm.vision import EncoderSizes, WindowEncoder, start_patches

CONFIG = CTVLMConfig.tiny(**DEMO_SIZES)
FIT, SPEC = CONFIG.fit, CONFIG.window_spec
SEED = 1000   # no other cohort of the project has it
FINDINGS = tuple(PLANTERS)
ORGANS = ("aorta", "bladder", "colon", "gallbladder", "heart", "left adrenal gland", "left kidney", "left lower lobe", "left psoas", "left upper lobe", "liver",
          "oesophagus", "pancreas", "right adrenal gland", "right kidney", "right lower lobe", "right middle lobe", "right psoas", "right upper lobe",
          "small bowel", "spleen", "stomach", "trachea", "vertebrae")
NAMES, Q = FINDINGS + ORGANS, len(FINDINGS)

def whole(blocks, grid): # `(N, x, y, z, ...)` windows in a row -> `(X, Y, Z, ...)`
    "Put windows together to the scan that they were cut from."
    H, W, D = grid
    n, x, y, z, *rest = blocks.shape
    order = (0, 3, 1, 4, 2, 5, *range(6, 6 + len(rest)))
    return blocks.reshape(H, W, D, x, y, z, *rest).permute(order).reshape(H * x, W * y, D * z, *rest)

def patient(i):
    "Voxels `(X, Y, Z)` float16, what fills the patches `(x, y, z, names)` bool, labels."
    torch.set_num_threads(1)
    study = PhantomCohort(10**6, SEED, spacing=SPEC.spacing, languages=("en",))[i]
    made = make_windows(study.volume, FIT, SPEC)
    grid, tokens = tuple(made.grid.tolist()), [w // p for w, p in zip(SPEC.window, SPEC.patch)]
    fills = torch.zeros(len(made.windows), *tokens, len(NAMES), dtype=torch.bool)
    for k, name in enumerate(NAMES):
        if k < Q and not any(p.finding == name for p in study.planted): continue
        mask = make_windows(CTVolume(study.mask(name) * 2000 - 1000, study.volume.affine), FIT, SPEC).windows.float()
        share = F.avg_pool3d(mask, SPEC.patch)[:, 0]                                    # (N, px, py, pz)
        fills[..., k] = share > (min(.08, .3 * share.max()) if k < Q else .3)           # small findings count where they are most
    return whole(made.windows[:, 0], grid).numpy(), whole(fills, grid).numpy(), np.array([study.labels[f] for f in FINDINGS], float)   # NaN: unknown

class Heads(nn.Module):
    "What patches, depths and the window hold, read linearly: the features must say it themselves."
    def __init__(self, encoder):
        super().__init__()
        self.encoder, E = encoder, encoder.cls_token.shape[-1]
        self.patch, self.depth, self.window = nn.Linear(E, len(NAMES)), nn.Linear(E, len(NAMES)), nn.Linear(E, len(NAMES))
        for head, bias in ((self.patch, -4.), (self.depth, -3.), (self.window, -3.)): nn.init.zeros_(head.weight); nn.init.constant_(head.bias, bias)
    def forward(self, windows):
        x = self.encoder(windows)
        return self.patch(x[:, 1:]), self.depth(x[:, 1:].unflatten(1, (-1, self.encoder.grid[2])).mean(1)), self.window(x[:, 0])

def loss(out, fills): # fills `(N, px, py, pz, names)`
    weight = fills.new_tensor([1.] * Q + [.25] * len(ORGANS), dtype=torch.float)
    wanted = fills.flatten(1, 3), fills.flatten(1, 2).any(1), fills.flatten(1, 3).any(1)
    return sum(share * (F.binary_cross_entropy_with_logits(o.float(), w.float(), pos_weight=torch.tensor(3.), reduction="none") * weight).flatten(0, -2).mean(0).sum()
               for share, o, w in zip((4., 2., 1.), out, wanted))

class Sampler:
    "Windows around a random patch of a random finding, each finding as often as the next, and windows anywhere."
    def __init__(self, voxels, fills, seed, anywhere=.35):
        self.voxels, self.fills, self.anywhere, self.rng = voxels, fills, anywhere, np.random.default_rng(seed)
        self.size = np.array([w // p for w, p in zip(SPEC.window, SPEC.patch)])
        self.places = [[(i, p) for i, f in enumerate(fills) if len(p := np.argwhere(f[..., k]))] for k in range(Q)]
    def one(self):
        if self.rng.random() < self.anywhere:
            i = self.rng.integers(len(self.voxels)); p = self.rng.integers(self.fills[i].shape[:3])
        else:
            here = self.places[self.rng.integers(Q)]; i, p = here[self.rng.integers(len(here))]; p = p[self.rng.integers(len(p))]
        low = np.clip(p - self.rng.integers(self.size), 0, self.fills[i].shape[:3] - self.size)
        cut = tuple(slice(a, a + n) for a, n in zip(low, self.size))
        return self.voxels[i][tuple(slice(a * q, (a + n) * q) for a, n, q in zip(low, self.size, SPEC.patch))], self.fills[i][cut]
    def batch(self, n):
        v, f = zip(*(self.one() for _ in range(n)))
        return torch.from_numpy(np.stack(v)[:, None]).float(), torch.from_numpy(np.stack(f))

@torch.inference_mode()
def test(model, voxels, labels):
    "AUC of every finding on whole scans: the mean of its three most suspicious patches."
    model.eval()
    scores = []
    for v in voxels:
        x = torch.from_numpy(v).float()
        for k, w in enumerate(SPEC.window): x = x.unfold(k, w, w)
        scores.append(model(x.flatten(0, 2)[:, None])[0][..., :Q].flatten(0, 1).topk(3, 0)[0].mean(0).numpy())
    model.train()
    scores, known = np.stack(scores), ~np.isnan(labels)
    return [roc_auc_score(labels[known[:, k], k], scores[known[:, k], k]) for k in range(Q)]

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in dict(train=1600, test=150, steps=7000, batch=64).items(): parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--output", type=Path, default="ctvlm/data/tiny_window_encoder.safetensors")
    parser.add_argument("--results", type=Path, default="benchmarks/results/pretrain_tiny.json")
    a = parser.parse_args()
    seed_everything(SEED)
    began = time.time()
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        voxels, fills, labels = zip(*progress(pool.map(patient, range(a.train + a.test), chunksize=8), total=a.train + a.test, what="rendering"))
    rendered = time.time() - began
    encoder = WindowEncoder(EncoderSizes(**CONFIG.window_encoder), SPEC.window, SPEC.patch, CONFIG.hu_levels)
    for m in encoder.modules():
        if isinstance(m, (nn.Linear, nn.Conv3d)): nn.init.normal_(m.weight, std=m.weight[0].numel()**-.5); nn.init.zeros_(m.bias)
    nn.init.normal_(encoder.cls_token, std=.02)
    sampler = Sampler(voxels[:a.train], fills[:a.train], SEED)
    start_patches(encoder, sampler.batch(500)[0], seed=SEED)
    model = Heads(encoder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=a.rate, betas=(.9, .95), weight_decay=.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1, (k + 1) / 200) * (.5 + .5 * math.cos(math.pi * k / a.steps) + .01))
    curve, sums = [], []
    for step in progress(range(1, a.steps + 1), what="pretraining"):
        windows, filled = sampler.batch(a.batch)
        with torch.autocast("cpu", torch.bfloat16): out = model(windows)
        value = loss(out, filled)
        optimizer.zero_grad(); value.backward(); nn.utils.clip_grad_norm_(model.parameters(), 1.); optimizer.step(); schedule.step()
        sums.append(value.item())
        if step % (a.steps // 12) == 0 or step == a.steps:
            areas = test(model, voxels[a.train:], np.stack(labels[a.train:]))
            curve.append(dict(step=step, loss=float(np.mean(sums)), mean_auroc=float(np.nanmean(areas)))); sums = []
            print(json.dumps(curve[-1] | {"seconds": round(time.time() - began)}), flush=True)
            with write_atomically(a.output) as t: save_file({k: v.to(torch.float16).contiguous() for k, v in encoder.state_dict().items()}, t)
    result = dict(patients=a.train, held_out=a.test, seed=SEED, steps=a.steps, batch=a.batch, seconds=round(time.time() - began), rendering_seconds=round(rendered),
                  curve=curve, per_class={f: round(float(v), 3) for f, v in zip(FINDINGS, areas)})
    with write_atomically(a.results) as t: t.write_text(json.dumps(result, indent=1) + "\n")
