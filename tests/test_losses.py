"The three losses: golden numbers, other cases, and properties that hold for any input."
import json, math
from pathlib import Path

import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file

from ctvlm.core import InputError
from ctvlm.disease import (SILENT, disease_prompt_loss, draw_phrasings, label_census, mean_phrasings,
                           positive_weights)
from ctvlm.depth import (DepthCalibration, conformal_quantile, expected_error_mm, fit_temperature, flatness,
                         posterior_set)
from ctvlm.localization import (decode_depth, depth_posterior, depth_target, localization_loss,
                                posterior_interval_mm, posterior_median_mm, posterior_quantile_mm)
from ctvlm.siglip import _pairs, run_processes, share_of_loss, siglip_loss, value_and_gradients

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent.parent/"shared"/"golden"/"half_patch"
T = torch.tensor(2.3025999069213867)  # criterion.t of the golden weights


@pytest.fixture(params=["tiny", "half_patch"])
def golden(request):
    folder = HERE/"golden"/"tiny" if request.param == "tiny" else SHARED
    if not folder.exists(): pytest.skip(f"{folder} is not here")
    return load_file(folder/"inputs.safetensors"), load_file(folder/"outputs.safetensors")


def close(x, y, eps=1e-6): torch.testing.assert_close(x, y, rtol=eps, atol=eps)


# SigLIP

def test_siglip_golden(golden):
    _, out = golden
    found = value_and_gradients(siglip_loss, out["scan_embedding"], out["report_embedding"], T, torch.tensor(-10.))
    for x, name in zip(found, ("loss", "grad_image", "grad_text", "grad_t", "grad_b")): close(x, out[f"siglip_{name}"])


def matrix(zimg, ztxt, t, b):
    logits = t.exp() * F.normalize(zimg, dim=-1) @ F.normalize(ztxt, dim=-1).T + b
    return -F.logsigmoid((2 * torch.eye(len(logits), dtype=logits.dtype) - 1) * logits).sum() / len(logits)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 40), width=st.integers(1, 24), scale=st.floats(1, 100), bias=st.floats(-20, 5), seed=st.integers(0, 99))
def test_siglip_is_the_matrix(n, width, scale, bias, seed):
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(n, width, generator=g, dtype=torch.float64)
    z = [common + 0.3 * torch.randn(n, width, generator=g, dtype=torch.float64) for _ in range(2)]
    z += [torch.tensor(scale, dtype=torch.float64).log(), torch.tensor(bias, dtype=torch.float64)]
    for x, y in zip(value_and_gradients(siglip_loss, *z), value_and_gradients(matrix, *z)): torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rows", [1, 3, 8, 11, 100])
def test_siglip_chunks_are_uneven(rows):
    x, y = F.normalize(torch.randn(2, 11, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=-1)
    scale, b = torch.tensor(50., dtype=torch.float64), torch.tensor(-9., dtype=torch.float64)
    for p, q in zip(_pairs(x, y, scale, b, 0, cells=rows * 11), _pairs(x, y, scale, b, 0)): close(p, q, 1e-12)
    parts = [_pairs(x[a:z], y, scale, b, a, cells=rows * 11) for a, z in ((0, 4), (4, 11))]      # rows of two processes
    for p, q in zip((sum(p[0] for p in parts), torch.cat([p[1] for p in parts]), sum(p[2] for p in parts)), _pairs(x, y, scale, b, 0)): close(p, q, 1e-12)


def test_siglip_gradcheck():
    z = [torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)] + [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (3., -4.)]
    assert torch.autograd.gradcheck(siglip_loss, z)


def test_siglip_keeps_no_matrix():
    N, kept = 4096, {}
    def pack(x): kept[x.data_ptr()] = x.numel(); return x
    z = [torch.randn(N, 8, requires_grad=True) for _ in range(2)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x): siglip_loss(*z, torch.tensor(2.3, requires_grad=True), torch.tensor(-10., requires_grad=True))
    assert sum(kept.values()) < 20 * N * 8 < N * N


def test_siglip_edges():
    t, b = torch.tensor(2.3), torch.tensor(-10.)
    assert float(siglip_loss(torch.zeros(0, 4), torch.zeros(0, 4), t, b)) == 0
    assert math.isfinite(float(siglip_loss(torch.zeros(3, 4), torch.zeros(3, 4), t, b)))                # a zero vector has no direction, but no NaN either
    with torch.no_grad(): assert not siglip_loss(torch.ones(2, 4), torch.ones(2, 4), t, b).requires_grad
    with torch.autocast("cpu", torch.bfloat16): assert siglip_loss(torch.ones(2, 4), torch.ones(2, 4), t, b).dtype == torch.float32
    with pytest.raises(InputError, match=r"\(3, 4\).*\(2, 4\)"): siglip_loss(torch.ones(3, 4), torch.ones(2, 4), t, b)


@pytest.mark.parametrize("asked", [(), (0,), (1,), (2,), (3,), (0, 2), (0, 1, 2, 3)])
def test_siglip_computes_what_is_asked_for(asked, monkeypatch):
    "The gradients asked for are right, and no other product is made."
    products = []
    for name in ("mm", "addmm_"):
        owner = torch if name == "mm" else torch.Tensor
        def counted(*a, made=getattr(owner, name), name=name, **k): products.append(name); return made(*a, **k)
        monkeypatch.setattr(owner, name, counted)
    g = torch.Generator().manual_seed(0)
    z = [torch.randn(6, 4, generator=g) for _ in range(2)] + [torch.tensor(2.), torch.tensor(-3.)]
    want = value_and_gradients(matrix, *z)
    products.clear()
    for k in asked: z[k].requires_grad_()
    loss = siglip_loss(*z)
    assert sorted(products) == ["addmm_"] * (1 in asked) + ["mm"] * (0 in asked or 2 in asked)
    close(loss.detach(), want[0])
    if not asked: assert not loss.requires_grad
    else: loss.backward()
    for k in asked: close(z[k].grad, want[1 + k], 1e-5)


GROUPS = torch.tensor([[5, 0], [5, 1], [6, 2], [7, 2], [8, 3], [5, 4], [9, 3]])  # report, patient of seven scans


def seven(scale=30., bias=-6.):
    g = torch.Generator().manual_seed(3)
    common = torch.randn(7, 5, generator=g, dtype=torch.float64)
    z = [common + 0.7 * torch.randn(7, 5, generator=g, dtype=torch.float64) for _ in range(2)]
    return *z, torch.tensor(scale, dtype=torch.float64).log(), torch.tensor(bias, dtype=torch.float64)


def grouped(zimg, ztxt, t, b, groups=GROUPS):
    return siglip_loss(zimg, ztxt, t, b, groups=groups)


def pair_by_pair(zimg, ztxt, t, b):
    cosine, loss = F.normalize(zimg, dim=-1) @ F.normalize(ztxt, dim=-1).T, 0
    for i, (report, patient) in enumerate(GROUPS.tolist()):
        for j, (other, somebody) in enumerate(GROUPS.tolist()):
            if i == j: loss = loss - F.logsigmoid(t.exp() * cosine[i, j] + b)
            elif report != other and patient != somebody: loss = loss - F.logsigmoid(-t.exp() * cosine[i, j] - b)
    return loss / 7


@pytest.mark.parametrize("scale, bias", [(10., -10.), (100., -16.)])
def test_same_report_or_patient_is_no_negative(scale, bias):
    z = seven(scale, bias)
    for x, y in zip(value_and_gradients(grouped, *z), value_and_gradients(pair_by_pair, *z)): close(x, y, 1e-11)
    assert torch.autograd.gradcheck(grouped, [x.requires_grad_() for x in z])


def test_one_report_for_all_leaves_the_diagonal(): # and the divisor is the number of rows
    x, y, t, b = seven()
    few = [0, 1, 5]                                                               # of report 5
    loss = siglip_loss(x[few], y[few], t, b, groups=GROUPS[few])
    close(loss, F.softplus(-(t.exp() * F.cosine_similarity(x[few], y[few]) + b)).mean(), 1e-12)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 100])
def test_groups_in_uneven_chunks(rows):
    x, y, t, b = seven()
    x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    whole = _pairs(x, y, t.exp(), b, 0, groups=GROUPS)
    for p, q in zip(_pairs(x, y, t.exp(), b, 0, cells=rows * 7, groups=GROUPS), whole): close(p, q, 1e-12)
    parts = [_pairs(x[a:z], y, t.exp(), b, a, cells=rows * 7, groups=GROUPS) for a, z in ((0, 3), (3, 7))]
    for k, q in enumerate(whole):
        close(torch.cat([p[k] for p in parts]) if k == 1 else sum(p[k] for p in parts), q, 1e-12)


def test_without_groups_not_one_bit_changes():
    z = [x.float() for x in seven()]
    for strangers in (torch.arange(14).view(7, 2), torch.full((7, 2), -1)):      # -1: unknown
        found = value_and_gradients(lambda *z: grouped(*z, strangers), *z)
        for x, y in zip(value_and_gradients(siglip_loss, *z), found): assert torch.equal(x, y)
    assert not torch.equal(siglip_loss(*z), grouped(*z))


def half_grouped(rank, world, *z):
    try: siglip_loss(*z, groups=GROUPS if rank else None)
    except InputError as e: return str(e)


def test_groups_over_processes(): # report 5 and patient 3 are on both; the second split leaves a process empty
    z = seven(100., -16.)
    one = value_and_gradients(grouped, *z)
    for cuts in ([0, 3, 7], [0, 0, 7]):
        shares = run_processes(2, share_of_loss, *z, cuts, GROUPS)
        for value, _, _, gt, gb in shares:
            for x, y in zip((value, gt, gb), (one[0], *one[3:])): close(x, y, 1e-11)
        for k in (1, 2): close(torch.cat([s[k] for s in shares]), one[k], 1e-11)
    assert all("on some processes" in said for said in run_processes(2, half_grouped, *z))


@pytest.mark.parametrize("groups", [GROUPS[:6], GROUPS[:, 0], GROUPS.double()])
def test_groups_are_integers_of_every_scan(groups):
    with pytest.raises(InputError, match=r"expected integers \(7, K\)"): grouped(*seven(), groups)


# Localization

@pytest.mark.parametrize("sigma", [0, 1, 2])
def test_localization_golden(golden, sigma):
    given, out = golden
    slices, snippets = (out[k].clone().requires_grad_() for k in ("slice_embeddings", "snippet_embedding"))
    which = given["snippet_scan_index"]
    loss = localization_loss(slices[which], snippets, given["snippet_target_depth"], out["valid_depth_mask"][which], sigma=float(sigma))
    loss.backward()
    close(loss, out[f"loc_loss_sigma{sigma}"]); close(slices.grad, out[f"loc_grad_slice_sigma{sigma}"]); close(snippets.grad, out[f"loc_grad_snippet_sigma{sigma}"])


@settings(max_examples=40, deadline=None)
@given(bins=st.integers(1, 30), extra=st.integers(0, 30), where=st.floats(-3, 33), sigma=st.sampled_from([0., 0.5, 2.]), seed=st.integers(0, 99))
def test_padding_changes_nothing(bins, extra, where, sigma, seed):
    g = torch.Generator().manual_seed(seed)
    slices, snippet = torch.randn(1, bins, 6, generator=g), torch.randn(1, 6, generator=g)
    valid, centre = torch.ones(1, bins, dtype=torch.bool), torch.tensor([where])
    alone = value_and_gradients(lambda s, q: localization_loss(s, q, centre, valid, sigma, padding_free=True), slices, snippet)
    padded = value_and_gradients(lambda s, q: localization_loss(s, q, centre, F.pad(valid, (0, extra)), sigma, padding_free=True), F.pad(slices, (0, 0, 0, extra), value=7.), snippet)
    close(alone[0], padded[0]); close(alone[1], padded[1][:, :bins]); close(alone[2], padded[2])
    assert float(padded[1][:, bins:].abs().sum()) == 0 and math.isfinite(float(alone[0]))
    close(depth_target(centre, valid, sigma, True).sum(), torch.tensor(1.))


def test_localization_edges():
    slices, valid = torch.randn(2, 5, 4, requires_grad=True), torch.ones(2, 5, dtype=torch.bool)
    empty = localization_loss(slices[:0], torch.zeros(0, 4), torch.zeros(0), valid[:0], padding_free=True)
    empty.backward(); assert float(empty.detach()) == 0
    with pytest.raises(InputError, match="no valid depth bin"): localization_loss(slices, torch.ones(2, 4), torch.zeros(2), valid & False)


@pytest.mark.parametrize("change", [dict(target_bin=(2, 1)), dict(snippets=(2, 3)), dict(snippets=(1, 4)),
                                    dict(valid=(2, 6)), dict(slices=(2, 5)), dict(target_bin=(3,))])
def test_localization_refuses_other_shapes(change): # (S, 1) targets gave 34.6 instead of 6.15
    shapes = dict(slices=(2, 5, 4), snippets=(2, 4), target_bin=(2,), valid=(2, 5)) | change
    with pytest.raises(InputError, match="gather the slices"):
        localization_loss(**{k: torch.ones(v, dtype=torch.bool if k == "valid" else None) for k, v in shapes.items()})


@pytest.mark.parametrize("free", [False, True])
def test_nan_in_padding_reaches_no_gradient(free):
    slices, snippets = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)), torch.ones(2, 4)
    valid = torch.arange(5) < torch.tensor([[3], [5]])
    loss = lambda s, q: localization_loss(s, q, torch.tensor([1., 4.]), valid, padding_free=free)
    dirty = torch.where(valid[:, :, None], slices, torch.nan)
    for x, y in zip(value_and_gradients(loss, dirty, snippets), value_and_gradients(loss, slices, snippets)): assert torch.equal(x, y)


def test_one_hot_between_two_bins(): # a target of 2.3 bins gave no loss at all
    valid = torch.ones(1, 5, dtype=torch.bool)
    for free in (False, True):
        assert depth_target(torch.tensor([2.3]), valid, 0., free).tolist() == [[0, 0, 1, 0, 0]]
    assert depth_target(torch.tensor([4]), valid & (torch.arange(5) < 3), 0.).sum() == 0                # released: lost in padding


@settings(max_examples=60, deadline=None)
@given(bins=st.integers(1, 40), seed=st.integers(0, 999), q=st.floats(0.001, 0.999))
def test_quantiles_invert_the_cumulative(bins, seed, q):
    g = torch.Generator().manual_seed(seed)
    p, z = torch.softmax(3 * torch.randn(1, bins, generator=g), 1), 12 * torch.arange(bins) - 200.
    x = float(posterior_quantile_mm(p, z, q))
    share = sum(float(p[0, k]) * min(1., max(0., (x - (float(z[k]) - 6)) / 12)) for k in range(bins))
    assert abs(share - q) < 1e-4
    low, high = posterior_interval_mm(p, z, 0.8)[0]
    assert low <= posterior_median_mm(p, z)[0] <= high
    for end, tail in ((low, 0.1), (high, 0.9)): assert float(end) == pytest.approx(float(posterior_quantile_mm(p, z, tail)), abs=1e-3)


def test_median_has_the_least_expected_error():
    p, z = torch.tensor([[0.1, 0.4, 0.2, 0.3]]), 12 * torch.arange(4.)
    fine = torch.linspace(-6, 42, 4801)
    expected = sum(float(p[0, k]) * (fine[:, None] - torch.linspace(float(z[k]) - 6, float(z[k]) + 6, 400)).abs().mean(1) for k in range(4))
    assert abs(float(posterior_median_mm(p, z)) - float(fine[expected.argmin()])) < 0.2
    assert [float(decode_depth(p, z, how)) for how in ("argmax", "mean")] == pytest.approx([12, 12 * 1.7])


def test_quantiles_lie_in_bins_that_hold_something():
    p, z = torch.tensor([[0., 0., 0.5, 0., 0.5, 0.]]), 12 * torch.arange(6.) + 6
    assert [float(posterior_quantile_mm(p, z, q)) for q in (0., 0.25, 0.5, 0.75, 1.)] == [24, 30, 36, 54, 60]
    for q in (-0.1, 1.5, math.nan):
        with pytest.raises(InputError, match="share from 0 to 1"): posterior_quantile_mm(p, z, q)
    with pytest.raises(InputError, match="coverage 90"): posterior_interval_mm(p, z, 90)


def test_mean_and_median_read_the_same_posterior(): # masses that do not sum to one, one of them in a padded bin
    p, z = torch.tensor([[1., 3., 4.]]), torch.tensor([[6., 18., math.nan]])
    assert [float(decode_depth(p, z, how)) for how in ("mean", "median", "argmax")] == [15, 16, 18]


def invented(n, seed, wrong=0.05): # 3 snippets per patient, errors shared within a patient, some plainly wrong
    g = torch.Generator().manual_seed(seed)
    patient = torch.arange(n).repeat_interleave(3)
    truth = torch.rand(3 * n, generator=g) * 300
    peak = truth + 25 * torch.randn(n, generator=g)[patient] + 10 * torch.randn(3 * n, generator=g)
    peak = torch.where(torch.rand(3 * n, generator=g) < wrong, torch.rand(3 * n, generator=g) * 300, peak)
    z = 12 * torch.arange(25) + 6.
    similarity = torch.exp(-(z - peak[:, None])**2 / (2 * 30**2)) + 0.02 * torch.randn(3 * n, 25, generator=g)
    return similarity, torch.ones(3 * n, 25, dtype=torch.bool), z.expand(3 * n, -1), truth, patient.tolist()


def test_interval_keeps_its_promise():
    calibration, (similarity, valid, z, truth, _) = DepthCalibration.fit(*invented(300, 1)), invented(2000, 2)
    low, high = calibration.interval_mm(calibration.posterior(similarity, valid), z).T
    assert abs(float(((low <= truth) & (truth <= high)).float().mean()) - 0.9) < 0.03
    assert calibration.n_patients == 300 and DepthCalibration(**json.loads(json.dumps(calibration.to_dict(), allow_nan=False))) == calibration


def test_silence_about_what_is_not_there():
    similarity, valid, z, truth, patient = invented(300, 1)
    calibration = DepthCalibration.fit(similarity, valid, z, truth, patient)
    assert 0 < float(calibration.abstains(similarity, valid).float().mean()) <= 0.05 + 1e-6   # of the patients that set the thresholds
    assert calibration.abstains(0.02 * torch.randn(50, 25), valid[:50]).all()                 # like nothing
    assert calibration.abstains(0.5 * similarity[:50], valid[:50]).all()                      # half as like, at one depth
    short = valid[:50] & (torch.arange(25) < 20)
    assert calibration.abstains(torch.where(short, 0.5 * similarity[:50], 9.), short).all()   # padding counts for nothing


def test_not_calibrated_claims_nothing(): # flatness exceeded 1 by rounding for 64 of 198 lengths
    valid = torch.arange(200) < torch.arange(2, 200)[:, None]
    even = torch.zeros(198, 200)
    nothing = DepthCalibration()
    assert (flatness(nothing.posterior(even, valid), valid) > 1).any() and not nothing.abstains(even, valid).any()
    assert nothing.interval_mm(even, even).isnan().all() and nothing.set_mm(even, even) == [[]] * 198
    assert not nothing.calibrated and nothing.promise == "none: not calibrated"


def shares(patients, coverage=0.9, missed=0.05, draws=60, blind=False):
    "Mean over draws of the calibration patients: covered by interval and by set, refused; patients weigh the same."
    similarity, valid, z, truth, patient = uneven(500, 10**6)
    weight = 1 / torch.bincount(torch.tensor(patient))[torch.tensor(patient)] / 500
    out = []
    for seed in range(draws):
        data = uneven(patients, seed)
        c = DepthCalibration.fit(*data[:4], range(len(data[3])) if blind else data[4], coverage, missed)
        p = c.posterior(similarity, valid)
        low, high = c.interval_mm(p, z).T
        inside = torch.tensor([any(a <= t <= b for a, b in s) for s, t in zip(c.set_mm(p, z), truth.tolist())])
        each = torch.stack([(low <= truth) & (truth <= high), inside, c.abstains(similarity, valid)])
        out.append((each * weight).sum(1))
    return torch.stack(out).mean(0).tolist()


def uneven(n, seed): # like `invented`, but a hard patient has one snippet and an easy one up to nine
    similarity, valid, z, truth, _ = invented(3 * n, seed)
    g = torch.Generator().manual_seed(seed)
    many = torch.tensor([1, 9])[torch.rand(n, generator=g).lt(0.5).long()]
    patient = torch.arange(n).repeat_interleave(many)
    rows = torch.arange(len(patient))
    off = 60 * torch.randn(len(rows), generator=g) * (many == 1)[patient]
    return similarity[rows], valid[rows], z[rows], (truth[rows] + off).clamp(0, 300), patient.tolist()


@pytest.mark.parametrize("patients, coverage", [(11, 0.9), (30, 0.9), (80, 0.7)])
def test_promises_hold_over_draws(patients, coverage):
    interval, set_, refused = shares(patients, coverage)
    most = coverage + 1 / (0.8 * patients + 1) + 0.03
    assert coverage - 0.012 < interval < most and coverage - 0.012 < set_ < most + 0.03
    assert refused < 0.056 and (patients < 23) == (refused == 0)


def test_that_test_sees_blindness_to_patients(): # planted fault: every snippet its own patient
    assert shares(80, 0.7, blind=True)[0] < 0.7 - 0.05


def test_patients_that_set_the_temperature_give_no_quantile(): # a fifth: nine others are left of 11, nineteen of 23
    fit = lambda n: DepthCalibration.fit(*invented(n, 0))
    assert [fit(n).calibrated for n in (10, 11)] == [fit(n).flat is not None for n in (22, 23)] == [False, True]


def test_fit_refuses_what_is_no_number():
    data = similarity, valid, z, truth, patient = invented(20, 0)
    for bad in (truth.where(truth != truth[3], math.nan), truth.where(truth != truth[3], math.inf)):
        with pytest.raises(InputError, match="depths that are no numbers in 1 of 60"): DepthCalibration.fit(similarity, valid, z, bad, patient)
    with pytest.raises(InputError, match="cosines that are no numbers in 60"): DepthCalibration.fit(similarity * math.nan, *data[1:])
    padded = torch.nn.functional.pad(similarity, (0, 2), value=math.nan), torch.nn.functional.pad(valid, (0, 2)), torch.nn.functional.pad(z, (0, 2), value=math.nan)
    assert DepthCalibration.fit(*padded, truth, patient) == DepthCalibration.fit(*data)
    with pytest.raises(InputError, match="coverage 90"): DepthCalibration.fit(*data, coverage=90)
    with pytest.raises(InputError, match="found 4 held-out patients, expected 5"): DepthCalibration.fit(*invented(4, 0))
    with pytest.raises(InputError, match="1 of 2 scores"): conformal_quantile(torch.tensor([1., math.nan]), ["a", "b"])


@settings(max_examples=40, deadline=None)
@given(bins=st.integers(1, 30), seed=st.integers(0, 999), mass=st.floats(0.05, 0.99))
def test_sets_are_the_shortest_that_hold_the_mass(bins, seed, mass):
    g = torch.Generator().manual_seed(seed)
    p, z = torch.softmax(3 * torch.randn(1, bins, generator=g), 1), 12 * torch.arange(bins) - 200.
    parts = posterior_set(p, z, mass)[0]
    inside = torch.tensor([any(low < x < high for low, high in parts) for x in z.tolist()])
    assert float(p[0, inside].sum()) >= mass - 1e-5 and sum(high - low for low, high in parts) == 12 * inside.sum()
    assert float(p[0, inside].sum() - p[0, inside].min()) < mass + 1e-5 and p[0, inside].min() >= (p[0] * ~inside).max()
    assert all(a[1] < b[0] for a, b in zip(parts, parts[1:]))


def test_sure_answers_get_short_intervals():
    similarity, valid, z, truth, patient = invented(100, 3)
    calibration = DepthCalibration.fit(similarity, valid, z, truth, patient)
    length = [float((lambda i: i[:, 1] - i[:, 0])(calibration.interval_mm(calibration.posterior(s, valid[:1]), z[:1]))) for s in (similarity[:1], 0.3 * similarity[:1])]
    assert 0 < length[0] < length[1] <= 300
    few = DepthCalibration.fit(*(x[:15] for x in (similarity, valid, z, truth, patient)), population="drawn patients")
    assert few.promise == "none: 5 drawn patients are too few for 90%" and few.interval_mm(few.posterior(similarity, valid), z).isnan().all()
    assert not few.abstains(torch.zeros(50, 25), valid[:50]).any()


@settings(max_examples=40, deadline=None)
@given(bins=st.integers(1, 30), seed=st.integers(0, 999), share=st.floats(-0.2, 1.2))
def test_expected_error_is_the_integral(bins, seed, share):
    g = torch.Generator().manual_seed(seed)
    p, z = torch.softmax(2 * torch.randn(1, bins, generator=g), 1), 12 * torch.arange(bins) - 50.
    x = -56 + share * 12 * bins
    fine = torch.arange(-56, -56 + 12 * bins, 0.01, dtype=torch.float64) + 0.005
    density = p[0].double()[((fine + 56) / 12).long()] / 12
    close(expected_error_mm(p, z, torch.tensor([x]))[0], torch.tensor(float((density * (fine - x).abs()).sum() * 0.01)), 1e-3)


def test_conformal_quantile_counts_patients():
    assert conformal_quantile(torch.arange(19.), [str(i) for i in range(19)], 0.9) == 17              # 18 of 20
    assert conformal_quantile(torch.arange(8.), list("abcdefgh"), 0.9) == math.inf
    assert conformal_quantile(torch.tensor([5.] * 100 + [1.] * 9), ["a"] * 100 + list("bcdefghij"), 0.8) == 1  # a hundred snippets of one patient weigh one


def test_temperature_is_found_again():
    g = torch.Generator().manual_seed(0)
    similarity = torch.rand(4000, 12, generator=g)
    valid = torch.ones_like(similarity, dtype=torch.bool)
    truth = torch.multinomial(depth_posterior(similarity, valid, 0.15), 1, generator=g)[:, 0]
    assert abs(fit_temperature(similarity, valid, truth) / 0.15 - 1) < 0.12


# Disease prompts

def test_disease_golden(golden):
    given, out = golden
    for name, choose in (("first_only", lambda p: p[:, 0]), ("mean_all", mean_phrasings)):
        image, prompts = F.normalize(out["scan_embedding_secondary"], dim=-1).requires_grad_(), given["disease_prompt_embedding"].clone().requires_grad_()
        loss = disease_prompt_loss(image, choose(prompts), given["disease_labels"], T, given["disease_pos_weight"], given["disease_question_weight"])
        loss.backward()
        close(loss, out[f"disease_loss_{name}"]); close(image.grad, out[f"disease_grad_image_{name}"]); close(prompts.grad, out[f"disease_grad_prompt_{name}"])
    # The published form smooths first and then weighs, by which a rare finding that is absent is taught to be present (w s > 1 - s).
    # Being linear in the label, it is a mixture of our losses of the labels and of the opposite ones.
    labels = given["disease_labels"]
    plain = [disease_prompt_loss(F.normalize(out["scan_embedding_secondary"], dim=-1), given["disease_prompt_embedding"][:, 0], y, T, given["disease_pos_weight"])
             for y in (labels, torch.where(labels < 0, labels, 1 - labels))]
    close(0.9 * plain[0] + 0.1 * plain[1], out["disease_loss_smoothing0.1"])


@pytest.mark.parametrize("w", [0.05, 1., 3., 20.])
@pytest.mark.parametrize("s", [0.01, 0.1, 0.3])
@pytest.mark.parametrize("label", [0, 1])
def test_smoothed_targets_are_where_they_should_be(w, s, label): # w = 20, s = 0.1 made an absent finding most welcome at 0.69
    d = torch.linspace(-8, 8, 3201, dtype=torch.float64)                                              # scores of one scan
    v, t = torch.stack([d / 10, (1 - (d / 10)**2).sqrt()], 1), torch.tensor(10., dtype=torch.float64).log()
    prompts = torch.tensor([[[1., 0.], [0., 0.]]], dtype=torch.float64)
    loss = lambda x: float(disease_prompt_loss(x[None], prompts, torch.tensor([[label]]), t, torch.tensor([w]), smoothing=s))
    best = d[torch.tensor([loss(x) for x in v[::20]]).argmin() * 20]
    assert float(best.sigmoid()) == pytest.approx(1 - s if label else s, abs=0.03)
    assert loss(v[0 if label else -1]) == pytest.approx((w if label else 1) * ((1 - s) * 8 + math.log1p(math.exp(-8))), rel=1e-6) # and it weighs w


@pytest.mark.parametrize("change, message", [
    (dict(prompts=torch.zeros(2, 3, 4)), "prompts .2, 3, 4."), (dict(prompts=torch.zeros(2, 2, 5)), "prompts .2, 2, 5."),
    (dict(labels=torch.tensor([[1, 2]] * 3)), "labels from 1 to 2"), (dict(labels=torch.full((3, 2), -3)), "labels from -3"),
    (dict(pos_weight=torch.ones(1)), r"pos_weight of shape \(1,\)"), (dict(question_weight=torch.ones(3)), "question_weight of shape"),
    (dict(image=2 * F.normalize(torch.ones(3, 4), dim=1)), "images of length 2.00"), (dict(image=F.normalize(torch.ones(3, 4), dim=1) / 2), "images of length 0.50"),
    (dict(prompts=torch.ones(2, 2, 4)), "prompts of length 2.00")])
def test_disease_refuses(change, message): # lengths: doubling the images moved the loss from 1.40 to 2.59
    given = dict(image=F.normalize(torch.ones(3, 4), dim=1), prompts=torch.zeros(2, 2, 4), labels=torch.zeros(3, 2, dtype=torch.long)) | change
    with pytest.raises(InputError, match=message): disease_prompt_loss(**given, t=T)


def test_bfloat16_is_long_enough():
    x = F.normalize(torch.randn(500, 64, generator=torch.Generator().manual_seed(0)).bfloat16(), dim=-1)
    assert disease_prompt_loss(x, x[:20].view(10, 2, 64), torch.ones(500, 10), T).isfinite()


def test_nan_of_unknown_questions_reaches_no_gradient():
    g = torch.Generator().manual_seed(0)
    image, prompts = F.normalize(torch.randn(3, 4, generator=g), dim=-1), F.normalize(torch.randn(2, 2, 4, generator=g), dim=-1)
    labels = torch.tensor([[1, -1], [0, -1], [-1, -1]])
    loss = lambda v, p: disease_prompt_loss(v, p, labels, T)
    dirty = [image.clone(), prompts.clone()]; dirty[0][2] = dirty[1][1] = math.nan
    for x, y in zip(value_and_gradients(loss, *dirty), value_and_gradients(loss, image, prompts)): assert torch.equal(x, y)


def test_disease_unknown_is_not_no():
    image, prompts = F.normalize(torch.randn(3, 4), dim=-1).requires_grad_(), F.normalize(torch.randn(2, 2, 4), dim=-1)
    loss = disease_prompt_loss(image, prompts, torch.full((3, 2), -1), T); loss.backward()
    assert float(loss.detach()) == 0 and float(image.grad.abs().sum()) == 0
    labels = torch.tensor([[1, -1], [-1, 0], [-1, -1]])
    g = value_and_gradients(lambda v: disease_prompt_loss(v, prompts, labels, T), image)[1]
    assert float(g[2].abs().sum()) == 0 and float(g[:2].abs().sum()) > 0
    with pytest.raises(InputError, match=r"\(3, 5\).*2 questions"): disease_prompt_loss(image, prompts, torch.zeros(3, 5), T)


@pytest.mark.parametrize("fault", ["none", "silence counts whole in the divisor", "positives weigh as without silence"])
def test_silence_is_a_denial_of_its_weight(fault):
    g = torch.Generator().manual_seed(3)
    image, prompts = (F.normalize(torch.randn(*n, 4, generator=g, dtype=torch.float64), dim=-1) for n in ((60,), (3, 2)))
    labels = torch.randint(-2, 2, (60, 3), generator=g)
    labels[labels[:, 2] == 0, 2] = SILENT                                      # the last finding is never denied
    d = T.double().exp() * image @ (prompts[:, 0] - prompts[:, 1]).T
    each = (labels >= 0).double() + 0.3 * (labels == SILENT)
    yes, no = (each * (labels == 1)).sum(0), (each * ((labels == 0) | (labels == SILENT))).sum(0)
    balance = no / yes if "positives" not in fault else (labels == 0).sum(0) / yes
    terms = each * torch.where(labels == 1, balance * F.softplus(-d), F.softplus(d))
    expected = terms.sum() / ((each > 0).sum() if "divisor" in fault else each.sum())
    found = disease_prompt_loss(image, prompts, labels, T, positive_weights(labels, silence=0.3), silence=0.3)
    assert (abs(float(found / expected) - 1) < 1e-6) == (fault == "none")


def test_silence_is_unknown_unless_it_weighs():
    g = torch.Generator().manual_seed(4)
    image, prompts = F.normalize(torch.randn(9, 4, generator=g), dim=-1), F.normalize(torch.randn(3, 2, 4, generator=g), dim=-1)
    silent = torch.randint(-2, 2, (9, 3), generator=g)
    silent[0] = SILENT
    unknown = silent.masked_fill(silent == SILENT, -1)
    image[0] = math.nan                                                        # reaches no gradient
    loss = lambda labels: lambda v, p: disease_prompt_loss(v, p, labels, T, positive_weights(labels))
    for x, y in zip(value_and_gradients(loss(silent), image, prompts), value_and_gradients(loss(unknown), image, prompts)):
        assert torch.equal(x, y) and x.isfinite().all()
    labels = torch.tensor([[1, 1]] * 4 + [[0, SILENT]] * 8)
    assert positive_weights(labels).tolist() == [2, 0] and positive_weights(labels, silence=0.25).tolist() == [2, 0.5]
    assert label_census(labels, ("a", "b"))[1] == ("b",) and label_census(labels, ("a", "b"), 0.25)[1] == ()


def test_disease_extreme_scores_are_finite():
    v = torch.eye(2, requires_grad=True)
    loss = disease_prompt_loss(v, torch.stack([torch.eye(2), -torch.eye(2)], 1), 1 - torch.eye(2).long(), torch.tensor(6.))
    loss.backward(); assert math.isfinite(float(loss.detach())) and v.grad.isfinite().all()


def test_positive_weights():
    labels = torch.tensor([[1, 0, 1, -1], [0, 0, 1, -1], [0, 0, 1, -1], [0, -1, 1, -1]])
    assert positive_weights(labels).tolist() == [3, 20, 0, 1]
    rare = (torch.arange(31) == 0).long()[:, None]                   # one patient of 31: 30 to 1, at most 20
    assert positive_weights(rare).tolist() == [20] and positive_weights(rare, most=40.).tolist() == [30]
    assert draw_phrasings(torch.arange(12).view(4, 3)).shape == (4,)


def test_what_is_never_denied_dilutes_nothing(): # 23 of the 57 questions of 200 phantoms weighed 0 and counted in the divisor
    g = torch.Generator().manual_seed(0)
    image, prompts = F.normalize(torch.randn(6, 4, generator=g), dim=-1), F.normalize(torch.randn(3, 2, 4, generator=g), dim=-1)
    labels = torch.tensor([[1, 0, 1], [0, 1, 1], [0, 0, -1], [1, -1, 1], [-1, 0, -1], [0, 1, 1]])
    loss = lambda q: float(disease_prompt_loss(image, prompts[q], labels[:, q], T, positive_weights(labels[:, q])))
    assert positive_weights(labels)[2] == 0 and loss([0, 1, 2]) == pytest.approx(loss([0, 1]), rel=1e-6)
    rows, dumb = label_census(labels, ("a", "b", "c"))
    assert dumb == ("c",) and rows[0] == dict(finding="c", positive=4, negative=0, silent=0, unknown=2)
    with pytest.raises(InputError, match="2 findings"): label_census(labels, ("a", "b"))
