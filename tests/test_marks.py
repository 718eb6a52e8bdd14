"RadGenome-ChestCT, LIDC-IDRI, DeepLesion: small trees to the letter of their owners' layouts, and what may be wrong in them."
from pathlib import Path

import nibabel, numpy as np, pytest

from ctvlm import marks
from ctvlm.adaptors import scan_studies
from ctvlm.core import InputError, Notice
from ctvlm.marks import *
from ctvlm.studies import open_scan, read_studies

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "nodule_dicom"


def save(path, array, affine=np.eye(4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


def body(shape, seed=0): # HU with the peaks of air, fat and soft tissue
    rng = np.random.default_rng(seed)
    return (np.where(rng.random(shape) < 0.5, -1000, rng.choice([-100, 50], shape)) + rng.normal(0, 15, shape)).astype(np.int16)


def boxes(shape, *ranges):
    mask = np.zeros(shape, np.uint8)
    for x0, x1, y0, y1, z0, z1 in ranges: mask[x0:x1, y0:y1, z0:z1] = 1
    return mask


# RadGenome-ChestCT

SHAPE = (20, 20, 40)


@pytest.fixture
def radgenome(tmp_path):
    for part, k in (("train", 7), ("valid", 1)):
        name = f"{part}_{k}_a_1"
        here = tmp_path / f"dataset/{part}_preprocessed/{part}_{k}/{part}_{k}a"
        save(here / f"{name}.nii.gz", body(SHAPE, k))
        for folder, organs in {here: dict(liver=(2, 8, 2, 8, 4, 10), trachea=(9, 12, 9, 12, 30, 38), spleen=None),
                               tmp_path / f"dataset/{part}_region_mask": dict(lung=(3, 15, 3, 15, 12, 32), pleura=None)}.items():
            for organ, box in organs.items():
                save(folder / f"seg_{name}" / f"{organ}.nii.gz", boxes(SHAPE, box) if box else boxes(SHAPE))
    reports = tmp_path / "radgenome_files"
    reports.mkdir()
    for part, name in (("train", "train_7_a_1"), ("validation", "valid_1_a_1")):
        (reports / f"{part}_region_report.csv").write_text(
            f"Volumename,Anatomy,Sentence\n{name}.nii.gz,lung,Nodule in the right lung.\n{name}.nii.gz,lung,No consolidation.\n"
            f"{name}.nii.gz,pleura,Effusion on the left.\n{name}.nii.gz,,Technically limited.\n")
    return tmp_path


def test_regions_and_structures(radgenome):
    studies, refused = read_radgenome(radgenome)
    assert studies.split.tolist() == ["train", "test"] and studies.patient.tolist() == ["train_7", "valid_1"]
    assert not len(refused) and studies.findings[1].count("\n") == 3
    structures = {p["cleaned"]: p for p in studies.pairs[1] if p["category"] == "structure"}
    [liver] = [p for text, p in structures.items() if "liver" in text]
    assert len(structures) == 3 and liver["cleaned"] in [t.format("liver") for t in TEMPLATES]        # the spleen's mask is empty
    assert (liver["intervals"][0]["low_mm"], liver["intervals"][0]["high_mm"]) == (4 * 3 - 1.5, 9 * 3 + 1.5)
    said = {p["cleaned"]: p for p in studies.pairs[1] if p["category"] == "region"}
    assert said["Nodule in the right lung."]["intervals"][0]["low_mm"] == 12 * 3 - 1.5
    assert said["No consolidation."]["asserts"] is False and said["Nodule in the right lung."]["asserts"] is True
    assert said["Effusion on the left."]["status"] == "empty mask" and "Technically limited." not in said


def test_the_volume_is_read_with_the_documented_spacing(radgenome):
    scan_studies(radgenome, "radgenome", radgenome / "t.parquet", quiet=True)
    row = read_studies(radgenome / "t.parquet").iloc[0]
    volume = open_scan(row.scan, row.series)
    stored = np.asanyarray(nibabel.load(row.scan).dataobj)
    assert volume.spacing == RADGENOME_MM and volume.depths_mm[[0, -1]].tolist() == [0., 117.]
    np.testing.assert_array_equal(volume.array, stored[::-1, ::-1])                                     # stored towards the left and back


def test_upside_down(radgenome):
    truth, _ = read_radgenome(radgenome)
    for path in radgenome.rglob("*.nii.gz"): save(path, np.asanyarray(nibabel.load(path).dataobj)[:, :, ::-1])
    turned, _ = read_radgenome(radgenome)
    ends = lambda t: [[c["low_mm"] - open_scan(t.scan[0], t.series[0]).depths_mm[0] for c in p["intervals"]] for p in t.pairs[0]]
    assert turned.series[0] == "spacing=-1x-1x-3" and ends(turned) == ends(truth)


@pytest.mark.parametrize("fault, says", [
    ("first axis", "expected two equal axes"), ("own spacing", "has a spacing of its own"), ("mask", "download it again"),
    ("no masks", "seg_valid_1_a_1 is missing")])
def test_what_is_wrong_with_radgenome(radgenome, fault, says):
    scan, = radgenome.rglob("valid_preprocessed/**/valid_1_a_1.nii.gz")
    array = np.asanyarray(nibabel.load(scan).dataobj)
    if fault == "first axis": save(scan, np.moveaxis(array, 2, 0))
    if fault == "own spacing": save(scan, array, np.diag([1., 1, 3, 1]))
    if fault == "mask": save(scan.parent / "seg_valid_1_a_1" / "liver.nii.gz", boxes((20, 20, 39)))
    if fault == "no masks":
        for folder in radgenome.rglob("seg_valid_1_a_1"): folder.rename(folder.parent / "elsewhere")
    studies, refused = read_radgenome(radgenome)
    assert studies.study.tolist() == ["train_7_a_1"] and says in refused.reason[0]


def test_no_radgenome(tmp_path):
    with pytest.raises(InputError, match="neither train_preprocessed nor valid_preprocessed"): read_radgenome(tmp_path)


# LIDC-IDRI

def xml(series_uid, readers): # readers: nodules: (texture or None, [(z, uid, points, inclusion)])
    def roi(z, uid, points, inclusion):
        edge = "".join(f"<edgeMap><xCoord>{x}</xCoord><yCoord>{y}</yCoord></edgeMap>" for x, y in points)
        return f"<roi><imageZposition>{z} </imageZposition><imageSOP_UID>{uid}</imageSOP_UID><inclusion>{inclusion}</inclusion>{edge}</roi>"
    def nodule(texture, rois):
        rated = f"<characteristics><subtlety>5</subtlety><texture>{texture}</texture></characteristics>" if texture else ""
        return f"<unblindedReadNodule><noduleID>1</noduleID>{rated}{''.join(roi(*r) for r in rois)}</unblindedReadNodule>"
    sessions = "".join(f"<readingSession><annotationVersion>3.12</annotationVersion>{''.join(nodule(*n) for n in nodules)}</readingSession>" for nodules in readers)
    return ('<?xml version="1.0" encoding="UTF-8"?>\n<LidcReadMessage uid="1.3.6.1.4.1.14519.5.2.1.6279.6001.1.0" xmlns="http://www.nih.gov">'
            f"<ResponseHeader><SeriesInstanceUid>{series_uid}</SeriesInstanceUid></ResponseHeader>{sessions}</LidcReadMessage>")


def square(x, y, r): return [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)]


@pytest.fixture(scope="module")
def series(tmp_path_factory): # 30 images of 2.5 mm, 40 columns of 1.5 mm
    import pydicom
    from test_preprocessing import body, write_series
    folder = write_series(tmp_path_factory.mktemp("lidc") / "ct", body().transpose(2, 1, 0))
    return sorted(map(pydicom.dcmread, folder.iterdir()), key=lambda i: i.ImagePositionPatient[2])


@pytest.fixture
def lidc(series, tmp_path):
    for k, image in enumerate(series): image.save_as(tmp_path / f"{k}.dcm")
    z = [float(i.ImagePositionPatient[2]) for i in series]
    def drawn(first, last, x=30, texture=5, inclusion="TRUE", shift=0.):
        return texture, [(z[k] + shift, series[k].SOPInstanceUID, square(x, 15, 3), inclusion) for k in range(first, last + 1)]
    def write(readers, uid=None, name="1.xml"): (tmp_path / name).write_text(xml(uid or series[0].SeriesInstanceUID, readers))
    return tmp_path, z, drawn, write


def test_a_nodule_of_four_readers(lidc):
    folder, z, drawn, write = lidc
    point = (None, drawn(20, 20)[1])                                                                  # under 3 mm
    hole = (5, drawn(11, 13)[1] + drawn(1, 2, inclusion="FALSE")[1])
    write([[drawn(10, 14), point], [drawn(10, 15)], [hole], [drawn(9, 14, texture=4), drawn(22, 24, x=8)]])
    with pytest.warns(Notice, match="1 nodules of one reader"): studies, refused = read_lidc(folder)
    [pair] = studies.pairs[0]
    [c] = pair["intervals"]
    assert c["low_mm"] == pytest.approx(np.median([z[10], z[10], z[11], z[9]]) - 1.25, abs=0.02)
    assert c["high_mm"] == pytest.approx(np.median([z[14], z[15], z[13], z[14]]) + 1.25, abs=0.02)
    assert sorted(pair["readers_mm"]) == pytest.approx(sorted([z[12], (z[12] + z[13]) / 2, z[12], (z[11] + z[12]) / 2]), abs=0.02)
    across = np.hypot(6 * 1.5, 6 * 1.2)                                                               # columns 1.5 mm, rows 1.2 mm apart
    assert pair["cleaned"] == f"Solid nodule of {across:.0f} mm in the left lung" and not len(refused)


@pytest.mark.parametrize("x, texture, says", [(30, 1, "Ground-glass nodule of 12 mm in the left"), (8, 3, "Part-solid nodule of 12 mm in the right")])
def test_side_and_kind(lidc, x, texture, says):
    folder, _, drawn, write = lidc
    write([[drawn(10, 14, x, texture)]] * 2)
    assert says in read_lidc(folder)[0].pairs[0][0]["cleaned"]


def test_two_nodules_side_by_side(lidc):
    folder, _, drawn, write = lidc
    write([[drawn(10, 14, 10), drawn(10, 14, 30)]] * 3)
    assert [len(p["readers_mm"]) for p in read_lidc(folder)[0].pairs[0]] == [3, 3]


@pytest.mark.parametrize("fault, says", [("shifted", "belongs to another scan"), ("foreign", "a series that is not here"), ("cut", "is no XML")])
def test_what_is_wrong_with_lidc(lidc, fault, says):
    folder, _, drawn, write = lidc
    write([[drawn(10, 14)]] * 2)
    if fault == "shifted": write([[drawn(10, 14, shift=2.5)]] * 2, name="2.xml")
    if fault == "foreign": write([[drawn(10, 14)]] * 2, "1.2.3", "2.xml")
    if fault == "cut": (folder / "2.xml").write_text((folder / "1.xml").read_text()[:300])
    (folder / "radiograph.xml").write_text('<IdriReadMessage xmlns="http://www.nih.gov"/>')           # of a chest radiograph: not ours
    studies, refused = read_lidc(folder)
    assert len(studies) == 1 and len(refused) == 1 and says in refused.reason[0]


def test_no_xml(tmp_path):
    with pytest.raises(InputError, match="holds no XML"): read_lidc(tmp_path)


@pytest.mark.skipif(not REAL.exists(), reason="needs the real scans")
def test_outlines_on_a_real_series(tmp_path): # thinned: every other image is missing
    import pydicom
    images = {}
    for path in REAL.glob("*.dcm"):
        (tmp_path / path.name).symlink_to(path)
        image = pydicom.dcmread(path, stop_before_pixels=True)
        images[round(float(image.ImagePositionPatient[2]), 2)] = image
    def drawn(low, high): return 5, [(z, images[z].SOPInstanceUID if z in images else "1.2", square(130, 300, 14), "TRUE") for z in np.arange(low, high + 1.)]
    (tmp_path / "069.xml").write_text(xml(image.SeriesInstanceUID, [[drawn(-529, -511)], [drawn(-528, -512)], [drawn(-530, -511)], [drawn(-529, -509)]]))
    from ctvlm.adaptors import Collection
    outside = lambda *a, **k: Collection(*a, allow_outside=True, **k)                                  # links, to copy nothing
    with pytest.MonkeyPatch.context() as m:
        m.setattr(marks, "Collection", outside)
        studies, refused = read_lidc(tmp_path)
    [pair] = studies.pairs[0]
    assert (pair["intervals"][0]["low_mm"], pair["intervals"][0]["high_mm"]) == (-529.5, -510.5)
    assert pair["cleaned"].startswith("Solid nodule") and pair["cleaned"].endswith("right lung") and np.ptp(pair["readers_mm"]) <= 4


# DeepLesion

HEADER = "File_name,Patient_index,Study_index,Series_ID,Key_slice_index,Coarse_lesion_type,Possibly_noisy,Slice_range,Spacing_mm_px_,Train_Val_Test\n"


def lesion(patient, key, kind=4, part=1, thick=5., study=1):
    name = f"{patient:06d}_{study:02d}_01_{key:03d}.png"
    return f'{name},{patient},{study},1,{key},{kind},0,"103, 115","0.8, 0.8, {thick:g}",{part}\n'


@pytest.fixture
def deeplesion(tmp_path):
    affine = np.array([[0, -.8, 0, 0], [-.8, 0, 0, 0], [0, 0, -5., 0], [0, 0, 0, 1]])                 # as the owners' script writes
    for patient in (1, 2, 3): save(tmp_path / f"Images_nifti/{patient:06d}_01_01_103-115.nii.gz", body((32, 32, 13), patient), affine)
    (tmp_path / "DL_info.csv").write_text(HEADER + lesion(1, 109) + lesion(1, 111, 5) + lesion(1, 109) + lesion(2, 105, -1, 2) + lesion(3, 109, -1, 3))
    (tmp_path / "sentences.csv").write_text("File_name,sentence\n000002_01_01_105.png,Cyst in segment VI.\n")
    return tmp_path


def test_key_slices(deeplesion):
    studies, refused = read_deeplesion(deeplesion)
    assert studies.split.tolist() == ["train", "val"] and studies.patient.tolist() == ["1", "2"]
    assert [(p["cleaned"], p["depth_mm"]) for p in studies.pairs[0]] == [("Lesion of the liver", -30.), ("Lesion of the lung", -40.)]
    assert studies.pairs[0][0]["intervals"][0]["low_mm"] == -32.5 and studies.pairs[1][0]["cleaned"] == "Cyst in segment VI."
    assert "neither a sentence nor a type" in refused.reason[0]
    depths = open_scan(studies.scan[0], studies.series[0]).depths_mm
    assert (depths[0], depths[-1]) == (-60., 0.)                                                      # the key slice lies in the middle


@pytest.mark.parametrize("fault, says", [("axis", "slices along its third axis"), ("spacing", "DL_info.csv says 2"), ("lost", "no sub-volume holds")])
def test_what_is_wrong_with_deeplesion(deeplesion, fault, says):
    path = deeplesion / "Images_nifti/000001_01_01_103-115.nii.gz"
    image = nibabel.load(path)
    if fault == "axis": save(path, np.moveaxis(np.asanyarray(image.dataobj), 2, 0), image.affine)
    if fault == "spacing": (deeplesion / "DL_info.csv").write_text(HEADER + lesion(1, 109, thick=2) + lesion(2, 105, 5, 2))
    if fault == "lost": path.unlink()
    studies, refused = read_deeplesion(deeplesion)
    assert studies.patient.tolist() == ["2"] and says in refused.reason[0]


def test_a_patient_in_two_parts(deeplesion):
    affine = nibabel.load(deeplesion / "Images_nifti/000001_01_01_103-115.nii.gz").affine
    save(deeplesion / "Images_nifti/000001_02_01_103-115.nii.gz", body((32, 32, 13)), affine)
    (deeplesion / "DL_info.csv").write_text(HEADER + lesion(1, 109) + lesion(1, 109, part=3, study=2))
    studies, refused = read_deeplesion(deeplesion)
    assert studies.split.tolist() == ["test"] and "held out in test" in refused.reason[0]
