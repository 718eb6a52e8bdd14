"The task depth: distances, what is left out, what guesses get, and the way through the command."
import json

import numpy as np, pandas as pd, pytest

from ctvlm.core import InputError
from ctvlm.evaluation import compare_results, read_result, write_result
from ctvlm.grounding import *
from ctvlm.studies import read_studies, write_studies


def interval(low, high, centroid=None):
    centroid = (low + high) / 2 if centroid is None else centroid
    return dict(low_mm=low, high_mm=high, centroid_mm=centroid, largest_mm=centroid, volume_ml=1.)


def test_distances_by_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(50):
        ends = np.sort(rng.uniform(-100, 100, (3, 2)), 1)
        pieces, z = [interval(a, b, rng.uniform(a, b)) for a, b in ends], rng.uniform(-150, 150, 20)
        fine = np.concatenate([np.linspace(a, b, 2000) for a, b in ends])
        np.testing.assert_allclose(interval_error(z, pieces), np.abs(z[:, None] - fine).min(1), atol=0.06)
        np.testing.assert_allclose(centroid_error(z, pieces), np.abs(z[:, None] - [c["centroid_mm"] for c in pieces]).min(1))


class Model:
    "Says what it is told, abstains on what it does not know, and has no calibration."
    class config: calibration, trained_on = None, "nothing"
    def __init__(self, depths): self.depths, self.asked = depths, []
    def embed(self, volume): return volume
    def localize(self, volume, texts):
        self.asked.append(texts)
        answer = lambda t: type("Answer", (), dict(depth_mm=self.depths.get(t, 0.), interval_mm=(-10., 10.), abstains=t not in self.depths))
        return [answer(t) for t in texts]


@pytest.fixture
def table(tmp_path):
    import nibabel
    rng, rows = np.random.default_rng(0), []
    for i in range(4):
        path = tmp_path / f"s{i}.nii.gz"
        body = np.where(rng.random((30, 30, 30)) < 0.5, -1000, rng.choice([-100, 50], (30, 30, 30))) + rng.normal(0, 15, (30, 30, 30))
        affine = np.diag([-12., -12, 10, 1]); affine[2, 3] = -100
        nibabel.save(nibabel.Nifti1Image(body.astype(np.int16), affine), path)
        text = f"finding {i}"
        pair = dict(snippet=text, cleaned=text, depth_mm=50. + i, prior=False, asserts=True, status="ok", source="mask",
                    category="2d" if i % 2 else "1a", intervals=[interval(40. + i, 60. + i)])
        mined = dict(snippet="mined", cleaned="mined", depth_mm=10., prior=False, asserts=True, status="ok")
        rows.append(dict(study=f"s{i}", patient=f"p{i}", scan=str(path), series="", language="en", findings="", impression="",
                         labels={}, pairs=[mined, pair], split="test" if i < 3 else "train", source="made up", label_version="none"))
    from ctvlm.studies import STUDY_SCHEMA, _pair
    for r in rows: r["pairs"] = [_pair(p) for p in r["pairs"]]
    return read_studies(write_studies(pd.DataFrame(rows, columns=STUDY_SCHEMA.names), tmp_path / "t.parquet"))


def test_a_table_is_asked_and_scored(table):
    model = Model({"finding 0": 50., "finding 1": 91., "finding 2": 62.})
    result = evaluate_depth(model, table, resamples=200, quiet=True)
    d = result["depth"]
    assert d["n_pairs"] == d["n_patients"] == 3 and d["items"]["pair"] == [1, 1, 1]       # mined pairs have no extent
    assert d["items"]["error_mm"] == [0., 30., 0.] and d["hit"] == pytest.approx(2 / 3)
    assert d["items"]["centroid_error_mm"] == [0., 40., 10.]
    assert all(len(texts) == 3 and len(set(texts)) == 3 for texts in model.asked)          # its own, and the two others'
    assert d["abstained"] == 0 and d["n_absent"] == 6 and "interval_coverage" not in d     # nobody promised anything
    low, high = -105, 195
    assert d["middle_mm"] == 0. and (d["items"]["low_mm"][0], d["items"]["high_mm"][0]) == (low, high)
    z = np.linspace(low, high, 3001)
    assert d["random_mm"] == pytest.approx(np.mean([interval_error(z, [interval(40. + i, 60. + i)]).mean() for i in range(3)]), rel=0.01)
    assert "finding" not in json.dumps(result) and "text_prior_mm" in d
    groups = depth_groups(d)
    assert groups[groups.by == "kind"].group.tolist() == ["focal", "non-focal"]
    assert groups[groups.by == "kind"].interval_mae_mm.tolist() == [30., 0.]


def test_results_are_kept_and_compared(table, tmp_path):
    for name, at in (("a", 91.), ("b", 50.)):
        write_result(tmp_path / f"{name}.json", evaluate_depth(Model({f"finding {i}": at for i in range(3)}), table, resamples=200, quiet=True))
    assert read_result(tmp_path / "a.json")["depth"]["n_pairs"] == 3
    rows = {r["measure"]: r for r in compare_results(tmp_path / "a.json", tmp_path / "b.json", resamples=200)}
    assert rows["depth.interval_mae_mm"]["difference"] == pytest.approx(-30., abs=1.01)


def test_what_lies_outside_is_counted(table):
    pairs = table.pairs[0]
    pairs[1]["intervals"] = [interval(900., 910.)]
    d = evaluate_depth(Model({}), table, resamples=50, quiet=True)["depth"]
    assert d["n_pairs"] == 2 and d["protocol"]["left_out"] == {"no mask": 3, "outside of the scan": 1} and d["abstained"] == 1


def test_nothing_to_ask(table):
    with pytest.raises(InputError, match="found 0 pairs with intervals in split 'val'"): evaluate_depth(Model({}), table, "val", quiet=True)


def test_what_is_not_asked_is_counted_by_reason(table):
    pairs = table.pairs[0]
    more = [dict(pairs[1], depth_mm=None, status="mask withheld"), dict(pairs[1], depth_mm=None, status="empty mask"),
            dict(pairs[1], asserts=False), dict(pairs[1], prior=True)]
    table = table.assign(pairs=[[*pairs, *more], *table.pairs[1:]])
    found = depth_pairs(table)
    assert len(found) == 4 and found.attrs["left_out"] == {"no mask": 4, "mask withheld": 1, "empty mask": 1, "nothing asserted": 1, "prior exam": 1}


def test_texts_of_organs_that_are_there_are_no_foreign_ones(table):
    said = {0: "cyst of the liver", 1: "lesion in segment IV of the liver", 2: "stone in the kidney", 3: "splenomegaly"}
    table = table.assign(pairs=[[dict(p, snippet=said[i], cleaned=said[i]) for p in pairs] for i, pairs in enumerate(table.pairs)])
    model = Model({})
    evaluate_depth(model, table, resamples=50, quiet=True)
    others = [set(texts[1:]) for texts in model.asked]
    assert others == [{said[2]}, {said[2]}, {said[0], said[1]}]


def test_the_data_version_is_of_what_was_asked(table):
    one = data_version(depth_pairs(table))
    moved = table.assign(pairs=[[dict(p, intervals=[dict(c, low_mm=c["low_mm"] - 1) for c in p["intervals"] or []]) for p in pairs] for pairs in table.pairs])
    said = table.assign(pairs=[[dict(p, cleaned="another") for p in pairs] for pairs in table.pairs])
    assert one == data_version(depth_pairs(table.assign(scan="elsewhere"))) and len({one, *(data_version(depth_pairs(t)) for t in (moved, said))}) == 3


def test_readers_beside_the_model(table):
    table = table.assign(pairs=[[dict(p, readers_mm=[48., 50., 55.] if i < 2 and p["intervals"] else []) for p in pairs] for i, pairs in enumerate(table.pairs)])
    d = evaluate_depth(Model({f"finding {i}": 60. for i in range(3)}), table, resamples=50, quiet=True)["depth"]
    assert d["readers_mm"] == pytest.approx(np.mean([4.5, 1.5, 6.])) and d["n_readers"] == 2
    assert d["model_beside_readers_mm"] == pytest.approx(np.mean([10., 9.]))


def test_a_result_can_be_posted(table, tmp_path):
    jsonschema = pytest.importorskip("jsonschema")
    from ctvlm.evaluation import json_schema
    secret = table.assign(pairs=[[dict(p, snippet=f"Doe, Jane {p['snippet']}", cleaned=f"Doe, Jane {p['cleaned']}") for p in pairs] for pairs in table.pairs],
                          findings="Jane Doe has a nodule.", impression="See Dr. Miller.")
    write_result(tmp_path / "r.json", evaluate_depth(Model({}), secret, resamples=50, quiet=True))
    text = (tmp_path / "r.json").read_text()
    jsonschema.Draft202012Validator(json_schema()).validate(json.loads(text))
    for word in ("Jane", "Doe", "finding ", "Miller", str(tmp_path)): assert word not in text
