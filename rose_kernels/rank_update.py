"""The weight write (method.md section 2, eq. 10): W += R (ridge I + K^T P)^-1 P^T in place, as W += U V.

Gram matrix, Cholesky factor and solves are n x n and in float64. The write is one pass over W: each element is read once, U V is added to
it in float32 in the order of n, and it is rounded once and written once. `csrc/` serves the CPU, and CUDA where it was built for it;
elsewhere the system is `reference`'s and the write Triton's. Definition: `reference.rank_update_`, `reference.add_low_rank_`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rose_kernels import reference
from rose_kernels.backend import jit, on_device, serving, tl, triton
from rose_kernels.contract import FLOATS, check

BLOCK_M, BLOCK_N, BLOCK_K = 64, 64, 16
WIDE = (torch.float32,)
FUSED_N = 64  # the largest system that the CUDA kernels build and solve in one launch
FAULTS = {-1: "K", -2: "P", -3: "R"}  # what the CUDA kernels report as not finite
KEPT_STATUSES = 64


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
def add_low_rank_(W: Sequence[Tensor], U: Sequence[Tensor], V: Sequence[Tensor]) -> None:
    """W[i] += U[i] V[i] in place for every i, in one launch where `csrc` serves.

    W[i] [d_out, d_in] float32, bfloat16 or float16, apart in memory; U[i] [d_out, n] and V[i] [n, d_in] float32. ValueError, with every
    weight untouched, where shapes do not fit or a weight shares memory with itself, another weight or a factor.
    """
    _write(W, U, V)


def _write(W: Sequence[Tensor], U: Sequence[Tensor], V: Sequence[Tensor]) -> None:
    if not len(W) == len(U) == len(V):
        raise ValueError(f"as many W, U and V are needed, given {len(W)}, {len(U)} and {len(V)}")
    for w, u, v in zip(W, U, V, strict=True):
        reference.check_write(w, u, v)
    _check_apart(W, (*U, *V))
    by_device: dict[torch.device, list[int]] = {}
    for i, w in enumerate(W):
        by_device.setdefault(w.device, []).append(i)
    backends = {device: serving(device, "add_low_rank_") for device in by_device}
    native = {
        device for device, backend in backends.items() if backend != "reference" and all(W[i].dtype in FLOATS for i in by_device[device])
    }
    for device in native:
        for i in by_device[device]:
            _check_native(W[i], U[i], V[i], contiguous=backends[device] == "triton")
    for device, members in by_device.items():
        w, u, v = ([x[i] for i in members] for x in (W, U, V))
        if device not in native:
            for one in zip(w, u, v, strict=True):
                reference.add_low_rank_(*one)
        elif backends[device] == "csrc":
            torch.ops.rose_native.add_low_rank_(w, u, v)
        else:
            for one in zip(w, u, v, strict=True):
                _write_triton(*one)


def _write_triton(W: Tensor, U: Tensor, V: Tensor) -> None:
    if not W.is_contiguous():  # the transpose of a weight that is
        W, U, V = W.T, V.T.contiguous(), U.T.contiguous()
    (rows, columns), n = W.shape, U.shape[1]
    if W.numel() and n:
        grid = (triton.cdiv(columns, BLOCK_N), triton.cdiv(rows, BLOCK_M))
        with on_device(W):
            write_kernel[grid](W, U, V, rows, columns, n, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K)


def _check_apart(W: Sequence[Tensor], factors: Sequence[Tensor]) -> None:
    """ValueError where a weight shares memory with another weight or with any factor."""
    stretches = sorted([(*reference.extent(w), True) for w in W] + [(*reference.extent(x), False) for x in factors])
    end_of_weights = end_of_all = 0
    for start, end, weight in stretches:
        if start < (end_of_all if weight else end_of_weights):
            raise ValueError("the weights and factors of a list must not share memory; clone one of them first")
        end_of_all = max(end_of_all, end)
        end_of_weights = max(end_of_weights, end) if weight else end_of_weights


def _check_native(W: Tensor, U: Tensor, V: Tensor, contiguous: bool) -> None:
    if contiguous:
        check("W", W.T if W.T.is_contiguous() else W, (None, None), FLOATS)
    elif 1 not in W.stride() and W.numel() > 1:
        raise ValueError(f"W must have neighbouring elements along its rows or its columns, given strides {W.stride()}")
    check("U", U, (W.shape[0], None), WIDE, W)
    check("V", V, (U.shape[1], W.shape[1]), WIDE, W)


@torch.library.custom_op("rose::rank_update_", mutates_args=("W",))
def rank_update_(W: Tensor, K: Tensor, R: Tensor, P: Tensor | None = None, ridge: float = 1.0) -> tuple[Tensor, Tensor]:
    """W += R (ridge I + K^T P)^-1 P^T in place; returns (U, V) with the change U V. Arguments as in `reference.rank_update_`.

    On CUDA with n <= 64 the host is not waited for: a refused update leaves W as it was and is reported by `raise_refused`, which may
    be called after every replay where the update was captured in a graph.
    """
    backend = serving(W.device, "rank_update_")
    if backend == "reference" or any(x is not None and x.dtype not in FLOATS for x in (W, K, R, P)):
        U, V = reference.rank_update_(W, K, R, P, ridge)
        return U.clone(), V
    reference.check_update(W, K, R, P)
    U = R.to(torch.float32, copy=True).contiguous()
    if backend == "csrc" and W.is_cuda and K.shape[1] <= FUSED_N and W.numel() and K.numel():
        if len(_statuses) >= KEPT_STATUSES:
            raise_refused()
        k = _rows(K)
        V, status = torch.ops.rose_native.factor(k, k if P is None else _rows(P), U, ridge)
        _check_native(W, U, V, contiguous=False)
        torch.ops.rose_native.add_low_rank_([W], [U], [V], status)
        _remember(status, K.shape[1], ridge)
        return U, V
    check_finite(K=K, P=P, R=R)
    V = _solve(_gram(K, P), K if P is None else P, ridge)
    _write([W], [U], [V])
    return U, V


def rank_gram(K: Tensor, P: Tensor | None = None) -> Tensor:
    """K^T P [n, n] in float64, lower triangle at least. K, P [d_in, n]; K itself where P is None.

    Where d_in is sharded, the sum of the shards' Gram matrices (one all-reduce of n x n) is the whole one: pass it to
    `rank_solve` on every rank, with that rank's rows of P, and the update of each shard of W is exact. ValueError where
    shapes do not fit or a value is not finite.
    """
    if K.dim() != 2 or (P is not None and P.shape != K.shape):
        raise ValueError(f"K and P must be [d_in, n] alike, given {list(K.shape)} and {list(K.shape if P is None else P.shape)}")
    check_finite(K=K, P=P)
    return _gram(K, P)


def _gram(K: Tensor, P: Tensor | None) -> Tensor:
    if _native_cpu(K, P):
        k = _rows(K)
        return torch.ops.rose_native.gram(k, k if P is None else _rows(P))
    return reference.rank_gram(K, P)


def rank_solve(gram: Tensor, P: Tensor, ridge: float = 1.0) -> Tensor:
    """V = (ridge I + G)^-1 P^T [n, d_in] float32, from the lower triangle of gram [n, n] float64 and P [d_in, n].

    ValueError where shapes do not fit, a value is not finite, or the system is not positive definite.
    """
    if P.dim() != 2 or gram.shape != (P.shape[1], P.shape[1]) or gram.dtype != torch.float64 or gram.device != P.device:
        raise ValueError(
            f"gram must be [{P.shape[-1]}, {P.shape[-1]}] float64 on {P.device}, given {list(gram.shape)} {gram.dtype} on {gram.device}"
        )
    check_finite(P=P)
    return _solve(gram, P, ridge)


def _solve(gram: Tensor, P: Tensor, ridge: float) -> Tensor:
    if _native_cpu(P):
        system = gram.clone(memory_format=torch.contiguous_format)
        system.diagonal().add_(ridge)
        V, minor = torch.ops.rose_native.solve(system, _rows(P))
        if minor:
            raise reference.indefinite(minor, len(gram), ridge)
        return V
    whole = gram.tril() + gram.tril(-1).T
    return reference.rank_solve(whole, P, ridge)


def check_finite(**tensors: Tensor | None) -> None:
    """ValueError naming the first tensor that holds NaN or Inf."""
    for name, x in tensors.items():
        if x is None:
            continue
        if not _native_cpu(x) or x.dtype != torch.float32:
            reference.check_finite(**{name: x})
        elif not torch.ops.rose_native.all_finite(_rows(x)):
            raise ValueError(f"{name} holds NaN or Inf")


def _native_cpu(*tensors: Tensor | None) -> bool:
    given = [x for x in tensors if x is not None]
    on_cpu = all(x.device.type == "cpu" and x.dtype in FLOATS for x in given)
    return on_cpu and serving("cpu", "rank_update_") == "csrc"


def _rows(x: Tensor) -> Tensor:
    """x [d, n] as [n, d] float32 with contiguous rows; no copy where x is the transpose of such a tensor."""
    return x.T.to(torch.float32).contiguous()


# (status flag on the device, n, ridge): of updates that nobody has asked after yet, and of those captured in graphs, which may run again.
_statuses: list[tuple[Tensor, int, float]] = []
_captured: list[tuple[Tensor, int, float]] = []


def _remember(status: Tensor, n: int, ridge: float) -> None:
    (_captured if torch.cuda.is_current_stream_capturing() else _statuses).append((status, n, ridge))


def forget_refused() -> None:
    """Drop what earlier updates on a GPU reported, captured ones excepted."""
    _statuses.clear()


def raise_refused() -> None:
    """ValueError for the first update since the last call, or of the last replay, that was refused on a GPU; its weight is as it was.

    Waits for the devices; does nothing while a graph is captured.
    """
    if not (_statuses or _captured) or torch.cuda.is_current_stream_capturing():
        return
    remembered, _statuses[:] = [*_statuses, *_captured], []
    for device in {status.device for status, _, _ in remembered}:
        torch.cuda.synchronize(device)
    for status, n, ridge in remembered:
        code = int(status)
        if code:
            raise ValueError(f"{FAULTS[code]} holds NaN or Inf") if code < 0 else reference.indefinite(code, n, ridge)


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
