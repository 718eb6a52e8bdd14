"Many processes equal one: in the loss, in every gradient, in a whole training run."
import json, os, subprocess, sys, tempfile
from dataclasses import replace
from pathlib import Path

import pytest, torch, torch.distributed as dist
from torch import nn

import made_up
from ctvlm.core import InputError
from ctvlm.siglip import gather_rows, run_processes, siglip_loss, value_and_gradients
from ctvlm.training import TrainingConfig, effective_batch_backward, train

CUTS = {2: [[0, 6, 12], [0, 5, 12]], 4: [[0, 3, 6, 9, 12], [0, 5, 5, 11, 12]]}  # even; uneven, with a process that has nothing
STAGES = {"start": (10., -10.), "late": (100., -16.)}


def embeddings(stage):
    "Correlated, and all in one cone, as chest CTs are."
    g = torch.Generator().manual_seed(0)
    noise = lambda *size: torch.randn(*size, generator=g, dtype=torch.float64)
    common, shared = noise(12, 8), noise(1, 8)
    scale, bias = STAGES[stage]
    return common + shared + 0.5 * noise(12, 8), common + shared + 0.5 * noise(12, 8), torch.tensor(scale, dtype=torch.float64).log(), torch.tensor(bias, dtype=torch.float64)


def towers():
    torch.manual_seed(2)
    return nn.ModuleDict({"image": nn.Linear(8, 6), "text": nn.Linear(8, 6), "t": nn.ParameterList([nn.Parameter(torch.tensor(4.)), nn.Parameter(torch.tensor(-9.))])}).double()


class Both(nn.Module):
    "What DistributedDataParallel can wrap."
    def __init__(self): super().__init__(); self.towers = towers()
    def forward(self, x, y): return siglip_loss(self.towers["image"](x), self.towers["text"](y), *self.towers["t"], averaged=True)


def wrapped(rank, x, y):
    "Gradients that DistributedDataParallel leaves on the towers."
    model = nn.parallel.DistributedDataParallel(Both())
    loss = model(x, y); loss.backward()
    return [loss.detach(), *(p.grad for p in model.module.towers.parameters())]


def asked(rank, world):
    "Only the last process asks for a gradient on its texts, only the first for one on its scans: all make the same sums."
    z = embeddings("late")
    images, texts = (x[CUTS[world][0][rank]:CUTS[world][0][rank + 1]].clone() for x in z[:2])
    wanted = [x.requires_grad_() for x, r in ((images, 0), (texts, world - 1)) if rank == r]
    loss = siglip_loss(images, texts, *z[2:])
    with torch.no_grad(): without = siglip_loss(images, texts, *z[2:])
    return [loss.detach(), without, *torch.autograd.grad(loss, wanted)] if wanted else [loss, without]


CONFIG = TrainingConfig(epochs=2, effective_batch=12, learning_rate=1e-2, warmup_epochs=0.5, localization=0.3, checkpoint_every=100, trackers=())


def effective(batches, mask=False):
    "Log and gradients of an effective batch; in eval mode nothing is random."
    model, config = made_up.model().eval(), replace(CONFIG, mask_false_negatives=mask)
    log = effective_batch_backward(model, batches, made_up.prompts(), config, step=3, device=torch.device("cpu"))
    return log, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def trained(rank, world, folder):
    "Weights after two epochs, whose last steps are uneven (with 4 processes one has nothing); the rotary factor is switched off, since each process draws its own."
    import ctvlm.vision
    ctvlm.vision.random_factor = lambda: 1.
    model = made_up.model(seed=rank)                                   # process 0's weights are meant to win
    train(model, made_up.Data(22, rank=rank, world=world), CONFIG, folder)
    return {n: p.detach() for n, p in model.named_parameters()}


def fitted(rank, world, folder):
    "The bias that suits the first step, of which each process has its share."
    import ctvlm.training as t, ctvlm.vision
    ctvlm.vision.random_factor = lambda: 1.
    config = replace(CONFIG, start_bias="fit", effective_batch=22)
    run = t.Run(made_up.model(), made_up.Data(22, rank=rank, world=world), config, folder)
    t.fit_start(run, next(run.data.steps(1)))
    return run.model.b.detach()


def disagree(rank, world, folder):
    "What each process says when process 1 cannot read the checkpoint, and when it comes to other weights."
    import ctvlm.checkpoints, ctvlm.training as t
    t.train(made_up.model(), made_up.Data(22, rank=rank, world=world), replace(CONFIG, epochs=1), folder)
    (Path(folder)/"model").exists() and rank == 0 and (Path(folder)/"model").rename(Path(folder)/"first")
    said, places = [], ((ctvlm.checkpoints, "_sha256"), (t.Run, "take"))
    real = [getattr(place, name) for place, name in places]
    def unreadable(path): raise OSError(5, "Input/output error")
    def otherwise(run, weights): real[1](run, {n: w + 1e-3 for n, w in weights.items()})
    for (place, name), right, fault in zip(places, real, (unreadable, otherwise)):
        if rank == 1: setattr(place, name, fault)
        try: t.train(made_up.model(), made_up.Data(22, rank=rank, world=world), CONFIG, folder, extend=True)
        except InputError as e: said.append(str(e))
        setattr(place, name, right)
    return said


def everything(rank, world, folder):
    "All that one process contributes to the comparisons."
    out = {"siglip": {}, "gathered": {}}
    for stage in STAGES:
        z = embeddings(stage)
        for i, cuts in enumerate(CUTS[world]):
            mine = slice(cuts[rank], cuts[rank + 1])
            out["siglip"][stage, i] = value_and_gradients(siglip_loss, z[0][mine], z[1][mine], *z[2:])
    for i, cuts in enumerate(CUTS[world]):
        rows, first = gather_rows(torch.arange(24.).view(12, 2)[cuts[rank]:cuts[rank + 1]])
        out["gathered"][i] = rows, torch.tensor(first)
    out["asked"] = asked(rank, world)
    z, cuts = embeddings("late"), CUTS[world][1]
    out["wrapped"] = wrapped(rank, z[0][cuts[rank]:cuts[rank + 1]], z[1][cuts[rank]:cuts[rank + 1]])
    batches = [made_up.batch(n, seed=n, windows=n == 2) for n in (2, 3, 4)]
    for mask in (False, True):                                          # with 4 processes, the last has no scan at all
        out["effective", mask] = effective(batches[rank::world], mask)
    out["trained"] = trained(rank, world, folder)
    return out


@pytest.fixture(scope="module", params=[2, 4])
def processes(request):
    with tempfile.TemporaryDirectory() as folder: return run_processes(request.param, everything, folder)


def same(x, y, eps=1e-9): torch.testing.assert_close(x, y, rtol=eps, atol=eps)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("uneven", [0, 1])
def test_siglip(processes, stage, uneven):
    loss, gimg, gtxt, gt, gb = value_and_gradients(siglip_loss, *embeddings(stage))
    shares = [p["siglip"][stage, uneven] for p in processes]
    for share in shares: same(share[0], loss); same(share[3], gt); same(share[4], gb)
    same(torch.cat([s[1] for s in shares]), gimg); same(torch.cat([s[2] for s in shares]), gtxt)


def test_gradients_that_few_ask_for(processes): # planted fault, each process by its own flags: their sums do not match
    loss, gimg, gtxt, _, _ = value_and_gradients(siglip_loss, *embeddings("late"))
    shares = [p["asked"] for p in processes]
    for share in shares: same(share[0], loss); same(share[1], loss)
    cuts = CUTS[len(processes)][0]
    same(shares[0][2], gimg[:cuts[1]]); same(shares[-1][2], gtxt[cuts[-2]:])


def test_gathered_rows(processes):
    cuts = CUTS[len(processes)]
    for i in (0, 1):
        for rank, p in enumerate(processes):
            rows, first = p["gathered"][i]
            assert torch.equal(rows, torch.arange(24.).view(12, 2)) and int(first) == cuts[i][rank]


def test_under_data_parallel(processes):
    model = Both(); z = embeddings("late")
    loss = model(z[0], z[1]); loss.backward()
    for p in processes:
        for x, y in zip(p["wrapped"], [loss.detach(), *(p.grad for p in model.towers.parameters())], strict=True): same(x, y)


@pytest.mark.parametrize("mask", [False, True])
def test_effective_batch(processes, mask):
    world = len(processes)
    batches = [made_up.batch(n, seed=n, windows=n == 2) for n in (2, 3, 4)]
    log, gradients = effective([b for rank in range(world) for b in batches[rank::world]], mask)
    assert (log["siglip"] != effective(batches)[0]["siglip"]) == mask     # there was something to mask
    for p in processes:
        found, g = p["effective", mask]
        for name in log: assert found[name] == pytest.approx(log[name], rel=1e-5), name
        assert g.keys() == gradients.keys()
        for name in g: torch.testing.assert_close(g[name], gradients[name], rtol=1e-4, atol=1e-5 * max(1., float(gradients[name].abs().max())), msg=name)


def test_masking_wants_to_know_what_is_equal():
    without = {k: v for k, v in made_up.batch(3, seed=1).items() if k != "groups"}
    effective([without])
    with pytest.raises(InputError, match="without 'groups', expected two integers per scan"): effective([without], mask=True)


def test_training(processes, tmp_path, monkeypatch):
    import ctvlm.vision
    monkeypatch.setattr(ctvlm.vision, "random_factor", lambda: 1.)
    one = trained(0, 1, tmp_path)
    for p in processes[1:]:
        for name in one: assert torch.equal(p["trained"][name], processes[0]["trained"][name]), name   # processes agree to the bit
    for name in one: torch.testing.assert_close(processes[0]["trained"][name], one[name], rtol=1e-2, atol=1e-3, msg=name)


def test_a_fitted_start_does_not_depend_on_the_processes(tmp_path, monkeypatch):
    import ctvlm.vision
    monkeypatch.setattr(ctvlm.vision, "random_factor", lambda: 1.)
    one, two = fitted(0, 1, tmp_path), run_processes(2, fitted, str(tmp_path))
    assert two[0] == two[1] and one != made_up.model().b
    same(two[0], one, 1e-4)


def test_processes_that_disagree_stop(tmp_path):
    first, second = run_processes(2, disagree, str(tmp_path))
    assert first == second and len(first) == 2
    assert "process 1: checkpoint" in first[0] and "cannot be read now (Input/output error)" in first[0] and "different weights at step 2" in first[1]
    assert not (tmp_path/"model").exists() and len((tmp_path/"log.csv").read_text().splitlines()) == 3


@pytest.mark.skipif("CTVLM_SLOW" not in os.environ, reason="starts seven interpreters: CTVLM_SLOW=1 runs it")
@pytest.mark.parametrize("machines", [1, 2])
def test_accelerate_launch(tmp_path, machines):
    (tmp_path/"run.py").write_text("import os, sys\nimport made_up\nfrom test_distributed import CONFIG\nfrom ctvlm.training import train\n"
                                   "train(made_up.model(), made_up.Data(22, rank=int(os.environ['RANK']), world=int(os.environ['WORLD_SIZE'])), CONFIG, sys.argv[1])\n")
    here = Path(__file__).resolve().parent
    environment = os.environ | {"PYTHONPATH": f"{here}:{here.parent}", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", f"--num_machines={machines}", f"--num_processes={2 * machines}", "--main_process_ip=127.0.0.1", "--main_process_port=29617"]
    started = [subprocess.Popen([*command, f"--machine_rank={rank}", tmp_path/"run.py", tmp_path/"run"], env=environment) for rank in range(machines)]
    assert [p.wait(300) for p in started] == [0] * machines
    assert json.loads((tmp_path/"run"/"run.json").read_text())["processes"] == 2 * machines and (tmp_path/"run"/"model").is_dir()
