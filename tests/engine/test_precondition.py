"""Preconditioners against dense inverses in float64."""

from itertools import pairwise

import pytest
import torch
from rose_engine import precondition
from rose_engine.precondition import covariance, identity, moment_factor, moment_null_space, null_space, preconditioner

from rose_kernels import rank_update_

D_IN, D_OUT, RIDGE = 60, 9, 2.0


def moment(tokens=400):
    """E[k k^T] of keys that fill some directions much more than others."""
    k = torch.randn(tokens, D_IN, dtype=torch.float64) * torch.logspace(0, -2, D_IN, dtype=torch.float64)
    return k.T @ k / tokens


def split(keys):
    """Keys as they may come: some at first, more later, sometimes none."""
    at = [0, *sorted(torch.randint(0, keys.shape[1] + 1, (3,)).tolist()), keys.shape[1]]
    return [keys[:, begin:end] for begin, end in pairwise(at)]


@pytest.mark.parametrize("kind", ["identity", "covariance"])
@pytest.mark.parametrize("m", [0, 1, 20, 1100])
@pytest.mark.parametrize("block", [7, 512])
@pytest.mark.parametrize("last", ["joined", "beside"])
def test_preconditioner_is_the_dense_one(monkeypatch, kind, m, block, last):
    """However many times keys joined, or stood beside for one write; more keys than can be widened at a time."""
    monkeypatch.setattr(precondition, "BLOCK", block)
    n, M = 6, moment()
    K, keys, R, W = torch.randn(D_IN, n), torch.randn(D_IN, m), torch.randn(D_OUT, n), torch.randn(D_OUT, D_IN)
    keys[:, -1:] = keys[:, :1]
    k, p = K.double(), keys.double()
    C = (RIDGE * torch.eye(D_IN, dtype=torch.float64) if kind == "identity" else 7.0 * M) + p @ p.T
    held = preconditioner(D_IN, RIDGE, identity if kind == "identity" else covariance(moment_factor(M), 7.0, RIDGE))
    *first, rest = split(keys)
    for some in first:
        held = held.joined(some)
    P = getattr(held, last)(rest).apply(K)
    inverse = torch.linalg.solve(C, k)
    assert (P.double() - RIDGE * inverse).norm() <= 1e-5 * RIDGE * inverse.norm()
    wanted = R.double() @ k.T @ torch.linalg.inv(C + k @ k.T)
    before = W.double()
    rank_update_(W, K, R, P, RIDGE)
    assert (W.double() - before - wanted).norm() <= 1e-4 * wanted.norm()


@pytest.mark.parametrize(("bound", "dtype"), [(0.01, torch.float32), (0.98, torch.float32), (1.02, torch.float64), (1e4, torch.float64)])
def test_a_matrix_of_protected_keys_is_accurate_at_any_condition(bound, dtype):
    """One key, as of a sentence's first token, is much longer than the others; what is refined is good nearly to float32."""
    K, keys = torch.randn(D_IN, 6), torch.randn(D_IN, D_IN) * 0.1
    others = keys.norm() ** 2 - keys[:, 3].norm() ** 2
    keys[:, 3] *= (bound * precondition.FLOAT32_CONDITION * RIDGE - others).sqrt() / keys[:, 3].norm()
    held = preconditioner(D_IN, RIDGE).beside(keys)
    assert held.base.inverse.dtype == dtype
    C = RIDGE * torch.eye(D_IN, dtype=torch.float64) + keys.double() @ keys.double().T
    wanted = RIDGE * torch.linalg.solve(C, K.double())
    assert (held.solved(K) - wanted).norm() <= 1e-5 * wanted.norm()
    assert (held.often().solved(K) - wanted).norm() <= 1e-2 * wanted.norm()


@pytest.mark.parametrize("m", [0, 20])
def test_null_space_is_alphaedits_projector(m):
    """dW = R K^T Pi (K_p K_p^T Pi + K K^T Pi + ridge I)^-1."""
    M, K, keys = moment(), torch.randn(D_IN, 6), torch.randn(D_IN, m)
    R, W = torch.randn(D_OUT, 6), torch.randn(D_OUT, D_IN)
    values, vectors = torch.linalg.eigh(M)
    threshold = float(values[D_IN // 2])
    Pi = vectors[:, values < threshold] @ vectors[:, values < threshold].T
    k, p = K.double(), keys.double()
    system = (p @ p.T + k @ k.T) @ Pi + RIDGE * torch.eye(D_IN, dtype=torch.float64)
    wanted = R.double() @ torch.linalg.solve(system.T, Pi @ k).T
    held = preconditioner(D_IN, RIDGE, null_space(moment_null_space(M, threshold))).joined(keys)
    before = W.double()
    rank_update_(W, K, R, held.apply(K), RIDGE)
    assert (W.double() - before - wanted).norm() <= 1e-4 * wanted.norm()
    assert ((W.double() - before) @ vectors[:, -1]).norm() <= 1e-5 * wanted.norm()  # what the corpus is made of does not move


def test_a_corpus_that_does_not_serve_is_refused():
    k = torch.randn(D_IN, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match="too few tokens"):
        moment_factor(k @ k.T)
    with pytest.raises(ValueError, match="no null space"):
        moment_null_space(torch.eye(D_IN, dtype=torch.float64), 1e-2)
    with pytest.raises(ValueError, match="not positive definite"):
        preconditioner(D_IN, 1.0).joined(torch.full((D_IN, 2), torch.nan))
    with pytest.raises(ValueError, match="not positive definite"):
        preconditioner(D_IN, 1.0).beside(torch.full((D_IN, D_IN), torch.nan))
