"The command with scans from an archive, answers for readers of DICOM, and patients whose names stay where they are."
import json, os, re, shutil, signal, subprocess, sys, urllib.request
from pathlib import Path

import pandas as pd
import pydicom
import pytest

hd = pytest.importorskip("highdicom", reason="pip install 'ctvlm[dicom]'")
pytest.importorskip("dicomweb_client", reason="pip install 'ctvlm[dicom]'")
from ctvlm import cli
from ctvlm.mining import mine_report
from ctvlm.phantoms import PhantomCohort

TEXT = "simple cyst in the left kidney"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from ctvlm.model import untrained
    folder = tmp_path_factory.mktemp("models") / "tiny"
    untrained("tiny").save_pretrained(folder)
    return folder


@pytest.fixture()
def temporary(tmp_path, monkeypatch):
    "The system's temporary folder, while a test runs; empty when it ends."
    import tempfile
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not list(folder.iterdir())


@pytest.fixture()
def ctvlm(capsys, caplog, temporary):
    "The command in this process: its status, standard output and standard error; `logged` is what went to the log, which pytest keeps from both."
    def ended(*words):
        with pytest.raises(SystemExit) as left: cli.main([str(w) for w in words])
        return left.value.code, *capsys.readouterr()
    ended.logged = lambda: caplog.text
    return ended


def main_series(phantom): return phantom[1] / f"series-{phantom[0].scan.main.number:03d}"


def test_answers_for_readers(ctvlm, phantom, model, tmp_path):
    "Report, key objects and marks of one folder; two texts are two groups."
    sr, ko, marks, table = (tmp_path / n for n in ("sr.dcm", "ko.dcm", "answers.mrk.json", "answers.json"))
    status, out, err = ctvlm("localize", main_series(phantom), "-m", model, "-t", TEXT, "-t", "pleural effusion", "-o", table, "--sr", sr, "--key-objects", ko, "--slicer", marks)
    assert status == 0, err
    assert all(str(p) in out for p in (sr, ko, marks))
    groups, rows = hd.sr.srread(sr).content.get_image_measurement_groups(), json.loads(table.read_text())
    assert [g.tracking_identifier for g in groups] == [r["text"] for r in rows] == [TEXT, "pleural effusion"]
    for g, r in zip(groups, rows): assert abs({m.name.value: float(m.value) for m in g.get_measurements()}["depth"] - r["depth_mm"]) < 1e-3
    assert pydicom.dcmread(ko).Modality == "KO" and any(m["name"].startswith(TEXT) for m in json.loads(marks.read_text())["markups"])
    assert all(oct(p.stat().st_mode & 0o777) == "0o600" for p in (sr, ko))
    if shutil.which("dciodvfy"):
        for p in (sr, ko): assert "Error" not in subprocess.run(["dciodvfy", p], capture_output=True, text=True).stderr


def test_findings_for_readers(ctvlm, phantom, model, tmp_path):
    status, out, err = ctvlm("classify", main_series(phantom), "-m", model, "-f", "Pleural effusion", "--sr", tmp_path / "sr.dcm")
    assert status == 0 and f"DICOM: {tmp_path / 'sr.dcm'}" in out, err
    [group] = hd.sr.srread(tmp_path / "sr.dcm").content.get_image_measurement_groups()
    assert group.tracking_identifier == "Pleural effusion" and {m.name.value for m in group.get_measurements()} == {"score", "sigmoid"}


WHO = dict(PatientName="Zwiebelfisch^Ottokar", PatientID="ZWBF4711", PatientBirthDate="19120323", OtherPatientIDs="ZWBF4712", PatientAddress="Zwiebelgasse", ReferringPhysicianName="Zwiebelarzt")
MARKERS = "Zwiebel", "Ottokar", "ZWBF", "19120323", "1912-03-23"


def leaks(content): return [m for m in MARKERS if m.casefold().encode() in (content if isinstance(content, bytes) else content.encode()).lower()]


@pytest.fixture(scope="module")
def marked(phantom, tmp_path_factory):
    "The study of a patient whose name, number and birth date are nowhere else."
    folder = tmp_path_factory.mktemp("marked") / "study"
    shutil.copytree(phantom[1], folder)
    for f in folder.rglob("*.dcm"):
        ds = pydicom.dcmread(f)
        for name, value in WHO.items(): setattr(ds, name, value)
        ds.save_as(f)
    return folder


REFUSED = [  # words, what is said
    (["NIFTI", "--sr", "sr.dcm"], "is no folder of a DICOM series.*-o answer.json"),
    (["SCAN", "--sr", "sr.txt"], r"--sr .*sr.txt does not end in \.dcm"),
    (["SCAN", "--slicer", "marks.json"], r"--slicer .*marks.json does not end in \.mrk\.json"),
    (["SCAN", "NIFTI", "--sr", "sr.dcm"], "--sr is about one scan, 2 were given"),
    (["SCAN", "--send"], "--send needs a scan from a server"),
]


@pytest.mark.parametrize("words, said", REFUSED, ids=[" ".join(w) for w, _ in REFUSED])
def test_what_cannot_be_is_one_line(ctvlm, phantom, model, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    if "NIFTI" in words: phantom[0].write_nifti(tmp_path / "scan.nii.gz")
    before = set(tmp_path.iterdir())
    words = [{"NIFTI": tmp_path / "scan.nii.gz", "SCAN": main_series(phantom)}.get(w, w) for w in words]
    status, out, err = ctvlm("localize", *words, "-m", model, "-t", TEXT, "-o", "a.csv", "-q")
    assert status == 2 and not out and re.search(said, err.splitlines()[-1]), err
    assert set(tmp_path.iterdir()) == before                        # nothing is written


def test_from_the_archive_and_back(ctvlm, archive, phantom, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    address = archive.address(phantom[0].scan.main.uid)
    ask = ("localize", address, "-m", model, "-t", TEXT, "-o", "a.json", "--send", "-q")
    before = len(archive.rest("/instances"))
    status, out, err = ctvlm(*ask)
    assert status == 0 and len(re.findall("^stored: ", out, re.M)) == 2, out + err
    status, out, err = ctvlm(*ask)
    assert status == 0 and len(re.findall("^was there already: ", out, re.M)) == 2 and "stored:" not in out, out + err
    assert len(archive.rest("/instances")) == before + 2
    [row] = json.loads(Path("a.json").read_text())
    here = json.loads(ctvlm("localize", main_series(phantom), "-m", model, "-t", TEXT, "-o", "b.json", "--json", "-q")[1])[0]
    assert row["depth_mm"] == here["depth_mm"]
    kinds = {archive.rest(f"/instances/{i}/simplified-tags")["Modality"] for i in archive.rest("/instances")}
    assert kinds == {"CT", "SR", "KO"}
    status, out, err = ctvlm("classify", archive.address(), "--series", phantom[0].scan.main.number, "-m", model, "-f", "Pleural effusion", "--send", "-q")
    assert status == 0 and "stored: " in out, err
    status, out, err = ctvlm("classify", archive.address(), "-m", model, "-q")
    assert status == 2 and "CT series of study" in err and "--series" in err


def test_one_address_in_every_verb(ctvlm, archive, phantom, model, tmp_path):
    address = archive.address(phantom[0].scan.main.uid)
    status, _, err = ctvlm("embed", address, "-m", model, "-o", tmp_path / "e.safetensors", "-q")
    assert status == 0 and (tmp_path / "e.safetensors").exists(), err
    status, out, err = ctvlm("search", "a cyst", address, main_series(phantom), "-m", model, "--json", "-q")
    assert status == 0 and len({r["similarity"] for r in json.loads(out)}) == 1, err
    status, _, err = ctvlm("preprocess", address, "-o", tmp_path / "w.safetensors", "-q")
    assert status == 0, err
    status, out, err = ctvlm("series", archive.address(), "--json")
    assert status == 0 and {r["number"] for r in json.loads(out)} == {s.number for s in phantom[0].scan.series}, err


def test_check_takes_addresses(ctvlm, archive, phantom, tmp_path):
    "Of a study every series is read; the table says the addresses and the reasons, and beside a folder both are there."
    report = tmp_path / "check.csv"
    status, out, err = ctvlm("check", archive.address(), main_series(phantom), "-o", report, "--json", "-q")
    rows, table = json.loads(out), pd.read_csv(report)
    assert status == (1 if any(r["status"] != "ok" for r in rows) else 0), err
    wanted = {archive.address(s.uid) for s in phantom[0].scan.series} | {str(main_series(phantom))}
    assert {r["path"] for r in rows} == set(table.path) == wanted
    said = {r["path"]: r for r in rows}
    main, here = said[archive.address(phantom[0].scan.main.uid)], said[str(main_series(phantom))]
    assert main["status"] == "ok" and {**main, "path": "", "name": ""} == {**here, "path": "", "name": ""}
    status, out, err = ctvlm("check", archive.address("1.2.3"), "-o", tmp_path / "none.csv", "-q")
    assert status == 2 and "check both UIDs" in err and not (tmp_path / "none.csv").exists(), err


@pytest.mark.parametrize("where", ["archive", "marked"])
def test_view_takes_an_address(archive, phantom, marked, model, tmp_path, where):
    "The page answers, holds no word of the patient, and at Ctrl-C nothing is left."
    pytest.importorskip("voila")
    scan = {"archive": [archive.address(), "--series", phantom[0].scan.main.number], "marked": [marked / main_series(phantom).name]}[where]
    (tmp_path / "report.txt").write_text(phantom[0].report.text)
    (temporary := tmp_path / "temporary").mkdir()
    words = [sys.executable, "-m", "ctvlm.cli", "view", *scan, "-m", model, "--report", tmp_path / "report.txt", "--json"]
    with open(tmp_path / "log", "w+") as log:
        process = subprocess.Popen([str(w) for w in words], env=os.environ | {"TMPDIR": str(temporary)}, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            url = json.loads(process.stdout.readline())["url"]
            page = urllib.request.urlopen(url, timeout=300).read().decode()
            assert "ctvlm reader" in page and any(temporary.iterdir())
        finally: process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=120)
        log.seek(0)
        assert not leaks(page + out + log.read()) and not list(temporary.iterdir())


def test_a_table_of_addresses(ctvlm, archive, phantom, model, tmp_path):
    "Two studies of an archive; a third that it has not is a row that failed. Kept by the UID: a second run fetches nothing."
    other = PhantomCohort(4, seed=0, spacing=(12., 12., None))[2]
    other.write_dicom(tmp_path / "other")
    study = archive.upload(tmp_path / "other")
    scans = [archive.address(phantom[0].scan.main.uid), archive.address(other.scan.main.uid, study=study), archive.address("1.2.3")]
    pd.DataFrame(dict(study=["a", "b", "c"], patient=["a", "b", "c"], scan=scans, report=["Normal chest."] * 3)).to_csv(tmp_path / "reports.csv", index=False)
    status, out, err = ctvlm("studies", tmp_path, "--as", "csv", "-o", tmp_path / "studies.parquet", "--json", "-q")
    table = pd.read_parquet(tmp_path / "studies.parquet")
    assert list(table.scan) == scans and list(table.file) == [s.rpartition("/")[2] for s in scans], err
    embed = ("embed", tmp_path / "studies.parquet", "-m", model, "-o", tmp_path / "features", "--workers", 0, "--json", "-q")
    status, out, err = ctvlm(*embed)
    found = json.loads(out)
    assert status == 1 and (found["present"], found["computed"], found["failed"]) == (2, 2, 1), out + err
    found = json.loads(ctvlm(*embed)[1])
    assert (found["present"], found["computed"], found["failed"]) == (2, 0, 1)


def test_a_wrong_address_is_refused(ctvlm, tmp_path):
    pd.DataFrame(dict(study=["a"], patient=["a"], scan=["dicomweb://host/studies/x"], report=["Normal chest."])).to_csv(tmp_path / "reports.csv", index=False)
    ctvlm("studies", tmp_path, "--as", "csv", "-o", tmp_path / "studies.parquet", "-q")
    assert "is no address" in (tmp_path / "studies.refused.csv").read_text()


def test_what_the_radiologist_wrote(ctvlm, phantom, tmp_path):
    study, folder = phantom
    (tmp_path / "report.txt").write_text(study.report.text)
    status, out, err = ctvlm("mine", tmp_path / "report.txt", "--dicom", folder, "--sr", tmp_path / "sr.dcm", "--json", "-q")
    said = json.loads(out)
    groups = hd.sr.srread(tmp_path / "sr.dcm").content.get_image_measurement_groups()
    assert status == 0 and said["references"] == len(groups) >= 1, err
    assert {g.tracking_identifier for g in groups} <= {r.snippet for r in mine_report(study.report.text)}
    uids = {pydicom.dcmread(f, stop_before_pixels=True).SOPInstanceUID for f in (folder / f"series-{said['series']:03d}").iterdir()}
    assert {g.source_images[0].referenced_sop_instance_uid for g in groups} <= uids
    (tmp_path / "none.txt").write_text("Normal chest.")
    for k in (1, 2): PhantomCohort(4, seed=0, spacing=(24., 24., None))[k].write_dicom(tmp_path / "two" / str(k))
    for words, line in ((["none.txt", "--dicom", folder], "no reference of the report"), (["report.txt"], "add --dicom STUDY"), (["report.txt", "--dicom", tmp_path / "two"], "holds 2 studies")):
        status, out, err = ctvlm("mine", tmp_path / words[0], *words[1:], "--sr", tmp_path / "other.dcm", "-q")
        assert status == 2 and line in err and not (tmp_path / "other.dcm").exists(), err


# ---- nothing leaks

def test_the_marker_would_be_found(marked):
    assert leaks(next(marked.rglob("*.dcm")).read_bytes())


def silent(ctvlm, *words):
    "Run a verb and look for the patient in what it prints and logs; its status."
    status, *printed = ctvlm(*words)
    assert not leaks("".join(printed) + ctvlm.logged()), words
    return status


@pytest.mark.parametrize("how", ["note", "log"])
def test_a_planted_leak_is_found(ctvlm, phantom, marked, tmp_path, monkeypatch, how):
    "A reader that puts the patient's name into a note or into the log."
    import logging
    from dataclasses import replace
    from ctvlm import preprocessing
    own, scan = preprocessing.load_volume, marked / main_series(phantom).name
    def leaky(path, *more, **options):
        name = pydicom.dcmread(next(path.iterdir()), stop_before_pixels=True).PatientName
        if how == "log": logging.getLogger("ctvlm").error("reading %s", name)
        volume = own(path, *more, **options)
        return replace(volume, notes=(f"of {name}",)) if how == "note" else volume
    words = ("preprocess", scan, "-o", tmp_path / "w.safetensors", "--overwrite")
    assert silent(ctvlm, *words) == 0
    monkeypatch.setattr(preprocessing, "load_volume", leaky)
    with pytest.raises(AssertionError, match="preprocess"): silent(ctvlm, *words)


def test_nothing_leaks(ctvlm, phantom, marked, model, tmp_path, temporary, monkeypatch):
    "Of every verb that reads DICOM: what it prints, what it writes, and how it calls that; also of a series that cannot be read."
    out = tmp_path / "out"
    out.mkdir(); monkeypatch.chdir(out)
    (out / "report.txt").write_text(phantom[0].report.text)
    pd.DataFrame(dict(study=[phantom[0].study], patient=["p"], report=[phantom[0].report.text])).to_csv(out / "reports.csv", index=False)
    scan = marked / main_series(phantom).name
    broken = marked.parent / "broken"
    if not broken.exists():
        shutil.copytree(scan, broken)
        f = sorted(broken.iterdir())[3]
        f.write_bytes(f.read_bytes()[:-5000])
        sorted(broken.iterdir())[1].unlink()
    statuses = {}
    verbs = [("check", marked, broken, "-o", "check.csv"), ("series", marked), ("series", marked, "--json"), ("preprocess", scan, "-o", "w.safetensors"),
             ("localize", scan, "-m", model, "-t", TEXT, "-o", "a.csv", "-o", "a.json", "-o", "a.png", "--slicer", "a.mrk.json"), ("localize", scan, "-m", model, "-t", TEXT, "--json"),
             ("localize", broken, "-m", model, "-t", TEXT), ("classify", scan, "-m", model, "-o", "c.csv"), ("classify", marked, "-m", model, "--json"), ("embed", scan, "-m", model, "-o", "e.safetensors"),
             ("embed", scan, "-m", model, "--json"), ("mine", "reports.csv", "--dicom", marked, "-o", "pairs.parquet"), ("mine", "report.txt", "--dicom", marked, "--sr", "asked.dcm"),
             ("search", "cyst", scan, "-m", model), ("localize", scan, "-m", model, "-t", TEXT, "-o", "b.json", "--sr", "sr.asked.dcm", "--key-objects", "ko.asked.dcm")]
    for n, words in enumerate(verbs):
        statuses[n] = silent(ctvlm, *words)
    assert [n for n, s in statuses.items() if s == 3] == [] and statuses[4] == 0 and statuses[14] == 0, statuses
    os.umask(umask := os.umask(0))
    files = [p for p in out.rglob("*") if p.is_file()]
    assert {"a.csv", "a.json", "a.png", "a.mrk.json", "c.csv", "check.csv", "w.safetensors", "e.safetensors", "pairs.parquet", "asked.dcm", "ko.asked.dcm", "sr.asked.dcm"} <= {p.name for p in files}
    for p in files:
        asked = p.name.endswith("asked.dcm")                        # these hold the patient, and only their owner reads them
        assert bool(leaks(p.read_bytes())) == asked and not leaks(p.name), p.name
        assert p.stat().st_mode & 0o777 == (0o600 if asked else 0o666 & ~umask), p.name


def test_a_table_of_dicom_studies(ctvlm, marked, model, tmp_path):
    "The number of the patient is what keeps patients apart in a table of studies; the name and the birth date are not."
    shutil.copytree(marked, tmp_path / "root" / "study")
    uid = str(pydicom.dcmread(next(marked.rglob("*.dcm")), stop_before_pixels=True).StudyInstanceUID)
    pd.DataFrame(dict(study=[uid], report=["Normal chest."])).to_csv(tmp_path / "reports.csv", index=False)
    status, *printed = ctvlm("studies", tmp_path / "root", "--as", "dicom", "--reports", tmp_path / "reports.csv", "-o", tmp_path / "studies.parquet")
    assert not leaks("".join(printed)), printed
    table = pd.read_parquet(tmp_path / "studies.parquet")
    assert len(table) and not {"Zwiebel", "Ottokar", "19120323"} & set(leaks(table.to_csv()))
    status, *printed = ctvlm("embed", tmp_path / "studies.parquet", "-m", model, "-o", tmp_path / "features", "--workers", 0)
    assert status == 0 and not leaks("".join(printed)), printed
    assert not [p for p in (tmp_path / "features").rglob("*.safetensors") if leaks(p.read_bytes())]


# ---- an export as it comes on a disc

@pytest.fixture(scope="module")
def export(tmp_path_factory):
    "Two patients, one of them with two studies, under one DICOMDIR; files are called as pydicom's `FileSet` calls them."
    from pydicom.fileset import FileSet
    folder, files = tmp_path_factory.mktemp("disc"), FileSet()
    for n, patient in enumerate(("ZWBF1", "ZWBF1", "ZWBF2")):
        PhantomCohort(6, seed=3, spacing=(12., 12., None))[n].write_dicom(folder / "plain" / str(n))
        for path in sorted((folder / "plain" / str(n)).rglob("*.dcm")):
            ds = pydicom.dcmread(path)
            ds.update({"PatientID": patient, "PatientName": f"Zwiebelfisch^{patient}"})
            for name, value in (("StudyDate", "20200101"), ("StudyTime", "120000"), ("StudyID", str(n))): setattr(ds, name, value)
            files.add(ds)
    files.write(folder / "export")
    assert (folder / "export" / "DICOMDIR").is_file()
    return folder / "export"


def test_the_series_of_an_export(ctvlm, export, tmp_path):
    "Rows without patients; what `series` names, every verb takes."
    status, out, err = ctvlm("series", export, "--json")
    rows = json.loads(out)
    assert status == 0 and {r["study"] for r in rows} == {1, 2, 3} and not leaks(out + err), err
    assert sum(r["use"] == "chosen" for r in rows) == 3                     # one in each study
    status, out, err = ctvlm("preprocess", export, "-o", tmp_path / "w.safetensors")
    assert status == 2 and not leaks(err) and not (tmp_path / "w.safetensors").exists(), err
    assert "holds 3 studies" in err and "series" in err.partition("give ")[2], err
    for row in [r for r in rows if r["use"] == "chosen"][1:]:
        status, out, err = ctvlm("preprocess", export, "--series", row["uid"], "-o", tmp_path / f"{row['study']}.safetensors", "--json")
        assert status == 0 and json.loads(out)["windows"] > 0 and not leaks(out + err), err
