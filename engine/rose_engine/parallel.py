"""Several ranks, started by `torchrun`: subjects spread over them, weights sharded over them, or both on a 2-D mesh.

Every rank makes the same calls on its own `Editor`. Of an edit each optimises its share of the subjects, the values are sent to all, and
every rank writes the same delta into its weights, or into its part of them. What one process would optimise together is optimised
together: the delta is one process's, with sharded weights up to the rounding of sums in another order, which between two ranks and float32
weights on CPUs is the write's alone (`block`). Files are for one rank to write (`leads`). A rank that dies takes the others with it: their
next exchange fails, or `torchrun` stops them, and only weights in memory are lost.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import fields
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import PreTrainedModel

from rose_engine.architecture import Decoder
from rose_engine.captured import Frames
from rose_engine.fisher import Coordinates
from rose_engine.optimize import BATCH_TOKENS, Clock, Diverged, Progress, SubjectRows, Values, batches_of, optimize_values
from rose_engine.recipe import Recipe

# How long a rank waits for another that is alive and silent.
TIMEOUT = timedelta(minutes=30)
STYLES = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
ATTENTION = re.compile("attn|attention")
# Styles of parameters that every rank keeps whole; they tell of gradients, which weights here have none of.
WHOLE = ("replicated_with_grad_allreduce", "replicate")


def join(device: str | torch.device = "cpu", tensor_parallel: int = 1, timeout: timedelta = TIMEOUT) -> DeviceMesh:
    """Join the ranks that `torchrun` started: a mesh of the dimensions "subjects" and "weights", the latter `tensor_parallel` long.

    ValueError where that does not divide the number of ranks, or the process was not started by `torchrun`.
    """
    world = int(os.environ.get("WORLD_SIZE", "0"))
    if not world:
        raise ValueError("not started by torchrun: `torchrun --nproc-per-node 2 ...` sets what the ranks need to find each other")
    if tensor_parallel < 1 or world % tensor_parallel:
        raise ValueError(f"weights cannot be spread over {tensor_parallel} of {world} ranks")
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timeout)
    return init_device_mesh(kind, (world // tensor_parallel, tensor_parallel), mesh_dim_names=("subjects", "weights"))


def of_the_first(value: Any, group: dist.ProcessGroup) -> Any:
    """What the first rank of a group has, on each of its ranks: of what they find out by themselves and must agree on."""
    box = [value]
    dist.broadcast_object_list(box, group=group, group_src=0)
    return box[0]


def leads() -> bool:
    """Whether this process is the one to write files and print: the only one, or rank 0."""
    return not dist.is_initialized() or dist.get_rank() == 0


def shard_weights(model: PreTrainedModel, mesh: DeviceMesh) -> PreTrainedModel:
    """Spread a loaded model's projections over the ranks of a 1-D mesh, in place, by the family's tensor-parallel plan; attention stays
    whole where the heads do not divide, norms, embedding and output matrix always. ValueError where the plan holds what is not known here.

    Make the editor afterwards. A model that transformers sharded while it loaded it (`DistributedConfig`) can be edited as it is.
    """
    if mesh.size() == 1:
        return model
    plan = getattr(model.config, "base_model_tp_plan", None) or {}
    heads = (model.config.num_attention_heads, getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads)
    divides = not any(count % mesh.size() for count in heads)
    chosen = {name: style for name, style in plan.items() if style not in WHOLE and (divides or not ATTENTION.search(name))}
    unknown = sorted(set(chosen.values()) - set(STYLES))
    if not chosen or unknown:
        told = f"its plan holds {', '.join(unknown)}" if unknown else "it has no plan"
        raise ValueError(f"`{model.config.model_type}` cannot be spread over ranks here: {told}; load it sharded with transformers")
    if model.config.intermediate_size % mesh.size():
        raise ValueError(f"the MLP's {model.config.intermediate_size} columns do not divide over {mesh.size()} ranks")
    parallelize_module(model.base_model, mesh, {name: STYLES[style]() for name, style in chosen.items()})
    return model.requires_grad_(False)


def optimize_spread(
    decoder: Decoder,
    subjects: Sequence[SubjectRows],
    recipe: Recipe,
    group: dist.ProcessGroup | None,
    progress: Progress | None,
    clock: Clock,
    coordinates: Coordinates | None = None,
    frames: Frames | None = None,
) -> Values:
    """`optimize_values` with the batches of subjects spread over the ranks of a group, and the same values on all of them.

    Diverged on every rank where it is raised on one, RuntimeError where another one failed; progress tells of this rank's subjects alone.
    """
    if group is None or group.size() == 1:
        return optimize_values(decoder, subjects, recipe, progress, clock, coordinates=coordinates, frames=frames)
    # The batches of one process, or smaller ones where there are fewer of them than ranks.
    budget = BATCH_TOKENS if len(batches_of(subjects, BATCH_TOKENS)) >= group.size() else 1
    shares = shares_of([len(batch) for batch in batches_of(subjects, budget)], group.size())
    mine = subjects[shares[group.rank()] : shares[group.rank() + 1]]
    values, failure = None, None
    # Of each subject the step at which it diverged; behind them whether a rank failed otherwise.
    status = torch.full((len(subjects) + 1,), -1)
    try:
        if mine:
            values = optimize_values(decoder, mine, recipe, progress, clock, coordinates=coordinates, frames=frames, batch_tokens=budget)
    except Diverged as e:
        status[[shares[group.rank()] + s for s in e.subjects]] = e.step
    except Exception as e:
        failure, status[-1] = e, 0
    status = status.to(decoder.embedding.weight.device)
    dist.all_reduce(status, dist.ReduceOp.MAX, group=group)
    if failure is not None:
        raise failure
    if status[-1] >= 0:
        raise RuntimeError("another rank failed while it optimised its subjects; its message says why")
    if (status >= 0).any():
        raise Diverged((status >= 0).nonzero()[:, 0].tolist(), int(status.max()))
    parts = [_sent(values, subjects[begin:end], decoder, group, rank) for rank, (begin, end) in enumerate(pairwise(shares)) if begin < end]
    clock("exchange")
    return Values(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Values)})


def shares_of(batches: Sequence[int], ranks: int) -> list[int]:
    """Where each rank's subjects begin, and where the last one's end: whole batches, given by their sizes, about as many for each rank."""
    ends = [0]
    for size in batches:
        ends.append(ends[-1] + size)
    return [ends[round(rank * len(batches) / ranks)] for rank in range(ranks + 1)]


def _sent(values: Values | None, subjects: Sequence[SubjectRows], decoder: Decoder, group: dist.ProcessGroup, rank: int) -> Values:
    """The values of one rank's subjects, on every rank."""
    S, M, B = len(subjects), sum(len(s.relations) for s in subjects), sum(len(s.facts) for s in subjects)
    d, device = decoder.embedding.embedding_dim, decoder.embedding.weight.device
    shapes = {"delta": (S, d), "v0": (S, d), "wanted": (B, d), "loss": (S,), "steps": (S,), "centroids": (M, d)}

    def sent(name: str) -> Tensor:
        dtype = torch.int32 if name == "steps" else torch.float32
        x = getattr(values, name).contiguous() if group.rank() == rank else torch.empty(shapes[name], dtype=dtype, device=device)
        dist.broadcast(x, group=group, group_src=rank)
        return x

    return Values(**{f.name: sent(f.name) for f in fields(Values)})
