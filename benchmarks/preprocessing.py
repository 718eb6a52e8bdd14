"""From a scan on disk to float16 windows: ours and the MONAI chain, end to end, each run in a process of its own.

    python benchmarks/preprocessing.py                    ../shared/data/chest_dicom and its NIfTI, or a phantom where that is missing
    python benchmarks/preprocessing.py --dicom FOLDER     another series

The chain is LoadImage -> ScaleIntensityRange -> Orientation -> Spacing -> CenterSpatialCrop -> GridPatch -> float16; from DICOM
SimpleITK reads in place of LoadImage. Both make the windows of fit="crop" and these are compared; fit="pad", the default, is a line of its own.
A measurement is one JSON line: the fastest of the repeats, and the largest memory that the process and its children took above what they had
before, libraries loaded. The last lines are the ratios."""
import argparse, json, subprocess, sys, tempfile, time
from pathlib import Path

SPACING, WINDOW = (0.75, 0.75, 3.0), (128, 128, 32)
SHARED = Path(__file__).resolve().parents[2] / "shared/data/chest_dicom"


def ours(path, fit):
    from ctvlm.preprocessing import load_volume, make_windows
    volume = load_volume(path)
    return volume.array.nbytes, make_windows(volume, fit=fit).windows


def read_with_sitk(path):
    "A DICOM folder as a MONAI image, channel first, RAS affine."
    import numpy as np, SimpleITK as sitk, torch
    from monai.data import MetaTensor
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(path)))
    image = reader.Execute()
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return MetaTensor(torch.from_numpy(sitk.GetArrayFromImage(image).T[None].astype(np.float32)), affine=torch.from_numpy(np.diag([-1.0, -1, 1, 1]) @ affine))


def chain(path, fit="crop"):
    import torch
    from monai.transforms import CenterSpatialCrop, GridPatch, LoadImage, Orientation, ScaleIntensityRange, Spacing
    image = read_with_sitk(path) if Path(path).is_dir() else LoadImage(image_only=True, ensure_channel_first=True)(path)
    volume_bytes = 4 * image.numel()
    image = ScaleIntensityRange(-1000, 1000, 0, 1, clip=True)(image)
    image = Orientation("RAS", labels=None)(image)
    image = Spacing(SPACING, mode="bilinear")(image)
    size = [n // w * w for n, w in zip(image.shape[1:], WINDOW)]
    return volume_bytes, torch.as_tensor(GridPatch(WINDOW)(CenterSpatialCrop(size)(image))).half()


def child(form, path, fit, small, out):
    "Load libraries, wait for a line, run once, print what it took."
    import logging, warnings
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import numpy as np, resource
    run = {"ours": ours, "monai": chain}[form]
    if small: run(small, fit)                                       # every library is in memory now
    try: Path("/proc/self/clear_refs").write_text("5")              # start the high-water mark anew
    except OSError: pass
    print("ready", flush=True)
    input()
    cpu = lambda: sum(sum(resource.getrusage(w)[:2]) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    began, cpu_began, before = time.perf_counter(), cpu(), status("VmRSS")
    nbytes, windows = run(path, fit)
    result = dict(seconds=time.perf_counter() - began, cpu_seconds=cpu() - cpu_began, own_mib=status("VmHWM") - before, volume_mib=nbytes / 2**20, windows=len(windows))
    if out: np.save(out, windows.numpy())
    print(json.dumps(result), flush=True)


def status(key, pid="self"):
    return next((int(line.split()[1]) / 1024 for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(key)), 0)


def tree_mib(process):
    "Proportional memory of a process and its children, so that shared pages count once."
    import psutil
    total = 0
    for p in [process, *process.children(recursive=True)]:
        try: total += next(int(line.split()[1]) for line in Path(f"/proc/{p.pid}/smaps_rollup").read_text().splitlines() if line.startswith("Pss:")) / 1024
        except (OSError, StopIteration, psutil.Error): pass
    return total


def measure(form, path, fit, small, out):
    import psutil
    command = [sys.executable, __file__, "--form", form, "--path", str(path), "--fit", fit, "--small", str(small), "--out", str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as p:
        while (line := p.stdout.readline()).strip() != "ready":
            if not line: sys.exit(p.stderr.read())
        process = psutil.Process(p.pid)
        before = peak = tree_mib(process)
        p.stdin.write("\n"); p.stdin.flush()
        import select
        while not select.select([p.stdout], [], [], 0.02)[0]: peak = max(peak, tree_mib(process))
        line = p.stdout.readline()
        if not line: sys.exit(p.stderr.read())
    result = json.loads(line)
    result["peak_mib"] = max(peak - before, result.pop("own_mib"))
    return result


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--dicom", type=Path, help="a folder with one series")
    ap.add_argument("--repeat", type=int, default=3)
    ap.add_argument("--form", choices=["ours", "monai"], help=argparse.SUPPRESS)
    for name in ("path", "fit", "small", "out"): ap.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = ap.parse_args()
    if args.form: return child(args.form, args.path, args.fit, args.small, args.out)

    import nibabel, numpy as np
    from ctvlm.preprocessing import load_volume
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        dicom = args.dicom or (SHARED if SHARED.exists() else None)
        if dicom is None:
            from ctvlm.phantoms import PhantomCohort
            dicom = next(iter((PhantomCohort(1)[0].write_dicom(folder / "dicom")).glob("series-*")))
        volume = load_volume(dicom)
        array = volume.array[::-1, ::-1].astype(np.int16)          # stored as converters do: towards left and back
        lps = volume.affine @ np.array([[-1, 0, 0, array.shape[0] - 1], [0, -1, 0, array.shape[1] - 1], [0, 0, 1, 0], [0, 0, 0, 1.0]])
        nibabel.save(nibabel.Nifti1Image(array, lps), folder / "scan.nii.gz")
        small = np.clip(array[::4, ::4, ::4], -1000, 1000)
        nibabel.save(nibabel.Nifti1Image(small, lps @ np.diag([4.0, 4, 4, 1])), folder / "small.nii.gz")
        best = {}
        for _ in range(args.repeat):
            for source, path in (("nifti", folder / "scan.nii.gz"), ("dicom", dicom)):
                for form, fit in (("ours", "crop"), ("monai", "crop"), ("ours", "pad")):
                    r = measure(form, path, fit, folder / "small.nii.gz", folder / f"{form}-{fit}-{source}.npy")
                    b = best.setdefault((source, form, fit), r)
                    best[source, form, fit] = {k: (max if k == "peak_mib" else min)(b[k], r[k]) for k in r}
        for (source, form, fit), r in best.items():
            print(json.dumps({"benchmark": "preprocessing", "source": source, "form": form, "fit": fit, "shape": volume.array.shape,
                              **{k: round(v, 2) for k, v in r.items()}, "peak_of_volume": round(r["peak_mib"] / r["volume_mib"], 2)}), flush=True)
        for source in ("nifti", "dicom"):
            a, b = (np.load(folder / f"{form}-crop-{source}.npy").astype(np.float32) for form in ("ours", "monai"))
            one, two = best[source, "ours", "crop"], best[source, "monai", "crop"]
            print(json.dumps({"benchmark": "preprocessing", "source": source, "faster": round(two["seconds"] / one["seconds"], 2), "less_cpu": round(two["cpu_seconds"] / one["cpu_seconds"], 2),
                              "less_memory": round(two["peak_mib"] / one["peak_mib"], 2), "largest_difference": float(np.abs(a - b).max())}), flush=True)


if __name__ == "__main__": main()
