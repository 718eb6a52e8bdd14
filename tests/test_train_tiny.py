"The recipe of the model that ships: the same seed gives the same bytes, and it teaches what it says."
import hashlib, importlib.util, os, subprocess, sys
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch

from ctvlm.vision import EncoderSizes, ScanEncoder

ROOT = Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("train_tiny", ROOT / "tools" / "train_tiny.py")
recipe = importlib.util.module_from_spec(SPEC)
sys.modules["train_tiny"] = recipe # its dataclass looks itself up
SPEC.loader.exec_module(recipe)

Q, NAMES = recipe.Q, len(recipe.NAMES)
SMALL = dict(patients=24, judged=8, steps=40, windows=16, train=24, val=16, test=20, sentences=6, words=20, findings=40, scans=1, places=1)
slow = pytest.mark.skipif("CTVLM_SLOW" not in os.environ, reason="takes minutes: CTVLM_SLOW=1 runs it")


def made_up(n=3, width=96):
    "Features of some scans of 2 x 2 x 3 windows with 4 depths, the last depth of the last window empty."
    torch.manual_seed(0)
    heads = {f"{part}.{what}": torch.randn(*((NAMES, width) if what == "weight" else (NAMES,)))
             for part in ("depth", "window") for what in ("weight", "bias")}
    rows = []
    for _ in range(n):
        mask = torch.ones(12, 4, dtype=torch.bool)
        mask[-1, -1] = False
        s = dict(cls=torch.randn(12, width), depth_tokens=torch.randn(12, 4, width), patch_mask=mask)
        rows.append(dict(cls=s["cls"], depth_tokens=s["depth_tokens"], held=mask, grid=(2, 2, 3), seen=recipe.suspicion(heads, s)))
    return heads, rows


def test_suspicion_is_the_most_that_a_head_says_of_a_depth():
    heads, rows = made_up(1)
    r = rows[0]
    for n, q in ((0, 0), (11, 5), (4, Q - 1)):
        each = r["depth_tokens"][n][r["held"][n]] @ heads["depth.weight"][q] + heads["depth.bias"][q]
        cls = r["cls"][n] @ heads["window.weight"][q] + heads["window.bias"][q]
        assert torch.allclose(r["seen"][n, q], torch.stack([each.max(), cls]), atol=1e-4)


def test_chances_follow_the_labels():
    torch.manual_seed(1)
    seen, labels = torch.randn(200, Q, 2), torch.zeros(200, Q, dtype=torch.long)
    labels[seen[..., 0] > 0] = 1
    labels[:20] = -1                                        # unknown
    chances = recipe.Chances(seen, labels)(seen)
    assert ((chances > .5).long() == (seen[..., 0] > 0).long()).float().mean() > .95


def test_a_part_of_a_scan_is_windows_side_by_side():
    _, rows = made_up(1)
    whole, sizes = rows[0] | dict(cls=torch.arange(12.)[:, None].expand(12, 96)), set()
    where = np.arange(12).reshape(2, 2, 3)
    for seed in range(40):
        part = recipe.part_of(whole, np.random.default_rng(seed))
        here = part["cls"][:, 0].int().tolist()
        low, high = (np.array([f(k) for k in np.nonzero(np.isin(where, here))]) for f in (min, max))
        box = where[tuple(slice(a, b + 1) for a, b in zip(low, high))]
        assert box.ravel().tolist() == here and part["grid"] == box.shape
        assert torch.equal(part["seen"], whole["seen"][here]) and torch.equal(part["held"], whole["held"][here])
        sizes.add(len(here))
    assert 12 in sizes and len(sizes) > 4


def test_the_scan_encoder_starts_from_what_the_heads_look_for():
    heads, rows = made_up()
    torch.manual_seed(2)
    encoder = ScanEncoder(EncoderSizes(width=96, depth=1, heads=4), pooling="max")
    recipe.look(encoder, rows, heads)
    with torch.no_grad(): x = torch.cat([encoder._tokens(r["cls"], r["depth_tokens"], r["held"]) for r in rows])
    assert x.mean(0).abs().max() < 1e-3 and (x.std(0) - 1).abs().max() < 1e-3
    said = torch.cat([.2 * r["cls"] @ heads["window.weight"].T +
                      (r["depth_tokens"] @ heads["depth.weight"].T).masked_fill(~r["held"][..., None], -1e9).amax(1) for r in rows])
    for q in (0, Q, NAMES - 1): assert np.corrcoef(x[:, q], said[:, q])[0, 1] > .999
    # slices start from the half that reads depths
    assert torch.equal(encoder.axis_patch_proj.weight, encoder.patch_proj.weight[:, 96:])


def test_labels_that_the_features_contradict_are_left_open():
    first, second = recipe.FINDINGS[:2]
    studies = pd.DataFrame(dict(labels=[{first: 1, second: 1}, {first: 0, second: 0}]))
    rows = [dict(seen=torch.full((3, Q, 2), 1.)), dict(seen=torch.full((3, Q, 2), -1.))]
    def chances(seen): # the second finding is never seen
        out = seen[..., 0].sigmoid()
        out[1] = 0.
        return out
    kept = recipe.agreed(studies, rows, chances).labels.tolist()
    assert kept == [{first: 1}, {first: 0, second: 0}]


def trained(run):
    "The recipe with small numbers; of each file of its result the SHA-256."
    command = [sys.executable, str(ROOT/"tools/train_tiny.py"), "--run", str(run), "--workers", "1"]
    for name, value in SMALL.items(): command += [f"--{name}", str(value)]
    alone = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(command, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    files = [run/"result.json", *sorted((run/"model").iterdir())]
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@slow
def test_the_recipe_twice_gives_the_same_bytes(tmp_path):
    once, again = trained(tmp_path/"once"), trained(tmp_path/"again")
    assert {"model.safetensors", "config.json", "result.json"} <= once.keys()
    assert again == once
