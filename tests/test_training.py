"Training: gradients that do not depend on how a batch is cut, and runs that survive anything."
import contextlib, errno, json, math, multiprocessing, os, random, re, resource, signal, time
from dataclasses import replace
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from safetensors.torch import load_file

import made_up
from ctvlm.core import InputError, seed_everything, stable_rng
from ctvlm.text import AdapterSizes
from ctvlm.training import (TrainingConfig, TrainingStopped, effective_batch_backward, fitted_bias, learning_rate_at, length_groups,
                            load_checkpoint, parameter_groups, save_checkpoint, train)

CPU = torch.device("cpu")
CONFIG = TrainingConfig(epochs=3, effective_batch=6, learning_rate=1e-2, warmup_epochs=0.5, localization=0.3, checkpoint_every=2, trackers=())
slow = pytest.mark.skipif("CTVLM_SLOW" not in os.environ, reason="takes minutes: CTVLM_SLOW=1 runs it")


pytestmark = pytest.mark.filterwarnings("ignore:a model was saved without a tokenizer")  # these have none


def about(folder):
    "What run.json holds, without the notice that all models of these tests deserve."
    found = json.loads((Path(folder)/"run.json").read_text())
    return found | {"warnings": {k: v for k, v in found["warnings"].items() if "without a tokenizer" not in k}}
def score(model): return {"score": -float(model.b), "scale": float(model.t)}
def weights(model): return {n: p.detach().clone() for n, p in model.named_parameters()}
def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# Gradient caching

@pytest.mark.parametrize("adapters", [None, {}], ids=["adapters with dropout", "whole text encoder"])
def test_cached_gradients_are_the_plain_ones(adapters):
    model = made_up.model(adapters=adapters).train()               # rotary augmentation is on, dropout where there are adapters
    config = replace(CONFIG, text_tokens=64)                       # many groups of texts
    batches = [made_up.batch(n, seed=n, windows=n == 2) for n in (4, 2, 3)]
    def gradients(once, step=7):
        model.zero_grad()
        log = effective_batch_backward(model, batches, made_up.prompts(), config, step, CPU, keep=1000 if once else 1)
        return log, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    (cached, g), (plain, h) = gradients(False), gradients(True)
    assert g.keys() == h.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name in g: torch.testing.assert_close(g[name], h[name], rtol=1e-5, atol=1e-5 * max(1., float(h[name].abs().max())), msg=name)
    for name in cached: assert cached[name] == pytest.approx(plain[name], rel=1e-5), name
    other = gradients(False, step=8)[1]                            # chance is on: another step draws otherwise
    assert max(float((g[n] - other[n]).abs().max()) for n in g if "scan_encoder" in n) > 1e-4


def test_one_micro_batch_is_embedded_once(monkeypatch):
    model, calls = made_up.model(), []
    encode = type(model).encode_features
    monkeypatch.setattr(type(model), "encode_features", lambda self, *a, **k: calls.append(torch.is_grad_enabled()) or encode(self, *a, **k))
    effective_batch_backward(model, [made_up.batch(3, 0)], made_up.prompts(), CONFIG, 0, CPU)
    assert calls == [True]
    effective_batch_backward(model, [made_up.batch(3, 0), made_up.batch(3, 1)], made_up.prompts(), CONFIG, 0, CPU)
    assert calls == [True, False, True, True]             # the last one is kept


def test_prompts_are_embedded_once_per_step(monkeypatch):
    model, texts = made_up.model(), []
    encode = type(model).encode_text
    monkeypatch.setattr(type(model), "encode_text", lambda self, ids, mask, head="report": texts.append((head, len(ids), torch.is_grad_enabled())) or encode(self, ids, mask, head))
    effective_batch_backward(model, [made_up.batch(3, s) for s in range(5)], made_up.prompts(), replace(CONFIG, siglip=0.), 0, CPU)
    for graph in (False, True): assert sum(n for head, n, g in texts if head == "report" and g is graph) == 2 * made_up.QUESTIONS


def live_bytes(micro_batches, snippets=None):
    "Most bytes that autograd holds at once during an effective batch."
    model, now, most = made_up.model(), {}, [0]
    class Held:
        def __init__(self, x): self.x = x; now[id(self)] = x.numel() * x.element_size(); most[0] = max(most[0], sum(now.values()))
        def __del__(self): now.pop(id(self), None)
    batches = [made_up.batch(2, seed=1) for _ in range(micro_batches)]
    if snippets:
        many = made_up.batch(snippets - 1, seed=2)
        for b in batches: b |= {k: many[k] for k in ("snippet_ids", "snippet_mask")} | dict(snippet_scan=torch.arange(snippets) % 2, snippet_bin=torch.full((snippets,), 3.))
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda h: h.x):
        effective_batch_backward(model, batches, made_up.prompts(), replace(CONFIG, text_tokens=64), 0, CPU)
    return most[0]


def test_memory_does_not_depend_on_the_effective_batch():
    one, few, many = live_bytes(1), live_bytes(2), live_bytes(12)
    assert many < 1.2 * few and one < 1.8 * few, (one, few, many)


def test_memory_does_not_depend_on_the_snippets():
    few, many = live_bytes(2, 10), live_bytes(2, 200)
    assert many < 1.5 * few, (few, many)


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for on in (False, True):
        model = made_up.model(adapters={}).train()
        if on: getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()   # transformers 5 renamed it
        effective_batch_backward(model, [made_up.batch(3, s) for s in (1, 2)], made_up.prompts(), replace(CONFIG, text_tokens=64), 3, CPU)
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for n, g in gradients[0].items(): torch.testing.assert_close(g, gradients[1][n], rtol=1e-5, atol=1e-6 * max(1., float(g.abs().max())))


# One step against another implementation

def plain_losses(model, batches, prompts, config):
    "The three losses from their formulas, one graph, nothing shared with the package."
    unit = lambda x: x / x.norm(dim=-1, keepdim=True)
    encode = lambda ids, mask, head: unit(torch.cat([model.encode_text(i[m.bool()][None], m[m.bool()][None], head=head) for i, m in zip(ids, mask)]))
    scans = [model.encode_features(b["cls"], b["depth_tokens"], b["grid"]) for b in batches]
    reports = [r for b in batches for r in zip(b["report_ids"], b["report_mask"])]
    long = torch.tensor([int(m.sum()) >= config.shortest_report for _, m in reports])
    x, y = unit(torch.cat([s.scan for s in scans]))[long], encode(*zip(*reports), "report")[long]
    logits = model.t.exp() * x @ y.T + model.b
    siglip = (torch.log1p((-logits.diagonal()).exp()).sum() + torch.log1p(logits.exp()).sum() - torch.log1p(logits.diagonal().exp()).sum()) / len(x)
    p = encode(prompts["ids"].flatten(0, 2), prompts["mask"].flatten(0, 2), "report").view(-1, 2, x.shape[1])
    share, labels = torch.sigmoid(model.t.exp() * unit(torch.cat([s.disease for s in scans])) @ (p[:, 0] - p[:, 1]).T), torch.cat([b["labels"] for b in batches])
    terms = prompts["question_weight"] * torch.where(labels == 1, -prompts["pos_weight"] * share.log(), -(1 - share).log())
    each = []
    for b, s in zip(batches, scans):
        for scan, place, snippet in zip(b["snippet_scan"], b["snippet_bin"], encode(b["snippet_ids"], b["snippet_mask"], "snippet")):
            cos = unit(s.slices[scan][s.valid[scan]]) @ snippet
            target = torch.softmax(-(torch.arange(len(cos), dtype=cos.dtype) - place)**2 / (2 * config.sigma**2), 0)
            each.append(-(target * torch.log_softmax(cos / config.tau, 0)).sum())
    known = (labels >= 0) + config.silence * (labels == -2).to(terms)                      # silence is a weak denial
    return dict(siglip=siglip, disease=(known * terms).sum() / known.sum(), localization=torch.stack(each).mean())


def plain_step(model, batches, prompts, config):
    "Weights after one step of AdamW with clipping, layer-wise factors and the first rate of the warm-up, all by hand."
    losses = plain_losses(model, batches, prompts, config)
    sum(getattr(config, k) * v for k, v in losses.items()).backward()
    trained = {n: p for n, p in model.named_parameters() if p.grad is not None}
    norm = sum(float((p.grad**2).sum()) for p in trained.values())**0.5
    for n, p in trained.items():
        inside = re.match(r"(scan_encoder|text_encoder\.model|window_encoder)\.(?:(?:blocks|layers)\.(\d)\.)?(norm\b)?", n)
        depth = 0 if not inside or inside.group(3) else 2 - int(inside.group(2)) if inside.group(2) else 3          # two blocks in each
        g, rate = p.grad * min(1., config.clip / norm), config.learning_rate / 2 * config.layer_decay**depth
        matrix = sum(k > 1 for k in p.shape) > 1 and "norm" not in n.lower() and "bias" not in n
        with torch.no_grad(): p.copy_(p * (1 - rate * config.weight_decay * matrix) - rate * g / (g.abs() + 1e-8))  # the first step of Adam is g / |g|
    return {n: p.detach() for n, p in model.named_parameters()}


FAULTS = {"none": {}, "weight of the disease loss": dict(disease=1.), "weight of localization": dict(localization=1.), "clipping": dict(clip=1e-9), "layer-wise factor": dict(layer_decay=1.),
          "weight decay": dict(weight_decay=0.), "short reports": dict(shortest_report=1), "silence": dict(silence=0.), "pos_weight": "pos_weight", "question_weight": "question_weight", "share of the snippets": "share"}

@pytest.mark.parametrize("fault", FAULTS)
def test_one_step_is_the_plain_one(tmp_path, monkeypatch, nothing_random, fault):
    config = replace(CONFIG, epochs=1, effective_batch=9, warmup_epochs=2., clip=0.5, weight_decay=0.1, text_tokens=64, shortest_report=12, checkpoint_every=1)
    data, plain = made_up.Data(9), made_up.Data(9)
    for d in (data, plain): d.prompts = {k: v[:, :1] if k in ("ids", "mask") else v for k, v in d.prompts.items()}   # one phrasing: none is drawn
    expected = plain_step(made_up.model().double().eval(), next(plain.steps(1)), plain.prompts, config)
    if FAULTS[fault] == "share":
        import ctvlm.effective_batch as e
        real = e.localization_loss
        monkeypatch.setattr(e, "localization_loss", lambda slices, *a, **k: real(slices, *a, **k) / len(slices))
    elif isinstance(FAULTS[fault], str): data.prompts[fault] = None
    else: config = replace(config, **FAULTS[fault])
    model = made_up.model().double()
    train(model, data, config, tmp_path)
    begin = weights(made_up.model().double())
    moved = {n: float((expected[n] - begin[n]).abs().max()) for n in expected}
    off = max(float((p.detach() - expected[n]).abs().max()) / moved[n] for n, p in model.named_parameters() if moved[n] > 0)
    assert (off < 1e-4) == (fault == "none"), off


@pytest.mark.parametrize("silence", [0., 0.3])
def test_present_findings_weigh_by_the_labels_of_the_training_set(silence): # and by what silence weighs
    labels = torch.tensor([[1, 1, 1], [0, 0, -2], [0, -2, -2], [-1, -2, -2], [-2, -1, -1]])
    given = {k: v for k, v in made_up.prompts().items() if k != "pos_weight"}
    losses = []
    for more in (dict(labels=labels), dict(pos_weight=torch.tensor([2 + silence, 1 + 2 * silence, 3 * silence])), dict(pos_weight=torch.tensor([2., 1., 0.]))):
        losses.append(effective_batch_backward(made_up.model(), [made_up.batch(6, 0)], given | more, replace(CONFIG, silence=silence), 0, CPU)["disease"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and (abs(losses[0] - losses[2]) > 1e-4) == (silence > 0), losses


def test_short_reports_are_left_out():
    batch = made_up.batch(4, seed=0)
    batch["report_mask"] = (torch.arange(24) < torch.tensor([[10], [11], [24], [5]])).long()
    log = effective_batch_backward(made_up.model(), [batch], made_up.prompts(), CONFIG, 0, CPU)
    assert (log["scans"], log["pairs"]) == (4, 2)


def test_nothing_to_learn_from():
    batch = made_up.batch(2, seed=0)
    batch |= dict(labels=torch.full((2, 3), -1), report_mask=torch.zeros_like(batch["report_mask"]))
    batch |= {k: batch[k][:0] for k in batch if k.startswith("snippet")}
    model = made_up.model()
    log = effective_batch_backward(model, [batch], made_up.prompts(), CONFIG, 0, CPU)
    assert log["siglip"] == log["disease"] == log["localization"] == log["pairs"] == log["snippets"] == 0
    assert all(p.grad is None or float(p.grad.abs().max()) == 0 for p in model.parameters())


def test_length_groups_hold_every_text_once():
    rows = [torch.arange(n) + 1 for n in np.random.default_rng(0).integers(1, 90, 200)]
    groups = length_groups(rows, 256)
    assert sorted(i for g, _, _ in groups for i in g) == list(range(200))
    for g, ids, mask in groups:
        assert ids.numel() <= 256
        for i, row, m in zip(g, ids, mask): assert torch.equal(row[m.bool()], rows[i])
    assert sum(ids.numel() for _, ids, _ in groups) < 1.12 * sum(map(len, rows))


# Optimiser

def test_groups_and_schedule():
    model = made_up.model()
    groups = parameter_groups(model, CONFIG)
    assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in model.parameters())
    assert {p.squeeze().ndim > 1 for g in groups if g["weight_decay"] for p in g["params"]} == {True}
    scale = {id(p): g["scale"] for g in groups for p in g["params"]}
    encoder = model.window_encoder
    assert [scale[id(p)] for p in (encoder.norm.weight, encoder.blocks[1].attn.q.weight, encoder.blocks[0].attn.q.weight, encoder.cls_token)] == pytest.approx([1, 0.9, 0.81, 0.729])
    rates = [learning_rate_at(s, 100, 10, TrainingConfig()) for s in range(100)]
    assert rates[9] == max(rates) == 2e-4 and rates[0] == pytest.approx(2e-5) and rates[-1] == pytest.approx(1e-6)
    assert all(a < b for a, b in zip(rates[:9], rates[1:10])) and all(a > b for a, b in zip(rates[9:], rates[10:]))


def test_frozen_parts_stay(tmp_path):
    model = made_up.model(); before = weights(model)
    train(model, made_up.Data(), replace(CONFIG, epochs=1, frozen=("window_encoder", "scan_encoder.blocks")), tmp_path)
    for name, p in weights(model).items():
        assert torch.equal(p, before[name]) == name.startswith(("window_encoder.", "scan_encoder.blocks.")), name


def test_frozen_parts_are_in_use_while_others_train(tmp_path):
    model, modes = made_up.model(), []
    def looked(part, name): part.register_forward_pre_hook(lambda m, _: modes.append((name, m.training)))
    looked(model.scan_encoder.blocks[0], "frozen")
    looked(model.report_head, "trained")
    train(model, made_up.Data(), replace(CONFIG, epochs=1, frozen=("scan_encoder",)), tmp_path)
    assert set(modes) == {("frozen", False), ("trained", True)}


def test_training_learns(tmp_path):
    class Same(made_up.Data):
        def one(self, i): return made_up.batch(1, seed=i % 3)
    log = train(made_up.model(), Same(), replace(CONFIG, epochs=12, learning_rate=3e-3, effective_batch=3, localization=1., sigma=0.5), tmp_path)
    for loss in ("siglip", "disease", "localization"): assert log[loss].iloc[-1] < 0.85 * log[loss].iloc[0], log[loss]
    assert (log["scale"].iloc[-1], log["bias"].iloc[-1]) != (10, -10)


def test_log_best_and_average(tmp_path):
    seen = []
    def evaluate(model): seen.append(weights(model)); return {"score": [1., 3., 2.][len(seen) - 1], "other": 5}
    model = made_up.model()
    log = train(model, made_up.Data(), replace(CONFIG, ema=0.9, trackers=("tensorboard",)), tmp_path, evaluate)
    assert log["step"].tolist() == list(range(1, 10)) and log["epoch"].tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert {"siglip", "disease", "localization", "grad_siglip", "grad_disease", "grad_localization", "grad_norm", "scale", "bias", "learning_rate", "scans_per_second", "memory_mib"} <= set(log)
    assert pd.read_csv(tmp_path/"evaluation.csv")["score"].tolist() == [1, 3, 2]
    best, final = ({k: v for k, v in load_file(tmp_path/name/"model.safetensors").items() if k in seen[0]} for name in ("best", "model"))
    assert equal(best, seen[1])                                                    # the best, with averaged weights
    assert equal(final, seen[2]) and not equal(final, weights(model))              # the model in hand has the last weights
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    found = [EventAccumulator(str(p.parent)).Reload().Tags()["scalars"] for p in tmp_path.rglob("events.out.tfevents*")]
    assert {"log/loss", "log/grad_disease", "log/scale", "log/bias", "log/learning_rate", "log/scans_per_second", "log/memory_mib", "evaluation/score"} <= {t for tags in found for t in tags}


@pytest.mark.parametrize("when", ["init_trackers", "log"])
def test_a_tracker_that_fails_is_dropped(tmp_path, monkeypatch, capsys, when):
    from accelerate import Accelerator
    tries = []
    def fail(*args, **kw): tries.append(1); raise RuntimeError("not logged in")
    monkeypatch.setattr(Accelerator, when, fail)
    log = train(made_up.model(), made_up.Data(), replace(CONFIG, epochs=1, trackers=("tensorboard",)), tmp_path)
    assert re.search(r"no tracking: .*not logged in.*log\.csv is written all the same", capsys.readouterr().out)
    assert about(tmp_path)["warnings"] == {"no tracking": 1}
    assert len(log) == 3 and len(tries) == 1


def test_bf16_trains(tmp_path):
    log = train(made_up.model(), made_up.Data(), replace(CONFIG, epochs=1, precision="bf16"), tmp_path/"bf16")
    exact = train(made_up.model(), made_up.Data(), replace(CONFIG, epochs=1), tmp_path/"no")
    assert log["loss"].iloc[0] == pytest.approx(exact["loss"].iloc[0], rel=0.03) and log["loss"].iloc[0] != exact["loss"].iloc[0]


def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    class Broken(made_up.Data):
        def steps(self, k):
            for batches in super().steps(k):
                if (self.epoch, self.at) == (1, 12): batches[0]["cls"][:] = torch.nan
                yield batches
    model = made_up.model()
    with pytest.raises(TrainingStopped, match=r"step 5: loss nan .*step-00000004"): train(model, Broken(), CONFIG, tmp_path)
    assert all(p.isfinite().all() for p in model.parameters())
    assert load_checkpoint(tmp_path/"checkpoints")[0] == 4


def test_divergence_stops_and_the_remedy_works(tmp_path, monkeypatch):
    wild = replace(CONFIG, learning_rate=30., warmup_epochs=0, clip=1e6, layer_decay=1.)
    with pytest.raises(TrainingStopped, match="lower learning_rate"): train(made_up.model(), made_up.Data(), wild, tmp_path/"wild")
    import ctvlm.training
    real, calls = ctvlm.training.effective_batch_backward, []
    def rises(*args, **kw): calls.append(1); return real(*args, **kw) | ({"siglip": 1e6} if len(calls) > 4 else {})
    monkeypatch.setattr(ctvlm.training, "effective_batch_backward", rises)
    with pytest.raises(TrainingStopped, match="step 6.*step-00000004: go on from there with a lower learning_rate and --extend"):
        train(made_up.model(), made_up.Data(), CONFIG, tmp_path/"run")
    monkeypatch.setattr(ctvlm.training, "effective_batch_backward", real)
    calm = replace(CONFIG, learning_rate=1e-4)
    with pytest.raises(InputError, match="learning_rate was 0.01, is 0.0001.*extend=True"): train(made_up.model(), made_up.Data(), calm, tmp_path/"run")
    log = train(made_up.model(), made_up.Data(), calm, tmp_path/"run", extend=True)
    assert log["step"].tolist() == list(range(1, 10)) and log["learning_rate"].iloc[4:].max() <= 1e-4
    assert about(tmp_path/"run")["history"][-1]["changed"] == {"learning_rate": [0.01, 1e-4]}


@pytest.mark.parametrize("losses, stops", [([237, 40] + 30 * [8] + [200, 200], 34),       # far below the first loss, far above what was reached
                                           ([237, 40] + 30 * [8] + [200] + 20 * [8], None), # a single odd one
                                           ([8] + [8 * 1.3**i for i in range(40)], 12),     # drifting away
                                           (20 * [2000] + 20 * [5] + [math.nan], 41)], ids=["after a bad start", "one odd step", "drift", "nan"])
def test_the_guard(tmp_path, monkeypatch, losses, stops):
    given = iter(losses)
    monkeypatch.setattr("ctvlm.training.effective_batch_backward", lambda *a, **k: {"siglip": next(given), "scans": 1})
    config = replace(CONFIG, epochs=len(losses), effective_batch=1, checkpoint_every=10**6)
    if stops is None: train(made_up.model(), made_up.Data(1), config, tmp_path)
    else:
        with pytest.raises(TrainingStopped, match=f"stopped at step {stops}:"): train(made_up.model(), made_up.Data(1), config, tmp_path)


# Nothing lost

@contextlib.contextmanager
def killed_at(event):
    "Kill this process with SIGKILL at its n-th step, write, sync or rename; -1 counts them."
    count, real = [0], {"fsync": os.fsync, "replace": os.replace, "rename": os.rename, "save": torch.save, "step": torch.optim.AdamW.step}
    def tick():
        if count[0] == event: os.kill(os.getpid(), signal.SIGKILL)
        count[0] += 1
    def wrap(f):
        def g(*args, **kw): tick(); out = f(*args, **kw); tick(); return out
        return g
    def half_save(state, file):
        real["save"](state, file); file.flush()
        if count[0] == event: os.truncate(file.name, file.tell() // 2)              # killed in the middle of writing
        tick()
    os.fsync, os.replace, os.rename, torch.save, torch.optim.AdamW.step = *(wrap(real[k]) for k in ("fsync", "replace", "rename")), half_save, wrap(real["step"])
    try: yield count
    finally: os.fsync, os.replace, os.rename, torch.save, torch.optim.AdamW.step = (real[k] for k in ("fsync", "replace", "rename", "save", "step"))


def child(folder, event=-1, delay=None, limit=resource.RLIM_INFINITY):
    "One process of training, whose files may have `limit` bytes; its final weights and events go to files."
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    with open(f"{folder}.out", "a") as out, contextlib.redirect_stdout(out), killed_at(event) as count:
        model = made_up.model(adapters=None)                                        # dropout and rotary augmentation are on
        class Slow(made_up.Data):
            def steps(self, k):
                for batches in super().steps(k): time.sleep(2 * (delay or 0)); yield batches
        train(model, Slow(), replace(CONFIG, ema=0.9), folder, score)
        with open(f"{folder}.pt", "wb") as f: torch.save(weights(model), f)
        Path(f"{folder}.events").write_text(str(count[0]))


@pytest.fixture(scope="module")
def processes():
    "Starts processes in a second, because the libraries are loaded already."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["made_up", "ctvlm.training", "accelerate", "pandas"])
    def start(*args):
        p = context.Process(target=child, args=args)
        p.start(); return p
    return start


@pytest.fixture(scope="module")
def uninterrupted(processes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")/"run"
    p = processes(str(folder)); p.join(); assert p.exitcode == 0
    return load_run(folder) | {"events": int(Path(f"{folder}.events").read_text()), "state_bytes": max(folder.glob("checkpoints/step-*/state.pt")).stat().st_size}


def load_run(folder):
    "What a finished run leaves."
    drop = ["seconds", "scans_per_second", "memory_mib", "waited"]
    return {"weights": torch.load(f"{folder}.pt", weights_only=True), "model": load_file(Path(folder)/"model"/"model.safetensors"), "best": load_file(Path(folder)/"best"/"model.safetensors"),
            "log": pd.read_csv(Path(folder)/"log.csv").drop(columns=drop), "evaluation": pd.read_csv(Path(folder)/"evaluation.csv")}


def kill_and_resume(processes, folder, events, whole):
    "Killed at each of `events` in turn, then left in peace: everything is as in the uninterrupted run."
    for event in events:
        p = processes(str(folder), event); p.join()
        assert p.exitcode == -signal.SIGKILL, f"was not killed at event {event}"
    p = processes(str(folder)); p.join(); assert p.exitcode == 0
    run = load_run(folder)
    for name in ("weights", "model", "best"): assert equal(run[name], whole[name]), (name, events)
    for name in ("log", "evaluation"): pd.testing.assert_frame_equal(run[name], whole[name])
    assert not list(Path(folder).rglob(".*.tmp")), "something half-written was left"


@pytest.mark.parametrize("run", ["one", "other"])
def test_killed_at_ten_moments(processes, uninterrupted, tmp_path, run):
    moments = stable_rng(0, "kill", run).integers(uninterrupted["events"] // 5, size=5).tolist()        # of what is left of the run each time
    kill_and_resume(processes, tmp_path/run, moments, uninterrupted)


@slow
@pytest.mark.parametrize("i", range(50))
def test_killed_at_any_moment(processes, uninterrupted, tmp_path, i):
    kill_and_resume(processes, tmp_path/"run", [int(stable_rng(2, i).integers(uninterrupted["events"]))], uninterrupted)


@slow
@pytest.mark.parametrize("i", range(10))
def test_killed_from_outside(processes, uninterrupted, tmp_path, i):
    folder = tmp_path/"run"
    p = processes(str(folder)); time.sleep(float(stable_rng(1, i).uniform(0.2, 3))); os.kill(p.pid, signal.SIGKILL); p.join()
    kill_and_resume(processes, folder, [], uninterrupted)


def test_sigterm_saves_and_leaves(processes, uninterrupted, tmp_path):
    folder = tmp_path/"run"
    p = processes(str(folder), -1, 0.15)
    log = folder/"log.csv"
    while not (log.exists() and log.read_text().count("\n") >= 3): time.sleep(0.05); assert p.is_alive()
    os.kill(p.pid, signal.SIGTERM); p.join()
    assert p.exitcode == 143
    said = Path(f"{folder}.out").read_text()
    assert "asked to leave: saved after step" in said
    step = int(said.split("after step ")[1].split()[0])
    assert load_checkpoint(folder/"checkpoints")[0] == step == pd.read_csv(log)["step"].max() < 9
    kill_and_resume(processes, folder, [], uninterrupted)


class Drawing(made_up.Data):
    "Scans are made noisier from the generators of the process, which a checkpoint takes along; step `end` is never reached."
    def __init__(self, end=None): super().__init__(); self.end = end
    def one(self, i):
        b = super().one(i)
        return b | dict(cls=b["cls"] + torch.randn(1).half() + np.random.rand() + random.random())
    def steps(self, k):
        for n, batches in enumerate(super().steps(k)):
            if (self.epoch, n) == self.end: raise KeyboardInterrupt
            yield batches


def test_draws_of_the_data_go_on_where_they_were(tmp_path):
    whole, model = made_up.model(), made_up.model()
    seed_everything(0)
    train(whole, Drawing(), CONFIG, tmp_path/"whole")
    seed_everything(0)
    with pytest.raises(KeyboardInterrupt): train(model, Drawing(end=(1, 2)), CONFIG, tmp_path/"run")   # after step 5
    again = made_up.model()
    train(again, Drawing(), CONFIG, tmp_path/"run")
    assert equal(weights(again), weights(whole))


def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys):
    whole = made_up.model(); train(whole, made_up.Data(), CONFIG, tmp_path/"whole")
    model = made_up.model(); train(model, made_up.Data(), CONFIG, tmp_path/"run")
    newest, before = sorted((tmp_path/"run"/"checkpoints").glob("step-*"))[::-1]
    with open(newest/"model.safetensors", "r+b") as f: f.seek(-5, 2); f.write(b"\0\1\2\3\4")
    capsys.readouterr()
    again = made_up.model(); train(again, made_up.Data(), CONFIG, tmp_path/"run")
    said = capsys.readouterr().out
    assert f"checkpoint {newest} is damaged (model.safetensors has changed" in said and f"continuing after step {int(before.name[5:])}" in said
    assert equal(weights(again), weights(whole)) and about(tmp_path/"run")["warnings"] == {"damaged checkpoint": 1}
    assert sorted(p.name for p in (tmp_path/"run"/"checkpoints").iterdir()) == [f"damaged-{newest.name}", before.name, newest.name]      # the sound one is not deleted


def test_a_disk_that_does_not_answer_is_no_damage(tmp_path, monkeypatch):
    for step in (1, 2): save_checkpoint(tmp_path, step, {"w": torch.ones(2)}, {"step": step})
    def fails(path): raise OSError(errno.EIO, "Input/output error")
    monkeypatch.setattr("ctvlm.checkpoints._sha256", fails)
    with pytest.raises(InputError, match="step-00000002 cannot be read now .Input/output error."): load_checkpoint(tmp_path, print)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", ["empty", "missing", "no json", "code"])
def test_every_kind_of_damage(tmp_path, damage):
    for step in (1, 2): save_checkpoint(tmp_path, step, {"w": torch.ones(2)}, {"step": step})
    newest = tmp_path/"step-00000002"
    if damage == "empty": (newest/"state.pt").write_bytes(b"")
    if damage == "missing": (newest/"model.safetensors").unlink()
    if damage == "no json": (newest/"checkpoint.json").write_text("{")
    if damage == "code":                                                             # sums are right, but it wants to run something
        import hashlib
        torch.save({"f": os.path.join}, newest/"state.pt")
        about = json.loads((newest/"checkpoint.json").read_text())
        about["sha256"]["state.pt"] = hashlib.sha256((newest/"state.pt").read_bytes()).hexdigest()
        (newest/"checkpoint.json").write_text(json.dumps(about))
    said = []
    assert load_checkpoint(tmp_path, said.append)[0] == 1 and "falling back" in said[0]


@pytest.mark.parametrize("where", ["model", "state", "sync"])
def test_a_full_disk_costs_a_checkpoint_not_the_run(tmp_path, monkeypatch, capsys, where):
    import safetensors.torch
    full = [False]
    def or_full(f):
        def g(*a, **k):
            if full[0] and len(list((tmp_path/"run"/"checkpoints").glob(".step-00000004*"))): raise OSError(errno.ENOSPC, "No space left on device")
            return f(*a, **k)
        return g
    for owner, name in {"model": [(safetensors.torch, "save_file")], "state": [(torch, "save")], "sync": [(os, "fsync")]}[where]: monkeypatch.setattr(owner, name, or_full(getattr(owner, name)))
    full[0] = True
    model = made_up.model(); train(model, made_up.Data(), CONFIG, tmp_path/"run")
    said = capsys.readouterr().out
    assert "could not write the checkpoint" in said and "no space is left" in said and "last good checkpoint is step-00000003" in said
    assert about(tmp_path/"run")["warnings"] == {"could not write the checkpoint": 1}
    assert sorted(p.name for p in (tmp_path/"run"/"checkpoints").iterdir()) == ["step-00000008", "step-00000009"]     # nothing half-written is left
    whole = made_up.model(); train(whole, made_up.Data(), CONFIG, tmp_path/"whole")
    assert equal(weights(model), weights(whole))


def test_the_system_refuses_to_write(processes, uninterrupted, tmp_path):
    p = processes(str(tmp_path/"run"), -1, None, uninterrupted["state_bytes"] - 5000); p.join()     # room for the model, not for the optimiser's state
    assert p.exitcode == 0 and "could not write the checkpoint: " in Path(f"{tmp_path/'run'}.out").read_text()
    assert equal(load_run(tmp_path/"run")["weights"], uninterrupted["weights"]) and not list((tmp_path/"run"/"checkpoints").iterdir())


def test_a_full_disk_costs_the_best_model_not_the_run(tmp_path, monkeypatch, capsys):
    import ctvlm.training
    from safetensors import SafetensorError
    real, scores = ctvlm.training.write_model, iter([1., 3., 2.])
    def full_at_three(model, folder):
        if Path(folder).name == "best" and len(pd.read_csv(tmp_path/"log.csv")) == 6: raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        real(model, folder)
    monkeypatch.setattr(ctvlm.training, "write_model", full_at_three)
    model = made_up.model(); train(model, made_up.Data(), CONFIG, tmp_path, lambda m: {"score": next(scores)})
    assert "could not write the best model" in capsys.readouterr().out
    best = load_file(tmp_path/"best"/"model.safetensors")
    assert all(torch.equal(best[k], v) for k, v in weights(model).items() if k in best)             # the third score, 2, is the best of what could be written


def test_sums_in_a_fixed_order():
    from ctvlm.training import same_bytes
    which, rows = torch.randint(0, 50, (200_000,), generator=torch.Generator().manual_seed(0)), torch.randn(200_000, 8, generator=torch.Generator().manual_seed(1))
    def gathered():
        table = torch.zeros(50, 8, requires_grad=True)
        (table[which] * rows).sum().backward()
        return table.grad
    before, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with same_bytes(CPU): first = gathered(); assert all(torch.equal(first, gathered()) for _ in range(5))
    finally: torch.set_num_threads(threads)
    assert torch.are_deterministic_algorithms_enabled() == before


def test_other_settings_are_refused(tmp_path):
    train(made_up.model(), made_up.Data(), replace(CONFIG, epochs=1), tmp_path)
    with pytest.raises(InputError, match="epochs was 1, is 3; learning_rate was 0.01, is 0.02"): train(made_up.model(), made_up.Data(), replace(CONFIG, learning_rate=0.02), tmp_path)
    with pytest.raises(InputError, match="scans was 18, is 24"): train(made_up.model(), made_up.Data(24), replace(CONFIG, epochs=1), tmp_path)
    with pytest.raises(InputError, match="trained parameters"): train(made_up.model(projection_dim=8), made_up.Data(), replace(CONFIG, epochs=1), tmp_path)
    assert len(train(made_up.model(), made_up.Data(), replace(CONFIG, epochs=1), tmp_path)) == 3       # the same again: done already


def test_misuse(tmp_path):
    with pytest.raises(InputError, match="no data"): train(made_up.model(), made_up.Data(0), CONFIG, tmp_path/"a")
    with pytest.raises(InputError, match="'score'"): train(made_up.model(), made_up.Data(), CONFIG, tmp_path/"b", lambda m: {"auc": 1.})
    with pytest.raises(InputError, match="no part of the model is called 'vision'"): train(made_up.model(), made_up.Data(), replace(CONFIG, frozen=("vision",)), tmp_path/"c")


# The same run, or none

def test_another_frozen_encoder_is_refused(tmp_path):
    frozen = replace(CONFIG, frozen=("window_encoder",))
    train(made_up.model(), made_up.Data(), replace(frozen, epochs=1), tmp_path)
    foreign = made_up.model()
    with torch.no_grad(): foreign.window_encoder.norm.bias += 1e-3
    with pytest.raises(InputError, match="frozen parameters was"): train(foreign, made_up.Data(), frozen, tmp_path, extend=True)
    train(made_up.model(), made_up.Data(), frozen, tmp_path, extend=True)


@pytest.fixture
def nothing_random(monkeypatch): monkeypatch.setattr("ctvlm.vision.random_factor", lambda: 1.)


class Cut(made_up.Data):
    "Data that ends like a run out of memory, in the middle of an epoch."
    def steps(self, k):
        for batches in super().steps(k):
            yield batches
            if (self.epoch, self.at) == (1, 12): raise MemoryError


def test_a_smaller_batch_size_goes_on_with_the_same_scans(tmp_path, nothing_random):
    whole = made_up.model(); log = train(whole, made_up.Data(), CONFIG, tmp_path/"whole")
    with pytest.raises(MemoryError): train(made_up.model(), Cut(), CONFIG, tmp_path/"run")
    model = made_up.model(); again = train(model, made_up.Data(batch_size=1), CONFIG, tmp_path/"run")
    assert again["scans"].tolist() == log["scans"].tolist() == 9 * [6]
    for n, p in weights(model).items(): torch.testing.assert_close(p, weights(whole)[n], rtol=1e-3, atol=1e-4)
    assert about(tmp_path/"run")["history"][-1] == {"step": 4, "what": "continued", "changed": {"batch_size": [3, 1]}}


def test_what_may_change(tmp_path):
    train(made_up.model(), made_up.Data(), CONFIG, tmp_path)
    other = replace(CONFIG, text_tokens=64, checkpoint_every=3, evaluate_every=2, trackers=("tensorboard",), divergence=99.)
    train(made_up.model(), made_up.Data(), other, tmp_path)
    assert set(about(tmp_path)["history"][-1]["changed"]) == {"text_tokens", "checkpoint_every", "evaluate_every", "trackers", "divergence"}
    longer = replace(other, epochs=4)
    with pytest.raises(InputError, match=r"epochs was 3, is 4.*--extend"): train(made_up.model(), made_up.Data(), longer, tmp_path)
    assert train(made_up.model(), made_up.Data(), longer, tmp_path, extend=True)["step"].tolist() == list(range(1, 13))
    with pytest.raises(InputError, match="clip was 1.0, is 2.0"): train(made_up.model(), made_up.Data(), replace(longer, clip=2.), tmp_path, extend=True)


def test_begin_from_a_checkpoint(tmp_path):
    first = made_up.model(); train(first, made_up.Data(), CONFIG, tmp_path/"first")
    start, second = max((tmp_path/"first"/"checkpoints").iterdir()), made_up.model()
    log = train(second, made_up.Data(), replace(CONFIG, learning_rate=1e-9, epochs=1, weight_decay=0.), tmp_path/"second", start=start)
    for n, p in weights(second).items(): torch.testing.assert_close(p, weights(first)[n], atol=1e-6, rtol=1e-5)
    assert log["step"].tolist() == [1, 2, 3] and str(start) in about(tmp_path/"second")["history"][0]["what"]
    with pytest.raises(InputError, match="other trained parameters"): train(made_up.model(), made_up.Data(), replace(CONFIG, frozen=("t",)), tmp_path/"third", start=start)
    with pytest.raises(InputError, match="no sound checkpoint"): train(made_up.model(), made_up.Data(), CONFIG, tmp_path/"fourth", start=tmp_path)


def test_run_json_may_be_lost(tmp_path):
    train(made_up.model(), made_up.Data(), replace(CONFIG, epochs=1), tmp_path)
    (tmp_path/"run.json").write_text((tmp_path/"run.json").read_text()[:40])
    with pytest.raises(InputError, match="epochs was 1, is 3"): train(made_up.model(), made_up.Data(), CONFIG, tmp_path)
    train(made_up.model(), made_up.Data(), replace(CONFIG, epochs=1), tmp_path)
    assert "could not be read" in about(tmp_path)["history"][0]["what"] and about(tmp_path)["config"]["epochs"] == 1


def hold(folder, ready, leave):
    from ctvlm.training import only_one
    with only_one(Path(folder)): ready.set(); leave.wait()


def test_two_in_one_folder(processes, tmp_path):
    context = multiprocessing.get_context("forkserver")
    ready, leave = context.Event(), context.Event()
    p = context.Process(target=hold, args=(tmp_path, ready, leave)); p.start(); ready.wait(60)
    with pytest.raises(InputError, match=rf"in use by process {p.pid} on {os.uname().nodename}"): train(made_up.model(), made_up.Data(), CONFIG, tmp_path)
    assert not (tmp_path/"log.csv").exists() and not (tmp_path/"run.json").exists()
    os.kill(p.pid, signal.SIGKILL); p.join()                       # the lock of a dead process is stale
    assert len(train(made_up.model(), made_up.Data(), replace(CONFIG, epochs=1), tmp_path)) == 3


def test_frozen_is_for_one_run(tmp_path):
    model = made_up.model()
    train(model, made_up.Data(), replace(CONFIG, epochs=1, frozen=("window_encoder", "t")), tmp_path/"a")
    assert all(p.requires_grad == q.requires_grad for p, q in zip(model.parameters(), made_up.model().parameters()))
    before = weights(model)
    train(model, made_up.Data(), replace(CONFIG, epochs=1, frozen=("b",)), tmp_path/"b")
    after = weights(model)
    assert not torch.equal(before["t"], after["t"]) and torch.equal(before["b"], after["b"])
    with pytest.raises(InputError, match="nothing is left to train"): train(model, made_up.Data(), replace(CONFIG, frozen=tuple(n for n, _ in model.named_parameters())), tmp_path/"c")


@pytest.mark.parametrize("field, value", [("learning_rate", "x"), ("learning_rate", math.nan), ("learning_rate", -1), ("epochs", 2.5), ("epochs", True), ("clip", 0.), ("ema", 2), ("ema", 1.),
                                          ("trackers", ["mlflow"]), ("frozen", "t"), ("betas", [0.9]), ("betas", 0.9), ("smoothing", 0.5), ("warmup_epochs", math.inf), ("seed", None),
                                          ("effective_batch", 0), ("start_bias", "auto"), ("metric", ""), ("tau", 0), ("layer_decay", 0.), ("patience", -1), ("precision", "fp16")])
def test_wrong_kinds_are_named(field, value):
    with pytest.raises(InputError, match=rf"^found {field}=.*, expected .+"): TrainingConfig(**{field: value})


def test_configuration_from_a_file(tmp_path):
    (tmp_path/"c.json").write_text('{"epochs": 3, "betas": [0.9, 0.99]}')
    assert TrainingConfig.read(tmp_path/"c.json", frozen=("t",)) == TrainingConfig(epochs=3, betas=(0.9, 0.99), frozen=("t",))
    for text, says in (("{", "JSON"), ("[1]", "holds list"), ('{"epoch": 3}', "did you mean 'epochs'"), ('{"siglip": 0, "disease": 0, "localization": 0}', "one of the losses")):
        (tmp_path/"c.json").write_text(text)
        with pytest.raises(InputError, match=says): TrainingConfig.read(tmp_path/"c.json")


# Effective batch, log, evaluation

@pytest.mark.parametrize("wanted, sizes", [(1, {1}), (2, {2}), (4, {3, 4}), (5, {4, 5}), (7, {6}), (8, {6}), (100, {18})])
def test_effective_batch_is_what_was_asked_for(tmp_path, capsys, wanted, sizes):
    log = train(made_up.model(), made_up.Data(), replace(CONFIG, epochs=1, effective_batch=wanted), tmp_path)
    assert set(log["scans"]) == sizes and log["scans"].sum() == 18
    assert ("at most" in capsys.readouterr().out) == (sizes != {wanted})


def test_data_that_breaks_its_word(tmp_path):
    class Few(made_up.Data):
        def steps(self, k): yield from list(super().steps(k))[:-1]
    with pytest.raises(InputError, match="step 3 has 0 scans, the data promised 6"): train(made_up.model(), Few(), CONFIG, tmp_path)
    assert len(pd.read_csv(tmp_path/"log.csv")) == 2


def test_waiting_is_time(tmp_path):
    class Slow(made_up.Data):
        def steps(self, k):
            for batches in super().steps(k): time.sleep(0.3); yield batches
    row = train(made_up.model(), Slow(), replace(CONFIG, epochs=1), tmp_path).iloc[-1]
    assert row["waited"] > 0.29 and row["scans_per_second"] < 6 / (row["waited"] + row["seconds"]) * 1.001


def test_the_end_is_evaluated(tmp_path, capsys):
    scores = iter([1., math.nan, 0.5])
    train(made_up.model(), made_up.Data(), replace(CONFIG, epochs=2, evaluate_every=4), tmp_path, lambda m: {"score": next(scores)})
    assert pd.read_csv(tmp_path/"evaluation.csv")["step"].tolist() == [4, 6] and (tmp_path/"best").is_dir()
    assert "a metric that is no number: score after step 6" in capsys.readouterr().out and about(tmp_path)["warnings"] == {"a metric that is no number": 1}


def test_early_stop(tmp_path, capsys):
    seen, values = [], [5., 3., 4., 3., 9.]
    def evaluate(model): seen.append(weights(model)); return {"mae_mm": values[len(seen) - 1], "r10": 0.}
    config = replace(CONFIG, epochs=9, metric="-mae_mm", patience=2)
    log = train(made_up.model(), made_up.Data(), config, tmp_path, evaluate)
    assert len(seen) == 4 and len(log) == 12 and "ended after step 12 of 27: 2 evaluations without a better mae_mm" in capsys.readouterr().out
    best = load_file(tmp_path/"best"/"model.safetensors")
    assert all(torch.equal(best[k], v) for k, v in seen[1].items() if k in best)
    train(made_up.model(), made_up.Data(), config, tmp_path, evaluate)             # ended is ended
    assert len(seen) == 4
    train(made_up.model(), made_up.Data(), replace(config, epochs=5), tmp_path, evaluate, extend=True)
    assert len(seen) == 5


def test_tensorboard_has_each_step_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    config = replace(CONFIG, trackers=("tensorboard",), checkpoint_every=100)
    with pytest.raises(MemoryError): train(made_up.model(), Cut(), config, tmp_path)             # steps 4 and 5 are after the checkpoint of the epoch
    time.sleep(1.1)                                                # event files are ordered by the second in their names
    train(made_up.model(), made_up.Data(), config, tmp_path)
    events = EventAccumulator(str(tmp_path/"ctvlm")).Reload().Scalars("log/loss")
    assert [e.step for e in events] == list(range(1, 10))


@pytest.mark.filterwarnings("ignore:.log_with")
def test_wandb_goes_on_with_its_run(tmp_path, monkeypatch):
    from accelerate import Accelerator
    import accelerate.utils
    monkeypatch.setattr(accelerate.utils, "is_wandb_available", lambda: True)
    given = []
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, name, config, settings: given.append(settings["wandb"]))
    for epochs in (1, 2): train(made_up.model(), made_up.Data(), replace(CONFIG, epochs=epochs, trackers=("wandb",)), tmp_path, extend=True)
    assert given[0]["id"] == given[1]["id"] and given[1]["resume"] == "allow"


def test_average_forgets_the_start(tmp_path):
    model = made_up.model(); before = weights(model)
    train(model, made_up.Data(), replace(CONFIG, epochs=20, ema=0.999), tmp_path)
    average = load_file(tmp_path/"model"/"model.safetensors")
    name = "report_head.layers.0.weight"
    moved = float((average[name] - before[name]).norm() / (weights(model)[name] - before[name]).norm())
    assert moved > 0.5                                             # a constant 0.999 leaves 94 % of the start after 60 steps


def test_the_model_says_what_it_learned_from(tmp_path):
    model = made_up.model()
    model.config.trained_on, model.config.interval_calibration = "drawn patients", {"tau": 1.}
    train(model, made_up.Data(), replace(CONFIG, epochs=1), tmp_path)
    saved = json.loads((tmp_path/"model"/"config.json").read_text())
    assert "drawn patients" in saved["trained_on"] and "18 scans" in saved["trained_on"] and not saved.get("interval_calibration")


def test_start_of_the_logits(tmp_path):
    class Stop(Exception): pass
    class Nothing(made_up.Data):
        def steps(self, k): raise Stop; yield
    model = made_up.model()
    with pytest.raises(Stop): train(model, Nothing(), replace(CONFIG, start_scale=30., start_bias=-2.), tmp_path)
    assert (float(model.t.detach().exp()), float(model.b.detach())) == pytest.approx((30, -2))


def test_a_fitted_start_is_next_to_what_an_uninformed_model_loses(tmp_path):
    log = train(made_up.model(), made_up.Data(64, 64), replace(CONFIG, epochs=1, effective_batch=64, start_bias="fit"), tmp_path/"fit")
    plain = train(made_up.model(), made_up.Data(64, 64), replace(CONFIG, epochs=1, effective_batch=64, start_scale=30., start_bias=-math.log(64)), tmp_path/"rule")
    uninformed = math.log(64) + 63 * math.log(64 / 63)
    assert log["siglip"].iloc[0] < 1.6 * uninformed and plain["siglip"].iloc[0] > 2 * uninformed
    cosines = torch.tanh(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    assert float(torch.sigmoid(10 * cosines.double() + fitted_bias(cosines, 10.)).sum()) == pytest.approx(64)
