"""What each idea of the engine saves: one edit's step with the idea, and with it alone switched off.

    python -m bench.ideas --model smollm2 --facts 4 --json -

Milliseconds are medians of steps that take turns, so that the machine's drift falls on both. An idea is switched off by giving the engine
rows or a backend with which it has nothing to gain: suffixes that begin at the first token, or are padded to the longest, targets at
every token, the library's layers, PyTorch's products. Preparation and the write are measured as such.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from rose_engine import Editor
from rose_engine.edits import group_by_subject
from rose_engine.forms import Row
from rose_engine.forward import pack, prepare, run_tree, suffix_step
from rose_engine.optimize import STEP_TOKENS, subject_rows
from rose_engine.packing import inputs, split_rows
from rose_engine.recipe import ROSE_PAPER

from bench.output import add_json, emit
from bench.speed import facts_of
from rose_kernels import layer, native, rank_update_


@dataclass(frozen=True)
class Saving:
    """An idea, what was timed, and its milliseconds with the idea and without."""

    idea: str
    of: str
    with_ms: float
    without_ms: float


def in_turns(*calls: Callable[[], Any], repeats: int) -> list[float]:
    """The median milliseconds of each call; they take turns, and the first round does not count."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats + 1):
        for call, taken in zip(calls, times, strict=True):
            began = time.perf_counter()
            call()
            if turn:
                taken.append(1e3 * (time.perf_counter() - began))
    return [statistics.median(taken) for taken in times]


@contextmanager
def backend(name: str):
    """ROSE_BACKEND within the block."""
    before = os.environ.get("ROSE_BACKEND")
    os.environ["ROSE_BACKEND"] = name
    try:
        yield
    finally:
        os.environ.pop("ROSE_BACKEND")
        if before is not None:
            os.environ["ROSE_BACKEND"] = before


@contextmanager
def library_products():
    """Matrix products by PyTorch within the block."""
    ours, layer._serves = layer._serves, lambda weight: False
    try:
        yield
    finally:
        layer._serves = ours


def stepper(editor: Editor, rows: Sequence[Row], last_layer: int) -> Callable[[], None]:
    """A step over these rows, prepared."""
    prepared = prepare(editor.decoder, rows, last_layer)
    batches = [pack(prepared, index) for index in split_rows(rows, range(len(rows)), STEP_TOKENS)]
    delta = torch.zeros(1, editor.model.config.hidden_size)

    def step():
        for batch in batches:
            suffix_step(batch, delta, torch.zeros(len(batch.suffixes.row), dtype=torch.long))

    return step


def padded(rows: Sequence[Row]) -> list[Row]:
    """The same rows with suffixes of one length: the first suffix token repeated."""
    longest = max(len(inputs(row)) - row.last for row in rows)
    out = []
    for row in rows:
        short = longest - (len(inputs(row)) - row.last)
        filler = row.tokens[row.last : row.last + 1] * short
        out.append(Row(row.tokens[: row.last + 1] + filler + row.tokens[row.last + 1 :], row.last, row.target + short))
    return out


def savings(model: str, facts: int, repeats: int) -> list[Saving]:
    """Every idea, measured on one subject."""
    native.served()
    editor = Editor.from_pretrained(model, dtype="float32")
    (subject,) = group_by_subject(facts_of(1, facts))
    plan = subject_rows(editor.decoder, editor.tokenizer, subject, ROSE_PAPER)
    rows, L = [*plan.facts, plan.neutral], ROSE_PAPER.last_layer
    make = lambda rows: stepper(editor, rows, L)  # noqa: E731
    step, out = make(rows), []

    def against(idea: str, without: Callable[[], Any], of: str = "step", ours: Callable[[], Any] = step) -> None:
        out.append(Saving(idea, of, *in_turns(ours, without, repeats=repeats)))

    tree = prepare(editor.decoder, rows, L).tree
    below = torch.no_grad()(lambda: run_tree(editor.decoder, tree, range(L + 1)))
    against("layers up to L run once", lambda: (below(), step()))
    against("only the tokens from the subject on", make([replace(row, last=0) for row in rows]))
    against("packed, not padded", make(padded(rows)))
    everywhere = [row if row.target == len(row.tokens) else replace(row, target=row.last + 1) for row in rows]
    against("logits where a target is predicted", make(everywhere))
    against(
        "prefixes shared", lambda: [prepare(editor.decoder, [row], L) for row in rows], "prepare", lambda: prepare(editor.decoder, rows, L)
    )

    def library_step():
        with library_products():
            step()

    with backend("reference"):
        against("layers written out, no autograd (both with PyTorch's products)", make(rows), ours=library_step)
    against("matrix products of our own", library_step)
    width, d = editor.decoder.weight(L).shape[1], editor.model.config.hidden_size
    W, K, R = torch.randn(d, width), torch.randn(width, len(plan.facts)), torch.randn(d, len(plan.facts))

    def dense_write():
        k = K.double()
        W.add_(R @ torch.linalg.solve(torch.eye(width, dtype=k.dtype) + k @ k.T, k).T.float())

    against("n x n solve in place of d x d", dense_write, "write of a layer", lambda: rank_update_(W, K, R))
    narrow = Editor.from_pretrained(model, dtype="auto")
    out.append(
        Saving(
            f"dtype auto ({narrow.model.dtype})".replace("torch.", ""), "step", *in_turns(stepper(narrow, rows, L), step, repeats=repeats)
        )
    )
    return out


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.ideas", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="Hugging Face id, folder, or smollm2")
    parser.add_argument("--facts", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    add_json(parser)
    args = parser.parse_args(argv)
    found = savings(args.model, args.facts, args.repeats)
    lines = ["| idea | of | with, ms | without, ms | saves |\n|---|---|---|---|---|"]
    lines += [f"| {s.idea} | {s.of} | {s.with_ms:.1f} | {s.without_ms:.1f} | {s.without_ms / s.with_ms:.1f}x |" for s in found]
    emit([vars(saving) for saving in found], args.json, "\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
