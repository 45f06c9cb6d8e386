"""The parts of a decoder layer on the CPU against float64: products, norm, activation, rotation, attention, forward and backward."""

import pytest
import torch
import torch.nn.functional as F

from rose_kernels import layer, native

pytestmark = pytest.mark.skipif("cpu" not in native.served(), reason="csrc is not built here: no C++ compiler")
BOUND = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
dtypes = pytest.mark.parametrize("dtype", BOUND, ids=lambda d: str(d).removeprefix("torch."))


def error(ours, true) -> float:
    return float((ours.double() - true.detach()).norm() / true.detach().norm())


@dtypes
@pytest.mark.parametrize(
    "rows, columns, depth", [(1, 16, 16), (5, 1120, 48), (261, 576, 1536), (100, 80, 3088), (3, 1600, 400), (14, 48, 12_560)]
)
def test_products(dtype, rows, columns, depth):
    """Turned and straight, written and added, float32 and narrow inputs and outputs; widths that fill panels and blocks, or do not."""
    a = torch.randn(rows, depth)
    turned, straight = torch.randn(columns, depth).to(dtype), torch.randn(depth, columns).to(dtype)
    true = a.to(dtype).double() @ turned.double().T, a.to(dtype).double() @ straight.double()
    rounded = dtype != torch.float32 and not layer._serves(turned)  # PyTorch's products are rounded before they are widened
    for given in (a, a.to(dtype)):
        for out_dtype in {torch.float32, dtype}:
            for w, is_turned, wanted in ((turned, True, true[0]), (straight, False, true[1])):
                bound = 2e-6 if out_dtype == torch.float32 and not rounded else BOUND[dtype]
                out = torch.full((rows, columns), torch.nan, dtype=out_dtype)
                layer.products_(given, [w], [out], turned=is_turned)
                assert error(out, wanted) < bound
                before = torch.randn(rows, columns).to(out_dtype)
                out = before.clone()
                layer.products_(given, [w], [out], turned=is_turned, add=True)
                assert error(out, before.double() + wanted) < bound


@dtypes
def test_products_share_their_input_and_depend_on_no_threads(dtype):
    if not layer._serves(torch.empty(1, 1, dtype=dtype)):
        pytest.skip("PyTorch's products serve here, which promise nothing of the kind")
    a, ws = torch.randn(37, 96), [torch.randn(n, 96).to(dtype) for n in (96, 32, 32, 144)]
    outs = [torch.empty(37, len(w)) for w in ws]
    layer.products_(a, ws, outs, turned=True)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for w, out in zip(ws, outs, strict=True):
                alone = torch.empty_like(out)
                layer.products_(a, [w], [alone], turned=True)
                assert torch.equal(alone, out)
    finally:
        torch.set_num_threads(threads)


@dtypes
@pytest.mark.parametrize("depth, divides", [(448, True), (12_544, True), (80, False)])
def test_products_in_parts_are_those_of_processes_that_have_one_each(dtype, depth, divides):
    """The first adds its part to what there is, the second's is added to that."""
    if not layer._serves(torch.empty(1, 1, dtype=dtype)):
        pytest.skip("PyTorch's products serve here, which promise no bits")
    divides &= depth % (32 if dtype == torch.float32 else 64) == 0
    a, w, before = torch.randn(14, depth), torch.randn(48, depth).to(dtype), torch.randn(14, 48)
    for turned, weight in ((True, w), (False, w.T.contiguous())):
        out, wanted = before.clone(), before.clone()
        layer.products_(a, [weight], [out], turned=turned, add=True, parts=2)
        for i, part in enumerate(a.chunk(2, 1) if divides else [a]):
            held = weight.narrow(1 if turned else 0, part.storage_offset(), part.shape[1]).contiguous()
            alone = wanted if i == 0 else torch.empty_like(wanted)
            layer.products_(part.contiguous(), [held], [alone], turned=turned, add=i == 0)
            wanted = alone if i == 0 else wanted + alone
        assert torch.equal(out, wanted)


def test_products_where_the_machine_has_no_avx512(monkeypatch):
    a, w, out = torch.randn(7, 32), torch.randn(48, 32), torch.randn(7, 48)
    before = out.clone()
    monkeypatch.setattr(layer, "_serves", lambda weight: False)
    layer.products_(a, [w], [out], turned=True, add=True)
    assert error(out, before.double() + a.double() @ w.double().T) < 2e-6
    layer.products_(a, [w], [out], turned=True, parts=2)
    assert error(out, a.double() @ w.double().T) < 2e-6
    with pytest.raises(ValueError, match="parts must be at least 1"):
        layer.products_(a, [w], [out], turned=True, parts=0)


@dtypes
def test_rms_norm(dtype):
    x, w, dy, grad = 3 * torch.randn(9, 48), torch.rand(48).to(dtype), torch.randn(9, 48), torch.randn(9, 48)
    exact = x.double().requires_grad_()
    true = exact / (exact.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w.double()
    (slope,) = torch.autograd.grad(true, exact, dy.double())
    assert error(layer.rms_norm(x, w, 1e-5), true) < BOUND[dtype]
    before = grad.clone()
    assert error(layer.rms_norm_backward_(grad, dy, x, w, 1e-5), before.double() + slope) < 1e-6


@dtypes
def test_swiglu(dtype):
    gate, up, dy = (scale * torch.randn(11, 80).to(dtype) for scale in (6, 1, 1))
    g, u = (x.double().requires_grad_() for x in (gate, up))
    true = F.silu(g) * u
    slopes = torch.autograd.grad(true, (g, u), dy.double())
    assert error(layer.swiglu(gate, up), true) < BOUND[dtype]
    layer.swiglu_backward_(dy, gate, up)
    assert error(gate, slopes[0]) < BOUND[dtype] and error(up, slopes[1]) < BOUND[dtype]


def test_swiglu_far_out():
    gate = torch.tensor([-1e4, -200.0, -80.0, 0.0, 80.0, 200.0, 1e4, -0.0] * 2)
    up = torch.ones(16)
    torch.testing.assert_close(layer.swiglu(gate, up), F.silu(gate), rtol=1e-6, atol=1e-30)


@dtypes
def test_rotation_and_its_transpose(dtype):
    x, dy = (torch.randn(6, 3, 64).to(dtype) for _ in range(2))
    cosine, sine = torch.randn(6, 64), torch.randn(6, 64)  # any tables: halves need not agree
    exact = x.double().requires_grad_()
    a, b = exact.chunk(2, -1)
    true = exact * cosine[:, None].double() + torch.cat([-b, a], -1) * sine[:, None].double()
    (slope,) = torch.autograd.grad(true, exact, dy.double())
    assert error(layer.rotate_(x.clone(), cosine, sine), true) < BOUND[dtype]
    assert error(layer.rotate_(dy.clone(), cosine, sine, backward=True), slope) < BOUND[dtype]


def suffixes(lengths, prefixes, cached):
    prefix = torch.zeros(len(lengths), max(prefixes), dtype=torch.long)
    for b, n in enumerate(prefixes):
        prefix[b, :n] = torch.randperm(cached)[:n]
    length = torch.tensor(lengths)
    return layer.Layout(length.cumsum(0) - length, length, prefix, torch.tensor(prefixes))


@dtypes
@pytest.mark.parametrize("heads, kv, dim", [(4, 4, 32), (6, 2, 64), (5, 1, 96)])
def test_attention(dtype, heads, kv, dim):
    """Suffixes of many lengths over shared, scattered and absent prefixes, against the library's attention in float64."""
    layout = suffixes([1, 7, 3, 19], [30, 0, 17, 1], 40)
    N = int(layout.length.sum())
    layout.check(N, 40)
    q, k, v, past_k, past_v, dout = (
        torch.randn(n, h, dim).to(dtype) for n, h in ((N, heads), (N, kv), (N, kv), (40, kv), (40, kv), (N, heads))
    )
    scale = 1.7 / dim**0.5
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    out = []
    for start, length, prefix, past in zip(*(t.tolist() for t in vars(layout).values()), strict=True):
        part = slice(start, start + length)
        keys, values = (
            torch.cat([cache.double()[prefix[:past]], x[part]]).transpose(0, 1) for cache, x in ((past_k, exact[1]), (past_v, exact[2]))
        )
        mask = torch.ones(length, past + length, dtype=torch.bool).tril(past)
        mixed = F.scaled_dot_product_attention(exact[0][part].transpose(0, 1), keys, values, mask, scale=scale, enable_gqa=True)
        out.append(mixed.transpose(0, 1))
    true = torch.cat(out)
    slopes = torch.autograd.grad(true, exact, dout.double())
    bound = 5e-6 if dtype == torch.float32 else BOUND[dtype]
    assert error(layer.attention(q, k, v, past_k, past_v, layout, scale), true) < bound
    for ours, slope in zip(layer.attention_backward(dout, q, k, v, past_k, past_v, layout, scale), slopes, strict=True):
        assert error(ours, slope) < bound


def test_what_does_not_fit_is_refused():
    x = torch.randn(4, 32)
    with pytest.raises(ValueError, match="out must have shape"):
        layer.products_(x, [torch.randn(48, 32)], [torch.empty(4, 32)], turned=True)
    with pytest.raises(ValueError, match="multiples of 16"):
        layer.products_(x, [torch.randn(50, 32)], [torch.empty(4, 50)], turned=True)
    with pytest.raises(ValueError, match="multiple of 16"):
        layer.rms_norm(torch.randn(4, 24), torch.ones(24), 1e-5)
    with pytest.raises(ValueError, match="float32"):
        layer.swiglu(x.double(), x.double())
    with pytest.raises(IndexError, match="prefix must lie"):
        suffixes([2], [3], 9).check(2, 1)
    with pytest.raises(IndexError, match="start"):
        suffixes([2, 3], [3, 1], 9).check(4, 9)
    with pytest.raises(IndexError, match="prefix_length"):
        suffixes([2], [1], 1).check(2, 0)
    with pytest.raises(ValueError, match="multiple of 16"):
        layer.rms_norm(torch.randn(4, 0), torch.ones(0), 1e-5)
    with pytest.raises(ValueError, match="evenly"):
        q, k = torch.randn(2, 3, 32), torch.randn(2, 2, 32)
        layer.attention(q, k, k, k, k, suffixes([2], [1], 2), 1.0)


def test_nan_is_not_hidden():
    """A NaN in a query or a key alone reaches the output: a loss that is not finite is what the engine stops at."""
    q, k, v = torch.randn(3, 2, 32), torch.randn(3, 2, 32), torch.randn(3, 2, 32)
    past = torch.randn(4, 2, 32)
    for x in (q, k):
        x[1, 0, 5] = torch.nan
        out = layer.attention(q, k, v, past, past, suffixes([3], [2], 4), 1.0)
        assert out[1, 0].isnan().all() and out[1, 1].isfinite().all() and out[0].isfinite().all()
        x[1, 0, 5] = 0.0
    assert layer.swiglu(torch.full((16,), torch.nan), torch.ones(16)).isnan().all()
