"What several test files share."
import shutil

import pytest

FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync".split()


@pytest.fixture(scope="session")
def browser():
    "Headless Chromium, as Debian or a desktop installs it; one for all tests, since playwright starts only once."
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not program: pytest.skip("no Chromium here: apt-get install chromium")
    with pytest.importorskip("playwright.sync_api").sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=program, args=FLAGS)
        yield chromium
        chromium.close()


FAINT = """() => {
  const channel = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4, numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const ground = e => { for (; e; e = e.parentElement) { const c = numbers(getComputedStyle(e).backgroundColor); if ((c[3] ?? 1) > 0.5) return c; } return [255, 255, 255]; };
  const words = e => [...e.childNodes].filter(n => n.nodeType == 3).map(n => n.textContent.trim()).join(" ").trim();
  return [...document.querySelectorAll("body *")].filter(e => words(e) && e.offsetParent).map(e => {
    const [dark, bright] = [light(numbers(getComputedStyle(e).color)), light(ground(e))].sort((a, b) => a - b);
    return [words(e).slice(0, 40), Math.round(10 * (bright + 0.05) / (dark + 0.05)) / 10];
  }).filter(([_, contrast]) => contrast < 4.5);
}"""


@pytest.fixture(scope="session")
def faint():
    "A function of a page: words whose contrast with what lies behind them is below 4.5, the least for reading (WCAG 2.1, 1.4.3)."
    return lambda page: page.evaluate(FAINT)


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    "A made-up study and the folder of its DICOM files."
    from ctvlm.phantoms import PhantomCohort
    study = PhantomCohort(4, seed=0, spacing=(12., 12., None))[3]
    folder = tmp_path_factory.mktemp("phantom")
    study.write_dicom(folder)
    return study, folder


@pytest.fixture(scope="module")
def archive(tmp_path_factory, phantom):
    "An Orthanc of our own with one study in it, ended with the tests."
    from orthanc import archive_with
    with archive_with(phantom[1], tmp_path_factory.mktemp("orthanc")) as archive: yield archive
