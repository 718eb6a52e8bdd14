"The list of planted faults stays as long as it is, and in step with the code."
import importlib.util
from collections import Counter
from pathlib import Path

SPEC = importlib.util.spec_from_file_location("mutants", Path(__file__).parent.parent / "tools" / "mutants.py")
mutants = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(mutants)


def test_sixty_faults_or_more_can_be_planted():
    fresh = Counter(f["module"] for f in mutants.FAULTS if not mutants.stale(f))
    assert fresh.total() >= 60, [f["what"] for f in mutants.FAULTS if mutants.stale(f)]
    assert sum(fresh[m] for m in ("effective_batch", "recipe", "checkpoints", "training")) >= 10
    assert fresh["data"] + fresh["features"] >= 10
    for tests in mutants.TESTS.values(): assert all((mutants.ROOT / t).exists() for t in tests), tests


def test_a_fault_is_planted_and_taken_away(tmp_path, monkeypatch):
    (tmp_path / "ctvlm").mkdir()
    sound = tmp_path / "ctvlm" / "model.py"
    sound.write_text("answer = int(\n    42)\n")
    fault = dict(module="model", what="another answer", old="int( 42 )", new="int(43)")
    seen = []
    def tests(here, names, seconds):
        seen.append(sound.read_text())
        return "43" not in seen[-1]
    monkeypatch.setattr(mutants, "passes", tests)
    assert mutants.plant(tmp_path, fault, 1) and seen == ["answer = int(43)\n"]
    assert sound.read_text() == "answer = int(\n    42)\n"
    assert "| model | 1 | 0 | another answer |" in mutants.table([(fault, False)])
    monkeypatch.setattr(mutants, "passes", lambda *_: None)
    assert mutants.plant(tmp_path, fault, 1) is None                 # out of time is no answer
    assert "| model | 1 | 0 | another answer (too slow to say) |" in mutants.table([(fault, None)])


def test_a_named_test_is_asked_first_and_a_moved_line_is_found(tmp_path, monkeypatch):
    (tmp_path / "ctvlm").mkdir()
    (tmp_path / "ctvlm" / "elsewhere.py").write_text("answer = 42\n")
    fault = dict(module="model", what="another answer", old="42", new="43", by="tests/test_x.py::test_it")
    asked = []
    monkeypatch.setattr(mutants, "passes", lambda here, names, seconds: asked.append(names) or True)
    assert not mutants.plant(tmp_path, fault, 1) and asked == [[fault["by"]], mutants.TESTS["model"]]
    asked.clear()
    assert not mutants.plant(tmp_path, fault, 1, {fault["by"]}) and asked == [mutants.TESTS["model"]]
