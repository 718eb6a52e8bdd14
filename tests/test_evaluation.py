import json
from pathlib import Path
import numpy as np, pytest
from sklearn import metrics as sk
from ctvlm.core import InputError
from ctvlm.evaluation import *
from ctvlm.evaluation import _finite

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
    make = lambda s: {"format": "ctvlm-result-1", "localization": {"mae_mm": 1., "median_mm": 1., "random_mm": 1., "middle_mm": 1., "n_snippets": 1, "n_patients": 1, "items": items(s), "protocol": {"decode": ""}}}
    with pytest.raises(InputError, match="share none"): compare_results(make("a"), make("b"))
    with pytest.raises(InputError, match="no task in common"): compare_results(make("a"), {"format": "ctvlm-result-1"})
