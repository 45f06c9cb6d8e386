"""Rewordings: the prompts of edits in other words, written by the unedited model itself.

A value that was optimised in the words of a prompt is not always found by others that mean the same (docs/value-generalisation.md). The
model reads pairs of sentence beginnings that mean the same, then the prompt with its subject, and writes what stands beside it, many
times. Of those that say the relation first it is the one written most often that means the same most surely; of those that begin with
the subject the one after which the model goes on most nearly as after the prompt: by the Jensen-Shannon divergence of the next token.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
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
# Words that alone say nothing of a relation.
FUNCTION_WORDS = {"a", "an", "the", "is", "are", "was", "were", "has", "had", "of", "in", "by", "on", "at", "to", "that", "which", "who"}
NAMED = re.compile(rf"(?<!\w){re.escape(SLOT)}(?!\w)")
DRAWS = 24  # such as begin with "The", and as many that begin with the subject
TOKENS = 14  # of a rewording, at most
TEMPERATURE = 0.7
NAME = BYSTANDERS[0]  # beside the subject in measuring how near two prompts are
FARTHEST = 0.4  # divergence, of at most log 2, beyond which a candidate that begins with the subject means something else


@torch.no_grad()
def reword(
    decoder: Decoder,
    tokenizer: Any,
    edits: Sequence[Edit],
    count: int,
    seed: int = 0,
    known: Mapping[str, Sequence[str]] | None = None,
    without: Iterable[str] = (),
) -> list[Edit]:
    """The edits, those without rewordings with at most `count` of them, the best first; none where none was found.

    A prompt is reworded once, with the subject of the first edit that has it, or not at all where `known` has its rewordings. Two prompts
    are given no text in common, and none is given one of `without`, in capitals or not.
    """
    found = {prompt: tuple(texts) for prompt, texts in (known or {}).items()}
    said = {text for edit in edits for text in edit.texts}
    taken = {text.casefold() for texts in (said, without, *found.values()) for text in texts}
    for edit in edits:
        prompt = edit.texts[0]
        if not edit.rewordings and prompt not in found:
            found[prompt] = tuple(_found(decoder, tokenizer, edit, seed, taken)[:count])
            taken.update(text.casefold() for text in found[prompt])
    return [
        edit if edit.rewordings else replace(edit, rewordings=tuple(text for text in found[edit.texts[0]] if text not in said))
        for edit in edits
    ]


def _found(decoder: Decoder, tokenizer: Any, edit: Edit, seed: int, taken: Collection[str]) -> list[str]:
    """All rewordings that were found for an edit's prompt, in turn one that says the relation first and one that begins with the subject,
    the best of each first."""
    name, prompt = edit.subject.strip(), edit.texts[0]
    head = "".join(f"{given} = {other}\n".replace(SLOT, name) for given, other in EXAMPLES)
    begun = [lead for lead in (" The", f" {name}") for _ in range(DRAWS)]
    openings = [f"{prompt.replace(SLOT, name)} ={lead}" for lead in begun]
    lines = sample_lines(decoder, tokenizer, head, openings, TOKENS, seed, TEMPERATURE)
    said = [(lead + line).strip() for lead, line in zip(begun, lines, strict=True) if line is not None]
    written = Counter(line[0].upper() + line[1:] for line in (line.replace(name, SLOT) for line in said if SLOT not in line) if line)
    candidates = [text for text in candidates_of(prompt, written) if text.casefold() not in taken]
    turned = [text for text, times in written.most_common() if times > 1 and text in candidates and not text.startswith(SLOT)]
    plain = [text for text in candidates if text.startswith(SLOT)]
    far = divergence(decoder, tokenizer, prompt, plain, [name, NAME]).tolist() if plain else []
    near = [text for distance, text in sorted(zip(far, plain, strict=True)) if distance <= FARTHEST]
    return [text for pair in zip_longest(turned, near) for text in pair if text]


def candidates_of(prompt: str, lines: Iterable[str]) -> list[str]:
    """Of what was written what may be a prompt: it names the subject once, as a word of its own, brings a word that the prompt has not and
    leaves out one that it has, has more than function words and no character that was cut in two, and is none of the examples."""
    own, examples = _words(prompt), {text for pair in EXAMPLES for text in pair}
    said = dict.fromkeys(line for line in lines if len(NAMED.findall(line)) == line.count(SLOT) == 1 and "\ufffd" not in line)
    return [
        line
        for line in said
        if line not in examples and not own <= (words := _words(line)) and not words <= own and not words <= FUNCTION_WORDS
    ]


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
