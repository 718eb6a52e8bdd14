"Answers of a model whose every parameter is its own: a head or mask in the wrong place shows."
import json
import warnings

import numpy as np, pytest, torch
import torch.nn.functional as F

from ctvlm.core import CTVolume, InputError, Notice
from ctvlm.depth import DepthCalibration
from ctvlm.findings import prompts_for
from ctvlm.localization import depth_posterior, posterior_median_mm
from ctvlm.model import CTVLMConfig, CTVLMModel, CTVLMProcessor, catalogue_name, localize, untrained
from ctvlm.phantoms import PhantomCohort
from ctvlm.prepared import PreparedEncoder
from ctvlm.preprocessing import make_windows
from ctvlm.text import tokenize, tokenizer_fingerprint, train_tokenizer

torch.set_num_threads(1)
WORDS = ["There is a cyst in the liver.", "No pleural effusion."] * 3


def perturbed(seed=0, **changes):
    "Nothing is a copy of anything, t is not log 10, gains are not one."
    tokenizer = train_tokenizer(WORDS, 300)
    torch.manual_seed(seed)
    model = CTVLMModel(CTVLMConfig.tiny(len(tokenizer), **changes)).eval()
    model.processor = CTVLMProcessor.of(model.config, tokenizer)
    with torch.no_grad():
        for x in model.parameters():
            x.add_(0.3 * x.std(correction=0).clamp(min=0.1) * torch.randn_like(x))
        for head in (model.scan_head, model.slice_head, model.report_head, model.snippet_head):
            head.gain.uniform_(0.5, 2)
        model.t.fill_(1.3)
    return model


@pytest.fixture(scope="module")
def model(): return perturbed()


def volume(slices=60, name="made up", seed=None):
    affine = np.diag([3., 3, 5, 1])
    affine[:3, 3] = -150, -150, -400
    voxels = np.random.default_rng(seed or slices).normal(0, 300, (100, 90, slices))
    return CTVolume(voxels.astype(np.float32), affine, np.arange(slices)[::-1] + 1, name)


def seen(model, v): return make_windows(v, tuple(model.config.fit), model.config.window_spec)


@torch.no_grad()
def literal(model, v):
    "Vectors of a scan, head by head, from the encoders themselves."
    w = seen(model, v)
    cls, depth = model.encode_windows(w.windows)
    grids, held = [tuple(w.grid.tolist())], w.patch_mask.flatten(1, 2).any(1)
    scan = model.scan_encoder.scan(cls, depth, grids, held)[0]
    slices, valid = model.scan_encoder.slices(depth, grids, held)
    heads = dict(scan=model.scan_head(scan), disease=model.slice_head(scan))
    depths = w.bin_depths_mm[valid[0].numpy()]
    return heads | dict(slices=model.slice_head(slices[0][valid[0]]), depths=depths)


@torch.no_grad()
def words(model, text, head): # one text alone
    ids = torch.tensor(tokenize(model.processor.tokenizer, [text], 1024)[0])
    return F.normalize(head(model.text_encoder(ids, torch.ones_like(ids)))[0], dim=0)


def unit(x): return F.normalize(x, dim=-1)


# planted: localize with the report head, with the disease vector, without the model's temperature
def test_localize_is_the_posterior_of_slices_and_snippet_head(model):
    v = volume()
    e = literal(model, v)
    similarity = unit(e["slices"]) @ words(model, "a cyst", model.snippet_head)
    p = depth_posterior(similarity[None], torch.ones(1, len(similarity), dtype=torch.bool), 0.1)
    a = model.localize(v, "a cyst")[0]
    assert np.allclose(a.probabilities, p[0], atol=1e-5)
    assert np.allclose(a.bin_depths_mm, e["depths"])
    median = posterior_median_mm(p, torch.tensor(e["depths"]))[0].item()
    assert a.depth_mm == pytest.approx(median, abs=0.05)
    wrong = unit(e["slices"]) @ words(model, "a cyst", model.report_head)
    assert (wrong - similarity).abs().max() > 0.01               # the fault would show


# planted: classify with the report's vector, prompts through the snippet head, 10 instead of exp(t)
def test_classify_is_the_second_image_head_against_the_first_text_head(model):
    v = volume()
    e, prompts = literal(model, v), prompts_for("Pleural effusion", "ensemble")
    def score(image):
        sides = [torch.stack([words(model, s, model.report_head) for s in side]).mean(0)
                 for side in (prompts.positive, prompts.negative)]
        return ((sides[0] - sides[1]) @ unit(image)).item()
    a = model.classify(v, "pleural effusion")[0]
    assert a.score == pytest.approx(score(e["disease"]), abs=1e-5)
    assert a.probability == pytest.approx(1 / (1 + np.exp(-np.exp(1.3) * a.score)), abs=1e-4)
    assert abs(score(e["disease"]) - score(e["scan"])) > 1e-3


# planted: rank with the disease vector, rank and classify swapped, texts through the snippet head
def test_rank_is_the_first_heads(model):
    scans = [volume(n, str(n)) for n in (40, 60, 50)]
    report = words(model, "a cyst", model.report_head)
    want = {str(len(v.depths_mm)): (unit(literal(model, v)["scan"]) @ report).item() for v in scans}
    a = model.rank("a cyst", scans)[0]
    assert dict(zip(a.scans, a.similarity)) == pytest.approx(want, abs=1e-5)
    assert list(a.scans) == sorted(want, key=want.get, reverse=True)
    assert [scans[i].name for i in a.order] == list(a.scans)


# planted: forward without its mask
@torch.no_grad()
def test_forward_reads_the_mask(model):
    batch = model.processor([volume(), volume(40)], ["a cyst", "nothing"])
    assert not batch["patch_mask"].all()
    out = model(**batch)
    for row, n in enumerate((60, 40)):
        e = literal(model, volume(n))
        assert torch.allclose(out.scan[row], e["scan"], atol=1e-5)
        assert torch.allclose(out.slices[row][out.valid[row]], e["slices"], atol=1e-5)
    without = model(**{k: x for k, x in batch.items() if k != "patch_mask"})
    assert (without.scan - out.scan).abs().max() > 1e-3


# planted: the processor ignores fit; embed cuts otherwise than the processor
def test_all_entrances_give_equal_bytes(model, tmp_path):
    import nibabel
    v = PhantomCohort(1, seed=5, spacing=(3., 3., None))[0].volume  # noise is no CT, and refused
    want = seen(model, v)
    nibabel.save(nibabel.Nifti1Image(v.array, v.affine), tmp_path / "scan.nii.gz")
    for given in (v, want, str(tmp_path / "scan.nii.gz")):
        batch = model.processor(given)
        assert batch["windows"].equal(want.windows) and batch["patch_mask"].equal(want.patch_mask)
        assert batch["grid"][0].equal(want.grid)
    other = make_windows(v, "pad", model.config.window_spec)
    assert not other.grid.equal(want.grid)                       # the fault would show
    e = literal(model, v)
    assert torch.allclose(model.embed(v).slices, e["slices"], atol=1e-5)
    assert torch.allclose(model.embed(str(tmp_path / "scan.nii.gz")).scan, e["scan"], atol=1e-3)


# planted: the bias of patches left 0
def test_water_is_zero_at_the_start():
    encoder = untrained().window_encoder
    water = torch.full((1, 1, 32, 32, 32), 0.5)
    assert encoder.patch_embed.proj(water).abs().max() < 1e-5 < encoder.patch_embed.proj.bias.abs().max()


# planted: an interval that is not clamped to the scan, one without its answer, a label that promises
@pytest.mark.parametrize("decode", ["median", "argmax", "mean"])
def test_every_interval_lies_in_the_scan_and_holds_its_answer(model, decode):
    v, low, high = volume(), *volume().depths_mm[[0, -1]]
    for stretch in (None, 0.01, 100.):
        c = DepthCalibration(stretch=stretch, flat=1., least=-1., n_patients=40,
                             population="drawn patients")
        model.config.interval_calibration = None if stretch is None else c.to_dict()
        try: answers = model.localize(v, ["cyst", "no effusion", "x", "liver"], decode=decode)
        finally: model.config.interval_calibration = None
        for a in answers:
            assert low <= a.interval_mm[0] <= a.depth_mm <= a.interval_mm[1] <= high
            promised = "posterior, 90%" if stretch is None else "conformal, 90% of drawn patients"
            assert a.interval == promised
            if stretch == 100: assert a.interval_mm == pytest.approx((low, high))


def test_a_calibration_of_nobody_promises_nothing(model):
    model.config.interval_calibration = dict(tau=0.05)
    try: a = model.localize(volume(), "cyst")[0]
    finally: model.config.interval_calibration = None
    assert a.interval == "posterior, 90%" and not a.abstains and not a.calibrated_on


def test_an_answer_that_abstains_says_so_first(model):
    c = DepthCalibration(stretch=1., flat=0., least=1., n_patients=40, population="drawn patients")
    model.config.interval_calibration = c.to_dict()
    try: a = model.localize(volume(), "banana")[0]
    finally: model.config.interval_calibration = None
    assert a.abstains and a.line.startswith("banana: not in this scan, best guess z = ")


# planted: bfloat16 never on, on over weights of another type
@pytest.mark.parametrize("width,dtype,on", [(264, torch.float32, True), (48, torch.float32, False),
                                            (264, torch.float16, False), (264, torch.bfloat16, False)])
def test_bfloat16_only_where_it_gains(monkeypatch, width, dtype, on):
    monkeypatch.setattr("ctvlm.answers.fast_dtype", lambda device: torch.bfloat16)
    sizes = dict(width=width, depth=1, heads=2, layer_scale=1.)
    m = perturbed(window_encoder=sizes, scan_encoder={**sizes, "width": 48, "heads": 2}).to(dtype)
    with m._ask(): assert torch.is_autocast_enabled("cpu") == on
    answer = m.localize(volume(), "cyst")[0]                     # float16 on a CPU: crashed at this width
    assert np.isfinite(answer.probabilities).all()


@pytest.mark.parametrize("training", [True, False])
def test_asking_leaves_the_mode(training):
    m = perturbed().train(training)
    m.window_encoder.eval()                                      # frozen parts stay frozen
    m.localize(volume(), "cyst"); m.classify(volume(), "cyst")
    assert m.training == m.scan_encoder.training == training and not m.window_encoder.training


def test_weights_of_another_tokenizer_are_refused(model):
    fresh = CTVLMModel(CTVLMConfig.tiny(len(model.processor.tokenizer)))
    fresh.load_state_dict(model.state_dict())                    # the catalogue's was taken once
    with pytest.raises(InputError, match="has no tokenizer"): fresh.localize(volume(), "cyst")
    same, large = untrained().processor.tokenizer, train_tokenizer(["a b"], 300)
    with pytest.raises(InputError, match=f"the tokenizer has {len(same)} tokens"):
        fresh.processor = CTVLMProcessor.of(fresh.config, same)
    with pytest.raises(InputError, match="is not the model's"):
        model.processor = CTVLMProcessor.of(model.config, large)
    assert model.config.tokenizer == tokenizer_fingerprint(model.processor.tokenizer)
    own = dict(window_spec=model.config.window_spec, fit=model.config.fit, max_tokens=1024)
    for change in (dict(fit="pad"), dict(max_tokens=77), dict(window_spec=dict(spacing=(3, 3, 4)))):
        (name,), given = change, own | change
        with pytest.raises(InputError, match=f"the processor's {name} is"):
            model.processor = CTVLMProcessor(model.processor.tokenizer, **given)


def test_an_embedding_belongs_to_its_model(model):
    e, other = model.embed(volume()), perturbed(seed=1)
    for ask in (other.localize, other.classify):
        with pytest.raises(InputError, match="was embedded by another model"): ask(e, "cyst")
    with pytest.raises(InputError, match="was embedded by another model"): other.rank("cyst", [e])
    assert model.embed(e) is e and "26 bins" in repr(e) and len(repr(e)) < 100
    same = perturbed()
    assert same.fingerprint() == model.fingerprint() != other.fingerprint()
    with torch.no_grad(): same.slice_head.direction[0, 0] += 1e-3  # one number suffices
    assert same.fingerprint() != model.fingerprint()


def test_long_reports_keep_their_impression(model):
    report = f"Findings: {'No focal lesion here. ' * 400}\nImpressions: Cyst in the liver.\n"
    alone = "Findings: \nImpressions: Cyst in the liver.\n"
    a, b = model.rank([report, report.replace("Cyst", "Stone")], volume())
    assert a.cut == model.localize(volume(), report)[0].cut > 500 and a.similarity != b.similarity
    assert "tokens of the text were left out" in a.line and not model.rank(alone, volume())[0].cut
    with pytest.warns(Notice, match="1 of 2 texts are longer than 1024 tokens"):
        ids = model.processor(text=[report, alone])["input_ids"]
    assert ids.shape == (2, 1024)
    assert model.processor.tokenizer.decode(ids[0]).endswith("liver.\n<|end|>")
    with pytest.raises(InputError, match="shorten them"):
        model.processor(text=report, truncation=False)


@torch.no_grad()
def test_an_encoder_of_512_positions_reads_512():
    text = dict(model_type="bert", vocab_size=300, hidden_size=24, num_hidden_layers=1,
                num_attention_heads=2, intermediate_size=32, max_position_embeddings=512)
    m = perturbed(text=text)
    assert m.config.max_tokens == 512 and m.localize(volume(), "cyst " * 900)[0].cut > 300


@pytest.mark.parametrize("given", ["Pleural effusion", "pleural effusion", "PLEURAL EFFUSION",
                                   "pleural_effusion", " a pleural  effusion"])
def test_a_name_of_the_catalogue_in_any_case(model, given):
    a = model.classify(volume(), given, style="single")[0]
    assert (a.finding, a.source) == ("Pleural effusion", "catalogue")
    assert a == model.classify(volume(), "Pleural effusion", style="single")[0]
    assert catalogue_name(given) == a.finding and catalogue_name("a coin") is None
    assert catalogue_name("Pleuraerguss") == "Pleural effusion"     # however the catalogue spells it
    for alias in ("Herzverbreiterung", "cardiac enlargement"):
        assert catalogue_name(alias) == "Cardiomegaly"
    assert model.classify(volume(), "a coin")[0].source == "free text"


def test_several_texts_of_every_kind(model):
    v = volume()
    for make in (list, tuple, iter, lambda t: (x for x in t), lambda t: dict.fromkeys(t).keys()):
        assert len(model.localize(v, make(["cyst", "effusion"]))) == 2
        assert len(model.classify(v, make(["cyst", "effusion"]))) == 2
        assert len(model.rank(make(["cyst", "effusion"]), v)) == 2
    for ask in (model.embed, lambda x, **o: model.localize(x, "cyst", **o)):
        with pytest.raises(TypeError): ask(model.embed(v), fit="nonsense")


def test_answers_go_to_json_compare_and_hash(model):
    v = volume()
    for ask in (model.localize, model.classify, lambda v, text: model.rank(text, [v])):
        (a,), (b,) = ask(v, "cyst"), ask(v, "cyst")
        assert a == b and hash(a) == hash(b) and len({a, b}) == 1 and a != 3 and len(repr(a)) < 200
        assert json.loads(json.dumps(a.to_dict())) == a.to_dict()
    assert model.localize(v, "cyst")[0] != model.localize(v, "effusion")[0]
    assert localize(model, v, "cyst") == model.localize(v, "cyst")
    for thing in (model.processor, model(**model.processor(v)), model.embed(v)):
        assert len(repr(thing)) < 200


def test_learning_adds_to_what_was_learned_and_drops_the_calibration():
    c = CTVLMConfig.tiny(interval_calibration=dict(tau=0.05, n_patients=40))
    c.learned_from("drawn patients")
    assert c.trained_on == "drawn patients" and c.interval_calibration is None
    c.learned_from("real scans"); c.learned_from("real scans")
    assert c.trained_on == "drawn patients; then real scans"


@pytest.mark.parametrize("wrong,says", [
    (dict(projection_dim="x"), "projection_dim is 'x': give a width"), (dict(foo=3), "has no foo"),
    (dict(spacing=(1, 2)), "three lengths"), (dict(spacing=(1, 2, float("nan"))), "three lengths"),
    (dict(window=(32, 32, 32.5)), "three numbers of voxels"),
    (dict(fit="nonsense"), "fit is 'nonsense'"),
    (dict(fit=("crop", "pad")), "for each axis"), (dict(hu_levels=(3, 1)), "ascending"),
    (dict(window_encoder=dict(widht=3)), "has widht"),
    (dict(window_encoder=dict(width="48")), "width is '48'"),
    (dict(window_encoder=dict(depth=True)), "depth is True"),
    (dict(adapters=dict(r=2, targets="q")), "adapters.targets"),
    (dict(text={}, text_name=3), "text_name is 3"), (dict(text={"hidden_size": 3}), "model_type"),
    (dict(max_tokens=10**6), "reads 32768"), (dict(trained_on=None), "give words"),
    (dict(text={"model_type": "bert", "auto_map": {}}), "names Python code")])
def test_configurations_are_checked_field_by_field(wrong, says):
    with pytest.raises(InputError, match=says): CTVLMConfig(**wrong)


def test_what_a_text_encoder_cannot_read_is_said(model):
    ids = torch.ones(1, 3, dtype=torch.long)
    for wrong, says in ((["cyst"], "a list, expected whole numbers"), ("cyst", "a str"),
                        (ids[0], "of shape \\(3,\\)"), (ids.float(), "torch.float32"),
                        (ids * 300, "go from 300 to 300"), (-ids, "go from -1")):
        with pytest.raises(InputError, match=says): model.encode_text(wrong)
    for wrong in ([], ["", "x"], [3]):
        with pytest.raises(InputError): model.processor(text=wrong)
    with pytest.raises(InputError, match="list of volumes is empty"): model.processor([])
    with pytest.raises(InputError, match="nothing to process"): model.processor()
    with pytest.raises(InputError, match="nothing to embed"): model()
    with pytest.raises(InputError, match="without their grid"): model(torch.rand(1, 1, 32, 32, 32))
    with pytest.raises(InputError, match="found a ndarray"): model.processor(volume().array)
    with pytest.raises(InputError, match="were cut with"): model.processor(make_windows(volume()))


def test_importing_leaves_the_process_as_it_was():
    import subprocess, sys
    code = "import transformers.utils.logging as l, ctvlm.model; assert l.is_progress_bar_enabled()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_text_that_fits_two_places_names_both(monkeypatch):
    "Two peaks: `set_mm` holds two intervals, shorter together than the interval, and the words name them; one peak: none."
    from ctvlm.viewer import answer_words
    model, v = perturbed(), volume(90)
    promised = DepthCalibration(tau=0.1, coverage=0.9, stretch=1., mass=0.9, flat=None, least=None, n_patients=99,
                                population="drawn patients", bin_mm=model.config.calibration.bin_mm)
    model.config.interval_calibration = promised.to_dict()
    def peaks(*bins):
        def posterior(self, similarity, valid):
            p = torch.full(similarity.shape, 1e-4)
            p[:, list(bins)] = 1.
            return p / p.sum(1, keepdim=True)
        monkeypatch.setattr(DepthCalibration, "posterior", posterior)
        return model.localize(v, "a cyst in the liver")[0]
    two, one = peaks(3, 20), peaks(10)
    assert len(two.set_mm) == 2 and one.set_mm == ()
    assert sum(b - a for a, b in two.set_mm) < two.interval_mm[1] - two.interval_mm[0]
    assert "it fits" in answer_words(two) and "it fits" not in answer_words(one)
    assert [tuple(part) for part in two.to_dict()["set_mm"]] == list(two.set_mm)


@pytest.mark.parametrize("scans, compiled", [(1, False), (51, True)])
def test_a_card_has_an_encoder_laid_out_for_it(monkeypatch, scans, compiled):
    "The same numbers to 1e-5 in float32; it is compiled where there is enough to do."
    made = []
    class Watched(PreparedEncoder):
        def __init__(self, encoder, dtype, compiled):
            made.append(compiled)
            super().__init__(encoder, dtype)
    monkeypatch.setattr("ctvlm.answers.PreparedEncoder", Watched)
    model, windows = untrained(), torch.rand(5, 1, 32, 32, 32)
    with torch.no_grad(): exact = model.window_features(scans)(windows, 2)
    assert not made
    monkeypatch.setattr(CTVLMModel, "device", torch.device("cuda"))
    found = model.window_features(scans)(windows, 2)
    assert made == [compiled]
    for x, y in zip(found, exact): torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


def test_what_products_are_computed_in(monkeypatch):
    "bfloat16 where a processor is fast at it and the model wide; weights in another kind stay as they are."
    monkeypatch.setattr("ctvlm.answers.fast_dtype", lambda device: torch.bfloat16)
    model = untrained()
    assert model._fast() == torch.float32
    model.config.window_encoder["width"] = 256
    assert model._fast() == torch.bfloat16 and model.half()._fast() == torch.float16
