"Studies, adaptors on trees of the published layouts, the feature store and its bad days, batches."
import dataclasses, json, os, shutil, signal, subprocess, sys, tempfile, time
from pathlib import Path

import nibabel, numpy as np, pandas as pd, pyarrow as pa, pyarrow.parquet as pq, pytest, torch

import ctvlm.adaptors, ctvlm.cli, ctvlm.features, ctvlm.studies, ctvlm.data as data, made_up_encoder
from ctvlm.core import InputError, Notice, write_atomically
from ctvlm.data import *
from ctvlm.findings import CT_RATE_CLASSES, FINDINGS
from ctvlm.model import CTVLMConfig, CTVLMModel
from ctvlm.phantoms import PhantomCohort, write_cohort
from ctvlm.prepared import PreparedEncoder
from ctvlm.preprocessing import load_volume, make_windows
from ctvlm.text import train_tokenizer
from typer.testing import CliRunner


# ---------------------------------------------------------------- made-up data

def body(shape=(24, 22, 20), seed=0):
    "A ball of soft tissue in fat in air, in HU."
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    r = np.sqrt(x**2 + y**2 + z**2)
    noise = np.random.default_rng(seed).normal(0, 12, shape)
    return (np.select([r < 0.6, r < 0.85], [40, -100], -1000) + noise).clip(-1024, 3000).astype(np.int16)


def nifti(path, array=None, affine=None, code=1, spacing=(3., 3., 3.), seed=0):
    "Write a small scan as NIfTI."
    array = body(seed=seed) if array is None else array
    if affine is None: affine = np.diag([*spacing, 1.]); affine[:3, 3] = -30, -40, -300
    image = nibabel.Nifti1Image(array, None)
    image.set_sform(affine, code); image.set_qform(affine if np.isfinite(affine).all() else np.eye(4), code)
    if not np.isfinite(affine).all(): image.header["sform_code"], image.header["qform_code"], image.header["srow_x"] = 1, 0, affine[0]
    image.header["pixdim"][1:4] = spacing
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)
    return path


def cut(path):
    path.write_bytes(path.read_bytes()[:len(path.read_bytes()) * 2 // 3])
    return path


def broken(folder, name):
    "Files of the known kinds, named by their fault."
    nan = np.diag([3., 3., 3., 1.]); nan[0, 3] = np.nan
    nifti(folder / name("nan"), affine=nan)
    nifti(folder / name("four axes"), np.stack([body()] * 2, -1))
    nifti(folder / name("no orientation"), code=0)
    nifti(folder / name("thin"), body()[:, :, :1])
    cut(nifti(folder / name("cut")))


FAULTS = {"nan": "not finite", "four axes": "4 axes", "no orientation": "sform and qform", "thin": "voxels", "cut": "cut off"}


def row(study, patient=None, scan="", **changes):
    return {**dict(study=study, patient=patient or study, scan=scan or f"/data/{study}.nii.gz", series="", language="en", findings="A nodule.", impression="Nodule.",
                   labels={"Lung nodule": 1}, pairs=[], split="train", source="made up", label_version="none"), **changes}


def table(*rows): return pd.DataFrame(list(rows), columns=data.STUDY_SCHEMA.names)


def tiny(seed=0):
    torch.manual_seed(seed)
    sizes = dict(width=24, depth=1, heads=2, layer_scale=1.)
    return CTVLMModel(CTVLMConfig.tiny(300, window=(16, 16, 32), window_encoder=sizes, scan_encoder={**sizes, "rope_base": 100.}, head_widths=(16, 16, 16), projection_dim=16)).eval()


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    "Ten scans, one of them cut off, in a folder with a space and umlauts."
    root = tmp_path_factory.mktemp("data") / "Röntgen Süd"
    scans = [nifti(root / f"Fall Nr {i}.nii.gz", seed=i) for i in range(10)]
    cut(scans[3])
    pairs = [[dict(snippet="a nodule", cleaned="a nodule", series=2, image=5, image_end=None, depth_mm=d, plane=None, prior=False, rule="made up", status="ok") for d in (-290. + i, -2000.)] for i in range(10)]
    return table(*(row(f"s{i}", scan=str(s), pairs=pairs[i], findings=f"Nodule number {i}, unchanged.") for i, s in enumerate(scans)))


@pytest.fixture(scope="module")
def filled(hospital, tmp_path_factory):
    "The features of the hospital by the tiny model."
    output = tmp_path_factory.mktemp("features")
    return output, embed_studies(hospital, tiny(), output, workers=0, quiet=True)


@pytest.fixture(scope="module")
def tokenizer(): return train_tokenizer(["Findings: Nodule number 1, unchanged.\nImpressions: Nodule.\n"], 300)


# ---------------------------------------------------------------- the table

def test_round_trip_with_umlauts_and_unknowns(tmp_path):
    studies = table(row("Ä 1", scan="/Süd/Fall 1.nii.gz", labels={"Emphysema": 0}, pairs=[dict(snippet="Rundherd", cleaned="Rundherd", image=3, depth_mm=None, status="no index")]), row("b"))
    back = read_studies(write_studies(studies, tmp_path / "Tabelle ä.parquet"))
    assert back.labels.tolist() == studies.labels.tolist() and back.study.tolist() == ["Ä 1", "b"]
    pair = back.pairs[0][0]
    assert pair["snippet"] == "Rundherd" and pair["depth_mm"] is None and pair["prior"] is None


@pytest.mark.parametrize("change, says", [
    (lambda t: t.drop_columns(["patient"]), "no column 'patient'"),
    (lambda t: t.set_column(1, "patient", pa.array(["a", None])), "row 1, column 'patient' is null"),
    (lambda t: t.set_column(0, "study", pa.array(["a", ""])), "row 1, column 'study' is empty"),
    (lambda t: t.set_column(7, "labels", pa.array([["x"], ["y"]])), "row 0, column 'labels'"),
    (lambda t: t.set_column(9, "split", pa.array(["train", "dev"])), "row 1, column 'split' is 'dev'"),
    (lambda t: t.set_column(1, "patient", pa.array(["a", "a"])).set_column(9, "split", pa.array(["train", "test"])), "row 1, patient 'a' is in 'test'"),
    (lambda t: pa.concat_tables([t, t.slice(0, 1)]), "row 2, columns 'study', 'file', 'series' repeat"),
])
def test_a_wrong_parquet_file_names_row_and_column(tmp_path, change, says):
    pq.write_table(change(data.to_table(table(row("a"), row("b")))), tmp_path / "t.parquet")
    with pytest.raises(InputError, match=says): read_studies(tmp_path / "t.parquet")


def test_other_files_are_no_table(tmp_path):
    (tmp_path / "t.parquet").write_text("not Parquet")
    with pytest.raises(InputError, match="no Parquet file"): read_studies(tmp_path / "t.parquet")
    with pytest.raises(InputError, match="does not exist"): read_studies(tmp_path / "none.parquet")
    with pytest.raises(InputError, match="row 1, column 'findings' holds 3"): write_studies(table(row("a"), row("b", findings=3)), tmp_path / "u.parquet")


def test_splits_stay_when_patients_are_added():
    many = table(*(row(f"s{i}", f"p{i // 2}") for i in range(3000)))
    small, large = split_patients(many.iloc[:1000], {"val": 0.1, "test": 0.2}), split_patients(many, {"val": 0.1, "test": 0.2})
    assert (small.split == large.split.iloc[:1000]).all()
    assert (large.groupby("patient").split.nunique() == 1).all()
    shares = large.split.value_counts(normalize=True)
    assert abs(shares["val"] - 0.1) < 0.03 and abs(shares["test"] - 0.2) < 0.03
    assert (split_patients(many, {"val": 0.1, "test": 0.2}, seed=1).split != large.split).any()
    assert (split_patients(large.assign(split="test"), {"val": 0.5}).split == "test").all()   # published splits stay


def test_two_people_who_have_never_spoken_hold_out_the_same_patients():
    "Neither the name of the mount, nor the order of the shares, nor the type of a name decides."
    patients = [str(i) for i in range(2000)]
    held = lambda names, shares={"val": 0.1, "test": 0.2}, source="a": split_patients(table(*(row(f"s{i}", p, source=source) for i, p in enumerate(names))).assign(patient=names), shares).split.tolist()
    one = held(patients)
    assert one == held(patients, source="mnt") == held(patients, {"test": 0.2, "val": 0.1}) == held([int(p) for p in patients]) == held([f" {p} " for p in patients])
    assert held(["P1", "p1 ", "P  2"]) == held(["p1", "p1", "p 2"]) and 0.25 < np.mean([s != "train" for s in one]) < 0.35
    assert one[:300] == held(patients[:300])
    for shares in ({"val": -0.1}, {"val": 0.6, "test": 0.6}, {"dev": 0.1}, {"val": float("nan")}):
        with pytest.raises(InputError, match="shares are"): held(patients[:3], shares)


def test_a_patient_held_out_once_is_held_out_everywhere(tmp_path):
    some = table(*(row(f"s{i}", f"p{i // 2}", split="test" if i % 2 else "train") for i in range(200)))
    for rows in (some, some.iloc[::-1]):                              # whichever row of a patient comes first
        placed = split_patients(rows, {"val": 0.5})
        assert set(placed.split) == {"test"} and len(to_table(placed)) == 200
    with pytest.raises(InputError, match="row 1, patient 'P 1' is in 'test'"): to_table(table(row("a", "p 1"), row("b", "P 1", split="test")))
    with pytest.warns(Notice, match="different sources: 1 .p1."): to_table(table(row("a", "p1"), row("b", "p1", split="test", source="other")))


@pytest.mark.parametrize("labels, says", [({"Lung nodule": 7}, "'Lung nodule': 7"), ({"Lung nodul": 1}, "'Lung nodul': 1")])
def test_labels_are_findings_with_0_or_1(labels, says):
    with pytest.raises(InputError, match="row 1, column 'labels' holds " + says): to_table(table(row("a"), row("b", labels=labels)))


# ---------------------------------------------------------------- adaptors

@pytest.fixture(scope="module")
def ct_rate(tmp_path_factory):
    root = tmp_path_factory.mktemp("ct-rate")
    d = root / "dataset"
    names = ["train_1_a_1", "train_1_a_2", "train_2_a_1", "train_3_a_1", "train_4_a_1", "valid_1_a_1", "valid_1_a_2", "valid_1_b_1", "valid_2_a_1"]
    place = lambda n: d / f"{n.split('_')[0]}_fixed" / "_".join(n.split("_")[:2]) / "_".join(n.split("_")[:3]) / f"{n}.nii.gz"
    for i, n in enumerate(names): nifti(place(n), seed=i)
    place("train_4_a_1").unlink()
    broken(d, lambda fault: place(f"valid_{10 + list(FAULTS).index(fault)}_a_1").relative_to(d))
    bad = [f"valid_{10 + k}_a_1" for k in range(len(FAULTS))]
    nifti(d / "valid_fixed" / "valid_9" / "valid_9_a" / "valid_9_a_1.nii.gz")                 # without a report
    (d / "radiology_text_reports").mkdir(); (d / "multi_abnormality_labels").mkdir(); (d / "metadata").mkdir()
    for part, long in (("train", "train"), ("valid", "validation")):
        mine = [n for n in names + bad if n.startswith(part)]
        pd.DataFrame(dict(VolumeName=[n + ".nii.gz" for n in mine], ClinicalInformation_EN="Cough", Technique_EN="CT", Findings_EN="Nodules, no effusion", Impressions_EN="Nodules")).to_csv(d / "radiology_text_reports" / f"{long}_reports.csv", index=False)
        labels = pd.DataFrame(0, index=range(len(mine)), columns=list(CT_RATE_CLASSES)); labels["Lung nodule"] = 1
        labels.insert(0, "VolumeName", [n + ".nii.gz" for n in mine])
        labels.to_csv(d / "multi_abnormality_labels" / f"{part}_predicted_labels.csv", index=False)
        pd.DataFrame(dict(VolumeName=[n + ".nii.gz" for n in mine], XYSpacing=["[1.5, 1.5]" if n == "valid_2_a_1" else "[3.0, 3.0]" for n in mine], ZSpacing=3.0)).to_csv(d / "metadata" / f"{long}_metadata.csv", index=False)
    (d / "metadata" / "no_chest_train.txt").write_text("train_3_a_1.nii.gz\n")
    outside = nifti(root.parent / "elsewhere" / "x.nii.gz")
    target = place("train_2_a_1"); target.unlink(); target.symlink_to(outside)
    return root


def test_ct_rate_to_the_letter(ct_rate):
    studies, refused = read_ct_rate(ct_rate)
    assert [Path(s).name for s in studies.scan] == [f"{n}.nii.gz" for n in ("train_1_a_1", "train_1_a_2", "valid_1_a_1", "valid_1_a_2", "valid_1_b_1")]
    assert studies.study.tolist() == ["train_1_a"] * 2 + ["valid_1_a"] * 2 + ["valid_1_b"] and studies.patient.tolist() == ["train_1"] * 2 + ["valid_1"] * 3
    assert studies.split.tolist() == ["train"] * 2 + ["test"] * 3
    assert studies.labels[0]["Lung nodule"] == 1 and studies.labels[0]["Emphysema"] == 0 and studies.findings[0] == "Nodules, no effusion"
    assert "Spiculated nodule" not in studies.labels[0] and studies.labels[0]["Centrilobular emphysema"] == 0
    why = dict(zip(refused.study, refused.reason))
    for k, says in enumerate(FAULTS.values()): assert says in why[f"valid_{10 + k}_a"]
    assert "leaves" in why["train_2_a"] and "no_chest" in why["train_3_a"] and "missing" in why["train_4_a"] and "no report" in why["valid_9_a"] and "metadata" in why["valid_2_a"]
    assert len(refused) == 5 + len(FAULTS)
    load_volume(studies.scan[0])


def test_ct_rate_first_reconstruction_only(ct_rate):
    studies, _ = read_ct_rate(ct_rate, duplicates="first")
    assert [Path(s).name for s in studies.scan] == ["train_1_a_1.nii.gz", "valid_1_a_1.nii.gz", "valid_1_b_1.nii.gz"]
    with pytest.raises(InputError, match="'all' or 'first'"): read_ct_rate(ct_rate, duplicates="some")
    with pytest.raises(InputError, match="train_fixed"): read_ct_rate(ct_rate / "dataset" / "metadata")


def test_scan_studies_counts(ct_rate, tmp_path):
    counts = scan_studies(ct_rate, "ct-rate", tmp_path / "studies.parquet", quiet=True)
    assert {k: counts[k] for k in ("volumes", "reports", "patients", "languages", "missing", "refused")} == dict(volumes=5, reports=3, patients=2, languages={"en": 3}, missing=1, refused=4 + len(FAULTS))
    assert sum(counts["reasons"].values()) == 5 + len(FAULTS) and len(read_studies(tmp_path / "studies.parquet", "test")) == 3
    assert len(pd.read_csv(tmp_path / "studies.refused.csv")) == 5 + len(FAULTS)
    with pytest.raises(InputError, match="no layout"): scan_studies(ct_rate, "ctrate", tmp_path / "x.parquet")
    with pytest.raises(InputError, match="takes no duplicates"): scan_studies(ct_rate, "merlin", tmp_path / "x.parquet", duplicates="first")


def test_links_into_a_hub_cache_are_inside(tmp_path):
    blob = nifti(tmp_path / "datasets--x" / "blobs" / "0.nii.gz")
    link = tmp_path / "datasets--x" / "snapshots" / "abc" / "a.nii.gz"
    link.parent.mkdir(parents=True); link.symlink_to(blob)
    assert scan_problem(link, link.parent) == ""


def test_merlin(tmp_path):
    for s in ("AC1", "AC2", "AC3"): nifti(tmp_path / "merlin_data" / f"{s}.nii.gz")
    reports = dict(zip(("AC1", "AC2", "AC4"), ("Liver: normal. IMPRESSION: 1. No acute finding.", "Liver: cyst.\n1. Hepatic cyst.\n2. Nothing else.", "Normal.")))
    pd.DataFrame({"study id": reports.keys(), "Findings": reports.values(), "Split": ["train", "val", "test"]}).to_excel(tmp_path / "reports_final.xlsx", index=False)
    studies, refused = read_merlin(tmp_path)
    assert studies[["study", "findings", "impression", "split"]].values.tolist() == [["AC1", "Liver: normal.", "1. No acute finding.", "train"], ["AC2", "Liver: cyst.", "1. Hepatic cyst.\n2. Nothing else.", "val"]]
    assert studies.labels[1].get("Hepatic cyst") == 1 and studies.label_version[1].startswith("rules")
    assert dict(zip(refused.study, ("no report" in r for r in refused.reason))) == {"AC3": True, "AC4": False}


def test_inspect(tmp_path):
    full = tmp_path / "full"
    for s in ("PE1", "PE2", "PE9"): nifti(full / "CTPA" / f"{s}.nii.gz")
    pd.DataFrame(dict(person_id=[7, 7, 8], impression_id=[101, 102, 103], image_id=["PE1", "PE2", "PE3"])).to_csv(full / "study_mapping_20250611.tsv", sep="\t", index=False)
    pd.DataFrame(dict(impression_id=[101, 102, 103], impressions=["No pulmonary embolism.", "Embolism,\tright.", "x"])).to_csv(full / "impressions_20250611.tsv", sep="\t", index=False)
    pd.DataFrame(dict(impression_id=[101, 101, 102, 103], split=["valid", "valid", "valid", "test"])).to_csv(full / "splits_20250611.tsv", sep="\t", index=False)
    studies, refused = read_inspect(tmp_path)
    assert studies[["study", "patient", "findings", "impression", "split"]].values.tolist() == [["PE1", "7", "", "No pulmonary embolism.", "val"], ["PE2", "7", "", "Embolism,\tright.", "val"]]
    assert studies.labels[0]["Pulmonary embolism"] == 0
    assert refused.study.tolist() == ["PE3", "PE9"]


def test_rad_chestct(tmp_path):
    (tmp_path / "npz").mkdir()
    ct = body((30, 28, 26)); ct[3, 5, 7] = 2000                              # indices count from head, front and right
    for s in ("trn1", "tst1", "tst3"): np.savez_compressed(tmp_path / "npz" / f"{s}.npz", ct=ct)
    cut(tmp_path / "npz" / "tst3.npz")
    for part, ids in (("train", ["trn1"]), ("test", ["tst1", "tst2", "tst3"])):
        pd.DataFrame({"NoteAcc_DEID": ids, "calcification*aorta": 0, "calcification*heart": 1, "nodule*left_lung": 0, "nodulegr1cm*lung": 0, "hernia*esophagus": 0, "air_trapping*lung": 1}).to_csv(tmp_path / f"img{part}_Abnormality_and_Location_Labels.csv", index=False)
    studies, refused = read_rad_chestct(tmp_path)
    assert studies[["study", "split", "findings", "label_version"]].values.tolist() == [["trn1", "train", "", "Rad-ChestCT"], ["tst1", "test", "", "Rad-ChestCT"]]
    label = studies.labels[1]
    assert label["Arterial wall calcification"] == label["Coronary artery wall calcification"] == 1 and label["Lung nodule"] == label["Hiatal hernia"] == 0 and "Mosaic attenuation pattern" not in label
    assert refused.study.tolist() == ["tst2", "tst3"]
    v = load_volume(studies.scan[1])
    assert v.array.shape == (26, 28, 30) and np.allclose(v.spacing, 0.8)
    assert np.unravel_index(v.array.argmax(), v.array.shape) == (25 - 7, 27 - 5, 29 - 3)   # and RAS from left, back and feet


@pytest.mark.parametrize("labels, metadata", [("", ".npz"), (".npz", ""), (".npz", ".npz"), ("", "")])
def test_the_patient_is_found_with_and_without_the_ending(tmp_path, labels, metadata):
    (tmp_path / "npz").mkdir()
    np.savez_compressed(tmp_path / "npz" / "trn1.npz", ct=body((12, 12, 12)))
    pd.DataFrame({"NoteAcc_DEID": ["trn1" + labels], "nodule*lung": 1}).to_csv(tmp_path / "imgtrain_Abnormality_and_Location_Labels.csv", index=False)
    pd.DataFrame({"NoteAcc_DEID": ["trn1" + metadata], "MRN_DEID": ["m7"]}).to_csv(tmp_path / "CT_Scan_Metadata_Complete_1.csv", index=False)
    studies, refused = read_rad_chestct(tmp_path)
    assert studies[["study", "patient"]].values.tolist() == [["trn1", "m7"]] and not len(refused)


def test_the_owners_split_wins_and_its_overlap_is_said(tmp_path):
    "p1 is in training and test, p2 in validation and test: the test part is whole, the other rows are refused and counted."
    root = clinic(tmp_path, "study,patient,split,report\na,p1,train,Emphysema.\nb,P1 ,test,Normal.\nc,p2,val,x\nd,p2,test,y\ne,p3,train,z\n", "abcde")
    counts = scan_studies(root, "csv", tmp_path / "t.parquet", quiet=True)
    studies = read_studies(tmp_path / "t.parquet")
    assert studies.study.tolist() == ["b", "d", "e"] and studies.split.tolist() == ["test", "test", "train"]
    assert counts["reasons"] == {"study a is in train, its patient is held out in test": 1, "study c is in val, its patient is held out in test": 1}


def test_a_report_over_the_limit_keeps_its_impression_and_is_counted(hospital, filled, tokenizer):
    long = hospital.iloc[:1].assign(findings="Nodule number 1. " * 900, impression="Unchanged.")
    b = Batches(long, filled[0], tokenizer)
    batch, = b
    text = tokenizer.decode(batch["report_ids"][0], skip_special_tokens=True)
    assert b.left_out["reports: too long, the findings lose their end"] == 1
    assert len(batch["report_ids"][0]) <= 1024 and text.endswith("Impressions: Unchanged.\n")


def test_the_classes_of_the_benchmarks_are_in_the_catalogue():
    assert set(CT_RATE_CLASSES) <= set(FINDINGS)
    assert set(data.RAD_CHESTCT) == {f.rad_chestct for f in FINDINGS.values() if f.rad_chestct} and len(data.RAD_CHESTCT) == 16


def test_csv_folder_of_a_clinic(tmp_path):
    "Semicolons, cp1252, umlauts and spaces in names, links to another disk, one text per report."
    root = tmp_path / "Klinik Süd"
    scan = nifti(root / "Aufnahmen 2024" / "Fall ö.nii.gz")
    other = nifti(tmp_path / "other disk" / "b.nii.gz")
    (root / "scans").mkdir(); (root / "scans" / "0002.nii.gz").symlink_to(other)
    lines = ["study;patient;scan;text", "0001;P 1;Aufnahmen 2024/Fall ö.nii.gz;\"Befund: Rundherd im linken Oberlappen.\nBeurteilung: Rundherd.\"", "0002;P 2;;Befund: Kein Pleuraerguss.", "0003;P 3;;Nichts."]
    (root / "reports.csv").write_bytes("\n".join(lines).encode("cp1252"))
    with pytest.raises(InputError, match="none of 4 scans and rows"): scan_studies(root, "csv", tmp_path / "x.parquet", quiet=True)   # all rows are refused: no text is guessed
    studies, refused = read_csv_folder(root, encoding="cp1252", allow_outside=True)
    assert studies[["study", "patient", "language", "findings", "impression"]].values.tolist() == [["0001", "P 1", "de", "Rundherd im linken Oberlappen.", "Rundherd."], ["0002", "P 2", "de", "Kein Pleuraerguss.", ""]]
    assert studies.scan[0] == str(scan) and studies.labels[0]["Lung nodule"] == 1 and studies.labels[1]["Pleural effusion"] == 0
    assert refused.study.tolist() == ["0003"] and (studies.source == "").all() and studies.file[0] == "Aufnahmen 2024/Fall ö.nii.gz"
    inside, out = read_csv_folder(root, encoding="cp1252")
    assert inside.study.tolist() == ["0001"] and "leaves Klinik Süd" in dict(zip(out.study, out.reason))["0002"]
    with pytest.raises(InputError, match="expected also patient"): read_csv_folder(root, scan.parent / write(scan.parent / "r.csv", "study,text\n1,x\n"))


def clinic(root, table, scans=("a", "b", "c"), name="reports.csv"):
    for i, s in enumerate(scans): nifti(root / "scans" / f"{s}.nii.gz", seed=i)
    (root / name).write_text(table)
    return root


@pytest.mark.parametrize("head", ["study,patient,report", "Accession Number,MRN,Report_Text", "STUDY,PatientID,Findings", "id,person_id,impressions"])
def test_columns_are_known_by_their_names(tmp_path, head):
    studies, refused = read_csv_folder(clinic(tmp_path, head + '\na,1,"No pleural effusion."\nb,2,"Emphysema."\nc,3,Normal.\n'))
    assert len(studies) == 3 and not len(refused) and studies.labels[0]["Pleural effusion"] == 0 and studies.labels[1]["Emphysema"] == 1


def test_columns_can_be_named_and_a_table_without_reports_is_refused(tmp_path):
    root = clinic(tmp_path, "key,who,words\na,1,Emphysema.\nb,2,Emphysema.\nc,3,Normal.\n")
    with pytest.raises(InputError, match="columns key, who, words, expected also study and patient"): read_csv_folder(root)
    said = dict(study="key", patient="who")
    with pytest.raises(InputError, match="expected also report"): read_csv_folder(root, columns=said)
    studies, _ = read_csv_folder(root, columns=said | dict(report="words"))
    assert studies.labels[1]["Emphysema"] == 1
    empty = clinic(tmp_path / "e", "study,patient,report\na,1,\nb,2,\nc,3,\n")
    with pytest.raises(InputError, match="gave no report.*columns study=study, patient=patient, report=report"): read_csv_folder(empty)


def test_labels_in_words_and_the_rules_for_the_rest(tmp_path):
    studies, refused = read_csv_folder(clinic(tmp_path, "study,patient,report,emphysema,Lung_nodule\na,1,Pleural effusion.,yes,False\nb,2,Emphysema.,,ja\nc,3,x,7,0\n"))
    assert [studies.labels[0].get(f) for f in ("Emphysema", "Lung nodule", "Pleural effusion")] == [1, 0, 1]
    assert [studies.labels[1].get(f) for f in ("Emphysema", "Lung nodule")] == [None, 1] and studies.label_version[0].startswith("table, rules")
    assert "holds '7'" in refused.reason[0] and "line 4" in refused.reason[0]


def test_one_bad_cell_costs_one_row(tmp_path):
    rows = ["a,1,en,train,A nodule.", "b,,en,train,A nodule.", "c,3,DE,train,Ein Rundherd.", "d,4,en,holdout,A nodule.", "e,5,fr,train,Un nodule.", ",6,en,train,A nodule.", "g,7,en,train,A, nodule.",
            "a,1,en,train,A nodule.", "../out,9,en,train,A nodule.", "h,8,en,VALID,A nodule."]
    root = clinic(tmp_path / "r", "study,patient,language,split,report\n" + "\n".join(rows) + "\n", "abcdefgh")
    nifti(tmp_path / "r" / "out.nii.gz"); nifti(tmp_path / "r" / "scans" / ".hidden.nii.gz")
    studies, refused = read_csv_folder(root)
    assert studies[["study", "language", "split"]].values.tolist() == [["a", "en", "train"], ["c", "de", "train"], ["h", "en", "val"]]
    reasons = "\n".join(refused.reason)
    for says in ("has no patient", "split is 'holdout'", "language is 'fr'", "line 7: no study", "line 8 has 6 fields", "line 9: a.nii.gz belongs to an earlier row", "../out has no scan", "out.nii.gz has no row"): assert says in reasons, says
    assert len(refused) == 7 + 3                                                             # rows, and the scans out, f and g that no row names
    to_table(studies)


@pytest.mark.parametrize("scan", ["../elsewhere.nii.gz", "{outside}", "link/elsewhere.nii.gz"])
def test_what_leaves_the_root_is_refused(tmp_path, scan):
    outside = nifti(tmp_path / "elsewhere.nii.gz"); root = tmp_path / "root"; root.mkdir(); (root / "link").symlink_to(tmp_path)
    (root / "reports.csv").write_text(f"study,patient,report,scan\na,1,Emphysema.,{scan.format(outside=outside)}\n")
    studies, refused = read_csv_folder(root)
    assert not len(studies) and "leaves root" in refused.reason[0]
    assert len(read_csv_folder(root, allow_outside=True)[0]) == 1


def test_two_scans_of_one_name_in_two_folders(tmp_path):
    for s in ("s1", "s2"): nifti(tmp_path / s / "ct.nii.gz", seed=len(s))
    (tmp_path / "reports.csv").write_text("study,patient,report,scan\na,1,Emphysema.,s1/ct.nii.gz\na,1,Emphysema.,s2/ct.nii.gz\n")
    studies, _ = read_csv_folder(tmp_path)
    assert read_studies(write_studies(studies, tmp_path / "t.parquet")).file.tolist() == ["s1/ct.nii.gz", "s2/ct.nii.gz"]


@pytest.mark.parametrize("name, content, says", [("a.nrrd", b"", "is empty"), ("a.mha", b"", "is empty"), ("a.zip", b"", "is empty"), ("a.nii.gz", b"", "is empty"), ("a.nrrd", b"x" * 99, "does not begin"),
                                                 ("a.mha", b"\0" * 99, "does not begin"), ("a.zip", b"PK\3\4" + b"x" * 99, "cannot be read"), ("a", None, "an empty folder")])
def test_empty_scans_are_not_sound(tmp_path, name, content, says):
    (tmp_path / name).mkdir() if content is None else (tmp_path / name).write_bytes(content)
    assert says in scan_problem(tmp_path / name)


def test_a_table_where_nothing_fits_keeps_its_reasons(tmp_path):
    root = clinic(tmp_path, "study,patient,report\nx,1,a\ny,2,b\n", ())
    with pytest.raises(InputError, match="none of 2 scans and rows can be used .*has no scan.*see t.refused.csv"): scan_studies(root, "csv", tmp_path / "t.parquet", quiet=True)
    assert len(pd.read_csv(tmp_path / "t.refused.csv")) == 2 and not (tmp_path / "t.parquet").exists()


def test_a_dry_run_says_what_would_be_read(tmp_path):
    root = clinic(tmp_path, "study,patient,report,Age\na,1,Emphysema.,61\nx,2,b,47\n", ("a", "b"))
    before = sorted(tmp_path.rglob("*"))
    found = check_collection(root, "csv")
    assert (found["scans"], found["reports"], found["refused"]) == (1, 1, 2) and found["columns"] == dict(used=dict(study="study", patient="patient", report="report"), labels=[], ignored=["Age"])
    assert "x has no scan" in found["first"][0] and sorted(tmp_path.rglob("*")) == before
    counts = scan_studies(root, "csv", tmp_path / "t.parquet", quiet=True)
    assert counts["columns"] == found["columns"] and counts["volumes"] == found["scans"]


def test_series_with_semicolons(tmp_path):
    root = clinic(tmp_path, "study,patient,report\na,1,\"A nodule (series 2, image 5).\"\n", ("a",))
    (root / "series.csv").write_text("study;series;instance;depth_mm;localizer\na;2;5;-116.5;False\n")
    assert read_csv_folder(root)[0].pairs[0][0]["depth_mm"] == -116.5
    (root / "series.csv").write_text("study;series;instance;depth_mm\na;2;5;low\n")
    with pytest.raises(InputError, match="'depth_mm' holds something else"): read_csv_folder(root)


def test_what_is_held_out_twice_is_reported(tmp_path):
    root = clinic(tmp_path, 'study,patient,report,split\na,1,Emphysema of both lungs.,train\nb,2,Emphysema  of both lungs.,test\nc,3,Normal.,test\n')
    shutil.copy(root / "scans" / "a.nii.gz", root / "scans" / "c.nii.gz")
    with pytest.warns(Notice, match="1 held-out reports"), pytest.warns(Notice, match="1 held-out scans"): counts = scan_studies(root, "csv", tmp_path / "t.parquet", quiet=True)
    assert counts["held_out_twice"] == dict(reports=1, scans=1)


LAYOUTS = [ # report, findings, impression
    ("FINDINGS: a.\nIMPRESSION: b.", "a.", "b."), ("Findings: a. Impression: b.", "a.", "b."), ("FINDINGS\na.\nIMPRESSION\nb.", "a.", "b."), ("**Findings:** a.\n**Impression:** b.", "a.", "b."),
    ("Indication: x.\nFindings: a.\nConclusion: b.", "a.", "b."), ("Findings: a.\nConclusions: b.", "a.", "b."), ("Findings: a.\nSummary: b.", "a.", "b."), ("Findings: a.\nOpinion: b.", "a.", "b."),
    ("Findings: a.\nClinical opinion: b.", "a.", "b."), ("Findings: a.\nAssessment: b.", "a.", "b."), ("CT findings: a.\nFinal impression: b.", "a.", "b."), ("a.\nIMPRESSION: b.", "a.", "b."),
    ("Impression: b.\nFindings: a.", "a.", "b."), ("Findings and impression: a. b.", "a. b.", ""), ("Befund: a.\nBeurteilung: b.", "a.", "b."), ("Klinik: x. Befund: a. Beurteilung: b.", "a.", "b."),
    ("BEFUND\na.\n\nBEURTEILUNG\nb.", "a.", "b."), ("Befund und Beurteilung: a. b.", "a. b.", ""), ("Befund/Beurteilung:\na. b.", "a. b.", ""), ("Befunde: a.\nZusammenfassung: b.", "a.", "b."),
    ("Befund: a.\nZusammenfassende Beurteilung: b.", "a.", "b."), ("Befund: a.\nFazit: b.", "a.", "b."), ("a.\n1. b.\n2. c.", "a.", "1. b.\n2. c."), ("a. 1. b. 2. c.", "a.", "1. b. 2. c."),
    ("a.\n1. b.", "a.", "1. b."), ("Fraktur links. 1. Rippe intakt.", "Fraktur links. 1. Rippe intakt.", ""), ("Kontrolle am\n1. Mai empfohlen.", "Kontrolle am\n1. Mai empfohlen.", ""),
    ("a.", "a.", ""), ("Findings: a.\nImpression: b.\nAddendum: c.", "a.", "b.\nAddendum: c."), ("Addendum: c.\nFindings: a.\nImpression: b.", "a.\nAddendum: c.", "b."),
    ("Findings: a.\nImpression: b.\nAddendum: c. Impression: d.", "a.", "b.\nAddendum: c. Impression: d."), ("Findings: no summary of a.\nImpression: b.", "no summary of a.", "b."), ("", "", ""),
]


@pytest.mark.parametrize("text, findings, impression", LAYOUTS)
def test_layouts_of_reports(text, findings, impression): assert split_report(text) == (findings, impression)


def grow(kind, root, rng):
    "A random tree of a layout: files that are there, missing, doubled, cut and without a row, and rows likewise; how many files, and how many rows without a file."
    names = [f"{k:02}" for k in range(12)]
    there, listed = [[n for n in names if rng.random() < 0.7] for _ in range(2)]
    there, listed = there or names[:1], listed or names[:1]
    place = {"csv": "scans/{}.nii.gz", "merlin": "merlin_data/{}.nii.gz", "inspect": "full/CTPA/{}.nii.gz", "rad-chestct": "npz/{}.npz", "ct-rate": "dataset/valid_fixed/valid_1/valid_1_a/valid_1_a_{}.nii.gz"}[kind]
    files = [root / place.format(n) for n in there]
    files += [f.parent / "again" / f.name for f in files if rng.random() < 0.2]
    for f in files:
        f.parent.mkdir(parents=True, exist_ok=True)
        if kind == "rad-chestct": np.savez_compressed(f, ct=body((12, 12, 12)))
        else: nifti(f)
        if rng.random() < 0.2: cut(f)
    d = root / "dataset"
    id = {"ct-rate": [f"valid_1_a_{n}.nii.gz" for n in listed]}.get(kind, listed)
    write = lambda path, sep=",", **columns: (path.parent.mkdir(parents=True, exist_ok=True), pd.DataFrame(columns).to_csv(path, index=False, sep=sep))
    if kind == "csv": write(root / "reports.csv", study=id, patient=id, report="Emphysema.")
    elif kind == "merlin": pd.DataFrame({"study id": id, "Findings": "x", "Split": "train"}).to_excel(root / "reports_final.xlsx", index=False)
    elif kind == "inspect":
        write(root / "full/study_mapping_1.tsv", "\t", image_id=id, impression_id=id); write(root / "full/impressions_1.tsv", "\t", impression_id=id, impressions="x"); write(root / "full/splits_1.tsv", "\t", impression_id=id, split="train")
    elif kind == "rad-chestct": write(root / "imgtrain_Abnormality_and_Location_Labels.csv", NoteAcc_DEID=id, **{"nodule*lung": 0})
    else:
        write(d / "radiology_text_reports/validation_reports.csv", VolumeName=id, Findings_EN="x", Impressions_EN="y")
        write(d / "multi_abnormality_labels/valid_predicted_labels.csv", VolumeName=id, **{c: 0 for c in CT_RATE_CLASSES})
    return {str(f) for f in files}, sum(n not in there for n in listed)


@pytest.mark.parametrize("kind", ["csv", "merlin", "inspect", "rad-chestct", "ct-rate"])
@pytest.mark.parametrize("seed", range(4))
def test_the_two_tables_are_everything_that_was_there(tmp_path, kind, seed):
    "Every file is in one of the two tables, once; and so is every row whose file is not there."
    files, absent = grow(kind, tmp_path, np.random.default_rng(seed))
    for options in [{}] + [{"duplicates": "first"}] * (kind == "ct-rate"):
        studies, refused = data.READERS[kind](tmp_path, **options)
        named = [*studies.scan, *(s for s in refused.scan if s in files)]
        assert sorted(named) == sorted(files) and len(studies) + len(refused) == len(files) + absent


def test_every_dicom_study_is_accounted_for(tmp_path):
    rng = np.random.default_rng(0)
    there = [f"A{k}" for k in range(8) if rng.random() < 0.7]
    for k, a in enumerate(there): dicom(tmp_path / f"{k % 2}" / a, a, a, count=12)
    (tmp_path / "loop").symlink_to(tmp_path / "0")                                            # once is enough
    pd.DataFrame(dict(study=[f"A{k}" for k in range(2, 9)], report="Emphysema.")).to_csv(tmp_path / "reports.csv", index=False)
    studies, refused = read_dicom_root(tmp_path, workers=2)
    absent = {f"A{k}" for k in range(2, 9)} - set(there)
    assert len(studies) + len(refused) == len(there) + len(absent) and set(studies.study) == set(there) - {"A0", "A1"} and (studies.findings == "Emphysema.").all()
    pd.DataFrame(dict(study=["B1", "B2"], report="x")).to_csv(tmp_path / "other.csv", index=False)
    with pytest.raises(InputError, match=r"none of the 2 studies of other.csv \(B1, B2, ...\) is among the [0-9] of the archive \(A"): read_dicom_root(tmp_path, tmp_path / "other.csv")


def test_a_root_of_many_studies_is_read_in_linear_time():
    "Each folder and each of its parents is touched once: the count of steps, not a clock."
    for n in (200, 400):
        studies = {f"1.{k}": ({Path(f"/r/{k // 10}/{k}")}, f"A{k}", "p") for k in range(n)}
        below = ctvlm.adaptors._studies_below(studies)
        assert sum(map(len, below.values())) <= 5 * n and below[Path("/r/3")] == {f"1.{k}" for k in range(30, 40)}


def write(path, text): path.write_text(text); return path.name


def test_phantoms_on_disk_are_the_phantoms_in_memory(tmp_path):
    cohort = PhantomCohort(2, seed=8, spacing=(8., 8., None))
    write_cohort(cohort, tmp_path, quiet=True)
    (disk, refused), memory = read_phantoms(tmp_path), phantom_studies(cohort)
    for name in ("study", "patient", "language", "findings", "labels", "pairs"): assert disk[name].tolist() == memory[name].tolist(), name
    assert not len(refused) and (disk.source == "phantoms").all()
    a, b = open_scan(disk.scan[1]), open_scan(memory.scan[1])
    assert a.array.shape == b.array.shape and np.abs(a.array - b.array).max() < 1 and np.allclose(a.depths_mm, b.depths_mm, atol=1e-3)
    true = phantom_studies(cohort, truth=True)
    depths = [sorted(p["depth_mm"] for p in t if p["depth_mm"] is not None) for t in true.pairs]
    mined = [sorted(p["depth_mm"] for p in t if p["depth_mm"] is not None) for t in memory.pairs]
    assert depths == mined and set(true.label_version) == {"truth"}


def test_a_pool_of_processes_gives_the_same_phantoms():
    cohort = PhantomCohort(3, seed=8, spacing=(8., 8., None))
    pd.testing.assert_frame_equal(phantom_studies(cohort, workers=2), phantom_studies(cohort))


def dicom(folder, accession, patient, start=-100., name="{k}.dcm", series=2, count=16, description="Axial"):
    "Write one axial series, image 1 at the head."
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian
    folder.mkdir(parents=True, exist_ok=True)
    array, uid = body((24, 22, count)), f"1.2.{abs(int.from_bytes(accession.encode(), 'big')) % 10**12}"
    for k in range(1, count + 1):
        ds = Dataset()
        ds.file_meta = FileMetaDataset(); ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"{uid}.{series}.{k}"
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID, ds.AccessionNumber, ds.PatientID, ds.PatientName = uid, f"{uid}.{series}", f"{uid}.0", accession, patient, ""
        ds.Modality, ds.ImageType, ds.SeriesNumber, ds.InstanceNumber, ds.SeriesDescription = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"], series, k, description
        ds.ImagePositionPatient, ds.ImageOrientationPatient, ds.PixelSpacing, ds.SliceThickness = [-36, -33, start - 4. * (k - 1)], [1, 0, 0, 0, 1, 0], [3, 3], 4
        ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 22, 24, 1, "MONOCHROME2", 16, 16, 15, 1
        ds.RescaleSlope, ds.RescaleIntercept, ds.PixelData = 1, 0, array[:, :, count - k].T.astype("<i2").tobytes()
        ds.save_as(folder / name.format(k=k), enforce_file_format=True)
    return uid


def test_dicom_root(tmp_path):
    root = tmp_path / "Archiv Süd"
    dicom(root / "2024" / "Untersuchung 1" / "S2", "A-1", "Müller"); dicom(root / "2024" / "Untersuchung 1" / "S3", "A-1", "Müller", series=3, count=5)
    dicom(root / "2024" / "Untersuchung 2", "A-2", "Schmidt")
    uid = dicom(root / "2024" / "Untersuchung 3", "A-3", "Schmidt")
    dicom(root / "2024" / "Untersuchung 4", "A-4", "nobody's")                    # without a report
    dicom(root / "all in one", "A-5", "x"); dicom(root / "all in one", "A-6", "y", name="y{k}.dcm")
    (root / "2024" / "Untersuchung 2" / "notes.txt").write_text("no DICOM")
    rows = [("A-1", "Befund: Rundherd rechts (Serie 2, Bild 5).\nBeurteilung: Rundherd."), ("Untersuchung 2", "Findings: Nodule (series 2, image 99).\nImpression: Nodule."),
            (uid, "Findings: Normal.\nImpression: Normal."), ("A-5", "x"), ("nowhere", "x")]
    pd.DataFrame(rows, columns=["study", "text"]).to_csv(root / "reports.csv", index=False)
    studies, refused = read_dicom_root(root)
    assert studies[["study", "patient", "language"]].values.tolist() == [["A-1", "Müller", "de"], ["Untersuchung 2", "Schmidt", "en"], [uid, "Schmidt", "en"]]
    assert [Path(s).name for s in studies.scan] == [f"Untersuchung {i}" for i in (1, 2, 3)]
    assert [[(p["depth_mm"], p["status"]) for p in row] for row in studies.pairs] == [[(-116., "ok")], [(None, "no such image")], []]
    v = open_scan(studies.scan[0])
    assert v.array.shape == (24, 22, 16) and v.depths_mm[-1] == pytest.approx(-100) and v.image_number_at(-116.) == 5
    why = dict(zip(refused.study, refused.reason))
    assert "not below" in why["nowhere"] and "has no report" in why["A-4"] and "holds files of 2 studies" in why["A-5"]
    to_table(studies)


# ---------------------------------------------------------------- the store

def test_the_run_ends_with_one_unreadable_scan_in_ten(hospital, filled):
    output, found = filled
    assert (found["scans"], found["computed"], found["failed"]) == (10, 9, 1)
    index = pd.read_parquet(Path(found["store"]) / "index.parquet")
    assert index.status.tolist() == ["ok"] * 3 + ["failed"] + ["ok"] * 6 and "cut off" in index.reason[3] and "Fall Nr 3" in index.reason[3]
    p = found["profile"]
    assert len(p) == 10 and (p[list(data.PROFILE[1:-1])].diff(axis=1).iloc[:, 1:] >= 0).all(axis=None)
    assert set(p.process) == {os.getpid()}                    # here, one after another
    assert found["waiting"] + found["encoding"] == pytest.approx(p.encode_to.max())
    assert 0 < found["reading"] < found["waiting"] and found["cutting"] > 0 and found["copying"] == 0


def test_features_are_those_of_the_encoder(hospital, filled):
    model, store = tiny(), FeatureStore(filled[0])
    w = make_windows(load_volume(hospital.scan[0]), model.config.fit, model.config.window_spec)
    saved = store.load(data.scan_key(next(hospital.itertuples())))
    with torch.no_grad(): cls, tokens = model.encode_windows(w.windows)
    assert torch.allclose(saved["cls"].float(), cls, atol=2e-3) and torch.allclose(saved["depth_tokens"].float(), tokens, atol=2e-3)
    assert saved["grid"].tolist() == w.grid.tolist() and np.allclose(saved["bin_depths_mm"], w.bin_depths_mm)
    assert torch.equal(saved["patch_mask"], w.patch_mask.flatten(1, -2).any(1)) and saved["cls"].dtype == torch.float16


def test_a_second_run_computes_nothing_and_another_encoder_everything(hospital, filled, tmp_path):
    output, found = filled
    before = {p: p.stat().st_mtime_ns for p in Path(found["store"]).glob("*/*.safetensors")}
    assert embed_studies(hospital, tiny(), output, workers=0, quiet=True)["computed"] == 0
    assert before == {p: p.stat().st_mtime_ns for p in Path(found["store"]).glob("*/*.safetensors")}
    other = embed_studies(hospital.iloc[:2], tiny(1), tmp_path, workers=0, quiet=True)
    assert other["computed"] == 2 and Path(other["store"]).name != Path(found["store"]).name
    shutil.copytree(found["store"], tmp_path / "second" / Path(found["store"]).name); shutil.copytree(other["store"], tmp_path / "second" / Path(other["store"]).name)
    with pytest.raises(InputError, match="holds 2 stores"): FeatureStore(tmp_path / "second")
    assert FeatureStore(tmp_path / "second", tiny()).folder.name == Path(found["store"]).name and FeatureStore(tmp_path / "second", tiny(1)).folder.name == Path(other["store"]).name
    with pytest.raises(InputError, match="this model's features are called"): FeatureStore(tmp_path / "second", tiny(2))
    with pytest.raises(InputError, match="holds 0 stores"): FeatureStore(tmp_path / "none")


def test_moved_scans_keep_their_features_and_changed_ones_do_not(hospital, filled, tmp_path):
    shutil.copytree(filled[0], tmp_path / "features")
    moved = hospital.iloc[:2].assign(scan=[str(tmp_path / "new place" / Path(s).name) for s in hospital.scan[:2]])
    for old, new in zip(hospital.scan, moved.scan): Path(new).parent.mkdir(exist_ok=True); shutil.copy(old, new)
    assert embed_studies(moved, tiny(), tmp_path / "features", workers=0, quiet=True)["computed"] == 0
    nifti(Path(moved.scan[1]), seed=77)
    assert embed_studies(moved, tiny(), tmp_path / "features", workers=0, quiet=True)["computed"] == 1


def test_a_feature_file_cut_short_is_found_and_replaced(hospital, filled, tmp_path, tokenizer):
    shutil.copytree(filled[0], tmp_path / "f")
    store = FeatureStore(tmp_path / "f")
    key = data.scan_key(next(hospital.itertuples()))
    whole = store.path(key).read_bytes()
    batches = Batches(hospital, store, tokenizer, batch_size=4)
    for size in (len(whole) - 50, 20, 0):
        store.path(key).write_bytes(whole[:size])
        assert store.header(key) is None and "cut short" in store.table(hospital).reason[0]
        with pytest.raises(InputError, match="ctvlm embed"): list(batches)                      # prepared when all was well
        assert Batches(hospital, store, tokenizer).left_out["scans: FILE is cut short"] == 1
        assert embed_studies(hospital, tiny(), tmp_path / "f", workers=0, quiet=True)["computed"] == 1
        assert store.path(key).read_bytes() == whole
        batches.epoch, batches.at = 0, 0


def test_a_feature_file_whose_bytes_changed_is_found(hospital, filled, tmp_path):
    shutil.copytree(filled[0], tmp_path / "f")
    store = FeatureStore(tmp_path / "f")
    key = data.scan_key(next(hospital.itertuples()))
    whole = store.path(key).read_bytes()
    store.path(key).write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])      # one bit, the length stays
    with pytest.raises(InputError, match="its bytes have changed"): store.load(key)
    assert embed_studies(hospital, tiny(), tmp_path / "f", workers=0, quiet=True)["computed"] == 1 and store.path(key).read_bytes() == whole


def test_a_scan_rewritten_at_equal_size_is_computed_again(tmp_path):
    "By content: another time alone changes nothing, for files and for folders of slices."
    scan, folder = tmp_path / "a.nii", tmp_path / "b"
    image = lambda shift: nifti(scan, affine=np.diag([3., 3., 3., 1.]) + np.array([[0, 0, 0, 0]] * 2 + [[0, 0, 0, shift]] + [[0] * 4]))
    image(0); uid = dicom(folder, "b", "p")
    studies = table(row("a", scan=str(scan)), row("b", scan=str(folder)))
    computed = lambda: embed_studies(studies, tiny(), tmp_path / "f", workers=0, quiet=True)["computed"]
    assert computed() == 2 and computed() == 0
    for p in (scan, folder / "3.dcm"): os.utime(p, (0, 0))
    assert computed() == 0
    size = scan.stat().st_size; image(40)                                    # the header alone: the table was moved by 40 mm
    assert scan.stat().st_size == size and computed() == 1
    dicom(folder, "b", "p", start=-260.)                                     # as many files of equal size, at another place
    assert computed() == 1
    (folder / "3.dcm").rename(folder / "other.dcm")                          # another name is the same scan
    assert computed() == 0


def test_the_key_of_a_scan_does_not_move_with_its_folder():
    one, two = (next(table(row("a", scan=f"{root}/scans/a.nii.gz", file="scans/a.nii.gz", source="")).itertuples()) for root in ("/mnt/x", "/other"))
    assert data.scan_key(one) == data.scan_key(two)
    keys = {data.scan_key(next(table(row(**{**dict(study="a", file="s1/ct.nii.gz"), **change})).itertuples())) for change in ({}, {"file": "s2/ct.nii.gz"}, {"series": "2"}, {"study": "b"}, {"source": "x"})}
    assert len(keys) == 5


@pytest.mark.parametrize("change", ["hu_levels", "weights", "sizes", "spec", "fit", "version"])
def test_the_fingerprint_names_all_that_features_depend_on(change, monkeypatch):
    model = tiny(); spec, fit = model.config.window_spec, "pad"
    before = fingerprint(spec, fit, model)
    if change == "hu_levels": object.__setattr__(model.config, "hu_levels", (-1000, 0, 1000))
    elif change == "sizes": model.config.window_encoder["layer_scale"] = 2.
    elif change == "weights": next(model.window_encoder.parameters()).data.view(-1)[0] += 1e-3
    elif change == "spec": spec = dataclasses.replace(spec, spacing=(1., 1., 3.))
    elif change == "fit": fit = "crop"
    else: monkeypatch.setattr(ctvlm.features, "PREPROCESSING", 99)
    assert fingerprint(spec, fit, model) != before


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="drops the rights of root")
def test_a_store_that_cannot_be_written(hospital, filled):
    "Reading goes on, writing ends with one line, nothing is left behind."
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(filled[0], folder + "/f"); scan = shutil.copy(hospital.scan[0], folder + "/scan.nii.gz")
        for p in (folder, folder + "/f"): os.chmod(p, 0o755)
        store = FeatureStore(folder + "/f")
        def reads():
            assert len(store.load(data.scan_key(next(hospital.itertuples())))) == 5
            assert data.summary(store, hospital, [dict(computed=0, seconds=0., profile=pd.DataFrame(columns=data.PROFILE, dtype=float))])["present"] == 9
        def writes():
            with pytest.raises(InputError, match="cannot be written .Permission denied."):
                data.fill(store, table(row("new", scan=scan)), tiny().config.window_spec, lambda windows: dict(cls=torch.zeros(len(windows))), workers=0, quiet=True)
        assert unprivileged(reads) == 0 and unprivileged(writes) == 0
        assert not list(store.folder.glob("*/.*.tmp"))


def unprivileged(code):
    "Exit status of `code` run by nobody."
    pid = os.fork()
    if pid == 0:
        try: os.setgid(65534); os.setuid(65534); code()
        except BaseException as e: print(repr(e), file=sys.stderr); os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


RUN = """
import sys
sys.path.insert(0, {tests!r})
import ctvlm.cli, made_up_encoder
marker = {marker!r}
ctvlm.cli.load_model = lambda name, device=None: made_up_encoder.Dying(marker) if marker else made_up_encoder.Encoder()
if __name__ == "__main__": ctvlm.cli.main()
"""


def embed(tmp_path, hospital, *words, launcher=(), marker=""):
    "Start `ctvlm embed` with a light encoder, as a process; one that is killed at its third scan if there is a marker to leave."
    with write_atomically(tmp_path / "run.py") as t: t.write_text(RUN.format(tests=str(Path(__file__).parent), marker=str(marker)))   # another may just read it
    write_studies(hospital, tmp_path / "t.parquet")
    words = [sys.executable, *launcher, tmp_path / "run.py", "embed", tmp_path / "t.parquet", "-m", "light", "-o", tmp_path / "f", "--json", "--quiet", *words]
    return subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def answer(run, status=1): # 1: a scan is unreadable
    out, err = run.communicate()
    assert run.returncode == status, err
    return json.loads(out)


def files(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*.safetensors"))}


@pytest.fixture(scope="module")
def alone(hospital, tmp_path_factory):
    "Files that one undisturbed process writes."
    output = tmp_path_factory.mktemp("alone")
    embed_studies(hospital, made_up_encoder.Encoder(), output, workers=0, quiet=True)
    return files(output)


def test_a_run_killed_in_the_middle_goes_on(hospital, alone, tmp_path):
    run = embed(tmp_path, hospital, "--workers", 0, marker=tmp_path / "died")
    run.communicate()
    assert run.returncode == -signal.SIGKILL and (tmp_path / "died").exists()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "f").rglob("*.safetensors")}
    folder = next((tmp_path / "f").glob("*/store.json")).parent / "00"
    folder.mkdir(exist_ok=True)
    stale, fresh = folder / ".a.tmp", folder / ".b.tmp"                      # of a run killed long ago, and of one that may be writing now
    stale.touch(); fresh.touch(); os.utime(stale, (0, 0))
    found = answer(embed(tmp_path, hospital, "--workers", 0))
    assert len(before) <= 2                                                  # two were read, the last may have been in flight
    assert (found["computed"], found["present"], found["failed"]) == (9 - len(before), 9, 1)
    assert files(tmp_path / "f") == alone and before.items() <= {p: p.stat().st_mtime_ns for p in (tmp_path / "f").rglob("*.safetensors")}.items()
    assert not stale.exists() and fresh.exists()


@pytest.mark.parametrize("runs", [2, 4])
def test_runs_that_fill_the_same_store_share_the_work(hospital, alone, tmp_path, runs):
    "Each scan is claimed: none is computed twice. (Without claims 2 runs computed 18 scans; one that never looks again would compute some twice.)"
    found = [answer(run) for run in [embed(tmp_path, hospital, "--workers", 0) for _ in range(runs)]]
    assert [f["present"] for f in found] == [9] * runs and sum(f["computed"] for f in found) == 9
    assert files(tmp_path / "f") == alone and len(alone) == 9 and not list((tmp_path / "f").rglob("*.claim"))


def test_claims_of_the_dead_are_taken_over(filled):
    store, key, here = FeatureStore(filled[0]), "ab" * 10, data.this_process()
    claim = store.path(key).with_suffix(".claim")
    assert store.claim(key) and not store.claim(key)
    for text, age, free in ((f"{here[0]} {2**30}", 0, True), ("elsewhere 7", 0, False), ("elsewhere 7", 7200, True), ("", 0, False), ("", 7200, True)):
        claim.write_text(text); os.utime(claim, (time.time() - age,) * 2)
        assert store.claim(key) == free, (text, age)
    store.release(key)
    assert not claim.exists()


def processes_of(word): # pids whose command line or environment names a folder
    out = []
    for p in Path("/proc").glob("[0-9]*"):
        try: seen = (p / "cmdline").read_bytes() + (p / "environ").read_bytes()
        except OSError: continue
        if word.encode() in seen and int(p.name) != os.getpid(): out.append(int(p.name))
    return out


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks at /proc")
def test_a_killed_run_leaves_no_processes(hospital, tmp_path, monkeypatch):
    monkeypatch.setenv("THIS_TEST", str(tmp_path))
    many = pd.concat([hospital.assign(study=hospital.study + f" {i}", patient=f"p{i}") for i in range(60)], ignore_index=True)
    run = embed(tmp_path, many, "--workers", 2)
    wait = lambda ready: next((True for _ in range(600) if ready() or time.sleep(0.1)), False)
    assert wait(lambda: len(list((tmp_path / "f").rglob("*.safetensors"))) > 3) and len(processes_of(str(tmp_path))) > 2
    run.kill(); run.communicate()
    assert wait(lambda: not processes_of(str(tmp_path))), processes_of(str(tmp_path))


def test_devices_share_the_work(hospital, alone, tmp_path):
    found = answer(embed(tmp_path, hospital, "--devices", "cpu, cpu", "--workers", 1))
    assert (found["computed"], found["present"], found["failed"]) == (9, 9, 1) and "profile" not in found
    assert files(tmp_path / "f") == alone


def test_accelerate_shares_the_work(hospital, alone, tmp_path):
    found = answer(embed(tmp_path, hospital, "--workers", 0, launcher=["-m", "accelerate.commands.launch", "--cpu", "--num_processes", 2, "--main_process_port", 0]))
    assert (found["computed"], found["present"], found["failed"]) == (9, 9, 1) and files(tmp_path / "f") == alone


@pytest.mark.parametrize("devices, says", [("cuda:7,cuda:8", "cuda:7 was asked for"), ("cpu,tpu9", "no device is called 'tpu9'")])
def test_a_device_that_is_not_there(hospital, tmp_path, devices, says):
    table = write_studies(hospital, tmp_path / "t.parquet")
    done = CliRunner().invoke(ctvlm.cli.app, ["embed", str(table), "-m", "nowhere", "-o", str(tmp_path / "f"), "--devices", devices])
    assert isinstance(done.exception, InputError) and says in str(done.exception) and not (tmp_path / "f").exists()
    done = CliRunner().invoke(ctvlm.cli.app, ["embed", hospital.scan[0], "-m", "nowhere", "--devices", devices])
    assert isinstance(done.exception, InputError) and "a table of studies" in str(done.exception)


LARGE = """
import sys, torch
sys.path.insert(0, {tests!r})
import made_up_encoder
from ctvlm.data import embed_studies, read_studies
if __name__ == "__main__":
    model = made_up_encoder.Encoder()
    model.more = torch.nn.Parameter(torch.zeros(4_000_000))
    embed_studies(read_studies({table!r}), model, {output!r}, devices=("cpu", "cpu"), quiet=True)
"""


@pytest.mark.skipif(subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], capture_output=True).returncode != 0, reason="needs the right to mount")
def test_too_little_shared_memory_for_the_model(hospital, tmp_path):
    (tmp_path / "run.py").write_text(LARGE.format(tests=str(Path(__file__).parent), table=str(write_studies(hospital, tmp_path / "t.parquet")), output=str(tmp_path / "f")))
    done = subprocess.run(["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=8m tmpfs /dev/shm && exec "$0" "$@"', sys.executable, tmp_path / "run.py"], capture_output=True, text=True)
    assert "InputError: the model does not fit into shared memory" in done.stderr and "--num_processes 2" in done.stderr


def test_a_script_that_workers_would_run_again_is_refused(tmp_path):
    "The call stands outside of the script's guard: one line instead of workers that start workers."
    (tmp_path / "script.py").write_text("""from ctvlm.data import phantom_studies, window_studies
from ctvlm.phantoms import PhantomCohort
from ctvlm.preprocessing import WindowSpec
if __name__ == "__main__": studies = phantom_studies(PhantomCohort(2, spacing=(6., 6., None)), quiet=True)
window_studies(studies, WindowSpec(), "store", workers=2, quiet=True)
""")
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("ctvlm.core.InputError: line 5 of ")
    assert "workers=0" in done.stderr and not list(tmp_path.rglob("*.safetensors"))


def test_a_killed_worker_costs_one_job():
    assert list(data.ahead(made_up_encoder.dies, range(6), 2, "lost")) == [(i, "lost" if i == 2 else i * i) for i in range(6)]


# ---------------------------------------------------------------- batches

def test_a_batch_is_what_the_contract_says(hospital, filled, tokenizer):
    findings = ("Lung nodule", "Emphysema")
    batches = Batches(hospital, filled[0], tokenizer, batch_size=4, findings=findings)
    assert len(batches) == 3 and batches.left_out == {"scans: Fall Nr FILE is cut off: N of N bytes are there": 1, "snippets: outside the scan": 9}
    model, seen = tiny(), []
    for b in batches:
        B, N, S = len(b["study"]), int(b["grid"].prod(1).sum()), len(b["snippet_scan"])
        assert b["cls"].shape == (N, 24) and b["depth_tokens"].shape == (N, 8, 24) and b["patch_mask"].shape == (N, 8) and b["grid"].dtype == torch.long
        assert b["report_ids"].shape == b["report_mask"].shape and b["labels"].tolist() == [[1, -2]] * B and S == B == len(b["snippet_text"])
        for i, (study, depth, place) in enumerate(zip(b["study"], b["snippet_depth_mm"].tolist(), b["snippet_bin"].tolist())):
            n = int(study[1:])
            w = make_windows(load_volume(hospital.scan[n]), model.config.fit, model.config.window_spec)
            assert b["snippet_scan"][i] == i and depth == -290. + n and place == pytest.approx(float(w.depth_to_bin(depth)), abs=1e-4)
            assert tokenizer.decode(b["report_ids"][i][b["report_mask"][i].bool()], skip_special_tokens=True) == report_text(f"Nodule number {n}, unchanged.", "Nodule.")
        out = model.encode_features(b["cls"], b["depth_tokens"], b["grid"], patch_mask=b["patch_mask"])
        assert out.slices.shape[:2] == b["bin_depths_mm"].shape and bool((out.valid <= b["bin_depths_mm"].isfinite()).all())
        seen += b["study"]
    assert sorted(seen) == [f"s{i}" for i in range(10) if i != 3] and batches.prompts["ids"].shape[:3] == (2, 3, 2)


def test_padding_is_no_text(hospital, filled, tokenizer):
    words = ["Nodule.", "Nodule number 1, unchanged, and a good many more words than the other report has."]
    two = hospital.iloc[:2].assign(findings=words, impression=["", ""])
    batch, = Batches(two, filled[0], tokenizer, training=False)
    for ids, mask in ((batch["report_ids"], batch["report_mask"]), (batch["snippet_ids"], batch["snippet_mask"])):
        assert ((ids == tokenizer.pad_token_id) == (mask == 0)).all()
    lengths = batch["report_mask"].sum(1).tolist()
    assert lengths[0] < lengths[1] == batch["report_ids"].shape[1]


def order(batches): return [b["study"] for b in batches]


@pytest.mark.parametrize("workers, context", [(0, ""), (1, "forkserver"), (1, "spawn")])
def test_the_position_survives(hospital, filled, tokenizer, workers, context):
    make = lambda w=0: Batches(hospital, filled[0], tokenizer, batch_size=2, workers=w, context=context, seed=4)
    whole = make(); first, second = order(whole), order(whole)
    assert first != second and sorted(sum(first, [])) == sorted(sum(second, []))
    torch.manual_seed(0); untouched = torch.rand(1)
    part = make(workers); torch.manual_seed(0)
    batches = iter(part)
    got = [next(batches)["study"] for _ in range(2)]
    assert torch.rand(1) == untouched                             # workers draw from a generator of their own
    state = json.loads(json.dumps(part.state_dict()))
    assert (state["epoch"], state["at"]) == (0, 4)                # scans handed out, not read ahead
    del batches
    more = make(); more.load_state_dict(state)
    assert got + order(more) == first and order(more) == second


def test_processes_share_an_epoch(hospital, filled, tokenizer, monkeypatch):
    shares = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank)); monkeypatch.setenv("WORLD_SIZE", "2")
        b = Batches(hospital, filled[0], tokenizer, batch_size=2)
        shares.append(sum(order(b), [])); assert len(b) == len(order(b))
    assert not set(shares[0]) & set(shares[1]) and len(shares[0]) + len(shares[1]) == 9


def test_a_smaller_batch_continues_at_the_same_scan(hospital, filled, tokenizer, monkeypatch):
    "The position counts scans over all processes: another batch size, other workers, another world, the same scans per step."
    def make(size=2, rank=0, world=1, rows=hospital):
        monkeypatch.setenv("RANK", str(rank)); monkeypatch.setenv("WORLD_SIZE", str(world))
        return Batches(rows, filled[0], tokenizer, batch_size=size, seed=4)
    flat = lambda steps: [sum((b["study"] for b in step), []) for step in steps]
    whole = make(); every = flat(whole.steps(4)); second = flat(whole.steps(4))
    assert whole.size == 9 and [len(s) for s in every] == [2, 2, 2, 3] and every != second
    part = make(); got = flat(s for _, s in zip(range(2), part.steps(4)))
    for again in (make(1), make(5), make(rows=hospital.iloc[::-1])):
        again.load_state_dict(part.state_dict())
        assert got + flat(again.steps(4)) == every and flat(again.steps(4)) == second
    shares = []
    for rank in range(2):
        one = make(rank=rank, world=2); one.load_state_dict(part.state_dict()); shares.append(flat(one.steps(4)))
    assert [sorted(a + b) for a, b in zip(*shares)] == [sorted(s) for s in every[2:]]


def test_an_epoch_that_ends_with_the_loop_is_over(hospital, filled, tokenizer):
    b = Batches(hospital, filled[0], tokenizer, batch_size=3, seed=4)
    for _ in range(2): assert len([x for _, x in zip(range(3), b)]) == 3      # `zip` never asks for a fourth
    assert (b.epoch, b.at) == (2, 0)
    one = iter(b); next(one); two = iter(b); next(two)
    with pytest.raises(InputError, match="begun again while an earlier iterator"): next(one)
    still = Batches(hospital, filled[0], tokenizer, batch_size=3, training=False)
    next(iter(still))
    assert len(list(still)) == 3                                              # an evaluation begins at the beginning


def test_a_run_continues_with_its_own_data_only(hospital, filled, tokenizer):
    state = Batches(hospital, filled[0], tokenizer, findings=("Lung nodule",)).state_dict()
    for other in (dict(seed=1), dict(findings=("Emphysema",)), dict(augment=shout), dict(variants=2), dict(studies=hospital.iloc[1:])):
        b = Batches(**{**dict(studies=hospital, store=filled[0], tokenizer=tokenizer, findings=("Lung nodule",)), **other})
        with pytest.raises(InputError, match="the run was saved with the data"): b.load_state_dict(state)


@pytest.mark.parametrize("options, says", [(dict(batch_size=0), "batch_size is 0"), (dict(findings=("Lung nodule",), question_weights={"Lung nodul": 2}), "question_weights names 'Lung nodul'")])
def test_misspelt_options_of_batches(hospital, filled, tokenizer, options, says):
    with pytest.raises(InputError, match=says): Batches(hospital, filled[0], tokenizer, **options)


def test_batches_refuse_another_models_features(hospital, filled, tokenizer):
    Batches(hospital, filled[0], tokenizer, model=tiny()).check(tiny())
    with pytest.raises(InputError, match="this model's features are called"): Batches(hospital, filled[0], tokenizer, model=tiny(1))
    with pytest.raises(InputError, match="this model's features are called"): Batches(hospital, filled[0], tokenizer).check(tiny(1))


def test_prepared_texts_lie_where_the_run_lies_and_nowhere_else(hospital, filled, tokenizer, tmp_path):
    left = tmp_path / f"texts-{'-'.join([data.this_process()[0], str(2**30)])}-x"; left.mkdir()     # of a process that was killed
    other = tmp_path / "texts-elsewhere-7-x"; other.mkdir()                                         # of one on another machine
    b = Batches(hospital, filled[0], tokenizer, folder=tmp_path)
    mine = Path(b.folder.name)
    assert mine.parent == tmp_path and mine.stat().st_mode & 0o77 == 0 and not left.exists() and other.exists()
    del b
    assert not mine.exists()


def test_what_is_left_out_is_said(hospital, filled, tokenizer):
    with pytest.warns(Notice, match="left out: scans") as said: Batches(hospital, filled[0], tokenizer)
    said = [w for w in said if isinstance(w.message, Notice)]
    scans, = [w.message for w in said if w.message.missing]
    assert scans.names == ("s3",) and [len(w.message.names) for w in said if not w.message.missing] == [9]


def test_a_snippet_in_the_padding_is_left_out(hospital, tmp_path, tokenizer):
    "The scan fills two thirds of its window; a reference below it would be handed out at bin 0, which the mask hides."
    w = make_windows(load_volume(hospital.scan[0]), tiny().config.fit, tiny().config.window_spec)
    lowest = float(w.bin_depths_mm[0]); inside = -290.
    pair = lambda d: dict(snippet="a", cleaned="a", depth_mm=d, prior=False, status="ok")
    study = hospital.iloc[:1].assign(pairs=[[pair(lowest), pair(inside)]])
    embed_studies(study, tiny(), tmp_path, workers=0, quiet=True)
    b = Batches(study, tmp_path, tokenizer)
    batch, = b
    assert b.left_out == {"snippets: outside the scan": 1} and batch["snippet_depth_mm"].tolist() == [inside]
    assert w.patch_mask.flatten(0, -2).any(0).tolist().count(False) and FeatureStore(tmp_path).table(study).low_mm[0] > lowest


def test_only_what_this_scan_shows_is_located(hospital, filled, tokenizer):
    def pair(text, depth=-290., **more): return dict(snippet=text, cleaned=text, depth_mm=depth, status="ok") | dict(prior=False) | more
    pairs = [pair("a cyst"), pair("a former cyst", prior=True), pair("no cyst", asserts=False), pair("nowhere", depth=None)]
    b = Batches(hospital.iloc[:1].assign(pairs=[pairs]), filled[0], tokenizer)
    batch, = b
    assert tokenizer.decode(batch["snippet_ids"][0], skip_special_tokens=True).strip() == "a cyst" and len(batch["snippet_ids"]) == 1
    assert b.left_out == {f"snippets: {why}": 1 for why in ("prior exam", "nothing asserted", "no depth")}


def test_scans_of_one_study_share_a_report(hospital, filled, tokenizer):
    two = hospital.iloc[[0, 1]].assign(study="a", patient="a")
    for change, says in ((dict(), "other findings"), (dict(findings="x", labels=[{}, {"Emphysema": 1}]), "other labels"), (dict(findings="x"), "other pairs")):
        with pytest.raises(InputError, match=says): Batches(two.assign(**change), filled[0], tokenizer)
        with pytest.raises(InputError, match=says): to_table(two.assign(**change))


def test_silence_where_the_report_covers_the_region(hospital, filled, tokenizer):
    findings = ("Lung nodule", "Emphysema", "Hepatic cyst")
    labels = [{"Lung nodule": 1}, {"Lung nodule": 0, "Emphysema": -1}, {"Emphysema": -1}, {"Hepatic cyst": 0}, {"Lung nodule": 1}]
    some = hospital.iloc[[0, 1, 2, 4, 5]].assign(labels=labels)                 # 3 cannot be read
    some.loc[some.index[-1], ["findings", "impression"]] = ""                    # no report, hence no silence
    expected = [[1, -2, -1], [0, -1, -1], [-1, -1, -1], [-1, -1, 0], [1, -1, -1]] # -1, left open, is not silence
    assert data.labels_with_silence(some, findings).tolist() == expected
    assert data.labels_with_silence(some.assign(labels=[{"Lung nodule": 1}] * 5), ("Lung nodule", "Pleural effusion"), "organ").max(0).tolist() == [1, -1]
    def handed_out(**options):
        batches = Batches(some, filled[0], tokenizer, findings=findings, **options)
        return {s: l for b in batches for s, l in zip(b["study"], b["labels"].tolist())}, batches.prompts["labels"]
    train, table = handed_out()
    assert train == dict(zip(some.study, expected)) and sorted(table.tolist()) == sorted(expected)
    assert handed_out(training=False)[0] == {s: [max(-1, v) for v in l] for s, l in train.items()} # evaluation: not known


def test_a_study_without_a_report_trains_no_contrast(hospital, filled, tokenizer):
    b = next(iter(Batches(hospital.iloc[:1].assign(findings="", impression=""), filled[0], tokenizer)))
    assert int(b["report_mask"].sum()) <= 1                                   # ten or fewer are left out of the contrastive loss


def test_equal_reports_and_one_patient_share_a_number(hospital, filled, tokenizer, monkeypatch):
    "The same number in every process, order, world and after a resume; a report that is not there equals nobody's."
    some = hospital.iloc[[0, 1, 2, 4, 5, 6]].assign(
        findings=["No abnormality.", "no  abnormality.", "A nodule.", "", "", "B."],
        impression="", patient=["p1", "p2", "P 7", "p 7", "p5", "p6"])
    def handed_out(rank=0, world=1, state=None, **options):
        monkeypatch.setenv("RANK", str(rank)); monkeypatch.setenv("WORLD_SIZE", str(world))
        b = Batches(some, filled[0], tokenizer, batch_size=2, **options)
        if state: b.load_state_dict(state)
        return {s: tuple(numbers) for x in b for s, numbers in zip(x["study"], x["groups"].tolist())}
    one = handed_out()
    report, patient = ({s: numbers[k] for s, numbers in one.items()} for k in (0, 1))
    assert report["s0"] == report["s1"] and len(set(report.values())) == 5
    assert patient["s2"] == patient["s4"] and len(set(patient.values())) == 5
    assert handed_out(0, 2) | handed_out(1, 2) == one == handed_out(training=False) == handed_out(augment=shout, workers=1)
    first = Batches(some, filled[0], tokenizer, batch_size=2)
    next(iter(first))
    rest = handed_out(state=first.state_dict())
    assert len(rest) == 4 and rest.items() <= one.items()
    assert one["s0"] == (7729656092446502489, 646136361345103179)               # as another machine would say


def test_one_scan_of_several_per_report(hospital, filled, tmp_path, tokenizer):
    "Three reconstructions share a report: one is drawn per epoch, all of them come in evaluation."
    twins = hospital.iloc[[0, 1, 2, 4]].assign(study=["a", "a", "a", "b"], patient=["a", "a", "a", "b"], findings="Nodule.", pairs=[[]] * 4)
    embed_studies(twins, tiny(), tmp_path, workers=0, quiet=True)
    cls = {r.scan: float(FeatureStore(tmp_path).load(data.scan_key(r))["cls"].float().sum()) for r in twins.itertuples()}
    b, drawn = Batches(twins, tmp_path, tokenizer, batch_size=1), set()
    for _ in range(24):
        epoch = list(b)
        assert sorted(x["study"][0] for x in epoch) == ["a", "b"]
        drawn |= {round(float(x["cls"].float().sum()), 3) for x in epoch if x["study"] == ["a"]}
    assert drawn == {round(v, 3) for v in list(cls.values())[:3]}
    every, = Batches(twins, tmp_path, tokenizer, batch_size=8, training=False)
    assert every["study"] == ["a", "a", "a", "b"]


def shout(findings, impression, rng): return findings.upper() + str(rng.integers(1000)), impression


def test_a_batch_comes_whole_from_another_process(hospital, filled, tokenizer):
    make = lambda w: list(Batches(hospital, filled[0], tokenizer, batch_size=4, findings=("Lung nodule",), workers=w, seed=2))
    for here, there in zip(make(0), make(1), strict=True):
        assert list(here) == list(there)
        for name, x in here.items():
            assert torch.equal(x.nan_to_num(), there[name].nan_to_num()) and x.dtype == there[name].dtype if isinstance(x, torch.Tensor) else x == there[name], name


def test_augmented_variants_are_drawn_ahead_and_repeat(hospital, filled, tokenizer):
    texts = lambda b: [sorted(tokenizer.batch_decode(x["report_ids"], skip_special_tokens=True)) for x in b]
    make = lambda **kw: Batches(hospital, filled[0], tokenizer, batch_size=16, augment=shout, **kw)
    b = make(variants=2)
    first, second, third = texts(b), texts(b), texts(b)
    assert first != second and first == third and "NODULE" in first[0][0] and texts(make(variants=2)) == first
    assert texts(make(seed=1)) != first and "NODULE" not in texts(Batches(hospital, filled[0], tokenizer, batch_size=16, augment=shout, training=False))[0][0]


def test_windows_instead_of_features(hospital, tmp_path, tokenizer):
    spec = tiny().config.window_spec
    found = window_studies(hospital.iloc[:2], spec, tmp_path / "w", workers=0, quiet=True)
    batch, = Batches(hospital.iloc[:2], tmp_path / "w", tokenizer)
    assert found["present"] == 2 and batch["windows"].shape[1:] == (1, 16, 16, 32) and batch["windows"].dtype == torch.float16
    assert tiny().encode_scan(batch["windows"], batch["grid"], batch["patch_mask"]).scan.shape == (2, 16)


def test_nothing_to_train_on_says_so(hospital, filled, tokenizer):
    with pytest.raises(InputError, match="none of 1 scans has features.*not computed yet"): Batches(table(row("x")), filled[0], tokenizer)
    with pytest.raises(InputError, match="the table is empty"): Batches(table(), filled[0], tokenizer)


# ---------------------------------------------------------------- as with a card

def test_a_card_reads_checks_and_shares_memory(hospital, filled, tmp_path, monkeypatch):
    "The card's path, here on a CPU: the same features as scan by scan, whatever the workers and the batch."
    monkeypatch.setattr(ctvlm.features, "_has_card", lambda model: True)
    monkeypatch.setattr(CTVLMModel, "window_features", lambda model, scans: PreparedEncoder(model.window_encoder, torch.float32).features)
    true, stores = FeatureStore(filled[0]), []
    for workers, chunk in ((0, 5), (2, 5), (0, 64)):
        found = embed_studies(hospital, tiny(), tmp_path / f"{workers} {chunk}", workers=workers, chunk=chunk, quiet=True)
        assert (found["computed"], found["failed"]) == (9, 1) and found["copying"] > 0 and found["cutting"] > 0
        stores.append(FeatureStore(tmp_path / f"{workers} {chunk}"))
        assert stores[-1].table(hospital).reason.tolist() == true.table(hospital).reason.tolist()
    for row in hospital.itertuples():
        key = data.scan_key(row)
        if true.header(key) is None: continue
        same, exact = [s.load(key) for s in stores], true.load(key)
        assert stores[0].path(key).read_bytes() == stores[1].path(key).read_bytes()
        for found in same:
            assert found.keys() == exact.keys()
            for name, x in exact.items(): torch.testing.assert_close(found[name], x, rtol=0, atol=4e-3)


def test_what_a_card_cannot_take_is_a_row(hospital, tmp_path, monkeypatch):
    "One scan does not fit: its reason is kept, the others are encoded, and a second run tries it again."
    monkeypatch.setattr(ctvlm.features, "_has_card", lambda model: True)
    real, calls = ctvlm.features.make_windows, []
    def full(*args):
        calls.append(args)
        if len(calls) == 2: raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args)
    monkeypatch.setattr(ctvlm.features, "make_windows", full)
    some = hospital.iloc[:3]
    found = embed_studies(some, tiny(), tmp_path, workers=0, quiet=True)
    assert (found["computed"], found["failed"]) == (2, 1) and "out of memory" in FeatureStore(tmp_path).table(some).reason[1]
    assert embed_studies(some, tiny(), tmp_path, workers=0, quiet=True)["computed"] == 1
    assert not list(tmp_path.rglob("*.claim"))


@pytest.mark.parametrize("hu, kind", [((-2000, 3000), np.int16), ((0.25, 7.5), np.float32)])
def test_voxels_that_another_process_maps(hu, kind):
    "int16 where that loses nothing, clipped as the windows are, of any memory order."
    array = np.random.default_rng(0).uniform(*hu, (6, 5, 4)).astype(np.float32)
    if kind is np.int16: array = array.round()
    for given in (array, np.asfortranarray(array), array[::-1, :, ::-1]):
        found = ctvlm.studies.shared_voxels(given)
        assert found.array.dtype == kind and np.array_equal(found.array.T, np.clip(given, -1000, 1000))
    (_, there), = data.ahead(ctvlm.studies.shared_voxels, [array], 1, None)      # from a worker that has ended
    assert np.array_equal(there.array.T, np.clip(array, -1000, 1000))
