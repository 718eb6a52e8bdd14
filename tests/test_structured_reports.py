"Answers as DICOM: what others' programs say of the files, every value back, images that are right, patients only where they must be."
import json, shutil, subprocess
from pathlib import Path

import numpy as np
import pydicom
import pytest

hd = pytest.importorskip("highdicom", reason="pip install 'ctvlm[dicom]'")
from ctvlm.core import InputError
from ctvlm.model import DepthAnswer, FindingAnswer
from ctvlm.phantoms import PhantomCohort
from ctvlm.preprocessing import load_volume
from ctvlm.structured_reports import Source, _height, to_key_objects, to_slicer, to_sr, write_dicom

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
REAL = [SHARED / name for name in ("chest_dicom", "abdomen_dicom", "nodule_dicom")]
ABOUT = dict(name="ctvlm", version="1", parameters=["weights 0123", "trained on drawn patients"])
LONG = "Suspicious spiculated nodule in the posterior segment of the right upper lobe, larger than in the last examination, with pleural retraction"


def answers_at(volume):
    z = np.quantile(volume.depths_mm, [.2, .5, .8])
    texts = ("simple cyst in the left kidney", "Zyste, größer als früher; Ödem", LONG)
    depths = [DepthAnswer(t, float(d), None, (float(d) - 20, float(d) + 25.5), "conformal, 90% of drawn patients", k == 1, np.array([d, d + 60]), np.array([.75, .25]), "scan") for k, (t, d) in enumerate(zip(texts, z))]
    return [*depths, FindingAnswer("Pleural effusion", .75, .21, "scan")]


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    study = PhantomCohort(4, seed=0, spacing=(12., 12., None))[3]
    folder = tmp_path_factory.mktemp("study")
    study.write_dicom(folder)
    return study, folder


@pytest.fixture(params=["phantom", *REAL], ids=lambda p: p if isinstance(p, str) else p.name)
def case(request, phantom):
    if request.param == "phantom": folder = phantom[1] / f"series-{phantom[0].scan.main.number:03d}"
    else:
        folder = request.param
        if not folder.exists(): pytest.skip("the real scans are not here")
    volume = load_volume(folder)
    return volume, Source.read(folder, volume.series_uid)


def program(name):
    if not shutil.which(name): pytest.skip(f"no {name} here: apt-get install dicom3tools dcmtk")
    return name


@pytest.mark.filterwarnings("error")   # a warning of highdicom quotes the patient's name
def test_others_accept_the_files(case, tmp_path):
    volume, source = case
    answers = answers_at(volume)
    for name, dataset in (("sr", to_sr(answers, source, ABOUT)), ("ko", to_key_objects(answers, source))):
        path = write_dicom(tmp_path / f"{name}.dcm", dataset)
        checked = subprocess.run([program("dciodvfy"), path], capture_output=True, text=True)
        assert "Error" not in checked.stderr + checked.stdout and checked.returncode == 0, checked.stderr
        dumped = subprocess.run([program("dsrdump"), path], capture_output=True, text=True)
        page = subprocess.run([program("dsr2html"), path], capture_output=True, text=True)
        assert dumped.returncode == page.returncode == 0, dumped.stderr + page.stderr
        for a in answers[:3]: assert a.text in page.stdout.replace("&ouml;", "ö").replace("&uuml;", "ü").replace("&Ouml;", "Ö") or name == "sr" and a.text[:20] in page.stdout, a.text


def test_every_value_comes_back(case, tmp_path):
    volume, source = case
    answers = answers_at(volume)
    report = hd.sr.srread(write_dicom(tmp_path / "sr.dcm", to_sr(answers, source, ABOUT)))
    groups = report.content.get_image_measurement_groups()
    assert len(groups) == 4
    for a, g in zip(answers[:3], groups):
        assert g.tracking_identifier == a.text and g.finding_type.meaning == a.text[:64]
        values = {m.name.value: float(m.value) for m in g.get_measurements()}
        assert np.allclose([values[k] for k in ("depth", "interval-lower", "interval-upper")], [a.depth_mm, *a.interval_mm], atol=1e-3)
        assert {m.name.value: m.unit.value for m in g.get_measurements()} == {"depth": "mm", "interval-lower": "mm", "interval-upper": "mm", "probability": "1"}
        assert values["probability"] == .75 and "Share of the model's probability" in str(g)
        assert g.get_qualitative_evaluations()[0].value.meaning == ("not in this scan, best guess" if a.abstains else "in this scan")
        cited = g.source_images[0].referenced_sop_instance_uid
        assert cited == source.nearest(a.depth_mm).SOPInstanceUID
        k = np.abs(source.depths_mm - a.depth_mm).argmin()
        assert abs(source.depths_mm[k] - a.depth_mm) <= np.diff(source.depths_mm).max() / 2 + 1e-3
    values = {m.name.value: float(m.value) for m in groups[3].get_measurements()}
    assert np.allclose([values["sigmoid"], values["score"]], [.75, .21], atol=1e-4)
    written = (tmp_path / "sr.dcm").read_bytes()
    assert b"trained on drawn patients" in written and b"not for diagnosis" in written
    assert b"interval: conformal, 90% of drawn patients" in written


def test_images_are_found_by_height(case):
    "Of every image of the series: the volume and the headers agree on where it lies."
    volume, source = case
    assert len(source.headers) == len(volume.depths_mm) and np.allclose(source.depths_mm, volume.depths_mm, atol=2e-2)
    for z in volume.depths_mm[::7]: assert abs(_height(source.nearest(z)) - z) < 2e-2


def test_patient_and_study_are_the_source_s(phantom, tmp_path):
    study, folder = phantom
    volume = load_volume(folder / f"series-{study.scan.main.number:03d}")
    source = Source.read(folder, volume.series_uid)             # the whole study: only the series that was asked about
    assert len(source.headers) == study.scan.main.count
    for ds in (to_sr(answers_at(volume), source, ABOUT), to_key_objects(answers_at(volume), source)):
        first = source.headers[0]
        assert (ds.PatientID, ds.StudyInstanceUID, str(ds.PatientName)) == (first.PatientID, first.StudyInstanceUID, str(first.PatientName))
        assert ds.SeriesInstanceUID != first.SeriesInstanceUID
        path = write_dicom(tmp_path / f"{ds.Modality}.dcm", ds)
        assert path.stat().st_mode & 0o777 == 0o600
        path.chmod(0o644)
        assert write_dicom(path, ds, overwrite=True).stat().st_mode & 0o777 == 0o600
    assert str(first.PatientName) not in json.dumps(to_slicer(answers_at(volume)[:3], volume))


def test_the_same_answers_are_the_same_object(phantom):
    study, folder = phantom
    volume = load_volume(folder / f"series-{study.scan.main.number:03d}")
    source, answers = Source.read(folder, volume.series_uid), answers_at(volume)
    uid = lambda *a, **k: to_sr(*a, **k).SOPInstanceUID
    assert uid(answers, source, ABOUT) == uid(answers_at(volume), source, dict(ABOUT))
    others = [uid(answers[:2], source, ABOUT), uid(answers, source, ABOUT | {"parameters": ["weights 9999"]}),
              uid(answers, source, ABOUT, [dict(snippet="cyst", depth_mm=answers[0].depth_mm)])]
    assert len({uid(answers, source, ABOUT), *others}) == 4
    assert all(len(u) <= 64 for u in others)


def test_what_a_radiologist_typed(phantom, tmp_path):
    from ctvlm.mining import SeriesIndex, mine_study
    study, folder = phantom
    pairs = [p for p in mine_study(study.report.text, SeriesIndex(study.series_table), study.study) if p["series"] == study.scan.main.number and p["depth_mm"] is not None and not p["prior"]]
    assert pairs
    source = Source.read(folder, study.scan.main.uid)
    report = hd.sr.srread(write_dicom(tmp_path / "sr.dcm", to_sr([], source, references=pairs)))
    for p, g in zip(pairs, report.content.get_image_measurement_groups()):
        assert g.tracking_identifier == p["snippet"]
        cited = next(ds for ds in source.headers if ds.SOPInstanceUID == g.source_images[0].referenced_sop_instance_uid)
        assert p["image_end"] is not None or int(cited.InstanceNumber) == p["image"]


def test_no_dicom_no_report(phantom, tmp_path):
    study = phantom[0]
    path = study.write_nifti(tmp_path / "scan.nii.gz")
    with pytest.raises(InputError, match="nothing to point to.*-o answer.json"): Source.read(path, load_volume(path).series_uid)


def test_slicer_opens_what_the_schema_allows(phantom):
    "The rules of markups-schema-v1.0.3 that concern lines: types, two points of three numbers each, LPS, millimetres."
    study = phantom[0]
    volume, = (study.volume,)
    marks = to_slicer(answers_at(volume)[:3], volume)
    assert set(marks) == {"@schema", "markups"} and marks["@schema"].endswith("markups-schema-v1.0.3.json#") and len(marks["markups"]) == 6
    for m in marks["markups"]:
        assert m["type"] == "Line" and m["coordinateSystem"] == "LPS" and m["coordinateUnits"] == "mm"
        assert [len(p["position"]) for p in m["controlPoints"]] == [3, 3] and all(isinstance(v, float) for p in m["controlPoints"] for v in p["position"])
    x = [p["position"][0] for p in marks["markups"][0]["controlPoints"]]
    assert np.allclose(sorted(x), sorted(-volume.affine[0, 3] - np.array([0, volume.spacing[0] * (volume.array.shape[0] - 1)])))
