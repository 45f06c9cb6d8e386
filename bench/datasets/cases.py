"""What every data set is read into: subjects, the facts to edit, and what each is evaluated with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rose_engine.edits import SLOT, Edit

# The wrappers in which questions are asked where a data set brings none: (system message, text before and after the question).
INSTRUCTIONS = (
    ("Your job is to answer the question. Do not explain.", "Query:\nAnswer the following question in a few words.\nQuestion: ", ""),
    ("You are a helpful assistant.", "Please answer the following question with an exact answer.\nQuestion: ", ""),
)


class DataError(ValueError):
    """A data file that cannot be used; the message names file and record."""


@dataclass(frozen=True)
class Case:
    """A fact to edit and what it is evaluated with. Neighbours are (prompt about another subject, its true answer)."""

    edit: Edit
    paraphrases: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    neighbours: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class SubjectCases:
    """A subject and its facts."""

    name: str
    cases: tuple[Case, ...]

    @property
    def edits(self) -> list[Edit]:
        """The facts alone."""
        return [case.edit for case in self.cases]


@dataclass(frozen=True)
class Dataset:
    """subjects, and the instructions in which questions are asked: (system message, text before and after the question)."""

    subjects: tuple[SubjectCases, ...]
    instructions: tuple[tuple[str, str, str], ...] = INSTRUCTIONS


def paraphrases_of(*subjects: SubjectCases) -> set[str]:
    """The prompts with which the subjects are evaluated, `{}` in the subject's place."""
    return {text.replace(subject.name, SLOT) for subject in subjects for case in subject.cases for text in case.paraphrases}


def texts(value: object, what: str) -> tuple[str, ...]:
    """A list of texts, none of them empty. DataError names the field that is something else."""
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) and text.strip() for text in value):
        raise DataError(f"`{what}` must be a list of texts, given {value!r:.80}")
    return tuple(value)


def grouped(cases: list[Case]) -> tuple[SubjectCases, ...]:
    """Cases by their subject, in order of first appearance; facts that say the same of one prompt once."""
    facts: dict[str, dict[str, Case]] = {}
    for case in cases:
        facts.setdefault(case.edit.subject, {}).setdefault(case.edit.prompt.strip(), case)
    return tuple(SubjectCases(name, tuple(some.values())) for name, some in facts.items())


def slot(prompt: str, subject: str) -> str:
    """A prompt with `{}` in the place where it last names the subject. DataError where it does not."""
    before, found, after = prompt.rpartition(subject)
    if not found:
        raise DataError(f"the prompt {prompt!r} does not name its subject {subject!r}")
    return f"{before}{{}}{after}"


def json_of(path: str | Path) -> Any:
    """A file's JSON, or the list of its lines' where it is JSONL. DataError names the line that is none."""
    try:
        text = Path(path).read_text("utf-8")
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: is not UTF-8: byte {e.start}") from e
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        if e.msg != "Extra data":
            raise DataError(f"{path}: is not JSON: {e}") from e
    records = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as e:
                raise DataError(f"{path}:{number}: is not JSON: {e}") from e
    return records
