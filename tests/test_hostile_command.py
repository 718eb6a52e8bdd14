"What a person can do wrong with the command, and what a file can do to a terminal."
import json, shutil, warnings

import numpy as np, pytest

from ctvlm import cli, command
from ctvlm.core import Notice
from ctvlm.phantoms import PhantomCohort
from test_cli import ended


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "Two scans of one name, a DICOM folder, a report, a random model."
    from ctvlm.model import untrained
    folder = tmp_path_factory.mktemp("hostile")
    cohort = PhantomCohort(2, spacing=(6., 6., 6.), languages=("en",))
    for k, name in enumerate("ab"): cohort[k].write_nifti(folder / name / "scan.nii.gz")
    (folder / "report.txt").write_text("Cyst in the left kidney (series 4, image 38).")
    untrained("tiny").save_pretrained(folder / "model")
    return folder


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    "The same, in a folder of its own that is the current one."
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


REFUSED = [ # words, what the one line must say
    (("search", "notthere.txt", "a/scan.nii.gz", "-m", "model"), "notthere.txt does not exist"), (("mine", "my report.txt", "--explain"), "my report.txt does not exist"),
    (("label", "./report", "--explain"), "report does not exist"), (("view", "a/scan.nii.gz", "-m", "model", "--report", "/data/report"), "/data/report does not exist"), (("mine", "a", "--explain"), "a is a folder"),
    (("localize", "a/scan.nii.gz", "-m", "model", "-t", "cyst", "-o", "a/scan.nii.gz"), "no kind of output"), (("preprocess", "a/scan.nii.gz", "-o", "a/scan.nii.gz"), "is the input"),
    (("localize", "a/scan.nii.gz", "b/scan.nii.gz", "-m", "model", "-t", "cyst", "-o", "x.png"), "2 scans were given"), (("localize", "a/scan.nii.gz", "-m", "model", "-t", "cyst", "-o", "x.png", "-o", "y.png"), "2 pictures"),
    (("classify", "a/scan.nii.gz", "-m", "model", "-o", "x.png"), "no kind of output"), (("localize", "a/scan.nii.gz", "-m", "model", "-t", "cyst", "-o", "report.txt"), "no kind of output"),
    (("localize", "a/scan.nii.gz", "-m", "model", "-t", "cyst", "-o", "mine.csv"), "was not written by ctvlm"),
    (("label", "t.csv", "-o", "l.parquet", "--base-url", "http://127.0.0.1:1"), "--base-url does nothing"), (("label", "t.csv", "-o", "l.parquet", "--llm", "x", "--store", "y"), "--llm and --store do nothing"),
    (("mine", "Cyst.", "--explain", "-o", "p.parquet"), "--output does nothing"), (("mine", "Cyst.", "--explain", "--dicom", "a"), "--dicom does nothing"), (("label", "Cyst.", "--explain", "-o", "p.parquet"), "--output does nothing"),
    (("embed", "a/scan.nii.gz", "-m", "model", "--workers", "3"), "--workers does nothing"), (("embed", "a/scan.nii.gz", "-m", "model", "--devices", "cpu,cpu"), "--devices does nothing"),
    (("evaluate", "t.parquet", "-m", "model", "-o", "out", "--task", "everything"), "everything"), (("init", "huge", "-o", "m"), "huge"), (("search", "Cyst.", "x.safetensors", "-m", "model"), "x.safetensors does not exist"),
]


@pytest.mark.parametrize("words, said", REFUSED, ids=lambda w: "-".join(w[:2]) if isinstance(w, tuple) else None)
def test_refused_in_one_line(here, capsys, words, said):
    (here / "mine.csv").write_text("my own table\n")
    before = {p: p.read_bytes() for p in here.rglob("*") if p.is_file()}
    status, out, err = ended(capsys, *words)
    lines = [l for l in err.splitlines() if "trained on" not in l]
    assert (status, out, len(lines)) == (2, "", 1) and said in lines[0], err
    assert {p: p.read_bytes() for p in here.rglob("*") if p.is_file()} == before


def test_what_one_scan_lacks_does_not_stop_the_others(here, capsys):
    (here / "broken.nii.gz").write_bytes(b"\0" * 500)
    words = "localize", "a/scan.nii.gz", "broken.nii.gz", "b/scan.nii.gz", "-m", "model", "-t", "cyst of the liver", "--json"
    status, out, err = ended(capsys, *words)
    assert status == 1 and [r["path"] for r in json.loads(out)] == ["a/scan.nii.gz", "b/scan.nii.gz"] and "scans left out: 1 (broken.nii.gz)" in err
    assert sorted(p.name for p in here.glob("*.png")) == ["a_scan.nii.gz.localize.png", "b_scan.nii.gz.localize.png"]     # two scans of one name
    assert ended(capsys, "classify", "broken.nii.gz", "broken.nii.gz", "-m", "model")[0] == 2                             # nothing is left


def test_names_of_pictures():
    names = [cli.picture_name(p) for p in ("1.2.840.113.1", "1.2.840.113.2", "x/1.2.840.113.1", "x/scan", "x/scan.nii", "../scan")]
    assert len(set(names)) == len(names) and not any("/" in n for n in names)
    _, pictures = None, command._named(["a_b", "a/b"], None, True)[0]
    assert len(set(pictures.values())) == 2


def test_text_that_is_a_formula_or_a_spreadsheets(here, capsys):
    text = "=cmd|' /C calc'!A0 costs $a^$ and \\frac{"
    status, out, err = ended(capsys, "localize", "a/scan.nii.gz", "-m", "model", "-t", text, "-o", "a.csv", "-o", "a.png", "-o", "a.json")
    assert status == 0, err
    assert (here / "a.png").read_bytes()[:4] == b"\x89PNG" and ",'=cmd" in (here / "a.csv").read_text().replace('"', "")
    [row] = json.loads((here / "a.json").read_text())
    assert row["text"] == text and row["trained_on"] and row["calibrated"] and row["model"] == "model"
    assert ended(capsys, "localize", "a/scan.nii.gz", "-m", "model", "-t", "cyst", "-o", "a.csv")[0] == 0                  # our own table may be replaced
    (here / "a.csv").write_text("edited by hand")
    assert ended(capsys, "localize", "a/scan.nii.gz", "-m", "model", "-t", "cyst", "-o", "a.csv")[0] == 2
    assert ended(capsys, "localize", "a/scan.nii.gz", "-m", "model", "-t", "cyst", "-o", "a.csv", "--overwrite")[0] == 0


def test_doubt_is_shown(here, capsys, monkeypatch):
    from dataclasses import replace
    from ctvlm.model import CTVLMModel
    own = CTVLMModel.localize
    monkeypatch.setattr(CTVLMModel, "localize", lambda self, *a: [replace(x, abstains=True) for x in own(self, *a)])
    status, out, _ = ended(capsys, "localize", "a/scan.nii.gz", "-m", "model", "-t", "banana", "-o", "a.csv")
    assert status == 0 and "not in this scan, best guess" in out and "interval: " in out
    assert "not in this scan, best guess" in (here / "a.csv").read_text() and "True" in (here / "a.csv").read_text()
    from ctvlm.viewer import localization_figure
    from ctvlm.model import load_any
    from ctvlm.preprocessing import load_volume
    volume = load_volume(here / "a/scan.nii.gz")
    figure = localization_figure(load_any(here / "model").localize(volume, ["banana"]), volume)
    assert any("not in this scan, best guess" in part.get_suptitle() for part in figure.subfigs)


def test_files_do_not_rule_the_terminal(here, capsys):
    config = json.loads((here / "model/config.json").read_text())
    (here / "model/config.json").write_text(json.dumps(config | {"trained_on": "\x1b[2Jnothing\x9b31m\u202e"}))
    (here / "a\x1b[31m.nii.gz").write_bytes((here / "a/scan.nii.gz").read_bytes())
    for words in (("localize", "a\x1b[31m.nii.gz", "-m", "model", "-t", "x\x1b[0m"), ("localize", "a\x1b[31m.nii.gz", "-m", "model", "-t", "cyst", "--json"), ("mine", "Cyst\x1b[2J (4/38).", "--explain"),
                  ("label", "Cyst\x1b[2J of the kidney.", "--explain"), ("localize", "gone\x1b[31m", "-m", "model", "-t", "x"), ("check", "a\x1b[31m.nii.gz"), ("findings", "\x1b[2J")):
        _, out, err = ended(capsys, *words)
        assert not {"\x1b", "\x9b", "\u202e"} & set(out + err), words


@pytest.mark.parametrize("missing, more, status", [(True, (), 1), (True, ("--allow-missing",), 0), (False, (), 0)])
def test_notices_are_printed_once_and_counted(here, capsys, monkeypatch, missing, more, status):
    def scanned(*a, **k):
        for _ in range(2): warnings.warn(Notice("studies left out, their features are missing", "abcd", missing))
        warnings.warn("a library's own")
        return {"volumes": 1, "refused": 0, "missing": 0}
    monkeypatch.setattr("ctvlm.data.scan_studies", scanned)
    code, _, err = ended(capsys, "studies", ".", "--as", "csv", "-o", "s.parquet", *more)
    assert code == status and err == "ctvlm: studies left out, their features are missing: 4 (a, b, c, ...)\n"


def test_near_misses_and_the_catalogue(here, capsys):
    status, _, err = ended(capsys, "classify", "a/scan.nii.gz", "-m", "model", "-f", "Hepatic cyzz")
    assert status == 0 and "did you mean Hepatic cyst?" in err
    rows = json.loads(ended(capsys, "findings", "leberzyste", "--json")[1])
    assert [r["finding"] for r in rows] == ["Hepatic cyst"]
    assert json.loads(ended(capsys, "findings", "hepatic cist", "--json")[1])[0]["finding"] == "Hepatic cyst"


def test_search_reads_what_is_stored(here, capsys):
    assert ended(capsys, "embed", "a/scan.nii.gz", "-m", "model", "-o", "e/a.safetensors")[0] == 0
    rows = json.loads(ended(capsys, "search", "report.txt", "e", "a/scan.nii.gz", "b/scan.nii.gz", "-m", "model", "--json")[1])
    of = {r["path"]: r["similarity"] for r in rows}
    assert of["e/a.safetensors"] == pytest.approx(of["a/scan.nii.gz"], abs=1e-5) and [r["rank"] for r in rows] == [1, 2, 3]
    assert [r["similarity"] for r in rows] == sorted(of.values(), reverse=True) and len(of) == 3


def test_a_piped_report_keeps_its_references(capsys):
    _, out, _ = ended(capsys, "mine", "Cyst (series 4, image 38) and stone (3/12-15).", "--explain")
    assert [line.split()[:3] for line in out.splitlines()[1:]] == [["Cyst", "4", "38"], ["stone", "3", "12"]]


def test_init_makes_a_start(here, capsys):
    a, b = (ended(capsys, "init", "tiny", "-o", name, "--json") for name in ("m1", "m2"))
    assert a[0] == 0 and "random" in json.loads(a[1])["trained_on"]
    assert (here / "m1/model.safetensors").read_bytes() == (here / "m2/model.safetensors").read_bytes()
