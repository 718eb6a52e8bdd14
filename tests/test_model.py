"Parity with released weights, saving and loading, and answers."
import json, logging
from pathlib import Path

import numpy as np, pytest, torch
from safetensors.torch import load_file, save_file

from ctvlm.core import CTVolume, InputError, Notice
from ctvlm.depth import DepthCalibration
from ctvlm.model import (CTVLMConfig, CTVLMModel, CTVLMProcessor, DepthAnswer, SPECTRE, VolumeEmbedding, fast_dtype, fold_depth, place_adapters, rename, untrained)
from ctvlm.text import AdapterSizes, train_tokenizer

torch.set_num_threads(1)
HERE, SHARED = Path(__file__).parent / "golden", Path(__file__).parent.parent.parent / "shared" / "golden"
TINY = HERE / "tiny"
GOLDEN = [TINY, pytest.param(SHARED / "half_patch", marks=pytest.mark.skipif(not SHARED.is_dir(), reason="../shared is not here"))]


def config_of(folder): return json.loads((folder / "config.json").read_text())
def golden(folder): return load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")
def close(a, b): assert a.shape == b.shape and (a - b).abs().max() < 1e-5, (a - b).abs().max()
def texts(model, inputs, what, head="report"): return model.encode_text(inputs[f"{what}_input_ids"], inputs[f"{what}_attention_mask"], head=head)


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda p: p.name)
@torch.no_grad()
def test_published_numbers(folder):
    i, o = golden(folder)
    model = CTVLMModel.from_radfinder(folder / "weights.safetensors", config_of(folder))
    close(model.window_encoder(i["pixel_windows"][:1])[0], o["window_tokens_first"])
    cls, depth = model.encode_windows(i["pixel_windows"])
    close(cls, o["window_cls"]); close(depth.mean(1), o["window_patch_mean"])
    first = 0
    for row, (x, y, z) in enumerate(i["grid_size"].tolist()):
        n = x * y * z
        close(depth[first:first + n], o["window_depth_tokens"][row, :x, :y, :z].flatten(0, 2)); first += n
    e, valid = model.encode_scan(i["pixel_windows"], i["grid_size"]), o["valid_depth_mask"]
    assert torch.equal(e.valid, valid)
    close(e.scan, o["scan_embedding"]); close(e.disease, o["scan_embedding_secondary"]); close(e.slices[valid], o["slice_embeddings"][valid])
    close(texts(model, i, "report"), o["report_embedding"]); close(texts(model, i, "snippet", "snippet"), o["snippet_embedding"]); close(texts(model, i, "snippet"), o["prompt_embedding"])
    assert abs(model.t.item() - load_file(folder / "weights.safetensors")["criterion.t"].item()) < 1e-7


@torch.no_grad()
def test_scans_alone_and_together():
    i, _ = golden(TINY)
    model, first = CTVLMModel.from_radfinder(TINY / "weights.safetensors", config_of(TINY)), 0
    e = model.encode_scan(i["pixel_windows"], i["grid_size"])
    for row, grid in enumerate(i["grid_size"]):
        n = int(grid.prod())
        alone = model.encode_scan(i["pixel_windows"][first:first + n], grid, chunk=1); first += n
        close(alone.scan[0], e.scan[row]); close(alone.disease[0], e.disease[row]); close(alone.slices[0], e.slices[row, e.valid[row]])
    assert model.encode_scan(i["pixel_windows"], i["grid_size"], slices=False).slices is None


@torch.no_grad()
def test_patch_mask():
    i, _ = golden(TINY)
    model = CTVLMModel.from_radfinder(TINY / "weights.safetensors", config_of(TINY))
    mask = torch.ones(9, 4, 4, 4, dtype=torch.bool)
    whole = model.encode_scan(i["pixel_windows"], i["grid_size"])
    close(model.encode_scan(i["pixel_windows"], i["grid_size"], patch_mask=mask).slices, whole.slices)
    mask[6, :, :, :2] = False                                    # the lowest two bins of the third scan
    some = model.encode_scan(i["pixel_windows"], i["grid_size"], patch_mask=mask)
    assert some.valid[2].tolist() == [False] * 2 + [True] * 10 and torch.equal(some.valid[:2], whole.valid[:2])
    close(some.slices[:2][whole.valid[:2]], whole.slices[:2][whole.valid[:2]]); close(some.scan[:2], whole.scan[:2])
    close(model.encode_features(*model.encode_windows(i["pixel_windows"]), i["grid_size"], mask.flatten(1, 2).any(1)).slices[some.valid], some.slices[some.valid])


@torch.no_grad()
def test_adapters_contained_or_not(tmp_path, caplog):
    i, o = golden(TINY)
    state, sizes = load_file(TINY / "weights.safetensors"), AdapterSizes(4, 16.)
    bare = {k: v - sizes.scale * state[k[:-6] + "lora_B"] @ state[k[:-6] + "lora_A"] if k.endswith("_proj.weight") and k[:-6] + "lora_A" in state else v for k, v in state.items()}
    save_file({f"model.{k}": v for k, v in bare.items()}, tmp_path / "bare.safetensors")
    with caplog.at_level(logging.INFO, "ctvlm"):
        merged = CTVLMModel.from_radfinder(TINY / "weights.safetensors", config_of(TINY))
        unmerged = CTVLMModel.from_radfinder(tmp_path / "bare.safetensors", config_of(TINY), lora_merged=False)
    assert "contain their adapters" in caplog.messages[0] and "lack their adapters" in caplog.messages[1]
    for model in (merged, unmerged): close(texts(model, i, "report"), o["report_embedding"])
    wrong = CTVLMModel.from_radfinder(TINY / "weights.safetensors", config_of(TINY), lora_merged=False)
    assert (texts(wrong, i, "report") - o["report_embedding"]).abs().max() > 0.05
    assert sorted(n for n, p in merged.text_encoder.named_parameters() if p.requires_grad) == sorted(n for n, _ in merged.text_encoder.named_parameters() if "lora_" in n)
    config = CTVLMConfig.from_radfinder(config_of(TINY), adapters={})                           # without adapters: the weights that contain them do alone
    close(texts(CTVLMModel.from_radfinder(TINY / "weights.safetensors", config), i, "report"), o["report_embedding"])
    with pytest.raises(InputError, match="the weights hold adapters"): CTVLMModel.from_radfinder(tmp_path / "bare.safetensors", config, lora_merged=False)
    before = merged.config
    merged.merge_adapters()
    close(texts(merged, i, "report"), o["report_embedding"])
    assert merged.config.adapters == {} and before.adapters                                     # whoever shares the old configuration keeps it


def test_every_misfit_is_named(tmp_path):
    state, source = load_file(TINY / "weights.safetensors"), config_of(TINY)
    def load(change, config=source):
        save_file({k: v for k, v in {**state, **change}.items() if v is not None}, tmp_path / "w.safetensors")
        return CTVLMModel.from_radfinder(tmp_path / "w.safetensors", config)
    with pytest.raises(InputError, match="missing scan_encoder.cls_token"): load({"feature_comb_image.cls_token": None})
    with pytest.raises(InputError, match="unknown window_encoder.register_tokens"): load({"backbone_image.register_tokens": torch.zeros(1, 4, 48)})
    with pytest.raises(InputError, match=r"of other shape report_head.direction \(16, 9\) instead of \(16, 32\)"): load({"projection_text.last_layer.parametrizations.weight.original1": torch.zeros(16, 9)})
    with pytest.raises(InputError, match="not the periods of base 1000"): load({"backbone_image.rope.periods": torch.ones(4)})
    for section, key in (("vision", "qk_norm"), ("combiner", "registers"), ("text", "lora_dropout_x"), ("head", "norm")):
        for value in (3, False, None, {}):
            with pytest.raises(InputError, match=f"{section} has {key}"): CTVLMConfig.from_radfinder({**source, section: {**source[section], key: value}})
        with pytest.raises(InputError, match=f"{section} has no"): CTVLMConfig.from_radfinder({**source, section: {}})
    with pytest.raises(InputError, match="has no vision"): CTVLMConfig.from_radfinder({})
    with pytest.raises(InputError, match="a dict or the path"): CTVLMConfig.from_radfinder([])
    for path in (tmp_path / "absent.safetensors", tmp_path, TINY / "config.json"):
        with pytest.raises(InputError, match="cannot be read as safetensors"): CTVLMModel.from_radfinder(path, source)
    assert CTVLMConfig.from_radfinder(TINY / "config.json").to_dict() == CTVLMConfig.from_radfinder(source).to_dict()


def released(**model):
    return {"radfinder_model_config": {**dict(projection_dim=512, feature_comb_embed_dim=1080, feature_comb_num_layers=4, feature_comb_num_heads=12, text_tokenizer="Qwen/Qwen3-Embedding-0.6B",
                text_hidden_size=1024, text_backbone_kwargs=dict(use_lora=True, lora_r=16, lora_alpha=64, lora_dropout=0.05, lora_target_keywords=["q_proj", "k_proj", "v_proj", "o_proj"]),
                backbone_kwargs=dict(sliding_window_size=[128, 128, 32], patch_size=[16, 16, 8], half_patch_embed=True, embed_dim=1080, depth=24, num_heads=12, mlp_ratio=4, rope_kwargs={"base": 1000.0}, pixdim=[0.75, 0.75, 3.0]),
                feature_combiner_kwargs=dict(rope_kwargs={"base": 100.0})), **model},
            "do_snippet_alignment": dict(enabled=True, projector_mode_image="copy", projector_mode_text="copy", snippet_mode="axis_localization", rope_mode="physical", localization_sigma=2.0, localization_tau=0.1),
            "image_preprocessing": dict(pixdim=[0.75, 0.75, 3.0], sliding_window_size=[128, 128, 32], intensity_a_min=-1000, intensity_a_max=1000), "text_tokenizer_name": "Qwen/Qwen3-Embedding-0.6B"}


def test_released_configuration_is_large():
    config, large = CTVLMConfig.from_radfinder(released()).to_dict(), CTVLMConfig.large().to_dict()
    assert {k for k in large if config[k] != large[k]} == {"trained_on", "fit"} and config["fit"] == "crop"
    with pytest.raises(InputError, match="backbone_kwargs has register_tokens"): CTVLMConfig.from_radfinder(released(backbone_kwargs={**released()["radfinder_model_config"]["backbone_kwargs"], "register_tokens": 4}))
    with pytest.raises(InputError, match="has no projection_dim"): CTVLMConfig.from_radfinder({"radfinder_model_config": {}})
    with pytest.raises(InputError, match="rope_mode 'grid'"): CTVLMConfig.from_radfinder({**released(), "do_snippet_alignment": {"rope_mode": "grid"}})


def test_large_has_the_published_sizes():
    with torch.device("meta"): model = CTVLMModel(CTVLMConfig.large())
    count = {n: sum(p.numel() for p in m.parameters()) for n, m in model.named_children()}
    assert 337e6 < count["window_encoder"] < 338e6 and count["scan_head"] == 2160 * 2048 + 2048 + 2048**2 + 2048 + 2048 * 256 + 256 + 512 * 256
    assert sum(p.numel() for n, p in model.text_encoder.named_parameters() if "lora_" in n) == 4587520


def spectre_files(folder, weights, kernel=None):
    for file, part in SPECTRE.items():
        state = {k.removeprefix(part + "."): v for k, v in weights.items() if k.startswith(part + ".") and "axis_" not in k}
        if kernel is not None and "patch_embed.proj.weight" in state: state["patch_embed.proj.weight"] = kernel
        torch.save(state, folder / file)


@pytest.mark.parametrize("fold", [True, False])
@torch.no_grad()
def test_spectre(tmp_path, fold):
    weights, (i, o) = load_file(TINY / "weights.safetensors"), golden(TINY)
    kernel = weights["backbone_image.patch_embed.proj.weight"]
    spectre_files(tmp_path, weights, torch.stack([kernel * 0.25, kernel * 0.75], -1).flatten(-2) if fold else None)
    model = CTVLMModel.from_spectre(tmp_path, lora_merged=True, fold=fold, window=(32, 32, 16))
    assert model.config.patch == [8, 8, 4] and model.config.adapters["alpha"] == 16 and model.config.scan_encoder["rope_base"] == 100 and model.config.window_encoder["heads"] == 2
    e = model.encode_scan(i["pixel_windows"], i["grid_size"])
    close(e.scan, o["scan_embedding"]); close(texts(model, i, "report"), o["report_embedding"])
    assert torch.equal(e.scan, e.disease)                                                        # second heads: copies
    weight = weights["feature_comb_image.patch_proj.weight"]
    assert torch.equal(model.scan_encoder.axis_patch_proj.weight, weight[:, -48:]) and torch.equal(model.scan_encoder.axis_patch_proj.bias, weights["feature_comb_image.patch_proj.bias"])
    assert abs(model.t.item() - np.log(10)) < 1e-6 and model.b.item() == -10
    plain = CTVLMModel.from_spectre(tmp_path, fold=fold, window=(32, 32, 16))                    # its own default: adapters not contained
    assert (texts(plain, i, "report") - o["report_embedding"]).abs().max() > 0.05


@torch.no_grad()
def test_spectre_adapters_alone_take_the_language_model_by_name(tmp_path):
    weights, (i, o) = load_file(TINY / "weights.safetensors"), golden(TINY)
    source = CTVLMModel.from_radfinder(TINY / "weights.safetensors", config_of(TINY))
    bare = CTVLMModel(CTVLMConfig.from_radfinder(config_of(TINY), adapters={})).text_encoder.model
    bare.load_state_dict({k.replace(".base_layer", ""): v for k, v in source.text_encoder.model.state_dict().items() if "lora_" not in k})
    bare.save_pretrained(tmp_path / "language model")
    spectre_files(tmp_path, {k: v for k, v in weights.items() if not k.startswith("backbone_text.") or "lora_" in k})
    model = CTVLMModel.from_spectre(tmp_path, fold=False, window=(32, 32, 16), text_name=str(tmp_path / "language model"))
    close(texts(model, i, "report"), o["report_embedding"])


def test_spectre_reads_no_code_and_names_absent_files(tmp_path):
    spectre_files(tmp_path, load_file(TINY / "weights.safetensors"))
    import os
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path / "owned"),)
    torch.save({"x": Evil()}, tmp_path / next(iter(SPECTRE)))
    with pytest.raises(InputError, match="holds no plain tensors"): CTVLMModel.from_spectre(tmp_path)
    assert not (tmp_path / "owned").exists()
    (tmp_path / next(iter(SPECTRE))).unlink()
    with pytest.raises(InputError, match="spectre_backbone_vit_large_patch16_128.pt.*hf download cclaess/SPECTRE"): CTVLMModel.from_spectre(tmp_path)


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared is not here")
def test_fold():
    before = load_file(SHARED / "half_patch" / "patch_embed_before_fold.safetensors")["backbone_image.patch_embed.proj.weight"]
    assert torch.equal(fold_depth(before), load_file(SHARED / "half_patch" / "weights.safetensors")["backbone_image.patch_embed.proj.weight"])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["There is a cyst in the liver.", "No pleural effusion."] * 3, 300)
    m = CTVLMModel(CTVLMConfig.tiny(vocab_size=len(tokenizer), trained_on="nothing at all")).eval()
    m.processor = CTVLMProcessor.of(m.config, tokenizer)
    return m


def volume(slices=60, name="made up"):
    affine = np.diag([3., 3, 5, 1]); affine[:3, 3] = -150, -150, -400
    return CTVolume(np.random.default_rng(slices).normal(0, 300, (100, 90, slices)).astype(np.float32), affine, np.arange(slices)[::-1] + 1, name)


def test_fresh_model_starts_as_the_design_says(model):
    fresh = CTVLMModel(CTVLMConfig.tiny(adapters=dict(r=2, alpha=4., dropout=0., targets=["q_proj"])))
    for first, second in (("scan_head", "slice_head"), ("report_head", "snippet_head")):
        for a, b in zip(getattr(fresh, first).parameters(), getattr(fresh, second).parameters()): assert torch.equal(a, b) and a is not b
    assert torch.equal(fresh.scan_encoder.axis_patch_proj.weight, fresh.scan_encoder.patch_proj.weight[:, 48:])
    assert all((p == 0).all() for n, p in fresh.named_parameters() if "lora_B" in n) and fresh.window_encoder.cls_token.std() > 0
    assert abs(fresh.t.item() - np.log(10)) < 1e-6 and fresh.b.item() == -10 and not any("gain" in n for n, _ in fresh.named_parameters())


@pytest.mark.parametrize("adapters", [{}, dict(r=2, alpha=4., dropout=0., targets=["q_proj", "v_proj"])])
@torch.no_grad()
def test_save_and_load_through_auto_classes(tmp_path, model, adapters):
    from transformers import AutoConfig, AutoModel, AutoProcessor
    if adapters:
        model, old = CTVLMModel(CTVLMConfig.tiny(vocab_size=300, adapters=adapters)).eval(), model
        model.processor = old.processor
        for n, p in model.named_parameters():
            if "lora_B" in n: p.normal_()
    model.save_pretrained(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {"README.md", "config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert model.config.trained_on in (tmp_path / "README.md").read_text() and "Not a medical device" in (tmp_path / "README.md").read_text()
    again = AutoModel.from_pretrained(tmp_path)
    assert isinstance(again, CTVLMModel) and isinstance(AutoConfig.from_pretrained(tmp_path), CTVLMConfig) and isinstance(AutoProcessor.from_pretrained(tmp_path), CTVLMProcessor)
    assert not again.training and again.processor.window_spec == model.config.window_spec
    for (n, a), (m, b) in zip(model.state_dict().items(), again.state_dict().items()): assert n == m and torch.equal(a, b)
    assert [n for n, p in again.named_parameters() if p.requires_grad] == [n for n, p in model.named_parameters() if p.requires_grad]
    x, ids = torch.rand(4, 1, 32, 32, 32), again.processor.tokens(["a cyst"])
    close(again.encode_scan(x, (1, 1, 4)).slices, model.encode_scan(x, (1, 1, 4)).slices); close(again.encode_text(**ids), model.encode_text(**ids))


def test_nothing_is_filled_in_silently(tmp_path, model):
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in state.items() if k != "scan_encoder.cls_token"}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="scan_encoder.cls_token"): CTVLMModel.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="no saved ctvlm model"): CTVLMModel.from_pretrained(tmp_path.parent)
    with pytest.raises(InputError, match="check the path"): CTVLMModel.from_pretrained(str(tmp_path / "absent"))


@torch.no_grad()
def test_in_bfloat16(tmp_path, model):
    model.save_pretrained(tmp_path)
    half = CTVLMModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.window_encoder.cls_token.dtype == torch.bfloat16
    a, b = model.embed(volume()), half.embed(volume())
    assert torch.cosine_similarity(a.slices, b.slices).min() > 0.98
    half.localize(volume(), "cyst")


def test_push_to_hub_takes_the_whole_folder(monkeypatch, model):
    sent = {}
    class Api:
        def __init__(self, token=None): pass
        def create_repo(self, repo_id, **_): return type("Repo", (), {"repo_id": repo_id})
        def upload_folder(self, repo_id, folder_path, **more): sent.update({f.name: f.read_bytes() for f in Path(folder_path).iterdir()}, to=repo_id, **more)
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    model.push_to_hub("owner/ct", commit_message="one more epoch", create_pr=True)
    assert sent["to"] == "owner/ct" and sent["commit_message"] == "one more epoch" and sent["create_pr"] and b"Not a medical device" in sent["README.md"] and {"model.safetensors", "tokenizer.json", "processor_config.json"} <= set(sent)


def test_processor(model):
    out = model.processor([volume(60), volume(40)], ["a cyst", "no pleural effusion at all"])
    assert out["grid"].shape == (2, 3) and len(out["windows"]) == out["grid"].prod(1).sum() == len(out["patch_mask"]) and out["windows"].dtype == torch.float16
    assert out["bin_depths_mm"].shape[0] == 2 and out["bin_depths_mm"].isnan().any() and out["input_ids"].shape == out["attention_mask"].shape
    assert (out["input_ids"][0] == model.processor.tokenizer.eos_token_id).sum() == 1
    assert model.processor.tokens("x " * 5000)["input_ids"].shape[1] == 1024


def test_localize(model, tmp_path):
    v = volume()
    for decode in ("median", "argmax", "mean"):
        for a in model.localize(v, ["cyst", "effusion", "x" * 400], decode=decode):
            assert isinstance(a, DepthAnswer) and v.depths_mm[0] <= a.depth_mm <= v.depths_mm[-1] and a.image_number == v.image_number_at(a.depth_mm)
            assert abs(a.probabilities.sum() - 1) < 1e-5 and len(a.probabilities) == len(a.bin_depths_mm) == 26 and a.interval == "posterior, 90%" and not a.abstains
            if decode == "argmax": assert a.depth_mm == pytest.approx(float(np.clip(a.bin_depths_mm[a.probabilities.argmax()], *v.depths_mm[[0, -1]])))
    assert model.localize(v, []) == [] and model.localize(v, "cyst")[0].depth_mm == pytest.approx(model.localize(model.embed(v), ["cyst"])[0].depth_mm, abs=1e-3)
    plain = CTVolume(v.array, v.affine)
    assert model.localize(plain, "cyst")[0].image_number is None
    with pytest.raises(InputError, match="empty"): model.localize(v, ["cyst", " "])
    with pytest.raises(InputError, match="is called 'mode'"): model.localize(v, "cyst", decode="mode")


def test_bins_of_an_answer_lie_where_the_windows_say(model):
    a, w = model.localize(volume(), "cyst")[0], model.processor.windows(volume())
    assert np.allclose(a.bin_depths_mm, w.bin_depths_mm[w.valid_bins])


def test_calibrated_interval(model):
    v, calibration = volume(), DepthCalibration(tau=0.02, coverage=0.8, stretch=0.5, flat=0.5, least=-1., n_patients=30, population="drawn patients")
    plain = model.localize(v, "cyst")[0]
    model.config.interval_calibration = calibration.to_dict()
    try: a = model.localize(v, "cyst")[0]
    finally: model.config.interval_calibration = None
    assert a.interval == "conformal, 80% of drawn patients" and a.calibrated_on == "drawn patients" and a.probabilities.max() > plain.probabilities.max() and a.abstains
    away = np.abs(a.bin_depths_mm - a.depth_mm)
    half = 0.5 * float((a.probabilities * np.where(away < 6, (away**2 + 36) / 12, away)).sum())           # of the posterior's own expected error
    assert a.interval_mm == pytest.approx((max(a.depth_mm - half, v.depths_mm[0]), min(a.depth_mm + half, v.depths_mm[-1])), abs=0.1)


def test_classify(model):
    from ctvlm.findings import prompts_for
    v = volume()
    known, other = model.classify(v, ["Pleural effusion", "a coin"])
    e, prompts = model.embed(v), prompts_for("Pleural effusion", "ensemble")
    d = torch.nn.functional.normalize(e.disease, dim=0)
    score = (model.embed_text(prompts.positive) @ d).mean() - (model.embed_text(prompts.negative) @ d).mean()
    assert known.score == pytest.approx(score.item(), abs=1e-5) and known.probability == pytest.approx(torch.sigmoid(model.t.exp() * score).item(), abs=1e-5)
    assert other.finding == "a coin" and 0 < other.probability < 1 and model.classify(v, []) == []


def test_rank(model):
    scans = [model.embed(volume(n, f"scan {n}")) for n in (40, 60, 50)]
    for answer in model.rank(["cyst in the liver", "no effusion"], scans):
        want = [torch.cosine_similarity(model.embed_text(answer.report)[0], s.scan, dim=0).item() for s in scans]
        assert list(answer.order) == sorted(range(3), key=lambda i: -want[i]) and answer.scans[0] == scans[answer.order[0]].name
        assert answer.similarity == pytest.approx(sorted(want, reverse=True), abs=1e-5)
    with pytest.raises(InputError, match="no volumes"): model.rank("cyst", [])


def test_paths_chunks_and_state(model, tmp_path):
    import nibabel
    v, rng = volume(), np.random.default_rng(0)                          # a file must look like CT: air, fat, soft tissue
    v = CTVolume((rng.choice([-1000.0, -100, 45], v.array.shape) + rng.normal(0, 15, v.array.shape)).astype(np.float32), v.affine)
    nibabel.save(nibabel.Nifti1Image(v.array, v.affine), tmp_path / "scan.nii.gz")
    a, b = model.embed(str(tmp_path / "scan.nii.gz")), model.embed(v, chunk=3)
    assert isinstance(a, VolumeEmbedding) and torch.allclose(a.slices, b.slices, atol=1e-4) and not a.slices.requires_grad
    model.train(); model.embed(v); assert model.training; model.eval()


def test_an_untrained_model_brings_its_tokenizer(tmp_path):
    m = untrained()
    assert len(m.localize(volume(), ["cyst in the liver"])) == 1 and len(m.processor.tokenizer) == 2048
    m.save_pretrained(tmp_path)
    again, ids = CTVLMModel.from_pretrained(tmp_path), m.processor.tokens("Kein Erguss.")["input_ids"]
    assert again.processor.tokens("Kein Erguss.")["input_ids"].equal(ids)
    for name, p in untrained().state_dict().items(): assert torch.equal(p, m.state_dict()[name])
    with pytest.raises(InputError, match="no model has the size 'huge'"): untrained("huge")


def test_loaded_weights_are_not_given_a_tokenizer_that_they_do_not_know(tmp_path):
    released = CTVLMModel.from_radfinder(TINY / "weights.safetensors", config_of(TINY))
    with pytest.warns(Notice, match="was saved without a tokenizer"): CTVLMModel(CTVLMConfig.tiny()).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*token*")) and not (tmp_path / "processor_config.json").exists()
    for m in (released, CTVLMModel.from_pretrained(tmp_path), CTVLMModel(CTVLMConfig.tiny(vocab_size=200))):
        with pytest.raises(InputError, match="has no tokenizer"): m.embed_text("cyst")


def test_what_is_no_scan_or_no_text_is_refused(model):
    v = volume()
    for wrong in (v.array, None, 3, [v]):
        with pytest.raises(InputError, match="where a scan should be"): model.embed(wrong)
    for ask in (model.localize, model.classify, lambda v, t: model.rank(t, [v])):
        for wrong in ("", " ", ["cyst", ""], [3], 3):
            with pytest.raises(InputError, match="a text is empty or no text"): ask(v, wrong)
    assert model.rank([], [v]) == [] and model.rank("cyst", model.embed(v))[0].order == (0,)      # one scan needs no list
    with pytest.raises(InputError, match="nothing.nii.gz does not exist"): model.rank("cyst", "/nothing.nii.gz")


def test_masks_are_checked(model):
    x = torch.rand(2, 1, 32, 32, 32)
    with pytest.raises(InputError, match=r"\(3, 8\), the features of \(2, 8\)"): model.encode_scan(x, (1, 1, 2), torch.ones(3, 8, dtype=torch.bool))
    with pytest.raises(InputError, match="leaves nothing of a scan"): model.encode_scan(x, [[1, 1, 1]] * 2, torch.arange(2)[:, None].expand(2, 8) > 0)
    with pytest.raises(InputError, match=r"found windows of shape \(0, 1"): model.encode_windows(x[:0])


def test_a_language_model_by_its_name(tmp_path, monkeypatch):
    from transformers import AutoConfig, AutoModel
    text = CTVLMConfig.tiny(vocab_size=300).text
    torch.manual_seed(1)
    language = AutoModel.from_config(AutoConfig.for_model(**text)).eval()
    language.save_pretrained(tmp_path)
    config = CTVLMConfig.tiny(text=text, text_name=str(tmp_path), adapters=dict(r=2, alpha=8., dropout=0.))
    m, ids = CTVLMModel(config).load_text().eval(), torch.randint(0, 300, (2, 6))
    with torch.no_grad(): close(m.text_encoder(ids, torch.ones_like(ids)), language(ids).last_hidden_state[:, -1])   # adapters start at zero
    assert all(p.requires_grad == ("lora_" in n) for n, p in m.text_encoder.named_parameters())
    for n, p in m.named_parameters():
        if "lora_B" in n: torch.nn.init.normal_(p)
    with torch.no_grad():
        before = m.encode_text(ids, torch.ones_like(ids))
        close(m.load_text().encode_text(ids, torch.ones_like(ids)), before)                       # loading again leaves the adapters alone
        close(m.merge_adapters().encode_text(ids, torch.ones_like(ids)), before)
    m.save_pretrained(tmp_path / "merged")
    with torch.no_grad(): close(CTVLMModel.from_pretrained(tmp_path / "merged").encode_text(ids, torch.ones_like(ids)), before)
    with pytest.raises(InputError, match="does not fit the configuration: missing model.layers.2"):
        CTVLMModel(CTVLMConfig.tiny(text={**text, "num_hidden_layers": 3})).load_text(str(tmp_path))
    with pytest.raises(InputError, match="names no text encoder"): CTVLMModel(CTVLMConfig.tiny(text=text)).load_text()
    def unreachable(*args, **kwargs): raise OSError("no network")
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(InputError, match="hf download owner/none --local-dir none"): m.load_text("owner/none")


def test_training_reaches_everything():
    torch.manual_seed(0)
    m = CTVLMModel(CTVLMConfig.tiny(vocab_size=300)).train()
    e = m.encode_scan(torch.rand(6, 1, 32, 32, 32).half(), [[1, 1, 2], [2, 1, 2]])
    ids = torch.randint(0, 300, (3, 9))
    out = [e.scan, e.disease, e.slices[e.valid], m.encode_text(ids, torch.ones_like(ids)), m.encode_text(ids, torch.ones_like(ids), "snippet")]
    (sum((o ** 2).sum() for o in out) + m.t + m.b).backward()
    assert not [n for n, p in m.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


def test_misuse_is_named(model):
    with pytest.raises(InputError, match="found 3 windows"): model.encode_scan(torch.rand(3, 1, 32, 32, 32), (1, 1, 2))
    with pytest.raises(InputError, match="text head 'image'"): model.encode_text(torch.ones(1, 1).long(), torch.ones(1, 1).long(), head="image")
    assert fast_dtype("cpu") in (torch.float32, torch.bfloat16)
    with pytest.raises(InputError, match="multiple"): CTVLMConfig.tiny(window=(30, 32, 32)).window_spec


def test_names_with_and_without_prefix():
    state = {"backbone_text.layers.0.self_attn.q_proj.weight": torch.ones(2, 2), "backbone_text.layers.0.self_attn.q_proj.lora_A": torch.ones(1, 2),
             "backbone_text.layers.0.self_attn.q_proj.lora_B": torch.ones(2, 1), "criterion.t": torch.ones(1)}
    ours = place_adapters(rename({f"model.{k}": v for k, v in state.items()}), AdapterSizes(1, 0.5), merged=True)
    assert ours.keys() == place_adapters(rename(state), AdapterSizes(1, 0.5), merged=True).keys() and ours["t"].shape == ()
    assert torch.equal(ours["text_encoder.model.layers.0.self_attn.q_proj.base_layer.weight"], torch.full((2, 2), 0.5))


def test_the_model_that_ships():
    "It loads, knows its tokenizer and whom its intervals hold for, is small enough for a wheel, and the wheel's list has it."
    from pathlib import Path
    import ctvlm
    from ctvlm.model import ready_model
    from ctvlm.phantoms import PhantomCohort
    folder = Path(ctvlm.__file__).parent / "data" / "tiny"
    assert sum(f.stat().st_size for f in folder.iterdir()) < 8e6
    assert '"data/tiny/*"' in (folder.parents[2] / "setup.py").read_text()
    model = ready_model("cpu")
    assert model.config.calibration.calibrated and "drawn patients" in model.config.calibration.promise
    volume = PhantomCohort(2, seed=77, spacing=(6., 6., 3.), languages=("en",))[0].volume
    a, = model.localize(volume, "pleural effusion on the left")
    assert volume.depths_mm[0] - 6 <= a.depth_mm <= volume.depths_mm[-1] + 6 and a.interval_mm[0] <= a.depth_mm <= a.interval_mm[1]
