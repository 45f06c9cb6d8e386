"""KnowEdit-style JSON (Zhang et al. 2024): a prompt, a new target, and groups of locality prompts with their answers."""

from __future__ import annotations

from typing import Any

from rose_engine.edits import Edit

from bench.datasets.cases import Case, slot, texts


def case(record: dict, source: str) -> Case:
    """A record. Its locality groups are neighbours; those of portability, which ask for what follows from the fact, are not read."""
    subject = record["subject"]
    groups = (record.get("locality") or {}).values()
    neighbours = tuple(texts([one["prompt"], _answer(one["ground_truth"])], "locality") for group in groups for one in group)
    rephrased = record.get("rephrase_prompt") or record.get("rephrase") or []
    paraphrases = texts([rephrased] if isinstance(rephrased, str) else rephrased, "rephrase_prompt")
    return Case(Edit(subject, slot(record["prompt"], subject), record["target_new"], source=source), paraphrases, (), neighbours)


def _answer(truth: Any) -> str:
    """Answers come as a text, a list of texts, or a list of lists of texts that all serve: the first."""
    while isinstance(truth, list):
        truth = truth[0]
    return truth
