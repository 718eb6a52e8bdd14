import json
from dataclasses import replace
from pathlib import Path
import numpy as np, pytest
from sklearn import metrics as sk
from ctvlm.core import InputError
from ctvlm.evaluation import *
from ctvlm.comparison import _finite

GOLDEN = Path(__file__).parent / "golden/metrics"


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN / "inputs.npz")), json.loads((GOLDEN / "expected.json").read_text())


def agrees(found, expected, tolerance=1e-6):
    for k, v in expected.items(): assert found[k] == pytest.approx(v, rel=tolerance, abs=tolerance), k


def test_golden_retrieval(golden):
    x, expected = golden
    m = retrieval_metrics(x["image_embeddings"], x["text_embeddings"])
    for direction in ("text_to_image", "image_to_text"): agrees(m[direction], expected[direction])
    assert m["text_to_image_ranks"] == expected["text_to_image_ranks"]
    hits = np.array(expected["text_to_image_ranks"]) < 10
    assert bootstrap_ci(hits) == pytest.approx(expected["bootstrap_recall10_95ci"], abs=0.01)
    table = retrieval_metrics(x["image_embeddings"], x["text_embeddings"], patients=np.arange(300))["text_to_image"]
    assert [table["r10"], *table["r10_ci95"]] == pytest.approx(expected["bootstrap_recall10_95ci"], abs=0.01)


def test_golden_pools(golden):
    x, expected = golden
    for seed in (0, 1): agrees(pool_retrieval_metrics(x["image_embeddings"], x["text_embeddings"], (32, 64, 128), (1, 8), 100, seed), expected["pool_retrieval"], 0.01)


def test_golden_volumes(golden):
    x, expected = golden
    m = volume_retrieval_metrics(x["image_embeddings"], x["labels"])
    agrees(m, expected["volume_retrieval"] | {"n_abnormal": expected["n_abnormal"]})


def test_golden_classification(golden):
    x, expected = golden
    m = classification_metrics(x["scores"], x["labels"], expected["classes"])
    agrees(m, expected["classification"])
    agrees(m["per_class"], expected["classification_per_class"])


def test_golden_localization(golden):
    x, expected = golden
    agrees(localization_metrics(12.0 * x["loc_pred_bin"], 12.0 * x["loc_target_bin"], x["loc_scan_index"]), expected["localization"])


# ---------------------------------------------------------------- against the plainest form, and scikit-learn

def plain_ranks(queries, candidates):
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-30)
    s = unit(queries.astype(float)) @ unit(candidates.astype(float)).T
    own = np.diag(s)[:, None]
    return (s > own + 1e-12).sum(1), (abs(s - own) <= 1e-12).sum(1)


@pytest.mark.parametrize("n, width, kind", [(1, 3, "normal"), (257, 5, "normal"), (300, 4, "signs"), (130, 6, "repeated"), (64, 8, "collapsed"), (90, 4, "zeros")])
def test_ranks_are_exact(n, width, kind):
    rng = np.random.default_rng(n)
    image, text = rng.normal(size=(2, n, width)).astype(np.float32)
    if kind == "signs": image, text = np.sign(image), np.sign(text)            # many ties between different vectors
    if kind == "repeated": text = text[rng.integers(n // 3, size=n)]            # the same report for several scans
    if kind == "collapsed": image, text = np.ones_like(image), np.ones_like(text)
    if kind == "zeros": image[::7] = 0
    found = pair_ranks(image, text, rows=50, columns=33)
    for direction, (q, c) in {"text_to_image": (text, image), "image_to_text": (image, text)}.items():
        above, tied = plain_ranks(q, c)
        np.testing.assert_array_equal(found[direction][0], above)
        np.testing.assert_array_equal(found[direction][1], tied)


def test_near_ties_are_told_apart_in_float64():
    rng = np.random.default_rng(0)
    text, base = np.repeat(rng.normal(size=(2, 1, 64)), 40, 1)
    image = base + 1e-9 * np.arange(40)[:, None] * rng.normal(size=(1, 64))     # float32 cannot tell these apart
    assert (pair_ranks(image, text)["text_to_image"][1] < 40).all()
    np.testing.assert_array_equal(pair_ranks(image, text, rows=7, columns=9)["text_to_image"], plain_ranks(text, image))


def test_ties_give_chance_not_luck():
    m = retrieval_metrics(np.ones((200, 4)), np.ones((200, 4)))["text_to_image"]
    assert m["r10"] == pytest.approx(10 / 200) and m["meanr"] == pytest.approx(100.5)


def test_recall_beyond_the_gallery_is_one():
    m = retrieval_metrics(np.eye(3), np.eye(3))
    assert m["text_to_image"]["r100"] == 1 and m["text_to_image"]["medr"] == 1 and m["image_to_text"]["n"] == 3


@pytest.mark.parametrize("seed", range(6))
def test_classification_agrees_with_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(2, size=(70, 2))
    scores = np.round(rng.normal(size=(70, 2)) + labels * (seed - 2), 1)        # ties, and models that are worse than chance
    m = classification_metrics(scores, labels, ["a", "b"])["per_class"]
    for q, c in enumerate("ab"):
        y, s = labels[:, q], scores[:, q]
        fpr, tpr, cut = sk.roc_curve(y, s, drop_intermediate=False)
        assert m[f"{c}_auc"] == pytest.approx(sk.roc_auc_score(y, s))
        assert m[f"{c}_sens"] + m[f"{c}_spec"] - 1 == pytest.approx((tpr - fpr).max())
        positive = s >= m[f"{c}_threshold"]
        assert m[f"{c}_f1"] == pytest.approx(sk.f1_score(y, positive, average="weighted", zero_division=0))
        assert m[f"{c}_prec"] == pytest.approx(sk.precision_score(y, positive, zero_division=0))
        assert m[f"{c}_acc"] == pytest.approx(sk.balanced_accuracy_score(y, positive))


def test_unknown_labels_and_rare_classes():
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(2, size=(80, 3)), rng.normal(size=(80, 3))
    labels[:30, 0], labels[:, 1] = -1, 0
    m = classification_metrics(scores, labels, ["partly known", "never", "known"])
    assert m["per_class"]["partly known_auc"] == pytest.approx(sk.roc_auc_score(labels[30:, 0], scores[30:, 0]))
    assert list(m["left_out"]) == ["never"] and m["n_classes"] == 2
    with pytest.raises(InputError, match="none of 1 classes"): classification_metrics(scores[:, :1], labels[:, 1:2], ["never"])
    with pytest.raises(InputError, match="not finite"): classification_metrics(scores * np.nan, labels, "abc")


def test_a_class_of_findings_is_present_where_one_is():
    labels = np.array([[1, 0], [0, 1], [0, 0], [0, -1], [-1, -1], [1, -1]])
    assert combine_findings(labels, ["a", "b"], {"either": ["a", "b"], "a": ["a"]}, labels=True).tolist() == [[1, 1], [1, 0], [0, 0], [-1, 0], [-1, -1], [1, 1]]
    scores = np.array([[.2, .7], [.9, -.1]])
    assert combine_findings(scores, ["a", "b"], {"either": ["a", "b"]}).tolist() == [[.7], [.9]]
    with pytest.raises(InputError, match="findings c are not among the 2"): combine_findings(scores, ["a", "b"], {"x": ["c"]})


def test_average_precision_agrees_with_scikit_learn():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(90, 6)), rng.random((90, 4)) < 0.3
    u = x / np.linalg.norm(x, axis=1, keepdims=True)
    abnormal, want = np.flatnonzero(y.any(1)), []
    for i in abnormal:
        others = abnormal[abnormal != i]
        relevant = (y[others] & y[i]).any(1)
        if relevant.any(): want.append(sk.average_precision_score(relevant, u[others] @ u[i]))
    m = volume_retrieval_metrics(x, y, ks=(90,), rows=13)
    assert m["map@90"] == pytest.approx(np.mean(want)) and m["n_queries"] == len(want) and m["n_abnormal"] == len(abnormal)


def test_intervals_resample_patients():
    rng = np.random.default_rng(0)
    values = rng.normal(size=150)
    for statistic in (np.mean, np.median):
        fast = bootstrap_ci(values, np.arange(150) // 3, statistic, resamples=200)
        slow = bootstrap_ci(values, np.arange(150) // 3, lambda v: statistic(v), resamples=200)
        assert fast == pytest.approx(slow)
    patients = np.repeat(np.arange(50), 3)
    same = np.repeat(rng.integers(2, size=(50, 2)), 3, axis=0)
    scores = same + np.repeat(rng.normal(size=(50, 2)), 3, axis=0)
    width = lambda m: np.diff(m["mean_auroc_ci95"])[0]
    assert width(classification_metrics(scores, same, "ab", patients, resamples=500)) > 1.4 * width(classification_metrics(scores, same, "ab", np.arange(150), resamples=500))


def test_interval_covers_the_truth():
    rng, hits = np.random.default_rng(0), 0
    for i in range(200):
        _, low, high = bootstrap_ci(rng.normal(size=80), resamples=300, seed=i)
        hits += low <= 0 <= high
    assert 0.89 <= hits / 200 <= 0.99


def test_localization_by_scan_and_patient():
    rng = np.random.default_rng(0)
    target, scan = rng.uniform(0, 400, 60), rng.integers(9, size=60)
    pred = target + rng.normal(0, 20, 60)
    m = localization_metrics(pred, target, scan, patients=[f"p{s // 2}" for s in scan], resamples=300)
    assert m["loc_perscan_mae_mm"] == pytest.approx(np.mean([abs(pred - target)[scan == s].mean() for s in set(scan)]))
    assert m["n_patients"] == 5 and m["loc_median_mm_ci95"][0] <= m["loc_median_mm"] <= m["loc_median_mm_ci95"][1]


# ---------------------------------------------------------------- a model, end to end

@pytest.fixture(scope="module")
def tiny():
    torch = pytest.importorskip("torch")
    from ctvlm.model import CTVLMConfig, CTVLMModel, CTVLMProcessor
    from ctvlm.text import train_tokenizer
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["There is no nodule in the left lung. Cyst of the right kidney."] * 4, vocab_size=300)
    model = CTVLMModel(CTVLMConfig.tiny(vocab_size=len(tokenizer)))
    model.processor = CTVLMProcessor.of(model.config, tokenizer)
    return model, tokenizer


def batches(tokenizer, first=0, n=4, seed=0):
    import torch
    g = torch.Generator().manual_seed(seed)
    for b in range(first, first + n):
        grids, words = torch.tensor([[1, 1, 2], [1, 1, 3]]), [f"Cyst of the kidney {i}" for i in range(4)]
        bins = torch.full((2, 24), torch.nan)
        for row, (_, _, z) in enumerate(grids.tolist()): bins[row, :8 * z] = -50. + 12 * torch.arange(8 * z)
        text, snippet = (tokenizer(w, padding=True, return_tensors="pt") for w in (["There is a nodule", "There is no nodule in the lung"], words))
        yield dict(cls=torch.randn(5, 48, generator=g).half(), depth_tokens=torch.randn(5, 8, 48, generator=g).half(), grid=grids, bin_depths_mm=bins,
                   report_ids=text["input_ids"], report_mask=text["attention_mask"], snippet_ids=snippet["input_ids"], snippet_mask=snippet["attention_mask"],
                   snippet_scan=torch.tensor([0, 0, 1, 1]), snippet_depth_mm=torch.tensor([0., 40., 90., 200.]), labels=torch.tensor([[1, 0], [0, 1]]), snippet_text=words,
                   study=[f"s{b}a", f"s{b}b"], patient=[f"p{b}", f"p{b}"])


def test_evaluate_model(tiny, tmp_path):
    import pandas as pd
    model, tokenizer = tiny
    model.train()
    training = pd.DataFrame({"snippet": ["Cyst of the kidney", "Nodule of the lung"] * 5, "depth_mm": [30., 150.] * 5, "low_mm": 0., "high_mm": 200.})
    result = evaluate_model(model, batches(tokenizer, n=6), findings=("Lung nodule", "Cardiomegaly"), training=training, calibration=batches(tokenizer, 20, 24, seed=1), resamples=200, quiet=True,
                            studies=pd.DataFrame({"study": [f"s{b}{x}" for b in range(6) for x in "ab"], "findings": "Nodule.", "impression": ""}))
    assert model.training                                                       # left as it was found
    loc = result["localization"]
    assert loc["n_snippets"] == 24 and loc["n_patients"] == 6 and {"text_prior_mm", "organ_mm", "interval_coverage", "vs_middle_ci95"} <= set(loc)
    assert result["retrieval"]["text_to_image"]["n"] == 12 and result["classification"]["protocol"]["prompts"] == "single"
    assert result["classification"]["per_class"].keys() == {"Lung nodule", "Cardiomegaly"}
    write_result(tmp_path / "a.json", result)
    again = read_result(tmp_path / "a.json")
    assert again["localization"]["mae_mm"] == loc["mae_mm"]
    assert {r["better"] for r in compare_results(tmp_path / "a.json", result, resamples=100)} == {"neither"}


def test_json_schema_says_what_check_result_says(tiny):
    jsonschema = pytest.importorskip("jsonschema")
    model, tokenizer = tiny
    result = evaluate_model(model, batches(tokenizer, n=6), findings=("Lung nodule", "Cardiomegaly"), tasks=("retrieval", "volumes", "classification", "localization"), resamples=20, quiet=True)
    fits = lambda r: jsonschema.Draft202012Validator(json_schema()).is_valid(_finite(r))
    jsonschema.Draft202012Validator.check_schema(json_schema())
    assert fits(result) and fits({"format": result["format"]})
    for task, key in (("retrieval", "text_to_image"), ("volumes", "map@5"), ("localization", "items"), ("classification", "mean_auroc")):
        without = {**result, task: {k: v for k, v in result[task].items() if k != key}}
        assert not fits(without)
        with pytest.raises(InputError, match=f"{task} has no '{key}'"): check_result(without)
    assert not fits({**result, "format": "other"}) and not fits({**result, "localization": {**result["localization"], "n_snippets": "24"}})


def test_embedding_alone_equals_in_company(tiny):
    model, tokenizer = tiny
    everything = embed_batches(model, batches(tokenizer), quiet=True)
    assert everything.similarity.shape == (16, 24) and np.isnan(everything.similarity[0, 16:]).all() and np.isfinite(everything.similarity[2]).all()
    assert everything.snippets.low_mm[0] == -56 and everything.snippets.high_mm[0] == -50 + 12 * 16 - 6
    np.testing.assert_allclose(np.linalg.norm(everything.image, axis=1), 1, atol=1e-5)
    assert "kidney 1" in everything.snippets.snippet[1]
    with pytest.raises(InputError, match="0 batches"): embed_batches(model, [])


def test_evaluate_studies_on_phantoms(tiny, tmp_path):
    data = pytest.importorskip("ctvlm.data")
    from ctvlm.phantoms import PhantomCohort
    model, _ = tiny
    studies = data.phantom_studies(PhantomCohort(10, seed=3, spacing=(6.0, 6.0, None)), truth=True)
    studies["split"] = ["test"] * 6 + ["train"] * 4
    store = data.embed_studies(studies, model, tmp_path, workers=0, quiet=True)["store"]
    result = evaluate_studies(model, studies, store, resamples=50, quiet=True, tasks=("retrieval", "localization", "volumes"))
    loc = result["localization"]
    table = snippet_table(studies[studies.split == "test"], store)
    assert loc["n_snippets"] == len(table) > 5 and result["retrieval"]["text_to_image"]["n"] == 6
    np.testing.assert_allclose(sorted(loc["items"]["low_mm"]), sorted(table.low_mm), atol=0.01)
    items = loc["items"]                                                          # padding below a scan is no place for an answer
    assert all(low - 1e-3 <= mm <= high + 1e-3 for low, mm, high in zip(items["low_mm"], items["pred_mm"], items["high_mm"])) and np.isfinite(items["share_below"]).all()
    assert result["protocol"]["split"] == "test" and result["protocol"]["label_version"] == "truth" and "text_prior_mm" in loc
    with pytest.raises(InputError, match="0 studies in split 'val'"): evaluate_studies(model, studies, store, split="val")
    from ctvlm.depth import DepthCalibration
    own, config = DepthCalibration(stretch=2., n_patients=30, population=population_of(studies[studies.split == "test"])), model.config
    try:                                                                          # tested on the patients whom its interval was learned from
        model.config = replace(config, interval_calibration=own.to_dict())
        again = evaluate_studies(model, studies, store, resamples=20, quiet=True, tasks=("localization",))["localization"]
    finally: model.config = config
    assert "interval_coverage" not in again and again["protocol"]["interval"].startswith("withheld: the model was calibrated on drawn patients")


def test_depths_are_read_where_the_posterior_is():
    import pandas as pd
    bins = np.stack([-100 + 12. * np.arange(20)] * 30)
    truth = np.random.default_rng(0).uniform(-90, 110, 30)
    similarity = np.exp(-0.5 * ((bins - truth[:, None]) / 15) ** 2)
    e = Embedded([], [], None, None, None, None, pd.DataFrame({"scan": range(30), "snippet": "x", "depth_mm": truth, "low_mm": -106., "high_mm": 134., "study": "s", "patient": [str(i) for i in range(30)]}), similarity, bins)
    found, posterior = read_depths(e)
    assert abs(found.pred_mm - truth).max() < 6 and abs(found.argmax_mm - truth).max() < 6.01
    assert found.share_below.between(0.2, 0.8).all() and found.interval_low_mm.isna().all()
    calibration = calibrate_depth(e)
    assert read_depths(e, calibration)[0].interval_low_mm.notna().all() or not calibration.calibrated


REAL = Path(__file__).parents[2] / "shared/data/thorax_abdomen"

@pytest.mark.skipif(not REAL.exists(), reason="needs ../shared")
def test_organ_check_on_a_real_scan():
    from types import SimpleNamespace
    from ctvlm.preprocessing import load_volume
    volume, extents = load_volume(REAL / "example_ct_sm.nii.gz"), organ_extents(REAL / "example_seg.nii.gz")
    assert {"liver", "spleen", "right kidney", "left kidney", "aorta"} <= set(extents)
    assert all(volume.depths_mm[0] - 3 <= low < high <= volume.depths_mm[-1] + 3 for low, high in extents.values())
    middle = lambda organ: sum(extents[organ]) / 2
    assert middle("liver") > middle("right kidney")                              # head is up
    knows = SimpleNamespace(localize=lambda volume, texts: [SimpleNamespace(depth_mm=middle(t)) for t in texts])
    check = organ_check(knows, volume, extents)
    assert (check.outside_mm == 0).all() and (check.from_middle_mm == 0).all() and check.scan_middle_from_middle_mm.max() > 20


# ---------------------------------------------------------------- comparison

def test_permutation_is_uniform_when_nothing_differs():
    rng = np.random.default_rng(0)
    p = [paired_difference(rng.normal(size=60), rng.normal(size=60), np.arange(60) // 2, resamples=200)["p"] for _ in range(200)]
    assert 0.01 <= np.mean(np.array(p) <= 0.05) <= 0.10 and abs(np.mean(p) - 0.5) < 0.07


def test_paired_auc_finds_the_better_model():
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=(200, 3))
    noise = rng.normal(size=(200, 3))
    a, b = labels + 2 * noise, 1000 * (labels + noise)                          # another scale: only ranks count
    m = paired_auc(a, b, labels, resamples=300)
    assert m["b"] == pytest.approx(np.mean([sk.roc_auc_score(labels[:, q], b[:, q]) for q in range(3)]))
    assert m["difference_ci95"][0] > 0 and m["p"] < 0.02
    same = paired_auc(a, 5 * a, labels, resamples=100)
    assert same["difference"] == 0 and same["p"] == 1


def test_results_of_other_studies_are_refused():
    items = lambda s: {"study": [s], "patient": [s], "snippet": ["x"], "depth_mm": [1.], "pred_mm": [1.], "error_mm": [0.]}
    make = lambda s: {"format": "ctvlm-result-2", "localization": {"mae_mm": 1., "median_mm": 1., "random_mm": 1., "middle_mm": 1., "n_snippets": 1, "n_patients": 1, "items": items(s), "protocol": {"decode": ""}}}
    with pytest.raises(InputError, match="share none"): compare_results(make("a"), make("b"))
    with pytest.raises(InputError, match="no task in common"): compare_results(make("a"), {"format": "ctvlm-result-2"})


# ---------------------------------------------------------------- what counts: patients, not scans

def test_reconstructions_of_one_patient_are_one_patient():
    rng = np.random.default_rng(0)
    patients = np.r_[np.zeros(5), np.arange(1, 41)].astype(int)                  # five reconstructions of one sick patient
    scores, labels = rng.normal(size=(45, 2)), np.zeros((45, 2), int)
    labels[:5, 0], scores[:5, 0], labels[::2, 1] = 1, 3, 1
    m = classification_metrics(scores, labels, ["rare", "common"], patients, min_positives=2, resamples=50)
    assert m["left_out"] == {"rare": "1 patients with it, 40 without"}


def test_items_without_a_patient_are_refused():
    for missing in ("", None, float("nan"), " "):
        with pytest.raises(InputError, match="2 of 4 items have no patient"): bootstrap_ci(np.arange(4), ["a", missing, missing, "b"])


def test_own_scans_are_not_in_the_gallery():
    rng = np.random.default_rng(0)
    vectors, labels = np.repeat(rng.normal(size=(30, 16)), 6, axis=0), np.repeat(np.eye(6, dtype=int)[np.arange(30) % 6], 6, axis=0)
    m = volume_retrieval_metrics(vectors, labels, ks=(5,), patients=np.arange(180) // 6, resamples=20)
    assert volume_retrieval_metrics(vectors, labels, ks=(5,))["map@5"] == 1     # where they count, anything is perfect
    assert abs(m["map@5"] - m["chance_map@5"]) < 0.15


def test_collapsed_model_gets_chance_whatever_the_order_of_the_file():
    labels, order = np.repeat(np.eye(3, dtype=int), 8, axis=0), np.random.default_rng(0).permutation(24)
    found = [volume_retrieval_metrics(np.ones((24, 4)), y, ks=(5, 20)) for y in (labels, labels[order])]
    for k in ("map@5", "map@20"): assert found[0][k] == pytest.approx(found[1][k]) == pytest.approx(found[0][f"chance_{k}"])


def embedded(n=36, per_study=1, seed=0, Q=2): # a perfect model: image i and text i are the same
    import pandas as pd
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(n // per_study, 8))
    x = np.repeat(base, per_study, axis=0)
    study = [f"s{i // per_study}" for i in range(n)]
    snippets = pd.DataFrame({"scan": range(n), "study": study, "patient": study, "snippet": "Cyst of the kidney", "depth_mm": 60., "low_mm": 0., "high_mm": 240.})
    bins = np.tile(6 + 12. * np.arange(20), (n, 1))
    similarity = np.exp(-0.5 * ((bins - 60 - rng.normal(0, 15, (n, 1))) / 20) ** 2)
    return Embedded(study, list(study), x, x, x, rng.integers(2, size=(n, Q)), snippets, similarity, bins, np.full(n, 240.))


def test_the_unit_rules_every_protocol():
    e = embedded(72, per_study=2)
    every, first = ({t: evaluate_model(None, e, tasks=(t,), unit=unit, resamples=20)[t] for t in ("retrieval", "pools", "volumes", "localization")} for unit in ("scan", "study"))
    assert every["retrieval"]["text_to_image"]["r1"] == 0.5 and every["pools"]["both"]["pool32_r1"] < 1     # own copies tie
    assert first["retrieval"]["text_to_image"]["r1"] == first["pools"]["both"]["pool32_r1"] == 1
    assert [first[t]["protocol"]["unit"] for t in first] == ["study"] * 4 and [every[t]["protocol"]["unit"] for t in every] == ["scan"] * 4
    assert (every["localization"]["n_snippets"], first["localization"]["n_snippets"]) == (72, 36)
    assert first["volumes"]["n_abnormal"] < every["volumes"]["n_abnormal"]
    with pytest.raises(InputError, match="unit='both'"): evaluate_model(None, e, unit="both")


# ---------------------------------------------------------------- intervals that are not too sure

def test_all_or_none_is_not_certain():
    assert bootstrap_ci(np.ones(40))[1:] == pytest.approx((40 / (40 + 1.959964**2), 1))
    assert bootstrap_ci(np.zeros(40))[2] == pytest.approx(1 - 40 / (40 + 1.959964**2))
    assert ratio_ci([3, 2, 4], [3, 2, 4])[1] < 0.5 and ratio_ci([3., 2.5], [3., 2.5])[1] == 1  # counts; a ratio of errors is no proportion
    labels = np.arange(30) % 2
    m = classification_metrics(labels[:, None].astype(float), labels[:, None], ["a"], np.arange(30), resamples=50)
    low, high = m["per_class"]["a_auc_ci95"]
    assert m["per_class"]["a_auc"] == 1 and 0.7 < low < 0.9 and high == 1 and m["per_class"]["a_sens_ci95"][0] < 0.9


def test_median_of_each_column():
    x = np.random.default_rng(0).normal(size=(50, 2)) + [0, 100]
    together = np.array(bootstrap_ci(x, statistic=np.median, resamples=100))
    for k in range(2): np.testing.assert_allclose(together[:, k], bootstrap_ci(x[:, k], statistic=np.median, resamples=100))


def test_resamples_without_positives_count_for_no_number():
    scores, labels = np.array([[.9], [.8], *[[.1]] * 8]), np.array([[1], [1], *[[0]] * 8])
    m = classification_metrics(scores, labels, ["a"], [0, 0, *range(1, 9)], resamples=300)["per_class"]   # one sick patient
    assert m["a_sens_ci95"][0] > 0 and m["a_f1_ci95"][0] > 0.5                  # before: 0, where nobody sick was drawn


def test_roc_curve_leaves_unknown_out():
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(2, size=60), rng.normal(size=60)
    more = np.r_[labels, np.full(40, -1)], np.r_[scores, np.full(40, 9.)]
    np.testing.assert_array_equal(roc_curve(more[1], more[0], resamples=20)[1], roc_curve(scores, labels, resamples=20)[1])


# ---------------------------------------------------------------- without looking

def test_organs_of_sentences_never_seen():
    lines = [line.split("\t") for line in (Path(__file__).parent / "places.tsv").read_text(encoding="utf-8").splitlines()]
    wrong = [(t, organ, organ_of(t)) for t, organ in lines if (organ_of(t) or "") != organ]
    assert len(lines) > 70 and len(wrong) <= 0.02 * len(lines), wrong             # pieces of words, as before, miss 22


def test_organs_of_phantom_snippets():
    from ctvlm.phantoms import PLANTERS, PhantomCohort
    lung = {"lung", "upper lobe", "middle lobe", "lower lobe"}
    places = {"lungs": lung, "lung bases": lung, "upper lobes": lung, "central lungs": lung, "kidneys": {"kidney"}, "adrenals": {"adrenal"},
              "abdominal aorta": {"aorta"}, "umbilicus": {"abdominal wall"}, "small bowel": {"bowel"}, "pelvis": {"bowel"},
              "upper abdomen": {"peritoneum"}, "lower mediastinum": {"oesophagus"}}
    own, seen, right = {"Pleural effusion": {"pleura"}, "Biliary dilatation": {"bile duct"}}, 0, 0
    for s in PhantomCohort(120, seed=11):
        for r in s.report.references:
            organ = PLANTERS[r.finding][1]
            if organ == "any" or r.depth_mm is None: continue
            seen, right = seen + 1, right + (organ_of(r.snippet) in own.get(r.finding, places.get(organ, {organ})))
    assert seen > 400 and right >= 0.98 * seen


def test_text_prior_reads_the_region_and_the_length():
    import pandas as pd
    from ctvlm.baselines import SCALES, NearestSnippets, localization_baselines
    from ctvlm.phantoms import PhantomCohort
    rows = [(s.patient, r.snippet, r.depth_mm, s.scan.low, s.scan.high, s.report.findings) for s in PhantomCohort(260, seed=5, languages=("en",))
            for r in s.report.references if r.depth_mm is not None]
    t = pd.DataFrame(rows, columns=["patient", "snippet", "depth_mm", "low_mm", "high_mm", "report"])
    number = t.patient.str.extract(r"(\d+)$")[0].astype(int)
    training, validation, test = t[number < 200], t[(200 <= number) & (number < 225)], t[number >= 225]
    weak = NearestSnippets(training, SCALES["fraction of the scan"][0](training.low_mm, training.high_mm, training.depth_mm))
    weak = np.abs(test.low_mm + weak.predict(test) * (test.high_mm - test.low_mm) - test.depth_mm).mean()
    strong = localization_baselines(test, training, validation)
    assert strong.text_prior.mean() < 0.8 * weak and strong.text_prior.mean() < strong.organ.mean()
    assert "learned on" in strong.attrs["text_prior"] and f"{len(validation)} snippets of other patients" in strong.attrs["text_prior"]
    pd.testing.assert_frame_equal(*(localization_baselines(test, training.head(60), validation) for _ in range(2)))


@pytest.mark.parametrize("scale", ["fraction of the scan", "mm above the lower end", "mm below the upper end"])
def test_text_prior_measures_from_the_right_end(scale):
    import pandas as pd
    from ctvlm.baselines import SCALES, TextPrior
    rng = np.random.default_rng(0)
    low = rng.uniform(-500, 500, 200)
    t = pd.DataFrame({"patient": np.arange(200), "snippet": "Bladder stone", "low_mm": low, "high_mm": low + rng.uniform(250, 700, 200)})
    t["depth_mm"] = SCALES[scale][1](t.low_mm, t.high_mm, 0.4 if scale.startswith("fraction") else 60.)
    prior = TextPrior(t)
    assert prior.scale == scale and np.abs(prior.predict(t) - t.depth_mm).max() < 1e-6


def test_extent_prior_knows_only_who_was_scanned():
    from ctvlm.baselines import ExtentPrior
    rng = np.random.default_rng(0)
    belly = rng.random(600) < 0.5
    sick = belly & (rng.random(600) < 0.3)
    for labels, chance in ((sick.astype(int), False), (np.where(belly, sick, -1), True)):
        labels = np.column_stack([labels, rng.integers(2, size=600)])
        share = ExtentPrior(300 + 200 * belly[:300], labels[:300]).predict(300 + 200 * belly[300:], labels[300:])
        auc = classification_metrics(share, labels[300:], ["a", "b"])["per_class"]["a_auc"]
        assert abs(auc - 0.5) < 0.1 if chance else auc > 0.7


# ---------------------------------------------------------------- what an evaluation does with what it is given

def test_what_the_data_do_not_allow_is_skipped_with_its_reason():
    e = embedded(20, Q=0)
    e.snippets = e.snippets[:0]
    so_far = []
    result = evaluate_model(None, e, resamples=20, each=lambda r: so_far.append(set(r)))
    assert set(result["skipped"]) == {"pools", "volumes", "classification", "localization"} and "0 snippets" in result["skipped"]["localization"]
    assert "retrieval" in so_far[0] and len(so_far) == 5 and check_result(result) is result
    with pytest.raises(InputError, match="0 snippets"): evaluate_model(None, e, tasks=("localization",), resamples=20)


def test_coverage_of_patients_beside_that_of_snippets():
    import pandas as pd
    from ctvlm.depth import DepthCalibration
    n = 10 + 10 * 20                                                             # half with one easy snippet, half with twenty hard ones
    patient = [*range(10), *np.repeat(np.arange(10, 20), 20)]
    truth = np.where(np.arange(n) < 10, 120., np.where(np.arange(n) % 5 == 0, 230., 120.))
    bins = np.tile(6 + 12. * np.arange(20), (n, 1))
    similarity = np.exp(-0.5 * ((bins - 120) / 20) ** 2)
    snippets = pd.DataFrame({"scan": patient, "study": [f"s{p}" for p in patient], "patient": [f"p{p}" for p in patient], "snippet": "x", "depth_mm": truth, "low_mm": 0., "high_mm": 240.})
    e = Embedded([f"s{i}" for i in range(20)], [f"p{i}" for i in range(20)], None, None, None, None, snippets, similarity, bins)
    calibration = DepthCalibration(stretch=3., n_patients=50, population="others")
    m = evaluate_localization(e, calibration=calibration, resamples=50)
    assert m["interval_coverage"] == pytest.approx((10 + 160) / 210) and m["interval_coverage_by_patient"] == pytest.approx((10 + 10 * 0.8) / 20)
    m = evaluate_localization(e, calibration=calibration, withhold="calibrated on them", resamples=50)
    assert "interval_coverage" not in m and m["protocol"]["interval"] == "withheld: calibrated on them"


def test_extended_findings_are_judged_by_their_extent_too():
    from ctvlm.phantoms import PhantomCohort
    cohort = PhantomCohort(60, seed=2, languages=("en",))
    extents = phantom_extents(cohort)
    assert (extents.extent_low_mm <= extents.depth_mm + 10).all() and (extents.depth_mm - 10 <= extents.extent_high_mm).all()
    fluid = extents[extents.snippet.str.contains("scites")]
    assert (fluid.extent_high_mm - fluid.extent_low_mm).max() > 60
    e = embedded(36)
    known = e.snippets[["study", "snippet", "depth_mm"]].head(20).assign(extent_low_mm=0., extent_high_mm=240.)
    m = evaluate_localization(e, extents=known, resamples=20)
    assert m["beyond_mm"] == 0 and m["n_extents"] == 20 and m["cited_mm"] > 0 and np.isnan(m["items"]["beyond_mm"][-1])
    assert "extent of the finding" in set(error_analysis(m, resamples=20).by)


def test_extent_of_a_tilted_mask(tmp_path):
    import nibabel
    mask, angle = np.zeros((40, 40, 40), np.uint8), np.deg2rad(20)
    mask[18:22, 2:38, 18:22] = 5                                                 # a bar along y, which the tilt lifts at one end
    affine = np.eye(4)
    affine[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    nibabel.save(nibabel.Nifti1Image(mask, affine), tmp_path / "mask.nii")
    low, high = organ_extents(tmp_path / "mask.nii")["liver"]
    corners = [affine[2] @ (0, j, k, 1) for j in (1.5, 37.5) for k in (17.5, 21.5)]
    assert (low, high) == pytest.approx((min(corners), max(corners)), abs=1e-4)   # the tilt ignored: 4 mm instead of 16


# ---------------------------------------------------------------- comparing what can be compared

def result_of(e, tasks=("retrieval", "localization"), **options): return evaluate_model(None, e, tasks=tasks, resamples=20, **options)


def test_another_gallery_is_not_compared():
    whole, part = embedded(60), of_unit(embedded(60), "scan")
    part = Embedded(part.study[:40], part.patient[:40], part.image[:40], part.disease[:40], part.text[:40], part.labels[:40], part.snippets[:40], part.similarity[:40], part.bin_depths_mm[:40])
    rows = {r["measure"]: r for r in compare_results(result_of(whole), result_of(part), resamples=100)}
    assert rows["retrieval"]["better"] == "not compared" and "60 and 40 scans" in rows["retrieval"]["note"]
    assert rows["localization.mae_mm"]["better"] == "neither" and rows["localization.mae_mm"]["note"] == "on 40 items that both hold, of 60 and 40"
    with pytest.raises(InputError, match="cannot be compared .retrieval: galleries"): compare_results(result_of(whole, tasks=("retrieval",)), result_of(part, tasks=("retrieval",)))


def test_labels_prompts_and_units_must_be_the_same():
    e = embedded(60)
    scores = e.labels + np.random.default_rng(0).normal(size=e.labels.shape)
    make = lambda e, **o: {"format": "ctvlm-result-2", "classification": evaluate_classification(e, scores, ["a", "b"], resamples=20, **o)}
    other = embedded(60)
    other.labels[:5] = 1 - other.labels[:5]
    for b, why in ((make(e, prompts="templates"), "prompts 'single' against 'templates'"), (make(e, label_version="2"), "label_version"), (make(other), "labels of 5 of 60 scans differ")):
        with pytest.raises(InputError, match=why): compare_results(make(e), b)
    with pytest.raises(InputError, match="unit 'scan' against 'study'"): compare_results(result_of(e), result_of(e, unit="study"))


def test_every_scan_of_a_study_is_compared():
    a, b = (embedded(72, per_study=2, seed=s) for s in (0, 1))
    rows = compare_results(result_of(a, tasks=("localization",)), result_of(b, tasks=("localization",)), resamples=100)
    assert {r["n"] for r in rows} == {72} and {r["n_patients"] for r in rows} == {36}


def test_few_patients_cannot_tell_and_luck_is_no_winner():
    a = embedded(5)
    rows = compare_results(result_of(a), result_of(a), resamples=100)
    assert {r["better"] for r in rows} == {"cannot tell (needs >= 6 patients)"}
    rng, winners = np.random.default_rng(0), 0
    for seed in range(60):                                                       # equal models, six patients: intervals alone name a winner in one of three
        e, f = (embedded(6, seed=1000 + 2 * seed + k) for k in range(2))
        winners += any(r["better"] in ("a", "b") for r in compare_results(result_of(e, tasks=("localization",)), result_of(f, tasks=("localization",)), resamples=300))
    assert winners <= 4


def test_a_class_without_positives_decides_nothing():
    rng = np.random.default_rng(0)
    labels = np.column_stack([rng.integers(2, size=80), np.zeros(80, int)])
    a, b = rng.normal(size=(2, 80, 2))
    with_empty, without = (paired_auc(a[:, :k], b[:, :k], labels[:, :k], resamples=300) for k in (2, 1))
    assert with_empty["p"] == pytest.approx(without["p"]) and with_empty["p"] > 0.02     # before: 1 / 301
    assert p_words(0.) == "< 0.001" and p_words(0.0312) == "0.031"
