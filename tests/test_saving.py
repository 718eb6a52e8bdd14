"Folders and hubs: what is written can be read by anyone, and nothing that is missing is filled in."
import json, logging, shutil
from pathlib import Path

import numpy as np, pytest, torch
from safetensors.torch import load_file, save_file

from ctvlm.core import InputError, Notice
from ctvlm.localization import depth_posterior
from ctvlm.model import SPECTRE, CTVLMConfig, CTVLMModel, CTVLMProcessor, load_any, untrained
from ctvlm.text import train_tokenizer
from test_answers import perturbed, volume
from test_model import TINY, config_of, released, spectre_files

torch.set_num_threads(1)
FILES = {"README.md", "config.json", "model.safetensors", "processor_config.json", "tokenizer.json",
         "tokenizer_config.json"}


@pytest.fixture(scope="module")
def model(): return perturbed(trained_on="drawn patients")


@pytest.fixture
def hub(monkeypatch): # what was uploaded
    sent = {}
    class Api:
        def __init__(self, token=None): sent["token"] = token
        def create_repo(self, repo_id, **_): return type("Repo", (), {"repo_id": repo_id})
        def upload_folder(self, repo_id, folder_path, **more):
            sent.update({f.name: f.read_bytes() for f in Path(folder_path).iterdir()}, to=repo_id, **more)
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    return sent


def radfinder(folder, tokenizer=True):
    folder.mkdir(exist_ok=True)
    shutil.copy(TINY / "weights.safetensors", folder / "model.safetensors")
    shutil.copy(TINY / "config.json", folder)
    if tokenizer: train_tokenizer(["a cyst"] * 3, 300).save_pretrained(folder)
    return folder


# what a release says beyond its sizes: used, or named in a refusal
def with_key(path, value):
    config = released()
    *parts, last = path.split(".")
    section = config
    for p in parts: section = section.setdefault(p, {})
    section[last] = value
    return config


MODEL = "radfinder_model_config"
@pytest.mark.parametrize("path,value,says", [
    (f"{MODEL}.backbone_kwargs.use_rope", False, "use_rope False"),
    (f"{MODEL}.backbone_kwargs.pre_norm", 0, "pre_norm 0"),
    (f"{MODEL}.backbone_kwargs.rope_kwargs.rescale", 2, "rope_kwargs has rescale"),
    (f"{MODEL}.backbone_kwargs.rope_kwargs.rescale", False, "rope_kwargs has rescale"),
    (f"{MODEL}.backbone_kwargs.qk_norm", False, "backbone_kwargs has qk_norm"),
    (f"{MODEL}.backbone_kwargs.pixdim", [1, 1, 3], "contradicts itself: pixdim"),
    (f"{MODEL}.feature_combiner_kwargs.pool", None, "feature_combiner_kwargs has pool"),
    (f"{MODEL}.text_tokenizer", "bert", "contradicts itself: text_tokenizer"),
    (f"{MODEL}.extra", {}, f"{MODEL} has extra"), ("extra", "", "the configuration has extra"),
    ("image_preprocessing.intensity_b_min", -1, "intensity_b_min -1"),
    ("image_preprocessing.intensity_b_max", 255, "intensity_b_max 255"),
    ("image_preprocessing.orientation", "LPS", "orientation 'LPS'"),
    ("image_preprocessing.sliding_window_size", [64, 64, 32], "contradicts itself: sliding_window_size"),
    ("do_snippet_alignment.enabled", False, "enabled False"),
    ("do_snippet_alignment.projector_mode_image", "new", "projector_mode_image 'new'"),
    ("do_snippet_alignment.loss_scale", 0, "do_snippet_alignment has loss_scale"),
    ("image_preprocessing", [], "image_preprocessing is a list")])
def test_no_key_of_a_release_is_overlooked(path, value, says):
    with pytest.raises(InputError, match=says): CTVLMConfig.from_radfinder(with_key(path, value))


def test_what_a_release_says_is_used(caplog):
    with caplog.at_level(logging.INFO, "ctvlm"):
        config = CTVLMConfig.from_radfinder(with_key("do_snippet_alignment.localization_tau", 0.02))
    assert config.calibration.tau == 0.02 and not config.calibration.calibrated and config.fit == "crop"
    assert "fit='crop'" in caplog.text and "localization_sigma of 2.0" in caplog.text
    base = CTVLMConfig.from_radfinder(with_key(f"{MODEL}.feature_combiner_kwargs.rope_kwargs.base", 50.))
    assert base.scan_encoder["rope_base"] == 50 and base.window_encoder["rope_base"] == 1000
    for given in ("nowhere.json", TINY / "weights.safetensors"):
        with pytest.raises(InputError, match="cannot be read as a configuration"):
            CTVLMConfig.from_radfinder(given)


def test_an_answer_is_read_with_the_released_temperature():
    cold, warm = perturbed(interval_calibration=dict(tau=0.02)), perturbed()
    p, q = (m.localize(volume(), "cyst")[0].probabilities for m in (cold, warm))
    similarity = 0.1 * np.log(q)                                  # up to a constant
    assert np.allclose(torch.softmax(torch.tensor(similarity) / 0.02, 0), p, atol=1e-4)


def test_spectre_without_periods_is_not_guessed(tmp_path):
    weights = load_file(TINY / "weights.safetensors")
    weights = {k: v for k, v in weights.items() if not k.endswith("rope.periods")}
    spectre_files(tmp_path, weights)
    with pytest.raises(InputError, match="window_encoder hold no rope.periods"):
        CTVLMModel.from_spectre(tmp_path, fold=False)
    sizes = dict(window_encoder=dict(heads=2, rope_base=1000.), scan_encoder=dict(heads=2, rope_base=100.))
    model = CTVLMModel.from_spectre(tmp_path, fold=False, window=(32, 32, 16), **sizes)
    assert model.config.window_encoder["heads"] == 2 and model.config.window_encoder["width"] == 48


@torch.no_grad()
def test_load_any_reads_three_kinds_of_folders(tmp_path, model):
    model.save_pretrained(tmp_path / "ours")
    spectre_files(tmp_path, load_file(TINY / "weights.safetensors"), torch.zeros(48, 1, 8, 8, 8))
    ours, theirs = load_any(tmp_path / "ours"), load_any(radfinder(tmp_path / "rad"))
    spectre = load_any(tmp_path)
    assert ours.localize(volume(), "cyst") == model.localize(volume(), "cyst")
    ids = load_file(TINY / "inputs.safetensors")
    out = theirs.encode_text(ids["report_input_ids"], ids["report_attention_mask"])
    assert torch.allclose(out, load_file(TINY / "outputs.safetensors")["report_embedding"], atol=1e-5)
    assert theirs.config.fit == "crop" and theirs.embed_text("a cyst").shape == (1, 16)
    assert spectre.config.patch == [8, 8, 4] and "SPECTRE" in spectre.config.trained_on


def test_load_any_names_what_is_missing(tmp_path):
    empty, rad = tmp_path / "empty", radfinder(tmp_path / "rad")
    empty.mkdir()
    with pytest.raises(InputError, match="holds no model: expected config.json"): load_any(empty)
    (rad / "model.safetensors").unlink()
    with pytest.raises(InputError, match="holds 0 files of weights"): load_any(rad)
    (rad / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match="is of a bert, expected ctvlm's"): load_any(rad)
    (rad / "config.json").write_text("{")
    with pytest.raises(InputError, match="config.json is damaged"): load_any(rad)
    torch.save({}, empty / next(iter(SPECTRE)))
    with pytest.raises(InputError, match="hf download cclaess/SPECTRE"): load_any(empty)
    with pytest.raises(InputError, match="check the path"): load_any(tmp_path / "nowhere")


def test_a_release_is_saved_whole(tmp_path):
    theirs = load_any(radfinder(tmp_path / "rad"))
    theirs.save_pretrained(tmp_path / "ours")
    assert FILES == {f.name for f in (tmp_path / "ours").iterdir()}
    again = load_any(tmp_path / "ours")
    assert torch.equal(again.embed_text("a cyst"), theirs.embed_text("a cyst"))
    bare = load_any(radfinder(tmp_path / "bare", tokenizer=False))
    with pytest.warns(Notice, match="was saved without a tokenizer"):
        bare.save_pretrained(tmp_path / "b")
    with pytest.raises(InputError, match="has no tokenizer"):
        load_any(tmp_path / "b").embed_text("a cyst")


def test_what_goes_to_the_hub_is_what_is_saved(tmp_path, model, hub):
    model.save_pretrained(tmp_path / "ct", push_to_hub=True, token="secret", tags=["chest"])
    assert FILES <= set(hub) and hub["to"] == "ct" and hub["token"] == "secret"
    assert b"chest]" in hub["README.md"]
    hub.clear()
    model.push_to_hub("owner/ct", tags=["chest"], max_shard_size="200KB", create_pr=True)
    shards = [n for n in hub if n.startswith("model-")]
    assert len(shards) > 1 and "model.safetensors.index.json" in hub
    assert hub["create_pr"] and b"chest]" in hub["README.md"]
    with pytest.raises(InputError, match="does not know max_shard"):
        model.save_pretrained(tmp_path / "x", max_shard=3)


def test_only_the_main_process_writes(tmp_path, model):
    model.save_pretrained(tmp_path / "x", is_main_process=False)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("spoil,says", [
    (lambda f: (f / "tokenizer.json").write_text("{"), "the tokenizer of .* cannot be read"),
    (lambda f: (f / "tokenizer.json").unlink(), "the tokenizer of .* cannot be read"),
    (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "holds no saved ctvlm model"),
    (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "does not open: convert it"),
    (lambda f: edit(f, auto_map={"AutoModel": "evil.Model"}), "Python code of its own"),
    (lambda f: edit(f, foo=3), "has no foo"),
    (lambda f: edit(f, projection_dim=48), "holds no saved ctvlm model"),
    (lambda f: edit(f, fit="pad"), "the processor's fit is"),
    (lambda f: edit(f, tokenizer="0" * 16), "is not the model's"),
    (lambda f: edit(f, "processor_config.json", fit="pad"), "the processor's fit is pad")])
def test_a_damaged_folder_is_refused(tmp_path, model, spoil, says):
    model.save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(InputError, match=says): CTVLMModel.from_pretrained(tmp_path)


def edit(folder, name="config.json", **changes):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_options_of_loading_reach_everything(tmp_path, model):
    model.save_pretrained(tmp_path / "a" / "b")
    again, info = CTVLMModel.from_pretrained(tmp_path / "a", subfolder="b", output_loading_info=True)
    assert again.processor is not None and not info["missing_keys"]
    assert again.localize(volume(), "cyst") == model.localize(volume(), "cyst")
    for option in ("ignore_mismatched_sizes", "trust_remote_code"):
        with pytest.raises(InputError, match="random weights|no code"):
            CTVLMModel.from_pretrained(tmp_path / "a" / "b", **{option: True})


def test_revision_and_cache_reach_the_cached_copy(monkeypatch, tmp_path, model):
    asked = []
    def unreachable(*args, **kwargs): raise OSError("no network")
    def cached(name, **options): asked.append((name, options)); return str(tmp_path)
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    monkeypatch.setattr("huggingface_hub.snapshot_download", cached)
    model.save_pretrained(tmp_path)
    CTVLMModel.from_pretrained("owner/ct", revision="v2", cache_dir="/cache")
    assert asked == [("owner/ct", dict(local_files_only=True, revision="v2", cache_dir="/cache"))]


def test_a_folder_of_an_older_version_takes_its_cut_from_the_configuration(tmp_path, model):
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    saved.pop("fit"), saved.pop("max_tokens")
    (tmp_path / "processor_config.json").write_text(json.dumps(saved))
    assert CTVLMModel.from_pretrained(tmp_path).processor.fit == model.config.fit


def test_the_processor_saves_what_decides_what_a_model_sees(tmp_path):
    p = CTVLMProcessor(train_tokenizer(["a"], 300), dict(spacing=(2, 2, 4)), ("crop", "pad", "pad"), 77)
    p.save_pretrained(tmp_path)
    assert CTVLMProcessor.from_pretrained(tmp_path).to_dict() == p.to_dict()
    assert p.fit == ["crop", "pad", "pad"] and p.max_tokens == 77


# what a user of transformers expects
@torch.no_grad()
def test_a_model_takes_what_its_processor_gives(model):
    scans, words = [volume(), volume(40)], ["a cyst", "nothing at all"]
    batch = model.processor(scans, words, return_tensors="pt").to("cpu")
    out = model(**batch)
    assert out[0].equal(out.scan) and out["report"].equal(out.report)
    assert len(out.to_tuple()) == 5 == len(model(**batch, return_dict=False))
    image = {k: batch[k] for k in ("windows", "grid", "patch_mask")}
    assert torch.allclose(model.get_image_features(**image), out.scan, atol=1e-6)
    text = {k: batch[k] for k in ("input_ids", "attention_mask")}
    assert torch.allclose(model.get_text_features(**text), out.report, atol=1e-6)
    assert model(**image).report is None and model(**text).scan is None
    same = model.processor(images=volume())["windows"]
    assert same.equal(model.processor(volumes=volume())["windows"])
    assert model.get_input_embeddings() is model.text_encoder.model.embed_tokens
    padded = model.processor(text="cyst", padding="max_length", max_length=20)
    assert padded["input_ids"].shape == (1, 20) and padded["attention_mask"].sum() < 20
    model.processor.tokenizer.padding_side = "left"
    try: left = model(**model.processor(text=["a cyst", "nothing at all"]))
    finally: model.processor.tokenizer.padding_side = "right"
    assert torch.allclose(left.report, out.report, atol=1e-5)


@torch.no_grad()
def test_attention_of_the_text_encoder_can_be_chosen(tmp_path, model):
    model.save_pretrained(tmp_path)
    eager = CTVLMModel.from_pretrained(tmp_path, attn_implementation="eager")
    assert eager.text_encoder.model.config._attn_implementation == "eager"
    assert torch.allclose(eager.embed_text("a cyst"), model.embed_text("a cyst"), atol=1e-5)


def test_untrained_models_are_whole(tmp_path):
    untrained(seed=3).save_pretrained(tmp_path)
    assert FILES == {f.name for f in tmp_path.iterdir()}
    assert "its weights are random" in (tmp_path / "README.md").read_text()
