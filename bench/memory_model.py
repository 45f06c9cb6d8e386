"""What an edit needs beside the loaded model, from shapes alone, and what it did need.

    python -m bench.memory_model --model smollm2 --facts 4 --json -

The model (bytes; b: of a weight's element):
    prefix cache  nodes before subjects x layers above L x keys and values x b, and the tree's hidden states after layer L
    activations   tokens of a step x layers above L x (two hidden states in float32, queries, keys, values, gate and up x b); of the
                  last layer, only the tokens whose output is read
    temporaries   tokens of a step x (two MLP activations x b, four hidden states in float32), what a layer's backward holds at once
    logits        up to OUTPUT_ROWS x vocabulary in float32, and a row a subject for the regulariser's reference
    weights       the edited weights twice, for `revert` and for `all_or_nothing` while the write runs, and the factors
The first four are held while values are optimised, the last afterwards, so that the larger of the two is the peak.
Written for the layers that `rose_engine.block` runs on the CPU; the library's keep about twice the activations. peak_mb is measured
with `bench.memory`, in a process of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from rose_engine.edits import group_by_subject
from rose_engine.forward import OUTPUT_ROWS
from rose_engine.optimize import BATCH_TOKENS, STEP_TOKENS, batches_of, subject_rows
from rose_engine.packing import build_tree, inputs, split_rows

from bench.output import add_json, emit


def predict(editor, edits: Sequence, recipe) -> dict[str, float]:
    """MB by part, and `total`: the largest batch's, or the weights' where they are more."""
    decoder, config = editor.decoder, editor.model.config
    plans = [subject_rows(decoder, editor.tokenizer, subject, recipe) for subject in group_by_subject(edits)]
    attention, b = decoder.layers[0].self_attn, decoder.head.element_size()
    d, inner, above = config.hidden_size, config.intermediate_size, len(decoder.layers) - recipe.last_layer - 1
    kv, q = attention.k_proj.out_features, attention.q_proj.out_features
    step: dict[str, float] = {}
    for members in batches_of(plans, BATCH_TOKENS):
        rows = [row for plan in members for row in (*plan.facts, plan.neutral)]
        tree = build_tree([inputs(row) for row in rows])
        before = {node for row, path in zip(rows, tree.path, strict=True) for node in path[: row.last]}
        tokens = max(sum(len(inputs(rows[r])) - rows[r].last for r in part) for part in split_rows(rows, range(len(rows)), STEP_TOKENS))
        read = min(tokens, sum(len(row.tokens) - row.target + (row.target == len(row.tokens)) for row in rows))
        now = {
            "prefix cache": len(before) * above * 2 * kv * b + len(tree.token) * d * b,
            "activations": (tokens * (above - 1) + read) * (8 * d + (q + 2 * kv + 2 * inner) * b),
            "temporaries": tokens * (2 * inner * b + 16 * d),
            "logits": 4 * len(decoder.head) * (min(OUTPUT_ROWS, read) + len(members)),
        }
        step = max((step, now), key=lambda parts: sum(parts.values()))
    sizes = [decoder.weight(layer).shape for layer in recipe.layers]
    columns = sum(len(plan.facts) for plan in plans)
    weights = sum(2 * rows * width * b + 4 * columns * (rows + width) for rows, width in sizes)
    parts = {**step, "weights": weights}
    out = {name: value / 1e6 for name, value in parts.items()}
    return out | {"total": max(sum(step.values()), weights) / 1e6}


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
    emit(result, args.json, "\n".join(f"{name:14s} {mb:8.1f}" for name, mb in result.items()))
    return 0


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """The prediction's parts, and the measured peak_mb."""
    from dataclasses import replace

    from rose_engine import Editor
    from rose_engine.recipe import ROSE_PAPER

    from bench.memory import Memory
    from bench.speed import facts_of
    from rose_kernels import native

    native.served()
    editor = Editor.from_pretrained(args.model, dtype=args.dtype)
    edits, recipe = facts_of(args.subjects, args.facts), replace(ROSE_PAPER, steps=args.steps, stop_loss=0.0)
    with torch.no_grad():
        for parameter in editor.model.parameters():
            parameter.sum()
    predicted = predict(editor, edits, recipe)
    memory = Memory(False)
    editor.apply(edits, recipe=recipe, verify=False)
    return predicted | {"peak_mb": memory.peak_mb()}


if __name__ == "__main__":
    raise SystemExit(main())
