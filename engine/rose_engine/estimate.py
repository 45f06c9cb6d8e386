"""What an edit will need on a model, from shapes alone: memory, and time by one measured product.

Memory (bytes; b: of a weight's element):
    prefix cache  nodes before subjects x layers above L x keys and values x b, and the tree's hidden states after layer L
    activations   tokens of a step x layers above L x (two hidden states in float32, queries, keys, values, gate and up x b); of the
                  last layer, only the tokens whose output is read
    temporaries   tokens of a step x (two MLP activations x b, four hidden states in float32), what a layer's backward holds at once
    logits        up to OUTPUT_ROWS x vocabulary in float32, and a row a subject for the regulariser's reference
    weights       the edited weights once more, for `all_or_nothing` while the write runs, the factors, and bystanders: temporaries of
                  their tokens, and of one layer their keys twice in float32 and their products three times in float64;
                  where waypoints are chosen, what protects the bystanders in all edited layers, and the keys of a write's
                  other subjects beside it
    coordinates   of values, d x d, in float64 on a CPU and float32 elsewhere; while they are made, four such in float64
    base          the edited weights as they were, for `revert`: in host memory, from the first edit on
The first four are held while values are optimised, the next afterwards: the larger of the two is the peak, beside coordinates and base.
Written for the layers that `block` runs on the CPU; the library's keep about twice the activations. `bench.memory_model` compares it
with what was used, without bystanders. These are as many as a recipe says: a first edit has fewer where its texts are few (48 names for
each), one after others up to two thirds more.

Time: a layer that T tokens pass takes its parameters x s(T), s being the seconds a parameter of a product of T rows, measured on the
device; backward takes as much again. Attention, norms, Adam, the solves of bystanders, coordinates, verification and the writing of
rewordings are left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from rose_engine.architecture import Decoder
from rose_engine.bystanders import GENERAL_AMONG_SEVERAL, NAMESAKES
from rose_engine.forward import OUTPUT_ROWS
from rose_engine.optimize import BATCH_TOKENS, STEP_TOKENS, SubjectRows, batches_of
from rose_engine.packing import build_tree, inputs, split_rows
from rose_engine.recipe import Recipe
from rose_engine.statements import MORE
from rose_engine.waypoints import evaluations_of
from rose_kernels.layer import DTYPES, WIDTH, available, products_

# Means over 200 same-subject records of three to five facts, in the forms of ROSE and SmolLM2's tokens, of each row: its suffix, its
# nodes in the prefix tree, those of them before the subject's last token, its targets, its nodes and columns where the weights are written.
SUFFIX, NODES, BEFORE, TARGETS, WRITE_NODES, COLUMNS = 7.9, 17.7, 9.9, 1.6, 11.2, 0.92
# Nodes of the tree of bystanders, of each; over forty subjects of three to six facts with two rewordings.
BYSTANDER = 5.5


@dataclass(frozen=True)
class Shapes:
    """Of a model: layers, hidden width d, the edited projection's input d_in, widths of queries and of keys (values alike), vocabulary,
    bytes of a weight's element, parameters of a decoder layer and of the whole model."""

    layers: int
    d: int
    d_in: int
    queries: int
    keys: int
    vocabulary: int
    element: int
    layer: int
    parameters: int


def shapes_of(decoder: Decoder) -> Shapes:
    """The shapes of a model, which may be without weights (on the meta device)."""
    config, weight = decoder.model.config, decoder.weight(0)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shapes(
        layers=len(decoder.layers),
        d=weight.shape[0],
        d_in=weight.shape[1],
        queries=heads * width,
        keys=(getattr(config, "num_key_value_heads", None) or heads) * width,
        vocabulary=len(decoder.head),
        element=weight.element_size(),
        layer=sum(p.numel() for p in decoder.layers[0].parameters()),
        parameters=sum(p.numel() for p in decoder.model.parameters()),
    )


@dataclass(frozen=True)
class Batch:
    """What is run of subjects that are optimised together: nodes of the prefix tree and those of them before subjects, tokens of each
    part of a step, and the tokens whose output is read."""

    subjects: int
    nodes: int
    before: int
    parts: tuple[int, ...]
    read: int


@dataclass(frozen=True)
class Work:
    """What is run of an edit: its batches, and the nodes and columns of the write."""

    batches: tuple[Batch, ...]
    write_nodes: int
    columns: int

    @property
    def subjects(self) -> int:
        return sum(batch.subjects for batch in self.batches)


def work_of(plans: Sequence[SubjectRows]) -> Work:
    """What is run of these subjects."""
    batches = []
    for members in batches_of(plans, BATCH_TOKENS):
        rows = [row for plan in members for row in (*plan.facts, plan.neutral)]
        tree = build_tree([inputs(row) for row in rows])
        before = {node for row, path in zip(rows, tree.path, strict=True) for node in path[: row.last]}
        parts = (sum(len(inputs(rows[r])) - rows[r].last for r in part) for part in split_rows(rows, range(len(rows)), STEP_TOKENS))
        read = sum(len(row.tokens) - row.target + (row.target == len(row.tokens)) for row in rows)
        batches.append(Batch(len(members), len(tree.token), len(before), tuple(parts), read))
    facts = [row for plan in plans for row in plan.facts]
    tree = build_tree([row.tokens[: row.last + 1] for row in facts])
    return Work(tuple(batches), len(tree.token), len({path[-1] for path in tree.path}))


def typical_work(subjects: int, facts: int, forms: int) -> Work:
    """What is run of so many subjects of so many facts, each in so many forms and rewordings, as texts are on average."""
    rows = facts * forms + 1
    tokens = round(rows * SUFFIX)
    together = min(subjects, max(1, BATCH_TOKENS // tokens))
    batches = []
    for first in range(0, subjects, together):
        n = min(together, subjects - first)
        whole, rest = divmod(n * tokens, STEP_TOKENS)
        parts = (STEP_TOKENS,) * whole + ((rest,) if rest else ())
        batches.append(Batch(n, round(n * rows * NODES), round(n * rows * BEFORE), parts, round(n * rows * TARGETS)))
    facts_rows = subjects * facts * forms
    return Work(tuple(batches), round(facts_rows * WRITE_NODES), round(facts_rows * COLUMNS))


def bystander_nodes(recipe: Recipe, subjects: int) -> int:
    """Nodes of the tree of a recipe's bystanders, each of which has a key that is protected, as texts are on average."""
    if not recipe.bystanders:
        return 0
    more = min(round(recipe.bystanders * GENERAL_AMONG_SEVERAL), len(MORE)) if subjects > 1 else 0
    return round((recipe.bystanders + more + NAMESAKES * subjects) * BYSTANDER)


def memory(shapes: Shapes, work: Work, recipe: Recipe, device: str | torch.device = "cpu") -> dict[str, float]:
    """Bytes above the loaded model, by part, and `total`, the device's: the largest batch's, or the weights' where they are more; with the
    base where the device is the host."""
    s, above = shapes, shapes.layers - recipe.last_layer - 1
    step: dict[str, float] = {}
    for batch in work.batches:
        tokens = max(batch.parts)
        read = min(tokens, batch.read)
        now = {
            "prefix cache": batch.before * above * 2 * s.keys * s.element + batch.nodes * s.d * s.element,
            "activations": (tokens * (above - 1) + read) * (8 * s.d + (s.queries + 2 * s.keys + 2 * s.d_in) * s.element),
            "temporaries": tokens * (2 * s.d_in * s.element + 16 * s.d),
            "logits": 4 * s.vocabulary * (min(OUTPUT_ROWS, read) + batch.subjects),
        }
        step = max((step, now), key=lambda parts: sum(parts.values()))
    base = len(recipe.layers) * s.d * s.d_in * s.element
    others = bystander_nodes(recipe, work.subjects)
    weights = base + len(recipe.layers) * 4 * work.columns * (s.d + s.d_in)
    weights += others * (2 * s.d_in * s.element + 16 * s.d + 8 * s.d_in + 24 * others)
    host = torch.device(device).type == "cpu"
    if recipe.waypoints and len(recipe.layers) > 1:
        wide, joined = (12 if host else 4), work.columns * (work.subjects > 1)
        if 4 * others >= 3 * s.d_in:  # as a matrix, on the host in float32 with the keys that refine it
            held = 4 * s.d_in * (s.d_in + max(others, 2 * s.d_in)) if host else 8 * s.d_in**2  # or in float64, and again in float32
        else:
            held = others * (wide * s.d_in + 8 * others)
        weights += len(recipe.layers) * (held + 2 * joined * (wide * s.d_in + 8 * joined))
    coordinates, making = ((8 if host else 4) * s.d**2, 4 * 8 * s.d**2) if recipe.fisher else (0, 0)
    return {
        **step,
        "weights": weights,
        "coordinates": coordinates,
        "base": base,
        "total": max(max(sum(step.values()), weights) + coordinates, making) + base * host,
    }


def seconds(shapes: Shapes, work: Work, recipe: Recipe, rate: Callable[[int], float]) -> dict[str, float]:
    """Seconds of each stage; rate(T): seconds a parameter of a product of T rows, as `measured_rate` gives it."""
    s, below, head = shapes, recipe.last_layer + 1, shapes.vocabulary * shapes.d
    above = s.layers - below
    prepare = sum(below * s.layer * rate(b.nodes) + above * s.layer * rate(b.before) for b in work.batches)
    step = sum(2 * above * s.layer * rate(part) for b in work.batches for part in b.parts)
    step += sum(2 * head * rate(b.read) for b in work.batches)
    passes = sum(recipe.last_layer + 1 - layer for layer in recipe.layers) + below  # each layer is read with the ones before it written
    write = passes * s.layer * rate(work.write_nodes) + len(recipe.layers) * s.d * s.d_in * rate(2 * work.columns)
    if recipe.waypoints and len(recipe.layers) > 1:
        evaluations = evaluations_of(recipe.waypoints, work.subjects > 1)
        write += evaluations * 2 * (recipe.last_layer - recipe.layers[0]) * s.layer * rate(work.columns)
    if recipe.bystanders:
        write += below * s.layer * rate(bystander_nodes(recipe, work.subjects))
    return {"prepare": prepare, "optimise": recipe.steps * step, "write": write}


def measured_rate(shapes: Shapes, dtype: torch.dtype, device: str | torch.device, most: int = 1 << 24) -> Callable[[int], float]:
    """Seconds a parameter of a product of T rows with a matrix of the MLP's shape, cut to at most `most` elements, by what serves it."""
    device = torch.device(device)
    weight = torch.ones(min(shapes.d_in, most // shapes.d), shapes.d, dtype=dtype, device=device)
    found: dict[int, float] = {}

    def rate(rows: int) -> float:
        few = min(rows, STEP_TOKENS)
        if few not in found:
            found[few] = min(_product_seconds(few, weight) for _ in range(5)) / weight.numel()
        return found[few] * rows / few

    return rate


def _product_seconds(rows: int, weight: torch.Tensor) -> float:
    x, out = weight.new_ones(rows, weight.shape[1]), weight.new_empty(rows, len(weight))
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    written = available(x.device) and weight.dtype in DTYPES and not any(n % WIDTH for n in weight.shape)
    wait()
    began = time.perf_counter()
    if written:
        products_(x, [weight], [out], turned=True)
    else:
        F.linear(x, weight)
    wait()
    return time.perf_counter() - began
