"The prepared window encoder against the plain one, on weights of which none is 0 or 1."
import pytest, torch

from ctvlm.prepared import PreparedEncoder, pad_halves, round_up
from ctvlm.vision import EncoderSizes, WindowEncoder


def perturbed(sizes, hu_levels=(), seed=0):
    g = torch.Generator().manual_seed(seed)
    encoder = WindowEncoder(sizes, (32, 32, 16), (16, 16, 4), hu_levels).eval().requires_grad_(False)
    for p in encoder.parameters():
        if p.ndim > 1: p.normal_(std=p[0].numel() ** -0.5, generator=g)
        else: p.add_(0.1 * torch.randn(p.shape, generator=g))
    return encoder


CASES = [
    (EncoderSizes(width=180, depth=2, heads=2, layer_scale=0.5), ()),      # heads of 90, as in the released weights
    (EncoderSizes(width=96, depth=3, heads=4, layer_scale=1.), (-1000, -300, 0, 300, 1000)),
    (EncoderSizes(width=36, depth=1, heads=6, layer_scale=0.3, mlp_ratio=2.), ())]


@pytest.mark.parametrize("sizes, hu_levels", CASES)
def test_equal_in_float32(sizes, hu_levels):
    encoder, windows = perturbed(sizes, hu_levels), torch.rand(5, 1, 32, 32, 16)
    ready = PreparedEncoder(encoder, torch.float32)
    for found, true in zip(ready.features(windows, 2), encoder.features(windows)):
        torch.testing.assert_close(found, true, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ready(windows), encoder(windows), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fault", ["scale", "layer scale", "halves", "norm"])
def test_a_planted_fault_is_seen(fault, monkeypatch):
    encoder, windows = perturbed(CASES[0][0]), torch.rand(2, 1, 32, 32, 16)
    if fault == "halves": # all zeros at the end of a head
        monkeypatch.setattr("ctvlm.prepared.pad_halves", lambda x, n: torch.nn.functional.pad(x, (0, n - x.shape[-1])))
    if fault == "norm": # counts the zeros
        monkeypatch.setattr("ctvlm.prepared._norm", lambda x, w, b, eps: torch.nn.functional.layer_norm(
            x, x.shape[-1:], *(torch.nn.functional.pad(p, (0, x.shape[-1] - len(p))) for p in (w, b)), eps))
    ready = PreparedEncoder(encoder, torch.float32)
    if fault == "scale": ready.blocks[0].scale = 96 ** -0.5
    if fault == "layer scale": ready.blocks[1].proj_bias = encoder.blocks[1].attn.proj.bias.new_zeros(192)
    found = ready.features(windows)[0][:, :180]
    assert (found - encoder.features(windows)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("sizes, hu_levels", CASES)
def test_bfloat16_is_no_further_than_autocast(sizes, hu_levels):
    encoder, windows = perturbed(sizes, hu_levels), torch.rand(6, 1, 32, 32, 16)
    true = encoder.features(windows)
    with torch.autocast("cpu", torch.bfloat16): today = encoder.features(windows)
    far = [[float((a.float() - b).norm() / b.norm()) for a, b in zip(found, true)]
           for found in (PreparedEncoder(encoder).features(windows), today)]
    assert all(ours < 1.1 * theirs for ours, theirs in zip(*far)), far


def test_one_shape_for_compiled_blocks():
    encoder, windows, shapes = perturbed(CASES[2][0]), torch.rand(7, 1, 32, 32, 16), []
    ready = PreparedEncoder(encoder, torch.float32)
    ready.compiled = True                                 # the chunks are filled up, whoever computes them
    ready.blocks[0].register_forward_hook(lambda block, x, y: shapes.append(tuple(y.shape)))
    found = ready.features(windows, 3)
    assert len(shapes) == 3 and len(set(shapes)) == 1
    for a, b in zip(found, encoder.features(windows)): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_the_plain_encoder_stays_as_it_is():
    encoder = perturbed(CASES[1][0])
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    ready = PreparedEncoder(encoder, torch.float32)
    for buffer in ready.buffers(): buffer.zero_()
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


def test_widths():
    assert [round_up(n, 32) for n in (1, 32, 33, 90)] == [32, 32, 64, 96]
    assert pad_halves(torch.arange(1., 5), 8).tolist() == [1, 2, 0, 0, 3, 4, 0, 0]
