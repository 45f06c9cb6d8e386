"""An edit on several ranks beside the same edit in one process: is it the same delta, what does it cost, what is sent.

    torchrun --nproc-per-node 2 -m bench.parallel --model smollm2 --mode dp --json -

mode: tp spreads the weights over the ranks, dp the subjects, both does both, in halves. max_rel_diff: the largest difference of a
weight's change from one process's, relative to its largest element; seconds: of `apply` on the ranks; seconds_one_process: on rank 0, the
others idle, with as many threads as all ranks have together. bytes_exchanged: what one rank gave to collectives during the edit;
bytes_base: before it, once for a model, to name the base's weights. Subjects are made up, the base is float32.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from rose_engine import Editor
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


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """What is printed; on every rank, of which rank 0 has the figures of one process."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    tensor_parallel = {"dp": 1, "tp": world, "both": max(1, world // 2)}[args.mode]
    mesh = join(args.device, tensor_parallel)
    edits = facts_of(args.subjects, args.facts)
    editor = Editor.from_pretrained(args.model, dtype="float32", device=args.device)
    if leads():
        threads = torch.get_num_threads()
        torch.set_num_threads(threads * world)
        recipe = replace(editor.recipe, steps=args.steps) if args.steps else editor.recipe
        began = time.perf_counter()
        one = editor.apply(edits, recipe=recipe, verify=False)
        seconds_one = time.perf_counter() - began
        editor.revert(one)
        torch.set_num_threads(threads)
    dist.barrier()
    model, tokenizer = editor.model, editor.tokenizer
    if tensor_parallel > 1:
        shard_weights(model, mesh["weights"])
    editor = Editor(model, tokenizer, group=mesh["subjects"].get_group())
    recipe = replace(editor.recipe, steps=args.steps) if args.steps else editor.recipe
    with Traffic() as base:
        editor.prepare(recipe)
    dist.barrier()
    with Traffic() as traffic:
        began = time.perf_counter()
        result = editor.apply(edits, recipe=recipe, verify=False)
        seconds = time.perf_counter() - began
    ids = [None] * world
    dist.all_gather_object(ids, [factors[0].sum().item() for factors in result.delta.factors.values()])
    found = {
        "mode": args.mode,
        "ranks": world,
        "subjects": args.subjects,
        "facts": args.facts,
        "steps": max(result.steps),
        "seconds": seconds,
        "split": result.seconds,
        "bytes_exchanged": traffic.bytes,
        "bytes_base": base.bytes,
        "same_on_every_rank": all(x == ids[0] for x in ids),
    }
    if leads():
        changes = [
            (U.double() @ V.double(), one.delta.factors[name][0].double() @ one.delta.factors[name][1].double())
            for name, (U, V) in result.delta.factors.items()
        ]
        found |= {
            "max_rel_diff": max(float((ours - theirs).abs().max() / theirs.abs().max()) for ours, theirs in changes),
            "seconds_one_process": seconds_one,
        }
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.parallel", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="Hugging Face id, folder, or smollm2")
    parser.add_argument("--mode", choices=("tp", "dp", "both"), default="dp")
    parser.add_argument("--subjects", type=int, default=8)
    parser.add_argument("--facts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=0, help="0: the recipe's")
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
