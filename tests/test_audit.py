"The audit of mined references: the sample, the page in a browser, and what the ticks say."
import json

import pandas as pd, pytest

from ctvlm.audit import audit, score_audit
from ctvlm.core import InputError

TEXTS = [f"Cyst (series 4, image {i}). Strength 4/5." for i in range(20, 50)] + ["Zyste (Serie 3, Bild 7).", "Stone <b>(4/38)</b>", "No finding."]


@pytest.fixture
def page(tmp_path):
    pd.DataFrame(dict(study=range(len(TEXTS)), report=TEXTS)).to_csv(tmp_path/"r.csv", index=False)
    audit(tmp_path/"r.csv", tmp_path/"audit.html", n=12, quiet=True)
    return tmp_path/"audit.html"


def items(page): return json.loads(page.read_text(encoding="utf-8").split('type="application/json">')[1].split("</script>")[0])

def test_sample(page):
    data = items(page)
    assert len(data["items"]) == 12 and sum(data["sizes"].values()) == 30 * 2 + 2
    assert {i["stratum"] for i in data["items"]} == set(data["sizes"])          # the rare ones too
    assert any(not i["kept"] and i["doubt"] == "named" for i in data["items"])
    for i in data["items"]: assert str(i["image"]) in i["text"][slice(*i["span"])]

def test_same_seed_same_page(page, tmp_path):
    audit(tmp_path/"r.csv", tmp_path/"again.html", n=12, quiet=True)
    audit(tmp_path/"r.csv", tmp_path/"other.html", n=12, seed=1, quiet=True)
    assert (tmp_path/"again.html").read_bytes() == page.read_bytes() != (tmp_path/"other.html").read_bytes()

def test_misuse(tmp_path):
    pd.DataFrame(dict(study=[1], report=["No finding."])).to_csv(tmp_path/"r.csv", index=False)
    with pytest.raises(InputError, match="found no reference"): audit(tmp_path/"r.csv", tmp_path/"a.html", quiet=True)
    assert not (tmp_path/"a.html").exists()
    for text in ("", "[]", '{"items": [{}]}', '{"sizes": {}, "items": [{"stratum": "a", "kept": true, "right": true}]}'):
        (tmp_path/"a.json").write_text(text)
        with pytest.raises(InputError, match="no audit"): score_audit(tmp_path/"a.json")
    (tmp_path/"a.json").write_text(json.dumps(dict(sizes={"a": 1}, items=[dict(stratum="a", kept=True, right=None)])))
    with pytest.raises(InputError, match="no judgement"): score_audit(tmp_path/"a.json")

def test_page_in_a_browser(page, browser, tmp_path):
    p, errors, requests = browser.new_page(viewport={"width": 390, "height": 800}, accept_downloads=True), [], []
    p.on("pageerror", lambda e: errors.append(e.message)); p.on("request", lambda r: requests.append(r.url))
    p.goto(page.as_uri())
    assert p.evaluate("document.documentElement.scrollWidth") <= 390
    data = items(page)["items"]
    for k, item in enumerate(data):
        assert p.locator("#where").text_content().startswith(f"{k + 1} of 12") and p.locator("mark").text_content() == item["text"][slice(*item["span"])]
        assert p.locator("#text").text_content() == item["text"] and not p.locator("#text b").count()   # text of a report stays text
        if k == 0:
            p.keyboard.press("w"); p.keyboard.press("ArrowLeft")
            assert p.locator("#wrong").get_attribute("aria-pressed") == "true"
            p.keyboard.press("ArrowRight")
        else: p.keyboard.press("r")
    with p.expect_download() as download: p.keyboard.press("s")
    download.value.save_as(tmp_path/"audit.json")
    saved = (tmp_path/"audit.json").read_text(encoding="utf-8")
    p.close()
    assert [i["right"] for i in json.loads(saved)["items"]] == [False] + [True] * 11 and "Cyst" not in saved # no report leaves the page
    assert score_audit(tmp_path/"audit.json")["judged"] == 12
    assert not errors and all(url.startswith(("file:", "blob:")) for url in requests)
