"""Preconditioners against dense inverses in float64."""

import pytest
import torch
from rose_engine.precondition import protected

from rose_kernels import rank_update_


@pytest.mark.parametrize("m", [1, 20, 200])
def test_protected_is_the_dense_preconditioner(m):
    d_in, d_out, n, ridge = 60, 9, 6, 2.0
    K, protect, R, W = torch.randn(d_in, n), torch.randn(d_in, m), torch.randn(d_out, n), torch.randn(d_out, d_in)
    protect[:, -1] = protect[:, 0]
    k, p = K.double(), protect.double()
    C = ridge * torch.eye(d_in, dtype=torch.float64) + p @ p.T
    P = protected(K, protect, ridge)
    torch.testing.assert_close(P.double(), ridge * torch.linalg.solve(C, k), rtol=1e-5, atol=1e-5)
    wanted = W.double() + R.double() @ k.T @ torch.linalg.inv(C + k @ k.T)
    rank_update_(W, K, R, P, ridge)
    torch.testing.assert_close(W.double(), wanted, rtol=1e-4, atol=1e-5)
