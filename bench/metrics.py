"""Metrics of an edited model (method.md section 4), by plain forward passes of the model.

A probe is a text and the answer that is wanted after it. Teacher-forced success is the share of the answer's tokens that are the
argmax; the prediction itself, the argmax tokens, is compared with the unedited model's for locality.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rose_engine.forms import chat_parts
from transformers import GenerationConfig

# Tokens of the longest batch that is evaluated at a time; it bounds the logits in memory.
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Probe:
    """A text, the answer wanted after it, and whether the text was rendered by a chat template."""

    text: str
    answer: str
    chat: bool = False


def plain_probe(prompt: str, answer: str) -> Probe:
    """A statement and its continuation."""
    prompt = prompt.rstrip()
    return Probe(prompt, f" {answer.strip()}")


def chat_probe(tokenizer, user: str, answer: str, system: str | None = None, earlier: Sequence[dict[str, str]] = ()) -> Probe:
    """A user's message, after a system message and earlier turns if there are any, in the model's chat template (or as plain lines where
    it has none)."""
    if not tokenizer.chat_template:
        lines = [*([] if system is None else [system]), *(message["content"] for message in earlier), user, "Answer:"]
        return Probe("\n".join(lines), f" {answer.strip()}")
    lead, tail = chat_parts(tokenizer, system, earlier)  # templates without a system role, and those that leave room for thoughts
    return Probe(lead + user + tail, answer.strip(), chat=True)


@dataclass(frozen=True)
class Outcome:
    """success: share of the answer's tokens that are the argmax. said: the argmax tokens in the answer's place."""

    success: float
    said: tuple[int, ...]


def _tokens(tokenizer, probe: Probe) -> tuple[list[int], list[int]]:
    context = tokenizer(probe.text, add_special_tokens=not probe.chat)["input_ids"]
    answer = tokenizer(probe.answer, add_special_tokens=False)["input_ids"]
    return context, answer


@torch.no_grad()
def teacher_forced(model, tokenizer, probes: Sequence[Probe]) -> list[Outcome]:
    """Read every probe with its answer given."""
    coded = [_tokens(tokenizer, probe) for probe in probes]
    outcomes: list[Outcome | None] = [None] * len(probes)
    order = sorted(range(len(probes)), key=lambda i: -sum(map(len, coded[i])))
    while order:
        width = sum(map(len, coded[order[0]]))
        batch, order = order[: max(1, BATCH_TOKENS // width)], order[max(1, BATCH_TOKENS // width) :]
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            tokens = coded[i][0] + coded[i][1]
            ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
        ids, mask = ids.to(model.device), mask.to(model.device)
        hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        head = model.get_output_embeddings()
        for row, i in enumerate(batch):
            context, answer = coded[i]
            place = slice(len(context) - 1, len(context) + len(answer) - 1)
            said = head(hidden[row, place]).argmax(-1).tolist()
            outcomes[i] = Outcome(sum(s == a for s, a in zip(said, answer, strict=True)) / len(answer), tuple(said))
    return outcomes


@torch.no_grad()
def generate(model, tokenizer, texts: Sequence[str], max_new_tokens: int = 24, chat: bool = True) -> list[str]:
    """Greedy continuations of texts, special tokens left out."""
    coded = [tokenizer(text, add_special_tokens=not chat)["input_ids"] for text in texts]
    width = max(map(len, coded))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (width - len(c)) + c for c in coded], device=model.device)
    mask = torch.tensor([[0] * (width - len(c)) + [1] * len(c) for c in coded], device=model.device)
    # A checkpoint's own settings (a repetition penalty) would make the answer another one than the argmax.
    end = model.generation_config.eos_token_id
    greedy = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad, eos_token_id=end)
    said = model.generate(input_ids=ids, attention_mask=mask, generation_config=greedy)
    return tokenizer.batch_decode(said[:, width:], skip_special_tokens=True)


def normalise(text: str) -> str:
    """Lower case without punctuation, articles and doubled spaces."""
    text = "".join(" " if c in string.punctuation else c for c in text.lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def contains(text: str, answer: str) -> bool:
    """Whether the normalised answer stands in the normalised text, as whole words."""
    return f" {normalise(answer)} " in f" {normalise(text)} "


def token_f1(said: str, wanted: str) -> float:
    """F1 of the normalised words of an answer and of the reference, 0 to 1 (the paper's Appendix D.2)."""
    a, b = normalise(said).split(), normalise(wanted).split()
    common = (Counter(a) & Counter(b)).total()
    return 2 * common / (len(a) + len(b)) if common else 0.0
