import io, time
from html.parser import HTMLParser
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image
from ctvlm import viewer
from ctvlm.reader import _marked
from ctvlm.core import CTVolume, InputError
from ctvlm.evaluation import evaluate_classification, evaluate_localization, evaluate_retrieval, Embedded, worst_cases
from ctvlm.viewer import *


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def scan(): # a body in which every slice is different; image numbers from the head down
    array = np.full((60, 50, 40), -1000, np.float32)
    array[5:55, 5:45] = 40
    for k in range(40): array[10:10 + k, 20:30, k] = 300
    affine = np.diag([5., 5, 8, 1]); affine[:3, 3] = -150, -125, 1000
    return CTVolume(array, affine, image_numbers=np.arange(40, 0, -1), name="blocks")


def answer_at(mm, volume, text="Nodule."):
    bins = np.arange(volume.depths_mm[0], volume.depths_mm[-1], 12.)
    p = np.exp(-0.5 * ((bins - mm) / 20) ** 2)
    return SimpleNamespace(text=text, depth_mm=float(mm), image_number=volume.image_number_at(mm), interval_mm=(mm - 30, mm + 30),
                           bin_depths_mm=np.r_[bins, np.nan], probabilities=np.r_[p / p.sum(), 0], scan=volume.name)


class Model: # knows where three words are
    config, calls = SimpleNamespace(trained_on="nothing: a stand-in"), 0
    where = {"nodule": 1200., "liver": 1050., "apex": 1300.}
    def localize(self, volume, texts):
        self.calls += 1
        return [answer_at(next((d for w, d in self.where.items() if w in t.lower()), 1100.), volume, t) for t in texts]


@pytest.fixture(scope="module")
def result():
    rng = np.random.default_rng(0)
    n, S = 40, 120
    bins = np.stack([12. * np.arange(30)] * S)
    truth, who = rng.uniform(20, 340, S), rng.integers(n, size=S)
    study = [f"s{i}" for i in range(n)]
    snippets = pd.DataFrame({"scan": who, "snippet": [("cyst of the liver", "nodule in the upper lobe", "something <b>odd</b>")[i % 3] for i in range(S)], "depth_mm": truth, "low_mm": -6., "high_mm": 354.,
                             "study": [study[i] for i in who], "patient": [study[i] for i in who]})
    text = rng.normal(size=(n, 8))
    e = Embedded(study, study, text + rng.normal(size=(n, 8)), text, text, rng.integers(2, size=(n, 2)), snippets, np.exp(-0.5 * ((bins - truth[:, None] - rng.normal(0, 15, (S, 1))) / 30) ** 2), bins)
    return {"format": "ctvlm-result-2", "protocol": {"split": "test"}, "retrieval": evaluate_retrieval(e, resamples=100), "localization": evaluate_localization(e, training=snippets, resamples=100),
            "classification": evaluate_classification(e, rng.normal(size=(n, 2)) + e.labels, ["Nodule", "Effusion & more"], resamples=100)}


# ---------------------------------------------------------------- pictures

def test_planes_lie_as_radiologists_see_them(scan):
    array = scan.array.copy()
    array[50:, :, :] = 2000                                                     # to the patient's right
    array[:, 45:, :] = -1000
    array[:, :, 35:] = -1000                                                    # above the head
    array[:, 40:45, :] = 2000                                                   # front
    planes = Planes(CTVolume(array, scan.affine))
    image = np.asarray(Image.open(io.BytesIO(planes.draw(20, 20, 20))).convert("L")).astype(int)
    def at(name, u, v):
        x, y, w, h = planes.boxes[name]
        return image[y + int(v * h), x + int(u * w)]
    assert at("axial", 0.05, 0.5) == 255 and at("axial", 0.97, 0.6) < 20         # the patient's right is on the left
    assert at("axial", 0.5, 0.14) == 255 and at("axial", 0.5, 0.96) < 20         # front is up
    assert at("coronal", 0.05, 0.05) < 20 and at("coronal", 0.05, 0.9) == 255    # head is up
    assert at("sagittal", 0.15, 0.5) == 255 and at("sagittal", 0.97, 0.5) < 20   # front is left


def test_a_window_goes_from_black_to_white():
    from ctvlm.core import HU_WINDOWS
    from ctvlm.pictures import _gray
    for name, (centre, width) in HU_WINDOWS.items():
        low, high = centre - width / 2, centre + width / 2
        gray = _gray(np.array([low - 50., low, centre, high, high + 50.]), name).astype(int)
        assert np.abs(gray - (0, 0, 127.5, 255, 255)).max() <= 1, name   # what is cut to a byte may lose one


def test_lines_stand_at_their_depth(scan):
    planes, answer = Planes(scan), answer_at(1200, scan)
    x, _, w, h = planes.boxes["coronal"]
    rgb = np.asarray(Image.open(io.BytesIO(planes.draw(30, 25, scan.slice_at(1260), "lung", answer, 1100.))).convert("RGB"))
    blue = np.flatnonzero((rgb[:, x + w // 3] == (86, 180, 233)).all(1))
    green = np.flatnonzero((rgb[:, x + w // 2] == (2, 158, 115)).all(1))
    orange = np.flatnonzero((rgb[:, x:x + w] == (222, 143, 5)).all(2).any(1))
    to_mm = lambda row: scan.depths_mm[-1] + 4 - (row + 0.5) / h * 320
    assert abs(to_mm(green.mean()) - 1200) < 2 and abs(to_mm(orange.mean()) - 1100) < 2 and abs(to_mm(blue.mean()) - scan.depths_mm[scan.slice_at(1260)]) < 2
    dashes = (rgb[orange[0], x:x + w] == (222, 143, 5)).all(1)
    assert (len(blue), len(green)) == (1, 3) and 0.4 < dashes.mean() < 0.7          # thin, thick, dashed: told apart without colour
    assert [kind for _, kind, _ in planes.labels(answer, 1100.)] == ["predicted", "cited"] and len(planes.labels(answer, 1201.)) == 1


def test_only_what_changed_is_read_anew(scan):
    planes = Planes(scan)
    planes.draw(30, 25, 10)
    kept = {name: planes.kept[name][1] for name in ("axial", "coronal", "sagittal")}
    planes.draw(30, 25, 11)
    assert [planes.kept[name][1] is kept[name] for name in kept] == [False, True, True]


def test_a_wheel_step_is_fast():
    volume = CTVolume(np.random.default_rng(0).integers(-200, 300, size=(512, 512, 300), dtype=np.int16).astype(np.float32), np.diag([0.7, 0.7, 1.2, 1.]))
    planes = Planes(volume)
    planes.draw(256, 256, 150)
    times = []
    for k in range(100, 115):
        start = time.process_time()                                              # of the processor: other processes may be running
        planes.draw(256, 256, k, answer=answer_at(100, volume))
        times.append(time.process_time() - start)
    assert np.median(times) < 0.06


def test_localization_figure(scan):
    fig = localization_figure(answer_at(1200, scan), scan, reference_mm=1180.)
    axial, coronal = fig.axes
    (curve,) = coronal.child_axes
    assert "image 15" in axial.get_title()
    lines = sorted(line.get_ydata()[0] for line in coronal.lines)
    assert lines == [1180, 1200] and coronal.get_ylim() == curve.get_ylim()
    fig.canvas.draw()
    boxes = [ax.get_window_extent() for ax in (coronal, curve)]
    assert abs(boxes[0].y0 - boxes[1].y0) < 1 and abs(boxes[0].y1 - boxes[1].y1) < 1  # a depth is one height in both
    localization_figure(SimpleNamespace(**{**vars(answer_at(1200, scan)), "interval_mm": None, "image_number": None}), scan).savefig(io.BytesIO())
    with pytest.raises(InputError, match="brain"): localization_figure(answer_at(1200, scan), scan, window="brain")


def test_plots_accept_results(result, scan):
    for plot, part in ((plot_recall, "retrieval"), (plot_roc, "classification"), (plot_auc, "classification"), (plot_depths, "localization"), (plot_baselines, "localization"), (plot_reliability, "localization")):
        getattr(plot(result[part]), "figure").savefig(io.BytesIO())
    fig = draw_cases(worst_cases(result["localization"], 7), lambda study: scan)
    assert sum(ax.has_data() for ax in fig.axes) == 7
    with pytest.raises(InputError, match="no groups by 'age'"):
        from ctvlm.evaluation import error_analysis
        plot_errors(error_analysis(result["localization"], resamples=10), by="age")


# ---------------------------------------------------------------- the page

class Page(HTMLParser):
    void = {"meta", "img", "br", "link"}
    def __init__(self): super().__init__(); self.open, self.tags, self.links = [], [], []
    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void: self.open.append(tag)
    def handle_endtag(self, tag): assert self.open.pop() == tag


def test_report_is_one_whole_file(result, scan, tmp_path):
    history = pd.DataFrame({"step": range(30), "siglip": np.linspace(3, 1, 30), "localization": 2., "disease": 1.})
    write_report(tmp_path / "report.html", result | {"mining": {"precision": 0.99, "recall": 0.97}, "seconds": 12.5, "peak_memory_mb": 900}, history,
                 [{"answer": answer_at(1200, scan, 'Nodule <script>alert("x")</script>'), "volume": scan, "reference_mm": 1190.}, (answer_at(1100, scan), scan, None)], title="Demo", notes=["Phantoms only."], made="2026-01-02, ctvlm 0")
    text = (tmp_path / "report.html").read_text()
    page = Page(); page.feed(text)
    assert not page.open and [t for t, _ in page.tags].count("html") == 1
    images = [a for t, a in page.tags if t == "img"]
    assert len(images) >= 10 and all(a["src"].startswith("data:image/png;base64,") and len(a["alt"]) > 20 for a in images)
    assert not any(t in ("script", "link", "iframe") for t, _ in page.tags) and "http" not in text and "url(" not in text
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text and "max-width: 100%" in text and "overflow-x: auto" in text
    for word in ("Demo", "Phantoms only.", "text-only prior", "Effusion &amp; more", "precision", "duration, s", "peak memory, MB", "2026-01-02, ctvlm", 'href="#part-3"', 'id="part-3"', "predicted 1200 mm, image 15, the radiologist cited 1190 mm, 10 mm away"): assert word in text
    assert len(text) < 4 * 2**20


def test_report_of_little(tmp_path):
    write_report(tmp_path / "a.html", {"seconds": 3.0, "retrieval": {d: {"r1": 0.5, "r5": 0.6, "r10": 0.7, "n": 10} for d in ("text_to_image", "image_to_text")},
                                       "classification": {"mean_auroc": 0.8, "per_class": {"Nodule": 0.8}}, "localization": {"mae_mm": 30., "middle_mm": 90., "n_snippets": 4, "n_patients": 2}})
    assert (tmp_path / "a.html").read_text().count("<table>") == 5                              # the summary, a part each, further numbers


# ---------------------------------------------------------------- the reader, without a browser

REPORT = """Findings:
There is a 12 mm nodule in the right lung (series 3, image 15). No pleural effusion.
Unchanged cyst of the liver (series 3, image 34; prior exam series 2, image 9).
Impression:
Nodule."""


@pytest.fixture
def reader(scan):
    pytest.importorskip("anywidget")
    return explore(scan, ["Nodule in the lung.", "Lesion of the liver."], Model())


def press(reader, i):
    reader.report.chosen = i
    reader.report.presses += 1


def said(reader): return " | ".join(words for _, words in reader.report.said)


def test_pressing_a_sentence_jumps(reader, scan):
    before, drawn = reader.picture.png, reader.picture.drawn
    press(reader, 0)
    assert reader.at[2] == scan.slice_at(1200) and reader.picture.png != before and reader.picture.drawn == drawn + 1
    assert "predicted 1200 mm, image 15, interval 1170 to 1230 mm" in said(reader) and "not for diagnosis" in said(reader)
    press(reader, 1)
    press(reader, 0)
    press(reader, 0)
    assert reader.model.calls == 2 and not reader.report.busy                    # answers are kept


def test_wheel_window_and_click(reader, scan):
    press(reader, 0)
    k = reader.at[2]
    reader.picture.steps = [0, 0, -4]
    assert reader.at[2] == k - 4
    reader.picture.steps = [2, -3, -4]
    assert reader.at == [32, 22, k - 4]
    reader.picture.steps = [2, -3, 1000]
    assert reader.at[2] == 39                                                    # the end of the scan, no further
    reader.move(k=7)
    assert reader.picture.texts[2] == f"z = {scan.depths_mm[7]:.0f} mm, image {scan.image_numbers[7]}"
    png = reader.picture.png
    reader.picture.window = "bone"
    assert reader.picture.png != png and "bone window" in reader.picture.alt
    for name, u, v, at in (("coronal", 0.25, 0.5, [45, 22, 20]), ("axial", 0.5, 0.1, [30, 45, 20]), ("sagittal", 0.0, 0.0, [30, 49, 39]), ("posterior", 0.3, 1.0, [30, 49, 0])):
        reader.picture.clicked = [name, u, v, time.time()]
        assert all(abs(a - b) <= 1 for a, b in zip(reader.at, at)), (name, reader.at)


def test_every_event_is_answered(reader):
    drawn = reader.picture.drawn
    reader.picture.steps = [0, 0, 1000]
    reader.picture.steps = [0, 0, 1001]                                          # at the end already: the browser waits for an answer all the same
    assert reader.picture.drawn == drawn + 2


def ask(reader, text):
    reader.report.asked = text
    press(reader, -1)


def test_a_free_sentence(reader, scan):
    ask(reader, "  where is   the liver? ")
    assert reader.at[2] == scan.slice_at(1050) and "where is the liver?" in said(reader)
    calls = reader.model.calls
    ask(reader, " ")
    assert reader.model.calls == calls


def test_what_the_model_refuses_is_said(reader, monkeypatch):
    def refuse(volume, texts): raise InputError("this model has no tokenizer: give it one")
    monkeypatch.setattr(reader.model, "localize", refuse)
    at = list(reader.at)
    ask(reader, "liver")
    assert said(reader) == "this model has no tokenizer: give it one" and reader.at == at and not reader.report.busy


def test_reading_a_scan_tells_how_far_it_is(scan):
    torch, told = pytest.importorskip("torch"), []
    class Encoder(Model):
        def encode_windows(self, windows, chunk=None): return windows.sum((1, 2)), windows
        def embed(self, volume): return self.encode_windows(torch.ones(5, 2, 3), 2)
        def localize(self, embedded, texts): return super().localize(scan, texts)
    reader = explore(scan, ["Nodule in the lung."], Encoder())
    reader.report.observe(lambda e: told.append(e["new"][0][1]), "said")
    press(reader, 0)
    assert told[0] == "Reading the scan, once: 0 of 3 pieces done" and "2 of 3 pieces done" in told[2] and "s left" in told[2]
    assert reader.embedded[0].tolist() == [6.0] * 5 and reader.embedded[1].shape == (5, 2, 3) and "encode_windows" not in vars(reader.model)


def test_no_report(scan):
    assert explore(scan, " \n", Model()).sentences == []


def test_report_with_references(scan):
    pytest.importorskip("anywidget")
    pytest.importorskip("ctvlm.mining")
    reader = explore(scan, REPORT, Model(), series=3)
    assert "".join(s["text"] for s in reader.sentences) == REPORT
    assert all("".join(p[0] for p in s["pieces"]) == s["text"] for s in reader.sentences)
    nodule = next(i for i, s in enumerate(reader.sentences) if "nodule" in s["text"])
    kinds = {p[1] for p in reader.sentences[nodule]["pieces"]}
    assert {"reference", "asserted"} <= kinds and "image" not in reader.sentences[nodule]["query"]
    press(reader, nodule)
    depth = float(scan.depths_mm[np.flatnonzero(scan.image_numbers == 15)[0]])
    assert reader.reference_mm == depth and f"the radiologist cited {depth:.0f} mm" in said(reader)
    assert not next(s for s in reader.sentences if s["text"].strip() == "Findings:")["query"]
    other = explore(scan, REPORT, Model(), series=5)
    assert all(s["reference_mm"] is None for s in other.sentences)


def test_marked_pieces():
    assert _marked("a nodule (4/38).", [(2, 8, "asserted"), (10, 14, "reference"), (0, 16, "denied")]) == [
        ["a ", "denied"], ["nodule", "asserted"], [" (", "denied"], ["4/38", "reference"], [").", "denied"]]


def test_citations_of_other_series_lie_where_their_own_series_says(tmp_path):
    "An image number of series 5 was looked up in whatever series was open."
    from ctvlm.phantoms import PhantomCohort
    from ctvlm.preprocessing import load_volume
    patient = PhantomCohort(8, seed=0, spacing=(6., 6., None), languages=("en",))[6]
    folder = patient.write_dicom(tmp_path / "scan")
    true = {(r.series, r.image): r.depth_mm for r in patient.report.references if r.depth_mm is not None and r.image_end is None}
    (series, image), depth = next(iter(true.items()))
    other = next(s.number for s in patient.scan.series if s.number != series and s.plane == "axial")
    report = f"Nodule in the right lung (series {series}, image {image}). Cyst (series 99, image 3)."
    for opened in (series, other):
        [nodule, cyst] = explore(folder, report, Model(), series=opened).sentences
        assert abs(nodule["reference_mm"] - depth) < 0.1, opened
        assert cyst["reference_mm"] is None and "series 99" in cyst["references"][0]["said"] and any(p[1] == "unresolved" for p in cyst["pieces"])
    [nodule, _] = report_sentences(report, load_volume(folder, other))                     # no folder to look in
    assert nodule["reference_mm"] is None and "not open here" in nodule["references"][0]["said"]


def test_every_reference_of_a_sentence_can_be_asked(scan):
    reader = explore(scan, "Nodules in the lung (series 3, image 15) and the liver (series 3, images 30 to 34).", Model(), series=3)
    [sentence] = reader.sentences
    assert len(sentence["references"]) == 2
    reader.report.reference = 1
    press(reader, 0)
    middle = np.mean([scan.depths_mm[list(scan.image_numbers).index(n)] for n in (30, 34)])  # of a range
    assert reader.reference_mm == pytest.approx(middle) and "middle of the range" in sentence["references"][1]["said"]


def test_the_window_follows_the_question_until_somebody_chooses(reader):
    press(reader, 0)
    assert reader.picture.window == "lung"
    press(reader, 1)
    assert reader.picture.window == "soft tissue"
    reader.picture.windowed = "-500/1200"
    press(reader, 0)
    assert reader.picture.window == "-500/1200" and "-500/1200 window" in reader.picture.alt
    reader.picture.windowed = "wide"
    assert "no window is called 'wide'" in said(reader) and reader.picture.window == "-500/1200"
    assert window_for("Fracture of the 5th rib") == "bone" and window_for("emphysema") == "lung" and window_for("cyst of the liver") == "soft tissue"


def test_the_value_under_the_pointer(reader, scan):
    reader.picture.pointed = ["axial", 0.5, 0.5, 0.]
    i, j, k = reader.place("axial", 0.5, 0.5)
    assert reader.picture.probed.startswith(f"{scan.array[i, j, k]:.0f} HU at ")
    reader.picture.pointed = ["", 0, 0, 1.]
    assert reader.picture.probed == ""


def test_doubt_is_shown_in_reader_and_picture(scan):
    model = Model()
    model.localize = lambda volume, texts: [SimpleNamespace(**vars(answer_at(1200, scan, t)), abstains=True) for t in texts]
    reader = explore(scan, ["Banana."], model)
    assert reader.picture.labels == [[0.5, "invite", "click a sentence of the report"]]      # an empty posterior invites
    press(reader, 0)
    assert "not in this scan, best guess 1200 mm" in said(reader) and "not in this scan" in reader.picture.alt and reader.picture.labels[0][2].startswith("not here?")
    figure = localization_figure(model.localize(scan, ["costs $a^$ and \\frac{"]) * 2, scan, notes="a $ and \\sum_")
    figure.savefig(io.BytesIO())
    assert len(figure.subfigs) == 2 and all("not in this scan" in f.get_suptitle() for f in figure.subfigs)
    assert {t.get_text() for t in figure.subfigs[0].axes[0].texts} == set("RLAP")


def test_organs_have_colours_of_their_own(result):
    from matplotlib.colors import to_hex
    ax = plot_depths(result["localization"])
    colours = [to_hex(c.get_facecolor()[0], keep_alpha=False) for c in ax.collections]
    assert len(set(colours)) == len(colours)
    other = [c for c in ax.collections if c.get_label().startswith("other")]
    assert all(c.get_zorder() < 2 for c in other)
