import io, json, re, shutil, subprocess, time
from html.parser import HTMLParser
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image
from ctvlm import viewer
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
    return {"format": "ctvlm-result-1", "protocol": {"split": "test"}, "retrieval": evaluate_retrieval(e, resamples=100), "localization": evaluate_localization(e, training=snippets, resamples=100),
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
    assert at("sagittal", 0.85, 0.5) == 255                                      # front is right


def test_lines_stand_at_their_depth(scan):
    planes, answer = Planes(scan), answer_at(1200, scan)
    x, _, w, h = planes.boxes["coronal"]
    rgb = np.asarray(Image.open(io.BytesIO(planes.draw(30, 25, scan.slice_at(1200), "lung", answer, 1100.))).convert("RGB"))
    green = np.flatnonzero((rgb[:, x + w // 2] == (2, 158, 115)).all(1))
    orange = np.flatnonzero((rgb[:, x:x + w] == (222, 143, 5)).all(2).any(1))
    to_mm = lambda row: scan.depths_mm[-1] + 4 - (row + 0.5) / h * 320
    assert abs(to_mm(green.mean()) - 1200) < 5 and abs(to_mm(orange.mean()) - 1100) < 2
    assert planes.at(0.999, 0.0)[0] == "sagittal" and planes.at((planes.boxes["axial"][2] + 1) / planes.width, 0.5) is None


def test_a_wheel_step_is_fast():
    volume = CTVolume(np.random.default_rng(0).integers(-200, 300, size=(512, 512, 300), dtype=np.int16).astype(np.float32), np.diag([0.7, 0.7, 1.2, 1.]))
    planes = Planes(volume)
    planes.draw(256, 256, 150)
    times = []
    for k in range(100, 115):
        start = time.perf_counter()
        planes.draw(256, 256, k, answer=answer_at(100, volume))
        times.append(time.perf_counter() - start)
    assert min(times) < 0.06                                                     # the quickest: other processes may be running


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
                 [{"answer": answer_at(1200, scan, 'Nodule <script>alert("x")</script>'), "volume": scan, "reference_mm": 1190.}, (answer_at(1100, scan), scan, None)], title="Demo", notes=["Phantoms only."])
    text = (tmp_path / "report.html").read_text()
    page = Page(); page.feed(text)
    assert not page.open and [t for t, _ in page.tags].count("html") == 1
    images = [a for t, a in page.tags if t == "img"]
    assert len(images) >= 10 and all(a["src"].startswith("data:image/png;base64,") and len(a["alt"]) > 20 for a in images)
    assert not any(t in ("script", "link", "iframe") for t, _ in page.tags) and "http" not in text and "url(" not in text
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text and "max-width: 100%" in text and "overflow-x: auto" in text
    for word in ("Demo", "Phantoms only.", "text-only prior", "Effusion &amp; more", "precision", "seconds", "predicted 1200 mm, the radiologist cited 1190 mm, 10 mm away"): assert word in text
    assert len(text) < 4 * 2**20


def test_report_of_little(tmp_path):
    write_report(tmp_path / "a.html", {"seconds": 3.0, "retrieval": {d: {"r1": 0.5, "r5": 0.6, "r10": 0.7, "n": 10} for d in ("text_to_image", "image_to_text")},
                                       "classification": {"mean_auroc": 0.8, "per_class": {"Nodule": 0.8}}, "localization": {"mae_mm": 30., "middle_mm": 90., "n_snippets": 4, "n_patients": 2}})
    assert (tmp_path / "a.html").read_text().count("<table>") == 4


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


def test_pressing_a_sentence_jumps(reader, scan):
    before = reader.picture.png
    press(reader, 0)
    assert reader.slider.value == reader.position[2] == scan.slice_at(1200) and reader.picture.png != before
    assert "predicted 1200 mm, interval 1170 to 1230 mm" in reader.status.value and "not for diagnosis" in reader.status.value
    press(reader, 1)
    press(reader, 0)
    press(reader, 0)
    assert reader.model.calls == 2                                               # answers are kept


def test_wheel_slider_window_and_click(reader, scan):
    press(reader, 0)
    k = reader.position[2]
    reader.picture.steps -= 4
    assert reader.position[2] == reader.slider.value == k - 4
    reader.picture.steps += 1000
    assert reader.position[2] == 39                                              # the end of the scan, no further
    reader.slider.value = 7
    assert reader.position[2] == 7 and f"z = {scan.depths_mm[7]:.0f} mm, image {scan.image_numbers[7]}" in reader.status.value
    png = reader.picture.png
    reader.window.value = "bone"
    assert reader.picture.png != png and "bone window" in reader.picture.alt
    x, y, w, h = reader.planes.boxes["coronal"]
    reader.picture.clicked = [(x + w / 4) / reader.planes.width, (h / 2) / reader.planes.height, 1]
    assert reader.position[0] in (44, 45) and abs(reader.position[2] - 20) <= 1
    reader.picture.clicked = [1.0, 1.0, 2]                                       # nothing there


def test_a_free_sentence(reader, scan):
    reader.free.value = "  where is   the liver? "
    assert reader.position[2] == scan.slice_at(1050) and "where is the liver?" in reader.status.value
    calls = reader.model.calls
    reader.free.value = " "
    assert reader.model.calls == calls


def test_report_with_references(scan):
    pytest.importorskip("anywidget")
    pytest.importorskip("ctvlm.mining")
    reader = explore(scan, REPORT, Model(), series=3)
    assert "".join(s["text"] for s in reader.sentences) == REPORT
    assert all("".join(p for p, _ in s["pieces"]) == s["text"] for s in reader.sentences)
    nodule = next(i for i, s in enumerate(reader.sentences) if "nodule" in s["text"])
    kinds = {k for _, k in reader.sentences[nodule]["pieces"]}
    assert {"reference", "asserted"} <= kinds and "image" not in reader.sentences[nodule]["query"]
    press(reader, nodule)
    depth = float(scan.depths_mm[np.flatnonzero(scan.image_numbers == 15)[0]])
    assert reader.reference_mm == depth and f"the radiologist cited {depth:.0f} mm" in reader.status.value
    assert not next(s for s in reader.sentences if s["text"].strip() == "Findings:")["query"]
    other = explore(scan, REPORT, Model(), series=5)
    assert all(s["reference_mm"] is None for s in other.sentences)


def test_marked_pieces():
    assert viewer._marked("a nodule (4/38).", [(2, 8, "asserted"), (10, 14, "reference"), (0, 16, "denied")]) == [
        ["a ", "denied"], ["nodule", "asserted"], [" (", "denied"], ["4/38", "reference"], [").", "denied"]]


SCRIPT = """
class El { constructor() { this.children = []; this.style = {}; this.l = {}; this.attrs = {} }
  addEventListener(n, f) { this.l[n] = f } appendChild(c) { this.children.push(c) } replaceChildren(...c) { this.children = c }
  setAttribute(k, v) { this.attrs[k] = v } hasAttribute(k) { return k in this.attrs } getBoundingClientRect() { return { left: 10, top: 20, width: 100, height: 50 } } }
globalThis.document = { createElement: () => new El() }; URL.createObjectURL = () => "blob:1"; URL.revokeObjectURL = () => {};
const Model = d => { const h = {}; return { get: k => d[k], set: (k, v) => { d[k] = v }, save_changes() {}, on: (e, f) => { h[e] = f }, fire: e => h[e](), d } };
const load = async s => (await import("data:text/javascript," + encodeURIComponent(s))).default, out = [], ev = o => ({ preventDefault() {}, ...o });
let m = Model({ png: new DataView(new ArrayBuffer(8)), alt: "", steps: 0, clicked: [] }), el = new El();
(await load(SOURCES[0])).render({ model: m, el }); let x = el.children[0];
for (const d of [5, 5, 5]) x.l.wheel(ev({ deltaY: d })); out.push(m.d.steps); m.fire("change:png"); out.push(m.d.steps); m.fire("change:png");
x.l.keydown(ev({ key: "PageUp" })); out.push(m.d.steps); x.l.click(ev({ clientX: 60, clientY: 45 })); out.push(...m.d.clicked.slice(0, 2));
m = Model({ sentences: [{ pieces: [["A ", ""], ["nodule", "asserted"]], query: "q" }, { pieces: [["Findings:", ""]], query: "" }], chosen: -1, presses: 0 }); el = new El();
(await load(SOURCES[1])).render({ model: m, el }); x = el.children[0].children;
out.push(x[1].hasAttribute("role")); x[0].l.keydown(ev({ key: "Enter" })); m.fire("change:chosen"); out.push(m.d.chosen, m.d.presses, x[0].attrs["aria-pressed"]);
console.log(JSON.stringify(out)); process.exit(0);
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_scripts_of_the_widgets(tmp_path):
    (tmp_path / "run.mjs").write_text(f"const SOURCES = {json.dumps([viewer._IMAGE_JS, viewer._REPORT_JS])};" + SCRIPT)
    done = subprocess.run(["node", tmp_path / "run.mjs"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [-1, -3, 7, 0.5, 0.5, False, 0, 1, "true"]  # one step at once, two more when the picture came


# ---------------------------------------------------------------- and in a real one

NOTEBOOK = """
from types import SimpleNamespace
import numpy as np
from ctvlm.core import CTVolume
from ctvlm.viewer import explore
array = np.random.default_rng(0).integers(-200, 300, size=(128, 128, 80)).astype(np.float32)
scan = CTVolume(array, np.diag([3., 3, 5, 1]))
bins = np.arange(6, 400, 12.)
class Model:
    def localize(self, volume, texts): return [SimpleNamespace(text=t, depth_mm=300., image_number=None, interval_mm=(280., 320.), bin_depths_mm=bins, probabilities=np.ones(len(bins)) / len(bins)) for t in texts]
explore(scan, ["Nodule in the lung."], Model())
"""


@pytest.mark.skipif(not (shutil.which("chromium") and shutil.which("jupyter-lab")), reason="needs Chromium and JupyterLab")
def test_in_a_real_browser(tmp_path):
    pytest.importorskip("anywidget")
    playwright = pytest.importorskip("playwright.sync_api")
    import nbformat, os, sys
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(NOTEBOOK.strip())], metadata={"kernelspec": {"name": "python3", "display_name": "python3"}})
    nbformat.write(nb, tmp_path / "view.ipynb")
    log = open(tmp_path / "server.log", "w+")
    server = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0", "--IdentityProvider.token=t", f"--ServerApp.root_dir={tmp_path}"], stdout=log, stderr=log,
                              env=os.environ | {"JUPYTER_CONFIG_DIR": str(tmp_path / "config"), "JUPYTER_DATA_DIR": str(tmp_path / "data")})
    try:
        for _ in range(300):
            port = re.search(r"http://127\.0\.0\.1:(\d+)/lab", (tmp_path / "server.log").read_text())
            if port: break
            time.sleep(0.1)
        with playwright.sync_playwright() as p:
            page = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"]).new_page(viewport={"width": 1400, "height": 900})
            page.goto(f"http://127.0.0.1:{port[1]}/lab/tree/view.ipynb?token=t")
            page.locator(".jp-Cell .cm-content").first.click(timeout=60_000)
            page.wait_for_timeout(1500)
            page.keyboard.press("Shift+Enter")
            image, status = page.locator(".jp-OutputArea img"), page.locator(".widget-html-content", has_text="z =")
            image.wait_for(timeout=60_000)
            page.wait_for_function("() => [...document.querySelectorAll('.jp-OutputArea img')].some(i => i.naturalWidth > 500)")
            assert "z = 200 mm" in status.inner_text()
            image.hover()
            page.mouse.wheel(0, 100)                                             # towards the feet
            page.get_by_text("z = 195 mm").wait_for(timeout=5000)
            page.get_by_role("button", name="Nodule in the lung.").click()
            page.get_by_text("predicted 300 mm").wait_for(timeout=5000)
            assert "z = 300 mm" in status.inner_text() and "predicted depth 300 mm" in image.get_attribute("alt")
            page.keyboard.press("Tab")
            page.screenshot(path=tmp_path / "viewer.png")
    finally:
        server.terminate()
        server.wait(20)
