"""Text that the model says by itself: what its second moments may be taken over, the prefixes of MEMIT's prompts, lines after a pattern.

Nothing is downloaded and the same seed gives the same text on the same machine and dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

# What sampled texts begin with; common first words, so that what follows is of many kinds.
OPENINGS = ("The", "In", "A", "It", "He", "She", "This", "When", "One", "During", "There", "We", "If", "On", "At", "For", "What", "\n")
# Meng et al. 2023: MEMIT's prefixes begin with these words.
PREFIX_OPENINGS = ("The", "Therefore", "Because", "I", "You")
# Tokens of a sampled text, of a prefix, and texts that are sampled at one time.
TEXT_TOKENS = 192
PREFIX_TOKENS = 10
TEXTS_AT_ONCE = 90


@torch.no_grad()
def _drawn(
    model: PreTrainedModel, opened: list[list[int]], tokens: int, seed: int, pad: int, head: Sequence[int] = (), **options: Any
) -> Tensor:
    """What is drawn [len(opened), at most `tokens`] after each opening, before which `head` stands, run once for all.

    options: GenerationConfig's, with eos_token_id; what follows an end is padding.
    """
    width = max(map(len, opened))
    on = lambda rows: torch.tensor(rows, device=model.device)  # noqa: E731
    ids = on([[*head, *[pad] * (width - len(o)), *o] for o in opened])
    given = {"attention_mask": on([[1] * len(head) + [0] * (width - len(o)) + [1] * len(o) for o in opened])}
    if head:
        given["past_key_values"] = model(input_ids=on([list(head)]), use_cache=True).past_key_values
        given["past_key_values"].batch_repeat_interleave(len(opened))
    # A configuration of its own: what a checkpoint brings along (a repetition penalty, a temperature) is not the model's distribution.
    settings = GenerationConfig(max_new_tokens=tokens, do_sample=True, pad_token_id=pad, **options)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        return model.generate(input_ids=ids, generation_config=settings, **given)[:, ids.shape[1] :]


def _sampled(model: PreTrainedModel, tokenizer: Any, openings: list[str], tokens: int, seed: int, **options: Any) -> list[list[int]]:
    """A continuation of each opening, as tokens with it, cut at the end of the text."""
    opened = [tokenizer(opening)["input_ids"] for opening in openings]
    end = tokenizer.eos_token_id
    said = _drawn(model, opened, tokens, seed, end if end is not None else tokenizer.pad_token_id, eos_token_id=end, **options)
    texts = [o + row for o, row in zip(opened, said.tolist(), strict=True)]
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


def sample_lines(
    model: PreTrainedModel, tokenizer: Any, head: str, openings: Sequence[str], tokens: int, seed: int = 0
) -> list[str | None]:
    """A continuation of each opening up to the end of its line, without the opening and the line's end; None where the line did not end
    within `tokens` tokens. The text `head` stands before every opening."""
    opened = [tokenizer(opening, add_special_tokens=False)["input_ids"] for opening in openings]
    ends = {tokenizer("\n", add_special_tokens=False)["input_ids"][-1], tokenizer.eos_token_id} - {None}
    options = {"eos_token_id": [*ends], "top_k": 0, "top_p": 0.95}
    said = _drawn(model, opened, tokens, seed, min(ends), tokenizer(head)["input_ids"], **options)
    lines = [tokenizer.decode(row, skip_special_tokens=True) for row in said]
    return [line.split("\n")[0] if "\n" in line else None for line in lines]
