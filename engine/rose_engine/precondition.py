"""Preconditioners: C in dW = R K^T (C + K K^T)^-1, given as what the write needs of it, P = ridge C^-1 K (method.md section 2).

A base says what C is before anything is protected. `identity` is IGA (eq. 10), C = ridge I; `covariance` MEMIT's, C = lambda E[k k^T]
over a corpus; `null_space` AlphaEdit's, which keeps of a key what lies outside the corpus. Protected keys K_p join a base, C + K_p K_p^T:
those of texts about others, MEMIT's covariance with the few texts that matter in the place of a corpus, and those of earlier
edits, with which a write is a step of recursive least squares. What is solved for them is m x m and grows by a block when keys
join; a d_in x d_in matrix exists only where a corpus was asked for, and is factorised once, or where protected keys are nearly as many
as d_in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Protected keys that are widened to float64 at one time.
BLOCK = 512
# The condition number up to which a matrix is inverted in float32: what that gives is good to 1e-3 then, refined to 1e-6.
FLOAT32_CONDITION = 2e4

# K [d_in, n] float32 -> ridge C^-1 K [d_in, n], float32 or float64.
Base = Callable[[Tensor], Tensor]


def identity(K: Tensor) -> Tensor:
    """C = ridge I."""
    return K


def moment_factor(moment: Tensor) -> Tensor:
    """The lower Cholesky factor of E[k k^T] [d_in, d_in] float64. ValueError where it is not positive definite."""
    factor, info = torch.linalg.cholesky_ex(moment)
    if int(info):
        raise ValueError(
            f"the keys' second moment is singular (leading minor {int(info)} of {len(moment)}): the corpus has too few tokens, or all alike"
        )
    return factor


def covariance(factor: Tensor, weight: float, ridge: float) -> Base:
    """C = weight E[k k^T], given by its `moment_factor`."""
    scale = ridge / weight
    return lambda K: scale * torch.cholesky_solve(K.double(), factor)


def moment_null_space(moment: Tensor, threshold: float) -> Tensor:
    """Q [d_in, m] float64: the eigenvectors of E[k k^T] whose eigenvalues are below the threshold (Fang et al. 2024).

    ValueError where none is.
    """
    values, vectors = torch.linalg.eigh(moment)
    if not (values < threshold).any():
        raise ValueError(f"the keys have no null space: every eigenvalue of their second moment is {float(values[0]):.2g} or more")
    return vectors[:, values < threshold].contiguous()


def null_space(Q: Tensor) -> Base:
    """P = Q Q^T K: a write is R K^T Pi (K K^T Pi + ridge I)^-1, Pi = Q Q^T; keys that join are seen through Pi as well."""
    return lambda K: Q @ (Q.T @ K.double())


@dataclass(frozen=True)
class Dense:
    """A base given by ridge C^-1 [d_in, d_in], C = ridge I + K_p K_p^T. An inverse in float32 comes with its keys K_p [d_in, m] float32, by
    which what it gives is refined once in float64; one in float64 comes with None."""

    inverse: Tensor
    ridge: float
    keys: Tensor | None

    def __call__(self, K: Tensor) -> Tensor:
        if self.keys is None:
            return self.inverse @ K.double()
        found = self.rough(K).double()
        left = (K - found).mul_(self.ridge)  # ridge K - C found
        _subtract_(left, self.keys, _products(self.keys, found))
        return found.add_(self.rough(left), alpha=1 / self.ridge)

    def rough(self, K: Tensor) -> Tensor:
        """The same in float32, unrefined."""
        return self.inverse @ K.float()


def dense(keys: Tensor, ridge: float) -> Dense:
    """C = ridge I + K_p K_p^T of keys K_p [d_in, m] float32, inverted in float32 on a CPU where its condition number, which
    1 + tr(K_p K_p^T) / ridge bounds, allows it, else in float64. ValueError where they are not finite."""
    narrow = keys.device.type == "cpu" and float(keys.norm()) ** 2 <= FLOAT32_CONDITION * ridge
    C = _own_products(keys.T, keys.T, torch.float32 if narrow else torch.float64)
    C.diagonal().add_(ridge)
    factor, info = torch.linalg.cholesky_ex(C)
    if int(info):
        raise ValueError(f"the protected keys' system is not positive definite (leading minor {int(info)} of {len(C)})")
    return Dense(torch.cholesky_inverse(factor).mul_(ridge), ridge, keys if narrow else None)


def alone(x: Tensor) -> Tensor:
    """The sum over ranks where there is one."""
    return x


@dataclass(frozen=True)
class Preconditioner:
    """A base, and protected keys K_p [d_in, m] float32 with it: adjusted = base(K_p), as the base gives it, and factor [m, m] float64,
    the lower Cholesky factor of ridge I + K_p^T base(K_p). total: sums over the ranks that each hold some rows of all keys. Made
    by `preconditioner`."""

    base: Base
    ridge: float
    keys: Tensor
    adjusted: Tensor
    factor: Tensor
    total: Callable[[Tensor], Tensor]

    def joined(self, keys: Tensor) -> Preconditioner:
        """With more keys [d_in, n]: [[L, 0], [X^T, chol(ridge I + K^T B - X^T X)]], B = base(K), X = L^-1 K_p^T B; O(m^2 n + n^3).

        ValueError where the keys are not finite.
        """
        b, first = self.base(keys), not self.keys.shape[1]
        system = self.total(_own_products(keys, b))
        if not first:
            X = torch.linalg.solve_triangular(self.factor, self.total(_products(self.keys, b)), upper=False)
            system -= X.T @ X
        system.diagonal().add_(self.ridge)
        corner, info = torch.linalg.cholesky_ex(system)
        if int(info):
            raise ValueError(f"the protected keys' system is not positive definite (leading minor {int(info)} of {len(system)})")
        # The identity adjusts nothing: one tensor serves as both.
        if first:  # nothing to lay beside: no copy of what is large
            joined = keys.to(self.keys.dtype)
            return replace(self, keys=joined, adjusted=joined if b is keys else b, factor=corner)
        top = torch.cat([self.factor, self.factor.new_zeros(X.shape)], 1)
        joined = torch.cat([self.keys, keys.to(self.keys.dtype)], 1)
        adjusted = joined if b is keys else torch.cat([self.adjusted.to(b.dtype), b], 1)
        return replace(self, keys=joined, adjusted=adjusted, factor=torch.cat([top, torch.cat([X.T, corner], 1)]))

    def often(self) -> Preconditioner:
        """The same for one that is asked many times on a CPU: its keys in float64, so that they are widened once, or ridge C^-1 in
        float32, half as much to read, and unrefined."""
        if isinstance(self.base, Dense):
            return replace(self, base=replace(self.base, inverse=self.base.inverse.float()).rough)
        keys = self.keys.double()
        return replace(self, keys=keys, adjusted=keys if self.adjusted is self.keys else self.adjusted.double())

    def beside(self, keys: Tensor) -> Preconditioner:
        """With more keys [d_in, n] for one write: C as it is becomes the base, and its factor is not copied into a larger one.

        Where keys are three quarters as many as d_in, and the identity below them, ridge C^-1 itself is no larger than they and their
        factor, is asked in less time, and becomes the base.
        """
        if self.base is identity and self.total is alone and 4 * (self.keys.shape[1] + keys.shape[1]) >= 3 * len(keys):
            every = torch.cat([self.keys, keys.float()], 1) if self.keys.shape[1] else keys.float()
            return preconditioner(len(keys), self.ridge, dense(every, self.ridge), keys.device)
        return preconditioner(len(keys), self.ridge, self.solved, keys.device, self.total).joined(keys)

    def apply(self, K: Tensor) -> Tensor:
        """ridge C^-1 K [d_in, n] float32: B - base(K_p) (ridge I + K_p^T base(K_p))^-1 K_p^T B, B = base(K), solved in float64, or
        refined there (`Dense`).

        With it `rank_update_(W, K, R, P, ridge)` writes R K^T (C + K K^T)^-1. K itself where C is the identity and nothing is protected.
        """
        return self.solved(K).float()

    def solved(self, K: Tensor) -> Tensor:
        """The same before it is rounded: float64 where anything is protected or a corpus asked."""
        out = self.base(K)
        if not self.keys.shape[1]:
            return out
        out = out.to(torch.float64, copy=True)
        share = torch.cholesky_solve(self.total(_products(self.keys, out)), self.factor)
        _subtract_(out, self.adjusted, share)
        return out


def preconditioner(
    d_in: int, ridge: float, base: Base = identity, device: torch.device | str = "cpu", total: Callable[[Tensor], Tensor] = alone
) -> Preconditioner:
    """A base that protects nothing yet. d_in: rows of a key on this rank; total: the sum over ranks, where there are several."""
    nothing = torch.zeros(d_in, 0, device=device)
    return Preconditioner(base, ridge, nothing, nothing, torch.zeros(0, 0, dtype=torch.float64, device=device), total)


def _products(keys: Tensor, k: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """K_p^T K [m, n] in a dtype, of which a block of either is widened at one time."""
    out = torch.empty(keys.shape[1], k.shape[1], dtype=dtype, device=k.device)
    for j in range(0, k.shape[1], BLOCK):
        wide = k[:, j : j + BLOCK].to(dtype)
        for i in range(0, keys.shape[1], BLOCK):
            out[i : i + BLOCK, j : j + BLOCK] = keys[:, i : i + BLOCK].to(dtype).T @ wide
    return out


def _subtract_(out: Tensor, keys: Tensor, share: Tensor) -> None:
    """out -= K_p share, in float64, of which a block of the keys is widened at one time."""
    for i in range(0, keys.shape[1], BLOCK):
        out -= keys[:, i : i + BLOCK].double() @ share[i : i + BLOCK]


def _own_products(keys: Tensor, b: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """K^T B [n, n] in a dtype, B = base(K). It is symmetric, and blocks above the diagonal are left zero: Cholesky reads what is below."""
    out = torch.zeros(keys.shape[1], keys.shape[1], dtype=dtype, device=keys.device)
    for j in range(0, keys.shape[1], BLOCK):
        out[j:, j : j + BLOCK] = _products(keys[:, j:], b[:, j : j + BLOCK], dtype)
    return out
