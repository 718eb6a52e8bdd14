"The recipe of the model that ships: the same seed gives the same bytes, and it teaches what it says."
import hashlib, os, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMALL = dict(patients=24, judged=8, steps=40, windows=16, train=24, val=16, test=20, sentences=6, words=20, findings=40, scans=1, places=1)
slow = pytest.mark.skipif("CTVLM_SLOW" not in os.environ, reason="takes minutes: CTVLM_SLOW=1 runs it")


def trained(run, *more):
    "The recipe with small numbers; of each file of its result the SHA-256."
    command = [sys.executable, str(ROOT/"tools/train_tiny.py"), "--run", str(run), "--workers", "1"]
    for name, value in SMALL.items(): command += [f"--{name}", str(value)]
    done = subprocess.run([*command, *more], env=dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    files = [run/"result.json", *sorted((run/"model").iterdir())]
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@slow
def test_the_recipe_twice_gives_the_same_bytes(tmp_path):
    once, again = trained(tmp_path/"once"), trained(tmp_path/"again")
    assert {"model.safetensors", "config.json", "result.json"} <= once.keys()
    assert again == once
