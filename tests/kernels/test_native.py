"""csrc on the CPU: against float64 at every size, the same bits whatever the threads, and memory that may not be written."""

import mmap
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rose_kernels import add_low_rank_, rank_update_, reference
from rose_kernels.backend import HAVE_TRITON, interpreted

pytestmark = pytest.mark.usefixtures("csrc")
FEW = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def make(d_out, d_in, n, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    W, K, R = torch.randn(d_out, d_in, generator=g), torch.randn(d_in, n, generator=g), torch.randn(d_out, n, generator=g)
    K[:, -1] = K[:, 0]  # identical keys: K^T K is singular
    return W.to(dtype), K, R


def exact_factor(K, ridge):
    """V in float64, by NumPy's general solver."""
    k = K.double().numpy()
    return torch.from_numpy(np.linalg.solve(ridge * np.eye(k.shape[1]) + k.T @ k, k.T))


@FEW
@given(st.integers(1, 600), st.integers(1, 20_000), st.integers(1, 40), st.sampled_from([0.3, 1.0, 50.0]), st.integers(0, 2**31))
def test_against_float64_at_any_size(n, d_in, d_out, ridge, seed):
    W, K, R = make(d_out, d_in, n, seed=seed)
    before = W.double()
    U, V = rank_update_(W, K, R, ridge=ridge)
    exact = exact_factor(K, ridge)
    assert torch.equal(U, R)
    assert (V.double() - exact).norm() <= 1e-6 * exact.norm()
    change = R.double() @ exact
    bound = 1e-7 * (n + 2) * (before.abs() + R.double().abs() @ exact.abs())
    assert ((W.double() - before - change).abs() <= bound).all()


@pytest.mark.parametrize(("n", "d_in"), [(600, 20_000), (257, 4_864), (64, 65), (5, 3)])
def test_the_update_maps_keys_as_derived(n, d_in):
    """With G = ridge I + K^T K and dW = R G^-1 K^T:  dW K = R G^-1 (G - ridge I) = R - ridge R G^-1."""
    ridge, d_out = 2.0, 6
    W, K, R = make(d_out, d_in, n)
    U, V = rank_update_(W, K, R, ridge=ridge)
    k, r = K.double(), R.double()
    G = ridge * torch.eye(n, dtype=torch.float64) + k.T @ k
    moved = U.double() @ (V.double() @ k)
    wanted = r - ridge * torch.linalg.solve(G, r.T).T
    assert (moved - wanted).norm() <= 1e-5 * r.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 32, 333])
def test_strides_do_not_change_the_bits(dtype, n):
    """A weight between others, a weight whose columns are contiguous, a weight at an odd address."""
    W, K, R = make(45, 301, n, dtype)
    U, V = rank_update_(W.clone(), K, R)
    plain = W.clone()
    add_low_rank_([plain], [U], [V])
    between = torch.zeros(45, 400, dtype=dtype)
    turned = torch.zeros(301, 45, dtype=dtype).T
    odd = torch.zeros(45 * 301 + 1, dtype=dtype)[1:].view(45, 301)
    for view in (between[:, 50:351], turned, odd):
        view.copy_(W)
        add_low_rank_([view], [U], [V])
        assert torch.equal(view, plain)
    assert not between[:, :50].any() and not between[:, 351:].any()


def test_a_weight_without_a_unit_stride_is_refused():
    _, K, R = make(6, 8, 2)
    strange = torch.zeros(6, 16)[:, ::2]
    with pytest.raises(ValueError, match="neighbouring elements"):
        rank_update_(strange, K, R)
    assert not strange.any()


def test_special_values_are_rounded_as_torch_rounds_them():
    """NaN and infinities in a weight stay; ties go to even; what overflows becomes infinite."""
    for dtype in (torch.bfloat16, torch.float16):
        patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        patterns = patterns.repeat(64)[: 64 * 1024].view(64, 1024)
        W, U, V = patterns.clone(), torch.randn(64, 1), torch.randn(1, 1024)
        wanted = torch.addcmul(W.double(), U.double(), V.double()).float().to(dtype)
        add_low_rank_([W], [U], [V])
        assert torch.equal(W.isnan(), wanted.isnan())
        # One rounding from float32, against one from float64 to float32 and one more: they differ on ties of the first alone.
        assert (W.nan_to_num() != wanted.nan_to_num()).float().mean() < 1e-4


def test_the_same_bits_with_any_number_of_threads():
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            for n in (32, 300):
                W, K, R = make(700, 3_000, n, torch.bfloat16)
                results.append((n, W, rank_update_(W, K, R)[1]))
    finally:
        torch.set_num_threads(threads)
    for n, W, V in results[2:]:
        first = results[0 if n == 32 else 1]
        assert torch.equal(W, first[1]) and torch.equal(V, first[2])


@pytest.mark.skipif(not HAVE_TRITON or not interpreted(), reason="Triton's interpreter is not running")
def test_csrc_and_triton_differ_by_the_order_of_sums_alone(monkeypatch):
    """csrc adds one product at a time in the order of n; the interpreter's dot adds sixteen up first. With n = 1 there is one
    product: the interpreter rounds it before it is added, csrc does not, which is half a unit of the product at most."""
    for n in (1, 40):
        W, K, R = make(50, 70, n)
        V = K.T.contiguous()
        ours, theirs = W.clone(), W.clone()
        add_low_rank_([ours], [R], [V])
        monkeypatch.setenv("ROSE_BACKEND", "triton")
        add_low_rank_([theirs], [R], [V])
        monkeypatch.setenv("ROSE_BACKEND", "csrc")
        bound = 6e-8 * (n + 1) * (W.abs() + R.abs() @ V.abs())
        assert ((ours - theirs).abs() <= bound).all()


@pytest.mark.skipif(sys.platform == "win32", reason="csrc is not built there")
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_memory_that_may_only_be_read_is_refused(tmp_path):
    W, K, R = make(64, 300, 4)
    (tmp_path / "weights").write_bytes(W.numpy().tobytes())
    with open(tmp_path / "weights", "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
        mapped = torch.from_numpy(np.frombuffer(memory, dtype=np.float32).reshape(64, 300))
        with pytest.raises(ValueError, match="may only be read"):
            rank_update_(mapped, K, R)
        assert torch.equal(mapped, W)
        del mapped


def test_inside_a_compiled_function():
    W, K, R = make(30, 50, 4)
    before = W.clone()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def update(W, K, R):
        U, V = rank_update_(W, K, R)
        return W.sum() + (U @ V).sum()

    got = update(W, K, R)
    U, V = reference.rank_update_(before, K, R)
    torch.testing.assert_close(got, before.sum() + (U @ V).sum())
    torch.testing.assert_close(W, before)
