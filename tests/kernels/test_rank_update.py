"""rank_update_ and the in-place write against dense float64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rose_kernels import add_low_rank_, raise_refused, rank_gram, rank_solve, rank_update_, write_error
from tests.kernels.conftest import rounding

FEW = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(rows, columns, n, dtype, seed, device):
    g = torch.Generator().manual_seed(seed)
    parts = torch.randn(rows, columns, generator=g).to(dtype), torch.randn(columns, n, generator=g), torch.randn(rows, n, generator=g)
    return tuple(x.to(device) for x in parts)


@FEW
@given(st.integers(1, 150), st.integers(1, 200), st.integers(1, 40), st.sampled_from(DTYPES), st.integers(0, 2**31))
def test_write_rounds_once(writer, device, rows, columns, n, dtype, seed):
    W, K, U = make(rows, columns, n, dtype, seed, device)
    V = K.T.contiguous()
    exact = W.double() + U.double() @ V.double()
    add_low_rank_([W], [U], [V])
    # Half a unit in the last place of the result's dtype, and what float32 accumulation may add.
    bound = rounding(dtype, writer) * exact.abs() + 2e-6 * (n + 1) * (1 + U.double().abs() @ V.double().abs())
    assert ((W.double() - exact).abs() <= bound).all()


@FEW
@given(st.integers(1, 60), st.integers(1, 90), st.integers(1, 50), st.sampled_from(DTYPES), st.floats(0.1, 50), st.integers(0, 2**31))
def test_update_is_the_dense_solution(writer, device, rows, columns, n, dtype, ridge, seed):
    W, K, R = make(rows, columns, n, dtype, seed, device)
    K[:, -1] = K[:, 0]  # identical keys: K^T K is singular
    k = K.double()
    dense = R.double() @ k.T @ torch.linalg.inv(ridge * torch.eye(columns, dtype=torch.float64, device=device) + k @ k.T)
    before = W.clone()
    U, V = rank_update_(W, K, R, ridge=ridge)
    assert U.dtype == V.dtype == torch.float32
    torch.testing.assert_close(U.double() @ V.double(), dense, rtol=1e-4, atol=1e-5)
    add_low_rank_([before], [U], [V])
    assert torch.equal(before, W)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_transposed_weight(writer, device, dtype):
    """As GPT-2 stores its projections: what is written is what the weight itself would hold."""
    W, K, R = make(70, 130, 5, dtype, 8, device)
    stored = W.T.contiguous()
    factors = rank_update_(W, K, R)
    turned = rank_update_(stored.T, K, R)
    assert all(torch.equal(a, b) for a, b in zip(factors, turned, strict=True))
    torch.testing.assert_close(stored.T, W, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_write_error_measures_rounding(writer, device):
    errors = {}
    for dtype in DTYPES:
        W, K, R = make(96, 128, 8, dtype, 5, device)
        WK = W.double() @ K.double()
        U, V = rank_update_(W, K, R)
        errors[dtype] = float(write_error(WK, W, U, V, K))
        exact = (U.double() @ V.double() @ K.double()).norm()
        assert errors[dtype] == pytest.approx(float((W.double() @ K.double() - WK - U.double() @ V.double() @ K.double()).norm() / exact))
    assert errors[torch.float32] < 1e-5 < errors[torch.float16] < errors[torch.bfloat16] < 0.2


def test_opcheck(writer, device):
    W, K, R = make(20, 30, 4, torch.float32, 6, device)
    torch.library.opcheck(rank_update_, (W, K, R))
    torch.library.opcheck(add_low_rank_, ([W], [R], [K.T.contiguous()]))


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("K holds NaN", lambda a: a["K"].fill_(float("nan"))),
        ("R holds NaN or Inf", lambda a: a["R"].fill_(float("inf"))),
        ("P holds NaN", lambda a: a.update(P=torch.full_like(a["K"], float("nan")))),
        ("not positive definite", lambda a: a.update(P=-9 * a["K"])),
        ("does not fit", lambda a: a.update(R=a["R"][:, 1:])),
        ("does not fit", lambda a: a.update(K=a["K"][1:])),
        ("K and P must be", lambda a: a.update(P=a["K"][:, 1:])),
        ("W overlaps itself", lambda a: a.update(W=a["W"][:1].expand(20, 30))),
        ("W overlaps itself", lambda a: a.update(W=a["W"].flatten().as_strided((20, 30), (29, 1)))),
        ("W and K share memory", lambda a: a.update(K=a["W"].flatten()[:120].view(4, 30).T)),
        ("W and R share memory", lambda a: a.update(R=a["W"][:, :4])),
    ],
)
def test_a_refused_update_leaves_the_weight(writer, device, message, change):
    W, K, R = make(20, 30, 4, torch.float32, 6, device)
    arguments, before = {"W": W, "K": K, "R": R}, W.clone()
    change(arguments)
    with pytest.raises(ValueError, match=message):
        rank_update_(**arguments)
        raise_refused()
    assert torch.equal(W, before)


def test_a_list_is_refused_whole(writer, device):
    W, K, R = make(20, 30, 4, torch.float32, 6, device)
    other, before = torch.randn(20, 30, device=device), W.clone()
    V = K.T.contiguous()
    with pytest.raises(ValueError, match="does not fit"):
        add_low_rank_([W, other], [R, R], [V, V[:, 1:]])
    assert torch.equal(W, before)
    for weights, factors in (([W, W], [R, R]), ([W, W[10:]], [R, R[10:]]), ([W, other], [R, W[:, :4]])):
        with pytest.raises(ValueError, match="share memory"):
            add_low_rank_(weights, factors, [V, V])
        assert torch.equal(W, before)
    mixed = [torch.randn(d_out, d_in, device=device).to(dtype) for d_out, d_in, dtype in [(20, 30, DTYPES[0]), (7, 130, DTYPES[1])] * 2]
    U, V = [torch.randn(len(w), 3, device=device) for w in mixed], [torch.randn(3, w.shape[1], device=device) for w in mixed]
    singly = [w.clone() for w in mixed]
    for w, u, v in zip(singly, U, V, strict=True):
        add_low_rank_([w], [u], [v])
    add_low_rank_(mixed, U, V)
    assert all(torch.equal(a, b) for a, b in zip(singly, mixed, strict=True))


def test_shards_of_d_in_make_the_whole_update(writer, device):
    """What tensor-parallel ranks do: each has some rows of K and columns of W, and the Gram matrices are added up."""
    W, K, R = make(20, 90, 8, torch.float32, 6, device)
    whole = W.clone()
    rank_update_(whole, K, R, ridge=0.5)
    pieces = [slice(0, 31), slice(31, 64), slice(64, 90)]
    gram = sum(rank_gram(K[piece]) for piece in pieces)
    for piece in pieces:
        shard = W[:, piece].contiguous()
        add_low_rank_([shard], [R], [rank_solve(gram, K[piece], 0.5)])
        torch.testing.assert_close(shard, whole[:, piece], rtol=1e-5, atol=1e-5)


def test_the_parts_check_their_arguments(writer, device):
    _, K, _ = make(20, 90, 8, torch.float32, 6, device)
    gram = rank_gram(K)
    bad = K.clone()
    bad[3, 2] = float("nan")
    for message, call in (
        ("alike", lambda: rank_gram(K, K[:50])),
        ("K holds NaN", lambda: rank_gram(bad)),
        ("P holds NaN", lambda: rank_solve(gram, bad)),
        ("gram must be", lambda: rank_solve(gram[:4, :4], K)),
        ("gram must be", lambda: rank_solve(gram.float(), K)),
        ("not positive definite", lambda: rank_solve(-gram, K)),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_empty_weights(writer, device):
    for shape in ((4, 0), (0, 4)):
        W = torch.zeros(shape, device=device)
        add_low_rank_([W], [torch.zeros(shape[0], 2, device=device)], [torch.zeros(2, shape[1], device=device)])


def test_bad_write_arguments_are_named(monkeypatch, device):
    monkeypatch.setenv("ROSE_BACKEND", "triton")
    W, K, U = make(20, 30, 4, torch.float32, 6, device)
    V = K.T.contiguous()
    strided = torch.zeros(20, 60)[:, ::2]
    for message, arguments in (
        ("W must", (strided, U, V)),
        ("does not fit", (W, U[1:], V)),
        ("V must", (W, U, K.T)),
        ("U must", (W, U.double(), V)),
    ):
        with pytest.raises(ValueError, match=message):
            add_low_rank_(*([a] for a in arguments))
