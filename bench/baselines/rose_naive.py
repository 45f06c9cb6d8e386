"""RoSE in the plain style of `memit_merge`: the same forms and equations as the engine's, none of its ideas.

Rows are the engine's forms, so that both minimise the same loss; everything that is run is run here: every step takes every token of every
row through every layer and forms all logits. dW = R K^T (ridge I + K K^T)^-1 is solved as the dense d_in x d_in system in float64.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from rose_engine.edits import group_by_subject
from rose_engine.forms import regulariser_row, row_of
from rose_engine.optimize import forms_of
from rose_engine.recipe import Recipe

from bench.baselines.memit_merge import Edited
from bench.baselines.plain import Objective, TextRow, optimise, read


def edit(model, tokenizer, edits: Sequence, recipe: Recipe) -> Edited:
    """Write edits into the model in place. Bystanders, rewordings, noise, Fisher coordinates and `columns="mean"` are not part of it."""
    clock = time.perf_counter
    began = clock()
    last, forms = recipe.last_layer, forms_of(tokenizer, recipe)
    plain = lambda row: TextRow(row.tokens, row.last, row.target)  # noqa: E731
    subjects = group_by_subject(edits)
    rows = [[[plain(row_of(fact, form, tokenizer)) for form in forms] for fact in subject.edits] for subject in subjects]
    neutral = [plain(regulariser_row(subject.name, tokenizer)) for subject in subjects]
    prepared = clock()
    values = []
    for facts, quiet in zip(rows, neutral, strict=True):
        # The mean over a fact's forms, then over facts: the two levels of the gradient tree, as weights of rows.
        weights = [1 / (len(facts) * len(fact)) for fact in facts for _ in fact]
        objective = Objective((*(row for fact in facts for row in fact), quiet), (*weights, 0.0), len(weights))
        common = {name: getattr(recipe, name) for name in ("steps", "lr", "weight_decay", "kl", "clamp", "stop_loss")}
        values.append(optimise(model, objective, last, **common))
    optimised = clock()
    with torch.no_grad():
        flat = [row for facts in rows for fact in facts for row in fact]
        owner = torch.tensor([s for s, facts in enumerate(rows) for fact in facts for _ in fact])
        _, hidden = read(model, flat, last, last)
        start = torch.stack([hidden[owner == s][0] for s in range(len(rows))])
        z = hidden + (torch.stack([value.z for value in values]) - start)[owner]
        for i, layer in enumerate(recipe.layers):
            K, reached = read(model, flat, layer, last)
            k, R = K.T.double(), ((z - reached) / (len(recipe.layers) - i)).T.double()
            system = recipe.ridge * torch.eye(len(k), dtype=k.dtype, device=k.device) + k @ k.T
            weight = model.model.layers[layer].mlp.down_proj.weight
            weight += (R @ torch.linalg.solve(system, k).T).to(weight.dtype)
    return Edited({"prepare": prepared - began, "optimise": optimised - prepared, "write": clock() - optimised}, values)
