"tools/gpu.py without a card: limits, failures, and what is told of them."
import importlib.util, json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("gpu", ROOT / "tools" / "gpu.py")
gpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)


@pytest.fixture(autouse=True)
def logs(tmp_path, monkeypatch): monkeypatch.setattr(gpu, "LOGS", tmp_path)


def test_a_part_that_fails_does_not_stop_the_next(monkeypatch, capsys):
    works = "print('{\"benchmark\": \"x\", \"windows_per_s\": 7}')"
    fake = {"bad": (20, ["-c", "raise SystemExit(3)"]),
            "slow": (1, ["-c", "print('begun', flush=True)\nimport time; time.sleep(60)"]),
            "good": (20, ["-c", works])}
    monkeypatch.setattr(gpu, "parts", lambda: fake)
    assert gpu.main([]) is True and gpu.main(["good"]) is False
    said = capsys.readouterr().out
    assert all(f"{name:10} {ended}" in said for name, ended in (("bad", "failed"), ("slow", "over time"), ("good", "ok")))
    assert "windows_per_s 7" in said and "begun" in said


def test_an_unknown_part():
    with pytest.raises(SystemExit, match="no part is called nonsense: choose from tests, encoder"): gpu.main(["nonsense"])


def test_parts_are_files_that_are_there():
    for seconds, words in gpu.parts().values():
        files = [w for w in words if w.endswith((".py", ".ipynb"))]
        assert files and all((ROOT / f).exists() for f in files)
    assert sum(seconds for seconds, _ in gpu.parts().values()) <= 480
    assert "nbs/05a_prepared.ipynb" in gpu.cuda_notebooks()
