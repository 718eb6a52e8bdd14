"Whatever a file's orientation, spacing, order of axes or type: a marked place comes back at its height within half a voxel, or the file is refused."
import tempfile
from collections import Counter
from pathlib import Path

import nibabel, numpy as np
from hypothesis import given, settings, strategies as st
from scipy.spatial.transform import Rotation

from ctvlm.core import InputError
from ctvlm.preprocessing import load_volume
from test_preprocessing import body, write_series

HU = body((22, 20, 18)).clip(-1024, 300)
SEEN = Counter()
angle = st.one_of(st.sampled_from([0, 90, 180, 270, 45, 135]), st.floats(-180, 180), st.floats(-0.5, 0.5))
spacing = st.tuples(*[st.floats(0.6, 5)] * 3)
mark = st.tuples(*(st.integers(3, n - 4) for n in HU.shape))
alike = settings(max_examples=60, deadline=None, derandomize=True)


def marked(at):
    "The body with a bright cube of 3 x 3 x 3 voxels around `at`."
    a = HU.copy()
    a[tuple(slice(i - 1, i + 2) for i in at)] = 2000
    return a


def check(read, want):
    "`read(array)` writes and loads; the height of what differs is `want(volume)` within half a voxel."
    try: plain, with_mark = read(HU), None
    except InputError as e:
        SEEN[str(e).partition(": ")[2][:30]] += 1
        return
    with_mark = read(None)
    added = np.abs(with_mark.array - plain.array).sum((0, 1))
    height = float((added * plain.depths_mm).sum() / added.sum())
    SEEN["read"] += 1
    assert abs(height - want) <= 0.5 * plain.spacing[2] + 0.02, (height, want, plain.spacing)


@alike
@given(angles=st.tuples(angle, angle, angle), spacing=spacing, order=st.permutations(range(3)), flips=st.tuples(*[st.booleans()] * 3), at=mark,
       shear=st.sampled_from([0, 0, 0.001, 0.01, 0.3]), dtype=st.sampled_from(["i2", "i4", "f4", "f8", ">i2"]), forms=st.sampled_from([(1, 0), (1, 1), (0, 1)]))
def test_nifti(angles, spacing, order, flips, at, shear, dtype, forms):
    turn = np.diag([*spacing, 1.0])
    turn[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ turn[:3, :3]
    if forms == (1, 0): turn[2, 0] += shear                                      # a quaternion has no shear
    turn[:3, 3] = 40, -60, -700
    want = float((turn @ [*at, 1])[2])
    stored = np.zeros((4, 4))
    stored[3, 3] = 1
    for a in range(3): stored[order[a], a], stored[order[a], 3] = (-1, HU.shape[order[a]] - 1) if flips[a] else (1, 0)

    def read(array):
        array = (marked(at) if array is None else array).transpose(order)[tuple(slice(None, None, -1 if f else 1) for f in flips)]
        image = nibabel.Nifti1Image(array.astype(dtype), turn @ stored)
        image.set_data_dtype(dtype)
        image.set_sform(turn @ stored, forms[0])
        image.set_qform(turn @ stored, forms[1])
        with tempfile.TemporaryDirectory() as folder:
            nibabel.save(image, Path(folder) / "a.nii")
            return load_volume(Path(folder) / "a.nii")
    check(read, want)


@settings(alike, max_examples=20)
@given(angles=st.tuples(angle, angle, st.sampled_from([0, 90, 180])), step=st.floats(0.8, 5), spacing=st.tuples(st.floats(0.6, 3), st.floats(0.6, 3)), at=mark, seed=st.integers(0, 99))
def test_dicom(angles, step, spacing, at, seed):
    row, column, normal = Rotation.from_euler("xyz", angles, degrees=True).as_matrix().T
    places = [np.array((40, -60, -700)) + k * step * normal for k in range(HU.shape[2])]
    want = float((places[at[2]] + at[0] * spacing[1] * row + at[1] * spacing[0] * column)[2])
    numbers = (np.random.default_rng(seed).permutation(len(places)) + 1).tolist()

    def read(array):
        with tempfile.TemporaryDirectory() as folder:
            return load_volume(write_series(Path(folder) / "s", (marked(at) if array is None else array).T, places, (*row, *column), spacing, order=numbers), series=4)
    check(read, want)


def test_most_were_read():
    "A reader that refuses everything would pass the two tests above."
    assert SEEN["read"] > 0.8 * sum(SEEN.values()), SEEN
