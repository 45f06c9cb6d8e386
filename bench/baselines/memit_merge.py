"""MEMIT (Meng et al. 2023) and MEMIT-Merge (Dong et al. 2025), which shares one value among a subject's facts, in plain PyTorch.

For each fact, or subject, one value is optimised over the edit's prompt alone and after sampled context prefixes; its key is the average
over the same rows, its residual is read at the bare prompt; every edited layer gets dW = R K^T (lambda C + K K^T)^-1 with C = E[k k^T] over
a corpus and the d_in x d_in system solved in float64. The optimisation is MEMIT-Merge's for both (35 steps, weight decay 0.5), and the key
is the plain mean of the paper's equation, where the authors' program gives the bare prompt half the weight. Nothing is slowed down or
tuned.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig

from bench.baselines.plain import Objective, Optimised, TextRow, optimise, read, text_row

OPENINGS = ("The", "Therefore", "Because", "I", "You")  # MEMIT samples its contexts after these words


@dataclass(frozen=True)
class Settings:
    """The paper's settings (Appendix D.3) for the shared fields; covariance_weight is MEMIT's lambda. merge: one value a subject, as in
    MEMIT-Merge; False: one a fact, as in MEMIT."""

    layers: tuple[int, ...] = (4, 5, 6, 7, 8)
    steps: int = 35
    lr: float = 0.5
    weight_decay: float = 0.5
    kl: float = 0.0625
    clamp: float = 4.0
    stop_loss: float = 0.0
    covariance_weight: float = 15_000.0
    context_tokens: int = 10
    merge: bool = True


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
        pad = tokenizer.eos_token_id or tokenizer.pad_token_id
        top5 = GenerationConfig(max_new_tokens=settings.context_tokens, do_sample=True, top_k=5, pad_token_id=pad)
        out = model.generate(**ids, generation_config=top5)
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


def groups_of(tokenizer, edits: Sequence, prefixes: Sequence[str], merge: bool) -> list[list[TextRow]]:
    """The rows of every value: of a subject's facts where they are merged, else of a fact."""
    facts = defaultdict(list)
    for number, fact in enumerate(edits):
        facts[fact.subject if merge else number].append(fact)
    return [rows_of(tokenizer, group[0].subject, group, prefixes) for group in facts.values()]


def values_of(model, tokenizer, edits: Sequence, groups: Sequence[Sequence[TextRow]], settings: Settings) -> list[Optimised]:
    """The optimised value of every group; `edits` in the order of the groups name the subjects."""
    names = list(dict.fromkeys(fact.subject for fact in edits)) if settings.merge else [fact.subject for fact in edits]
    common = {name: getattr(settings, name) for name in ("steps", "lr", "weight_decay", "kl", "clamp", "stop_loss")}
    values = []
    for subject, rows in zip(names, groups, strict=True):
        objective = Objective((*rows, text_row(tokenizer, "", subject, " is a")), (*[1 / len(rows)] * len(rows), 0.0), len(rows))
        values.append(optimise(model, objective, settings.layers[-1], **common))
    return values


def keys_and_residuals(model, groups: Sequence[Sequence[TextRow]], z: Tensor, layer: int, last: int, left: int) -> tuple[Tensor, Tensor]:
    """K [d_in, S]: mean keys at `layer`; R [d, S]: what z [S, d] misses at the bare prompts, over the `left` layers to come; float64."""
    read_rows = [read(model, rows, layer, last) for rows in groups]
    K = torch.stack([keys.mean(0) for keys, _ in read_rows], 1).double()
    return K, ((z - torch.stack([hidden[0] for _, hidden in read_rows])) / left).T.double()


@torch.no_grad()
def write(model, groups: Sequence[Sequence[TextRow]], z: Tensor, C: dict[int, Tensor], settings: Settings) -> None:
    """dW = R K^T (lambda C + K K^T)^-1, layer by layer; groups: the rows of each value; z [S, d]."""
    for i, layer in enumerate(settings.layers):
        K, R = keys_and_residuals(model, groups, z, layer, settings.layers[-1], len(settings.layers) - i)
        adjusted = torch.linalg.solve(settings.covariance_weight * C[layer] + K @ K.T, K)
        weight = model.model.layers[layer].mlp.down_proj.weight
        weight += (R @ adjusted.T).to(weight.dtype)


def edit(
    model, tokenizer, edits: Sequence, C: dict[int, Tensor], settings: Settings = Settings(), prefixes: Sequence[str] | None = None
) -> Edited:
    """Write edits into the model in place; C as `covariance` gives it, prefixes as `contexts` does, which is asked where they are None."""
    clock = time.perf_counter
    began = clock()
    groups = groups_of(tokenizer, edits, prefixes or contexts(model, tokenizer, settings), settings.merge)
    prepared = clock()
    values = values_of(model, tokenizer, edits, groups, settings)
    optimised = clock()
    write(model, groups, torch.stack([value.z for value in values]), C, settings)
    return Edited({"prepare": prepared - began, "optimise": optimised - prepared, "write": clock() - optimised}, values)
