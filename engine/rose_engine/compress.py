"""Smaller factors of the same change: U V is taken apart by QR of both and an SVD of the small core between them. Many deltas as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rose_engine.delta import Delta, DeltaError, base_records
from rose_engine.memory import facts_in, latest, latest_columns, rewordings_in

Factors = tuple[Tensor, Tensor]


def joined(deltas: Sequence[Delta]) -> dict[str, Factors]:
    """The sum of several deltas' changes by weight, ranks one after the other, in float32."""
    names = list(dict.fromkeys(name for delta in deltas for name in delta.factors))
    parts = {name: [delta.factors[name] for delta in deltas if name in delta.factors] for name in names}
    return {name: (torch.cat([U for U, _ in part], 1), torch.cat([V for _, V in part], 0)) for name, part in parts.items()}


def compress(U: Tensor, V: Tensor, *, tolerance: float = 0.0, rank: int | None = None) -> tuple[Tensor, Tensor, float]:
    """(U' [d_out, r], V' [r, d_in], error) with the smallest r, at least 1, for which error = ||U' V' - U V|| / ||U V|| <= tolerance.

    rank: at most so many columns, whatever the error. U [d_out, n], V [n, d_in]; computed in float64, returned in float32. The factors
    share the singular values evenly, as adapters do.
    """
    q_left, r_left = torch.linalg.qr(U.double())
    q_right, r_right = torch.linalg.qr(V.double().T)
    left, sizes, right = torch.linalg.svd(r_left @ r_right.T)
    # tail[r]: what is lost by keeping r values
    tail = torch.cat([sizes.flip(0).square().cumsum(0).flip(0), sizes.new_zeros(1)]).sqrt()
    whole = float(tail[0]) or 1.0
    keep = next(r for r in range(1, len(tail)) if float(tail[r]) <= tolerance * whole or r == len(tail) - 1)
    keep = min(keep, rank) if rank is not None else keep
    root = sizes[:keep].sqrt()
    smaller = (q_left @ left[:, :keep] * root).float(), (root[:, None] * right[:keep] @ q_right.T).float()
    return *smaller, float(tail[keep]) / whole


def compress_all(factors: Mapping[str, Factors], *, tolerance: float = 0.0, rank: int | None = None) -> tuple[dict[str, Factors], float]:
    """Every weight's factors made smaller, and the largest of their errors."""
    done = {name: compress(U, V, tolerance=tolerance, rank=rank) for name, (U, V) in factors.items()}
    return {name: (U, V) for name, (U, V, _) in done.items()}, max(error for _, _, error in done.values())


def combined(deltas: Sequence[Delta], tolerance: float = 1e-6) -> tuple[Delta, float]:
    """One delta with the change of several, made smaller, their keys, and of two facts with one prompt the later; and the largest error.

    DeltaError where there are none, or they belong to different bases.
    """
    if not deltas:
        raise DeltaError("there are no deltas to combine")
    base = base_records(deltas)
    factors, error = compress_all(joined(deltas), tolerance=tolerance)
    held = list(zip(deltas, latest_columns(deltas), strict=True))
    owners = [delta.subjects[delta.columns[c]] for delta, columns in held for c in columns]
    place = {subject: i for i, subject in enumerate(dict.fromkeys(owners))}
    keys = {name: torch.cat([_keys(delta, name, columns, base[name]) for delta, columns in held], 1) for name in factors}
    metadata = {
        **deltas[-1].metadata,
        "base": [base[name] for name in factors],
        "parent": None,
        "below": 0,
        "edits": [edit.as_dict() for edit in latest(facts_in(deltas))],
        "rewordings": rewordings_in(deltas),
        "subjects": list(place),
        "columns": [place[owner] for owner in owners],
        "report": None,
        "certificate": None,
    }
    return Delta(factors, metadata, keys), error


def _keys(delta: Delta, name: str, columns: Sequence[int], record: Mapping) -> Tensor:
    """The chosen keys of a weight; zeros, which protect nothing, where the delta did not edit it."""
    return delta.keys[name][:, list(columns)] if name in delta.keys else torch.zeros(record["shape"][1], len(columns))
