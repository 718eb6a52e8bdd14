"""A card computes what a CPU computes. Skipped without one; CTVLM_TEST_DEVICE=cpu runs the tests themselves anywhere.

What a card rounds otherwise is bounded: 1e-4 in float32 without TF32, 2e-2 in bfloat16, relative to the largest number.
"""
import os, signal, subprocess, sys
from dataclasses import replace
from pathlib import Path

import pytest, torch

import made_up
from ctvlm.core import InputError
from ctvlm.data import FeatureStore, embed_studies, phantom_studies, scan_key
from ctvlm.disease import disease_prompt_loss
from ctvlm.localization import localization_loss
from ctvlm.model import CTVLMConfig, CTVLMModel, ready_model
from ctvlm.phantoms import PhantomCohort
from ctvlm.prepared import PreparedEncoder
from ctvlm.preprocessing import make_windows
from ctvlm.siglip import siglip_loss
from ctvlm.training import TrainingConfig, effective_batch_backward, train

DEVICE = torch.device(os.environ.get("CTVLM_TEST_DEVICE", "cuda"))
CPU = torch.device("cpu")
CONFIG = TrainingConfig(epochs=3, effective_batch=6, learning_rate=1e-2, warmup_epochs=0.5,
                        localization=0.3, checkpoint_every=2, trackers=())
pytestmark = [pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="needs a GPU"),
              pytest.mark.filterwarnings("ignore:a model was saved without a tokenizer")]


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    "No TF32, and nothing drawn at random between two passes."
    monkeypatch.setattr("ctvlm.vision.random_factor", lambda: 1.)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False): yield   # matrix products have none by default


def close(found, true, eps=1e-4):
    found, true = found.detach().float().cpu(), true.detach().float().cpu()
    torch.testing.assert_close(found, true, rtol=0, atol=eps * max(1e-3, float(true.abs().max())))


def on(device, values): # a dictionary or list of tensors there, asking for gradients
    return [v.detach().to(device).requires_grad_(v.is_floating_point()) for v in values]


def pairs(n=12, width=32):
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.nn.functional.normalize(torch.randn(*shape, generator=g), dim=-1)
    return g, draw


def siglip(device):
    _, draw = pairs()
    inputs = on(device, [draw(12, 32), draw(12, 32), torch.tensor(2.3), torch.tensor(-4.)])
    return inputs, siglip_loss(*inputs)


def disease(device):
    g, draw = pairs()
    labels = torch.randint(-2, 2, (12, 5), generator=g).to(device)
    inputs = on(device, [draw(12, 32), draw(5, 2, 32), torch.tensor(2.3)])
    weight = torch.tensor([1., 2, 3, 4, 5], device=device)
    return inputs, disease_prompt_loss(inputs[0], inputs[1], labels, inputs[2], weight)


def places(device):
    g, draw = pairs()
    valid = (torch.arange(20) < torch.randint(12, 21, (12, 1), generator=g)).to(device)
    target = (torch.rand(12, generator=g) * 10).to(device)
    inputs = on(device, [draw(12, 20, 32), draw(12, 32)])
    return inputs, localization_loss(*inputs, target, valid)


@pytest.mark.parametrize("loss", [siglip, disease, places], ids=lambda f: f.__name__)
def test_losses_and_gradients(loss):
    (inputs, found), (there, true) = loss(DEVICE), loss(CPU)
    found.backward()
    true.backward()
    close(found, true, 1e-5)
    for a, b in zip(inputs, there):
        if b.grad is not None: close(a.grad, b.grad)


def gradients(device, keep, half=False):
    model = made_up.model(adapters={}).eval().to(device)
    batches = [made_up.batch(n, seed=n, windows=n == 2) for n in (4, 2, 3)]
    config = replace(CONFIG, text_tokens=64)
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        log = effective_batch_backward(model, batches, made_up.prompts(), config, 0, device, keep=keep)
    return log, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_cached_gradients(half):
    (log, cached), (_, plain) = gradients(DEVICE, 1, half), gradients(DEVICE, 1000, half)
    (_, true) = gradients(CPU, 1000)
    assert cached.keys() == plain.keys() == true.keys() and all(map(torch.isfinite, map(torch.tensor, log.values())))
    if half: # as a whole: a single small gradient may be mostly rounding
        a, b = (torch.cat([g[n].float().flatten() for n in sorted(g)]) for g in (cached, plain))
        assert float((a - b).norm() / b.norm()) < 2e-2
    else:
        for n in true:
            close(cached[n], plain[n])
            close(cached[n], true[n], 1e-3)


def test_answers_of_the_shipped_model():
    volume, texts = PhantomCohort(1, 7, spacing=(3., 3., 3.))[0].volume, ["pleural effusion", "cyst of the left kidney"]
    here, there = (ready_model(device) for device in (CPU, DEVICE))
    for a, b in zip(here.localize(volume, texts), there.localize(volume, texts)):
        assert abs(a.depth_mm - b.depth_mm) < 6                # bfloat16 there, perhaps not here
    for a, b in zip(here.classify(volume, texts), there.classify(volume, texts)):
        assert b.score == pytest.approx(a.score, abs=0.02)


def test_embeddings_of_base():
    torch.manual_seed(0)
    model = CTVLMModel(CTVLMConfig.base()).eval()
    windows, grid = torch.rand(2, 1, *model.config.window), (1, 1, 2)
    with torch.no_grad():
        true = model.encode_scan(windows, grid)
        found = model.to(DEVICE).encode_scan(windows, grid, chunk=1)
    close(found.scan, true.scan, 1e-3)
    close(found.slices, true.slices, 1e-3)


def test_resampling():
    volume = PhantomCohort(1, 7, spacing=(3., 3., 3.))[0].volume
    found, true = make_windows(volume, device=DEVICE), make_windows(volume)
    torch.testing.assert_close(found.windows.cpu(), true.windows, atol=2e-3, rtol=0)
    assert torch.equal(found.patch_mask.cpu(), true.patch_mask)


def test_features_of_an_archive(tmp_path):
    "Read by others, cut and encoded there, windows of several scans together: what a CPU makes of them one by one."
    studies = phantom_studies(PhantomCohort(3, 7, spacing=(3., 3., 3.)), quiet=True)
    stores = []
    for name, device in (("here", CPU), ("there", DEVICE)):
        made = embed_studies(studies, ready_model(device), tmp_path / name, workers=1, quiet=True)
        assert made["computed"] == 3
        stores.append(FeatureStore(tmp_path / name))
    for row in studies.itertuples():
        true, found = (store.load(scan_key(row)) for store in stores)
        for name in ("grid", "patch_mask", "bin_depths_mm"): assert torch.equal(found[name], true[name])
        for name in ("cls", "depth_tokens"): close(found[name], true[name], 2e-2)


def test_a_scan_without_bins_is_no_number():
    "A card is not asked before the loss is computed; a CPU refuses."
    S = torch.nn.functional.one_hot(torch.tensor([0, 1]), 4).float().to(DEVICE)
    given = S[:, None].expand(2, 3, 4), S, torch.zeros(2, device=DEVICE), torch.tensor([[True] * 3, [False] * 3], device=DEVICE)
    if DEVICE.type == "cpu":
        with pytest.raises(InputError, match="no valid depth bin"): localization_loss(*given)
    else: assert localization_loss(*given).isnan()


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_prepared_encoder(dtype, compiled):
    if compiled and DEVICE.type == "cpu": pytest.skip("compiling is for the card")
    from test_prepared import CASES, perturbed
    encoder, windows = perturbed(CASES[0][0]).to(DEVICE), torch.rand(7, 1, 32, 32, 16)
    with torch.no_grad(): true = encoder.features(windows.to(DEVICE))
    found = PreparedEncoder(encoder, dtype, compiled).features(windows, 3)
    for a, b in zip(found, true): close(a, b, 1e-4 if dtype == torch.float32 else 3e-2)


def test_evaluation_in_bfloat16():
    model = made_up.model().eval().to(DEVICE)
    b = made_up.batch(4, seed=1)
    with torch.no_grad():
        true = model.encode_features(b["cls"], b["depth_tokens"], b["grid"])
        with torch.autocast(DEVICE.type, torch.bfloat16):
            found = model.encode_features(b["cls"], b["depth_tokens"], b["grid"])
    close(torch.nn.functional.normalize(found.scan.float(), dim=-1), torch.nn.functional.normalize(true.scan, dim=-1), 5e-2)


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import made_up, torch
import ctvlm.vision
from dataclasses import replace
from ctvlm.training import train
from test_cuda import CONFIG
class Killed(made_up.Data):
    def steps(self, k):
        for batches in super().steps(k):
            yield batches
            if (self.epoch, self.at) == (1, 12): os.kill(os.getpid(), signal.SIGKILL)
train(made_up.model(adapters=dict()), Killed(), CONFIG, {folder!r})
"""


def test_killed_and_resumed(tmp_path, monkeypatch):
    monkeypatch.undo()                                    # chance is on: its state has to be resumed, too
    whole = made_up.model(adapters={})
    train(whole, made_up.Data(), CONFIG, tmp_path / "whole")
    script = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "run"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    resumed = made_up.model(adapters={})
    log = train(resumed, made_up.Data(), CONFIG, tmp_path / "run")
    assert log["step"].tolist() == list(range(1, 10))
    for (n, a), b in zip(whole.named_parameters(), resumed.parameters()): close(b, a, 1e-3)


def test_two_processes_on_one_card(tmp_path):
    "The launcher of many processes, over gloo: the same weights as one process."
    run = tmp_path / "run.py"
    run.write_text(f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
                   "import os, made_up, torch, ctvlm.vision\ntorch.distributed.init_process_group('gloo')\nfrom test_cuda import CONFIG\nfrom ctvlm.training import train\n"
                   "ctvlm.vision.random_factor = lambda: 1.\n"
                   "rank, world = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])\n"
                   f"train(made_up.model(), made_up.Data(rank=rank, world=world), CONFIG, {str(tmp_path / 'two')!r})\n")
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(run)]
    if DEVICE.type == "cuda": backend = {"ACCELERATE_TORCH_DEVICE": "cuda:0", "CUDA_VISIBLE_DEVICES": "0"}
    else: backend = {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([sys.executable, *words], env={**os.environ, **backend, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr[-2000:]
    one = made_up.model()
    train(one, made_up.Data(), CONFIG, tmp_path / "one")
    two = CTVLMModel.from_pretrained(tmp_path / "two" / "model")
    for (n, a), b in zip(one.named_parameters(), two.parameters()): close(b, a, 1e-3)
