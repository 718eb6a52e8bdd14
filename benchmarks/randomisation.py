"""What does each kind of chance in the drawing of patients bring? The window encoder's lesson, small, on patients in whom one kind
is held still, and the same questions to each: findings, and where organs lie, on patients drawn like the model's, on patients of a
shifted kind that no lesson saw, and on real scans.

    python benchmarks/randomisation.py --run runs/randomisation --real FOLDER   # landmarks and scans lie in FOLDER
    python benchmarks/randomisation.py --run runs/try --seeds 1 --steps 20 --train 24 --test 16   to try it out

Prints one JSON line per run and writes benchmarks/results/randomisation.json, which the tutorial "From drawn patients to real scans"
shows. Runs are kept in RUN: the same command goes on where it was interrupted.
"""
import argparse, functools, json, sys, time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np, torch
from scipy.ndimage import affine_transform, uniform_filter1d

import ctvlm.anatomy, ctvlm.phantoms, ctvlm.scanner
from ctvlm.core import stable_rng
from ctvlm.phantoms import PhantomCohort
from ctvlm.preprocessing import load_volume, make_windows
from runs import kept, side_by_side, write_json

sys.path.insert(0, str(Path(__file__).resolve().parent.parent/"tools"))
import train_tiny as recipe

SPEC, FIT, ORGANS, Q = recipe.SPEC, recipe.FIT, recipe.ORGANS, recipe.Q
TRAIN, TEST = 5000, 6000   # seeds of patients: TRAIN + the run's seed, and of those that are asked about


# --- what can be held still

BODY = dict(sex="M", age=60, height_cm=174., bmi=26., arms_up=True, breath_mm=4.)
CONTRAST = dict(phase=2, timing=2.2, dose=1.)
DRAWS = { # generators that one patient's draws stand for, by their names
    "body": ("frame", "organ", "vessels", "body", "arms", "lungs", "mediastinum", "spine", "fat"),
    "contrast": ("tone", "gut", "oral"),
    "table and circle": ("table",),
    "range": ("crop",)}
KINDS = (*DRAWS, "noise")

def quiet(a, image, z, series, share, rng):
    "White noise of 8 HU instead of the scanner's."
    image += 8 * rng.standard_normal(image.shape, dtype=np.float32)

def whole(a, low, high): return low, high

@contextmanager
def still(kinds):
    "In here all patients have the same of these `kinds` of chance, that of one patient."
    names = {name for kind in kinds for name in DRAWS.get(kind, ())}
    traits = (BODY if "body" in kinds else {}) | (CONTRAST if "contrast" in kinds else {})
    drawn, planned, covered = ctvlm.phantoms.draw_traits, ctvlm.phantoms.plan_scan, ctvlm.scanner._coverage
    def generator(seed, name, i, *more):
        held = (more[0] if name == "vary" else name) in names
        return stable_rng(*((0, name, 0) if held else (seed, name, i)), *more)
    def plan(a):
        if "table and circle" not in kinds: return planned(a)
        scan = planned(a)
        return replace(scan, outside=None, pixel=.8, shift=(0., 0., scan.shift[2]))
    def coverage(a, rng): return covered(a, stable_rng(0, "coverage"))
    patches = {
        (ctvlm.phantoms, "draw_traits"): lambda seed, i: replace(drawn(seed, i), **traits),
        (ctvlm.phantoms, "plan_scan"): plan,
        (ctvlm.anatomy, "stable_rng"): generator,
        (ctvlm.scanner, "stable_rng"): generator}
    if "noise" in kinds: patches |= {(ctvlm.scanner, "_noise"): quiet, (recipe, "roughened"): lambda windows, rng: windows}
    if "range" in kinds: patches |= {(ctvlm.scanner, "_cropped"): whole, (ctvlm.scanner, "_coverage"): coverage}
    with ExitStack() as stack:
        for (module, name), new in patches.items(): stack.enter_context(mock.patch.object(module, name, new))
        yield


# --- patients

def shifted(volume, rng):
    "As no patient is drawn: turned by 8 to 15 degrees, squeezed or stretched, blurred along the body, noisier, another scale of HU."
    turn = np.deg2rad(rng.uniform(8, 15)) * rng.choice([-1, 1])
    c, s = np.cos(turn), np.sin(turn)
    matrix = np.eye(3)
    matrix[:2, :2] = np.array([[c, -s], [s, c]]) * rng.choice([.85, 1.15])
    middle = (np.array(volume.array.shape) - 1) / 2
    hu = affine_transform(volume.array.astype(np.float32), matrix, middle - matrix @ middle, order=1, cval=-1024)
    hu = uniform_filter1d(hu, 3, axis=2)
    hu = hu * rng.choice([.93, 1.07]) + 25 * rng.standard_normal(hu.shape, dtype=np.float32) + 15
    return replace(volume, array=np.clip(hu, -1024, 3071).astype(np.float32))

@functools.cache
def questions(n): # patients drawn like the model's, and the same ones shifted: their truth is the same
    studies = list(PhantomCohort(n, TEST, spacing=SPEC.spacing))
    truth = []
    for labels, heights, made in map(truth_of, studies):
        truth.append((labels, {o: median(m, depths_of(made)) for o, m in zip(ORGANS, heights.T) if m.sum() >= 5}))
    volumes = {"drawn": [s.volume for s in studies]}
    volumes["shifted"] = [shifted(v, stable_rng(TEST, "shifted", k)) for k, v in enumerate(volumes["drawn"])]
    return {kind: [(v, *t) for v, t in zip(of_kind, truth)] for kind, of_kind in volumes.items()}

def lesson(cohort): # of a cohort: `(voxels, fills)` as the recipe's sampler takes them
    voxels, fills = [], []
    for study in cohort:
        made = make_windows(study.volume, FIT, SPEC)
        voxels.append((recipe.whole(made.windows[:, 0].float(), made.grid.tolist()) * 65535).round().numpy().astype(np.uint16))
        fills.append(recipe.filled(study, made))
    return voxels, fills

def truth_of(study): # labels of the findings, NaN where unknown; `(depths, organs)`, how much of each organ lies at each depth
    made = make_windows(study.volume, FIT, SPEC)
    labels = [np.nan if v is None else v for v in study.labels.values()]
    return labels, recipe.filled(study, made)[..., Q:].sum((0, 1)), made


# --- questions

@torch.inference_mode()
def read(model, volume): # -> suspicion of every finding, `(depths, organs)` mass, the middle of each depth in mm
    made = make_windows(volume, FIT, SPEC)
    (H, W, D), (px, py, pz) = made.grid.tolist(), (w // p for w, p in zip(SPEC.window, SPEC.patch))
    said = model(made.windows.float())[0].masked_fill(~made.patch_mask.flatten(1)[..., None], -20.)
    suspicious = said[..., :Q].flatten(0, 1).topk(3, 0)[0].mean(0)
    mass = said[..., Q:].sigmoid().square().unflatten(1, (px * py, pz)).sum(1)   # (windows, pz, organs); what is unlikely adds up too
    return suspicious.numpy(), mass.unflatten(0, (H * W, D)).sum(0).flatten(0, 1).numpy(), depths_of(made)

def depths_of(made):
    thick = SPEC.patch[2] * SPEC.spacing[2]
    n = made.grid[2].item() * SPEC.window[2] // SPEC.patch[2]
    return made.affine[2, 3] - SPEC.spacing[2] / 2 + thick * (np.arange(n) + .5)

def median(mass, mm):
    "The depth that half of the mass lies below."
    return float(mm[np.searchsorted(np.cumsum(mass), mass.sum() / 2)])

def score(model, scans): # of `(volume, labels or None, {organ: mm})`
    "AUC over the findings, by the three most suspicious patches of a scan, and how far off the medians of the organs are."
    model.eval()
    said, errors = [], []
    for volume, _, middles in scans:
        suspicious, mass, mm = read(model, volume)
        said.append(suspicious)
        errors += [abs(median(mass[:, ORGANS.index(o)], mm) - z) for o, z in middles.items()]
    found = dict(organs_mm=round(float(np.mean(errors)), 1))
    labels = [row for _, row, _ in scans]
    if labels[0] is None: return found
    return found | dict(auc=round(float(np.nanmean(recipe.areas(np.stack(said), np.array(labels, float)))), 3))


# --- runs

def trained(sampler, steps, windows, seed):
    torch.manual_seed(seed)
    model = recipe.Heads(recipe.new_encoder(sampler))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(.9, .95), weight_decay=.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=.1, cycle_momentum=False)
    for step in range(steps):
        cut, filled = sampler.batch(windows, stable_rng(seed, "step", step))
        with torch.autocast("cpu", torch.bfloat16): value = recipe.loss(model(cut), filled)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        schedule.step()
    return model

def real_scans(folder):
    truth = json.loads((folder/"real_landmarks.json").read_text())["scans"]
    return [(load_volume(folder/name), None, {o: sum(marks[o]) / 2 for o in marks if o in ORGANS}) for name, marks in truth.items()]

def one(job): # (kinds held still, seed, the arguments) -> a row
    kinds, seed, a = job
    name = "nothing" if not kinds else "all of it" if len(kinds) == len(KINDS) else kinds[0]
    settings = dict(train=a.train, test=a.test, steps=a.steps, windows=a.windows, real=a.real is not None)
    def measured():
        began = time.perf_counter()
        with still(kinds):
            sampler = recipe.Sampler(*lesson(PhantomCohort(a.train, TRAIN + seed, spacing=SPEC.spacing)))
            drawing = time.perf_counter() - began
            model = trained(sampler, a.steps, a.windows, seed)
        learning = time.perf_counter() - began - drawing
        found = {kind: score(model, scans) for kind, scans in questions(a.test).items()}
        if a.real: found["real"] = score(model, real_scans(a.real))
        return {"still": name, "seed": seed, **found, "seconds": [round(drawing), round(learning), round(time.perf_counter() - began - drawing - learning)]}
    return kept(a.run/f"{name.replace(' ', '-')}-{seed}.json", settings, measured)

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--run", type=Path, default=Path("runs/randomisation"), help="folder that keeps the runs")
    ap.add_argument("--real", type=Path, help="folder with real_landmarks.json and its scans")
    ap.add_argument("--seeds", type=int, default=3)
    ap.add_argument("--train", type=int, default=150, help="patients to learn from")
    ap.add_argument("--test", type=int, default=80, help="patients to ask about")
    ap.add_argument("--steps", type=int, default=800)
    ap.add_argument("--windows", type=int, default=32, help="a step")
    ap.add_argument("--processes", type=int, default=2)
    ap.add_argument("--output", type=Path, default=Path(__file__).parent/"results"/"randomisation.json")
    a = ap.parse_args()
    a.run.mkdir(parents=True, exist_ok=True)
    rows, variants = [], [(), *((k,) for k in KINDS), KINDS]
    for row in side_by_side(one, [(v, seed, a) for seed in range(a.seeds) for v in variants], a.processes):
        rows.append(row)
        print(json.dumps({"benchmark": "randomisation", **row}), flush=True)
        write_json(a.output, dict(train=a.train, test=a.test, steps=a.steps, windows=a.windows, runs=[{k: v for k, v in r.items() if k != "seconds"} for r in rows]))


if __name__ == "__main__": main()
