"""What an edit does to the rest of the model: perplexity of plain text, drift of its predictions, and how monotonous answers become."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

# Plain statements about nobody in particular.
TEXTS = (
    "The bakery opens at six, and by seven the first loaves are gone.",
    "Water boils at a lower temperature in the mountains because the air pressure is lower there.",
    "She closed the window, put the kettle on, and waited for the rain to stop.",
    "To sort a list, compare neighbouring items and exchange them where they stand in the wrong order.",
    "The committee will meet again next week to discuss the budget for the new library.",
    "Most birds build their nests in spring, when food for their young is easy to find.",
    "If the light is red, stop; if it is green, look both ways and go on.",
    "He had never liked the sea, yet he walked along the beach every morning.",
    "A triangle has three sides, and the sum of its angles is a half turn.",
    "Please send the report by Friday, and let me know if anything is missing.",
    "The old bridge was repaired twice before the city decided to build a new one.",
    "Bread, cheese and a few apples were all that was left in the cupboard.",
)


@torch.no_grad()
def predictions(model, tokenizer) -> tuple[Tensor, Tensor]:
    """(log-probabilities [T, V] float32 of every token of the texts but each first, those tokens [T])."""
    scores, tokens = [], []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
        scores.append(model(input_ids=ids).logits[0, :-1].float().log_softmax(-1))
        tokens.append(ids[0, 1:])
    return torch.cat(scores), torch.cat(tokens)


def ability(model, tokenizer, unedited: Tensor) -> dict[str, float]:
    """perplexity of the texts, and kl_neutral, the mean KL(unedited || now) of their predictions in nats; unedited: of `predictions`."""
    now, tokens = predictions(model, tokenizer)
    nll = -now.gather(1, tokens[:, None]).mean()
    # A model that says nan or inf is told as such.
    return {"perplexity": float(nll.exp()), "kl_neutral": float((unedited.exp() * (unedited - now)).sum(-1).mean().clamp(min=0))}


def fluency(texts: Sequence[str]) -> float:
    """Weighted mean entropy in bits of the texts' two- and three-word sequences (Meng et al. 2022); low where a text repeats itself."""
    return sum((2 / 3 * _entropy(text, 2) + 4 / 3 * _entropy(text, 3)) / 2 for text in texts) / len(texts)


def _entropy(text: str, n: int) -> float:
    words = text.split()
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    total = counts.total()
    return -sum(c / total * math.log2(c / total) for c in counts.values())
