"""Places in words: the tables, the parts of sentences, and heights that agree with the drawn patient."""
import csv
import math
from importlib.resources import files

import pytest

from ctvlm.core import stable_rng
from ctvlm.phantoms import PhantomCohort
from ctvlm.places import HELD_BACK, PARTS, PLACES, draw_sentences, extent_of, part_of, place_texts, seen, unseen
from ctvlm.reports import reworded

DATA = files("ctvlm") / "data"


def rows(name):
    return list(csv.DictReader((DATA / name).read_text(encoding="utf-8").splitlines()))


@pytest.fixture(scope="module")
def cohort():
    return list(PhantomCohort(12, seed=5, spacing=(6., 6., 3.)))


def test_the_table_of_places_has_its_schema(cohort):
    groups = {r["signs"] for r in rows("phantom_signs.csv")}
    organs = {r["organ"] for r in rows("organs.csv")}
    names = []
    for r in rows("phantom_places.csv"):
        assert list(r) == ["place", "organ", "low", "high", "signs", "catalogue", "same", "english", "german"]
        assert -.5 <= float(r["low"]) < float(r["high"]) <= 1.5, r["place"]
        assert r["signs"] in groups and r["same"] in ("yes", "no"), r["place"]
        assert set(filter(None, r["catalogue"].split(";"))) <= organs, r["place"]
        assert all(w == w.strip() and w for c in ("english", "german") for w in r[c].split(";")), r["place"]
        names.append(r["place"])
    assert len(set(names)) == len(names)
    for p in PLACES.values():
        assert all(p.organ in s.organ_heights for s in cohort), p.name
        assert not any("{" in w for language in p.wordings.values() for w in language), p.name


def test_a_finding_of_the_catalogue_lies_in_one_place():
    organs = [o for r in rows("phantom_places.csv") for o in r["catalogue"].split(";") if o]
    assert len(set(organs)) == len(organs)


def test_parts_share_no_sentence():
    for name in PLACES:
        for language in ("en", "de"):
            texts = [set(place_texts(name, language, part)) for part in PARTS]
            assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]
    assert {part_of(t) for t in HELD_BACK} == {"test"}


@pytest.mark.parametrize("upper, lower", [
    ("apex of the left lung", "aortic arch"), ("aortic arch", "carina"), ("carina", "both bases"),
    ("upper pole of the left kidney", "lower pole of the left kidney"), ("dome of the liver", "tip of the liver"),
    ("T4", "T12"), ("T12", "L1"), ("coeliac trunk", "aortic bifurcation"), ("both bases", "sigmoid")])
def test_what_lies_higher_lies_higher(cohort, upper, lower):
    for s in cohort:
        a, b = (sum(extent_of(PLACES[n], s.organ_heights)) for n in (upper, lower))
        assert a > b


def test_a_sentence_is_about_what_the_scan_shows(cohort):
    for s in cohort:
        for text, z in draw_sentences(s, 10, stable_rng(1, s.index)):
            assert s.scan.low <= z <= s.scan.high and text
        assert all(math.isnan(z) for _, z in draw_sentences(s, 4, stable_rng(2, s.index), absent=True))
        assert not any(unseen(p, s) and seen(p, s) for p in PLACES.values())
    assert draw_sentences(cohort[0], 5, stable_rng(3)) == draw_sentences(cohort[0], 5, stable_rng(3))


def test_reports_say_the_same_place_in_other_words():
    said = {reworded(("at the left apex", "links apikal"), stable_rng(k)) for k in range(30)}
    assert len(said) > 3 and all("left" in en and ("link" in de) for en, de in said)
    assert reworded(("in segment II of the liver", "in Lebersegment II"), stable_rng(0))[0].startswith("in segment II ")
