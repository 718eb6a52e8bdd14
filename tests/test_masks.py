"Masks to depths: geometry by construction, and every layout with what may be wrong in it."
import json, warnings
from pathlib import Path

import nibabel, numpy as np, pytest

from ctvlm.adaptors import scan_studies
from ctvlm.core import InputError, Notice
from ctvlm.masks import *
from ctvlm.phantoms import PhantomCohort
from ctvlm.studies import read_studies, write_studies

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "thorax_abdomen"
AFFINE = np.array([[-2., 0, 0, 10], [0, -2, 0, 20], [0, 0, 5, -300], [0, 0, 0, 1]])


def boxes(*ranges, shape=(12, 12, 40)): # a mask of boxes (x0, x1, y0, y1, z0, z1)
    mask = np.zeros(shape, bool)
    for x0, x1, y0, y1, z0, z1 in ranges: mask[x0:x1, y0:y1, z0:z1] = True
    return mask


# Geometry

def test_what_is_kept_of_a_component():
    mask = boxes((2, 5, 2, 5, 10, 14), (2, 6, 2, 5, 12, 13))
    [c], small = mask_components(mask, AFFINE)
    voxels = 9 * 4 + 3
    assert small == 0 and (c["low_mm"], c["high_mm"]) == (-300 + 50 - 2.5, -300 + 65 + 2.5)
    assert c["largest_mm"] == -300 + 60 and c["volume_ml"] == pytest.approx(voxels * 20 / 1000)
    z = np.repeat([-250, -245, -240, -235], [9, 9, 12, 9])
    assert c["centroid_mm"] == pytest.approx(z.mean())


def test_pieces_crumbs_and_corners():
    apart = boxes((1, 4, 1, 4, 2, 6), (6, 10, 6, 10, 20, 24))
    found, small = mask_components(apart, AFFINE)
    assert [round(c["volume_ml"], 2) for c in found] == [1.28, 0.72] and small == 0
    corner = boxes((1, 4, 1, 4, 2, 6), (4, 7, 4, 7, 6, 9))                  # they touch in one corner
    assert len(mask_components(corner, AFFINE)[0]) == 1
    crumbs = boxes((1, 4, 1, 4, 2, 6), (8, 11, 8, 11, 30, 31))              # nine voxels
    found, small = mask_components(crumbs, AFFINE)
    assert len(found) == 1 and small == 1
    assert mask_components(np.zeros((3, 3, 3)), AFFINE) == ([], 0)
    with pytest.raises(InputError, match="has 4 axes, expected 3"): mask_components(np.zeros((2, 3, 3, 3)), AFFINE)


@pytest.mark.parametrize("seed", range(12))
def test_order_and_direction_of_axes_do_not_matter(seed):
    rng = np.random.default_rng(seed)
    mask = boxes((1, 4, 2, 5, 3, 9), (6, 11, 5, 9, 20, 31))
    true, order = mask_components(mask, AFFINE)[0], rng.permutation(3)
    turned, affine = mask.transpose(order), AFFINE.copy()
    affine[:3, :3] = AFFINE[:3, order]
    for axis in np.flatnonzero(rng.random(3) < 0.5):
        affine[:3, 3] += affine[:3, axis] * (turned.shape[axis] - 1)
        affine[:3, axis] *= -1
        turned = np.flip(turned, axis)
    for a, b in zip(mask_components(turned, affine)[0], true): assert a == pytest.approx(b)


def test_rings_are_a_ball():
    angle = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    ring = lambda z, r: np.c_[r * np.cos(angle) + 30, r * np.sin(angle), np.full(90, float(z))]
    rings = [ring(z, (900 - z * z) ** 0.5) for z in range(-28, 29, 2)]
    [ball] = contour_components(rings[::-1], 2.)
    assert ball["volume_ml"] == pytest.approx(4 / 3 * np.pi * 27, rel=0.01)
    assert ball["centroid_mm"] == pytest.approx(0, abs=1e-6) and (ball["low_mm"], ball["high_mm"]) == (-29, 29)
    two = contour_components(rings + [ring(60, 5), ring(62, 6)], 2.)
    assert len(two) == 2 and two[1]["largest_mm"] == 62
    assert contour_components([np.zeros((1, 3))], 2.) == []                 # a point


# ReXGroundingCT

@pytest.fixture(scope="module")
def cohort(): return PhantomCohort(5, 11, spacing=(12., 12., 6.), languages=("en",))


@pytest.fixture
def rex(cohort, tmp_path): return write_as_rexgrounding(cohort, tmp_path / "rex", dict(train=3, val=1, test=1))


def told(root): return json.loads((root / "MICCAI_challenge_dataset.json").read_text())
def tell(root, data): (root / "MICCAI_challenge_dataset.json").write_text(json.dumps(data))
def change(path, how):
    image = nibabel.load(path)
    array, affine = how(np.asanyarray(image.dataobj).copy(), image.affine.copy())
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
def first(rex): return rex / "segmentations" / told(rex)["train"][0]["name"]


def test_every_finding_finds_its_mask(rex, cohort):
    studies, refused = read_rexgrounding(rex)
    assert studies.split.tolist() == ["train"] * 3 + ["val", "test"] and not len(refused)
    assert studies.patient.tolist()[0] == "train_1" and studies.findings[0].count("\n") == len(studies.pairs[0]) - 1
    for study, row in zip(cohort, studies.itertuples()):
        cited = {r.snippet: r.finding for r in study.report.references if r.finding and not r.prior}
        for p in row.pairs:
            assert p["source"] == "mask" and p["category"] == {"Lung nodule": "2d", "Pleural effusion": "2e"}.get(cited[p["cleaned"]], p["category"][:1])
            if row.split == "test": assert (p["depth_mm"], p["status"]) == (None, "mask withheld"); continue
            truth, _ = mask_components(study.mask(cited[p["cleaned"]]) > 0.5, study.volume.affine)
            assert p["intervals"] == [pytest.approx(c, abs=1e-3) for c in truth]
            assert p["status"] == ("ok" if truth else "empty mask")


def test_two_tables_hold_every_pair(rex, tmp_path):
    counts = scan_studies(rex, "rexgrounding", tmp_path / "studies.parquet", quiet=True)
    back = read_studies(tmp_path / "studies.parquet")
    assert counts["volumes"] == len(back) == 5
    assert {p["category"][0] for pairs in back.pairs for p in pairs} == {"1", "2"}
    assert back.pairs[0][0]["intervals"][0]["volume_ml"] > 0
    write_studies(back, tmp_path / "again.parquet")


@pytest.mark.parametrize("fault, says", [
    ("last axis", "the finding axis first"), ("one mask less", "masks for"), ("another affine", "lies elsewhere"),
    ("another grid", "the finding axis first"), ("missing", "is missing in segmentations"), ("numbers", "expected 0, 1")])
def test_what_is_wrong_with_a_mask(rex, fault, says):
    path, data = first(rex), told(rex)
    if fault == "last axis": change(path, lambda m, a: (np.moveaxis(m, 0, -1), a))
    if fault == "one mask less": change(path, lambda m, a: (m[:-1], a))
    if fault == "another affine": change(path, lambda m, a: (m, a + np.array([[0] * 4, [0] * 4, [0, 0, 0, 30], [0] * 4])))
    if fault == "another grid": change(path, lambda m, a: (m[:, ::2], a))
    if fault == "missing": path.unlink()
    if fault == "numbers":
        entry = data["train"][0]
        entry["findings"] = {str(int(k) + 1): v for k, v in entry["findings"].items()}
        tell(rex, data)
    studies, refused = read_rexgrounding(rex)
    assert len(studies) == 4 and says in refused.reason[0] and refused.study[0] == path.name.removesuffix(".nii.gz")


def test_an_empty_mask_and_texts_in_dictionaries(rex):
    data = told(rex)
    data["train"][0]["findings"] = {k: {"text": v} for k, v in data["train"][0]["findings"].items()}
    tell(rex, data)
    change(first(rex), lambda m, a: (m * (np.arange(len(m)) > 0)[:, None, None, None].astype(m.dtype), a))
    studies, _ = read_rexgrounding(rex)
    assert (studies.pairs[0][0]["status"], studies.pairs[0][0]["depth_mm"]) == ("empty mask", None)
    assert studies.pairs[0][0]["cleaned"] == data["train"][0]["findings"]["0"]["text"]


def test_a_scan_without_findings_needs_no_masks(rex):
    data = told(rex)
    data["train"][0] |= {"findings": {}, "categories": {}}
    tell(rex, data)
    first(rex).unlink()
    studies, refused = read_rexgrounding(rex)
    assert studies.pairs[0] == [] and len(studies) == 5 and not len(refused)


def test_no_patient_is_in_two_splits(rex):
    data = told(rex)
    name = data["train"][0]["name"]                                         # train_1_a_1: its patient is in val, too
    other = "train_1_b_1.nii.gz"
    for folder in ("scans", "segmentations"): (rex / folder / other).write_bytes((rex / folder / name).read_bytes())
    data["val"].append(data["train"][0] | {"name": other})
    tell(rex, data)
    with pytest.warns(Notice, match="1 patients of train are in val, too"): studies, refused = read_rexgrounding(rex)
    assert studies[studies.patient == "train_1"].split.tolist() == ["val"]
    assert refused.scan.tolist() == [name] and "its patient is in val, too" in refused.reason[0]


def test_scans_kept_elsewhere(rex, tmp_path):
    (rex / "scans").rename(tmp_path / "ct_rate")
    studies, refused = read_rexgrounding(rex, tmp_path / "ct_rate")
    assert len(studies) == 5 and not len(refused)
    studies, refused = read_rexgrounding(rex)
    assert not len(studies) and set(refused.reason.str.contains("is missing: download it with CT-RATE")) == {True}


@pytest.mark.parametrize("text, says", [("{", "is no JSON"), ("[]", "has no lists train, val, test")])
def test_a_json_that_is_none(rex, text, says):
    (rex / "MICCAI_challenge_dataset.json").write_text(text)
    with pytest.raises(InputError, match=says): read_rexgrounding(rex)
    (rex / "MICCAI_challenge_dataset.json").unlink()
    with pytest.raises(InputError, match="holds neither"): read_rexgrounding(rex)


# Other layouts

def scan(path, shape=(12, 12, 40)):
    rng = np.random.default_rng(0)
    body = np.where(rng.random(shape) < 0.5, -1000, np.where(rng.random(shape) < 0.5, -100, 50))
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(body.astype(np.int16), AFFINE), path)


def test_totalsegmentator(tmp_path):
    for study in ("s1", "s2", "s3"): scan(tmp_path / study / "ct.nii.gz")
    def write(study, organ, mask, affine=AFFINE):
        folder = tmp_path / study / "segmentations"
        folder.mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(mask.astype(np.uint8), affine), folder / f"{organ}.nii.gz")
    write("s1", "kidney_left", boxes((2, 6, 2, 6, 10, 20)))
    write("s1", "spleen", boxes())
    write("s2", "liver", boxes((2, 6, 2, 6, 10, 20)), np.diag([1., 1, 5, 1]))
    (tmp_path / "meta.csv").write_text("image_id,split\ns1,val\n")
    studies, refused = read_totalsegmentator(tmp_path)
    assert [(p["cleaned"], p["depth_mm"]) for p in studies.pairs[0]] == [("left kidney", -230.)]   # of equal slices, the one next to the centroid
    assert studies.split.tolist() == ["val"] and studies.study.tolist() == ["s1"]
    assert "not on the grid of its scan" in refused.reason[0] and "has no segmentations" in refused.reason[1]
    with pytest.raises(InputError, match="holds no STUDY/ct.nii.gz"): read_totalsegmentator(tmp_path / "s1")


def test_one_file_of_labels(tmp_path):
    for study in ("s1", "s2"): scan(tmp_path / study / "ct.nii.gz")
    save = lambda study, labels: nibabel.save(nibabel.Nifti1Image(labels.astype(np.uint8), AFFINE), tmp_path / study / "segmentations.nii.gz")
    save("s1", 3 * boxes((2, 6, 2, 6, 10, 20)) + 7 * boxes((7, 11, 2, 6, 30, 36)))
    save("s2", 4 * boxes((2, 6, 2, 6, 10, 20)))
    assert "there is no labels.csv" in read_totalsegmentator(tmp_path)[1].reason[0]
    (tmp_path / "labels.csv").write_text("label,name\n3,kidney_left\n7,aorta\n")
    studies, refused = read_totalsegmentator(tmp_path)
    assert [(p["cleaned"], p["intervals"][0]["low_mm"]) for p in studies.pairs[0]] == [("left kidney", -252.5), ("aorta", -152.5)]
    assert "holds label 4, which labels.csv does not name" in refused.reason[0]


@pytest.mark.skipif(not REAL.exists(), reason="needs the real scan")
def test_organs_of_a_real_scan(tmp_path): # each organ where its mask lies
    (tmp_path / "s1").mkdir()
    for name, stored in (("ct", "example_ct_sm"), ("segmentations", "example_seg")):
        (tmp_path / "s1" / f"{name}.nii.gz").write_bytes((REAL / f"{stored}.nii.gz").read_bytes())
    (tmp_path / "labels.csv").write_text("label,name\n" + "".join(f"{k},{dict(enumerate(['spleen', 'kidney_right', 'kidney_left'], 1)).get(k, f'other_{k}')}\n" for k in range(1, 120)))
    studies, refused = read_totalsegmentator(tmp_path)
    organs = {p["cleaned"]: p["intervals"][0] for p in studies.pairs[0]}
    assert organs["spleen"]["high_mm"] > organs["left kidney"]["high_mm"] > organs["left kidney"]["low_mm"] and not len(refused)
    volume = nibabel.load(REAL / "example_seg.nii.gz")
    z = nibabel.affines.apply_affine(volume.affine, np.argwhere(np.asanyarray(volume.dataobj) == 1))[:, 2]
    half = abs(volume.affine[2, 2]) / 2
    assert organs["spleen"]["low_mm"] == pytest.approx(z.min() - half, abs=1.) and organs["spleen"]["high_mm"] == pytest.approx(z.max() + half, abs=1.)


@pytest.mark.parametrize("name, words", [
    ("lung_lower_lobe_right", "right lower lobe of the lung"), ("vertebrae_T12", "vertebra T12"), ("aorta", "aorta"),
    ("adrenal_gland_right", "right adrenal gland"), ("rib_left_1", "left rib 1"), ("lung_vessels", "lung vessels"),
    ("Kidney R", "right kidney"), ("Liver", "liver")])
def test_names_become_words(name, words): assert structure_words(name) == words


def test_intervals_of_a_table(tmp_path):
    scan(tmp_path / "a.nii.gz")
    (tmp_path / "intervals.csv").write_text(
        "study,scan,text,z_low,z_high,patient,split,category\n"
        "a,a.nii.gz,Effusion,-260,-250,p1,test,2e\na,a.nii.gz,Effusion,-240,-200,p1,test,2e\n"
        "a,a.nii.gz,Nodule,-150,x,p1,test,2d\na,a.nii.gz,,-150,-140,p1,test,2d\nb,b.nii.gz,Cyst,1,2,p2,train,\n")
    studies, refused = read_intervals(tmp_path)
    [pair] = studies.pairs[0]
    assert (pair["depth_mm"], pair["category"], len(pair["intervals"])) == (-220., "2e", 2)       # the longer one first
    assert (studies.split[0], studies.patient[0]) == ("test", "p1")
    reasons = " ".join(refused.reason)
    assert "line 4: z_low is '-150' and z_high 'x'" in reasons and "line 5: study or text is empty" in reasons
    assert "b.nii.gz is missing" in reasons and len(refused) == 3


# DICOM

@pytest.fixture(scope="module")
def series(tmp_path_factory): # 30 images of 2.5 mm, from feet to head
    import pydicom
    from test_preprocessing import body, write_series
    folder = write_series(tmp_path_factory.mktemp("dicom") / "ct", body().transpose(2, 1, 0))
    return sorted(map(pydicom.dcmread, folder.iterdir()), key=lambda i: i.ImagePositionPatient[2])


def keep_series(series, folder):
    folder.mkdir()
    for i, image in enumerate(series): image.save_as(folder / f"{i}.dcm")
    return folder


def rtstruct(series, path, uid=None):
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid
    ds, meta = Dataset(), FileMetaDataset()
    meta.MediaStorageSOPClassUID = ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.481.3"
    meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID, ds.file_meta = ExplicitVRLittleEndian, meta
    ds.PatientID, ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.Modality = "x", series[0].StudyInstanceUID, generate_uid(), "RTSTRUCT"
    on, study, frame = Dataset(), Dataset(), Dataset()
    on.SeriesInstanceUID = uid or series[0].SeriesInstanceUID
    study.RTReferencedSeriesSequence, frame.RTReferencedStudySequence = [on], [study]
    ds.ReferencedFrameOfReferenceSequence = [frame]
    names, rings = [], []
    for number, (name, slices) in enumerate({"Kidney Left": series[3:7], "nothing": []}.items(), 1):
        roi, contours = Dataset(), Dataset()
        roi.ROINumber, roi.ROIName, contours.ReferencedROINumber = number, name, number
        contours.ContourSequence = []
        for i, image in enumerate(slices):
            c, z, r = Dataset(), float(image.ImagePositionPatient[2]), 20 + i
            c.ContourGeometricType, c.NumberOfContourPoints = "CLOSED_PLANAR", 4
            c.ContourData = [-r, -r, z, r, -r, z, r, r, z, -r, r, z]
            contours.ContourSequence.append(c)
        names.append(roi); rings.append(contours)
    ds.StructureSetROISequence, ds.ROIContourSequence = names, rings
    ds.save_as(path, enforce_file_format=True)


def test_contours_beside_their_series(series, tmp_path):
    folder = keep_series(series, tmp_path / "ct")
    rtstruct(series, tmp_path / "contours.dcm")
    rtstruct(series, tmp_path / "foreign.dcm", "1.2.3")
    studies, refused = read_dicom_masks(tmp_path)
    [kidney, nothing] = studies.pairs[0]
    z = [float(i.ImagePositionPatient[2]) for i in series]
    step = z[1] - z[0]
    assert (kidney["cleaned"], kidney["depth_mm"]) == ("left kidney", pytest.approx(z[6]))
    assert kidney["intervals"][0]["low_mm"] == pytest.approx(z[3] - step / 2, abs=0.02)
    assert kidney["intervals"][0]["high_mm"] == pytest.approx(z[6] + step / 2, abs=0.02)
    assert nothing["status"] == "empty mask" and studies.scan[0] == str(folder)
    assert "was drawn on 0 of the series" in refused.reason[0]


def test_a_segmentation_object(series, tmp_path):
    highdicom = pytest.importorskip("highdicom")
    from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentationTypeValues, SegmentDescription
    from pydicom.sr.codedict import codes
    from pydicom.uid import generate_uid
    few = series[:12]
    for image in few:
        for name in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate",
                     "StudyTime", "ReferringPhysicianName"): setattr(image, name, "")
        image.FrameOfReferenceUID, image.SliceThickness = "1.2.3.4", 2.5
    keep_series(few, tmp_path / "ct")
    mask = np.zeros((12, few[0].Rows, few[0].Columns), bool)
    mask[4:9, 10:15, 10:20] = True
    about = SegmentDescription(1, "Spleen", codes.SCT.AnatomicalStructure, codes.SCT.Spleen, SegmentAlgorithmTypeValues.MANUAL)
    Segmentation(few, mask, SegmentationTypeValues.BINARY, [about], generate_uid(), 9, generate_uid(), 1, "made up", "test", "1", "0").save_as(tmp_path / "seg.dcm")
    studies, refused = read_dicom_masks(tmp_path)
    [pair], z = studies.pairs[0], [float(i.ImagePositionPatient[2]) for i in few]
    assert pair["cleaned"] == "spleen" and not len(refused)
    assert pair["intervals"][0]["low_mm"] == pytest.approx((z[3] + z[4]) / 2, abs=0.02)
    assert pair["intervals"][0]["high_mm"] == pytest.approx((z[8] + z[9]) / 2, abs=0.02)


def test_nothing_drawn(series, tmp_path):
    keep_series(series[:3], tmp_path / "ct")
    with pytest.raises(InputError, match="holds no RTSTRUCT and no SEG"): read_dicom_masks(tmp_path)

# Two commands: train, and print the table

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def command(*words): # its standard output; errors are raised
    from ctvlm.cli import app
    from typer.testing import CliRunner
    done = CliRunner().invoke(app, [str(w) for w in words])
    if done.exception: raise done.exception
    return done.stdout


def test_phantoms_by_command(tmp_path, monkeypatch):
    coarse = lambda n, seed, spacing, languages: PhantomCohort(n, seed, (12., 12., 6.), languages)        # for speed
    monkeypatch.setattr("ctvlm.phantoms.PhantomCohort", coarse)
    said = json.loads(command("phantoms", "-n", 3, "--as", "rexgrounding", "-o", tmp_path / "rex", "--json", "--quiet"))
    assert (said["train"], said["val"], said["test"]) == (1, 1, 1)
    studies, refused = read_rexgrounding(tmp_path / "rex")
    assert studies.split.tolist() == ["train", "val", "test"] and not len(refused)
    for n, says in ((3, "is not empty: give a new folder"), (2, "found 2 studies for three splits")):
        with pytest.raises(InputError, match=says): command("phantoms", "-n", n, "--as", "rexgrounding", "-o", tmp_path / "rex", "--quiet")


@pytest.mark.parametrize("reports", [False, True])
def test_training_with_localization_alone(rex, tmp_path, reports):
    from ctvlm.model import CTVLMModel, ready_model
    table, out = tmp_path / "studies.parquet", tmp_path / "run"
    studies, _ = read_rexgrounding(rex)
    if not reports: studies = studies.assign(findings="", labels=[{}] * len(studies))                     # masks and nothing else
    write_studies(studies, table)
    store = json.loads(command("embed", table, "-o", tmp_path / "features", "--workers", 0, "--json", "--quiet"))["store"]
    (tmp_path / "config.json").write_text(json.dumps(dict(siglip=0, disease=0, localization=1, epochs=2, effective_batch=3, warmup_epochs=0, trackers=[])))
    command("train", table, "--features", store, "-o", out, "--config", tmp_path / "config.json", "--batch-size", 3, "--workers", 0, "--quiet")
    before, after = ready_model("cpu").state_dict(), CTVLMModel.from_pretrained(out / "model").state_dict()
    moved = {k.split(".")[0] for k in before if not before[k].equal(after[k])}
    assert {"scan_encoder", "text_encoder"} <= moved and "window_encoder" not in moved and "report_head" not in moved
    said = command("evaluate", table, "--task", "depth", "--split", "val", "--model", out / "model", "-o", tmp_path / "result", "--quiet")
    assert "interval_mae_mm" in said and "text_prior_mm" in said and "focal" in said


@pytest.mark.skipif(not SHARED.exists(), reason="needs the real scans")
def test_landmarks_of_real_scans(tmp_path): # what tools ask of real scans, as a table of intervals
    marks = json.loads((SHARED / "real_landmarks.json").read_text())
    rows = [f"{scan},{SHARED / scan},{text},{low},{high},{scan},test" for scan, places in marks["scans"].items()
            for place, (low, high) in places.items() for text in marks["texts"][place]]
    (tmp_path / "intervals.csv").write_text("\n".join(["study,scan,text,z_low,z_high,patient,split", *rows]) + "\n")
    command("studies", tmp_path, "--as", "intervals", "--allow-outside", "-o", tmp_path / "t.parquet", "--quiet")
    said = json.loads(command("evaluate", tmp_path / "t.parquet", "--task", "depth", "-o", tmp_path / "result", "--json", "--quiet"))
    d = said["depth"]
    assert (d["n_pairs"], d["n_patients"]) == (len(rows), 3) == (20, 3) and d["protocol"]["left_out"] == {"outside of the scan": 0}
    assert d["interval_mae_mm"] < d["middle_mm"] < 60 and len(set(d["items"]["pred_mm"])) > 10
