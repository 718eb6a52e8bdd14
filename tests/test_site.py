"The site without Quarto: links, pictures, documented names, and pages in a real browser."
import importlib, inspect, json, re, subprocess, sys
from collections import Counter
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest, yaml
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parent.parent
MODULES = [p.stem.split("_", 1)[1] for p in sorted((ROOT / "nbs").glob("[0-9][0-9]*_*.ipynb"))]
# looked at closely: front page, a chapter, the reference
SEEN = ["index.html", "localization.html", "api/model.html"]
PICTURES = ROOT / "runs" / "site" # screenshots, to be looked at by people


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The folder of the built site."
    out = tmp_path_factory.mktemp("site") / "docs"
    command = [sys.executable, "tools/build_docs.py", "--plain", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return out


@pytest.fixture(scope="session")
def pages(site):
    "Path in the site -> parsed page."
    paths = sorted(site.rglob("*.html"))
    def parsed(p): return BeautifulSoup(p.read_text(), "html.parser")
    return {p.relative_to(site).as_posix(): parsed(p) for p in paths}


def own(module):
    "Exported names that the module defines itself; some hand on those of earlier chapters."
    sys.path.insert(0, str(ROOT / "tools"))
    from api_pages import own_names
    known = own_names(Path(module.__file__).read_text())
    return [n for n in module.__all__ if n in known]


def target(site, name, link):
    "File and fragment that a link on page `name` leads to; None for the outside world."
    parts = urlsplit(link)
    if parts.scheme or parts.netloc: return None
    path = ((site / name).parent / unquote(parts.path)).resolve() if parts.path else site / name
    return path, unquote(parts.fragment)


def test_every_page_has_the_same_navigation(site, pages):
    sidebar = yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]["sidebar"]["contents"]
    contents = [page.select_one(".menu nav") for page in pages.values()]
    sections = [e["section"] for e in sidebar if isinstance(e, dict)]
    assert [s.text for s in contents[0].find_all("strong")] == sections
    def entries(name, nav):
        links = nav.select("a:not(.here a)")
        return tuple((a.text, target(site, name, a["href"])[0]) for a in links)
    lists = {entries(name, nav) for name, nav in zip(pages, contents)}
    assert len(lists) == 1
    assert {path for _, path in next(iter(lists))} == {site / name for name in pages}
    for name, nav in zip(pages, contents):
        [here] = nav.select("[aria-current]")
        assert target(site, name, here["href"])[0] == site / name


def test_internal_links_and_pictures_resolve(site, pages):
    anchors = {site / name: {t["id"] for t in p.find_all(id=True)} for name, p in pages.items()}
    broken = []
    for name, page in pages.items():
        for tag in page.find_all(["a", "img", "link", "script"]):
            link = tag.get("href") or tag.get("src")
            found = target(site, name, link) if link else None
            if not found: continue
            file, fragment = found
            there = file.is_file() and (not fragment or fragment in anchors.get(file, ()))
            if not there: broken.append((name, link))
    assert not broken, broken
    assert sum(bool(page.find_all("img")) for page in pages.values()) > 20


def test_anchors_lead_to_one_place(pages):
    for name, page in pages.items():
        ids = Counter(t["id"] for t in page.find_all(id=True))
        assert not [i for i, n in ids.items() if n > 1], name
    assert pages["api/reports.html"].find(id="PHRASES")
    assert pages["api/language.html"].find(id="WORDS")


def test_names_in_prose_lead_to_the_name(site, pages):
    names = [a for page in pages.values() for a in page.select("a:has(> code)")]
    links = [(a.text.removesuffix("()"), urlsplit(a["href"]).fragment)
             for a in names if "api/" in a["href"]]
    assert len(links) > 100 and all(text.endswith(fragment) for text, fragment in links)
    assert {a.text for a in names if a["href"].endswith("#train")} == {"train()"}   # the bare word is a split, or a verb


def test_chapters_named_by_number_lead_there(site, pages):
    said = "As chapters 02a, 02b and 03 say ([chapter 14](14_pictures.ipynb), `chapter 04`); chapter 13f too."
    sys.path.insert(0, str(ROOT / "tools"))
    from build_docs import chapter_links
    assert chapter_links(said, "../") == (
        "As chapters [02a](../02a_evidence.ipynb), [02b](../02b_grammar.ipynb) and [03](../03_catalogue.ipynb) say "
        "([chapter 14](14_pictures.ipynb), `chapter 04`); chapter [13f](../13f_grounding.ipynb) too.")
    known = {p.name.split("_")[0] for p in (ROOT / "nbs").glob("[0-9][0-9]*_*.ipynb")}
    named = [a.text for page in pages.values() for a in page.find_all("a") if a.text in known]
    assert len(named) > 80


def test_pictures_have_alternative_texts(pages):
    images = [(name, img) for name, page in pages.items() for img in page.find_all("img")]
    without = [(name, i["src"]) for name, i in images if len(i.get("alt", "").split()) < 3]
    assert not without, without


@pytest.mark.parametrize("name", MODULES)
def test_every_exported_name_has_a_documented_signature(pages, name):
    module, page = importlib.import_module(f"ctvlm.{name}"), pages[f"api/{name}.html"]
    for n in own(module):
        obj, place = getattr(module, n), page.find(id=n)
        assert place, f"{name}.{n} is not on the page"
        inner = inspect.unwrap(obj) if callable(obj) else obj
        if not (inspect.isclass(obj) or inspect.isfunction(inner)):
            assert place.find_parent("tr").find_all("td")[1].text.strip(), n
            continue
        sentence = place.find_next_sibling()
        said = sentence.name == "p" and len(sentence.text.split()) > 1
        assert said, f"{name}.{n} has no docstring"
        assert place.find_next("pre").text.startswith(f"{n}("), n
        source = place.find_next("a", string="source")["href"]
        assert re.search(rf"ctvlm/{name}\.py#L\d+$", source), n


@pytest.mark.parametrize("name", MODULES)
def test_chapters_show_the_code_that_they_export(pages, name):
    shown = "\n".join(pre.text for pre in pages[f"{name}.html"].select("details.exported pre"))
    names = own(importlib.import_module(f"ctvlm.{name}"))
    missing = [n for n in names if not re.search(rf"\b{n}\b", shown)]
    assert not missing, missing


def test_hidden_cells_and_directives_stay_hidden(pages):
    for name, page in pages.items():
        code = "\n".join(pre.text for pre in page.find_all("pre"))
        assert "#|" not in re.sub(r"`#\|[^`]*`", "", code) and "nbdev_export()" not in code, name


def test_formulas_are_set(pages):
    formulas = 0
    for name, page in pages.items():
        formulas += len(page.find_all("math"))
        for tag in page.find_all(["pre", "code", "script", "math"]): tag.extract()
        assert not re.search(r"\$\$|\\(?:frac|begin|cdot|mathrm|text)\b", page.text), name
    assert formulas > 100


def test_search_index_leads_to_sections(site, pages):
    text = (site / "search.js").read_text()
    rows = json.loads(text.removeprefix("window.searchIndex = ").rstrip().rstrip(";"))
    assert {r[0] for r in rows} == set(pages)
    assert all(not r[3] or pages[r[0]].find(id=r[3]) for r in rows)
    assert ["api/siglip.html", "siglip_loss"] in [[r[0], r[3]] for r in rows]


@pytest.fixture
def open_page(browser, site):
    "Open a page of the site at a width; its errors are collected in `.errors`."
    contexts = []
    def open_(name, width=1280, scheme="light"):
        viewport = dict(width=width, height=900)
        contexts.append(browser.new_context(viewport=viewport, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.errors = []
        page.on("console", lambda m: page.errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: page.errors.append(str(e)))
        page.goto((site / name).as_uri())
        return page
    yield open_
    for c in contexts: c.close()


WIDER = """() => [...document.querySelectorAll('body *')]
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1
               && !e.closest('pre, table, math, .skip') && e.offsetParent)
  .map(e => e.tagName + ' ' + e.textContent.trim().slice(0, 40)).slice(0, 5)"""


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", SEEN)
def test_pages_in_a_browser(open_page, name, width):
    page = open_page(name, width)
    assert page.locator("h1").first.is_visible() and not page.errors
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert not page.evaluate(WIDER)
    seen = "[...document.images].every(i => i.complete && i.naturalWidth > 0 && i.alt)"
    assert page.evaluate(seen)
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / f"{name.replace('/', '-').removesuffix('.html')}-{width}.png")


CHARACTERS = """() => [...document.querySelectorAll('details.code pre')].map(pre => {
  const hundred = {textContent: '0'.repeat(100)};
  const ruler = pre.appendChild(Object.assign(document.createElement('span'), hundred));
  ruler.style.cssText = 'position: absolute; white-space: pre';
  const character = ruler.getBoundingClientRect().width / 100, style = getComputedStyle(pre);
  ruler.remove();
  const padding = parseFloat(style.paddingLeft) + parseFloat(style.paddingRight);
  return Math.floor((pre.clientWidth - padding) / character);
})"""
SCROLLS = """() => [...document.querySelectorAll('pre')]
  .filter(p => p.scrollWidth > p.clientWidth + 1).map(p => p.textContent.slice(0, 60))"""


@pytest.mark.parametrize("name", ["index.html", "core.html", "siglip.html"])
def test_a_line_of_code_fits_the_page(open_page, name):
    page = open_page(name, 1280 - 15) # a window of 1280 px, less its scroll bar
    found = page.evaluate(CHARACTERS)
    assert found and min(found) >= 100, f"{name} shows {min(found)} characters of code"
    assert page.locator(".menu [aria-current]").is_visible()


def test_the_sections_of_a_page_are_always_at_hand(open_page):
    for width, seen, other in ((1280, ".menu .here", ".toc"), (1600, ".toc", ".menu .here")):
        page = open_page("siglip.html", width)
        assert page.locator(seen).is_visible() and not page.locator(other).is_visible(), width
        page.locator(seen).get_by_text("Exercises").click()
        assert page.url.endswith("#Exercises")


def test_no_page_runs_off_a_phone(open_page, site, pages):
    page = open_page("index.html", 390)
    for name in pages:
        page.goto((site / name).as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
        assert not page.evaluate(WIDER), name
        assert not page.evaluate(SCROLLS), name # code and what it prints wrap
    assert not page.errors


def test_search_finds_and_leads_there(open_page):
    page = open_page("tutorials/your_own_scan.html")
    page.keyboard.press("/")
    page.keyboard.type("siglip_loss")
    first = page.locator("#site-found a").first
    first.wait_for()
    assert first.get_attribute("href") == "../api/siglip.html#siglip_loss"
    first.click()
    page.wait_for_url("**/api/siglip.html#siglip_loss")
    assert page.locator("#siglip_loss").is_visible() and not page.errors


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", SEEN)
def test_words_stand_out_from_what_is_behind_them(open_page, faint, name, scheme):
    assert not faint(open_page(name, scheme=scheme))


def test_light_and_dark(open_page):
    colour = "getComputedStyle(document.body).backgroundColor"
    page = open_page("core.html", scheme="dark")
    dark = page.evaluate(colour)
    page.click("#site-theme")
    light = page.evaluate(colour)
    assert dark != light and light == "rgb(255, 255, 255)"
    page.reload()
    assert page.evaluate(colour) == light                               # the choice is kept


def test_code_folds_and_the_menu_of_a_phone_opens(open_page):
    page = open_page("core.html", 390)
    assert not page.locator(".menu nav").is_visible()
    page.click(".menu summary")
    assert page.locator(".menu nav a", has_text="Mining").first.is_visible()
    code = page.locator("details.code pre").first
    assert code.is_visible()
    page.click("#site-fold")
    assert not code.is_visible()


def test_the_front_page_says_how_to_install_and_which_version(site, pages):
    from nbdev.config import get_config
    page = pages["index.html"]
    headings = [h.text.removesuffix("#").strip() for h in page.find_all("h2")]
    assert headings[1] == "Install"
    assert "download.pytorch.org/whl/cpu" in (site / "index.html").read_text()
    assert all(get_config().version in p.select_one("header").text for p in pages.values())
    assert "\\|" not in pages["api/manual.html"].text


def test_code_can_be_copied_and_phrases_found(open_page):
    page = open_page("index.html")
    assert page.locator("button.copy").count() >= 3
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator(".copied").first.hover()
    page.locator("button.copy").first.click()
    assert page.evaluate("navigator.clipboard.readText()").startswith("pip install ")
    page.keyboard.press("/")
    page.keyboard.type('"intervals keep their promise"')
    first = page.locator("#site-found a").first
    first.wait_for()
    assert page.locator("#site-found a").count() <= 5 # a phrase, not its words anywhere
