"""Verification: does the model say the new facts when asked, and does it still say the rest.

Facts are read with their own prompt and in an instructed form that no edit uses. One pass over a prefix tree of all texts reads
everything; nothing is generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from rose_engine.architecture import Decoder
from rose_engine.edits import Edit
from rose_engine.forms import STATEMENT, Form, Row, row_of
from rose_engine.forward import logits, run_tree, tree_on
from rose_engine.packing import inputs

# Not among the forms of `forms`: what an edit achieves is told in words that it did not use.
INSTRUCTED_CHAT = Form(
    "instructed",
    ("Please write down how this continues.\n", ""),
    ("Please reply to the question below.\n", ""),
    chat=True,
    system="You are a reliable assistant. Keep your reply short.",
)
INSTRUCTED_PLAIN = Form("instructed", ("Please write down how this continues: ", "\nReply:"), ("Please reply: ", "\nReply:"))

# Rows that are read in one pass over a tree; it bounds the memory of verifying many edits.
PASS_ROWS = 64

# Everyday knowledge that no edit should move.
UNRELATED = (
    "The capital of France is",
    "The opposite of hot is",
    "Water is made of hydrogen and",
    "The largest planet in the solar system is",
    "Two plus two equals",
    "Romeo and Juliet was written by William",
)


@dataclass(frozen=True)
class Reading:
    """What the model says to a text: the probability of the target (product over its tokens), the share of its tokens that
    are the argmax, and the tokens it would have said in their place, as text."""

    probability: float
    success: float
    says: str


@dataclass(frozen=True)
class FactReport:
    """A fact before and after: with the edit's own prompt and in the instructed form."""

    subject: str
    prompt: str
    target: str
    prompt_before: Reading
    prompt_after: Reading
    instructed_before: Reading
    instructed_after: Reading


@dataclass(frozen=True)
class UnrelatedReport:
    """An unrelated prompt, the next token before and after, and whether it stayed."""

    prompt: str
    before: str
    after: str
    stayed: bool


@dataclass(frozen=True)
class Report:
    """The verification of an edit. The properties are means over facts or prompts, from 0 to 1."""

    facts: tuple[FactReport, ...]
    unrelated: tuple[UnrelatedReport, ...]

    def mean(self, reading: str) -> float:
        """Mean success of `prompt_before`, `prompt_after`, `instructed_before` or `instructed_after`."""
        return sum(getattr(fact, reading).success for fact in self.facts) / len(self.facts)

    @property
    def locality(self) -> float:
        """Share of unrelated prompts whose answer stayed; 1 where there are none."""
        return sum(u.stayed for u in self.unrelated) / len(self.unrelated) if self.unrelated else 1.0

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)


@torch.no_grad()
def read_rows(decoder: Decoder, tokenizer: Any, rows: Sequence[Row]) -> list[Reading]:
    """Read rows teacher-forced, `PASS_ROWS` at a time. A row without a target is read at its last token: what it says next."""
    return [reading for i in range(0, len(rows), PASS_ROWS) for reading in _read_pass(decoder, tokenizer, rows[i : i + PASS_ROWS])]


def _read_pass(decoder: Decoder, tokenizer: Any, rows: Sequence[Row]) -> list[Reading]:
    device = decoder.embedding.weight.device
    tree = tree_on([inputs(row) for row in rows], device)
    top = run_tree(decoder, tree, range(len(decoder.layers)))
    readings = []
    for row, path in zip(rows, tree.path, strict=True):
        first = row.target - 1
        scores = logits(decoder, top[list(path[first:])]).log_softmax(-1)
        said = scores.argmax(-1)
        target = torch.tensor(row.tokens[row.target :], dtype=torch.long, device=device)
        if len(target):
            chosen = scores.gather(1, target[:, None]).sum().exp().item()
            readings.append(Reading(chosen, (said == target).double().mean().item(), tokenizer.decode(said.tolist())))
        else:
            readings.append(Reading(scores.max().exp().item(), 1.0, tokenizer.decode(said.tolist())))
    return readings


@dataclass(frozen=True)
class Snapshot:
    """Readings of the same texts at one time: facts with their prompt, instructed, and unrelated prompts."""

    prompt: tuple[Reading, ...]
    instructed: tuple[Reading, ...]
    unrelated: tuple[Reading, ...]


def fact_rows(decoder: Decoder, tokenizer: Any, edits: Sequence[Edit]) -> list[Row]:
    """The rows on which edits are verified: all with their own prompt, then all in the instructed form. EditError as `row_of`."""
    form = INSTRUCTED_CHAT if tokenizer.chat_template else INSTRUCTED_PLAIN
    return [row_of(edit, f, tokenizer, decoder.max_length) for f in (STATEMENT, form) for edit in edits]


def snapshot(decoder: Decoder, tokenizer: Any, edits: Sequence[Edit], unrelated: Sequence[str]) -> Snapshot:
    """Read every edit in both forms, and the unrelated prompts."""
    rows = fact_rows(decoder, tokenizer, edits)
    for prompt in unrelated:
        tokens = tuple(tokenizer(prompt)["input_ids"])
        rows.append(Row(tokens, len(tokens) - 1, len(tokens)))
    readings = read_rows(decoder, tokenizer, rows)
    n = len(edits)
    return Snapshot(tuple(readings[:n]), tuple(readings[n : 2 * n]), tuple(readings[2 * n :]))


def compare(edits: Sequence[Edit], unrelated: Sequence[str], before: Snapshot, after: Snapshot) -> Report:
    """The report on two snapshots of the same texts."""
    facts = zip(edits, before.prompt, after.prompt, before.instructed, after.instructed, strict=True)
    kept = zip(unrelated, before.unrelated, after.unrelated, strict=True)
    return Report(
        tuple(FactReport(edit.subject, edit.prompt, edit.target, *readings) for edit, *readings in facts),
        tuple(UnrelatedReport(prompt, b.says, a.says, b.says == a.says) for prompt, b, a in kept),
    )
