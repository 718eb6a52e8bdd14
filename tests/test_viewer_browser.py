"The reader in a real browser: its two widgets alone, in JupyterLab, and as the page of `ctvlm view`. Screenshots stay in pytest's temporary folder."
import base64, json, os, re, shutil, signal, subprocess, sys, tempfile, time, urllib.error, urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil, pytest

LONG = 120_000                                                                   # ms: a server and a kernel that start beside other tests


@pytest.fixture
def open_page(browser):
    "(address, width, height) -> a page; its scripts must raise no error, where they are ours."
    pages, errors = [], []
    def opened(url, width=1400, height=900, ours=True):
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(LONG)
        if ours: page.on("pageerror", lambda e: errors.append(f"{e.message} {e.stack}"))
        page.on("request", lambda r: page.requests.append(r.url))
        page.requests = []
        pages.append(page)
        page.goto(url, wait_until="commit")
        return page
    yield opened
    for page in pages: page.close()
    assert not errors, errors


def focused(page): return page.evaluate("[document.activeElement.tagName, document.activeElement.getAttribute('aria-label') || document.activeElement.textContent || document.activeElement.value]")
def pixels(page, name): return page.evaluate(f"document.querySelector('figure.{name} canvas').toDataURL()")


def wait_for(page, condition):
    page.wait_for_function(condition, timeout=LONG)


def drawn(page): wait_for(page, "() => document.querySelector('.ctvlm-planes')?.dataset.drawn")      # the first picture is there


def z(page): return int(page.get_by_role("slider", name="axial plane").get_attribute("aria-valuenow"))


# ---------------------------------------------------------------- the widgets, with a model made of three lines

ALONE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>reader</title><style>%(css)s .row-of-two { display: flex; flex-flow: row wrap; gap: 12px }</style>
<div class="row-of-two"><div id="planes" style="flex: 1 1 30rem; min-width: 0; max-width: %(wide)s"></div><div id="report" style="flex: 1 1 22rem; min-width: 0"></div></div>
<script type="module">
const Model = d => { const h = {}; return { get: k => d[k], set: (k, v) => { d[k] = v }, save_changes() {}, on: (e, f) => { h[e] = f }, off() {}, fire: e => h[e](), d } };
const load = async s => (await import("data:text/javascript;charset=utf-8," + encodeURIComponent(s))).default;
const state = %(state)s;
state.planes.png = Uint8Array.from(atob(state.planes.png), c => c.charCodeAt(0));
for (const name of ["planes", "report"]) { window[name] = Model(state[name]); (await load(%(source)s[name])).render({ model: window[name], el: document.getElementById(name) }); }
</script></html>"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "A page with both widgets and no Python behind them."
    pytest.importorskip("anywidget")
    import ctvlm
    from ctvlm import reader as parts, viewer
    from ctvlm.core import CTVolume
    array = np.random.default_rng(0).integers(-200, 300, size=(64, 64, 40)).astype(np.float32)
    reader = viewer.explore(CTVolume(array, np.diag([5., 5, 8, 1])), ["Nodule in the lung.", "Lesion of the liver."], None)
    state = lambda widget, names: {n: base64.b64encode(getattr(widget, n)).decode() if n == "png" else getattr(widget, n) for n in names.split()}
    page = ALONE % {"css": (Path(ctvlm.__file__).parent/"data"/"reader.css").read_text(), "wide": reader.picture.layout.max_width, "source": json.dumps({"planes": parts._PLANES_JS, "report": parts._REPORT_JS}),
                    "state": json.dumps({"planes": state(reader.picture, "panels sizes windows window png alt at texts labels drawn steps clicked pointed windowed probed"), "report": state(reader.report, "sentences said busy chosen reference asked presses")})}
    path = tmp_path_factory.mktemp("alone") / "reader.html"
    path.write_text(page)
    return path.as_uri()


def test_wheel_keys_and_clicks(open_page, alone):
    page = open_page(alone)
    drawn(page)
    steps, answer = lambda: page.evaluate("planes.d.steps"), lambda: page.evaluate("planes.fire('change:drawn')")
    page.locator("figure.axial canvas").hover()
    for _ in range(3): page.mouse.wheel(0, 100)                                  # towards the feet
    wait_for(page, "() => planes.d.steps[2] == -1")                              # one is on its way, two wait for the picture
    answer()
    wait_for(page, "() => planes.d.steps[2] == -3")
    answer()
    page.wait_for_timeout(100)
    page.get_by_role("slider", name="coronal plane").press("PageUp")
    wait_for(page, "() => planes.d.steps[1] == 10")
    answer()
    page.wait_for_timeout(100)
    page.mouse.move(*[page.locator("figure.sagittal canvas").bounding_box()[k] + 5 for k in "xy"])
    page.mouse.wheel(0, -100)
    wait_for(page, "() => planes.d.steps[0] == 1")
    assert steps() == [1, 10, -3]
    box = page.locator("figure.coronal canvas").bounding_box()
    page.mouse.click(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2)
    name, u, v, _ = page.evaluate("planes.d.clicked")
    assert name == "coronal" and abs(u - 0.25) < 0.02 and abs(v - 0.5) < 0.02
    page.get_by_role("radio", name="lung").check()
    assert page.evaluate("planes.d.windowed") == "lung"
    page.get_by_label("window width").fill("350")
    page.get_by_label("window width").press("Enter")
    assert page.evaluate("planes.d.windowed") == "40/350"                        # any window
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 4)
    wait_for(page, "() => planes.d.pointed[0] == 'coronal' && Math.abs(planes.d.pointed[1] - 0.5) < 0.02")
    page.evaluate("planes.d.probed = '-43 HU at 1, 2, 3 mm'; planes.fire('change:probed')")
    assert page.locator(".probed").inner_text() == "-43 HU at 1, 2, 3 mm"


def test_zoom_keeps_the_point(open_page, alone):
    page = open_page(alone)
    drawn(page)
    box = page.locator("figure.axial canvas").bounding_box()
    x, y = box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.6
    page.mouse.move(x, y)
    page.keyboard.down("Control")
    for _ in range(4): page.mouse.wheel(0, -100)
    page.keyboard.up("Control")
    wait_for(page, "() => document.querySelector('figure.axial canvas').style.transform.startsWith('scale(2.4')")
    page.mouse.click(x, y)
    name, u, v, _ = page.evaluate("planes.d.clicked")
    assert name == "axial" and abs(u - 0.3) < 0.01 and abs(v - 0.6) < 0.01       # what lay under the pointer still does
    page.mouse.dblclick(x, y)
    assert page.evaluate("document.querySelector('figure.axial canvas').style.transform") == ""


def test_a_reference_of_several_is_asked(open_page, alone):
    page = open_page(alone)
    drawn(page)
    page.evaluate("""report.d.sentences = [{ pieces: [["Cyst ", ""], ["4/38", "reference", 0, "120 mm"], [", ", ""], ["5/12", "unresolved", 1, "in series 5, not open here"]], query: "Cyst" }]; report.fire("change:sentences")""")
    page.locator(".unresolved", has_text="5/12").click()
    assert page.evaluate("[report.d.chosen, report.d.reference, report.d.presses]") == [0, 1, 1]
    assert "not open here" in page.locator(".unresolved", has_text="5/12").get_attribute("title")
    page.get_by_role("button", name="Cyst").press("Enter")
    assert page.evaluate("[report.d.chosen, report.d.reference]") == [0, -1]


def test_keyboard_reaches_every_control(open_page, alone, tmp_path):
    page = open_page(alone)
    drawn(page)
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(focused(page)[1])
        ring = page.evaluate("(() => { const e = document.activeElement, on = e.type == 'radio' ? e.nextSibling : e; return getComputedStyle(on).outlineWidth })()")
        assert ring == "3px", reached[-1]                                        # what has the focus wears a frame
        if reached[-1] == "Nodule in the lung.\n": page.screenshot(path=tmp_path / "focus.png")
    assert reached[:4] == ["axial plane", "coronal plane", page.evaluate("planes.d.alt"), "sagittal plane"] and reached[4:6] == ["axial slice", "soft tissue"]
    assert reached[6:10] == ["window centre", "window width", "Nodule in the lung.\n", "Lesion of the liver.\n"] and reached[11] == "Find"
    page.get_by_role("button", name="Lesion of the liver.").press("Enter")
    page.get_by_role("button", name="Nodule in the lung.").press(" ")
    assert page.evaluate("[report.d.chosen, report.d.presses]") == [0, 2]
    page.get_by_label("Where is").fill("spleen")
    page.get_by_label("Where is").press("Enter")
    assert page.evaluate("[report.d.chosen, report.d.asked, report.d.presses]") == [-1, "spleen", 3]
    assert page.get_by_role("status").count() == 1 and page.get_by_role("radiogroup", name="window").count() == 1


def test_words_stand_out_from_what_is_behind_them(open_page, alone, faint):
    page = open_page(alone)
    drawn(page)
    page.get_by_role("button", name="Nodule in the lung.").click()
    page.evaluate("""planes.d.labels = [[0.3, "predicted", "200 mm"], [0.6, "cited", "120 mm"]]; planes.fire("change:drawn");
                     report.d.said = [["asked", "x"], ["predicted", "x"], ["cited", "x"], ["unsure", "x"], ["note", "x"]]; report.fire("change:said"); report.fire("change:chosen")""")
    page.locator(".over .cited").wait_for()
    assert page.get_by_role("button", pressed=True).count() == 1 and not faint(page)


@pytest.mark.parametrize("width", [390, 800, 1600])
def test_nothing_runs_off_the_page(open_page, alone, width):
    page = open_page(alone, width)
    drawn(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    heights = page.evaluate("['coronal', 'posterior'].map(n => document.querySelector(`figure.${n} canvas`).getBoundingClientRect()).map(r => [r.top, r.bottom])")
    assert np.abs(np.subtract(*heights)).max() < 2                               # a depth is one height in both
    area = page.evaluate("['axial', 'coronal', 'sagittal'].map(n => document.querySelector(`figure.${n} canvas`).getBoundingClientRect()).map(r => r.width * r.height)")
    assert area[0] > max(area[1:])                                               # the axial plane is the largest
    assert page.locator(".over .invite").inner_text() == "click a sentence of the report"   # the empty posterior


def test_on_a_telephone_the_slice_comes_into_view(open_page, alone):
    page = open_page(alone, 390, 700)
    drawn(page)
    page.get_by_role("button", name="Lesion of the liver.").click()
    top, bottom = page.evaluate("(r => [r.top, r.bottom])(document.querySelector('figure.axial canvas').getBoundingClientRect())")
    assert -30 <= top and bottom <= 730


# ---------------------------------------------------------------- in JupyterLab

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


@pytest.mark.skipif(shutil.which("jupyter-lab") is None, reason="needs JupyterLab")
def test_in_jupyterlab(open_page, tmp_path):
    pytest.importorskip("anywidget")
    playwright = pytest.importorskip("playwright.sync_api")
    import nbformat
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(NOTEBOOK.strip())], metadata={"kernelspec": {"name": "python3", "display_name": "python3"}})
    nbformat.write(nb, tmp_path / "view.ipynb")
    log = open(tmp_path / "server.log", "w+")
    server = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0", "--IdentityProvider.token=t", f"--ServerApp.root_dir={tmp_path}"], stdout=log, stderr=log,
                              env=os.environ | {"JUPYTER_CONFIG_DIR": str(tmp_path / "config"), "JUPYTER_DATA_DIR": str(tmp_path / "data")})
    try:
        for _ in range(1800):
            port = re.search(r"http://127\.0\.0\.1:(\d+)/lab", (tmp_path / "server.log").read_text())
            if port: break
            time.sleep(0.1)
        page = open_page(f"http://127.0.0.1:{port[1]}/lab/tree/view.ipynb?token=t", 1280, 800, ours=False)
        axial = page.get_by_role("slider", name="axial plane")
        for _ in range(5):                                                       # a cell that is run while the kernel still connects may be dropped
            page.locator(".jp-Cell .cm-content").first.click()
            page.keyboard.press("Shift+Enter")
            try: axial.wait_for(timeout=20_000)
            except playwright.TimeoutError: continue
            break
        drawn(page)
        assert z(page) == 40
        axial.hover()
        page.mouse.wheel(0, 100)                                                 # towards the feet
        wait_for(page, "() => document.querySelector('figure.axial canvas').getAttribute('aria-valuetext') == 'z = 195 mm'")
        axial.focus()
        page.keyboard.press("ArrowUp")                                           # JupyterLab would take it for "the cell above"
        wait_for(page, "() => document.querySelector('figure.axial canvas').getAttribute('aria-valuetext') == 'z = 200 mm'")
        assert focused(page)[1] == "axial plane"
        page.get_by_role("button", name="Nodule in the lung.").click()
        planes = page.evaluate("['axial', 'coronal', 'posterior', 'sagittal'].map(n => document.querySelector(`figure.${n} canvas`).getBoundingClientRect()).map(r => [r.left, r.right, r.top, r.bottom])")
        assert all(0 <= l and r <= 1280 for l, r, *_ in planes) and max(p[3] for p in planes) - min(p[2] for p in planes) < 700      # all planes at once
        page.get_by_text("predicted 300 mm").wait_for()
        wait_for(page, "() => document.querySelector('figure.axial canvas').getAttribute('aria-valuenow') == 60")
        page.screenshot(path=tmp_path / "jupyterlab.png")
    finally:
        server.terminate()
        server.wait(60)


# ---------------------------------------------------------------- ctvlm view

@pytest.fixture(scope="module")
def served(tmp_path_factory):
    "`ctvlm view` at work on a phantom with an untrained model: its address, process, truth, temporary folder."
    pytest.importorskip("voila")
    from ctvlm.demo import demo_cohort, demo_model
    folder = tmp_path_factory.mktemp("view")
    cohort, studies = demo_cohort({"train": 2, "val": 1, "test": 1}, 0)
    demo_model(studies, 0).save_pretrained(folder / "model")
    study = cohort[0]
    study.write_nifti(folder / "scan.nii.gz")
    (folder / "report.txt").write_text(study.report.text)
    tmp = Path(tempfile.mkdtemp(prefix="cv-", dir="/tmp"))                       # short, since the names of sockets are limited
    with open(folder / "log", "w") as log:
        process = subprocess.Popen([sys.executable, "-m", "ctvlm.cli", "view", folder / "scan.nii.gz", "--model", folder / "model", "--report", folder / "report.txt", "--json"],
                                   stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | {"TMPDIR": str(tmp)})
    line = process.stdout.readline()
    assert line, (folder / "log").read_text()
    yield SimpleNamespace(url=json.loads(line)["url"], process=process, study=study, tmp=tmp, log=folder / "log")
    if process.poll() is None: process.kill()
    shutil.rmtree(tmp)


def status(url, **headers):
    try: return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60).status
    except urllib.error.HTTPError as e: return e.code


def family(process):
    "The process and its children."
    return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]


def listening(processes): return {c.laddr.ip for p in processes for c in p.net_connections("inet") if c.status == "LISTEN"}


def test_nobody_else_gets_in(served):
    base, token = served.url.split("?token=")
    assert base.startswith("http://127.0.0.1:") and len(token) >= 40
    assert {status(base), status(base + "?token=wrong"), status(base + "login"), status(base + "api/kernels/1"), status(base + "voila/files/job.json?token=" + token)} == {403}
    assert status(served.url, Host="elsewhere.example") == 403                   # a foreign name that was made to point here
    assert listening(family(served.process)) == {"127.0.0.1"}
    assert not any(token in word for p in family(served.process) for word in p.cmdline())
    (private,) = served.tmp.iterdir()
    assert private.stat().st_mode & 0o077 == 0


def test_the_page_of_view(served, open_page, tmp_path):
    page = open_page(served.url, 1500, 950)
    axial = page.get_by_role("slider", name="axial plane")
    drawn(page)
    assert {re.match(r"\w+://[^/]*", u)[0] for u in page.requests if u.startswith("http")} == {served.url.split("/?")[0]}    # nothing is fetched from elsewhere
    start, before = z(page), pixels(page, "axial")
    axial.hover()
    page.mouse.wheel(0, 100)
    wait_for(page, f"() => document.querySelector('figure.axial canvas').getAttribute('aria-valuenow') == {start - 1}")
    assert pixels(page, "axial") != before
    axial.press("Home")
    wait_for(page, "() => document.querySelector('figure.axial canvas').getAttribute('aria-valuenow') == 0")
    lowest = pixels(page, "axial")
    cited = next(r for r in served.study.report.references if not r.prior)
    page.get_by_role("button", name=cited.snippet[:20]).first.click()
    page.locator(".said .predicted").wait_for()
    wait_for(page, "() => document.querySelector('figure.axial canvas').getAttribute('aria-valuenow') > 0")
    assert pixels(page, "axial") != lowest                                       # the scan went where the model points
    assert "no real scan" in page.get_by_role("status").inner_text()
    page.get_by_label("Where is").fill("cyst in the left kidney")
    page.get_by_role("button", name="Find").click()
    page.locator(".said .asked", has_text="“cyst in the left kidney”").wait_for()
    page.get_by_role("radio", name="bone").check()
    wait_for(page, "() => document.querySelector('figure.posterior canvas').getAttribute('aria-label').includes('bone window')")
    page.screenshot(path=tmp_path / "view.png")
    assert page.get_by_role("heading", name="ctvlm reader").count() == 1
    assert len(list(served.tmp.glob("ctvlm-*/voila_*/kernel-*-ipc-*"))) == 5      # the kernel's channels are files in the private folder, and no ports


def test_ctrl_c_leaves_nothing_behind(served):
    children = family(served.process)[1:]
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(60) == 0, served.log.read_text()
    assert not list(served.tmp.iterdir()) and "Traceback" not in served.log.read_text()
    assert not psutil.wait_procs(children, timeout=10)[1]
