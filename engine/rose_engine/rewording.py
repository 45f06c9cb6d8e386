"""Rewordings: the prompts of edits in other words, which the unedited model writes itself, or in fewer.

A value that was optimised in the words of a prompt is not always found by others that mean the same (docs/value-generalisation.md). The
model reads pairs of sentence beginnings that mean the same, then the prompt with its subject, and every line that it may well write next
to it is read off. Two kinds are told apart: such as say the relation before the subject, and such as begin with the subject; after the
second kind the model must go on much as after the prompt, by the Jensen-Shannon divergence of the next token. The best of a kind is what
the model writes beside the prompt and beside which it would write the prompt: the product of both probabilities, of which the second is
low for what says less. Before the best of the second kind stands the prompt without the words that tell the kind of its target, for other
wordings seldom tell it.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from rose_engine.architecture import Decoder
from rose_engine.bystanders import NAMES
from rose_engine.edits import SLOT, Edit
from rose_engine.forward import logits, run_tree, tree_on
from rose_engine.sample import beginning, chances_of_lines, likely_lines

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
TOLD_KIND = re.compile(r" the \w+(?: of)?$")  # as in "{} died in the city of"
LEAST = 0.01  # probability of a line, among those that begin with "The" or those that begin with the subject
READ_BACK = 8  # candidates of each kind that are read back
TOKENS = 14  # of a rewording, at most
TEMPERATURE = 0.7  # below 1, so that fewer lines have to be read before the likely ones are known
AT_ONCE = 8  # prompts of a subject that are written for together
OTHER_NAME = NAMES[0]  # beside the subject in measuring how near two prompts are
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

    A prompt's are those in `known`, else of write(subject, prompts), called once for each subject with those of its prompts for which
    no subject before it was given any.
    Left out is what says the same, in capitals or not, as a text of `without` or as any text of the same subject, here or in `earlier`,
    and what is not usable.
    """
    found, unwanted = {prompt: list(texts) for prompt, texts in known.items()}, {text.casefold() for text in without}
    said: dict[str, set[str]] = {}
    for edit in (*earlier, *edits):
        said.setdefault(edit.subject.strip(), set()).update(text.casefold() for text in edit.texts)
    out, of_subject = list(edits), defaultdict(list)
    for i, edit in enumerate(edits):
        if not edit.rewordings:
            of_subject[edit.subject.strip()].append(i)
    for subject, bare in of_subject.items():
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
    """All that is found for each prompt with a name in it: in turn one that says the relation first and one that begins with the name,
    the best of each first, of the latter the prompt shortened before any. Nothing where the examples with this name, and the prompt, are
    longer than the model takes."""
    head = "".join(f"{_named(given, name)} = {_named(other, name)}\n" for given, other in EXAMPLES)
    room = decoder.max_length - TOKENS - len(tokenizer(head)["input_ids"])
    found: dict[str, list[str]] = {prompt: [] for prompt in prompts}
    short = [prompt for prompt in found if len(tokenizer(f"{_named(prompt, name)} = {name}")["input_ids"]) <= room]
    for i in range(0, len(short), AT_ONCE):
        found |= _best_first(decoder, tokenizer, head, name, short[i : i + AT_ONCE])
    return [found[prompt] for prompt in prompts]


def _best_first(decoder: Decoder, tokenizer: Any, head: str, name: str, prompts: Sequence[str]) -> dict[str, list[str]]:
    """Of each prompt what is likely beside it after the head, by the probability there and back."""
    leads = (" The", f" {name}")
    openings = [f"{_named(prompt, name)} ={lead}" for prompt in prompts for lead in leads]
    lines = likely_lines(decoder, tokenizer, head, openings, TOKENS, LEAST, TEMPERATURE)
    there = {prompt: _in_words(name, leads, lines[2 * i : 2 * i + 2]) for i, prompt in enumerate(prompts)}
    asked = _worth_reading(decoder, tokenizer, name, there)
    back = chances_of_lines(decoder, tokenizer, head, [(f"{_named(text, name)} =", f" {_named(prompt, name)}") for prompt, text in asked])
    both: dict[str, list[tuple[float, str]]] = {prompt: [] for prompt in prompts}
    for (prompt, text), again in zip(asked, back, strict=True):
        both[prompt].append((math.log(there[prompt][text]) + again, text))
    return {prompt: _in_turn([*shortened(prompt), *(text for _, text in sorted(some, reverse=True))]) for prompt, some in both.items()}


def shortened(prompt: str) -> list[str]:
    """A prompt that begins with the subject, without the words at its end that tell the kind of its target: "{} died in the city of"
    becomes "{} died in". Nothing where it has none, or no word with a meaning would be left."""
    short = TOLD_KIND.sub("", prompt)
    says = set(re.findall(r"\w+", short.lower())) - FUNCTION_WORDS
    return [short] if prompt.startswith(SLOT) and short != prompt and says else []


def _in_turn(texts: Sequence[str]) -> list[str]:
    """One that says the relation first, one that begins with the subject, and so on, each kind in its order."""
    kinds = ([text for text in texts if text.startswith(SLOT) == begins] for begins in (False, True))
    return [text for pair in zip_longest(*kinds) for text in pair if text]


def _in_words(name: str, leads: Sequence[str], lines: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Lines with their leads and with {} in the name's place, and their probabilities."""
    whole = {(lead + line).strip(): chance for lead, some in zip(leads, lines, strict=True) for line, chance in some.items()}
    return {line.replace(name, SLOT): chance for line, chance in whole.items() if SLOT not in line}


def _worth_reading(decoder: Decoder, tokenizer: Any, name: str, there: Mapping[str, Mapping[str, float]]) -> list[tuple[str, str]]:
    """Of each prompt, with it, the likeliest candidates of each kind, those that begin with the subject where the model goes on as after
    the prompt."""
    every = {prompt: sorted(candidates_of(prompt, chances), key=lambda text: -chances[text]) for prompt, chances in there.items()}
    subject_first = {prompt: [text for text in candidates if text.startswith(SLOT)] for prompt, candidates in every.items()}
    far = divergences(decoder, tokenizer, subject_first, [name, OTHER_NAME])
    asked = []
    for prompt, candidates in every.items():
        near = [text for text, distance in zip(subject_first[prompt], far[prompt].tolist(), strict=True) if distance <= FARTHEST]
        others = [text for text in candidates if not text.startswith(SLOT)]
        asked += [(prompt, text) for text in (*others[:READ_BACK], *near[:READ_BACK])]
    return asked


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


def _named(text: str, name: str) -> str:
    """The text with a name in the subject's place."""
    return text.replace(SLOT, name)


def _words(text: str) -> set[str]:
    return set(text.replace(SLOT, " ").lower().split())


def divergences(decoder: Decoder, tokenizer: Any, asked: Mapping[str, Sequence[str]], names: Sequence[str]) -> dict[str, Tensor]:
    """Of each prompt the Jensen-Shannon divergences between what the model says next after it and after each of its other texts, in nats,
    mean over the names in the subject's place."""
    texts = {prompt: [_named(text, name) for text in (prompt, *others) for name in names] for prompt, others in asked.items() if others}
    far = {prompt: torch.zeros(0) for prompt in asked}
    if not texts:
        return far
    tree = tree_on([beginning(tokenizer, text) for some in texts.values() for text in some], decoder.embedding.weight.device)
    hidden = run_tree(decoder, tree, range(len(decoder.layers)))
    ends = torch.tensor([path[-1] for path in tree.path], device=hidden.device)
    for prompt, nodes in zip(texts, ends.split([len(some) for some in texts.values()]), strict=True):
        said = logits(decoder, hidden[nodes]).log_softmax(-1).unflatten(0, (-1, len(names)))
        found = torch.stack([_jensen_shannon(said[0], other).mean() for other in said[1:]])
        far[prompt] = found if decoder.sharding is None else decoder.sharding.same(found)
    return far


def _jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Of log-probabilities [..., V]."""
    middle = torch.logaddexp(p, q) - math.log(2)
    return ((p.exp() * (p - middle)).sum(-1) + (q.exp() * (q - middle)).sum(-1)) / 2
