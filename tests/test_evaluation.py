import json
from pathlib import Path
import numpy as np, pytest
from sklearn import metrics as sk
from ctvlm.core import InputError
from ctvlm.evaluation import *

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
