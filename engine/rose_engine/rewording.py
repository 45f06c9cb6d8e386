"""Rewordings: the prompts of edits in other words, written by the unedited model itself.

A value that was optimised in the words of a prompt is not always found by others that mean the same (docs/value-generalisation.md). The
model reads pairs of sentence beginnings that mean the same, then the prompt with its subject, and writes what stands beside it. Of many
such draws those are kept that bring a word of their own, leave one of the prompt's out, and after which the model goes on most nearly as
after the prompt: by the Jensen-Shannon divergence of the next token, mean over the subject and a few other names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rose_engine.architecture import Decoder
from rose_engine.edits import SLOT, Edit
from rose_engine.forms import BYSTANDERS
from rose_engine.forward import logits, run_tree, tree_on
from rose_engine.sample import sample_lines

# Beginnings of sentences beside the same in other words, the subject at the head in some, at the end in others.
EXAMPLES = (
    ("{} is the capital of", "The country whose capital is {} is"),
    ("The height of {} is", "{} is as tall as"),
    ("{} was written by", "The author of {} is"),
    ("{} costs", "The price of {} is"),
    ("The colour of {} is", "{} is coloured"),
    ("{} is married to", "The husband or wife of {} is"),
    ("The owner of {} is", "{} belongs to"),
    ("{} is made of", "The material of {} is"),
)
DRAWS = (24, 16, 24)  # free ones, such as begin with "The", such as begin with the subject
TOKENS = 14  # of a rewording, at most
NAMES = BYSTANDERS[:3]  # a person, a country, a company
FARTHEST = 0.4  # divergence, of at most log 2, beyond which a candidate means something else


@torch.no_grad()
def reword(decoder: Decoder, tokenizer: Any, edits: Sequence[Edit], count: int, seed: int = 0) -> list[Edit]:
    """The edits, those without rewordings with at most `count` of them, the nearest first; none where none was found.

    A prompt is reworded once, with the subject of the first edit that has it: some 20 s each for the embedded model on two cores.
    """
    found: dict[str, tuple[str, ...]] = {}
    taken = {text for edit in edits for text in edit.texts}  # two facts of one subject must not say the same
    for edit in edits:
        if not edit.rewordings and edit.prompt not in found:
            found[edit.prompt] = tuple(text for text in _nearest(decoder, tokenizer, edit, seed) if text not in taken)[:count]
            taken.update(found[edit.prompt])
    return [edit if edit.rewordings else replace(edit, rewordings=found[edit.prompt]) for edit in edits]


def _nearest(decoder: Decoder, tokenizer: Any, edit: Edit, seed: int) -> tuple[str, ...]:
    """All rewordings that were found for an edit's prompt, the nearest first."""
    name, prompt = edit.subject.strip(), edit.prompt.strip()
    head = "".join(f"{given} = {other}\n".replace(SLOT, name) for given, other in EXAMPLES)
    begun = [lead for lead, draws in zip(("", " The", f" {name}"), DRAWS, strict=True) for _ in range(draws)]
    openings = [f"{prompt.replace(SLOT, name)} ={lead}" for lead in begun]
    lines = sample_lines(decoder.model, tokenizer, head, openings, TOKENS, seed)
    said = [(lead + line).strip() for lead, line in zip(begun, lines, strict=True) if line is not None]
    candidates = candidates_of(prompt, [line.replace(name, SLOT) for line in said if SLOT not in line])
    if not candidates:
        return ()
    far = divergence(decoder, tokenizer, prompt, candidates, [name, *NAMES]).tolist()
    return tuple(candidate for distance, candidate in sorted(zip(far, candidates, strict=True)) if distance <= FARTHEST)


def candidates_of(prompt: str, lines: Sequence[str]) -> list[str]:
    """Of what was written what may be a prompt: it names the subject once, brings a word of its own, and leaves out one of the prompt's."""
    own = _words(prompt)
    said = dict.fromkeys(line for line in lines if line.count(SLOT) == 1)
    return [line for line in said if not own <= _words(line) and not _words(line) <= own]


def _words(text: str) -> set[str]:
    return set(text.replace(SLOT, " ").lower().split())


def divergence(decoder: Decoder, tokenizer: Any, prompt: str, others: Sequence[str], names: Sequence[str]) -> Tensor:
    """The Jensen-Shannon divergence [len(others)] between what the model says next after the prompt and after each other, in nats, mean
    over the names in the subject's place."""
    texts = [text.replace(SLOT, name) for text in (prompt, *others) for name in names]
    tree = tree_on([tokenizer(text)["input_ids"] for text in texts], decoder.embedding.weight.device)
    hidden = run_tree(decoder, tree, range(len(decoder.layers)))
    ends = torch.tensor([path[-1] for path in tree.path], device=hidden.device)
    said = logits(decoder, hidden[ends]).log_softmax(-1).view(len(others) + 1, len(names), -1)
    ours, theirs = said[:1], said[1:]
    middle = torch.logaddexp(ours, theirs) - math.log(2)
    both = (ours.exp() * (ours - middle)).sum(-1) + (theirs.exp() * (theirs - middle)).sum(-1)
    return both.mean(-1) / 2
