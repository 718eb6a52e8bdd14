"Encoders against slow literal ones, on shapes that the golden weights do not have."
import math

import pytest, torch, torch.nn.functional as F

from ctvlm.core import InputError
from ctvlm.vision import (EncoderSizes, ScanEncoder, WindowEncoder, attend, cut_patches, random_factor, rotary_coordinates, rotary_periods)

torch.set_num_threads(1)


def encoder(cls, seed=0, **kw):
    torch.manual_seed(seed)
    e = cls(**kw).eval()
    for p in e.parameters(): torch.nn.init.normal_(p, std=0.3)
    return e


def place(i, n): return 2 * (i + 0.5) / n - 1


def turn(x, where, base):
    "One head of one token, `x (h,)`, turned for its place `(x, y, z)`."
    h, out = len(x), x.clone()
    angles = [2 * math.pi * u / base ** (2 * k / (h / 3)) for u in where for k in range(h // 6)]
    for d, a in enumerate(angles):
        out[d] = x[d] * math.cos(a) - x[d + h // 2] * math.sin(a)
        out[d + h // 2] = x[d + h // 2] * math.cos(a) + x[d] * math.sin(a)
    return out


def norm(x, layer, eps): return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt() * layer.weight + layer.bias


def slow_blocks(e, tokens, places, sizes):
    "CLS token and `tokens (L, E)` through all blocks, head by head and query by query."
    x, h = torch.cat([e.cls_token[0], tokens]), sizes.width // sizes.heads
    for b in e.blocks:
        y = norm(x, b.norm1, sizes.eps)
        q, kv = y @ b.attn.q.weight.T + b.attn.q.bias, y @ b.attn.kv.weight.T + b.attn.kv.bias
        k, v, out = kv[:, :sizes.width], kv[:, sizes.width:], torch.zeros_like(x)
        for head in range(sizes.heads):
            part = slice(head * h, head * h + h)
            qs, ks = ([m[0, part]] + [turn(m[1 + i, part], p, sizes.rope_base) for i, p in enumerate(places)] for m in (q, k))
            for i in range(len(x)): out[i, part] = torch.softmax(torch.stack([qs[i] @ kk for kk in ks]) / h ** 0.5, 0) @ v[:, part]
        x = x + b.ls1.gamma * (out @ b.attn.proj.weight.T + b.attn.proj.bias)
        y = norm(x, b.norm2, sizes.eps) @ b.mlp.fc1.weight.T + b.mlp.fc1.bias
        y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
        x = x + b.ls2.gamma * (y @ b.mlp.fc2.weight.T + b.mlp.fc2.bias)
    return norm(x, e.norm, sizes.eps)


SIZES = [EncoderSizes(width=12, depth=1, heads=2, rope_base=1000., eps=1e-6), EncoderSizes(width=18, depth=2, heads=1, mlp_ratio=2., rope_base=30., eps=1e-2),
         EncoderSizes(width=60, depth=1, heads=2, mlp_ratio=1.5, rope_base=100., eps=1e-3)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("window, patch", [((8, 4, 6), (4, 4, 2)), ((4, 6, 4), (2, 2, 4))])
@torch.no_grad()
def test_window_encoder(sizes, window, patch):
    e = encoder(WindowEncoder, sizes=sizes, window=window, patch=patch)
    x = torch.rand(2, 1, *window)
    grid = [w // p for w, p in zip(window, patch)]
    tokens, (cls, depth) = e(x), e.features(x)
    for n in range(2):
        rows, places = [], []
        for i in range(grid[0]):
            for j in range(grid[1]):
                for k in range(grid[2]):
                    voxels = x[n, 0, i * patch[0]:(i + 1) * patch[0], j * patch[1]:(j + 1) * patch[1], k * patch[2]:(k + 1) * patch[2]]
                    rows.append((e.patch_embed.proj.weight[:, 0] * voxels).sum((1, 2, 3)) + e.patch_embed.proj.bias)
                    places.append([place(a, g) for a, g in zip((i, j, k), grid)])
        slow = slow_blocks(e, torch.stack(rows), places, sizes)
        assert torch.allclose(tokens[n], slow, atol=1e-4), (tokens[n] - slow).abs().max()
        assert torch.allclose(cls[n], slow[0], atol=1e-4)
        for k in range(grid[2]): assert torch.allclose(depth[n, k], slow[1 + k::grid[2]].mean(0), atol=1e-4)


POOLED = {"mean": lambda x: x.mean(0), "max": lambda x: x.amax(0)}


@pytest.mark.parametrize("pooling", POOLED)
@pytest.mark.parametrize("sizes", SIZES)
@torch.no_grad()
def test_scan_encoder_on_unequal_grids_with_padding(sizes, pooling):
    grids, bins, features, pooled = [(2, 1, 2), (1, 3, 1)], 3, 10, POOLED[pooling]
    e = encoder(ScanEncoder, sizes=sizes, features=features, pooling=pooling)
    cls, depth = torch.randn(7, features), torch.randn(7, bins, features)
    held = torch.ones(7, bins, dtype=torch.bool)
    held[[1, 3], 2] = False                                # the top bin of scan 0
    held[5] = False                                        # a whole window of scan 1
    scan, (slices, valid) = e.scan(cls, depth, grids, held), e.slices(depth, grids, held)
    assert slices.shape[:2] == valid.shape == (2, 6)
    assert valid.tolist() == [[True] * 5 + [False], [True] * 3 + [False] * 3]
    first = 0
    for row, (H, W, D) in enumerate(grids):
        n = H * W * D
        c, d, m = cls[first:first + n], depth[first:first + n], held[first:first + n]
        first += n
        where = [(place(i, H), place(j, W), k) for i in range(H) for j in range(W) for k in range(D)]
        keep = [i for i in range(n) if m[i].any()]
        # a mean commutes with the projection, a maximum is taken after it
        own = [c[i] @ e.patch_proj.weight[:, :features].T + e.patch_proj.bias for i in keep]
        each = [pooled(d[i][m[i]] @ e.patch_proj.weight[:, features:].T) for i in keep]
        places = [(*where[i][:2], place(where[i][2], D)) for i in keep]
        out = slow_blocks(e, torch.stack(own) + torch.stack(each), places, sizes)
        assert torch.allclose(scan[row], torch.cat([out[0], pooled(out[1:])]), atol=1e-4)
        keep = [(i, b) for i in range(n) for b in range(bins) if m[i, b]]
        tokens = torch.stack([d[i, b] @ e.axis_patch_proj.weight.T + e.axis_patch_proj.bias for i, b in keep])
        places = [(*where[i][:2], 2 * (where[i][2] * bins + b + 0.5) / D - 1) for i, b in keep]
        out = slow_blocks(e, tokens, places, sizes)
        for z in range(D * bins):
            here = [o for o, (i, b) in zip(out[1:], keep) if where[i][2] * bins + b == z]
            if here: assert torch.allclose(slices[row, z], torch.cat([out[0], pooled(torch.stack(here))]), atol=1e-4)


@pytest.mark.parametrize("pooling", POOLED)
def test_a_window_that_holds_nothing_teaches_nothing(pooling):
    e = encoder(ScanEncoder, sizes=SIZES[0], pooling=pooling).train()
    cls, depth = torch.randn(3, 12, requires_grad=True), torch.randn(3, 2, 12, requires_grad=True)
    held = torch.tensor([[True, True], [False, False], [True, False]])
    grids = [(1, 1, 3)]
    (e.scan(cls, depth, grids, held).sum() + e.slices(depth, grids, held)[0].sum()).backward()
    assert cls.grad.isfinite().all() and depth.grad.isfinite().all()
    assert not cls.grad[1].any() and not depth.grad[~held].any() and depth.grad[held].any()
    assert all(p.grad.isfinite().all() for p in e.parameters() if p.grad is not None)


@torch.no_grad()
def test_alone_and_together():
    e = encoder(ScanEncoder, sizes=EncoderSizes(width=24, depth=2, heads=2, rope_base=100.))
    grids = [(3, 2, 2), (1, 1, 1), (2, 2, 4)]
    cls, depth, first = torch.randn(29, 24), torch.randn(29, 4, 24), 0
    scan, (slices, valid) = e.scan(cls, depth, grids), e.slices(depth, grids)
    for row, g in enumerate(grids):
        part = slice(first, first + math.prod(g)); first += math.prod(g)
        assert torch.allclose(e.scan(cls[part], depth[part], [g])[0], scan[row], atol=1e-5)
        alone, v = e.slices(depth[part], [g])
        assert torch.allclose(alone[0], slices[row, :4 * g[2]], atol=1e-5) and valid[row].sum() == v.sum() == 4 * g[2]


@torch.no_grad()
def test_patches_are_a_convolution():
    x, w = torch.rand(2, 1, 8, 12, 6), torch.randn(5, 1, 4, 3, 2)
    assert torch.allclose(F.conv3d(x, w, stride=(4, 3, 2)).flatten(2).transpose(1, 2), cut_patches(x, (4, 3, 2)) @ w.flatten(1).T, atol=1e-5)


def test_training_factor_is_log_uniform_and_stretches_coordinates(monkeypatch):
    torch.manual_seed(0)
    logs = torch.tensor([random_factor() for _ in range(4000)]).log2().sort().values
    assert logs[0] >= -1 and logs[-1] <= 1
    assert (logs - torch.linspace(-1, 1, 4000)).abs().max() < 0.06                        # Kolmogorov-Smirnov distance to the uniform
    e = encoder(ScanEncoder, sizes=EncoderSizes(width=12, depth=1, heads=1, rope_base=50.)).train()
    monkeypatch.setattr("ctvlm.vision.random_factor", lambda: 1.7)
    cos, sin = e.tables([(1, 1, 3)], bins=2)
    angles = [2 * math.pi * 1.7 * (2 * (j + 0.5) / 3 - 1) / p for j in range(6) for p in rotary_periods(12, 50).tolist()]
    assert torch.allclose(cos[1:, 4:6].flatten(), torch.tensor(angles).cos(), atol=1e-5) and (cos[0] == 1).all() and (sin[0] == 0).all()
    assert not torch.equal(cos, e.eval().tables([(1, 1, 3)], bins=2)[0])


def test_one_factor_per_pass_from_torch_s_generator():
    e = encoder(WindowEncoder, sizes=EncoderSizes(width=12, depth=1, heads=1), window=(4, 4, 4), patch=(2, 2, 2)).train()
    x = torch.rand(2, 1, 4, 4, 4)
    torch.manual_seed(5); a = e(x)
    torch.manual_seed(5); b = e(x)
    assert torch.equal(a, b) and not torch.equal(a, e(x))


def test_tables_made_in_inference_mode_serve_training():
    e = encoder(WindowEncoder, sizes=EncoderSizes(width=12, depth=1, heads=1, rope_base=77.), window=(4, 4, 4), patch=(2, 2, 2))
    x = torch.rand(1, 1, 4, 4, 4)
    with torch.inference_mode(): e(x)
    e(x).sum().backward()
    assert e.cls_token.grad is not None and e.patch_embed.proj.weight.grad.abs().sum() > 0


def test_attention_in_bfloat16_agrees_with_the_fused_one():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 9, 18)
    mask = torch.rand(2, 1, 1, 9) > 0.3; mask[..., 0] = True
    for m in (None, mask):
        whole = F.scaled_dot_product_attention(q, k, v, attn_mask=m)
        assert torch.equal(attend(q, k, v, m), whole)
        assert (attend(*(t.bfloat16() for t in (q, k, v)), m).float() - whole).abs().max() < 0.03


def test_attention_in_bfloat16_takes_some_heads_at_a_time():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 3, 5, 400, 12).bfloat16()                                         # six of the fifteen heads at once, then three
    mask = torch.rand(3, 1, 1, 400) > 0.4                                                       # another one for each row
    for m in (None, mask): assert (attend(q, k, v, m).float() - F.scaled_dot_product_attention(*(t.float() for t in (q, k, v)), attn_mask=m)).abs().max() < 0.02


def test_misuse_is_named():
    with pytest.raises(InputError, match="multiple of 6"): EncoderSizes(width=64, heads=4)
    with pytest.raises(InputError, match="does not divide"): EncoderSizes(width=64, heads=3)
    e = encoder(WindowEncoder, sizes=SIZES[0], window=(4, 4, 4), patch=(2, 2, 2))
    with pytest.raises(InputError, match=r"expected \(N, 1, 4, 4, 4\)"): e(torch.rand(1, 4, 4, 4))
    assert rotary_coordinates((1, 2, 2), bins=2).shape == (8, 3)
