"The Ray Data job on a local Ray with two encoders, one of them killed in the middle; skipped where Ray is not installed."
import os
from pathlib import Path

import pytest

ray = pytest.importorskip("ray")
import ctvlm, made_up_encoder
from ctvlm.data import embed_studies, embed_with_ray
from test_data import files, hospital

HERE = Path(__file__).parent
PACKAGE = Path(ctvlm.__file__).parents[1]     # the checkout under test; another may be installed beside it


@pytest.fixture(scope="module")
def cluster():
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    variables = {"PYTHONPATH": f"{HERE}{os.pathsep}{PACKAGE}", "OMP_NUM_THREADS": "1"}
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR",
             object_store_memory=200 * 2**20, runtime_env={"env_vars": variables})
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


def test_workers_run_the_code_under_test(cluster):
    @ray.remote
    def imported():
        import ctvlm
        return ctvlm.__file__
    assert ray.get(imported.remote()) == ctvlm.__file__


def test_a_killed_encoder_costs_nothing(cluster, hospital, tmp_path):
    marker = tmp_path / "died"
    found = embed_with_ray(hospital, made_up_encoder.Dying(str(marker)), tmp_path / "f", actors=2)
    assert marker.exists() and (found["present"], found["failed"]) == (9, 1)
    assert "cut off" in next(iter(found["reasons"]))
    embed_studies(hospital, made_up_encoder.Encoder(), tmp_path / "alone", workers=0, quiet=True)
    assert files(tmp_path / "f") == files(tmp_path / "alone") and len(files(tmp_path / "f")) == 9
    assert embed_with_ray(hospital, made_up_encoder.Encoder(), tmp_path / "f")["computed"] == 0
