"The three losses: golden numbers, other cases, and properties that hold for any input."
import math
from pathlib import Path

import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file

from ctvlm.core import InputError
from ctvlm.disease import disease_prompt_loss, draw_phrasings, mean_phrasings, positive_weights
from ctvlm.localization import (DepthCalibration, conformal_quantile, decode_depth, depth_posterior, depth_target, expected_error_mm, fit_temperature,
                                localization_loss, posterior_interval_mm, posterior_median_mm, posterior_quantile_mm)
from ctvlm.siglip import _pairs, siglip_loss, value_and_gradients

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


def test_median_has_the_least_expected_error():
    p, z = torch.tensor([[0.1, 0.4, 0.2, 0.3]]), 12 * torch.arange(4.)
    fine = torch.linspace(-6, 42, 4801)
    expected = sum(float(p[0, k]) * (fine[:, None] - torch.linspace(float(z[k]) - 6, float(z[k]) + 6, 400)).abs().mean(1) for k in range(4))
    assert abs(float(posterior_median_mm(p, z)) - float(fine[expected.argmin()])) < 0.2
    assert [float(decode_depth(p, z, how)) for how in ("argmax", "mean")] == pytest.approx([12, 12 * 1.7])


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
    assert calibration.patients == 300 and DepthCalibration(**calibration.to_dict()) == calibration


def test_silence_about_what_is_not_there():
    similarity, valid, z, truth, patient = invented(300, 1)
    calibration = DepthCalibration.fit(similarity, valid, z, truth, patient)
    assert 0 < float(calibration.abstains(similarity, valid).float().mean()) <= 0.05 + 1e-6   # of the patients that set the thresholds
    assert calibration.abstains(0.02 * torch.randn(50, 25), valid[:50]).all()                 # like nothing
    assert calibration.abstains(0.5 * similarity[:50], valid[:50]).all()                      # half as like, at one depth
    short = valid[:50] & (torch.arange(25) < 20)
    assert calibration.abstains(torch.where(short, 0.5 * similarity[:50], 9.), short).all()   # padding counts for nothing
    assert not DepthCalibration().abstains(torch.zeros(50, 25), valid[:50]).any()             # not calibrated: always an answer


@pytest.mark.parametrize("patients, coverage", [(12, 0.8), (30, 0.9)])
def test_few_patients_are_covered_on_average(patients, coverage): # over the draw of the calibration patients too, which is what is promised
    similarity, valid, z, truth, _ = invented(400, 10**6)
    held = []
    for seed in range(40):
        calibration = DepthCalibration.fit(*invented(patients, seed), coverage=coverage)
        low, high = calibration.interval_mm(calibration.posterior(similarity, valid), z).T
        held.append(float(((low <= truth) & (truth <= high)).float().mean()))
    assert coverage - 0.01 < sum(held) / 40 < coverage + 1 / (patients + 1) + 0.02


def test_sure_answers_get_short_intervals():
    similarity, valid, z, truth, patient = invented(100, 3)
    calibration = DepthCalibration.fit(similarity, valid, z, truth, patient)
    length = [float((lambda i: i[:, 1] - i[:, 0])(calibration.interval_mm(calibration.posterior(s, valid[:1]), z[:1]))) for s in (similarity[:1], 0.3 * similarity[:1])]
    assert 0 < length[0] < length[1] <= 300
    nobody = DepthCalibration.fit(*(x[:15] for x in (similarity, valid, z, truth, patient)))          # five patients: no finite promise
    whole = nobody.interval_mm(nobody.posterior(similarity[:1], valid[:1]), z[:1])
    assert nobody.stretch == math.inf and whole[0].tolist() == [0, 300]


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
    smooth = disease_prompt_loss(F.normalize(out["scan_embedding_secondary"], dim=-1), given["disease_prompt_embedding"][:, 0], given["disease_labels"], T, given["disease_pos_weight"], smoothing=0.1)
    close(smooth, out["disease_loss_smoothing0.1"])


def test_disease_unknown_is_not_no():
    image, prompts = F.normalize(torch.randn(3, 4), dim=-1).requires_grad_(), F.normalize(torch.randn(2, 2, 4), dim=-1)
    loss = disease_prompt_loss(image, prompts, torch.full((3, 2), -1), T); loss.backward()
    assert float(loss.detach()) == 0 and float(image.grad.abs().sum()) == 0
    labels = torch.tensor([[1, -1], [-1, 0], [-1, -1]])
    g = value_and_gradients(lambda v: disease_prompt_loss(v, prompts, labels, T), image)[1]
    assert float(g[2].abs().sum()) == 0 and float(g[:2].abs().sum()) > 0
    with pytest.raises(InputError, match=r"\(3, 5\).*2 questions"): disease_prompt_loss(image, prompts, torch.zeros(3, 5), T)


def test_disease_extreme_scores_are_finite():
    v = torch.eye(2, requires_grad=True)
    loss = disease_prompt_loss(v, torch.stack([torch.eye(2), -torch.eye(2)], 1), 1 - torch.eye(2).long(), torch.tensor(6.))
    loss.backward(); assert math.isfinite(float(loss.detach())) and v.grad.isfinite().all()


def test_positive_weights():
    labels = torch.tensor([[1, 0, 1, -1], [0, 0, 1, -1], [0, 0, 1, -1], [0, -1, 1, -1]])
    assert positive_weights(labels).tolist() == [3, 20, 0, 1]
    assert draw_phrasings(torch.arange(12).view(4, 3)).shape == (4,)
