"""The weight write (method.md section 2, eq. 10): W += R (ridge I + K^T P)^-1 P^T in place, as W += U V.

The n x n system is solved by `reference.rank_solve`; the write is one pass over W: each tile is read once, U V is added to it in
float32, and it is rounded once and written once. Definition: `reference.rank_update_`, `reference.add_low_rank_`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rose_kernels import reference
from rose_kernels.backend import jit, on_device, serving, tl, triton
from rose_kernels.contract import FLOATS, check

BLOCK_M, BLOCK_N, BLOCK_K = 64, 64, 16
WIDE = (torch.float32,)


@jit
def write_kernel(W, U, V, rows, columns, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Program (j, i): the tile of W at rows i * BLOCK_M and on, columns j * BLOCK_N and on."""
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    lanes = tl.arange(0, BLOCK_K)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tile = W + row.to(tl.int64)[:, None] * columns + column[None, :]
    acc = tl.load(tile, inside, 0.0).to(tl.float32)
    for start in range(0, n, BLOCK_K):
        k = start + lanes
        u = tl.load(U + row.to(tl.int64)[:, None] * n + k[None, :], (row < rows)[:, None] & (k < n)[None, :], 0.0)
        v = tl.load(V + k.to(tl.int64)[:, None] * columns + column[None, :], (k < n)[:, None] & (column < columns)[None, :], 0.0)
        acc = tl.dot(u, v, acc, input_precision="ieee")
    tl.store(tile, acc.to(W.dtype.element_ty), inside)


@torch.library.custom_op("rose::add_low_rank_", mutates_args=("W",))
def add_low_rank_(W: Tensor, U: Tensor, V: Tensor) -> None:
    """W += U V in place. W [d_out, d_in] float32, bfloat16 or float16; U [d_out, n] and V [n, d_in] float32."""
    if serving(W.device) == "reference":
        reference.add_low_rank_(W, U, V)
        return
    check("W", W, (None, None), FLOATS)
    check("U", U, (W.shape[0], None), WIDE, W)
    check("V", V, (U.shape[1], W.shape[1]), WIDE, W)
    (rows, columns), n = W.shape, U.shape[1]
    if W.numel() and n:
        grid = (triton.cdiv(columns, BLOCK_N), triton.cdiv(rows, BLOCK_M))
        with on_device(W):
            write_kernel[grid](W, U, V, rows, columns, n, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K)


@torch.library.custom_op("rose::rank_update_", mutates_args=("W",))
def rank_update_(W: Tensor, K: Tensor, R: Tensor, P: Tensor | None = None, ridge: float = 1.0) -> tuple[Tensor, Tensor]:
    """W += R (ridge I + K^T P)^-1 P^T in place; returns (U, V) with the change U V. Arguments as in `reference.rank_update_`."""
    if serving(W.device) == "reference":
        U, V = reference.rank_update_(W, K, R, P, ridge)
        return U.clone(), V
    reference.check_update(W, K, R)
    V = reference.rank_solve(K, P, ridge)
    U = R.to(V.dtype, copy=True).contiguous()
    add_low_rank_(W, U, V)
    return U, V


@add_low_rank_.register_fake
def _(W, U, V):
    return None


@rank_update_.register_fake
def _(W, K, R, P=None, ridge=1.0):
    wide = reference.wide_dtype(K)
    return R.new_empty(R.shape, dtype=wide), K.new_empty(K.shape[1], K.shape[0], dtype=wide)


def write_error(WK: Tensor, W: Tensor, U: Tensor, V: Tensor, K: Tensor) -> Tensor:
    """What rounding leaves of the write on its own keys: ||W' K - (W K + U V K)|| / ||U V K||, a float64 scalar tensor.

    WK [d_out, n]: the product before the write, in float64; W [d_out, d_in]: the weight after it. 0 where nothing
    was rounded; the change must not be zero.
    """
    change = U.double() @ (V.double() @ K.double())
    return (W.double() @ K.double() - WK - change).norm() / change.norm()
