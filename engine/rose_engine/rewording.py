"""Rewordings: the prompts of edits in other words, written by the unedited model itself.

A value that was optimised in the words of a prompt is not always found by others that mean the same (docs/value-generalisation.md). The
model reads pairs of sentence beginnings that mean the same, then the prompt with its subject, and every line that it may well write next
to it is read off. Two kinds are told apart. Of those that say the relation before the subject the likeliest is the best; of those that
begin with the subject the nearest: after it the model goes on most as after the prompt, by the Jensen-Shannon divergence of the next token.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from rose_engine.architecture import Decoder
from rose_engine.edits import SLOT, Edit
from rose_engine.forms import BYSTANDERS, without_end
from rose_engine.forward import logits, run_tree, tree_on
from rose_engine.sample import likely_lines

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
LEAST = 0.01  # probability of a line, among those that begin with "The" or those that begin with the subject
TOKENS = 14  # of a rewording, at most
TEMPERATURE = 0.7
OTHER_NAME = BYSTANDERS[0]  # beside the subject in measuring how near two prompts are
FARTHEST = 0.4  # divergence, of at most log 2, beyond which a candidate that begins with the subject means something else


def reworded(
    edits: Sequence[Edit],
    count: int,
    known: Mapping[str, Sequence[str]],
    write: Callable[[str, Sequence[str]], Sequence[Sequence[str]]],
    usable: Callable[[Edit], bool],
    earlier: Iterable[Edit] = (),
    without: Iterable[str] = (),
) -> list[Edit]:
    """The edits, those without rewordings with at most `count` of them, the best first; none where none was found.

    A prompt's are those in `known`, else of write(subject, prompts), which is asked once a subject, with the first that has the prompt.
    Left out is what says the same, in capitals or not, as a text of `without` or as any text of the same subject, here or in `earlier`,
    and what is not usable.
    """
    found, unwanted = {prompt: list(texts) for prompt, texts in known.items()}, {text.casefold() for text in without}
    said: dict[str, set[str]] = {}
    for edit in (*earlier, *edits):
        said.setdefault(edit.subject.strip(), set()).update(text.casefold() for text in edit.texts)
    out = list(edits)
    for subject in dict.fromkeys(edit.subject.strip() for edit in edits):
        bare = [i for i, edit in enumerate(edits) if edit.subject.strip() == subject and not edit.rewordings]
        new = list(dict.fromkeys(prompt for i in bare if not found.get(prompt := edits[i].texts[0])))
        proposed = dict(zip(new, write(subject, new) if new else (), strict=True))
        for i in bare:
            prompt, taken, chosen = edits[i].texts[0], said[subject] | unwanted, []
            for text in found.get(prompt) or proposed[prompt]:
                if len(chosen) < count and text.casefold() not in taken and usable(replace(edits[i], prompt=text)):
                    chosen.append(text)
                    taken.add(text.casefold())
            said[subject].update(text.casefold() for text in chosen)
            found[prompt] = found.get(prompt) or chosen
            out[i] = replace(edits[i], rewordings=chosen)
    return out


@torch.no_grad()
def written(decoder: Decoder, tokenizer: Any, name: str, prompts: Sequence[str]) -> list[list[str]]:
    """All that the model finds for each prompt with a name in it: in turn one that says the relation first and one that begins with the
    name, the best of each first. Nothing where the examples with this name are longer than the model takes."""
    head = "".join(f"{given} = {other}\n".replace(SLOT, name) for given, other in EXAMPLES)
    leads = (" The", f" {name}")
    openings = [f"{prompt.replace(SLOT, name)} ={lead}" for prompt in prompts for lead in leads]
    longest = max(len(tokenizer(opening)["input_ids"]) for opening in openings)
    if len(tokenizer(head)["input_ids"]) + longest + TOKENS > decoder.max_length:
        return [[] for _ in prompts]
    lines = iter(likely_lines(decoder, tokenizer, head, openings, TOKENS, LEAST, TEMPERATURE))
    found = []
    for prompt in prompts:
        whole = {(lead + line).strip(): chance for lead in leads for line, chance in next(lines).items()}
        found.append(
            _best_first(decoder, tokenizer, name, prompt, {line.replace(name, SLOT): p for line, p in whole.items() if SLOT not in line})
        )
    return found


def _best_first(decoder: Decoder, tokenizer: Any, name: str, prompt: str, chance: Mapping[str, float]) -> list[str]:
    candidates = candidates_of(prompt, chance)
    relation_first = sorted((text for text in candidates if not text.startswith(SLOT)), key=lambda text: -chance[text])
    subject_first = [text for text in candidates if text.startswith(SLOT)]
    far = divergence(decoder, tokenizer, prompt, subject_first, [name, OTHER_NAME]).tolist() if subject_first else []
    near = [text for distance, text in sorted(zip(far, subject_first, strict=True)) if distance <= FARTHEST]
    return [text for pair in zip_longest(relation_first, near) for text in pair if text]


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
    tree = tree_on([without_end(tokenizer, tokenizer(text)["input_ids"]) for text in texts], decoder.embedding.weight.device)
    hidden = run_tree(decoder, tree, range(len(decoder.layers)))
    ends = torch.tensor([path[-1] for path in tree.path], device=hidden.device)
    said = logits(decoder, hidden[ends]).log_softmax(-1).view(len(others) + 1, len(names), -1)
    return torch.stack([_jensen_shannon(said[0], other).mean() for other in said[1:]])


def _jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Of log-probabilities [..., V]."""
    middle = torch.logaddexp(p, q) - math.log(2)
    return ((p.exp() * (p - middle)).sum(-1) + (q.exp() * (q - middle)).sum(-1)) / 2
