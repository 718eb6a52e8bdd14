"""A wheel step of the reader: from the step to the picture, beside the same four panels redrawn as a matplotlib figure.

    python benchmarks/viewer.py                 512 x 512 x 300, in Python: one JSON line
    python benchmarks/viewer.py --browser       and the whole way, wheel to canvas, through `ctvlm view` and Chromium
"""
import argparse, io, json, shutil, signal, subprocess, sys, tempfile, time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from ctvlm.core import CTVolume


def body(shape, spacing):
    "A noisy ellipse with ribs: PNG packs it about as badly as a patient."
    rng, (X, Y, Z) = np.random.default_rng(0), shape
    x, y = np.linspace(-1, 1, X)[:, None], np.linspace(-1, 1, Y)[None]
    inside = (x ** 2 / 0.8 + y ** 2 / 0.5 < 1).astype(np.float32)
    array = rng.normal(0, 15, size=shape).astype(np.float32)
    for k in range(Z): array[:, :, k] += np.where(inside > 0, 40 + 300 * (np.hypot(x, y + 0.2) < 0.1 + 0.05 * (k % 20 < 10)), -1000)
    return CTVolume(array, np.diag([*spacing, 1.]), name="made up")


def answer(volume):
    bins = np.arange(volume.depths_mm[0], volume.depths_mm[-1], 12.)
    p = np.exp(-0.5 * ((bins - volume.depths_mm.mean()) / 30) ** 2)
    return SimpleNamespace(text="cyst", depth_mm=float(volume.depths_mm.mean()), image_number=None, interval_mm=(volume.depths_mm.mean() - 40, volume.depths_mm.mean() + 40), bin_depths_mm=bins, probabilities=p / p.sum())


def timed(step, ks):
    "Milliseconds of each step, on the clock and of the processor."
    wall, cpu = [], []
    for k in ks:
        began, used = time.perf_counter(), time.process_time()
        step(k)
        wall.append(1e3 * (time.perf_counter() - began)); cpu.append(1e3 * (time.process_time() - used))
    return wall, cpu


def ours(volume, ks):
    from ctvlm.viewer import explore
    reader = explore(volume, ["cyst"], None)
    reader.answer = answer(volume)
    reader.move(k=ks[0] - 1)
    return timed(lambda k: reader.move(k=k), ks)


def figure(volume, ks):
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from ctvlm.pictures import _gray, plot_posterior
    a, (X, Y, _) = volume.array, volume.array.shape
    fig, axes = plt.subplots(1, 4, figsize=(16, 5), dpi=100, layout="constrained")
    images = [ax.imshow(_gray(s.T, "soft tissue"), cmap="gray", vmin=0, vmax=255, origin="lower", aspect="auto") for ax, s in zip(axes, (a[:, :, ks[0]], a[:, Y // 2], a[X // 2]))]
    plot_posterior(answer(volume), axes[3])
    def step(k):
        images[0].set_data(_gray(a[:, :, k].T, "soft tissue"))
        fig.savefig(io.BytesIO(), format="png")
    step(ks[0])
    return timed(step, ks)


WHEEL = """() => new Promise(done => {
  const box = document.querySelector(".ctvlm-planes"), canvas = box.querySelector("figure.axial canvas"), began = performance.now();
  const watch = new MutationObserver(() => { watch.disconnect(); requestAnimationFrame(() => done(performance.now() - began)); });
  watch.observe(box, { attributes: true, attributeFilter: ["data-drawn"] });
  canvas.dispatchEvent(new WheelEvent("wheel", { deltaY: 100, cancelable: true }));
})"""


def browser(volume, steps):
    import nibabel
    from playwright.sync_api import sync_playwright
    from ctvlm.demo import demo_cohort, demo_model
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        nibabel.save(nibabel.Nifti1Image(volume.array.astype(np.int16), volume.affine), folder / "scan.nii")
        demo_model(demo_cohort({"train": 2, "val": 1, "test": 1}, 0)[1], 0).save_pretrained(folder / "model")
        server = subprocess.Popen([sys.executable, "-m", "ctvlm.cli", "view", folder / "scan.nii", "--model", folder / "model", "--json", "--quiet"], stdout=subprocess.PIPE, text=True)
        try:
            url = json.loads(server.stdout.readline())["url"]
            with sync_playwright() as p:
                page = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--headless", "--no-sandbox", "--disable-gpu"]).new_page(viewport={"width": 1500, "height": 950})
                page.goto(url, wait_until="commit")
                page.wait_for_selector(".ctvlm-planes[data-drawn]", timeout=300_000)
                page.evaluate(WHEEL)
                return [page.evaluate(WHEEL) for _ in range(steps)]
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(60)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--shape", type=int, nargs=3, default=(512, 512, 300))
    ap.add_argument("--steps", type=int, default=30)
    ap.add_argument("--browser", action="store_true", help="measure in Chromium too")
    args = ap.parse_args()
    volume = body(args.shape, (0.7, 0.7, 1.2))
    ks = list(range(volume.array.shape[2] // 3, volume.array.shape[2] // 3 + args.steps))
    (wall, cpu), (baseline_wall, baseline_cpu) = ours(volume, ks), figure(volume, ks[:max(3, args.steps // 5)])
    median = lambda x: round(float(np.median(x)), 1)
    line = {"benchmark": "viewer", "shape": volume.array.shape, "steps": len(ks), "ms": median(wall), "slowest_ms": round(max(wall), 1), "cpu_ms": median(cpu),
            "matplotlib_ms": median(baseline_wall), "matplotlib_cpu_ms": median(baseline_cpu), "faster": round(float(np.median(baseline_cpu) / np.median(cpu)), 1)}
    if args.browser:
        seen = browser(volume, args.steps)
        line |= {"browser_ms": median(seen), "browser_slowest_ms": round(max(seen), 1)}
    print(json.dumps(line), flush=True)


if __name__ == "__main__": main()
