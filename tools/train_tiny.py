"""Train the model that ships with the package, from nothing but drawn patients, by one command.

    python tools/train_tiny.py --run runs/tiny               # two cores: about two hours; a GPU: minutes
    python tools/train_tiny.py --run runs/tiny --keep        # and put the model into ctvlm/data/tiny
    python tools/train_tiny.py --run runs/tiny --real FOLDER # and ask it about real scans whose landmarks lie in FOLDER

Its stages lie below the folder of the run, and a stage whose output is there is not done again: interrupted, the same command goes on.

1. `patients`: scans at the model's resolution, and for every patch which findings and organs fill it
2. `encoder`:  the window encoder learns to say so
3. `studies`:  other patients with reports, and sentences about places
4. `words`:    a tokenizer, and a text encoder that knows which sentences mean the same
5. `features`: what the window encoder, from here on frozen, says of every scan
6. `findings`: the scan encoder learns to say of scans, and of parts of them, what stage 2 says of windows
7. `scans` and `places`: scan encoder and text encoder learn from reports, findings, and depths
8. `model`:    intervals and abstention, learned on patients of their own
9. `table`:    300 patients that no stage has looked at
"""
import argparse, json, math, multiprocessing, os, shutil, subprocess, sys, time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np, torch, torch.nn as nn, torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from ctvlm.core import pick_device, progress, seed_everything, stable_rng, write_atomically
from ctvlm.demo import DEMO_SIZES
from ctvlm.model import CTVLMConfig, CTVLMModel, CTVLMProcessor
from ctvlm.phantoms import AIR, PLANTERS, PhantomCohort, PhantomStudy, Stroke, draw
from ctvlm.places import PLACES, draw_sentences, dressed, extent_of, place_texts
from ctvlm.preprocessing import make_windows
from ctvlm.towers import copy_slice_projection
from ctvlm.vision import EncoderSizes, WindowEncoder, start_patches, start_projections, window_bins

ROOT = Path(__file__).resolve().parent.parent
CONFIG = CTVLMConfig.tiny(**DEMO_SIZES)
FIT, SPEC = CONFIG.fit, CONFIG.window_spec
SEEDS = dict(encoder=1000, studies=1001, table=1002) # of patients; no other part of the project uses them
FINDINGS = tuple(PLANTERS)
ORGANS = (
    "aorta", "bladder", "colon", "gallbladder", "heart", "left adrenal gland", "left kidney",
    "left lower lobe", "left psoas", "left upper lobe", "liver", "oesophagus", "pancreas",
    "right adrenal gland", "right kidney", "right lower lobe", "right middle lobe", "right psoas",
    "right upper lobe", "small bowel", "spleen", "stomach", "trachea", "vertebrae")
NAMES, Q = FINDINGS + ORGANS, len(FINDINGS)


@dataclass(frozen=True)
class Sizes:
    "How much of everything; the defaults are those of the model that ships."
    patients:int = 1300   # of stage 1
    judged:int = 100      # further ones of stage 1 who judge the window encoder
    steps:int = 8000      # of stage 2
    windows:int = 48      # a step
    rate:float = 2e-3     # peak learning rate of stage 2
    train:int = 1200      # patients of stages 3 to 7
    val:int = 250         # of stage 8
    test:int = 300        # of stage 9
    sentences:int = 24    # about places, of each patient
    words:int = 400       # steps of stage 4
    findings:int = 2000   # steps of stage 6
    scans:int = 3         # epochs without localization
    places:int = 9        # epochs with it


def tell(began, text): print(f"train_tiny: {text} ({time.monotonic() - began:.0f} s)", file=sys.stderr, flush=True)


# --- stage 1: patients

def filled(study, made): # -> `(x, y, z, names)` bool, whole scan in patches
    "Which patches each finding and each organ fills; neighbours are not cut away."
    grid = made.grid.numpy() * SPEC.window
    def axes(step): # voxel centres in the patient's own mm, `step` voxels apart
        return [made.affine[k, 3] - study.scan.shift[k] + SPEC.spacing[k] * (np.arange(0, grid[k], step) + (step - 1) / 2) for k in range(3)]
    def share(solids, step):
        strokes = [Stroke(0, AIR + 1, s) for s in solids]
        image = torch.from_numpy(draw(strokes, *axes(step), SPEC.spacing[0] * step) - AIR)
        return F.avg_pool3d(image[None, None], [p // step for p in SPEC.patch])[0, 0]
    fills = np.zeros((*(grid // SPEC.patch), len(NAMES)), bool)
    for k, name in enumerate(FINDINGS):
        solids = [s.solid for p in study.planted if p.finding == name for s in p.strokes.values()]
        if not solids: continue
        full = share(solids, 1)
        fills[..., k] = full > min(.08, .3 * full.max())             # small findings count where they are most
    for k, name in enumerate(ORGANS, Q): fills[..., k] = share([study.anatomy.solids[name]], 2) > .3
    return fills

def whole(windows, grid): # `(N, x, y, z)` windows in a row -> `(X, Y, Z)`
    "Put windows together to the scan that they were cut from."
    (H, W, D), (_, x, y, z) = grid, windows.shape
    return windows.reshape(H, W, D, x, y, z).permute(0, 3, 1, 4, 2, 5).reshape(H * x, W * y, D * z)

def patient(job):
    "Write voxels `(X, Y, Z)` in 1/65535, what fills the patches (packed bits), labels."
    folder, i = job
    torch.set_num_threads(1)
    path = folder/f"{i:05d}.npz"
    if path.exists(): return
    study = PhantomCohort(10**6, SEEDS["encoder"], spacing=SPEC.spacing, languages=("en",))[i]
    made = make_windows(study.volume, FIT, SPEC)
    fills = filled(study, made)
    voxels = (whole(made.windows[:, 0].float(), made.grid.tolist()) * 65535).round().numpy().astype(np.uint16)
    labels = np.array([study.labels[f] for f in FINDINGS], float)    # NaN: unknown
    with write_atomically(path) as t:
        with open(t, "wb") as f: np.savez(f, voxels=voxels, fills=np.packbits(fills, axis=-1), labels=labels)

def patients(folder, n, workers):
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(folder, i) for i in range(n)]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for _ in progress(pool.map(patient, jobs, chunksize=4), total=n, what="patients"): pass

def read_patient(path):
    with np.load(path) as f: return f["voxels"], np.unpackbits(f["fills"], axis=-1, count=len(NAMES)).view(bool), f["labels"]


# --- stage 2: window encoder

class Heads(nn.Module):
    "What patches, depths and the window hold, read linearly: the features must say it themselves."
    def __init__(self, encoder):
        super().__init__()
        self.encoder, E = encoder, encoder.cls_token.shape[-1]
        self.patch, self.depth, self.window = (nn.Linear(E, len(NAMES)) for _ in range(3))
        for head, bias in ((self.patch, -4.), (self.depth, -3.), (self.window, -3.)):
            nn.init.zeros_(head.weight)
            nn.init.constant_(head.bias, bias)
    def forward(self, windows):
        x = self.encoder(windows)
        depths = x[:, 1:].unflatten(1, (-1, self.encoder.grid[2])).mean(1)
        return self.patch(x[:, 1:]), self.depth(depths), self.window(x[:, 0])

def loss(out, fills): # fills `(N, px, py, pz, names)`
    weight = torch.tensor([1.] * Q + [.25] * len(ORGANS), device=fills.device)
    wanted = fills.flatten(1, 3), fills.flatten(1, 2).any(1), fills.flatten(1, 3).any(1)
    total = 0.
    for share, o, w in zip((4., 2., 1.), out, wanted):
        each = F.binary_cross_entropy_with_logits(o.float(), w.float(), pos_weight=torch.tensor(3., device=o.device), reduction="none")
        total = total + share * (each * weight).flatten(0, -2).mean(0).sum()
    return total

def roughened(windows, rng): # `(N, 1, x, y, z)` in [0, 1] -> the same, each as another scanner would see it
    "Another calibration, another noise: what no list of kernels covers."
    n = len(windows)
    def drawn(low, high): return torch.from_numpy(rng.uniform(low, high, (n, 1, 1, 1, 1)).astype(np.float32))
    noise = torch.from_numpy(rng.standard_normal(windows.shape, dtype=np.float32)) * drawn(0, .02) * drawn(0, 1)   # up to 40 HU
    return ((windows - .5) * drawn(.96, 1.04) + .5 + drawn(-.008, .008) + noise).clamp_(0, 1)

class Sampler:
    "Windows around a random patch of a random finding, each finding as often as the next, and windows anywhere."
    def __init__(self, voxels, fills, anywhere=.35):
        self.voxels, self.fills, self.anywhere = voxels, fills, anywhere
        self.size = np.array([w // p for w, p in zip(SPEC.window, SPEC.patch)])
        where = [[(i, p) for i, f in enumerate(fills) if len(p := np.argwhere(f[..., k]).astype(np.uint8))] for k in range(Q)]
        self.places = [here for here in where if here]                   # of findings that somebody has
    def one(self, rng):
        if rng.random() < self.anywhere:
            i = rng.integers(len(self.voxels))
            p = rng.integers(self.fills[i].shape[:3])
        else:
            here = self.places[rng.integers(len(self.places))]
            i, p = here[rng.integers(len(here))]
            p = p[rng.integers(len(p))].astype(int)
        low = np.clip(p - rng.integers(self.size), 0, self.fills[i].shape[:3] - self.size)
        cut = tuple(slice(a, a + n) for a, n in zip(low, self.size))
        shift = rng.integers(-1, 2, 3)                                   # a quarter of a patch: not everything lies on the grid
        start = np.clip(low * SPEC.patch + shift, 0, np.subtract(self.voxels[i].shape, SPEC.window))
        return self.voxels[i][tuple(slice(a, a + w) for a, w in zip(start, SPEC.window))], self.fills[i][cut]
    def batch(self, n, rng):
        v, f = zip(*(self.one(rng) for _ in range(n)))
        windows = torch.from_numpy(np.stack(v)[:, None].astype(np.float32)) / 65535
        return roughened(windows, rng), torch.from_numpy(np.stack(f))

@torch.inference_mode()
def judge(model, voxels, labels, device):
    "AUC of every finding on whole scans: the mean of its three most suspicious patches."
    model.eval()
    scores = []
    for v in voxels:
        x = torch.from_numpy(v.astype(np.float32)) / 65535
        for k, w in enumerate(SPEC.window): x = x.unfold(k, w, w)
        patches = model(x.flatten(0, 2)[:, None].to(device))[0][..., :Q].flatten(0, 1)
        scores.append(patches.topk(3, 0)[0].mean(0).float().cpu().numpy())
    model.train()
    return areas(np.stack(scores), labels)

def areas(scores, labels): # `(scans, Q)`, both; labels NaN or -1 where unknown
    "The AUC of every finding."
    known = labels >= 0
    def area(k):
        truth = labels[known[:, k], k]
        return roc_auc_score(truth, scores[known[:, k], k]) if 0 < truth.mean() < 1 else math.nan
    return [area(k) for k in range(Q)]

def new_encoder(sampler):
    encoder = WindowEncoder(EncoderSizes(**CONFIG.window_encoder), SPEC.window, SPEC.patch, CONFIG.hu_levels)
    for m in encoder.modules():
        if isinstance(m, (nn.Linear, nn.Conv3d)):
            nn.init.normal_(m.weight, std=m.weight[0].numel()**-.5)
            nn.init.zeros_(m.bias)
    nn.init.normal_(encoder.cls_token, std=.02)
    start_patches(encoder, sampler.batch(500, stable_rng(SEEDS["encoder"], "start"))[0], seed=SEEDS["encoder"])
    return encoder

def pretrain(folder, patients, sizes, device):
    "Write `encoder.safetensors` and `curve.json`; goes on from `state.pt`."
    folder.mkdir(parents=True, exist_ok=True)
    seed_everything(SEEDS["encoder"])
    voxels, fills, labels = zip(*(read_patient(patients/f"{i:05d}.npz") for i in range(sizes.patients + sizes.judged)))
    sampler = Sampler(voxels[:sizes.patients], fills[:sizes.patients])
    model = Heads(new_encoder(sampler)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=sizes.rate, betas=(.9, .95), weight_decay=.05)
    rate = lambda k: min(1, (k + 1) / 150) * (.5 + .5 * math.cos(math.pi * k / sizes.steps) + .01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    step, curve, sums, state = 0, [], [], folder/"state.pt"
    if state.exists():
        saved = torch.load(state, weights_only=True)
        step, curve = saved["step"], saved["curve"]
        for part, what in ((model, "model"), (optimizer, "optimizer"), (schedule, "schedule")): part.load_state_dict(saved[what])
    every = max(1, sizes.steps // 20)
    for step in progress(range(step + 1, sizes.steps + 1), what="window encoder"):
        torch.manual_seed(step)                                       # the same step is the same step, whoever goes on with it
        windows, filled = sampler.batch(sizes.windows, stable_rng(SEEDS["encoder"], "step", step))
        with torch.autocast(device.type, torch.bfloat16): out = model(windows.to(device))
        value = loss(out, filled.to(device))
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        schedule.step()
        sums.append(value.item())
        if step % every and step < sizes.steps: continue
        row, sums = dict(step=step, loss=round(float(np.mean(sums)), 3)), []
        if step % (4 * every) == 0 or step == sizes.steps:
            found = judge(model, voxels[sizes.patients:], np.stack(labels[sizes.patients:]), device)
            row |= dict(mean_auroc=round(float(np.nanmean(found)), 4))
        curve.append(row)
        print(json.dumps(row), flush=True)
        now = dict(step=step, curve=curve, model=model.state_dict(),
                   optimizer=optimizer.state_dict(), schedule=schedule.state_dict())
        with write_atomically(state) as t: torch.save(now, t)
    per_class = {f: round(float(v), 3) for f, v in zip(FINDINGS, found)}
    with write_atomically(folder/"curve.json") as t: t.write_text(json.dumps(dict(curve=curve, per_class=per_class), indent=1))
    half = {k: v.to("cpu", torch.float16).contiguous() for k, v in model.state_dict().items()}
    with write_atomically(folder/"heads.safetensors") as t:
        save_file({k: v for k, v in half.items() if not k.startswith("encoder.")}, t)
    with write_atomically(folder/"encoder.safetensors") as t:
        save_file({k.removeprefix("encoder."): v for k, v in half.items() if k.startswith("encoder.")}, t)


# --- stage 3: studies

LANGUAGES = ("en", "en", "de")   # two reports in three are English

def pair_of(text, depth): # as a table of studies holds it
    return dict(snippet=text, cleaned=text, series=None, image=None, image_end=None, depth_mm=float(depth),
                plane=None, prior=False, rule="place", status="depth", asserts=True)

def study_row(job):
    "A row of the table as mined and labelled; sentences about its places, and about places that the scan does not show."
    from ctvlm.data import phantom_studies
    seed, i, split, n = job
    torch.set_num_threads(1)
    language = LANGUAGES[stable_rng(seed, "language", i).integers(len(LANGUAGES))]
    study = PhantomStudy(seed, i, SPEC.spacing, language)
    row = phantom_studies([study]).iloc[0].to_dict()
    read = row["labels"]
    row |= dict(split=split, patient=f"{seed} {row['patient']}", label_version="rules, not mentioned is absent where the organ was scanned",
                labels={f: int(read.get(f) == 1) for f, truth in study.labels.items() if truth is not None})
    rng = stable_rng(seed, "sentences", i)
    here, away = draw_sentences(study, n, rng, split), draw_sentences(study, 6, rng, split, absent=True)
    return row, [pair_of(*s) for s in here], [text for text, _ in away]

def make_studies(folder, sizes, workers):
    "Write `studies.parquet`, `places.parquet` (sentences about places instead of those of the report) and `absent.json`."
    import pandas as pd
    from ctvlm.studies import ahead, write_studies
    parts = ("studies", "train", 0, sizes.train), ("studies", "val", sizes.train, sizes.val), ("table", "test", 0, sizes.test)
    jobs = [(SEEDS[name], i, split, sizes.sentences) for name, split, first, n in parts for i in range(first, first + n)]
    made = [made for _, made in progress(ahead(study_row, jobs, workers, None), total=len(jobs), what="studies")]
    rows, here, away = zip(*made)
    studies = pd.DataFrame(rows)
    for name, table in (("studies", studies), ("places", studies.assign(pairs=here))): write_studies(table, folder/f"{name}.parquet")
    absent = {f"{r.source}/{r.study}": texts for r, texts in zip(studies.itertuples(), away)}
    with write_atomically(folder/"absent.json") as t: t.write_text(json.dumps(absent, ensure_ascii=False))


# --- stage 4: words

def meanings():
    "Lists of sentences that mean the same: findings asserted and denied, in both languages, and places."
    from ctvlm.findings import FINDINGS as CATALOGUE, prompts_for
    found = []
    for f in CATALOGUE.values():
        for side in ("positive", "negative"):
            same = [s for style in ("ensemble", "templates") for s in getattr(prompts_for(f.name, style), side)]
            others = [n for n in (*f.en, *f.de) if "*" not in n]
            if side == "positive": same += others + [f"{n[0].upper()}{n[1:]}." for n in others]
            else: same += [f"No {n}." for n in f.en if "*" not in n] + [f"Kein Hinweis auf {n}." for n in f.de if "*" not in n]
            found.append(same)
    where = {name: texts for name in PLACES if len(texts := place_texts(name, "en", "train") + place_texts(name, "de", "train")) > 1}
    return found, where

BANDS = np.arange(-360, 361, 24)   # mm from the thoracolumbar junction, from the thighs to the neck

def usual_heights(names): # `(places, bands)`
    "How likely each place lies in each band of the usual body, from drawn patients."
    cohort = PhantomCohort(30, SEEDS["studies"], spacing=SPEC.spacing)
    seen = [(study.organ_heights, study.scan.shift[2]) for study in cohort]
    def middle(name, heights, shift): return sum(extent_of(PLACES[name], heights)) / 2 - shift
    z = np.array([np.mean([middle(name, *patient) for patient in seen]) for name in names])
    weight = np.exp(-((z[:, None] - BANDS) / 30)**2 / 2)
    return torch.from_numpy(weight / weight.sum(1, keepdims=True)).float()

def new_model(studies, words, sizes):
    "A model with a tokenizer of its own."
    from ctvlm.data import report_text
    from ctvlm.text import train_tokenizer
    train = studies[studies.split == "train"]
    texts = [report_text(r.findings, r.impression) for r in train.itertuples()]
    texts += [t for same in (*words[0], *words[1].values()) for t in same]
    tokenizer = train_tokenizer(texts, 2048)
    seed_everything(SEEDS["studies"])
    about = (f"{train.patient.nunique()} drawn patients (phantoms), its window encoder on what fills the scans of {sizes.patients} others,"
             f" {sizes.sentences} sentences about places for each; no real scan")
    model = CTVLMModel(CTVLMConfig.tiny(len(tokenizer), **DEMO_SIZES, trained_on=about))
    model.processor = CTVLMProcessor.of(model.config, tokenizer)
    nn.init.constant_(model.t, np.log(20))   # 34 findings share the cosines of one vector, which leaves each about 34 ** -0.5
    return model

def learn_words(model, words, steps, device):
    "Teach the text encoder which sentences mean the same, and how high places lie in the usual body; the losses of every step."
    model.to(device)
    (found, where), names = words, list(words[1])
    usual, height = usual_heights(names).to(device), nn.Linear(CONFIG.projection_dim, len(BANDS)).to(device)
    learned = [*model.text_encoder.parameters(), *model.report_head.parameters(), *height.parameters()]
    optimizer = torch.optim.AdamW(learned, lr=2e-3, betas=(.9, .95), weight_decay=5e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=.15, cycle_momentum=False)
    losses = []
    for step in progress(range(steps), what="words"):
        rng = stable_rng(SEEDS["studies"], "words", step)
        chosen, places = rng.choice(len(found) // 2, 32, replace=False), rng.choice(len(where), 64, replace=False)
        groups = [found[k] for f in chosen for k in (2 * f, 2 * f + 1)] + [where[names[k]] for k in places]
        pairs = [rng.choice(g, 2, replace=False) for g in groups]
        texts = [[dressed(str(p[side]), "en", rng) if k >= 64 else str(p[side]) for k, p in enumerate(pairs)]
                 for side in (0, 1)]
        u, v = (F.normalize(model.encode_text(**model.processor(text=t)), dim=-1) for t in texts)
        logits, same = u @ v.T / .1, torch.arange(len(pairs), device=device)
        meaning = (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2
        high = sum(F.cross_entropy(10 * height(x[64:]), usual[places]) for x in (u, v)) / 2
        optimizer.zero_grad()
        (meaning + high).backward()
        nn.utils.clip_grad_norm_(learned, 1.)
        optimizer.step()
        schedule.step()
        losses.append((round(meaning.item(), 3), round(high.item(), 3)))
    model.snippet_head.load_state_dict(model.report_head.state_dict())   # it starts as a copy
    return losses


# --- stage 5: features

def make_windows_of(studies, run, workers): # the store of all scans, cut into windows
    from ctvlm.features import FeatureStore, window_studies
    made = window_studies(studies, SPEC, run/"windows", FIT, workers=workers)
    if made["failed"]: sys.exit(f"{made['failed']} of {made['scans']} scans could not be drawn: {made['reasons']}")
    return FeatureStore(made["store"])

def make_features(model, studies, run, workers):
    "The `FeatureStore` of all scans; those to learn from are seen as another scanner would see them."
    from dataclasses import asdict
    from ctvlm.features import FeatureStore, fingerprint
    from ctvlm.studies import scan_key
    drawn = make_windows_of(studies, run, workers)
    store = FeatureStore.create(run/"features", fingerprint(SPEC, FIT, model), kind="features", fit=FIT, spec=asdict(SPEC),
                                encoder=model.config.window_encoder, trained_on=model.config.trained_on)
    for row in progress(studies.itertuples(), total=len(studies), what="features"):
        key = scan_key(row)
        if store.done(key, row.scan): continue
        s = drawn.load(key)
        windows = s.pop("windows").float()
        if row.split == "train": windows = roughened(windows, stable_rng(SEEDS["studies"], "roughened", key))
        with torch.inference_mode(): s["cls"], s["depth_tokens"] = (x.half().cpu() for x in model.encode_windows(windows, 64))
        store.save(key, s, {k: v for k, v in drawn.header(key).items() if k != "checksum"})
    return store


# --- stage 6: findings

def suspicion(heads, s): # of the features of a scan -> `(windows, Q, 2)`
    "What the heads of stage 2 say of each window: by its most suspicious depth, and by its CLS."
    held = window_bins(s["patch_mask"])
    def said(name, x): return F.linear(x.float(), heads[f"{name}.weight"][:Q], heads[f"{name}.bias"][:Q])
    depths = said("depth", s["depth_tokens"]).masked_fill(~held[..., None], -20.).amax(1)
    windows = said("window", s["cls"]).masked_fill(~held.any(1)[:, None], -20.)
    return torch.stack([depths, windows], -1)

class Chances:
    "How likely a scan shows each finding, if half of all did: a logistic regression on `suspicion`."
    def __init__(self, seen, labels): # `(scans, Q, 2)`, `(scans, Q)`
        known = labels >= 0
        fits = [LogisticRegression(class_weight="balanced").fit(seen[k, q].numpy(), labels[k, q].numpy())
                for q, k in enumerate(known.T)]
        self.weight = torch.tensor(np.stack([m.coef_[0] for m in fits])).float()
        self.bias = torch.tensor(np.stack([m.intercept_[0] for m in fits])).float()
    def __call__(self, seen): return ((seen * self.weight).sum(-1) + self.bias).sigmoid()

def read_features(studies, store, heads): # in memory
    "Of each scan of a table its features, what the heads say of them, and its labels."
    from ctvlm.studies import scan_key
    rows = []
    for row in studies.itertuples():
        s = store.load(scan_key(row))
        labels = torch.tensor([row.labels.get(f, -1) for f in FINDINGS])
        rows.append(dict(cls=s["cls"], depth_tokens=s["depth_tokens"], held=window_bins(s["patch_mask"]),
                         seen=suspicion(heads, s), grid=tuple(s["grid"].tolist()), labels=labels))
    return rows

@torch.no_grad()
def look(encoder, rows, heads):
    """The scan encoder starts from what the heads of stage 2 look for.

    Every number of a token has mean 0 and deviation 1 over windows; the first ones are findings and organs."""
    cls, tokens, held = (torch.cat([r[k] for r in rows]) for k in ("cls", "depth_tokens", "held"))
    cls, tokens = cls.float(), tokens.float()
    start_projections(encoder, cls, tokens)
    E, n = cls.shape[1], len(NAMES)
    encoder.patch_proj.weight[:n] = torch.cat([.2 * heads["window.weight"], heads["depth.weight"]], 1)
    encoder.patch_proj.bias.zero_()
    x = encoder._tokens(cls, tokens, held)[held.any(1)]
    encoder.patch_proj.weight /= x.std(0)[:, None]
    encoder.patch_proj.bias.copy_(-x.mean(0) / x.std(0))
    copy_slice_projection(encoder)

def part_of(row, rng):
    "Some of the windows of a scan, side by side; now and then all of them."
    if rng.random() < .25: return row
    grid = row["grid"]
    low = [rng.integers(n) for n in grid]
    high = [rng.integers(a, n) + 1 for a, n in zip(low, grid)]
    cut = tuple(slice(a, b) for a, b in zip(low, high))
    part = {k: row[k].unflatten(0, grid)[cut].flatten(0, 2) for k in ("cls", "depth_tokens", "held", "seen")}
    if not part["held"].any(): return row
    return part | dict(grid=tuple(int(b - a) for a, b in zip(low, high)))

def learn_findings(model, rows, chances, steps, device):
    "Teach scan and prompts to agree with what the heads of stage 2 say of scans and of parts of them; the losses."
    from ctvlm.findings import prompts_for
    sides = [(prompts_for(f, "ensemble"), prompts_for(f, "templates")) for f in FINDINGS]
    phrasings = [[t for p in both for t in getattr(p, side)]
                 for both in sides for side in ("positive", "negative")]
    image = [*model.scan_encoder.parameters(), *model.slice_head.parameters()]
    text = [*model.text_encoder.parameters(), *model.report_head.parameters()]
    groups = [dict(params=image, lr=3e-3), dict(params=text, lr=6e-4)]      # the text has been to school already
    optimizer = torch.optim.AdamW(groups, betas=(.9, .95), weight_decay=.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [g["lr"] for g in groups], total_steps=steps, pct_start=.05, cycle_momentum=False)
    losses = []
    model.to(device).train()
    for step in progress(range(steps), what="findings"):
        torch.manual_seed(step)
        rng = stable_rng(SEEDS["studies"], "findings", step)
        batch = [part_of(rows[i], rng) for i in rng.choice(len(rows), 24, replace=False)]
        wanted = chances(torch.stack([r["seen"].amax(0) for r in batch])).to(device)   # (24, Q)
        cls, tokens, held = (torch.cat([r[k] for r in batch]).to(device) for k in ("cls", "depth_tokens", "held"))
        scans = model.encode_features(cls, tokens, [r["grid"] for r in batch], held, slices=False)
        texts = [str(p[rng.integers(len(p))]) for p in phrasings]
        prompts = F.normalize(model.encode_text(**model.processor(text=texts)), dim=-1)
        asserted, denied = prompts.unflatten(0, (Q, 2)).unbind(1)                      # (Q, P) each
        cosines = F.normalize(scans.disease, dim=-1) @ (asserted - denied).T           # (24, Q)
        scores = model.t.detach().exp() * cosines
        value = F.binary_cross_entropy_with_logits(scores, wanted)
        value = value - F.binary_cross_entropy(wanted, wanted)                         # 0 where they agree
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_([*image, *text], 1.)
        optimizer.step()
        schedule.step()
        losses.append(round(value.item(), 4))
    model.scan_head.load_state_dict(model.slice_head.state_dict())       # what comes next starts from them
    model.snippet_head.load_state_dict(model.report_head.state_dict())
    copy_slice_projection(model.scan_encoder)
    return losses

def agreed(studies, rows, chances):
    "Labels that the features bear out; those that contradict them could only be learned by heart."
    found = [(chances(r["seen"].amax(0)) > .5).tolist() for r in rows]
    def kept(labels, seen):
        seen = dict(zip(FINDINGS, seen))
        return {f: y for f, y in labels.items() if y == seen[f]}
    return studies.assign(labels=[kept(y, seen) for y, seen in zip(studies.labels, found)])


# --- stage 7: scans, findings, places

TRAINING = dict(
    effective_batch=16, learning_rate=1e-3, final_learning_rate=1e-5, warmup_epochs=.5, weight_decay=5e-2, layer_decay=.5,
    siglip=1., disease=6., localization=1., silence=0., start_bias=-2.7, checkpoint_every=200, trackers=(),
    frozen=("window_encoder",))

def both(studies, places):
    "Reports with their snippets, and the sentences about places as further snippets."
    return studies.assign(pairs=[[*a, *b] for a, b in zip(studies.pairs, places.pairs)])

def learn_scans(model, studies, places, store, run, sizes):
    "Scans and findings first, then places too; the log."
    import pandas as pd
    from ctvlm.data import Batches
    from ctvlm.training import TrainingConfig, train
    table = both(studies, places)
    config = TrainingConfig(seed=SEEDS["studies"], **TRAINING)
    data = Batches(table, store, model.processor.tokenizer, config.effective_batch, list(FINDINGS), seed=SEEDS["studies"])
    stages = {"scans": replace(config, localization=0., epochs=sizes.scans),
              "places": replace(config, start_bias=None, epochs=sizes.places)}
    logs = []
    for name, stage in stages.items():
        if not stage.epochs: continue
        data.load_state_dict({"epoch": 0, "at": 0, "data": data.name})
        logs.append(train(model, data, stage, run/name, about=model.config.trained_on).assign(stage=name))
    return pd.concat(logs, ignore_index=True)


# --- stages 8 and 9: model and table

def ask(model, studies, store, device):
    "What the model says of every snippet of a table."
    from ctvlm.data import Batches
    from ctvlm.evaluation import embed_batches
    return embed_batches(model, Batches(studies, store, model.processor.tokenizer, 16, list(FINDINGS), training=False), quiet=True)

MISSED = .01, .02, .05, .1   # shares of what is there that may be refused

def calibrate(model, studies, store, absent, device):
    """Interval and abstention from the reports of patients of their own.

    As few refusals as refuse seven in ten sentences about what is not there."""
    from ctvlm.depth import DepthCalibration
    from ctvlm.evaluation import population_of
    val = studies[studies.split == "val"]
    e = ask(model, val, store, device)
    similarity, depths = (torch.from_numpy(x).float() for x in (e.similarity, e.bin_depths_mm))
    truth = torch.tensor(e.snippets.depth_mm.to_numpy(np.float32))
    for missed in MISSED:
        fitted = DepthCalibration.fit(
            similarity, depths.isfinite(), depths, truth, list(e.snippets.patient),
            missed=missed, population=population_of(val))
        model.config.interval_calibration = fitted.to_dict()
        silent = silent_share(model, val, store, absent)["unanswered"]
        print(f"refusing {missed:.0%} of what is there refuses {silent:.0%} of what is not", flush=True)
        if silent >= .7: return

def depths(model, e): # of an `Embedded`
    from ctvlm.evaluation import read_depths
    found, _ = read_depths(e, model.config.calibration)
    error = np.abs(found.pred_mm - found.depth_mm)
    inside = (found.interval_low_mm <= found.depth_mm) & (found.depth_mm <= found.interval_high_mm)
    middle = np.abs((found.low_mm + found.high_mm) / 2 - found.depth_mm)
    return dict(sentences=len(found), mae_mm=round(float(error.mean()), 1),
                median_mm=round(float(error.median()), 1), middle_mm=round(float(middle.mean()), 1),
                interval_coverage=round(float(inside.mean()), 3),
                unanswered=round(float(found.abstains.mean()), 3))

def silent_share(model, studies, store, absent):
    "Share of the sentences about places outside of the scan that the model does not answer."
    table = studies.assign(pairs=[[pair_of(t, np.nan) for t in absent[f"{r.source}/{r.study}"]] for r in studies.itertuples()])
    from ctvlm.data import scan_key
    from ctvlm.localization import depth_similarity
    silent = []
    for row in table.itertuples():
        texts = [p["snippet"] for p in row.pairs]
        if not texts: continue
        s = store.load(scan_key(row))
        with torch.inference_mode():
            x = model.encode_features(s["cls"], s["depth_tokens"], s["grid"], s["patch_mask"])
            slices = F.normalize(x.slices[0][x.valid[0]].float().cpu(), dim=-1)
        similarity = model._vectors(texts, "snippet")[0] @ slices.T
        silent += model.config.calibration.abstains(similarity, torch.ones_like(similarity, dtype=bool)).tolist()
    return dict(sentences=len(silent), unanswered=round(float(np.mean(silent)), 3))

def final_table(model, studies, places, store, absent, device):
    "Patients that no stage has looked at, beside the text-only prior and the organ in the scan."
    from ctvlm.evaluation import evaluate_studies, phantom_extents
    test = studies.split == "test"
    tasks = "retrieval", "classification", "localization"
    metrics = evaluate_studies(model, studies, store, list(FINDINGS), tasks=tasks, quiet=True,
                               extents=phantom_extents(cohort_of(studies[test])))
    places_too = evaluate_studies(model, places, store, list(FINDINGS), tasks=("localization",), quiet=True)
    return metrics, places_too["localization"], dict(
        places=depths(model, ask(model, places[test], store, device)), absent=silent_share(model, studies[test], store, absent),
        r10_among_100=among_100(model, studies[test], store, device))

def cohort_of(table):
    from ctvlm.studies import open_scan
    for row in table.itertuples():
        seed, index = int(row.source.split()[1]), int(row.study.split("-")[1])
        yield PhantomStudy(seed, index, SPEC.spacing, row.language)

def rounded(section, key, scale=1., digits=1): # value and interval of a metric
    return [round(scale * float(v), digits) for v in (section[key], *section[f"{key}_ci95"])]

def summary(metrics, place, more):
    "The numbers that the front page may quote: value, lower and upper end of the 95 % interval over patients."
    c, l, r = metrics["classification"], metrics["localization"], metrics["retrieval"]
    errors = "mae_mm", "middle_mm", "organ_mm", "text_prior_mm"
    return dict(
        patients=metrics["protocol"]["n_studies"],
        seed=SEEDS["table"],
        mean_auroc=rounded(c, "mean_auroc", digits=3),
        per_class={f: round(float(v), 3) for f, v in c["per_class"].items()},
        **{k: rounded(l, k) for k in errors},
        vs_middle=rounded(l, "vs_middle", digits=2),
        vs_text_prior=rounded(l, "vs_text_prior", digits=2),
        interval_coverage=rounded(l, "interval_coverage", 100),
        unanswered=rounded(l, "abstained", 100),
        places={k: rounded(place, k) for k in errors} | more["places"],
        absent=more["absent"],
        r10_among_100=more["r10_among_100"])

def among_100(model, test, store, device):
    "R@10 both ways among a hundred patients at a time (or as many as there are), in %."
    from ctvlm.evaluation import evaluate_retrieval
    size = min(100, len(test))
    parts = [evaluate_retrieval(ask(model, test.iloc[k:k + size], store, device), resamples=10)
             for k in range(0, len(test) - size + 1, size)]
    return {d: round(100 * float(np.mean([p[d]["r10"] for p in parts])), 1) for d in ("text_to_image", "image_to_text")}

def beside(folder, studies, places, absent, run, workers, device):
    "The same questions to another model."
    from ctvlm.evaluation import evaluate_studies
    model = CTVLMModel.from_pretrained(folder).to(device)
    test = studies.split == "test"
    store = make_features(model, studies[test], run, workers)
    found = evaluate_studies(model, studies[test], store, list(FINDINGS), tasks=("retrieval", "classification", "localization"), quiet=True)
    c, l = found["classification"], found["localization"]
    return dict(
        trained_on=model.config.trained_on,
        mean_auroc=rounded(c, "mean_auroc", digits=3),
        mae_mm=rounded(l, "mae_mm"),
        vs_middle=rounded(l, "vs_middle", digits=2),
        interval_coverage=rounded(l, "interval_coverage", 100),
        r10_among_100=among_100(model, studies[test], store, device),
        places=depths(model, ask(model, places[test], store, device)),
        absent=silent_share(model, studies[test], store, absent))

def ask_real(folder, model): # what `score_real.py` prints
    command = [sys.executable, str(folder/"score_real.py"), str(model), "--show"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    print(out, flush=True)
    return json.loads(out.strip().splitlines()[-1])

def once(path, make): # a stage whose output is there is not done again
    if not path.exists(): make()
    return path

STAGES = "patients", "encoder", "studies", "words", "windows", "findings", "table"

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, default=ROOT/"runs/tiny", help="folder of the run")
    parser.add_argument("--real", type=Path, help="folder with score_real.py and its scans")
    parser.add_argument("--keep", action="store_true", help="put the model into ctvlm/data/tiny and its table into benchmarks/results")
    parser.add_argument("--beside", type=Path, help="another model, asked the same questions")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that draw patients")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="only these: several machines or processes can share the work")
    for field, value in vars(Sizes()).items(): parser.add_argument(f"--{field}", type=type(value), default=value)
    a = parser.parse_args()
    run, sizes, device, began = a.run, Sizes(**{f: getattr(a, f) for f in vars(Sizes())}), pick_device(None), time.monotonic()
    encoder = run/"encoder/encoder.safetensors"
    def due(stage, output): # to be done now
        if stage not in a.stages or output.exists(): return False
        tell(began, stage)
        return True
    from ctvlm.data import read_studies
    if not encoder.exists() and "patients" in a.stages:
        tell(began, "patients")
        patients(run/"patients", sizes.patients + sizes.judged, a.workers)
    if due("encoder", encoder): pretrain(run/"encoder", run/"patients", sizes, device)
    if due("studies", run/"absent.json"): make_studies(run, sizes, a.workers)
    if not set(a.stages) & set(STAGES[3:]): return
    studies, places = (read_studies(run/f"{name}.parquet") for name in ("studies", "places"))
    absent = json.loads((run/"absent.json").read_text())
    if due("words", run/"words/config.json"):
        words = meanings()
        model = new_model(studies, words, sizes)
        losses = learn_words(model, words, sizes.words, device)
        with write_atomically(run/"words.json") as t: t.write_text(json.dumps(losses))
        with write_atomically(run/"words") as t: model.save_pretrained(t)
    if "windows" in a.stages: make_windows_of(studies, run, a.workers)
    if not set(a.stages) & {"findings", "table"}: return
    model = CTVLMModel.from_pretrained(run/"words").to(device)
    model.window_encoder.load_state_dict(load_file(encoder))
    tell(began, "features")
    store = make_features(model, studies, run, a.workers)
    heads = {k: v.float() for k, v in load_file(run/"encoder/heads.safetensors").items()}
    train = studies.split == "train"
    rows = read_features(studies[train], store, heads)
    chances = Chances(torch.stack([r["seen"].amax(0) for r in rows]), torch.stack([r["labels"] for r in rows]))
    if due("findings", run/"findings/config.json"):
        look(model.scan_encoder, rows[:100], heads)
        losses = learn_findings(model, rows, chances, sizes.findings, device)
        with write_atomically(run/"findings.json") as t: t.write_text(json.dumps(losses))
        with write_atomically(run/"findings") as t: model.save_pretrained(t)
    model = CTVLMModel.from_pretrained(run/"findings").to(device)
    if "table" not in a.stages: return
    tell(began, "scans and places")
    log = learn_scans(model, agreed(studies[train], rows, chances), places[train], store, run, sizes)
    tell(began, "model")
    calibrate(model, studies, store, absent, device)
    with write_atomically(run/"model") as t: model.save_pretrained(t)
    tell(began, "table")
    metrics, place, more = final_table(model, studies, places, store, absent, device)
    curve = json.loads((run/"encoder/curve.json").read_text()) if (run/"encoder/curve.json").exists() else None
    losses = log.groupby(["stage", "epoch"], sort=False)[["siglip", "disease", "localization"]].mean().round(3).reset_index()
    tested = read_features(studies[studies.split == "test"], store, heads)
    by_heads = chances(torch.stack([r["seen"].amax(0) for r in tested])).numpy()
    by_heads = areas(by_heads, torch.stack([r["labels"] for r in tested]).numpy())
    result = dict(sizes=vars(sizes), seeds=SEEDS, table=summary(metrics, place, more),
                  heads_auroc=round(float(np.nanmean(by_heads)), 3), encoder=curve, training=losses.to_dict("list"))
    if a.real: result["real"] = ask_real(a.real, run/"model")
    if a.beside:
        result["beside"] = beside(a.beside, studies, places, absent, run, a.workers, device)
        if a.real: result["beside"]["real"] = ask_real(a.real, a.beside)
    with write_atomically(run/"result.json") as t: t.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["table"], indent=1))
    if a.keep:
        with write_atomically(ROOT/"benchmarks/results/train_tiny.json") as t: shutil.copy(run/"result.json", t)
        with write_atomically(ROOT/"ctvlm/data/tiny") as t: shutil.copytree(run/"model", t)
    tell(began, "done")


if __name__ == "__main__": main()
