"Findings: the catalogue as data, the rules in tables, the language model against a server that misbehaves."
import csv, json, logging, os, re, signal, subprocess, sys, time, urllib.request
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from ctvlm.core import InputError
from ctvlm.findings import (CT_RATE_CLASSES, CT_RATE_FINDINGS, FINDINGS, MERLIN_FINDINGS, RAD_CHESTCT_FINDINGS, AnswerStore, LanguageModel, asserts, colour_report,
                            explain_report, fold, label_report, label_reports, label_table, prompts_for, rewrite_reports, sentences)

HERE = Path(__file__).parent
SHARED = HERE.parent.parent/"shared"/"findings"


# ---------------------------------------------------------------- the catalogue
def test_latin_is_no_umlaut():
    "*Filiae*, *Pleuraerguss* and *Residuen* are written with two letters, not with an umlaut."
    for name in ("findings.csv", "words.csv"):
        text = (HERE.parent/"ctvlm"/"data"/name).read_text(encoding="utf-8").lower()
        assert not re.findall(r"filiä\w*|bullä\b|pleurä\w*|portä\b|venä\b|residün\w*|neurön\w*|tracheä\w*", text)

def test_sentences_are_cut_once():
    "The reader of findings and the miner agree on where a sentence ends."
    from ctvlm.language import sentences as cut
    for text in ("Zyste in Seg. VII. V.a. Metastase re. basal. Kein Aszites.", "Pleural effusion: no. Pericardial effusion: yes.",
                 "Nodule, approx. 4 mm\n2. Cyst, see Fig. 3. No ascites.", "Cyst of the\nleft kidney (series 3,\nimage 50). No stones."):
        k = cut(text, "de")
        ours = [w for a, b in zip(k, k[1:]) if (w := re.findall(r"[^\W\d_]+", text[a:b]))]
        theirs = [w for s in sentences(text) if (w := re.findall(r"[^\W\d_]+", " ".join(t.text for t in s.tokens)))]
        assert ours == theirs, text

def test_import_builds_no_grammar():
    code = "import sys, ctvlm.findings as f; assert 'tree' not in vars(f.GRAMMAR) and 'torch' not in sys.modules; assert f.label_report('No ascites.')['Ascites'] == 0"
    subprocess.run([sys.executable, "-c", code], check=True)

def test_catalogue_schema():
    rows = list(csv.DictReader(open(HERE.parent/"ctvlm"/"data"/"findings.csv", encoding="utf-8")))
    organs = {r["organ"] for r in csv.DictReader(open(HERE.parent/"ctvlm"/"data"/"organs.csv", encoding="utf-8"))}
    words = list(csv.DictReader(open(HERE.parent/"ctvlm"/"data"/"words.csv", encoding="utf-8")))
    sites, signs = ({r["name"] for r in words if r["kind"] == k} for k in ("site", "sign"))
    assert list(rows[0]) == ["id", "name", "organ", "region", "article", "sign", "parents", "signs", "history", "en", "de", "ct_rate", "rad_chestct", "merlin"]
    names = [r["name"] for r in rows]
    assert len(set(names)) == len(set(r["id"] for r in rows)) == len(rows)
    for r in rows:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", r["id"]) and r["region"] in ("chest", "abdomen") and r["article"] in ("", "a", "an") and r["history"] in ("", "yes"), r
        assert r["organ"] in organs and r["sign"] and r["en"] and r["de"], r["name"]
        assert all(p in names for p in r["parents"].split(";") if p), r["name"]
        for pair in filter(None, r["signs"].split(";")):
            sign, site = pair.split("@"); assert sign.removeprefix("no ") in signs and site in sites, (r["name"], pair)
        assert r["article"] != "an" or fold(r["name"])[0] in "aeiou", r["name"]
        assert r["article"] != "a" or r["name"][0].lower() not in "aeio", r["name"]
    assert sum(r["region"] == "chest" for r in rows) >= 93 and sum(r["region"] == "abdomen" for r in rows) >= 226
    assert {r["kind"] for r in words} == {"site", "sign", "opposite", "nothing", "cue"}


def test_public_names():
    assert len(CT_RATE_CLASSES) == 18 and set(CT_RATE_CLASSES) == set(CT_RATE_FINDINGS) <= set(FINDINGS)
    assert len(RAD_CHESTCT_FINDINGS) == 16 and "Mosaic attenuation pattern" not in RAD_CHESTCT_FINDINGS
    assert len(MERLIN_FINDINGS) == 30


@pytest.mark.parametrize("style,number", [("single", 1), ("templates", 7), ("ensemble", 3)])
def test_prompts_are_read_as_they_are_meant(style, number):
    "Every prompt asserts or denies its own finding when the rules read it."
    for name in FINDINGS:
        p = prompts_for(name, style)
        assert len(p.positive) == len(p.negative) == number
        assert [label_report(t)[name] for t in p.positive] == [1] * number, p.positive
        assert [label_report(t)[name] for t in p.negative] == [0] * number, p.negative
        assert len({len(t) for t in p.positive}) == number or style == "templates"


def test_synonyms_are_found():
    for name, f in FINDINGS.items():
        for x in f.en: assert label_report(f"There is {x}.")[name] == 1, (name, x)
        for x in f.de: assert label_report(f"Es zeigt sich {x.strip('*')}.")[name] == 1, (name, x)


# ---------------------------------------------------------------- the rules, by what they are about
def said(text, name): return label_report(text)[name]

RULES = {
"where a denial ends": [
    ("No pleural effusion, pneumothorax or consolidation.", {"Pleural effusion": 0, "Consolidation": 0}),
    ("No pleural effusion but consolidation.", {"Pleural effusion": 0, "Consolidation": 1}),
    ("No pleural effusion; mild emphysema.", {"Pleural effusion": 0, "Emphysema": 1}),
    ("Neither ascites nor splenomegaly.", {"Ascites": 0, "Splenomegaly": 0}),
    ("Apart from a small hiatal hernia no abnormality.", {"Hiatal hernia": 1}),
    ("Kein Aszites bei Splenomegalie.", {"Ascites": 0, "Splenomegaly": 1}),
    ("Weder Aszites noch Splenomegalie, jedoch Leberzysten.", {"Ascites": 0, "Splenomegaly": 0, "Hepatic cyst": 1}),
    ("Kein Pleuraerguss außer einem kleinen Perikarderguss.", {"Pleural effusion": 0, "Pericardial effusion": 1})],
"denials behind": [
    ("Consolidation and effusion are not seen.", {"Consolidation": 0, "Pleural effusion": 0}),
    ("The effusion has resolved and the consolidation persists.", {"Pleural effusion": 0, "Consolidation": 1}),
    ("Gallensteine nicht nachweisbar, Milz vergrößert.", {"Gallstones": 0, "Splenomegaly": 1}),
    ("Nodule, no longer visible.", {"Lung nodule": 0}),
    ("Gallenblase steinfrei.", {"Gallstones": 0}),
    ("Effusion: none.", {"Pleural effusion": 0})],
"denials that deny nothing": [
    ("No change of the known lung nodule.", {"Lung nodule": 1}),
    ("The infiltrate has not cleared.", {"Lung opacity": 1}),
    ("Effusion nearly resolved.", {"Pleural effusion": 1}),
    ("Pericardium not free of effusion.", {"Pericardial effusion": 1}),
    ("Not only emphysema but also bronchiectasis.", {"Emphysema": 1, "Bronchiectasis": 1}),
    ("Non-calcified nodule.", {"Lung nodule": 1}),
    ("No new nodules; known nodules unchanged.", {"Lung nodule": 1})],
"hedges": [
    ("Suspicious for gallstones.", {"Gallstones": 1}), ("V.a. Aszites.", {"Ascites": 1}), ("DD Leberzyste.", {"Hepatic cyst": 1}),
    ("Gallstones cannot be excluded.", {"Gallstones": -1}), ("Rundherd nicht auszuschließen.", {"Lung nodule": -1}),
    ("Fraglicher Rundherd, eher keiner.", {"Lung nodule": -1}), ("No convincing nodule.", {"Lung nodule": -1}),
    ("No gallstones. Tiny gallstones cannot be excluded.", {"Gallstones": -1}), ("Gallstones cannot be excluded. Gallstones.", {"Gallstones": 1}),
    ("Physiological amount of pericardial fluid.", {"Pericardial effusion": 0})],
"one side and the other": [
    ("No pleural effusion on the right, small on the left.", {"Pleural effusion": 1}), ("Rechts kein Erguss, links geringer.", {"Pleural effusion": 1}),
    ("No pleural effusion on the right, none on the left.", {"Pleural effusion": 0}), ("No effusion on the right, small scar on the left.", {"Pleural effusion": 0}),
    ("No pneumothorax small left effusion.", {"Pneumothorax": 0, "Pleural effusion": 1})],
"organs that are gone": [
    ("The gallbladder is surgically absent.", {"Surgically absent gallbladder": 1}), ("Die Gallenblase ist operativ entfernt.", {"Surgically absent gallbladder": 1}),
    ("The effusion of the gallbladder bed is absent.", {"Surgically absent gallbladder": None}), ("Gallstones are absent.", {"Gallstones": 0, "Surgically absent gallbladder": None})],
"the dialect of translated reports": [
    ("Subcentimeter hypodensity in the liver, too small to characterize.", {"Hepatic lesion": 1, "Hepatomegaly": None}),
    ("Pericardial-pleural effusion was not detected.", {"Pericardial effusion": 0, "Pleural effusion": 0}), ("CTO is within normal limits.", {"Cardiomegaly": 0}),
    ("Main vascular structures are natural.", {"Arterial wall calcification": None}), ("Nodules of up to 4 mm (metastasis?).", {"Lung nodule": 1, "Pulmonary metastases": None}),
    ("Density increases in the lower lobes.", {"Lung opacity": 1}), ("Increased density of the mesenteric fat.", {"Lung opacity": None}),
    ("Lymph nodes with short axes below 1 cm.", {"Lymphadenopathy": 0, "Hepatomegaly": None})],
"history, questions, families": [
    ("Z.n. Pleuraerguss.", {"Pleural effusion": None}), ("Status post pacemaker implantation.", {"Medical material": None}),
    ("Post cholecystectomy with clips.", {"Medical material": 1, "Surgically absent gallbladder": 1}),
    ("INDICATION: ?gallstones\nFINDINGS: Splenomegaly.", {"Gallstones": None, "Splenomegaly": 1}),
    ("Fragestellung: Lymphome? Keine Lymphadenopathie.", {"Lymphadenopathy": 0}),
    ("Mother with abdominal aortic aneurysm.", {"Abdominal aortic aneurysm": None}),
    ("MRI to rule out a hepatic lesion.", {"Hepatic lesion": None})],
"sites and signs": [
    ("Both kidneys and the liver contain cysts.", {"Renal cyst": 1, "Hepatic cyst": 1}),
    ("Koronar- und Aortenkalk.", {"Coronary artery wall calcification": 1, "Arterial wall calcification": 1}),
    ("Heavily calcified aortic valve.", {"Arterial wall calcification": None, "Aortic valve calcification": 1}),
    ("Left renal cyst; 4 mm stone on the right.", {"Kidney stone": 1}),
    ("Stone in the distal ureter.", {"Kidney stone": None, "Ureteral stone": 1}),
    ("Nodule of the left thyroid lobe.", {"Lung nodule": None, "Thyroid nodule": 1}),
    ("Dilated intra- and extrahepatic bile ducts.", {"Biliary dilatation": 1}),
    ("Lymph nodes in the left axilla are enlarged.", {"Lymphadenopathy": 1})],
"opposites and sizes": [
    ("Heart size normal.", {"Cardiomegaly": 0}), ("Gallenwege schlank.", {"Biliary dilatation": 0}),
    ("Der Lymphknoten ist nicht normal groß.", {"Lymphadenopathy": 1}),
    ("Attenuation of the liver is normal.", {"Hepatic steatosis": 0}),
    ("Hilar node 14 x 22 mm.", {"Lymphadenopathy": 1}), ("Hilar node 8 mm.", {"Lymphadenopathy": 0}),
    ("Abdominal aorta 32 mm.", {"Abdominal aortic aneurysm": 1}), ("Bauchaorta 2,2 cm.", {"Abdominal aortic aneurysm": 0})],
"look-alikes": [
    ("Consolidated fracture of the clavicle.", {"Consolidation": None}), ("Surgical emphysema of the neck.", {"Emphysema": None}),
    ("Retroperitoneal fibrosis.", {"Pulmonary fibrotic sequela": None}), ("Persistent density.", {"Medical material": None}),
    ("Lesion in segment VII, likely a cyst.", {"Hepatic lesion": None, "Hepatic cyst": 1})],
"what implies what": [
    ("Crazy paving.", {"Lung opacity": 1, "Interlobular septal thickening": 1, "Consolidation": None}),
    ("No consolidation.", {"Consolidation": 0, "Lung opacity": None}),
    ("Honeycombing.", {"Pulmonary fibrotic sequela": 1}), ("Lungenmetastasen.", {"Lung nodule": 1})],
"spelling": [
    ("HAEMANGIOMA OF THE LIVER.", {"Hepatic lesion": 1}), ("Leberhamangiom, Leberhaemangiom, Leberhämangiom.", {"Hepatic haemangioma": 1}),
    ("Pleuraerguß links.", {"Pleural effusion": 1}), ("Ground glass, groundglass and ground-glass.", {"Lung opacity": 1}),
    ("Pleu\u00adraerguss.", {"Pleural effusion": 1}), ("Milz vergro\u0308\u00dfert.", {"Splenomegaly": 1}), ("Calibre of the abdominal aorta normal.", {"Abdominal aortic aneurysm": 0})],
}

@pytest.mark.parametrize("rule", RULES)
def test_rules(rule):
    for text, truth in RULES[rule]: assert {n: said(text, n) for n in truth} == truth, text


def test_sentences():
    "A thousand texts in two languages: almost all entirely right, and macro F1 of assertions at least 0.98."
    rows = list(csv.DictReader(open(HERE/"findings_sentences.csv", encoding="utf-8")))
    name = {f.id: f.name for f in FINDINGS.values()}
    wrong, counts = [], {}
    for r in rows:
        yes, no, maybe = ({name[i] for i in r[k].split(";") if i} for k in ("asserted", "denied", "open"))
        labels = label_report(r["text"])
        if any(labels[n] != value for names, value in ((yes, 1), (no, 0), (maybe, -1)) for n in names): wrong.append(r["text"])
        for n in yes | no:
            c = counts.setdefault(n, [0, 0, 0]); c[0] += n in yes and labels[n] == 1; c[1] += n in no and labels[n] == 1; c[2] += n in yes and labels[n] != 1
    assert len(wrong) <= len(rows) // 100, wrong
    assert sum(2 * a / max(2 * a + b + c, 1) for a, b, c in counts.values()) / len(counts) > 0.98


def test_families():
    "Dialects, misspelt words, denials that hedge, sides: texts of families that hospitals produce every day."
    name = {f.id: f.name for f in FINDINGS.values()}
    rows, wrong = list(csv.DictReader(open(HERE/"findings_families.csv", encoding="utf-8"))), []
    for r in rows:
        labels, want = label_report(r["text"]), {name[i]: v for k, v in (("asserted", 1), ("denied", 0), ("open", -1)) for i in r[k].split(";") if i}
        if any(labels[n] != v for n, v in want.items()) or any(v == 1 and n not in want and FINDINGS[n].ct_rate and not any(FINDINGS[n].ct_rate == FINDINGS[w].ct_rate for w in want) for n, v in labels.items()): wrong.append(r["text"])
    assert len(rows) > 150 and len(wrong) <= 0.04 * len(rows), wrong


@pytest.mark.parametrize("word, meant", [("Hepatostetaosis", "hepatosteatosis"), ("brochiectasis", "bronchiectasis"), ("lympadenopathy", "lymphadenopathy"), ("cardiomegally", "cardiomegaly")])
def test_slips_of_the_keys(word, meant): assert {n: v for n, v in label_report(f"There is {word}.").items() if v} == {n: v for n, v in label_report(f"There is {meant}.").items() if v} != {}

@pytest.mark.parametrize("text", ["Patient with confusion.", "Koronale Rekonstruktion, Kalk.", "Biliary dilution.", "The relative with effusive praise."])
def test_words_of_their_own(text): assert not any(v for v in label_report(text).values()), text


def test_phantoms():
    phantoms = pytest.importorskip("ctvlm.phantoms")
    cohort, wrong, all_ = phantoms.PhantomCohort(120, seed=11), 0, 0
    for i in range(len(cohort)):
        labels = label_report(cohort[i].report.text)
        for n, v in cohort[i].labels.items(): wrong += (labels[n] == 1) != (v == 1); all_ += 1
    assert wrong <= 0.002 * all_


@pytest.mark.skipif(not (SHARED/"dev.jsonl").exists(), reason="the development reports are not here")
def test_development_reports():
    out = subprocess.run([sys.executable, SHARED/"score.py", SHARED/"dev.jsonl"], capture_output=True, text=True, check=True, cwd=HERE.parent)
    scores = json.loads(out.stdout)
    assert scores["macro_f1_ct_rate"] >= 0.93 and scores["macro_f1_abdomen"] >= 0.90 and scores["f1_denied"] >= 0.9


# ---------------------------------------------------------------- any text is safe
WORDS = "no kein not nicht effusion Pleuraerguss , . ; : ? ( ) and or und oder with mit liver Leber cyst 12 mm but aber resolved Z.n. INDICATION: \n - enlarged node seen".split(" ")

@settings(max_examples=150, deadline=None)
@given(st.one_of(st.text(max_size=300), st.lists(st.sampled_from(WORDS), max_size=60).map(" ".join)))
def test_any_text(text):
    labels = label_report(text)
    assert set(labels) == set(FINDINGS) and set(labels.values()) <= {-1, 0, 1, None}
    for d in explain_report(text).values():
        assert 0 <= d.span[0] < d.span[1] <= len(text) and (d.cue is None or 0 <= d.cue[0] < d.cue[1] <= len(text))
    colour_report(text)
    assert explain_report(text) == explain_report(text)


@pytest.mark.parametrize("piece", ["a", "no ", "effusion, ", "(", "?", "history:\n", "liver cyst and ", "1. ", "\n", "not seen ", "ä\u0308", "Leber" * 20, "nodule of the lung and liver, "])
def test_time_is_linear(piece):
    def seconds(n):
        text = piece * (n // len(piece)); start = time.process_time(); label_report(text); return time.process_time() - start
    seconds(2000)
    short, long = (min(seconds(n) for _ in range(2)) for n in (10_000, 80_000))
    short = max(short, 2e-3)
    assert long < 40 * short + 0.5


def test_explanations_point_at_words():
    text = "Kein Pleuraerguss. Milz vergrößert."
    d = explain_report(text)
    assert text[slice(*d["Pleural effusion"].span)] == "Pleuraerguss" and text[slice(*d["Pleural effusion"].cue)] == "Kein"
    assert d["Splenomegaly"].rule == "enlarged of spleen" and d["Splenomegaly"].value == 1
    assert "Pleural effusion" in colour_report(text).plain


@pytest.mark.parametrize("snippet, yes", [("5 mm nodule in the lingula", True), ("No change of the cyst", True), ("A thing without a name, without enhancement", True), ("Station 7 node 9 mm", True),
    ("No nodule", False), ("Nodule, no longer visible", False), ("Liver is normal", False), ("Nodule cannot be excluded", False), ("No thing without a name", False), ("Metastasis?", False), ("", False)])
def test_what_a_snippet_asserts(snippet, yes): assert asserts(snippet) == yes


def test_language_is_checked():
    with pytest.raises(InputError, match="'fr'"): label_report("x", "fr")
    assert label_report("Kein Aszites.", "de") == label_report("Kein Aszites.", "en") == label_report("Kein Aszites.")


# ---------------------------------------------------------------- the language model
class Server:
    "`llm_server.py` in a process of its own."
    def __init__(self):
        self.process = subprocess.Popen([sys.executable, HERE/"llm_server.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}"
        self.base_url = self.url + "/v1"
    def moods(self, *moods): urllib.request.urlopen(urllib.request.Request(self.url + "/moods", json.dumps(moods).encode(), method="POST")).read()
    def seen(self): return json.load(urllib.request.urlopen(self.url + "/seen"))

@pytest.fixture(scope="module")
def server():
    s = Server()
    yield s
    s.process.stdin.close(); s.process.wait(5)

THREE = ["Ascites", "Splenomegaly", "Hepatic cyst"]            # of three systems, so three questions a report
REPORT = "Mr Xylophon has splenomegaly. No ascites."
TRUTH = {"Ascites": 0, "Splenomegaly": 1, "Hepatic cyst": None}

def ask(server, text=REPORT, store=None, **options):
    return label_reports([text], "llm", server.base_url, "m", AnswerStore() if store is None else store, THREE, wait=0.01, **options)[0]


@pytest.mark.parametrize("moods", [["429"], ["429-date"], ["500", "500"], ["cut"], ["html"], ["slow"], ["prose"], ["half"], ["wrong"], ["empty"], ["429", "cut", "500", "prose"]])
def test_misbehaviour_is_survived(server, moods):
    server.moods(*moods)
    assert ask(server, f"{REPORT} {moods}", timeout=1, concurrency=1) == TRUTH


def test_retry_after_is_honoured(server):
    server.moods("429")
    start = time.perf_counter(); ask(server, REPORT + " a", concurrency=1)
    assert time.perf_counter() - start >= 0.4


def test_invalid_is_recorded_and_never_guessed(server):
    store = AnswerStore()
    server.moods("prose", "wrong")
    first = ask(server, REPORT + " b", store, concurrency=1)
    assert len(first) == 2 and all(first[n] == TRUTH[n] for n in first)       # one question stays open
    before = sum(server.seen()["seen"].values())
    assert ask(server, REPORT + " b", store, concurrency=1) == first          # nothing is asked twice
    assert sum(server.seen()["seen"].values()) == before and len(store) == 3


def test_errors_hold_no_report(server, caplog):
    caplog.set_level(logging.DEBUG)
    server.moods("401")
    with pytest.raises(InputError) as e: ask(server, concurrency=1)
    assert "401" in str(e.value) and "Xylophon" not in str(e.value) and "\n" not in str(e.value)
    server.moods(*["400"] * 2)
    store = AnswerStore()
    assert len(ask(server, REPORT + " c", store, concurrency=1)) == 1 == len(store)   # two refused: unknown, and not stored
    server.moods(*["500"] * 40)
    with pytest.raises(InputError, match="ten questions in a row") as e:
        label_reports([f"{REPORT} {i}" for i in range(12)], "llm", server.base_url, "m", findings=THREE, wait=0.001, tries=1, concurrency=2)
    assert "Xylophon" not in str(e.value)
    server.moods()
    with pytest.raises(InputError, match="ten questions in a row"):           # nobody listens
        label_reports([REPORT] * 12, "llm", "http://127.0.0.1:9/v1", "m", findings=THREE, wait=0.001, tries=2)
    assert "Xylophon" not in caplog.text


def test_pressure_is_bounded(server):
    "Never more than `concurrency` questions under way, and questions are made as they are needed."
    from ctvlm.findings import _label_questions
    made = [0]
    def questions():
        for i in range(60):
            for q in _label_questions(f"{REPORT} pressure {i}", ["Ascites"]): made[0] += 1; yield q
    model = LanguageModel(server.base_url, "m", concurrency=3, wait=0.01)
    server.moods(*["busy"] * 60)
    for n, value in enumerate(model.ask_all(questions(), AnswerStore(), 60)):
        assert value == {"Ascites": 0} and made[0] <= n + 1 + 2 * 3
    assert n == 59 and server.seen()["most"] <= 16


def test_a_killed_run_goes_on(server, tmp_path):
    "A run killed with SIGKILL goes on where it stopped; only what was under way is asked again."
    path = tmp_path/"answers.sqlite"
    code = f"""
from ctvlm.findings import label_reports
label_reports([f"Splenomegaly. No ascites. killed {{i}}" for i in range(150)], "llm", {server.base_url!r}, "m", {str(path)!r}, ["Ascites"], concurrency=4)"""
    server.moods(*["busy"] * 400)
    p = subprocess.Popen([sys.executable, "-c", code], cwd=HERE.parent)
    for _ in range(600):
        time.sleep(0.05)
        if path.exists() and sum(server.seen()["seen"].values()) > 30: break
    time.sleep(0.3); p.send_signal(signal.SIGKILL); p.wait()
    time.sleep(0.2); server.moods()
    done = len(AnswerStore(path)); before = sum(server.seen()["seen"].values())
    assert 0 < done < 150
    out = label_reports([f"Splenomegaly. No ascites. killed {i}" for i in range(150)], "llm", server.base_url, "m", path, ["Ascites"], concurrency=4)
    assert out == [{"Ascites": 0}] * 150
    assert sum(server.seen()["seen"].values()) - before == 150 - done


def test_rewriting_is_checked(server):
    texts = ["Zyste links 3 mm.", "Nodule right, FALSIFY 3 mm."]
    out = rewrite_reports(texts, "translate", server.base_url, "m", wait=0.01)
    assert out == ["Zyste left 3 mm.", None]                    # the second came back with a 9
    with pytest.raises(InputError, match="haiku"): rewrite_reports(texts, "haiku", server.base_url, "m")


# ---------------------------------------------------------------- tables
@pytest.mark.parametrize("kind", ["csv", "parquet", "xlsx"])
def test_tables(tmp_path, kind):
    import pandas as pd, pyarrow.parquet as pq
    df = pd.DataFrame({"VolumeName": [f"v{i}" for i in range(7)], "Findings_EN": ["No ascites.", "Ascites, \"large\"\nSplenomegaly.", "", "Gallstones.", "ok", "Aszites.", "No ascites."], "Impressions_EN": ["", "", "", "No ascites.", "", "", ""]})
    path = tmp_path/f"r.{kind}"
    {"csv": lambda: df.to_csv(path, index=False), "parquet": lambda: df.to_parquet(path), "xlsx": lambda: df.to_excel(path, index=False)}[kind]()
    summary = label_table(path, tmp_path/"out.parquet", rows=3, workers=1)
    out = pd.read_parquet(tmp_path/"out.parquet")
    assert summary["reports"] == 7 and len(out) == 7 and list(out.VolumeName) == list(df.VolumeName) and "Findings_EN" not in out
    assert out["Ascites"].fillna(-1).astype(int).tolist() == [0, 1, -1, 0, -1, 1, 0] and summary["asserted"]["Ascites"] == 2 and summary["denied"]["Ascites"] == 3
    assert b"rules" in pq.read_schema(tmp_path/"out.parquet").metadata[b"label_version"]


def test_tables_by_language_model(server, tmp_path):
    import pandas as pd
    pd.DataFrame({"id": [1, 2], "report": ["No ascites.", "Ascites of unknown cause."]}).to_csv(tmp_path/"r.csv", index=False)
    server.moods("prose", "prose")
    options = dict(engine="llm", findings=["Ascites"], base_url=server.base_url, model="m", store=tmp_path/"s.sqlite", wait=0.01, concurrency=1)
    for _ in range(2):                                          # the second time from the store
        summary = label_table(tmp_path/"r.csv", tmp_path/"out.parquet", **options)
        out = pd.read_parquet(tmp_path/"out.parquet")
        assert summary["unanswered"] == 1 and summary["asserted"] == {"Ascites": 1} and [list(u) for u in out.unanswered] == [["Ascites"], []]


def test_bad_tables(tmp_path):
    (tmp_path/"a.csv").write_text("x,y\n1,2\n"); (tmp_path/"b.csv").write_bytes(b"report\n\xff\xfe\n"); (tmp_path/"c.parquet").write_bytes(b"nonsense"); (tmp_path/"d.csv").write_text("report\n"); (tmp_path/"e.pdf").write_text("")
    for name, message in [("a.csv", "the columns x, y"), ("b.csv", "not UTF-8"), ("c.parquet", "cannot be read"), ("d.csv", "found no row"), ("e.pdf", ".pdf"), ("f.csv", "found no file")]:
        with pytest.raises(InputError, match=message): label_table(tmp_path/name, tmp_path/"out.parquet", workers=1)
    assert not (tmp_path/"out.parquet").exists()


def test_processes_agree():
    texts = [f"No ascites. Nodule {i} mm." for i in range(250)]
    assert label_reports(texts, workers=2, findings=["Ascites", "Lung nodule"]) == label_reports(texts, findings=["Ascites", "Lung nodule"])


@pytest.mark.skipif(not os.environ.get("CTVLM_SERVE"), reason="takes half a minute, and pip install transformers[serving]: set CTVLM_SERVE=1")
def test_transformers_serve(tmp_path):
    "The protocol against `transformers serve` with a tiny random model: its answers are nonsense, and are recorded as invalid."
    pytest.importorskip("fastapi"); pytest.importorskip("uvicorn")
    import socket, torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
    t = Tokenizer(models.BPE()); t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False); t.decoder = decoders.ByteLevel()
    t.train_from_iterator(["present absent"], trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=t, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    tokenizer.save_pretrained(tmp_path)
    Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=4096)).save_pretrained(tmp_path)
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", str(tmp_path), "--host", "127.0.0.1", "--port", str(port)]
    p = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    try:
        for _ in range(120):
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/health").read(); break
            except OSError: time.sleep(0.5)
        else: pytest.skip("transformers serve did not start within a minute")
        store = AnswerStore()
        assert label_reports(["No ascites."], "llm", f"http://127.0.0.1:{port}/v1", str(tmp_path), store, ["Ascites"], max_tokens=8, tries=2) == [{}]
        assert len(store) == 1
    finally: p.terminate(); p.wait(10)
