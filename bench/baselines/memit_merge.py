"""MEMIT-Merge: MEMIT (Meng et al. 2023) with one value for all facts of a subject (Dong et al. 2025), in plain PyTorch.

For each subject one value is optimised over its facts, each in the edit's prompt alone and after sampled context prefixes; keys are
averages over the same rows; every edited layer gets dW = R K^T (lambda C + K K^T)^-1 with C = E[k k^T] over a corpus and the d_in x d_in
system solved in float64. Kept as it is published: no part of it is slowed down, none is tuned.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.baselines.plain import Objective, Optimised, TextRow, optimise, read, text_row

OPENINGS = ("The", "Therefore", "Because", "I", "You")  # MEMIT samples its contexts after these words


@dataclass(frozen=True)
class Settings:
    """The paper's settings (Appendix D.3) for the shared fields; covariance_weight is MEMIT's lambda."""

    layers: tuple[int, ...] = (4, 5, 6, 7, 8)
    steps: int = 35
    lr: float = 0.5
    weight_decay: float = 0.5
    kl: float = 0.0625
    clamp: float = 4.0
    stop_loss: float = 0.0
    covariance_weight: float = 15_000.0
    context_tokens: int = 10


@dataclass(frozen=True)
class Edited:
    """What an edit took: seconds by stage, and each subject's optimisation."""

    seconds: dict[str, float]
    values: list[Optimised]


def contexts(model, tokenizer, settings: Settings, seed: int = 0) -> list[str]:
    """The empty prefix, and one sampled sentence for each opening."""
    torch.manual_seed(seed)
    texts = [""]
    for opening in OPENINGS:
        ids = tokenizer(opening, return_tensors="pt").to(model.device)
        out = model.generate(
            **ids,
            max_new_tokens=settings.context_tokens,
            do_sample=True,
            top_k=5,
            pad_token_id=tokenizer.eos_token_id or tokenizer.pad_token_id,
        )
        texts.append(tokenizer.decode(out[0], skip_special_tokens=True).strip() + ". ")
    return texts


def covariance(model, tokenizer, texts: Sequence[str], layers: Sequence[int], tokens: int = 256) -> dict[int, Tensor]:
    """layer -> E[k k^T] [d_in, d_in] in float64 over the texts' tokens, `tokens` of each text at most."""
    sums: dict[int, Tensor] = {}
    count = 0

    def add(layer):
        def hook(module, args):
            k = args[0][0].double()
            sums[layer] = sums.get(layer, 0) + k.T @ k

        return hook

    hooks = [model.model.layers[layer].mlp.down_proj.register_forward_pre_hook(add(layer)) for layer in layers]
    try:
        with torch.no_grad():
            for text in texts:
                ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=tokens).to(model.device)
                if ids["input_ids"].numel():
                    model(**ids)
                    count += ids["input_ids"].numel()
    finally:
        for hook in hooks:
            hook.remove()
    if not count:
        raise ValueError("the covariance needs at least one text with a token")
    return {layer: total / count for layer, total in sums.items()}


def rows_of(tokenizer, subject: str, edits: Sequence, prefixes: Sequence[str]) -> list[TextRow]:
    """Every fact of a subject after every prefix."""
    rows = []
    for edit in edits:
        before, after = edit.prompt.split("{}")
        rows += [text_row(tokenizer, prefix + before, subject, after.rstrip(), f" {edit.target.strip()}") for prefix in prefixes]
    return rows


@torch.no_grad()
def write(model, rows: Sequence[Sequence[TextRow]], z: Tensor, C: dict[int, Tensor], settings: Settings) -> None:
    """dW = R K^T (lambda C + K K^T)^-1, layer by layer; rows: of each subject; z [S, d]."""
    last = settings.layers[-1]
    for i, layer in enumerate(settings.layers):
        read_rows = [read(model, group, layer, last) for group in rows]
        K = torch.stack([keys.mean(0) for keys, _ in read_rows], 1).double()
        R = ((z - torch.stack([hidden.mean(0) for _, hidden in read_rows])) / (len(settings.layers) - i)).T.double()
        adjusted = torch.linalg.solve(settings.covariance_weight * C[layer] + K @ K.T, K)
        weight = model.model.layers[layer].mlp.down_proj.weight
        weight += (R @ adjusted.T).to(weight.dtype)


def edit(model, tokenizer, edits: Sequence, C: dict[int, Tensor], settings: Settings = Settings()) -> Edited:
    """Write edits into the model in place; C as `covariance` gives it."""
    clock = time.perf_counter
    began = clock()
    prefixes = contexts(model, tokenizer, settings)
    facts = defaultdict(list)
    for fact in edits:
        facts[fact.subject].append(fact)
    rows = [rows_of(tokenizer, subject, group, prefixes) for subject, group in facts.items()]
    prepared = clock()
    values = []
    for subject, group in zip(facts, rows, strict=True):
        objective = Objective((*group, text_row(tokenizer, "", subject, " is a")), (*[1 / len(group)] * len(group), 0.0), len(group))
        common = {name: getattr(settings, name) for name in ("steps", "lr", "weight_decay", "kl", "clamp", "stop_loss")}
        values.append(optimise(model, objective, settings.layers[-1], **common))
    optimised = clock()
    write(model, rows, torch.stack([value.z for value in values]), C, settings)
    return Edited({"prepare": prepared - began, "optimise": optimised - prepared, "write": clock() - optimised}, values)
