"""Text that the model says by itself: what its second moments may be taken over, the prefixes of MEMIT's prompts, lines after a pattern.

Nothing is downloaded. What is sampled is the same with the same seed, on the same machine and dtype; lines are not sampled, all that are
likely are read off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import takewhile
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from rose_engine.architecture import Decoder
from rose_engine.attention import GrowingAttention, TreeAttention
from rose_engine.forms import without_end
from rose_engine.forward import logits, run_layers, run_tree, target_nll_of, tree_on

# What sampled texts begin with; common first words, so that what follows is of many kinds.
OPENINGS = ("The", "In", "A", "It", "He", "She", "This", "When", "One", "During", "There", "We", "If", "On", "At", "For", "What", "\n")
# Meng et al. 2023: MEMIT's prefixes begin with these words.
PREFIX_OPENINGS = ("The", "Therefore", "Because", "I", "You")
# Tokens of a sampled text, of a prefix, and texts that are sampled at one time.
TEXT_TOKENS = 192
PREFIX_TOKENS = 10
TEXTS_AT_ONCE = 90
# Rows of the vocabulary's width that exist at one time where lines are read.
ROWS = 256


@torch.no_grad()
def _sampled(model: PreTrainedModel, tokenizer: Any, openings: list[str], tokens: int, seed: int, **options: Any) -> list[list[int]]:
    """A continuation of each opening, as tokens with it, cut at the end of the text."""
    opened = [tokenizer(opening)["input_ids"] for opening in openings]
    width = max(map(len, opened))
    end = tokenizer.eos_token_id
    pad = end if end is not None else tokenizer.pad_token_id
    on = lambda rows: torch.tensor(rows, device=model.device)  # noqa: E731
    ids, mask = on([[pad] * (width - len(o)) + o for o in opened]), on([[0] * (width - len(o)) + [1] * len(o) for o in opened])
    # A configuration of its own: what a checkpoint brings along (a repetition penalty, a temperature) is not the model's distribution.
    settings = GenerationConfig(max_new_tokens=tokens, do_sample=True, pad_token_id=pad, eos_token_id=end, **options)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        said = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    texts = [o + row for o, row in zip(opened, said[:, width:].tolist(), strict=True)]
    return [text[: text.index(end, len(o))] if end in text[len(o) :] else text for o, text in zip(opened, texts, strict=True)]


def sample_texts(model: PreTrainedModel, tokenizer: Any, tokens: int, seed: int = 0) -> list[list[int]]:
    """At least `tokens` tokens of text, each text at most `TEXT_TOKENS` long, drawn from the model's own distribution."""
    texts: list[list[int]] = []
    while (missing := tokens - sum(map(len, texts))) > 0:
        count = min(TEXTS_AT_ONCE, -(-missing // (TEXT_TOKENS // 2)))
        openings = [OPENINGS[i % len(OPENINGS)] for i in range(len(texts), len(texts) + count)]
        # The seed changes with every round, else each round would say the same again.
        texts += _sampled(model, tokenizer, openings, TEXT_TOKENS, seed + len(texts), top_k=0, top_p=1.0)
    return texts


def sample_prefixes(model: PreTrainedModel, tokenizer: Any, seed: int = 0) -> tuple[str, ...]:
    """A sentence of about ten tokens for each of MEMIT's openings, ended by a full stop and a space."""
    said = _sampled(model, tokenizer, list(PREFIX_OPENINGS), PREFIX_TOKENS, seed, top_k=5)
    return tuple(f"{tokenizer.decode(text, skip_special_tokens=True).strip()}. " for text in said)


@torch.no_grad()
def likely_lines(
    decoder: Decoder, tokenizer: Any, head: str, openings: Sequence[str], tokens: int, least: float, temperature: float = 1.0
) -> list[dict[str, float]]:
    """For each opening every continuation up to the end of the line that has a probability of at least `least`, likeliest first.

    The text `head` stands before every opening. Lines are told without their opening and end; one that has not ended within `tokens`
    tokens, or ends with the text, is left out. All openings go on together, a token at a time, in at most 1 / least beginnings of each.
    """
    device, sharding = decoder.embedding.weight.device, decoder.sharding
    first, opened = beginning(tokenizer, head), _plain(tokenizer, openings)
    tree = tree_on([first + some for some in opened], device)
    layers, nodes = range(len(decoder.layers)), torch.arange(len(tree.token), device=device)
    before = TreeAttention(tree, nodes, keep=layers)
    hidden = run_layers(decoder, decoder.embed(tree.token, tree.position), tree.position, layers, before)
    ends_line = cache(lambda token: token == tokenizer.eos_token_id or "\n" in tokenizer.decode([token]))

    last = torch.tensor([path[-1] for path in tree.path], device=device)
    scores, position, so_far = logits(decoder, hidden[last]), tree.position[last], torch.zeros(len(opened), 1, device=device)
    seen, growing = (nodes <= last[:, None]) & (last[:, None] < tree.end), GrowingAttention(before)
    begun: list[tuple[int, list[int]]] = [(i, []) for i in range(len(opened))]
    lines: list[dict[str, float]] = [{} for _ in opened]
    for step in range(1, tokens + 1):
        scores = scores / temperature
        chance, likely = scores.topk(min(int(1 / least), scores.shape[-1]))
        chance = so_far + chance - scores.logsumexp(-1, keepdim=True)
        if sharding is not None:  # else ranks whose sums differ in a bit would go on with different lines
            chance, likely = sharding.same(chance.contiguous()), sharding.same(likely.contiguous())
        parent, place = (chance >= math.log(least)).nonzero(as_tuple=True)
        token, so_far = likely[parent, place], chance[parent, place]
        going, next_begun = [], []
        for row, t, logarithm in zip(parent.tolist(), token.tolist(), so_far.tolist(), strict=True):
            opening, said = begun[row][0], [*begun[row][1], t]
            going.append(not ends_line(t))
            if going[-1]:
                next_begun.append((opening, said))
            elif (line := _rest_of_line(tokenizer, opened[opening] + said, opened[opening])) is not None:
                lines[opening][line] = lines[opening].get(line, 0.0) + math.exp(logarithm)
        if step == tokens or not next_begun:
            break
        stay, begun = torch.tensor(going, device=device), next_begun
        parent, token, so_far = parent[stay], token[stay], so_far[stay, None]
        position = position[parent] + 1
        growing.seen = seen = torch.cat([seen[parent], torch.eye(len(token), dtype=torch.bool, device=device)], dim=1)
        scores = logits(decoder, run_layers(decoder, decoder.embed(token, position), position, layers, growing))
    return [dict(sorted(some.items(), key=lambda item: -item[1])) for some in lines]


@torch.no_grad()
def chances_of_lines(decoder: Decoder, tokenizer: Any, head: str, lines: Sequence[tuple[str, str]]) -> list[float]:
    """The logarithm of each line's probability, its end included, after the text `head` and its opening; a line is (opening, rest).
    -inf where that is longer than the model takes."""
    first, opened = beginning(tokenizer, head), _plain(tokenizer, [opening for opening, _ in lines])
    whole = _plain(tokenizer, [f"{opening}{line}\n" for opening, line in lines])
    short = [i for i, some in enumerate(whole) if len(first) + len(some) <= decoder.max_length]
    found = [-math.inf] * len(lines)
    if not short:
        return found
    device = decoder.embedding.weight.device
    tree = tree_on([first + whole[i] for i in short], device)
    hidden = run_tree(decoder, tree, range(len(decoder.layers)))
    # The opening's tokens may go on differently with the line after it.
    paths = [path[len(first) + _shared(opened[i], whole[i]) - 1 :] for i, path in zip(short, tree.path, strict=True)]
    before, said = (torch.tensor([node for path in paths for node in path[part]], device=device) for part in (slice(-1), slice(1, None)))
    nll = [target_nll_of(decoder, hidden[some], tree.token[of]) for some, of in zip(before.split(ROWS), said.split(ROWS), strict=True)]
    nll = torch.cat(nll) if decoder.sharding is None else decoder.sharding.same(torch.cat(nll))
    for i, some in zip(short, nll.split([len(path) - 1 for path in paths]), strict=True):
        found[i] = -float(some.sum())
    return found


def beginning(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text that goes on."""
    return without_end(tokenizer, tokenizer(text)["input_ids"])


def _plain(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of texts that go on after another."""
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _rest_of_line(tokenizer: Any, tokens: list[int], opened: list[int]) -> str | None:
    """What follows the opening up to the end of the line. It is decoded with the opening: alone it loses its first space in some models."""
    text, opening = (tokenizer.decode(some, skip_special_tokens=True) for some in (tokens, opened))
    rest, end, _ = text.removeprefix(opening).partition("\n")
    return rest if end and text.startswith(opening) else None
