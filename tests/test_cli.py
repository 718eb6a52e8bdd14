"The command, from a shell's point of view: the whole journey on a handful of phantoms, and bad input."
import io, json, os, shutil, subprocess, sys
from pathlib import Path

import pytest

from ctvlm import cli
from ctvlm.cli import app, manual
from ctvlm.demo import demo_cohort, demo_model
from ctvlm.phantoms import PhantomCohort, write_cohort
from typer.testing import CliRunner

CHEST = Path(__file__).resolve().parents[2] / "shared" / "data" / "chest_dicom"


def run(*words, status=0):
    "Standard output of the command, run in this process."
    done = CliRunner().invoke(app, [str(w) for w in words])
    assert done.exit_code == status, done.output
    return done.stdout


def shell(*words):
    "Status, standard output and standard error of the command, run as a process."
    done = subprocess.run([sys.executable, "-m", "ctvlm.cli", *map(str, words)], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def ended(capsys, *words):
    "Status, standard output and standard error of `main` in this process."
    with pytest.raises(SystemExit) as left: cli.main(list(words))
    return left.value.code, *capsys.readouterr()


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    "A cohort on disk, and a tiny untrained model."
    folder = tmp_path_factory.mktemp("a cohort with ümlauts")
    write_cohort(PhantomCohort(4, spacing=(3., 3., None)), folder / "cohort", quiet=True)
    _, studies = demo_cohort({"train": 2, "val": 1, "test": 1}, 0)
    demo_model(studies, 0).save_pretrained(folder / "model")
    shutil.copytree(folder / "model", folder / "old")                                # as an earlier version saved it
    config = json.loads((folder / "old" / "config.json").read_text())
    (folder / "old" / "config.json").write_text(json.dumps(config | {"interval_calibration": {"tau": 0.1, "coverage": 0.9, "margin_mm": 40.0, "patients": 20}}))
    return folder


@pytest.fixture(scope="module")
def store(cohort):
    "The cohort's table of studies is made and its features are stored: the store."
    table = cohort / "studies.parquet"
    counts = json.loads(run("studies", cohort / "cohort", "--as", "phantoms", "-o", table, "--validation", 0.25, "--test", 0.25, "--json", "--quiet"))
    assert counts["volumes"] == 4 and counts["patients"] == 4
    stored = json.loads(run("embed", table, "--model", cohort / "model", "-o", cohort / "features", "--workers", 0, "--json", "--quiet"))
    assert (stored["present"], stored["failed"]) == (4, 0)
    (cohort / "config.json").write_text(json.dumps(dict(epochs=1, effective_batch=2, trackers=[])))
    return stored["store"]


def training(cohort, store, output):
    "The words of a short training run."
    return "train", cohort / "studies.parquet", "--features", store, "--model", cohort / "model", "-o", output, "--config", cohort / "config.json", "--batch-size", 2, "--workers", 0


def test_the_whole_journey(cohort, store):
    scans = sorted((cohort / "cohort" / "scans").rglob("*.nii.gz"))
    assert len(scans) == 4
    table, out = cohort / "studies.parquet", cohort / "run"
    again = json.loads(run("embed", table, "--model", cohort / "model", "-o", cohort / "features", "--workers", 0, "--json", "--quiet"))
    assert again["computed"] == 0
    run(*training(cohort, store, out))
    assert "mae_mm" in (out / "evaluation.csv").read_text().splitlines()[0] and (out / "best").is_dir()               # of the patient in val
    for name in ("a", "b"):
        run("evaluate", table, "--features", store, "--model", out / "model" if name == "b" else cohort / "model", "-o", cohort / name, "--task", "localization", "--quiet")
        assert (cohort / name / "report.html").exists()
    run("evaluate", table, "--model", cohort / "model", "-o", cohort / "alone", "--task", "localization", "--quiet")   # features on the way
    assert (cohort / "alone" / "results.json").read_bytes() == (cohort / "a" / "results.json").read_bytes()
    rows = json.loads(run("compare", cohort / "a" / "results.json", cohort / "b" / "results.json", "--json"))
    assert any("mae" in r["measure"].lower() or "error" in r["measure"].lower() for r in rows)


def test_reports(cohort):
    reports = cohort / "cohort" / "reports.csv"
    summary = json.loads(run("mine", reports, "--dicom", _series_index(cohort), "-o", cohort / "pairs.parquet", "--json", "--quiet"))
    assert summary["reports"] == 4 and summary["kept"] > 0 and not summary["unreadable"]
    assert json.loads(run("label", reports, "-o", cohort / "labels.parquet", "--json"))["reports"] == 4
    text = "Cyst in the left kidney (series 4, image 38). No pleural effusion."
    assert json.loads(run("mine", text, "--explain", "--json"))[0]["image"] == 38
    assert json.loads(run("label", text, "--explain", "--json")) == {"Renal cyst": 1, "Pleural effusion": 0}
    assert "\x1b" not in run("mine", text, "--explain")    # colours only on a terminal


def _series_index(cohort):
    "The cohort's table of series as a saved index."
    import pandas as pd
    from ctvlm.mining import SeriesIndex
    path = cohort / "series.parquet"
    SeriesIndex(pd.read_csv(cohort / "cohort" / "series.csv")).save(path)
    return path


def test_answers(cohort, tmp_path):
    scans = sorted((cohort / "cohort" / "scans").rglob("*.nii.gz"))
    answers = json.loads(run("localize", scans[0], "-m", cohort / "model", "-t", "spleen", "-t", "left kidney", "-o", tmp_path / "x.png", "--json"))
    assert [a["text"] for a in answers] == ["spleen", "left kidney"] and (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    found = json.loads(run("classify", scans[0], "-m", cohort / "model", "--json"))
    assert len(found) == 18 and all(0 <= f["probability"] <= 1 for f in found)
    ranked = json.loads(run("search", "Large pleural effusion.", *scans[:2], "-m", cohort / "model", "--json"))
    assert [r["rank"] for r in ranked] == [1, 2] and {r["path"] for r in ranked} == set(map(str, scans[:2]))
    assert len(json.loads(run("embed", scans[0], "-m", cohort / "model", "--json"))["scan"]) == 64
    checked = json.loads(run("check", scans[0], "--json", "--quiet"))
    assert [r["status"] for r in checked] == ["ok"]
    made = json.loads(run("preprocess", scans[0], "-o", tmp_path / "w.safetensors", "--json"))
    assert made["windows"] == made["grid"][0] * made["grid"][1] * made["grid"][2]


@pytest.mark.skipif(not CHEST.is_dir(), reason="needs ../shared/data/chest_dicom")
def test_a_real_chest(cohort, tmp_path):
    [a] = json.loads(run("localize", CHEST, "-m", cohort / "model", "-t", "nodule in the right lower lobe", "-o", tmp_path / "chest.png", "--json"))
    import pydicom
    depth = {int(h.InstanceNumber): float(h.ImagePositionPatient[2]) for h in (pydicom.dcmread(p, stop_before_pixels=True) for p in CHEST.iterdir())}
    spacing = abs(sorted(depth.values())[1] - sorted(depth.values())[0])
    assert abs(depth[a["image_number"]] - a["depth_mm"]) <= spacing / 2 + 1e-3
    low, high = min(depth.values()) - 1e-3, max(depth.values()) + 1e-3                 # the model computes in float32
    assert low <= a["interval_mm"][0] <= a["depth_mm"] <= a["interval_mm"][1] <= high


@pytest.mark.parametrize("words", [
    ("localize", "nowhere", "-m", "MODEL", "-t", "cyst"), ("localize", "EMPTY", "-m", "MODEL", "-t", "cyst"), ("localize", "NOTES", "-m", "MODEL", "-t", "cyst"),
    ("localize", "SCAN", "-m", "OLD", "-t", "cyst"), ("localize", "SCAN", "-m", "MODEL", "-t", ""), ("localize", "SCAN", "-m", "nowhere", "-t", "cyst"), ("check", "EMPTY"), ("check", "SCAN", "nowhere"), ("mine", "NOTES"), ("mine", "NONE", "-o", "pairs.csv"), ("mine", "NONE", "-o", "PAIRS"), ("label", "NONE", "-o", "PAIRS"), ("label", "NONE", "-o", "labels.csv"), ("mine", "LATIN", "--explain"), ("label", "LATIN", "--explain"), ("train", "NOTES", "--features", "EMPTY", "-m", "MODEL", "-o", "OUT", "--batch-size", "0"), ("evaluate", "NOTES", "--features", "EMPTY", "-m", "MODEL", "-o", "OUT"),
    ("localize", "SCAN", "-m", "MODEL", "-t", "cyst", "--device", "gpu9"), ("search", " ", "SCAN", "-m", "MODEL"),
    ("view", "nowhere", "-m", "MODEL"), ("view", "SCAN", "-m", "EMPTY"), ("view", "SCAN", "-m", "MODEL", "--report", " "), ("view", "SCAN", "-m", "MODEL", "--window", "brain"), ("localise", "SCAN"), ("localize", "SCAN", "-m", "MODEL"),
    ("localize", "SCAN", "-m", "MODEL", "-t", "cyst", "--jsn")], ids=lambda w: "-".join(w[:2]))
def test_bad_input_is_one_line_and_status_2(cohort, tmp_path, capsys, words):
    (tmp_path / "empty").mkdir(); (tmp_path / "notes.txt").write_text("no scan"); (tmp_path / "none.csv").write_text("study,report\n"); (tmp_path / "latin.txt").write_bytes(b"Zyste \xfcber 4 cm")
    names = {"MODEL": cohort / "model", "OLD": cohort / "old", "EMPTY": tmp_path / "empty", "NOTES": tmp_path / "notes.txt", "NONE": tmp_path / "none.csv", "LATIN": tmp_path / "latin.txt",
             "SCAN": sorted((cohort / "cohort" / "scans").rglob("*.nii.gz"))[0], "OUT": tmp_path / "out", "PAIRS": tmp_path / "pairs.parquet"}
    status, out, err = ended(capsys, *(names.get(w, w) for w in words))
    lines = [l for l in err.splitlines() if "trained on" not in l]
    assert status == 2 and out == "" and len(lines) == 1 and lines[0].startswith("ctvlm: ") and "Traceback" not in err, err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "latin.txt", "none.csv", "notes.txt"]


def test_bad_input_in_a_shell():
    status, out, err = shell("mine", "nowhere.csv", "-o", "pairs.parquet")
    assert (status, out) == (2, "") and err.startswith("ctvlm: ") and "nowhere.csv" in err and err.count("\n") == 1


def test_debug_shows_the_traceback():
    for words in (("--debug", "localize", "nowhere", "-m", "nowhere", "-t", "cyst"), ("localize", "nowhere", "-m", "nowhere", "-t", "cyst", "--debug")):
        status, _, err = shell(*words)
        assert status != 0 and "Traceback" in err


class Terminal(io.StringIO):
    "Standard error as somebody at a screen has it."
    def isatty(self): return True


def seen(monkeypatch, capsys, *words):
    "Standard output as JSON, and the lines that a terminal shows on standard error."
    with monkeypatch.context() as m:
        m.setattr(sys, "stderr", Terminal())
        with pytest.raises(SystemExit) as left: cli.main([*words, "--json"])
        screen = sys.stderr.getvalue()
    assert left.value.code == 0, screen
    return json.loads(capsys.readouterr().out), screen.replace("\r", "\n").split("\n")


@pytest.mark.parametrize("verb, shown", [("label", "labelling: "), ("preprocess", "ctvlm: read "), ("mine", "reports: "), ("check", "checking: ")])
def test_quiet_leaves_the_answer_and_an_empty_screen(cohort, tmp_path, monkeypatch, capsys, verb, shown):
    reports, scan = cohort / "cohort" / "reports.csv", next((cohort / "cohort" / "scans").rglob("*.nii.gz"))
    words = {"label": (reports, "-o", tmp_path / "out.parquet"), "mine": (reports, "-o", tmp_path / "out.parquet"), "preprocess": (scan, "-o", tmp_path / "out.safetensors"),
             "check": (scan,)}[verb]
    loud, screen = seen(monkeypatch, capsys, verb, *words)
    quiet, nothing = seen(monkeypatch, capsys, verb, *words, "--quiet")
    assert any(line.startswith(shown) for line in screen) and nothing == [""] and quiet == loud


def test_training_keeps_standard_output_for_the_answer(cohort, store, monkeypatch, capsys):
    words = training(cohort, store, cohort / "told")
    answer, screen = seen(monkeypatch, capsys, *words)
    assert any(line.startswith("training: ") for line in screen)
    again, screen = seen(monkeypatch, capsys, *words, "-q")                         # the run is complete: it goes on after its last step
    assert again == answer == {"model": str(cohort / "told" / "model")}
    assert [line[:22] for line in screen if "left out" not in line] == ["ctvlm: this model was ", "continuing after step ", ""]


def test_statuses(monkeypatch, capsys, tmp_path):
    (tmp_path / "w.txt").write_text("x")
    for error, status in ((KeyError("Mrs Smith"), 3), (KeyboardInterrupt(), 130), (PermissionError(13, "Permission denied", "w.txt"), 2)):
        def fail(*a, **k): raise error
        monkeypatch.setattr("ctvlm.preprocessing.check_paths", fail)
        code, _, err = ended(capsys, "check", str(tmp_path / "w.txt"))
        assert code == status and err.count("\n") == 1 and err.startswith("ctvlm: ") and "Smith" not in err
        assert {3: "--debug", 130: "interrupted", 2: "w.txt: Permission denied; check"}[status] in err
    monkeypatch.undo()
    assert ended(capsys, "check", str(tmp_path / "w.txt"), "--json")[0] == 1     # done, but refused
    assert ended(capsys, "--version")[0] == 0


def test_what_a_terminal_would_obey_is_not_printed(capsys, tmp_path):
    from ctvlm.core import legible
    assert legible("two\nlines\tand a tab, Lungenödem, \x1b[2Jgone \x07\r\u202e") == "two\nlines\tand a tab, Lungenödem, \ufffd[2Jgone \ufffd \ufffd"
    code, out, err = ended(capsys, "check", str(tmp_path / "scan\x1b[2J.nii"))
    assert code and "scan" in out + err and "\x1b" not in out + err


@pytest.mark.parametrize("verb", ["mine", "label"])
def test_the_name_of_a_file_is_no_report(capsys, tmp_path, verb):
    for name in ("report.txt", "./sub/report", "~/reports/a.md", r"C:\reports\a.txt"):
        code, _, err = ended(capsys, verb, name, "--explain")
        assert code == 2 and err.count("\n") == 1 and "does not exist: check the path" in err, (verb, name)
    assert ended(capsys, verb, "No nodule. Cyst in the liver (series 2, image 4).", "--explain")[0] == 0


def test_refused_studies_end_with_status_1(capsys, tmp_path):
    root = tmp_path / "root"
    (root / "scans").mkdir(parents=True)
    write_cohort(PhantomCohort(1, spacing=(6., 6., 6.)), tmp_path / "cohort", quiet=True)
    scan, = (tmp_path / "cohort" / "scans").rglob("*.nii.gz")
    shutil.copy(scan, root / "scans" / "a.nii.gz")
    (root / "reports.csv").write_text("study,patient,scan,report\na,1,scans/a.nii.gz,Emphysema.\nb,2,scans/b.nii.gz,Emphysema.\n")
    words = "studies", str(root), "--as", "csv", "-o", str(tmp_path / "t.parquet"), "--json"
    assert ended(capsys, *words)[0] == 1 and "b.nii.gz" in (tmp_path / "t.refused.csv").read_text()
    assert ended(capsys, *words, "--allow-missing")[0] == 0


def test_version_says_what_computes():
    import torch, ctvlm
    status, out, _ = shell("--version")
    assert status == 0 and out.startswith(f"ctvlm {ctvlm.__version__}, torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}, device ")


def test_verbs_share_their_options():
    from typer.main import get_command
    verbs = get_command(app).commands
    of = {name: {o for p in command.params for o in p.opts} for name, command in verbs.items()}
    assert all("--json" in o for o in of.values())
    assert {v for v, o in of.items() if "--quiet" not in o} == {"compare", "findings", "series"}          # which have nothing to say but their answer
    assert all("--device" in of[v] for v in ("localize", "classify", "search", "view", "embed", "evaluate"))
    for name, command in verbs.items():
        assert command.help and all(p.help for p in command.params if p.name != "help"), name
        for p in command.params:                                                 # one letter means one thing
            for short, long in (("-o", "--output"), ("-m", "--model"), ("-q", "--quiet")):
                if long in p.opts: assert (short in p.opts) and p.opts.index(long) >= 0, (name, p.opts)


def test_the_manual_knows_every_verb():
    from typer.main import get_command
    page = manual()
    for name, command in get_command(app).commands.items():
        part = page.split(f"### ctvlm {name}\n")[1].split("\n### ")[0].split("\n## ")[0]
        assert command.help in part and all(o in part for p in command.params if p.param_type_name == "option" for o in p.opts)
    for title in ("Name", "Synopsis", "Options", "Verbs", "Exit status", "Environment", "Completion", "Examples"): assert f"\n## {title}\n" in page
    assert all(f"| {n} | {text} |" in page for n, text in cli.STATUS.items())


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_completion_in_bash(tmp_path):
    (tmp_path / "ctvlm").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ctvlm.cli "$@"\n')
    (tmp_path / "ctvlm").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    def bash(script): return subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, env=environment, timeout=300).stdout.split("\n")
    bash("ctvlm --install-completion; true")
    assert "ctvlm.sh" in (tmp_path / ".bashrc").read_text()
    ask = 'source "$HOME/.bash_completions/ctvlm.sh"; COMP_WORDS=(%s); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _ctvlm_completion ctvlm; printf "%%s\\n" "${COMPREPLY[@]}"'
    assert {"localize", "label"} <= set(bash(ask % "ctvlm l")) and "view" not in bash(ask % "ctvlm l")
    assert "--window" in bash(ask % "ctvlm view --w")
    assert {"rules", "llm"} <= set(bash(ask % 'ctvlm label --engine ""'))


def test_the_command_line_explains_itself():
    for verb in ("demo", "phantoms", "mine", "label", "check", "preprocess", "studies", "embed", "train", "evaluate", "compare", "localize", "classify", "search", "view"):
        assert "Usage" in run(verb, "--help")


def test_your_own_scan_needs_a_folder_and_a_report(cohort, tmp_path):
    "The tutorial's cells on somebody else's folder, report and model."
    import matplotlib
    matplotlib.use("agg")
    cells = json.loads((Path(__file__).parents[1] / "nbs" / "tutorials" / "your_own_scan.ipynb").read_text())["cells"]
    folder = PhantomCohort(3, spacing=(6., 6., None), languages=("de",))[1].write_dicom(tmp_path / "theirs")
    given = f"folder, report, model = {str(folder)!r}, 'Zyste in der linken Niere. Kein Pleuraerguss.', {str(cohort / 'model')!r}"
    names = {}
    for source in ("".join(c["source"]) for c in cells if c["cell_type"] == "code"):
        exec(source, names)
        if "folder = None" in source: exec(given, names)
    assert names["volume"].name.startswith("theirs") and names["model"].config.trained_on != "nothing: its weights are random" and names["asked"].empty and names["answers"]


def shell_lines():
    "Every line of the book in which the command is called: (notebook, words)."
    import re, shlex
    for path in sorted((Path(__file__).parents[1] / "nbs").rglob("[!_.]*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            text = "".join(cell["source"])
            blocks = re.findall(r"```(?:sh|bash|shell)\n(.*?)```", text, re.S) if cell["cell_type"] == "markdown" else re.findall(r"^!(.*)$", text, re.M)
            known = {}
            for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
                if given := re.fullmatch(r"(\w+)=(['\"])(.*)\2", line.strip()): known[given[1]] = given[3]; continue
                for name, value in known.items(): line = line.replace(f"${name}", value)
                for part in re.split(r"&&|\|\||[;|]", re.sub(r"\s#.*", "", line)):
                    words = shlex.split(part.replace("<", "").replace(">", ""))
                    start = next((k for k, w in enumerate(words) if w in ("ctvlm", "ctvlm.cli")), None)
                    if start is not None and words[0] in ("ctvlm", "accelerate", "python", "srun", "nohup", "torchrun"): yield path.stem, words[start + 1:]


LINES = list(shell_lines())


@pytest.mark.parametrize("stem, words", LINES, ids=[f"{s}-{' '.join(w)[:40]}" for s, w in LINES])
def test_every_shell_line_of_the_book_parses(stem, words, monkeypatch):
    "Options, their values, how many arguments: against the real command."
    from typer.main import get_command
    group = get_command(app)
    if words[:1] == ["--version"]: return
    assert words[0] in group.commands, f"no verb {words[0]}"
    group.commands[words[0]].make_context(words[0], list(words[1:]), parent=group.context_class(group, info_name="ctvlm"))


def test_there_are_lines_and_a_wrong_one_is_noticed():
    assert len(LINES) > 12 and {'index', 'your_own_scan', 'gpu_server'} <= {s for s, _ in LINES}
    for words in (["localize", "scan", "--model", "m"], ["evaluate", "t", "-m", "m", "-o", "o", "--task", "everything"], ["train", "t", "--no-such"]):
        with pytest.raises(Exception, match="Missing|everything|No such"): test_every_shell_line_of_the_book_parses("planted", words, None)


@pytest.mark.parametrize("words", [w for _, w in LINES if "--explain" in w and "." in w[-1] and " " in w[-1] or w[0] == "findings"], ids=" ".join)
def test_lines_that_need_no_files_run(words, capsys):
    status, out, _ = ended(capsys, *words)
    assert status == 0 and len(out.splitlines()) > 1


def test_what_fits_is_said_before_anything_is_written(tmp_path, capsys):
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "a.nii.gz").touch()
    (tmp_path / "reports.csv").write_text("study,patient,report\na,p,Normal chest.\nb,q,Cyst.\n")
    before = sorted(tmp_path.rglob("*"))
    code, out, err = ended(capsys, "studies", str(tmp_path), "--as", "csv", "--check", "--json")
    found = json.loads(out)
    assert (code, found["scans"], found["refused"]) == (0, 1, 1) and "b has no scan" in found["first"][0]
    assert sorted(tmp_path.rglob("*")) == before
    code, out, err = ended(capsys, "studies", str(tmp_path), "--as", "csv")
    assert code == 2 and "no output was given" in err
