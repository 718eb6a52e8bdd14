"Volumes are read right or refused with the reason; windows agree with MONAI and with the published preprocessing; the way back to mm."
import gzip, os, shutil, zipfile
from itertools import permutations, product
from pathlib import Path

import nibabel, numpy as np, pydicom, pytest, torch
from hypothesis import given, settings, strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, DeflatedExplicitVRLittleEndian, EnhancedCTImageStorage, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid

from ctvlm import guards, preprocessing, reading
from ctvlm.core import CTVolume, InputError
from ctvlm.preprocessing import (WindowSpec, apply_matrices, check_paths, check_values, find_scans, load_volume, make_windows, place_windows,
                                 resample_matrix, resampled_length)

SHARED = Path(__file__).resolve().parents[2] / "shared"
needs_shared = pytest.mark.skipif(not (SHARED / "data").exists(), reason="needs ../shared")
TINY = WindowSpec((3.0, 3.0, 3.0), (32, 32, 32), (8, 8, 4))


def body(shape=(40, 36, 30), seed=0):
    "Asymmetric int16 HU with air, lung, fat, soft tissue and bone, `(x, y, z)`."
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    hu = np.full(shape, -1000.0)
    hu[x**2 / 0.8 + y**2 / 0.6 < 0.9] = -80
    hu[x**2 / 0.7 + y**2 / 0.5 < 0.8] = 45
    hu[(x - 0.35)**2 + y**2 + (z - 0.3)**2 < 0.12] = -850
    hu[(x + 0.3)**2 + (y + 0.4)**2 < 0.03] = 600
    return np.clip(np.round(hu + np.random.default_rng(seed).normal(0, 12, shape)), -1024, 3071).astype(np.int16)


AFFINE = np.array([[1.5, 0, 0, -30], [0, 1.2, 0, -20], [0, 0, 2.5, 105], [0, 0, 0, 1.0]])


def nifti(path, array, affine=AFFINE, sform=1, qform=1):
    image = nibabel.Nifti1Image(array, affine)
    image.set_sform(affine, sform)
    image.set_qform(affine, qform)
    nibabel.save(image, path)
    return path


def refused(path, *says, **kw):
    "The message with which `path` is refused: one line that holds all of `says`."
    with pytest.raises(InputError) as e: load_volume(path, **kw)
    message = str(e.value)
    assert "\n" not in message and len(message) < 500
    for s in says: assert s in message, message
    return message


# ---- DICOM written here

def header(k, position, orientation, spacing, shape, **more):
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = CTImageStorage, generate_uid(), "CT"
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SeriesNumber, ds.SeriesDescription = "1.2.3", "1.2.3.4", 4, "Thorax"
    ds.InstanceNumber, ds.ImageType = k, ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.ImagePositionPatient, ds.ImageOrientationPatient, ds.PixelSpacing = [f"{p:.6g}" for p in position], [f"{o:.8g}" for o in orientation], list(spacing)
    ds.Rows, ds.Columns = shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 1, "MONOCHROME2", 16, 16, 15, 0
    ds.RescaleSlope, ds.RescaleIntercept = 1, -1024
    for key, value in more.items(): setattr(ds, key, value)
    return ds


def save(ds, path, pixels, syntax=ExplicitVRLittleEndian):
    ds.PixelData = np.ascontiguousarray(pixels).astype(">u2" if syntax == ExplicitVRBigEndian else "<u2").tobytes()
    ds["PixelData"].VR = "OW"
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID, ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = syntax, ds.SOPClassUID, ds.SOPInstanceUID
    ds.save_as(path, enforce_file_format=True)
    return path


def write_series(folder, hu, positions=None, orientation=(1, 0, 0, 0, 1, 0), spacing=(1.2, 1.5), order=None, syntax=ExplicitVRLittleEndian, **more):
    "One file per slice of `hu (z, y, x)`; files are named in an order of their own."
    folder.mkdir(parents=True, exist_ok=True)
    if positions is None: positions = [(-30.5, -20.25, 100 + 2.5 * k) for k in range(len(hu))]
    names = np.random.default_rng(1).permutation(len(hu))
    for k, (plane, position) in enumerate(zip(hu, positions)):
        extra = {key: value[k] if isinstance(value, list) else value for key, value in more.items()}
        ds = header(len(hu) - k if order is None else order[k], position, orientation, spacing, plane.shape, **extra)
        save(ds, folder / f"{names[k]:03d}.dcm", (plane.astype(np.int32) - int(ds.RescaleIntercept)) // int(ds.RescaleSlope), syntax)
    return folder


def by_sitk(folder):
    "The series as SimpleITK reads it, turned to RAS: array, affine."
    sitk = pytest.importorskip("SimpleITK")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return preprocessing.reorient(sitk.GetArrayFromImage(image).T, np.diag([-1, -1, 1, 1]) @ affine)


@pytest.fixture(scope="module")
def hu(): return body().transpose(2, 1, 0)  # (z, y, x)


def ras(hu): return hu.T[::-1, ::-1]  # what an axial LPS series is in RAS


# ---- agreement

@needs_shared
def test_windows_agree_with_the_published_preprocessing():
    golden = np.load(SHARED / "golden/preprocessing/example_ct.npz")
    w = make_windows(load_volume(SHARED / "data/thorax_abdomen/example_ct.nii.gz"), fit="crop")
    assert w.grid.tolist() == golden["grid"].tolist()
    np.testing.assert_allclose(w.windows[:, 0, ::8, ::8, ::4].float(), golden["windows_every_8_8_4"].astype(np.float32), atol=2e-3)
    np.testing.assert_allclose(w.windows.float().mean((1, 2, 3, 4)), golden["mean"], atol=1e-4)
    np.testing.assert_allclose(w.affine, golden["affine_after_spacing"], atol=1e-6)


@needs_shared
def test_real_series_agrees_with_sitk():
    volume = load_volume(SHARED / "data/chest_dicom")
    array, affine = by_sitk(SHARED / "data/chest_dicom")
    np.testing.assert_array_equal(volume.array, array)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-4)
    assert "series 4" in volume.name and "148 images" in volume.name
    assert volume.image_numbers.tolist() == list(range(148, 0, -1)) and volume.depths_mm[-1] == pytest.approx(-52.1)


@needs_shared
def test_segmentation_is_no_ct():
    refused(SHARED / "data/thorax_abdomen/example_seg.nii.gz", "no CT")


@pytest.mark.parametrize("fit", ["pad", "crop", ("crop", "crop", "pad")])
@pytest.mark.parametrize("antialias", [False, True])
def test_planes_are_tiles(fit, antialias):
    "What a card computes in three large products, here on a CPU; voxels in any memory order and kind."
    hu = np.random.default_rng(0).integers(-1500, 1500, (70, 60, 90))
    for spec in (WindowSpec((2., 2., 4.), (32, 32, 8), (8, 8, 2), antialias), WindowSpec((0.9, 1.1, 1.), (32, 32, 32), (8, 8, 4), antialias)):
        for array in (hu.astype(np.float32), np.asfortranarray(hu.astype(np.int16)), hu.astype(np.float32)[::-1, :, ::-1]):
            volume = CTVolume(array, np.diag([1.5, 1.4, 2.5, 1.]))
            tiles = make_windows(volume, fit, spec)
            planes = make_windows(volume, fit, spec, voxels=preprocessing.to_card(array, "cpu"))
            torch.testing.assert_close(planes.windows, tiles.windows, rtol=0, atol=5e-4)   # float16 of [0, 1]
            assert torch.equal(planes.patch_mask, tiles.patch_mask) and tiles.windows.float().std() > 0.1


@pytest.mark.parametrize("shape,spacing", [((150, 140, 40), (0.9, 0.85, 2.0)), ((70, 75, 60), (3.0, 2.5, 5.0)), ((160, 130, 33), (0.75, 0.75, 3.0)), ((140, 131, 150), (0.7, 0.8, 0.8))])
def test_windows_agree_with_monai(shape, spacing):
    pytest.importorskip("monai")
    from monai.data import MetaTensor
    from monai.transforms import CenterSpatialCrop, GridPatch, ResizeWithPadOrCrop, Spacing
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -101.3, -87.1, 455.7
    hu = np.random.default_rng(0).uniform(-1300, 1300, shape).astype(np.float32)
    scaled = MetaTensor(torch.from_numpy((np.clip(hu, -1000, 1000) + 1000) / 2000)[None], affine=torch.from_numpy(affine))
    want = Spacing((0.75, 0.75, 3.0), mode="bilinear")(scaled)
    ours = torch.from_numpy((np.clip(hu, -1000, 1000) + 1000) / 2000)
    matrices = [torch.from_numpy(resample_matrix(n, a, b, 0, resampled_length(n, a, b))[1]) for n, a, b in zip(shape, spacing, (0.75, 0.75, 3.0))]
    ours = torch.einsum("xyz,Xx,Yy,Zz->XYZ", ours, *matrices)
    assert ours.shape == want.shape[1:]
    torch.testing.assert_close(ours, torch.as_tensor(want.array[0], dtype=torch.float32), atol=1e-5, rtol=0)
    size = [max(n // w, 1) * w for n, w in zip(want.shape[1:], (128, 128, 32))]
    cropped = GridPatch((128, 128, 32))(ResizeWithPadOrCrop(size)(CenterSpatialCrop(size)(want)))
    w = make_windows(CTVolume(hu, affine), fit="crop")
    torch.testing.assert_close(w.windows.float(), torch.as_tensor(cropped.array).float(), atol=5e-4, rtol=0)


def test_length_is_monais_at_halves_too():
    monai = pytest.importorskip("monai.data.utils")
    for n, a, b in product((2, 3, 4, 7, 16, 28, 31, 148, 512), (0.375, 0.625, 0.75, 0.9765625, 1.25, 1.5, 2.5, 5.0), (0.75, 1.5, 3.0)):
        shape, _ = monai.compute_shape_offset((n,) * 3, np.diag([a, a, a, 1]), np.diag([b, b, b, 1]), False)
        assert resampled_length(n, a, b) == shape[0], (n, a, b)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.floats(0.3, 6), st.floats(0.5, 4), st.integers(-9, 20), st.integers(1, 40))
def test_rows_of_the_matrix_are_linear_interpolation(n, a, b, start, length):
    line = np.random.default_rng(n).normal(size=n)
    touched, weights = resample_matrix(n, a, b, start, length)
    m, i = resampled_length(n, a, b), np.arange(start, start + length)
    want = np.where((i >= 0) & (i < m), np.interp(i * b / a, np.arange(n), line), 0)
    np.testing.assert_allclose(weights.astype(float) @ line[touched], want, atol=1e-5)


# ---- orders and the way back

def test_all_48_orders_and_flips(tmp_path):
    volume = CTVolume(body().astype(np.float32), AFFINE)
    first = make_windows(volume, spec=TINY)
    assert first.valid_bins.any() and not np.allclose(volume.array, volume.array[::-1])
    for order in permutations(range(3)):
        for signs in product((1, -1), repeat=3):
            array = volume.array.transpose(order)[tuple(slice(None, None, s) for s in signs)]
            turn = np.zeros((4, 4))
            turn[3, 3] = 1
            for a in range(3): turn[order[a], a], turn[order[a], 3] = signs[a], array.shape[a] - 1 if signs[a] < 0 else 0
            again = load_volume(nifti(tmp_path / "turned.nii", array.astype(np.int16), volume.affine @ turn))
            np.testing.assert_array_equal(again.array, volume.array)
            np.testing.assert_allclose(again.affine, volume.affine, atol=1e-4)
            w = make_windows(again, spec=TINY)
            torch.testing.assert_close(w.windows, first.windows, atol=1e-3, rtol=0)
            np.testing.assert_allclose(w.bin_depths_mm, first.bin_depths_mm, atol=1e-3)


def test_a_planted_lesion_comes_back_to_its_millimetre_and_image_number(tmp_path, hu):
    planted = hu.copy()
    planted[15:20] = 1500  # around z = 100 + 2.5 * 17, image number 30 - 17
    for fit in ("crop", "pad"):
        for spec in (TINY, WindowSpec()):
            volume = load_volume(write_series(tmp_path / f"{fit}{spec.patch[0]}", planted))
            w = make_windows(volume, fit, spec)
            D, p = len(w.bin_depths_mm), spec.patches
            bright = (w.windows[:, 0].float() - 0.85).clamp(min=0).view(*w.grid, *spec.window).permute(2, 5, 0, 1, 3, 4).flatten(2).mean(2).flatten()  # per slice, from the feet
            found = float((torch.arange(len(bright)) * bright).sum() / bright.sum())
            depth = w.affine[2, 3] + spec.spacing[2] * found
            assert depth == pytest.approx(142.5, abs=0.8)
            b = (found - (spec.patch[2] - 1) / 2) / spec.patch[2]
            assert w.depth_to_bin(depth) == pytest.approx(b) and w.bin_to_depth(b) == pytest.approx(depth)
            assert volume.image_number_at(depth) == 13 and D == int(w.grid[2]) * p[2]


# ---- DICOM

def test_written_series_agrees_with_sitk(tmp_path, hu):
    volume = load_volume(write_series(tmp_path / "s", hu))
    array, affine = by_sitk(tmp_path / "s")
    np.testing.assert_array_equal(volume.array, array)
    np.testing.assert_array_equal(volume.array, ras(hu))
    np.testing.assert_allclose(volume.affine, affine, atol=1e-4)
    assert volume.image_numbers.tolist() == list(range(30, 0, -1)) and volume.array.dtype == np.float32


def test_order_is_by_position_not_by_number_or_name(tmp_path, hu):
    numbers = np.random.default_rng(5).permutation(30) + 1
    volume = load_volume(write_series(tmp_path / "s", hu, order=numbers))
    np.testing.assert_array_equal(volume.array, ras(hu))
    assert volume.image_numbers.tolist() == numbers.tolist()
    again = load_volume(write_series(tmp_path / "r", hu[::-1], [(-30.5, -20.25, 100 + 2.5 * k) for k in range(29, -1, -1)], order=numbers[::-1]))
    np.testing.assert_array_equal(again.array, volume.array)
    assert again.image_numbers.tolist() == volume.image_numbers.tolist()


@pytest.mark.parametrize("orientation,step", [((0, 1, 0, 0, 0, -1), (2.5, 0, 0)), ((1, 0, 0, 0, 0, -1), (0, 2.5, 0)), ((-1, 0, 0, 0, -1, 0), (0, 0, 2.5)), ((1, 0, 0, 0, -1, 0), (0, 0, 2.5))])
def test_other_planes_agree_with_sitk(tmp_path, hu, orientation, step):
    positions = [np.array((-30, -20, 100)) + np.array(step) * k for k in range(len(hu))]
    volume = load_volume(write_series(tmp_path / "s", hu, positions, orientation), series=4)
    array, affine = by_sitk(tmp_path / "s")
    np.testing.assert_array_equal(volume.array, array)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-4)
    assert (volume.image_numbers is None) == (step[2] == 0)


def test_slope_and_intercept_per_slice(tmp_path, hu):
    even = hu // 4 * 4
    write_series(tmp_path / "s", even, RescaleSlope=[1 + k % 2 for k in range(30)], RescaleIntercept=[-1024 - 4 * (k % 3) for k in range(30)])
    np.testing.assert_array_equal(load_volume(tmp_path / "s").array, ras(even))


def transcode(path, syntax):
    gdcm = pytest.importorskip("gdcm")
    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()


@pytest.mark.parametrize("syntax", ["JPEGLosslessProcess14", "JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEGLSNearLossless", "JPEG2000Lossless", "JPEG2000", "RLELossless"])
@pytest.mark.parametrize("bits", [12, 16])
def test_compressed_transfer_syntaxes(tmp_path, hu, syntax, bits):
    files = sorted(write_series(tmp_path / "s", hu[:8], BitsStored=bits, HighBit=bits - 1).iterdir())
    for f in files: transcode(f, syntax)
    uid = pydicom.dcmread(files[0]).file_meta.TransferSyntaxUID
    assert uid.is_compressed and uid.is_encapsulated
    np.testing.assert_array_equal(load_volume(tmp_path / "s").array, ras(hu[:8]))


@pytest.mark.parametrize("syntax", [DeflatedExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_uncompressed_and_deflated_transfer_syntaxes(tmp_path, hu, syntax):
    np.testing.assert_array_equal(load_volume(write_series(tmp_path / "s", hu[:8], syntax=syntax)).array, ras(hu[:8]))


def test_signed_pixels_and_pydicoms_rle(tmp_path, hu):
    from pydicom.uid import RLELossless
    for f in write_series(tmp_path / "s", hu, RescaleIntercept=0, PixelRepresentation=1).iterdir():
        ds = pydicom.dcmread(f)
        ds.compress(RLELossless)
        ds.save_as(f)
    for workers in (1, 2): np.testing.assert_array_equal(load_volume(tmp_path / "s", workers=workers).array, ras(hu))


def test_damaged_pixels_are_refused_from_worker_processes_too(tmp_path, hu):
    from pydicom.uid import RLELossless
    files = sorted(write_series(tmp_path / "s", np.concatenate([hu, hu])).iterdir())
    for f in files:
        ds = pydicom.dcmread(f)
        ds.compress(RLELossless)
        ds.save_as(f)
    files[3].write_bytes(files[3].read_bytes()[:-900])
    for workers in (1, 3): refused(tmp_path / "s", "cannot be decoded", files[3].name, "copy the file again", workers=workers)


def test_enhanced_multi_frame(tmp_path, hu):
    ds = header(1, (0, 0, 0), (1, 0, 0, 0, 1, 0), (1, 1), hu.shape[1:], SOPClassUID=EnhancedCTImageStorage, NumberOfFrames=len(hu))
    for tag in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept"): del ds[tag]

    def group(**values):
        item = Dataset()
        for k, v in values.items(): setattr(item, k, v)
        return [item]
    shared = Dataset()
    shared.PixelMeasuresSequence = group(PixelSpacing=[1.2, 1.5], SliceThickness=2.5)
    shared.PlaneOrientationSequence = group(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    ds.SharedFunctionalGroupsSequence, frames = [shared], []
    order = np.random.default_rng(2).permutation(len(hu))  # frames lie in any order
    for k in order:
        f = Dataset()
        f.PlanePositionSequence = group(ImagePositionPatient=[-30.5, -20.25, 100 + 2.5 * int(k)])
        f.PixelValueTransformationSequence = group(RescaleSlope=1, RescaleIntercept=-1030 - int(k), RescaleType="HU")
        frames.append(f)
    ds.PerFrameFunctionalGroupsSequence = frames
    save(ds, tmp_path / "enhanced.dcm", np.stack([hu[k].astype(int) + 1030 + k for k in order]))
    volume = load_volume(tmp_path / "enhanced.dcm")
    np.testing.assert_array_equal(volume.array, ras(hu))
    np.testing.assert_allclose(volume.depths_mm, 100 + 2.5 * np.arange(30))
    assert volume.image_numbers.tolist() == (np.argsort(order) + 1).tolist()
    (tmp_path / "folder").mkdir()
    shutil.copy(tmp_path / "enhanced.dcm", tmp_path / "folder" / "IM0001")
    np.testing.assert_array_equal(load_volume(tmp_path / "folder").array, volume.array)


def test_series_are_chosen_and_named(tmp_path, hu):
    write_series(tmp_path / "s/a", hu)
    write_series(tmp_path / "s/b", hu[:20], SeriesInstanceUID="1.2.3.5", SeriesNumber=7, SeriesDescription="lower")
    write_series(tmp_path / "s/c", np.concatenate([hu, hu]), [(-30, -20 + 1.5 * k, 200) for k in range(60)], (1, 0, 0, 0, 0, -1), SeriesInstanceUID="1.2.3.6", SeriesNumber=9)
    write_series(tmp_path / "s/d", hu[:1], SeriesInstanceUID="1.2.3.7", SeriesNumber=1, ImageType="ORIGINAL\\PRIMARY\\LOCALIZER")
    (tmp_path / "s/readme.txt").write_text("not DICOM")
    volume = load_volume(tmp_path / "s")
    assert volume.array.shape[2] == 30 and "series 4 (Thorax), 30 images, chosen from 4 series" in volume.name
    assert load_volume(tmp_path / "s", series=7).array.shape[2] == 20
    assert load_volume(tmp_path / "s", series="1.2.3.5").array.shape[2] == 20
    assert load_volume(tmp_path / "s", series=9).array.shape == (40, 60, 36)  # coronal, where asked for
    refused(tmp_path / "s", "no series 3", "1, 4, 7, 9", series=3)
    refused(tmp_path / "s", "localizers", series=1)


def test_duplicates_are_dropped_and_two_acquisitions_refused(tmp_path, hu):
    folder = write_series(tmp_path / "s", hu)
    shutil.copy(folder / "003.dcm", folder / "again.dcm")
    ds = pydicom.dcmread(folder / "005.dcm")
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.save_as(folder / "new_uid.dcm")
    np.testing.assert_array_equal(load_volume(folder).array, ras(hu))
    write_series(tmp_path / "s/second", hu[:4] + 30, order=[50, 51, 52, 53])
    refused(folder, "several acquisitions", "mm")


def test_one_missing_slice_is_bridged_and_two_are_refused(tmp_path, hu):
    positions = [(-30.5, -20.25, 100 + 2.5 * k) for k in range(30)]
    keep = [k for k in range(30) if k != 11]
    volume = load_volume(write_series(tmp_path / "one", hu[keep], [positions[k] for k in keep]))
    assert "interpolated" in volume.name and volume.array.shape[2] == 30
    np.testing.assert_array_equal(np.delete(volume.array, 11, 2), np.delete(ras(hu), 11, 2))
    np.testing.assert_allclose(volume.array[:, :, 11], (ras(hu)[:, :, 10] + ras(hu)[:, :, 12]) / 2)
    np.testing.assert_allclose(volume.depths_mm, 100 + 2.5 * np.arange(30))
    keep = [k for k in range(30) if k not in (11, 12)]
    refused(write_series(tmp_path / "two", hu[keep], [positions[k] for k in keep]), "7.50 mm apart, the others 2.50 mm", "export the series again")


def test_unequal_spacing_is_made_even(tmp_path, hu):
    z = 100 + np.concatenate([np.arange(20) * 2.0, 38 + 3.0 * np.arange(1, 11)])
    ramp = np.repeat(np.round(np.interp(z, (z[0], z[-1]), (-900, 400)))[:, None, None], 8, 1).repeat(8, 2).astype(np.int16)
    volume = load_volume(write_series(tmp_path / "s", ramp, [(-30, -20, v) for v in z]))
    assert volume.spacing[2] == pytest.approx(2) and "interpolated" in volume.name
    np.testing.assert_allclose(volume.array[3, 3], np.interp(volume.depths_mm, (z[0], z[-1]), (-900, 400)), atol=1)
    rounded = [(-30, -20, round(100 + 0.625 * k, 1)) for k in range(30)]  # positions given to 0.1 mm are no unequal spacing
    assert "interpolated" not in load_volume(write_series(tmp_path / "r", hu, rounded)).name


def test_gantry_tilt_is_straightened(tmp_path):
    angle, n = np.deg2rad(15), 40
    row, column = np.array([1, 0, 0]), np.array([0, np.cos(angle), -np.sin(angle)])  # LPS
    positions = [np.array([-40, -40, 100 + 2.0 * k]) for k in range(n)]              # the table moves along z, not along the normal

    def world(p): return -300 + 400 * np.sin(p[..., 0] / 15) + 300 * np.cos(p[..., 1] / 18) * np.sin(p[..., 2] / 12)
    j, i = np.meshgrid(np.arange(50), np.arange(54), indexing="ij")
    planes = np.stack([world(p + 1.5 * i[..., None] * row + 1.6 * j[..., None] * column) for p in positions])
    volume = load_volume(write_series(tmp_path / "s", np.round(planes).astype(np.int16), positions, (*row, *column), (1.6, 1.5)))
    assert "tilted grid resampled" in volume.name and len(volume.image_numbers) == volume.array.shape[2]
    x, y, z = np.meshgrid(*(volume.affine[a, 3] + volume.affine[a, a] * np.arange(m) for a, m in enumerate(volume.array.shape)), indexing="ij")
    want = world(np.stack([-x, -y, z], -1))
    inside = np.s_[5:-5, 14:-14, 16:-16]
    assert np.abs(volume.array - want)[inside].max() < 12  # linear interpolation of waves, rounded HU
    middle = volume.array.shape[2] // 2
    assert abs(volume.image_numbers[middle] - 20) <= 2


def test_drifting_positions_are_refused(tmp_path, hu):
    positions = [(-30 + 4 * (k == 9), -20, 100 + 2.5 * k) for k in range(30)]
    refused(write_series(tmp_path / "s", hu, positions), "beside the line")


def test_other_modality_colours_and_images_without_place(tmp_path, hu):
    refused(write_series(tmp_path / "mr", hu, Modality="MR"), "modality MR, expected CT")
    folder = write_series(tmp_path / "rgb", hu[:3])
    for f in folder.iterdir():
        ds = pydicom.dcmread(f)
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration, ds.BitsAllocated, ds.BitsStored, ds.HighBit = 3, "RGB", 0, 8, 8, 7
        ds.PixelData = bytes(36 * 40 * 3)
        ds.save_as(f)
    refused(folder, "colours (3 samples per pixel), a CT has 1")
    folder = write_series(tmp_path / "nowhere", hu[:3])
    for f in folder.iterdir():
        ds = pydicom.dcmread(f)
        del ds.ImagePositionPatient
        ds.save_as(f)
    refused(folder, "0 of 3 images say where they lie")
    refused(write_series(tmp_path / "single", hu[:1]), "1 image, a volume has at least 2")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no DICOM image")


def test_files_without_preamble_and_broken_neighbours(tmp_path, hu):
    folder = write_series(tmp_path / "s", hu, syntax=ImplicitVRLittleEndian)
    f = folder / "004.dcm"
    raw = f.read_bytes()
    length = int.from_bytes(raw[140:144], "little")  # of the file's meta group, after its own 12 bytes
    f.write_bytes(raw[144 + length:])                # the bare data set, as old archives keep it
    (folder / "thumbs.dcm").write_bytes(b"nonsense")
    (folder / "zero.dcm").write_bytes(b"")
    refused(folder, "2 of 32 files cannot be read", "thumbs.dcm, zero.dcm", "further than 100.0 to 172.5 mm", "--allow-partial")
    volume = load_volume(folder, allow_partial=True)
    np.testing.assert_array_equal(volume.array, ras(hu))
    assert len(volume.notes) == 1 and "heights outside of 100.0 to 172.5 mm were not seen" in volume.notes[0]


# ---- zip and the other files

def test_zip(tmp_path, hu):
    folder = write_series(tmp_path / "s", hu)
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as z:
        for f in folder.iterdir(): z.write(f, f"study/series/{f.name}")
    volume = load_volume(tmp_path / "s.zip")
    np.testing.assert_array_equal(volume.array, ras(hu))
    assert volume.name.startswith("s.zip, series 4")
    (tmp_path / "cut.zip").write_bytes((tmp_path / "s.zip").read_bytes()[:5000])
    refused(tmp_path / "cut.zip", "cannot be unpacked")


@pytest.mark.parametrize("name", ["../out.dcm", "a/../../out.dcm", "/etc/out.dcm", "C:\\out.dcm", "..\\out.dcm"])
def test_zip_does_not_leave_its_folder(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as z: z.writestr(name, b"x")
    refused(tmp_path / "bad.zip", "outside the archive's own folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.zip"]


def test_zip_with_a_symbolic_link(tmp_path):
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as z: z.writestr(link, "/etc")
    refused(tmp_path / "bad.zip", "symbolic link")


@pytest.mark.parametrize("ends", [".nrrd", ".mha"])
def test_itk_files(tmp_path, hu, ends):
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.GetImageFromArray(hu)
    image.SetSpacing((1.5, 1.2, 2.5))
    image.SetOrigin((-30.5, -20.25, 100))
    sitk.WriteImage(image, str(tmp_path / f"scan{ends}"), useCompression=True)
    volume = load_volume(tmp_path / f"scan{ends}")
    np.testing.assert_array_equal(volume.array, ras(hu))
    np.testing.assert_allclose(volume.affine, load_volume(write_series(tmp_path / "s", hu)).affine, atol=1e-4)
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 5, 6, 3), np.uint8), isVector=True), str(tmp_path / f"rgb{ends}"))
    refused(tmp_path / f"rgb{ends}", "3 numbers in each voxel, a CT holds 1")
    (tmp_path / f"cut{ends}").write_bytes((tmp_path / f"scan{ends}").read_bytes()[:3000])
    refused(tmp_path / f"cut{ends}", "again")


def test_rad_chest_ct(tmp_path):
    hu = body()
    np.savez_compressed(tmp_path / "trn00001.npz", ct=hu.transpose(2, 1, 0)[::-1, ::-1, ::-1])  # inferior, posterior, left
    volume = load_volume(tmp_path / "trn00001.npz")
    np.testing.assert_array_equal(volume.array, hu)
    assert volume.spacing == pytest.approx((0.8, 0.8, 0.8)) and volume.depths_mm[0] == pytest.approx(0)
    np.savez(tmp_path / "other.npz", volume=hu)
    refused(tmp_path / "other.npz", "no array 'ct'")
    np.savez(tmp_path / "object.npz", ct=np.array([[[{}, 1], [2, 3]]] * 2, dtype=object))
    refused(tmp_path / "object.npz", "holds object")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "trn00001.npz").read_bytes()[:3000])
    refused(tmp_path / "cut.npz", "cannot be read")


def test_unknown_and_absent_files(tmp_path):
    (tmp_path / "scan.pkl").write_bytes(b"\x80\x04")
    refused(tmp_path / "scan.pkl", "none of NIfTI")
    refused(tmp_path / "nothing.nii.gz", "does not exist")


# ---- guards, one by one

def test_nifti_types_and_scales(tmp_path):
    hu = body()
    for dtype in (np.int16, np.int32, np.float32, np.float64):
        np.testing.assert_array_equal(load_volume(nifti(tmp_path / "a.nii.gz", hu.astype(dtype))).array, hu)
    image = nibabel.Nifti1Image((hu + 1024).astype(np.uint16), AFFINE)
    image.header.set_slope_inter(1, -1024)
    nibabel.save(image, tmp_path / "scaled.nii.gz")
    image = nibabel.load(tmp_path / "scaled.nii.gz")
    np.testing.assert_allclose(load_volume(tmp_path / "scaled.nii.gz").array, hu, atol=0.05)
    big = nibabel.Nifti1Image(hu, AFFINE, nibabel.Nifti1Header(endianness=">"))
    big.set_data_dtype(">i2")
    nibabel.save(big, tmp_path / "big.nii")
    np.testing.assert_array_equal(load_volume(tmp_path / "big.nii").array, hu)
    np.testing.assert_array_equal(load_volume(nifti(tmp_path / "one.nii", hu[..., None])).array, hu)  # a fourth axis of length 1
    nibabel.save(nibabel.Nifti1Pair(hu, AFFINE), tmp_path / "pair.img")
    np.testing.assert_array_equal(load_volume(tmp_path / "pair.hdr").array, hu)


def edited(path, **fields):
    "The NIfTI file at `path` with header fields overwritten, behind nibabel's back."
    raw = bytearray(path.read_bytes())
    head = nibabel.Nifti1Header(bytes(raw[:348]), check=False)
    for k, v in fields.items(): head[k] = v
    raw[:348] = head.binaryblock
    path.write_bytes(raw)
    return path


def test_guard_affine_not_finite(tmp_path):
    refused(edited(nifti(tmp_path / "a.nii", body()), srow_x=[np.nan, 0, 0, -30]), "1 of the affine's 16 numbers are not finite", "DICOM")


def test_guard_affine_singular(tmp_path):
    refused(edited(nifti(tmp_path / "a.nii", body()), srow_z=[0, 0, 0, 100]), "singular")


def test_guard_blank_header(tmp_path):
    refused(nifti(tmp_path / "a.nii.gz", body(), np.eye(4)), "blank", "1 x 1 x 1 mm", "origin at 0 0 0")


def test_guard_orientation_unknown(tmp_path):
    refused(nifti(tmp_path / "a.nii.gz", body(), sform=0, qform=0), "code 0", "orientation")


def test_guard_two_voxel_sizes_or_orientations(tmp_path):
    refused(edited(nifti(tmp_path / "a.nii", body(), qform=0), pixdim=[1, 1, 1, 1, 0, 0, 0, 0]), "pixdim says voxels of 1 x 1 x 1 mm, the affine 1.5 x 1.2 x 2.5")
    refused(edited(nifti(tmp_path / "b.nii", body()), srow_x=[-1.5, 0, 0, 30]), "turn the axes differently")


def test_guard_4d_and_rgb(tmp_path):
    refused(nifti(tmp_path / "a.nii", np.stack([body(), body()], -1)), "4 axes (40 x 36 x 30 x 2)")
    rgb = np.zeros((8, 8, 8), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    refused(nifti(tmp_path / "b.nii", rgb), "colours")
    refused(nifti(tmp_path / "c.nii", body().astype(np.complex64)), "complex64")


def test_guard_smaller_than_a_patch(tmp_path):
    with pytest.raises(InputError, match="4 x 40 x 36 voxels .* a patch needs 16 x 16 x 4"):
        make_windows(CTVolume(body((4, 40, 30)).astype(np.float32), np.diag([0.75, 0.75, 3.6, 1.0])))
    refused(nifti(tmp_path / "a.nii", body()[:, :, :1]), "40 x 36 x 1 voxels", "at least 2")
    nifti(tmp_path / "few.nii", body((3, 40, 30)))
    assert "a patch needs" in check_paths(tmp_path / "few.nii", quiet=True, workers=1).reason[0]


@pytest.mark.parametrize("factor,offset,remedy", [(1, 1024, (1, -1024)), (1, -1024, (1, 1024))])
def test_guard_hu_never_or_twice(tmp_path, factor, offset, remedy):
    path = nifti(tmp_path / "a.nii.gz", body() + np.int16(offset))
    message = refused(path, "never applied" if offset > 0 else "applied twice", f"rescale={remedy}")
    assert message.count("%") >= 2
    volume = load_volume(path, rescale=remedy)
    np.testing.assert_array_equal(volume.array, body())
    assert "rescaled by 1 and" in volume.name


@needs_shared
@pytest.mark.parametrize("offset", [1024, -1024])
def test_guard_hu_on_a_real_scan(offset):
    volume = load_volume(SHARED / "data/thorax_abdomen/example_ct.nii.gz")
    with pytest.raises(InputError, match="never applied" if offset > 0 else "applied twice"): check_values(volume.array + offset, "scan")


def test_guard_modality_of_nifti(tmp_path):
    mr = np.abs(body().astype(np.int32) + 1000)  # nothing below 0, brightest where the signal is
    refused(nifti(tmp_path / "a.nii.gz", (mr * 0.4).astype(np.int16)), "no CT (MR? a mask?)", "below 0")


def test_guard_constant_normalised_impossible_and_not_finite(tmp_path):
    refused(nifti(tmp_path / "a.nii", np.full((20, 20, 20), -1024, np.int16)), "all 8000 voxels are -1024")
    refused(nifti(tmp_path / "b.nii", ((body() + 1000.0) / 2000).astype(np.float32)), "span", "not normalised")
    refused(nifti(tmp_path / "c.nii", body().astype(np.float32) * 50), "possible HU", "rescale=(slope, intercept)")
    holed = body().astype(np.float32)
    holed[3, 4, 5] = np.inf
    holed[3, 4, 6] = np.nan
    refused(nifti(tmp_path / "d.nii", holed), "2 of 43200 voxels are not finite")


def test_guard_truncated_gzip_and_plain(tmp_path):
    whole = nifti(tmp_path / "a.nii.gz", body()).read_bytes()
    for n in (len(whole) // 2, len(whole) - 3):
        (tmp_path / "cut.nii.gz").write_bytes(whole[:n])
        refused(tmp_path / "cut.nii.gz", "download it again")
    (tmp_path / "cut.nii.gz").write_bytes(whole[:30])
    refused(tmp_path / "cut.nii.gz", "download")
    plain = gzip.decompress(whole)
    (tmp_path / "cut.nii").write_bytes(plain[:50000])
    refused(tmp_path / "cut.nii", "cut off", f"of {body().nbytes} bytes")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    (tmp_path / "flipped.nii.gz").write_bytes(flipped)
    refused(tmp_path / "flipped.nii.gz", "again")
    (tmp_path / "noise.nii.gz").write_bytes(os.urandom(5000))
    refused(tmp_path / "noise.nii.gz", "cannot be read as NIfTI")


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32])
def test_guard_wrong_byte_order(tmp_path, dtype):
    refused(nifti(tmp_path / "a.nii", body().astype(dtype).byteswap()), "byte order is wrong")


@pytest.mark.parametrize("spacing,says", [((1500, 1200, 2500), "0.1 to 15"), ((0.0015, 0.0012, 0.0025), "0.1 to 15"), ((0.7, 0.7, 80), "0.1 to 15")])
def test_guard_absurd_spacing(tmp_path, spacing, says):
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = 5
    refused(nifti(tmp_path / "a.nii", body(), affine), says, "mm")


def test_guard_extent(tmp_path):
    refused(nifti(tmp_path / "a.nii", body((40, 36, 300)), np.diag([14.0, 1, 14, 1])), "4200", "at most 3000")


def test_guard_memory_is_asked_for_before_reading(tmp_path, monkeypatch, hu):
    huge = edited(nifti(tmp_path / "a.nii", body()), dim=[3, 3000, 3000, 1000, 1, 1, 1, 1], srow_x=[0.5, 0, 0, 1], srow_y=[0, 0.5, 0, 1], srow_z=[0, 0, 0.5, 1], pixdim=[1, 0.5, 0.5, 0.5, 0, 0, 0, 0])
    monkeypatch.setattr(guards, "free_memory", lambda: 8 * 2**30)
    refused(huge, "needs 50.3 GiB, 8.0 GiB are free")
    monkeypatch.setattr(guards, "free_memory", lambda: 10_000)
    monkeypatch.setattr(reading, "decode_image", None)  # nothing is decoded
    for path in (nifti(tmp_path / "b.nii", body()), write_series(tmp_path / "s", hu)): refused(path, "GiB are free")
    np.savez(tmp_path / "c.npz", ct=body())
    refused(tmp_path / "c.npz", "GiB are free")
    with pytest.raises(InputError, match="in windows"): make_windows(CTVolume(body().astype(np.float32), AFFINE), spec=TINY)


# ---- windows

def test_pad_keeps_everything_and_says_what_is_empty():
    volume = CTVolume(body((140, 150, 50)).astype(np.float32), np.diag([1.0, 1, 3, 1]) + np.outer([-70, -75, 100, 0], [0, 0, 0, 1]))
    w = make_windows(volume)
    assert w.windows.shape == (2 * 2 * 2, 1, 128, 128, 32) and w.windows.dtype == torch.float16 and w.patch_mask.shape == (8, 8, 8, 8)
    assert 0 <= w.windows.min() and w.windows.max() <= 1
    lowest = volume.affine[:3, 3]
    assert (w.affine[:3, 3] <= lowest).all() and w.affine[2, 3] == pytest.approx(100 - 3 * 7)
    assert w.bin_depths_mm[0] == pytest.approx(w.affine[2, 3] + 4.5) and np.allclose(np.diff(w.bin_depths_mm), 12)
    edges = w.bin_depths_mm[w.valid_bins]
    assert edges[0] - 6 <= volume.depths_mm[0] and edges[-1] + 6 >= volume.depths_mm[-1] and not w.valid_bins.all()
    filled = (w.windows[:, 0] > 0).view(-1, 8, 16, 8, 16, 8, 4).any(6).any(4).any(2)
    assert not (filled & ~w.patch_mask).any()  # where there is a value there is a mark
    assert (w.patch_mask.view(2, 2, 2, 8, 8, 8).permute(2, 5, 0, 1, 3, 4).flatten(2).any(2).flatten().numpy() == w.valid_bins).all()
    c = make_windows(volume, "crop")
    assert c.grid.tolist() == [1, 1, 1] and c.patch_mask.all() and c.valid_bins.all() and c.affine[2, 3] == pytest.approx(100 + 3 * 9)


def test_short_axes_are_padded_in_crop_as_well():
    volume = CTVolume(body().astype(np.float32), AFFINE)
    w = make_windows(volume, "crop")
    assert w.grid.tolist() == [1, 1, 1] and not w.patch_mask.all()
    n = [resampled_length(m, a, b) for m, a, b in zip(volume.array.shape, volume.spacing, (0.75, 0.75, 3))]
    np.testing.assert_allclose(w.affine[:3, 3], AFFINE[:3, 3] - [0.75 * ((128 - n[0]) // 2), 0.75 * ((128 - n[1]) // 2), 3 * ((32 - n[2]) // 2)])
    torch.testing.assert_close(w.windows, make_windows(volume, "pad").windows)


def test_any_memory_layout_gives_the_same_windows():
    array = body().astype(np.float32)
    first = make_windows(CTVolume(array, AFFINE), spec=TINY).windows
    for other in (np.asfortranarray(array), np.ascontiguousarray(array[::-1])[::-1], np.ascontiguousarray(array.transpose(1, 2, 0)).transpose(2, 0, 1)):
        torch.testing.assert_close(make_windows(CTVolume(other, AFFINE), spec=TINY).windows, first)
    before = array.copy()
    make_windows(CTVolume(array, AFFINE), spec=TINY)
    np.testing.assert_array_equal(array, before)  # the scan is not touched


@settings(max_examples=12, deadline=None)
@given(st.tuples(*[st.integers(9, 50)] * 3), st.tuples(*[st.floats(1.0, 4.0)] * 3), st.sampled_from(["crop", "pad"]))
def test_windows_are_the_literal_ones(shape, spacing, fit):
    spec = WindowSpec((2.5, 2.5, 3.0), (16, 16, 8), (4, 4, 2))
    hu = np.random.default_rng(shape).uniform(-1200, 1200, shape).astype(np.float32)
    w = make_windows(CTVolume(hu, np.diag([*spacing, 1.0])), fit, spec)
    a = torch.from_numpy((np.clip(hu, -1000, 1000) + 1000) / 2000)
    for axis, (n, s, b, size) in enumerate(zip(shape, spacing, spec.spacing, spec.window)):
        start, count = place_windows(resampled_length(n, s, b), size, fit)
        touched, weights = resample_matrix(n, s, b, start, count * size)
        a = torch.tensordot(a.movedim(axis, -1)[..., touched], torch.from_numpy(weights).T, 1).movedim(-1, axis)
    gx, gy, gz = w.grid.tolist()
    a = a.reshape(gx, 16, gy, 16, gz, 8).permute(0, 2, 4, 1, 3, 5).reshape(-1, 1, 16, 16, 8)
    torch.testing.assert_close(w.windows.float(), a, atol=6e-4, rtol=0)
    d = np.linspace(-50, 300, 7)
    np.testing.assert_allclose(w.bin_to_depth(w.depth_to_bin(d)), d)
    np.testing.assert_allclose(w.depth_to_bin(w.bin_depths_mm), np.arange(len(w.bin_depths_mm)), atol=1e-9)


def test_misuse():
    volume = CTVolume(body().astype(np.float32), AFFINE)
    with pytest.raises(InputError, match="'crop' or 'pad'"): make_windows(volume, "squeeze")
    with pytest.raises(InputError, match="choose a multiple"): WindowSpec(window=(100, 128, 32))
    with pytest.raises(InputError, match="no device"): make_windows(volume, device="gpu9")
    assert WindowSpec([3, 3, 3], [32, 32, 32], [8, 8, 4]) == TINY and TINY.patches == (4, 4, 8) and TINY.bin_mm == 12


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_computes_the_same():
    volume = CTVolume(body((90, 80, 60)).astype(np.float32), AFFINE)
    torch.testing.assert_close(make_windows(volume, device="cuda").windows.cpu(), make_windows(volume).windows, atol=1e-3, rtol=0)


# ---- a whole data set

def test_check_tables_a_data_set(tmp_path, hu):
    (tmp_path / "d").mkdir()
    nifti(tmp_path / "d/good.nii.gz", body())
    nifti(tmp_path / "d/raw.nii.gz", body() + np.int16(1024))
    (tmp_path / "d/cut.nii.gz").write_bytes((tmp_path / "d/good.nii.gz").read_bytes()[:5000])
    (tmp_path / "d/report.csv").write_text("no scan")
    write_series(tmp_path / "d/patient/series", hu)
    write_series(tmp_path / "d/patient/mr", hu, Modality="MR")
    table = check_paths([tmp_path / "d", tmp_path / "d/absent.nii.gz"], tmp_path / "out.csv", workers=2, quiet=True)
    status = {Path(p).name: s for p, s in zip(table.path, table.status)}
    assert status == {"good.nii.gz": "ok", "raw.nii.gz": "refused", "cut.nii.gz": "refused", "series": "ok", "mr": "refused", "absent.nii.gz": "refused"}
    row = table.set_index(table.path.map(lambda p: Path(p).name)).loc["series"]
    assert row.voxels == "40 x 36 x 30" and row.low_mm == 100 and row.high_mm == 172.5 and "series 4" in row["name"]
    import pandas as pd
    assert pd.read_csv(tmp_path / "out.csv").status.tolist() == table.status.tolist()
    check_paths(tmp_path / "d", tmp_path / "out.parquet", workers=1, quiet=True)
    assert len(pd.read_parquet(tmp_path / "out.parquet")) == 5
    with pytest.raises(InputError, match="no scan at"): check_paths([], quiet=True)


@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_a_reader_that_dies_is_a_row(tmp_path, monkeypatch):
    for name in "abc": nifti(tmp_path / f"{name}.nii", body())
    real = preprocessing.load_volume

    def dies(path, **kw):
        if Path(path).name == "b.nii": os._exit(9)
        if Path(path).name == "c.nii": raise ZeroDivisionError("a mistake of ours")
        return real(path, **kw)
    monkeypatch.setattr(preprocessing, "load_volume", dies)
    table = check_paths(tmp_path, workers=2, quiet=True)
    assert table.status.tolist() == ["ok", "failed", "failed"]
    assert "died" in table.reason[1] and "ZeroDivisionError" in table.reason[2]


def test_find_scans_names_files_and_dicom_folders(tmp_path, hu):
    write_series(tmp_path / "p/s1", hu[:3])
    write_series(tmp_path / "p/s2", hu[:3])
    nifti(tmp_path / "x.nii.gz", body())
    assert [str(p.relative_to(tmp_path)) for p in find_scans(tmp_path)] == ["x.nii.gz", "p/s1", "p/s2"]


def test_series_is_for_dicom(tmp_path):
    refused(nifti(tmp_path / "a.nii", body()), "series 3 cannot be chosen", series=3)
