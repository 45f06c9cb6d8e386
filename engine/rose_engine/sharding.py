"""Weights that lie in parts on several ranks (tensor parallel), and what a write exchanges for them.

The edited projection is sharded over its input d_in ("rowwise"): rank r holds W[:, r] and is given the keys K[r, :]. The system of
a write is a sum over ranks, K^T P = sum_r K[r]^T P[r], n x n; each rank then solves for its columns of V and writes its part of W.
Keys and V are joined for the delta's file, n x d_in numbers each; a d_in x d_in matrix is never sent, and the weights only
once, row block by row block, for the SHA-256 of the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

# Rows of a weight that are joined at one time.
ROWS = 1024


@dataclass(frozen=True)
class Sharding:
    """The ranks of a process group that each hold some columns of the weights: sizes of all of them, and which is this rank's."""

    group: dist.ProcessGroup
    rank: int
    sizes: tuple[int, ...]

    def part(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of a tensor that is whole along a dimension."""
        return x.split(self.sizes, dim)[self.rank]

    def total(self, x: Tensor) -> Tensor:
        """The sum over ranks, the same bits on each of them."""
        return self.total_(x.contiguous().clone())

    def total_(self, x: Tensor) -> Tensor:
        """The same in place of a contiguous tensor."""
        dist.all_reduce(x, group=self.group)
        return x

    def whole(self, x: Tensor, dim: int) -> Tensor:
        """The ranks' parts joined along a dimension."""
        parts = [x.new_empty([n if d == dim else size for d, size in enumerate(x.shape)]) for n in self.sizes]
        parts[self.rank].copy_(x)
        for source, part in enumerate(parts):
            dist.broadcast(part, group=self.group, group_src=source)
        return torch.cat(parts, dim)

    def same(self, x: Tensor) -> Tensor:
        """The first rank's tensor, in place: what should be alike on all ranks, and may differ by the order of a device's sums."""
        dist.broadcast(x, group=self.group, group_src=0)
        return x

    def check_finite(self, **tensors: Tensor | None) -> None:
        """ValueError on every rank, naming the first tensor that holds NaN or Inf on one of them."""
        given = {name: x for name, x in tensors.items() if x is not None}
        wrong = self.total(torch.stack([~torch.isfinite(x).all() for x in given.values()]).float())
        if wrong.any():
            raise ValueError(f"{list(given)[int(wrong.argmax())]} holds NaN or Inf")

    def whole_weight(self, weight: Tensor) -> Tensor:
        """A weight [d_out, d_in] on the host, of this rank's columns and the others'."""
        return torch.cat([self.whole(rows.contiguous(), 1).cpu() for rows in weight.split(ROWS)])


def sharding_of(weight: Tensor) -> Sharding | None:
    """How a weight [d_out, d_in] is spread over ranks; None where it is whole. ValueError where it is not spread over d_in alone.

    A transposed weight (`Conv1D`) is not of this kind.
    """
    if not isinstance(weight, DTensor):
        return None
    mesh = weight.device_mesh
    spread = [(dim, place) for dim, place in enumerate(weight.placements) if not isinstance(place, Replicate) and mesh.size(dim) > 1]
    if not spread:
        return None
    if len(spread) > 1 or spread[0][1] != Shard(1):
        raise ValueError(f"the edited weights must be sharded over their input alone, Shard(1), not {weight.placements}")
    dim, d_in = spread[0][0], weight.shape[1]
    share = -(-d_in // mesh.size(dim))  # DTensor's parts: as `torch.chunk` makes them, the last ones shorter or empty
    sizes = tuple(max(0, min(share, d_in - r * share)) for r in range(mesh.size(dim)))
    return Sharding(mesh.get_group(dim), mesh.get_local_rank(dim), sizes)


def sharding_between(first: Sequence[nn.Linear], last: nn.Linear) -> Sharding | None:
    """How what goes from some projections to another is spread over ranks: those hold rows of their weights, the last the columns for them;
    None where all are whole. ValueError where they are spread in another way.
    """
    sharding = sharding_of(last.weight)
    if sharding is None and not any(isinstance(x, DTensor) for p in (*first, last) for x in p.parameters()):
        return None
    placements = last.weight.placements if isinstance(last.weight, DTensor) else ()
    wanted = tuple(Shard(0) if place == Shard(1) else place for place in placements)
    given = [x for p in first for x in p.parameters()]
    whole = last.bias is None or not isinstance(last.bias, DTensor) or all(isinstance(place, Replicate) for place in last.bias.placements)
    if sharding is None or not whole or not all(isinstance(x, DTensor) and x.placements == wanted for x in given):
        raise ValueError("the weights are not spread over outputs of the first projections and the input of the last")
    return sharding


def local(x: Tensor) -> Tensor:
    """What this rank holds of a tensor, the same memory."""
    return x.to_local() if isinstance(x, DTensor) else x


def scores(hidden: Tensor, head: Tensor) -> Tensor:
    """hidden [T, d] times the output matrix [V, d]: where it is spread over ranks, whole [T, V] on each of them, with its gradient."""
    if not isinstance(head, DTensor):
        return F.linear(hidden, head)
    mesh = head.device_mesh
    given = DTensor.from_local(hidden, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return F.linear(given, head).full_tensor()
