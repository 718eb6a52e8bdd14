"What a breaker tries on volumes: every case is read right, with a line that says what was left out, or refused in one line that names the remedy."
import errno, gzip, os, shutil, stat, struct, zipfile
from collections import Counter
from pathlib import Path

import nibabel, numpy as np, pydicom, pytest, torch

from ctvlm import core, preprocessing
from ctvlm.core import CTVolume, InputError, check_output, picture_text, show_planes, write_atomically, write_output
from ctvlm.dicom import choose_series, dicom_images, read_headers, series_table
from ctvlm.phantoms import PhantomCohort
from ctvlm.preprocessing import WindowSpec, check_paths, check_values, find_scans, load_volume, make_windows, resample_matrix
from test_preprocessing import AFFINE, SHARED, body, edited, needs_shared, nifti, ras, save, write_series

HU = body().transpose(2, 1, 0)                        # (z, y, x)
PLACES = [(-30.5, -20.25, 100 + 2.5 * k) for k in range(30)]
ORDER = list(range(1, 31))                            # image numbers along z


def files(folder): return sorted(folder.iterdir(), key=lambda f: float(pydicom.dcmread(f, stop_before_pixels=True).ImagePositionPatient[2]))
def series(folder, **more): return write_series(folder, more.pop("hu", HU), **{"order": ORDER, **more})


# ---- what is given -> what is said; each case gets a folder and returns the path

def emptied(n, where, content=lambda f: b""):
    def make(folder):
        for f in files(series(folder / "s"))[where]: f.write_bytes(content(f))
        return folder / "s"
    return make


def without_position(folder):
    for f in files(series(folder / "s"))[:3]:
        ds = pydicom.dcmread(f)
        del ds.ImagePositionPatient
        ds.save_as(f)
    return folder / "s"


def gap(count):
    def make(folder):
        for f in files(series(folder / "s"))[10:10 + count]: f.unlink()
        return folder / "s"
    return make


def two_acquisitions(shift, **second):
    def make(folder):
        series(folder / "s", AcquisitionNumber=1)
        write_series(folder / "s/b", HU + np.int16(5), [(x, y, z + shift) for x, y, z in PLACES], order=[100 + k for k in ORDER], **second)
        return folder / "s"
    return make


def two_series(**second):
    def make(folder):
        series(folder / "s")
        write_series(folder / "s/b", HU, **{"SeriesInstanceUID": "1.2.3.9", **second})
        return folder / "s"
    return make


def zipped_zeros(folder):
    with zipfile.ZipFile(folder / "z.zip", "w", zipfile.ZIP_DEFLATED) as z: z.writestr("a.dcm", bytes(2**27))
    return folder / "z.zip"


def gzipped_zeros(folder):
    path = nifti(folder / "a.nii", body())
    edited(path, dim=[3, 1000, 1000, 80, 1, 1, 1, 1], srow_x=[0.5, 0, 0, 1], srow_y=[0, 0.5, 0, 1], srow_z=[0, 0, 0.5, 1], pixdim=[1, 0.5, 0.5, 0.5, 0, 0, 0, 0])
    (folder / "a.nii.gz").write_bytes(gzip.compress(path.read_bytes()[:352] + bytes(160_000_000), 6))
    return folder / "a.nii.gz"


def sparse(folder): # three gigabytes of nothing, named as DICOM
    with open(folder / "a.dcm", "wb") as f: f.truncate(3 * 2**30)
    return folder / "a.dcm"


def analyze(folder):
    image = nibabel.AnalyzeImage(body(), AFFINE)
    nibabel.save(image, folder / "a.img")
    return folder / "a.hdr"


def slanted(mm, axis=2):
    "A NIfTI whose x axis climbs by `mm` along `axis` from one side to the other."
    def make(folder):
        affine = AFFINE.copy()
        affine[axis, 0] = mm / 39
        return nifti(folder / "a.nii", body(), affine, qform=0)
    return make


def forms(**moved):
    def make(folder):
        image = nibabel.Nifti1Image(body(), AFFINE)
        image.set_sform(AFFINE, 1)
        other = AFFINE.copy()
        for k, v in moved.items(): other["xyz".index(k), 3] += v
        image.set_qform(other, 1)
        nibabel.save(image, folder / "a.nii")
        return folder / "a.nii"
    return make


REFUSED = {
    "14 of 30 slices emptied at one end": (emptied(14, slice(16, None)), {}, ("14 of 30 files cannot be read", "further than 100.0 to 137.5 mm", "--allow-partial")),
    "slices of zeros at the other end": (emptied(3, slice(3), lambda f: bytes(f.stat().st_size)), {}, ("3 of 30 files",)),
    "slices cut in their header": (emptied(2, slice(2), lambda f: f.read_bytes()[:500]), {}, ("2 of 30 files",)),
    "slices cut in their pixels": (emptied(2, slice(2), lambda f: f.read_bytes()[:-40]), {}, ("2 of 30 files",)),
    "slices without a position": (without_position, {}, ("3 of 30 files", "do not say where they lie")),
    "every file emptied": (emptied(30, slice(None)), {}, ("none of its 30 DICOM files can be read",)),
    "two slices missing in a row": (gap(2), {}, ("7.50 mm apart", "--fill-gaps")),
    "two acquisitions, numbered, at the same places": (two_acquisitions(0, AcquisitionNumber=2), {}, ("1: 30 images, 2: 30 images", "--acquisition")),
    "two acquisitions, numbered, between each other": (two_acquisitions(1.25, AcquisitionNumber=2), {}, ("--acquisition",)),
    "two acquisitions, not numbered, between each other": (two_acquisitions(1.25, AcquisitionNumber=1), {}, ("several acquisitions", "--acquisition")),
    "an acquisition that is not there": (two_acquisitions(1.25, AcquisitionNumber=2), dict(acquisition=7), ("no acquisition 7",)),
    "two series of one number": (two_series(), dict(series=4), ("2 series of number 4", "1.2.3.4, 1.2.3.9")),
    "two studies": (two_series(StudyInstanceUID="1.2.77"), {}, ("2 studies", "1: 1 series, 30 images")),
    "two patients": (two_series(PatientID="someone else"), {}, ("2 patients",)),
    "128 MiB of zeros in a zip": (zipped_zeros, {}, ("unpacks from",)),
    "160 MB of zeros in a NIfTI": (gzipped_zeros, {}, ("unpacks from",)),
    "3 GiB of zeros as a DICOM file": (sparse, {}, ("begins with zeros",)),
    "Analyze 7.5": (analyze, {}, ("keeps no position",)),
    "sform and qform mirrored": (lambda f: edited(nifti(f / "a.nii", body()), srow_y=[0, -1.2, 0, 20]), {}, ("turn the axes differently",)),
    "None": (lambda f: None, {}, ("None is no path",)),
    "a number": (lambda f: 7, {}, ("7 is no path",)),
    "an empty name": (lambda f: "", {}, ("no path",)),
    "a device": (lambda f: "/dev/null", {}, ("no file and no folder",)),
    "a slope of zero": (lambda f: nifti(f / "a.nii", body()), dict(rescale=(0, 5)), ("slope other than 0",)),
}

NOTED = { # read, and what was done stands in `notes` or `choice`
    "one missing slice": (gap(1), {}, "1 missing slice interpolated, between 122.5 and 127.5 mm"),
    "three missing slices, allowed": (gap(3), dict(fill_gaps=True), "3 missing slices interpolated"),
    "one damaged slice in the middle": (emptied(1, slice(12, 13)), {}, "1 of 30 files cannot be read"),
    "an emptied end, allowed": (emptied(14, slice(16, None)), dict(allow_partial=True), "heights outside of 100.0 to 137.5 mm were not seen"),
    "image numbers that are all one": (lambda f: series(f / "s", order=[1] * 30), {}, "no image numbers: 30 images bear 1 different"),
    "sform and qform 30 mm apart": (forms(z=30), {}, "differ by up to 30.0 mm, the sform is used"),
    "two series": (two_series(SeriesNumber=5, ConvolutionKernel="B70f"), {}, "series 4 (Thorax) chosen from 2 series: axial, original, 30 slices of 2.5 mm"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case, tmp_path):
    make, arguments, says = REFUSED[case]
    with pytest.raises(InputError) as e: load_volume(make(tmp_path), **arguments)
    message = str(e.value)
    assert "\n" not in message and len(message) < 500 and "np." not in message and "someone else" not in message
    for s in says: assert s in message, message


@pytest.mark.parametrize("case", NOTED)
def test_read_and_noted(case, tmp_path, recwarn):
    make, arguments, says = NOTED[case]
    volume = load_volume(make(tmp_path), **arguments)
    assert says in " ".join((volume.choice, *volume.notes)), (volume.choice, volume.notes)
    assert not [w for w in recwarn if "pydicom" in str(w.filename)]


def test_each_acquisition_can_be_read(tmp_path):
    for k, make in enumerate((two_acquisitions(0, AcquisitionNumber=2), two_acquisitions(1.25, AcquisitionNumber=1))):
        (tmp_path / str(k)).mkdir()
        path = make(tmp_path / str(k))
        first, second = (load_volume(path, acquisition=n) for n in (1, 2))
        np.testing.assert_array_equal(first.array, ras(HU))
        np.testing.assert_array_equal(second.array, ras(HU + np.int16(5)))
        assert first.image_numbers.tolist() == ORDER and second.image_numbers.tolist() == [100 + n for n in ORDER]


def test_parts_of_a_body_are_no_second_acquisition(tmp_path):
    "A thorax and, below it, an abdomen: two acquisition numbers, one scan."
    write_series(tmp_path / "s", HU, order=ORDER, AcquisitionNumber=[1 + (k >= 15) for k in range(30)])
    np.testing.assert_array_equal(load_volume(tmp_path / "s").array, ras(HU))


def test_equal_image_numbers_give_no_image_number(tmp_path):
    volume = load_volume(series(tmp_path / "s", order=[1] * 30))
    assert volume.image_numbers is None and volume.image_number_at(110) is None


def test_a_volume_knows_its_series(tmp_path):
    volume = load_volume(series(tmp_path / "s", FrameOfReferenceUID="1.2.5"))
    assert (volume.series_number, volume.series_uid, volume.study_uid, volume.frame_uid) == (4, "1.2.3.4", "1.2.3", "1.2.5")
    assert load_volume(nifti(tmp_path / "a.nii", body())).series_number is None


def test_frames_that_the_header_lacks(tmp_path):
    series(tmp_path / "s")
    ds = pydicom.dcmread(tmp_path / "s/003.dcm")
    ds.NumberOfFrames, ds.PerFrameFunctionalGroupsSequence = 4, [pydicom.Dataset()] * 3
    ds.save_as(tmp_path / "a.dcm")
    with pytest.raises(InputError, match="describes 3 of 4 frames"): load_volume(tmp_path / "a.dcm")


# ---- the choice

KINDS = { # what stands beside the soft series of 30 slices, 2.5 mm: it must not be taken
    "lung kernel, three times as many": dict(ConvolutionKernel="B70f", n=90, step=0.8),
    "lung by its description": dict(SeriesDescription="Thorax LUNG 1.0", n=90, step=0.8),
    "a projection": dict(ImageType="DERIVED\\SECONDARY\\MIP", n=40, step=1.8),
    "a short one": dict(ConvolutionKernel="B30f", n=12, step=2.5),
    "very thick slices": dict(ConvolutionKernel="B30f", n=8, step=9.0),
    "a scout by its description": dict(SeriesDescription="Topogram 0.6", n=90, step=0.8),
}


@pytest.mark.parametrize("order", [(4, 5), (5, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_radiologists_choice(kind, order, tmp_path):
    more = dict(KINDS[kind])
    n, step = more.pop("n"), more.pop("step")
    write_series(tmp_path / "a", HU, order=ORDER, ConvolutionKernel="B30f", SeriesNumber=order[0])
    write_series(tmp_path / "b", np.resize(HU, (n, *HU.shape[1:])), [(-30.5, -20.25, 100 + step * k) for k in range(n)], SeriesInstanceUID="1.2.3.5", SeriesNumber=order[1], **more)
    images, damaged = read_headers(tmp_path)
    assert choose_series(images)[0][0].series_uid == "1.2.3.4" and not damaged
    table = series_table(tmp_path)
    assert table.use[table.uid == "1.2.3.4"].item() == "chosen" and (table.use == "chosen").sum() == 1


def test_coverage_comes_before_the_kernel(tmp_path):
    write_series(tmp_path / "a", HU, order=ORDER, ConvolutionKernel="B70f")
    write_series(tmp_path / "b", HU[:12], order=ORDER[:12], ConvolutionKernel="B30f", SeriesInstanceUID="1.2.3.5", SeriesNumber=5)
    assert choose_series(read_headers(tmp_path)[0])[0][0].series_number == 4


def test_control_characters_of_a_header_are_not_shown(tmp_path):
    volume = load_volume(series(tmp_path / "s", SeriesDescription="Thorax\x1b[2J\x07"))
    assert volume.name.isprintable()
    with pytest.raises(InputError) as e: load_volume(tmp_path / "s", series="\x1b[2J")
    assert str(e.value).isprintable()


# ---- geometry

@pytest.mark.parametrize("mm,straight", [(0.0, True), (1.2, True), (1.3, False), (7.0, False)])
def test_straight_is_half_a_voxel_at_the_far_corner(mm, straight, tmp_path):
    "Voxels are 2.5 mm high: 1.25 mm is the limit. The old rule, a thousandth of the largest entry, let 3.7 mm pass in a scan of 512 voxels."
    volume = load_volume(slanted(mm)(tmp_path))
    assert ("tilted" in volume.name) != straight
    wide = np.diag([0.7, 0.7, 1.0, 1])
    wide[2, 0] = 0.0009
    assert core.is_straight(wide, (512, 512, 300)) and not core.is_straight(wide, (2048, 512, 300))


@pytest.mark.parametrize("degrees", [45, 135, 225])
def test_turned_between_two_axes_with_both_forms(degrees, tmp_path):
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    turned = np.diag([1.5, 1.5, 2.5, 1.0])
    turned[:2, :2] = 1.5 * np.array([[c, -s], [s, c]])
    turned[:3, 3] = 10, 20, 105
    volume = load_volume(nifti(tmp_path / "a.nii", body(), turned))
    assert volume.depths_mm[0] == pytest.approx(105) and volume.depths_mm[-1] == pytest.approx(105 + 2.5 * 29)


# ---- HU

def padded(a, kind, value, rng):
    a, (n, m) = a.copy(), a.shape[:2]
    x, y = np.meshgrid(np.linspace(-1, 1, n), np.linspace(-1, 1, m), indexing="ij")
    if kind == "circle": a[np.hypot(x, y) > 1] = value
    if kind == "frame":
        k = rng.integers(2, n // 4)
        a[:k], a[-k:], a[:, :k], a[:, -k:] = [value] * 4
    if kind == "slices": a[:, :, :rng.integers(1, a.shape[2] // 4 + 1)] = value
    return a


def verdict(a, ct=False):
    try: check_values(a, "scan", ct=ct)
    except InputError as e: return str(e)


def test_hu_of_300_phantoms_with_every_padding_and_offset():
    "No false alarm, no miss: 300 in HU, 300 with an offset, 300 that look like MR."
    cohort, wrong, unnamed = PhantomCohort(300, seed=5, spacing=(8.0, 8.0, 10.0)), Counter(), []
    for i in range(300):
        rng, hu = np.random.default_rng(i), np.round(cohort[i].volume.array)
        kind, value = ("none", "circle", "frame", "slices")[i % 4], float(rng.choice([-150, -500, -1000, -1024, -1200, -2000, -3024, 0]))
        offset, mr = int(rng.choice([1024, -1024, 1000, -1000, 8192, 32768, -8192])), 40 * np.sqrt(hu.clip(-1024) + 1024)
        looks = ([mr, mr - 13, mr - 1000], [mr.max() - mr, -mr, mr - 300], [np.abs(hu + 1000) * 0.4 - shift for shift in (13, 300, 450)])[i % 3][i // 3 % 3]
        wrong["false alarm"] += verdict(padded(hu, kind, value, rng), ct=bool(i % 2)) is not None
        said = verdict(padded(hu + offset, kind, value, rng), ct=bool(i % 2)) or ""
        wrong["offset accepted"] += not said
        if f"rescale=(1, {-offset})" not in said.replace("1024", str(abs(offset)) if abs(offset) == 1000 else "1024"): unnamed.append(i)
        wrong["MR taken for CT"] += verdict(padded(looks, kind, value, rng)) is None
    assert not +wrong, wrong
    assert unnamed == [9, 142]                        # fat is a shoulder of their histograms, no peak: refused without naming the offset


@needs_shared
@pytest.mark.parametrize("scan", ["chest_dicom", "abdomen_dicom", "nodule_dicom", "thorax_abdomen/example_ct.nii.gz", "thorax_abdomen/example_ct_sm.nii.gz"])
def test_hu_of_real_scans(scan):
    a = load_volume(SHARED / "data" / scan).array[::2, ::2]
    assert verdict(a) is None and verdict(np.clip(a, -1024, 1000)) is None
    assert "never applied" in verdict(a + 1024) and "applied twice" in verdict(a - 1024)
    hidden = a + 1024
    hidden[:int(0.38 * len(a))] = -1000               # 38 % of padding where air would be
    assert "never applied" in verdict(hidden)
    assert "no CT" in verdict(40 * np.sqrt(a.clip(-1024) + 1024) - 13)


# ---- what Python callers give

ARGUMENTS = {
    "a tensor": (lambda: CTVolume(torch.zeros(4, 4, 4), AFFINE), "a Tensor: convert it"),
    "text": (lambda: CTVolume(np.full((4, 4, 4), "x"), AFFINE), "NumPy array of HU"),
    "nothing": (lambda: CTVolume(np.zeros((0, 4, 4), np.float32), AFFINE), "is empty"),
    "a 3 x 3 affine": (lambda: CTVolume(np.zeros((4, 4, 4), np.float32), AFFINE[:3, :3]), "4 x 4"),
    "NaN": (lambda: CTVolume(np.full((4, 4, 4), np.nan, np.float32), AFFINE), "64 of 64 voxels are not finite"),
    "infinity": (lambda: CTVolume(np.array([[[np.inf, -np.inf]]], np.float32), AFFINE), "2 of 2 voxels"),
    "a depth outside": (lambda: CTVolume(np.zeros((4, 4, 4), np.float32), AFFINE).slice_at(200), "outside of the scan"),
    "a depth that is none": (lambda: CTVolume(np.zeros((4, 4, 4), np.float32), AFFINE).slice_at(float("nan")), "outside of the scan"),
    "a picture outside": (lambda: show_planes(CTVolume(np.zeros((4, 4, 4), np.float32), AFFINE), -900), "outside of the scan"),
    "spacing 0": (lambda: WindowSpec(spacing=(0.75, 0, 3)), "above 0"),
    "spacing NaN": (lambda: WindowSpec(spacing=(0.75, float("nan"), 3)), "above 0"),
    "half voxels": (lambda: WindowSpec(window=(32.5, 32, 32), patch=(8, 8, 4)), "whole voxels"),
    "two numbers": (lambda: WindowSpec(patch=(8, 8)), "3 numbers"),
    "a word": (lambda: WindowSpec(spacing="fine"), "3 numbers"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_are_refused_in_one_line(case):
    make, says = ARGUMENTS[case]
    with pytest.raises(InputError) as e: make()
    assert says in str(e.value) and "\n" not in str(e.value) and "np." not in str(e.value)


def test_a_name_with_dollars_can_be_drawn():
    import matplotlib.pyplot as plt
    figure = plt.figure()
    figure.suptitle(picture_text("costs $a^$ and\x1b"))
    figure.canvas.draw()                              # unescaped: mathtext's ParseFatalException
    plt.close(figure)


# ---- antialias

def test_antialias_averages_and_keeps_the_place():
    for n, a, b in ((300, 1.0, 3.0), (61, 2.0, 3.0), (40, 5.0, 3.0), (512, 0.6, 0.75)):
        touched, w = resample_matrix(n, a, b, -2, 30, antialias=True)
        line = (5.0 + 2 * a * np.arange(n))[touched]
        inner = slice(4, 24)
        np.testing.assert_allclose((w @ line)[inner], (5 + 2 * b * np.arange(-2, 28))[inner], atol=0.2 * a)  # a tenth of a voxel
        np.testing.assert_array_equal(w[:2], 0)
    _, w = resample_matrix(300, 1.0, 3.0, 0, 100, antialias=True)
    assert (w.sum(0)[3:-3] > 0.3).all()               # every thin slice counts alike; without, two of three are skipped
    spec = WindowSpec((3.0, 3.0, 3.0), (16, 16, 8), (4, 4, 2), antialias=True)
    volume = CTVolume(body().astype(np.float32), np.diag([1.0, 1, 1, 1]))
    assert not torch.equal(make_windows(volume, spec=spec).windows, make_windows(volume, spec=WindowSpec(spec.spacing, spec.window, spec.patch)).windows)


# ---- outputs

OUTPUTS = { # what is named for the result -> what is said; s.nii is the input
    "the input": (lambda d: d / "s.nii", "it would be lost"),
    "a symbolic link to it": (lambda d: (d / "l").symlink_to(d / "s.nii") or d / "l", "it would be lost"),
    "a hard link to it": (lambda d: os.link(d / "s.nii", d / "h") or d / "h", "it would be lost"),
    "a file of somebody else": (lambda d: d / "other.txt", "--overwrite"),
    "a folder": (lambda d: d, "is a folder"),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_nothing_is_lost(case, tmp_path):
    for name in ("s.nii", "other.txt"): (tmp_path / name).write_text("the only copy")
    make, says = OUTPUTS[case]
    with pytest.raises(InputError, match=says), write_output(make(tmp_path), tmp_path / "s.nii") as t: t.write_text("result")
    assert all((tmp_path / n).read_text() == "the only copy" for n in ("s.nii", "other.txt"))
    with pytest.raises(InputError, match="lost"): check_output(tmp_path / "s.nii", [tmp_path], overwrite=True) # a file of an input folder


def test_ours_is_replaced_until_somebody_edits_it(tmp_path):
    path = tmp_path / "r.csv"
    with write_output(path) as t: t.write_text("1")
    try: os.getxattr(path, "user.ctvlm")
    except (OSError, AttributeError): pytest.skip("the file system keeps no attributes")
    os.chmod(path, 0o640)
    with write_output(path) as t: t.write_text("2")
    assert path.read_text() == "2" and stat.S_IMODE(path.stat().st_mode) == 0o640
    path.write_text("edited")
    with pytest.raises(InputError, match="changed since"): check_output(path)
    with write_output(path, overwrite=True) as t: t.write_text("3")
    assert path.read_text() == "3"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_devices_pipes_and_links_stay_what_they_are(tmp_path):
    with pytest.raises(InputError, match="no space is left"), write_output("/dev/full") as t: t.write_text("x" * 9)
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode) and stat.S_ISCHR(os.stat("/dev/null").st_mode)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with write_output(pipe) as t: t.write_text("through")
    assert os.read(reader, 99) == b"through" and stat.S_ISFIFO(os.stat(pipe).st_mode)
    os.close(reader)
    (tmp_path / "far").mkdir()
    (tmp_path / "link.txt").symlink_to(tmp_path / "far/real.txt")
    with write_atomically(tmp_path / "link.txt") as t: t.write_text("followed")
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "far/real.txt").read_text() == "followed"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["far", "link.txt", "pipe", "real.txt"]  # nothing is left behind


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EFBIG, "File too large"),
                                   RuntimeError("SafetensorError: I/O error: No space left on device (os error 28)")])
def test_a_full_disk_is_one_line(error, tmp_path):
    with pytest.raises(InputError, match="make room"), write_atomically(tmp_path / "a" / "b") as t:
        t.write_text("half")
        raise error
    assert list((tmp_path / "a").iterdir()) == []


def test_two_writers_do_not_meet(tmp_path):
    with write_atomically(tmp_path / "r") as one, write_atomically(tmp_path / "r") as two:
        assert one != two and one.parent == tmp_path
        one.write_text("1"), two.write_text("2")
    assert [p.name for p in tmp_path.iterdir()] == ["r"]


def test_a_folder_stands_until_the_new_one_is_there(tmp_path, monkeypatch):
    with write_atomically(tmp_path / "f") as t:
        t.mkdir()
        (t / "a").write_text("old")
    with write_atomically(tmp_path / "f") as t:
        t.mkdir()
        (t / "b").write_text("new")
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == ["f", "f/b"]


# ---- a data set

def test_check_says_what_was_left_out(tmp_path):
    (tmp_path / "d").mkdir()
    gap(1)(tmp_path / "d")
    (tmp_path / "d/_SUCCESS").write_bytes(b"")
    table = check_paths(tmp_path / "d", workers=1, quiet=True)
    assert table.status.tolist() == ["ok"] and "1 missing slice" in table.notes[0]
    for f in (tmp_path / "d/s").iterdir(): f.write_bytes(f.read_bytes()[:300])
    assert [p.name for p in find_scans(tmp_path / "d")] == ["s"]             # a folder of damaged files is a scan that is refused, not nothing
    assert "none of its 29 DICOM files" in check_paths(tmp_path / "d", workers=1, quiet=True).reason[0]
