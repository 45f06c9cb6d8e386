"""Preconditioners against dense inverses in float64."""

import pytest
import torch
from rose_engine.precondition import protect

from rose_kernels import rank_update_


@pytest.mark.parametrize("m", [1, 20, 1100])
def test_protected_is_the_dense_preconditioner(m):
    """However many times keys joined; more keys than can be widened at a time."""
    d_in, d_out, n, ridge = 60, 9, 6, 2.0
    K, keys, R, W = torch.randn(d_in, n), torch.randn(d_in, m), torch.randn(d_out, n), torch.randn(d_out, d_in)
    keys[:, -1] = keys[:, 0]
    k, p = K.double(), keys.double()
    C = ridge * torch.eye(d_in, dtype=torch.float64) + p @ p.T
    at = sorted(torch.randint(0, m + 1, (3,)).tolist())
    held = protect(keys[:, : at[0]], ridge)
    for begin, end in zip(at, [*at[1:], m], strict=True):
        held = held.joined(keys[:, begin:end])
    system = ridge * torch.eye(m, dtype=torch.float64) + p.T @ p
    torch.testing.assert_close(held.factor @ held.factor.T, system, rtol=1e-10, atol=1e-8)
    P = held.apply(K)
    torch.testing.assert_close(P.double(), ridge * torch.linalg.solve(C, k), rtol=1e-5, atol=1e-5)
    wanted = W.double() + R.double() @ k.T @ torch.linalg.inv(C + k @ k.T)
    rank_update_(W, K, R, P, ridge)
    torch.testing.assert_close(W.double(), wanted, rtol=1e-4, atol=1e-5)
