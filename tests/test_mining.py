"Mining: texts with what is to be found in them, any text at all, headers of a hospital, tables of reports, the second reader."
import csv, json, os, random, re, subprocess, sys, threading, time
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st

from ctvlm.core import InputError
from ctvlm.mining import DOUBTS, HOMOPHONES, NUMBERS, RULES, SeriesIndex, SliceReference, explain, mine_report, mine_study, mine_table, second_reader, sentences, tell_language, without_history

HERE = Path(__file__).parent
SHARED = HERE.parent.parent/"shared"/"mining"


# ---------------------------------------------------------------- texts and what is in them
def words(text): return re.findall(r"\w+", text.lower())
def overlap(a, b): return sum((Counter(a) & Counter(b)).values())

def wanted(cell): # "~4/38-40coronal! = core ^ trail": ~ series carried over, ! prior
    out = []
    for part in filter(str.strip, cell.split(";;")):
        key, _, snippet = part.partition("=")
        carried, series, image, end, plane, prior = re.fullmatch(r"(~?)(-|\d+)/(\d+)(?:-(\d+))?([a-z]*)(!?)", key.strip()).groups()
        out.append(dict(carried=bool(carried), series=None if series == "-" else int(series), image=int(image), image_end=int(end) if end else None, plane=plane or None, prior=bool(prior),
                        core=words(snippet.split("^")[0]), full=words(snippet)))
    return out

def reports(name):
    with open(HERE/name, encoding="utf-8") as f:
        for row in csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE):
            yield row["language"], row["text"].replace("\\n", "\n").replace("\\t", "\t").replace("\\|", "|"), wanted(row["expected"])

def shares(rows): # precision, recall, and the shares of prior references, snippets and planes that are right
    hits = extra = missed = right = prior_hits = priors = plane = 0
    for language, text, want in rows:
        got, used = mine_report(text, language), set()
        for w in want:
            j = next((j for j, r in enumerate(got) if j not in used and (r.image, r.image_end, r.prior) == (w["image"], w["image_end"], w["prior"]) and (r.series == w["series"] or w["carried"] and r.series is None)), None)
            priors += w["prior"]
            if j is None: missed += not w["prior"]; continue
            used.add(j)
            if w["prior"]: prior_hits += 1; continue
            hits += 1
            plane += got[j].plane == w["plane"]
            found = words(got[j].snippet)
            right += overlap(found, w["core"]) >= .8 * len(w["core"]) and 2 * overlap(found, w["full"]) >= len(found) > 0
        extra += sum(not r.prior for j, r in enumerate(got) if j not in used)
    return np.array([hits / (hits + extra), hits / (hits + missed), prior_hits / priors, right / hits, plane / hits])

@pytest.mark.parametrize("name, least", [("mining_reports.tsv", (.99, .985, .95, .97, .99)), ("mining_families.tsv", (.985, .97, .92, .96, .99))])
def test_reports(name, least):
    got = shares(reports(name))
    assert (got >= least).all(), got

@pytest.mark.skipif(not SHARED.is_dir(), reason="no development set")
def test_development_set():
    out = subprocess.run([sys.executable, SHARED/"score.py", SHARED/"dev.jsonl"], capture_output=True, text=True, check=True).stdout
    score = json.loads(out)
    assert score["precision"] >= .99 and score["recall"] >= .97 and score["prior_recall"] >= .9 and score["snippet_accuracy"] >= .92 and score["plane_accuracy"] == 1

@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_rules(rule):
    assert {r.rule for r in mine_report(rule.yes, "en")} == {rule.name}
    assert mine_report(rule.no, "en") == []

@pytest.mark.parametrize("doubt", DOUBTS, ids=lambda d: d.name)
def test_doubts(doubt): assert mine_report(doubt.example, "en") == []

@pytest.mark.parametrize("text,pairs", [ # the instructive ones
    ("Nodes (4/12) and (4/15).", [(4, 12), (4, 15)]), ("CT (4/12) and MRI (4/15).", []), ("Strength (4/5). Cyst (4/38).", [(4, 38)]),
    ("Cysts (4/38, 4/40; 5/12).", [(4, 38), (4, 40), (5, 12)]), ("Cysts (4:38, 40, 42; 5:12).", [(4, 38), (4, 40), (4, 42), (5, 12)]),
    ("Stone (images 144/151).", [(None, 144), (None, 151)]), ("Stone (image 118/214).", [(None, 118)]), ("Stone (118/214).", [(None, 118)]), ("Stone (series 4, image 118/214).", [(4, 118)]),
    ("Stone (3-41).", [(3, 41)]), ("Stone, IMA 8-34.", [(8, 34)]), ("Stone (601b:56).", [(601, 56)]), ("Stone (serious for, image 38).", [(4, 38)]), ("Stone (series two image thirty-eight).", [(2, 38)]),
    ("Cyst (series 80312, image 40).", [(80312, 40)]), ("Cyst (5, 41).", [(5, 41)]), ("Cysts (9, 11 mm). Levels (5, 16).", []), ("Cyst in the tail, 7 image 52.", [(7, 52)]), ("Level 4, image 38.", [(None, 38)]),
    ("cysts series 5 image 12 40 77", [(5, 12), (5, 40), (5, 77)]), ("cyst series 5 image 40 12 mm", [(5, 40)]), ("Nodules: lingula 6-120, right base 6-144.", [(6, 120), (6, 144)]), ("Right ribs 6-42.", []),
    ("Fracture (axial image #88, sagittal #41).", [(None, 88), (None, 41)]), ("Creatinine 1.2 (6/11). Lesion 2 (3/40).", [(3, 40)]), ("Segment 2 (3/31).", [(3, 31)]),
    ("Ketorolac IM 30 given.", []), ("Im 3. Segment der Leber.", []), ("Bilder: 388. Anzahl Bilder: 12.", []), ("Key images 3 and 40 were saved.", []), ("TECHNIQUE: series 2, images 1-180, axial.", []),
])
def test_pairs(text, pairs): assert [(r.series, r.image) for r in mine_report(text)] == pairs

@pytest.mark.parametrize("text,snippets", [
    ("Nodules in the RUL 5 mm (4/38), RML 4 mm (4/62) and LLL 7 mm (4/88).", ["Nodules in the RUL 5 mm", "Nodules in the RML 4 mm", "Nodules in the LLL 7 mm"]),
    ("FINDINGS: 1. Lungs: Nodule, best seen on series 4, image 38.", ["Nodule"]), ("RUL: 5 mm nodule (4/38).", ["RUL: 5 mm nodule"]), ("Series 4, image 38: 5 mm nodule.", ["5 mm nodule"]),
    ("There is a cyst. Best seen on image 38.", ["There is a cyst"]), ("Cyst (4/38); hernia (4/99).", ["Cyst", "hernia"]), ("SMA (3:70) and aorta (3:88) are calcified.", ["SMA are calcified", "aorta are calcified"]),
    ("Nodules:\n- RUL, 5 mm (4/38)\n- LLL, 6 mm (4/88)", ["Nodules: RUL, 5 mm", "Nodules: LLL, 6 mm"]), ("Z.n. Resektion, ca. 2.4 cm Rest (4/38). Kein Erguss.", ["Z.n. Resektion, ca. 2.4 cm Rest"]),
])
def test_snippets(text, snippets): assert [r.snippet for r in mine_report(text)] == snippets

@pytest.mark.parametrize("text,priors", [
    ("Nodule 8 mm (4/38), previously 5 mm (3/40).", [False, True]), ("Nodule 8 mm (4/38; prior 3/40).", [False, True]), ("Previously described nodule (series 4, image 38).", [False]), ("Unchanged since the prior CT (series 4, image 38).", [False]),
    ("Herd 8 mm (4/38), in der Voruntersuchung 5 mm (3/40).", [False, True]), ("On the outside MRI (series 8, image 12) larger.", [True]), ("Compared with the prior CT, the mass has grown to 4 cm (series 4, image 38).", [False]),
])
def test_prior(text, priors): assert [r.prior for r in mine_report(text)] == priors


# ---------------------------------------------------------------- any text at all
ALPHABET = st.sampled_from(["series", "Serie", "image", "Bild", "Bilder", "se", "im", "IMA", "coronal", "4", "38", "601b", "12", "/", ":", "-", "(", ")", "[", "]", ",", ";", ".", " ", "  ", "\n", "\n\n", "\t", "|", "and", "to", "of", "prior", "mm",
                            "previously 5 mm", "nodule", "Zyste", "FINDINGS:", "1.", "- ", "four", "for", "best seen on", "3/12/2020", "L4/5", "ſ", "İ", "٣", "Ⅳ", "\x00", "😀", "ff.", "is", "while", "no"])

def check(text):
    for r in mine_report(text):
        assert 0 <= r.span[0] < r.span[1] <= len(text) and 0 <= r.snippet_span[0] <= r.snippet_span[1] <= len(text)
        said = text[slice(*r.span)].lower()
        spelled = any(w in NUMBERS or w in HOMOPHONES for w in re.findall(r"[^\W\d_]+", said))
        for n in (r.image, r.image_end): assert n is None or spelled or re.search(rf"(?<!\d)0*{n}(?!\d)", said), (n, said)
        assert r.series is None or spelled or re.search(rf"(?<!\d)0*{r.series}(?!\d)", text if r.carried else said) or re.search(rf"(?<!\d)0*{r.series}(?!\d)", text), (r, said)
        assert all(w in text.lower() for w in words(r.snippet))
    k = sentences(text)
    assert k == sorted(k) and k[0] == 0 and k[-1] == len(text)
    assert "".join(t for _, t in explain(text).runs) == text

@settings(max_examples=500, deadline=None)
@given(st.lists(ALPHABET, max_size=40), st.sampled_from(["", " "]))
def test_any_words(parts, joint): check(joint.join(parts))

@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200))
def test_any_text(text): check(text)

@settings(max_examples=100, deadline=None)
@given(st.text(max_size=80))
def test_history_and_language(text):
    assert tell_language(text) in ("en", "de")
    assert not text.strip() or isinstance(without_history(text), str)

def test_nothing(): assert mine_report("") == mine_report(None) == []

@pytest.mark.parametrize("unit", ["7", "/", "(", ")", "4/38 ", "(4/38) ", "(4/38, ", "4,", "4-38-", "series 4 image 38 ", "image 4 of ", ". ", " ", "\n", "Series | Image\n4 | 38\n", "Findings: ", "- a\n- b (4/38)\n", "on 3/4/2020 5 mm (3/40) ", "See image 4. ", "prior prior ", "(((4/38 "])
def test_time_grows_with_length(unit):
    def seconds(n):
        text = (unit * (n // len(unit) + 1))[:n - 30] + "\nCyst (series 4, image 38). "
        times = []
        for _ in range(2):
            start = time.process_time(); mine_report(text); times.append(time.process_time() - start)
        return min(times)
    short, long = seconds(15_000), seconds(60_000)
    assert long < 7 * short + .1 and long < 10 # four times the text; a square would be sixteen


# ---------------------------------------------------------------- depths
def table(**columns):
    n = max(len(v) for v in columns.values())
    return pd.DataFrame(dict(study=["A"] * n) | columns)

def test_resolve_what_a_table_says():
    index = SeriesIndex(table(series=[4] * 3 + [5] * 3, instance=[1, 2, 3] * 2, depth_mm=[30., 20, 10, 30, 20, 12]))
    assert index.resolve("A", SliceReference(4, 2)).depth_mm == 20
    assert index.resolve("A", SliceReference(None, 2)).depth_mm == 20        # both series agree
    assert index.resolve("A", SliceReference(None, 3)).status == "ambiguous series"
    assert index.resolve("A", SliceReference(4, 1, 3)).low_mm == 10
    assert index.resolve("A", SliceReference(4, 2, prior=True)).status == "prior"

def test_duplicates_in_one_place_are_no_trouble():
    index = SeriesIndex(table(series=[4, 4], instance=[1, 1], depth_mm=[30., 30], series_uid=["x", "x"]))
    assert index.resolve("A", SliceReference(4, 1)).depth_mm == 30

@pytest.mark.parametrize("study", [0, 1])
def test_phantom_dicom(study, tmp_path):
    from ctvlm.phantoms import PhantomCohort
    phantom = PhantomCohort(2, seed=11, spacing=(24., 24., None))[study]
    phantom.write_dicom(tmp_path)
    index, truth = SeriesIndex.from_dicom(tmp_path, workers=1), SeriesIndex(phantom.series_table)
    for reference in mine_report(phantom.report.text):
        a, b = index.resolve(phantom.study, reference), truth.resolve(phantom.study, reference)
        assert a.status == b.status and (a.depth_mm is None or abs(a.depth_mm - b.depth_mm) < 1e-3)

def test_header_processes_agree(tmp_path):
    from ctvlm.phantoms import PhantomCohort
    PhantomCohort(1, seed=11, spacing=(48., 48., None))[0].write_dicom(tmp_path)
    pd.testing.assert_frame_equal(SeriesIndex.from_dicom(tmp_path, workers=1).table, SeriesIndex.from_dicom(tmp_path, workers=2).table)

def test_phantom_reports():
    from ctvlm.phantoms import PhantomCohort
    typed, found, hits = 0, 0, 0
    for study in PhantomCohort(60, seed=5, spacing=(48., 48., None)):
        index, got = SeriesIndex(study.series_table), mine_report(study.report.text)
        key = lambda r: (r.series, r.image, r.image_end, r.plane, r.prior)
        typed, found = typed + len(study.report.references), found + len(got)
        hits += sum((Counter(map(key, got)) & Counter(map(key, study.report.references))).values())
        truth = {key(r): r.depth_mm for r in study.report.references}
        for r in got:
            where = index.resolve(study.study, r)
            if truth.get(key(r)) is not None:
                rows = study.series_table.query("series == @r.series")
                assert abs(where.depth_mm - truth[key(r)]) <= np.abs(np.diff(rows.depth_mm)).min() / 2
    assert hits / found >= .995 and hits / typed >= .995


# ---------------------------------------------------------------- tables
ROWS = [("A", "Cyst (series 4, image 2)."), ("A", "Kein Erguss. Zyste (Serie 4, Bild 3)."), ("B", "No finding."), ("A", None), (None, "Cyst (4/38).")]

@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "xlsx"])
def test_mine_table(kind, tmp_path):
    frame, path = pd.DataFrame(ROWS, columns=["study", "report"]), tmp_path/f"reports.{kind}"
    {"csv": lambda: frame.to_csv(path, index=False), "tsv": lambda: frame.to_csv(path, sep="\t", index=False), "parquet": lambda: frame.to_parquet(path), "xlsx": lambda: frame.to_excel(path, index=False)}[kind]()
    SeriesIndex(table(series=[4] * 3, instance=[1, 2, 3], depth_mm=[30., 20, 10])).save(tmp_path/"index.parquet")
    summary = mine_table(path, tmp_path/"index.parquet", tmp_path/"pairs.parquet", quiet=True)
    pairs = pd.read_parquet(tmp_path/"pairs.parquet")
    assert (summary["reports"], summary["pairs"], summary["kept"]) == (5, 2, 2) and summary["unreadable"] == {"no report": 1, "no study": 1}
    assert pairs.depth_mm.dropna().tolist() == [20, 10] and pairs.language.dropna().tolist() == ["en", "de"] and len(pairs) == 4

def test_findings_and_impression_are_joined(tmp_path):
    (tmp_path/"r.csv").write_text("Accession;Findings;Impression\nA;Cyst (4/38).;Stone (5/12).\n")
    assert mine_table(tmp_path/"r.csv", quiet=True)["pairs"] == 2

def test_bad_tables(tmp_path):
    (tmp_path/"r.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="expected also study"): mine_table(tmp_path/"r.csv")
    with pytest.raises(InputError, match="found no file .*s.csv"): mine_table(tmp_path/"s.csv")
    (tmp_path/"n.csv").write_text("study,report\n")
    with pytest.raises(InputError, match="found no row"): mine_table(tmp_path/"n.csv", output=tmp_path/"n.parquet")
    assert not (tmp_path/"n.parquet").exists()
    (tmp_path/"r.docx").write_text("")
    with pytest.raises(InputError, match="docx"): mine_table(tmp_path/"r.docx")
    (tmp_path/"r.parquet").write_text("no parquet")
    with pytest.raises(InputError, match="cannot be read"): mine_table(tmp_path/"r.parquet")
    (tmp_path/"g.csv").write_text("study,report\nA,Cyst\n")
    with pytest.raises(InputError, match="ending in .parquet"): mine_table(tmp_path/"g.csv", output=tmp_path/"o.csv")
    with pytest.raises(InputError): mine_table(tmp_path/"g.csv", tmp_path/"r.parquet")
    assert not (tmp_path/"o.csv").exists()

def test_memory_does_not_grow(tmp_path):
    code = """import resource, sys
from ctvlm.mining import mine_table
mine_table(sys.argv[1], output=sys.argv[2], quiet=True); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"""
    peaks = []
    for n in (500, 5000):
        with open(tmp_path/"r.csv", "w") as f:
            f.write("study,report\n")
            for k in range(n): f.write(f'S{k},"Cyst (series 4, image {k % 300 + 1}). {"No other finding. " * 40}"\n')
        peaks.append(int(subprocess.run([sys.executable, "-c", code, tmp_path/"r.csv", tmp_path/"o.parquet"], capture_output=True, text=True, check=True).stdout))
    assert peaks[1] < peaks[0] + 30_000 # KiB


# ---------------------------------------------------------------- the second reader
@pytest.fixture
def reader():
    "The address of a server whose model says `reader.content`."
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.dumps({"choices": [{"message": {"content": said.content}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        def log_message(self, *args): pass
    server = HTTPServer(("127.0.0.1", 0), Handler)
    said = SimpleNamespace(content=None, url=f"http://127.0.0.1:{server.server_port}/v1")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield said
    server.shutdown()
    server.server_close()

def test_second_reader_over_http(reader):
    pair = dict(reference="series 4, image 38", series=4, image=38, image_end=None, plane=None, prior=False, snippet="Cyst")
    other = pair | dict(reference="image 99", series=None, image=99, snippet="Hernia")
    reader.content = json.dumps({"pairs": [pair, other]})
    text = "Cyst (series 4, image 38)."
    out, refused = second_reader(text, mine_report(text), reader.url, "m")
    assert [r.rule for r in out] == ["series, image, confirmed"] and refused == [("image 99", "reference not in the report")]

@pytest.mark.parametrize("content", ["no json", "{}", '{"pairs": 3}', '{"pairs": [1, {"image": "x"}]}', None])
def test_second_reader_survives_nonsense(reader, content):
    reader.content = content
    text = "Cyst (series 4, image 38)."
    out, refused = second_reader(text, mine_report(text), reader.url, "m", wait=0)
    assert [r.image for r in out] == [38] and refused

def test_second_reader_without_a_server():
    text = "Cyst (series 4, image 38)."
    out, refused = second_reader(text, mine_report(text), "http://127.0.0.1:9/v1", "m", tries=1)
    assert [r.image for r in out] == [38] and refused == [("", "no answer")]


# ---------------------------------------------------------------- words, and what an import brings
ROOT = HERE.parent
LISTS = ROOT/"ctvlm"/"data"/"word_lists.csv"
HEAVY = ("torch", "transformers", "peft", "accelerate", "matplotlib", "seaborn", "sklearn", "nibabel", "ipywidgets", "tensorboard")

def test_word_lists():
    "Every list says what it is for, holds words, each once, and is used by a chapter."
    rows = list(csv.DictReader(open(LISTS, encoding="utf-8")))
    assert list(rows[0]) == ["use", "name", "holds", "words"]
    names = [(r["use"], r["name"]) for r in rows]
    assert len(names) == len(set(names))
    code = "".join(p.read_text(encoding="utf-8") for p in (ROOT/"ctvlm").glob("*.py"))
    for r in rows:
        words = r["words"].split(";")
        assert r["use"] in ("kind", "list", "pattern") and r["holds"], r["name"]
        assert all(w and w.strip() for w in words), r["name"]
        if r["use"] == "kind": continue
        assert len(words) == len(set(words)), r["name"]
        assert any(f"{q}{r['name']}{q}" in code for q in "\"'"), f"nobody uses {r['name']}"
        if r["use"] == "list": assert all(w == w.lower() and "*" not in w for w in words), r["name"]

def test_no_word_is_of_two_kinds():
    rows = [r for r in csv.DictReader(open(LISTS, encoding="utf-8")) if r["use"] == "kind"]
    kinds = [w for r in rows for w in r["words"].split(";")]
    assert not [w for w in kinds if kinds.count(w) > 1]

def test_mining_needs_no_torch(tmp_path):
    "`import ctvlm.mining` and `ctvlm mine` where torch, transformers and matplotlib are not installed."
    (tmp_path/"r.csv").write_text('study,report\nA,"Cyst (series 4, image 38)."\n')
    code = f"""import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY}: raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Missing())
import ctvlm.mining
assert [r.image for r in ctvlm.mining.mine_report("Cyst (series 4, image 38).")] == [38]
from ctvlm.cli import main
sys.argv = ["ctvlm", "mine", {str(tmp_path/"r.csv")!r}, "-o", {str(tmp_path/"p.parquet")!r}, "--json"]
main()"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert (tmp_path/"p.parquet").exists()
