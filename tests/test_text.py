"The text tower: tokenizer, pooling, adapters, and what happens without a network."
import pytest, torch

from ctvlm.core import InputError
from ctvlm.text import (
    AdapterSizes, TextEncoder, add_adapters, freeze_all_but_adapters, from_hub, local_or_hub,
    merge_adapters, pool_last, text_config, train_tokenizer)

torch.set_num_threads(1)
QWEN = dict(
    model_type="qwen3", vocab_size=400, hidden_size=24, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=10, intermediate_size=40,
    rope_parameters=dict(rope_type="default", rope_theta=1e6), tie_word_embeddings=True)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    def unreachable(*args, **kwargs): raise OSError("no network")
    monkeypatch.setattr("urllib.request.urlopen", unreachable)


def test_tokenizer_round_trip_in_any_language():
    t = train_tokenizer(["Leberzyste, siehe Serie 4.", "cyst in the liver"] * 3, 400)
    for text in ("größer, 肝囊肿 ∅", "Findings: a\nImpressions: b\n", "  two  spaces"):
        ids = t(text).input_ids
        assert ids[-1] == t.eos_token_id and t.decode(ids, skip_special_tokens=True) == text
    assert len(t) <= 400 and t.pad_token_id != t.eos_token_id
    same = train_tokenizer(["Leberzyste, siehe Serie 4.", "cyst in the liver"] * 3, 400)
    assert same("cyst").input_ids == t("cyst").input_ids


def test_truncation_keeps_the_end_token():
    t = train_tokenizer(["a b c"], 300)
    ids = t("a b c " * 2000, truncation=True, max_length=1024).input_ids
    assert len(ids) == 1024 and ids[-1] == t.eos_token_id


def test_tokenizer_saves_and_loads(tmp_path):
    t = train_tokenizer(["cyst"], 300)
    t.save_pretrained(tmp_path)
    from transformers import AutoTokenizer
    again = from_hub(AutoTokenizer, tmp_path)
    assert again("cyst of 3 cm").input_ids == t("cyst of 3 cm").input_ids
    assert (again.pad_token, again.eos_token) == (t.pad_token, t.eos_token)


def test_last_token_on_either_side_and_with_holes():
    hidden = torch.randn(4, 5, 3)
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 0, 0]])
    last = torch.stack([hidden[0, 1], hidden[1, 4], hidden[2, 4], hidden[3, 2]])
    assert torch.equal(pool_last(hidden, mask), last)
    assert torch.equal(pool_last(hidden, mask.bool()), pool_last(hidden, mask))


@torch.no_grad()
def test_a_text_alone_padded_left_and_padded_right():
    torch.manual_seed(0)
    e = TextEncoder(QWEN).eval()
    ids = torch.randint(0, 400, (1, 6))
    alone = e(ids, torch.ones_like(ids))
    pad, off = torch.zeros(1, 5, dtype=torch.long), torch.zeros(1, 5, dtype=torch.long)
    for order in (lambda a, b: torch.cat([a, b], 1), lambda a, b: torch.cat([b, a], 1)):
        padded = e(order(ids, pad), order(torch.ones_like(ids), off))
        assert torch.allclose(padded, alone, atol=1e-5)


@torch.no_grad()
def test_adapters_are_what_the_formula_says_and_merge():
    torch.manual_seed(0)
    sizes = AdapterSizes(r=3, alpha=12., dropout=0.)
    assert sizes.scale == 4
    e = TextEncoder(QWEN, sizes).eval()
    for n, p in e.named_parameters():
        if "lora_B" in n: p.normal_(std=0.2)
    plain = TextEncoder(QWEN).eval()
    state = e.state_dict()
    for name, p in plain.named_parameters():
        layer = name.removesuffix(".weight")
        if name in state: p.copy_(state[name])
        else:
            names = ".base_layer.weight", ".lora_B.default.weight", ".lora_A.default.weight"
            base, b, a = (state[layer + n] for n in names)
            p.copy_(base + 12 / 3 * b @ a)
    ids = torch.randint(0, 400, (3, 7)); mask = torch.ones_like(ids)
    assert torch.allclose(e(ids, mask), plain(ids, mask), atol=1e-5)
    merge_adapters(e)
    assert torch.allclose(e(ids, mask), plain(ids, mask), atol=1e-5)
    assert set(e.state_dict()) == set(plain.state_dict())
    assert all(p.requires_grad for p in e.parameters())


def test_only_adapters_are_trained():
    e = TextEncoder(QWEN, AdapterSizes(r=2, alpha=4., targets=("q_proj", "v_proj")))
    trained = {n for n, p in e.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2 and all("lora_" in n for n in trained)
    frozen = freeze_all_but_adapters(e).named_parameters()
    assert {n for n, p in frozen if p.requires_grad} == trained
    ids = torch.randint(0, 400, (2, 5))
    e(ids, torch.ones_like(ids)).sum().backward()
    assert all(p.grad is None for n, p in e.named_parameters() if n not in trained)


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    e = TextEncoder(QWEN, AdapterSizes(r=2, alpha=8., dropout=0.5))
    with torch.no_grad():
        for n, p in e.named_parameters():
            if "lora_B" in n: p.normal_()
    ids = torch.randint(0, 400, (2, 5)); mask = torch.ones_like(ids)
    assert not torch.equal(e.train()(ids, mask), e(ids, mask))
    assert torch.equal(e.eval()(ids, mask), e(ids, mask))


def test_any_encoder_takes_its_place(tmp_path):
    from transformers import BertConfig
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertConfig(vocab_size=400, **sizes).save_pretrained(tmp_path)
    adapters = AdapterSizes(r=2, alpha=4., targets=("query", "value"))
    e = TextEncoder(text_config(str(tmp_path)), adapters).eval()
    ids = torch.randint(0, 400, (2, 5))
    assert e.width == 16 and e(ids, torch.ones_like(ids)).shape == (2, 16)


def test_without_network_one_line_says_what_to_fetch(offline):
    from transformers import AutoModel
    with pytest.raises(InputError) as e:
        from_hub(AutoModel, "Qwen/Qwen3-Embedding-0.6B-that-nobody-has")
    assert "hf download Qwen/Qwen3-Embedding-0.6B-that-nobody-has" in str(e.value)
    assert "\n" not in str(e.value)


def test_without_network_the_cache_serves(offline, monkeypatch):
    def cached(name, local_files_only): return f"/cache/{name}"
    monkeypatch.setattr("huggingface_hub.snapshot_download", cached)
    assert local_or_hub("owner/name") == "/cache/owner/name"


def test_a_hub_that_answers_is_asked(monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: None)
    assert local_or_hub("owner/name") == "owner/name"


@pytest.mark.parametrize("name", ["./nothing", "/nothing/here", "a/b/c", "word"])
def test_a_wrong_path_is_no_hub_name(name):
    with pytest.raises(InputError, match="check the path"): local_or_hub(name)


def test_a_vocabulary_needs_its_bytes():
    with pytest.raises(InputError, match="258"): train_tokenizer(["a"], 200)


@pytest.mark.parametrize("kind, causal", [("qwen3", True), ("bert", False)])
def test_padding_behind_the_tokens_needs_no_mask(kind, causal):
    "In a causal encoder only: others would look at it."
    from ctvlm.text import TextEncoder, padded_last
    torch.manual_seed(0)
    sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    if causal: sizes |= dict(num_key_value_heads=1, head_dim=12)
    encoder = TextEncoder(dict(model_type=kind, **sizes)).eval()
    ids, mask = torch.randint(1, 50, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[0, 5:] = mask[1, 8:] = 0
    assert encoder.causal == causal and padded_last(mask) and not padded_last(mask.flip(1))
    with torch.no_grad(): torch.testing.assert_close(encoder(ids, mask, True), encoder(ids, mask))
    sees = []
    encoder.model.register_forward_pre_hook(lambda m, args, kwargs: sees.append(kwargs["attention_mask"]), with_kwargs=True)
    with torch.no_grad(): encoder(ids, mask, True)
    assert (sees[0] is None) == causal
