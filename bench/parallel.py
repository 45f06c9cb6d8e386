"""An edit on several ranks beside the same edit in one process: is it the same delta, what does it cost, what is sent.

    torchrun --nproc-per-node 2 -m bench.parallel --model smollm2 --mode dp --json -

mode: tp spreads the weights over the ranks, dp the subjects, both does both, in halves. max_rel_diff: the largest difference of a
weight's change from one process's, relative to its largest element; max_rel_diff_write: where the ranks write the values which one
process has found; max_rel_diff_backends, with --backends: between one process and one that runs the library's layers in plain PyTorch
(ROSE_BACKEND=reference), which is what another order of sums comes to.
seconds: of `apply` on the ranks, after an edit before the clock;
seconds_one_process: on rank 0, the others idle, with as many threads as all ranks have together. bytes_exchanged: what one rank gave to
collectives during the edit; bytes_write: where the values are given; bytes_base: before, once for a model, to name the
base's weights and to read the coordinates of values where the recipe has them.
Subjects are made up, the base is float32.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from rose_engine import Editor, Result
from rose_engine.optimize import Values
from rose_engine.parallel import join, leads, shard_weights
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.output import add_json, emit
from bench.speed import facts_of

COLLECTIVES = ("c10d", "_c10d_functional", "c10d_functional")
WAITS = ("wait_tensor", "barrier", "monitored_barrier_")


class Traffic(TorchDispatchMode):
    """Counts the bytes that this rank gives to collectives within the block."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace in COLLECTIVES and op._opname not in WAITS:
            # The tensors that are sent are the first argument, alone or in a list; of a broadcast those that receive count too.
            self.bytes += sum(x.numel() * x.element_size() for x in _tensors(args[1] if op._opname.startswith("allgather") else args[0]))
        return op(*args, **(kwargs or {}))


def _tensors(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    return [tensor for part in x for tensor in _tensors(part)] if isinstance(x, (list, tuple)) else []


def far(ours: Result, theirs: Result) -> float:
    """The largest difference of a weight's change, relative to its largest element."""
    changes = [[U.double() @ V.double() for U, V in result.delta.factors.values()] for result in (ours, theirs)]
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(*changes, strict=True))


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """What is printed; on every rank, of which rank 0 has the figures of one process."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    tensor_parallel = {"dp": 1, "tp": world, "both": max(1, world // 2)}[args.mode]
    mesh = join(args.device, tensor_parallel)
    edits = facts_of(args.subjects, args.facts)
    editor = Editor.from_pretrained(args.model, dtype="float32", device=args.device)
    recipe = replace(editor.recipe, steps=args.steps) if args.steps else editor.recipe
    first = replace(recipe, steps=1)  # an edit before the clock, here and on the ranks
    if leads():
        threads = torch.get_num_threads()
        torch.set_num_threads(threads * world)
        editor.revert(editor.apply(edits, recipe=first, verify=False))
        began = time.perf_counter()
        one = editor.apply(edits, recipe=recipe, verify=False)
        seconds_one = time.perf_counter() - began
        editor.revert(one)
        if args.backends:
            with mock.patch.dict(os.environ, ROSE_BACKEND="reference"):
                plain = editor.apply(edits, recipe=recipe, verify=False)
            editor.revert(plain)
        torch.set_num_threads(threads)
    dist.barrier()
    model, tokenizer = editor.model, editor.tokenizer
    if tensor_parallel > 1:
        shard_weights(model, mesh["weights"])
    editor = Editor(model, tokenizer, group=mesh["subjects"].get_group())
    with Traffic() as base:
        editor.prepare(recipe)
    editor.revert(editor.apply(edits, recipe=first, verify=False))
    dist.barrier()
    with Traffic() as traffic:
        began = time.perf_counter()
        result = editor.apply(edits, recipe=recipe, verify=False)
        seconds = time.perf_counter() - began
    alone = [{name: x.cpu() for name, x in vars(one.values).items()} if leads() else None]
    dist.broadcast_object_list(alone)
    editor.revert(result)
    with Traffic() as writing:
        written = editor.apply(edits, recipe=recipe, verify=False, values=Values(**{k: x.to(args.device) for k, x in alone[0].items()}))
    sums = [None] * world
    dist.all_gather_object(sums, [float(U.sum() + V.sum()) for U, V in result.delta.factors.values()])
    found = {
        "mode": args.mode,
        "ranks": world,
        "subjects": args.subjects,
        "facts": args.facts,
        "steps": max(result.steps),
        "seconds": seconds,
        "split": result.seconds,
        "bytes_exchanged": traffic.bytes,
        "bytes_write": writing.bytes,
        "bytes_base": base.bytes,
        "same_on_every_rank": all(x == sums[0] for x in sums),
    }
    if leads():
        found |= {
            "max_rel_diff": far(result, one),
            "max_rel_diff_write": far(written, one),
            "seconds_one_process": seconds_one,
        }
        found |= {"max_rel_diff_backends": far(plain, one)} if args.backends else {}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.parallel", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="Hugging Face id, folder, or smollm2")
    parser.add_argument("--mode", choices=("tp", "dp", "both"), default="dp")
    parser.add_argument("--subjects", type=int, default=8)
    parser.add_argument("--facts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=0, help="0: the recipe's")
    parser.add_argument("--backends", action="store_true", help="also one process in plain PyTorch; it takes several times as long")
    parser.add_argument("--device", default="cpu")
    add_json(parser)
    args = parser.parse_args(argv)
    result = compare(args)
    if leads():
        emit(result, args.json, "\n".join(f"{name:20s} {value}" for name, value in result.items()))
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
