"The benchmarks' own arithmetic: what chapter 13 and chapter 12 say of them must be what they compute."
import json, sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pytest, torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import improvements, runs


def test_a_run_is_measured_once_for_its_settings(tmp_path):
    calls = []
    measure = lambda: calls.append(1) or {"mae": len(calls)}
    found = [runs.kept(tmp_path / "a.json", {"epochs": e}, measure) for e in (6, 6, 7, 7)]
    assert found == [{"mae": 1}, {"mae": 1}, {"mae": 2}, {"mae": 2}] and len(calls) == 2
    assert json.loads((tmp_path / "a.json").read_text())["settings"] == {"epochs": 7}


def said(similarity, valid, truth): # of one snippet: what a loss gets, with slices that have these cosines
    D = similarity.shape[1]
    slices = torch.cat([torch.diag_embed((1 - similarity**2).sqrt()), similarity[:, :, None]], 2)      # (S, D, D + 1), unit vectors
    return SimpleNamespace(slices=slices, snippets=torch.eye(D + 1)[-1:].expand(len(similarity), -1), valid=valid, bin=truth,
                           all_slices=slices, all_valid=valid, scan=torch.arange(len(similarity)))


@pytest.mark.parametrize("power", [1, 2])
def test_distance_of_distributions(power):
    "Against the integral on a fine grid; bins of the padding count for nothing."
    g = torch.Generator().manual_seed(0)
    similarity, valid, truth = 0.9 * torch.rand(3, 8, generator=g), torch.arange(8) < torch.tensor([[8], [6], [7]]), torch.tensor([2.25, 4.75, 0.25])
    want = []
    for s, v, t in zip(similarity, valid, truth):
        p = torch.softmax(s[v] / improvements.TAU, 0).numpy()
        z = np.linspace(-0.5, len(p) - 0.5, 200 * len(p) + 1)
        z = (z[1:] + z[:-1]) / 2
        F = np.interp(z, np.arange(len(p) + 1) - 0.5, np.concatenate([[0], p.cumsum()]))
        want.append((np.abs(F - (z >= float(t)))**power).sum() / 200)
    assert improvements.cdf_distance(said(similarity, valid, truth), power, places=200).item() == pytest.approx(np.mean(want), abs=0.01)


def test_negatives_of_other_scans_only_add():
    g = torch.Generator().manual_seed(1)
    b = said(0.9 * torch.rand(3, 8, generator=g), torch.ones(3, 8, dtype=torch.bool), torch.tensor([2., 4., 0.]))
    assert improvements.other_scans(b) > improvements.cross_entropy(b)
    alone = said(0.9 * torch.rand(1, 8, generator=g), torch.ones(1, 8, dtype=torch.bool), torch.tensor([2.]))
    assert improvements.other_scans(alone).item() == pytest.approx(improvements.cross_entropy(alone).item())


def test_parabola_finds_the_top_of_a_gaussian():
    depths = 12. * np.arange(20)[None] + 6
    for top in (66., 70.5, 75.):
        p = np.exp(-(depths - top)**2 / (2 * 24**2))
        assert improvements.parabola(p / p.sum(), depths, 12.)[0] == pytest.approx(top)
    edge = np.exp(-depths / 24)
    assert improvements.parabola(edge / edge.sum(), depths, 12.)[0] == 6                               # no neighbour below


def test_an_interval_without_length_is_one_slice():
    import masks
    from ctvlm.localization import localization_loss
    g = torch.Generator().manual_seed(0)
    slices, snippets = torch.randn(3, 8, 5, generator=g), torch.randn(3, 5, generator=g)
    valid, at = torch.arange(8) < torch.tensor([[8], [6], [7]]), torch.tensor([2.25, 7.5, 0.5])
    b = SimpleNamespace(slices=slices, snippets=snippets, valid=valid, bin=at[:, None, None].expand(3, 2, 2))
    assert masks.cross_entropy(b).item() == pytest.approx(localization_loss(slices, snippets, at, valid, padding_free=True).item(), rel=1e-6)


def test_the_target_is_flat_inside_of_every_interval():
    import masks
    wide = masks.target(torch.tensor([[[1., 3.], [6., 6.]]]), torch.ones(1, 10, dtype=torch.bool), 2.)[0]
    assert wide[[1, 2, 3, 6]].tolist() == pytest.approx([wide.max().item()] * 4) and wide[4] == wide[5] < wide[3] and wide.sum() == pytest.approx(1)


def test_what_is_held_still_is_the_same_for_all_and_nothing_else_is():
    import randomisation as r
    from ctvlm.phantoms import PhantomCohort
    def seen(study):
        a, scan = study.anatomy, study.scan
        return {"body": a.scale.tolist(), "contrast": (a.traits.timing, a.hu((0, 100, 100), "liver")),
                "table and circle": (scan.pixel, scan.outside, *scan.shift[:2])}
    patients = PhantomCohort(12, 3)
    def kinds_alike(kinds):
        with r.still(kinds): found = [seen(patients[i]) for i in range(4)]
        return {kind for kind in found[0] if all(f[kind] == found[0][kind] for f in found)}
    for kind in (*seen(patients[0]), "range", "noise"): assert kinds_alike((kind,)) == {kind} & set(seen(patients[0]))
    assert kinds_alike(r.KINDS) == set(seen(patients[0])) and kinds_alike(()) == set()   # and all is undone
    def ends(kinds): # how much of the same body is scanned
        with r.still(kinds): return {(s.region, round(s.anatomy.low), round(s.anatomy.high)) for s in patients}
    regions = {s.region for s in patients}
    assert len(ends(("body", "range"))) == len(regions) < len(ends(("body",)))
    windows = torch.rand(2, 1, 4, 4, 4)
    def noisy(kinds): # windows, and the voxels of a scan
        with r.still(kinds): return r.recipe.roughened(windows, np.random.default_rng(0)), PhantomCohort(1, 5, (6., 6., 6.))[0].volume.array
    assert torch.equal(noisy(("noise",))[0], windows) and not torch.equal(noisy(())[0], windows)
    assert not np.array_equal(noisy(("noise",))[1], noisy(())[1])


def test_the_shifted_kind_keeps_its_depths():
    import randomisation as r
    (volume, labels, middles), (other, same, too) = (r.questions(1)[kind][0] for kind in ("drawn", "shifted"))
    assert (labels, middles) == (same, too) and np.array_equal(volume.affine, other.affine) and len(middles) > 10
    def soft(v): return ((v.array > -200) & (v.array < 300)).mean((0, 1))   # how much of a body each slice shows
    assert np.corrcoef(soft(volume), soft(other))[0, 1] > .9 and not np.allclose(volume.array, other.array, atol=100)
