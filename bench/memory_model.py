"""What an edit needs beside the loaded model by `rose_engine.estimate`, and what it did need.

    python -m bench.memory_model --model smollm2 --facts 4 --json -

memory_mb: predicted, by part and in all; peak_mb: measured, so run it in a process of its own. seconds: predicted by stage for these texts
and, as `rose inspect` tells it, for average ones; then `apply`'s own. The steps are fixed, in the forms of the paper.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from rose_engine import Editor
from rose_engine.edits import group_by_subject
from rose_engine.estimate import measured_rate, memory, seconds, shapes_of, typical_work, work_of
from rose_engine.optimize import subject_rows
from rose_engine.recipe import ROSE_PAPER

from bench.memory import Memory
from bench.output import add_json, emit
from bench.speed import facts_of
from rose_kernels import native


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.memory_model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="Hugging Face id, folder, or smollm2")
    parser.add_argument("--subjects", type=int, default=1)
    parser.add_argument("--facts", type=int, default=4)
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or auto")
    parser.add_argument("--steps", type=int, default=3, help="the peak is reached in the first")
    add_json(parser)
    args = parser.parse_args(argv)
    result = compare(args)
    lines = [f"{name:14s} {mb:8.1f} MB" for name, mb in (result["memory_mb"] | {"measured": result["peak_mb"]}).items()]
    for whose, stages in result["seconds"].items():
        lines.append(f"{whose:14s} " + ", ".join(f"{stage} {value:.2f} s" for stage, value in stages.items()))
    emit(result, args.json, "\n".join(lines))
    return 0


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """memory_mb, peak_mb and seconds of one edit."""
    native.served()
    editor = Editor.from_pretrained(args.model, dtype=args.dtype)
    edits, recipe = facts_of(args.subjects, args.facts), replace(ROSE_PAPER, steps=args.steps, stop_loss=0.0)
    with torch.no_grad():
        for parameter in editor.model.parameters():
            parameter.sum()
    plans = [subject_rows(editor.decoder, editor.tokenizer, subject, recipe) for subject in group_by_subject(edits)]
    shapes, work, typical = shapes_of(editor.decoder), work_of(plans), typical_work(args.subjects, args.facts, recipe.forms)
    rate = measured_rate(shapes, editor.model.dtype, "cpu")
    told = {"predicted": seconds(shapes, work, recipe, rate), "average": seconds(shapes, typical, recipe, rate)}
    watch = Memory(False)
    result = editor.apply(edits, recipe=recipe, verify=False)
    peak = watch.peak_mb()
    predicted = {name: size / 1e6 for name, size in memory(shapes, work, recipe).items()}
    return {"memory_mb": predicted, "peak_mb": peak, "seconds": told | {"measured": result.seconds}}


if __name__ == "__main__":
    raise SystemExit(main())
