"""LoCoMo-Edit: what people said in LoCoMo's conversations (Maharana et al. 2024), as facts to edit, and the questions that rest on it.

A conversation file holds `qa`, whose `evidence` names dialogue turns, and for each session the observations: declarative sentences
about a person with the turns that they rest on. For each question of categories 4, 1 and 2 the observations of its evidence are the
facts; a time that is said relative to the day of the session, in the observation or else in a sentence of the turn about the same,
becomes a date and a fact of its own. Facts are grouped by person, 5 an edit, or up to 10 where one question rests on so many; every
question is asked where its facts are edited.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from rose_engine.edits import Edit

from bench.datasets.cases import INSTRUCTIONS, DataError, json_of
from bench.datasets.dates import resolved, session_date
from bench.metrics import chat_probe

KINDS = {4: "single_hop", 1: "multi_hop", 2: "temporal"}
LEAST_FACTS = 5
# Of an observation's words after the name the first clause or phrase is the fact, if it has so many words; its last words are the
# target, no more than TARGET_WORDS, and two at least are the prompt. One value has to hold all targets of an edit, so they are kept short.
CLAUSE_WORDS = 4
TARGET_WORDS = 4
_CLAUSE = re.compile(
    r",|;|\b(?:and|but|which|because|while|after|before|since|so|as|that|despite|including|"
    r"(?:with|about|at|by|for|in|of|on|through|to)(?! (?:over )?\d))\b"  # how long, how many: that is what gets asked
)
# Beginnings of words that say nothing of what a sentence is about.
_COMMON = frozenset(
    ("been", "with", "that", "this", "have", "from", "about", "some", "their", "they", "just", "last", "week", "month", "year", "felt")
)
_TURN = re.compile(r"D\d+:\d+")


@dataclass(frozen=True)
class Question:
    """A question, its reference answer, and its kind: single_hop, multi_hop or temporal."""

    text: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Batch:
    """Facts of one person that are edited together, and the questions that rest on them. name: conversation, person and number."""

    name: str
    edits: tuple[Edit, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Conversations:
    """batches, and report: how many eligible questions were covered, by kind, how many of these
    only in part (a turn of their evidence has no observation), and why the others were not."""

    batches: tuple[Batch, ...]
    report: dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """A dialogue turn: what was said, on which day, and the observations (person, sentence) that rest on it."""

    text: str
    day: date
    observations: list[tuple[str, str]]


def load(path: str | Path, most: int = 10) -> Conversations:
    """Read a conversation file, or every *.json of a folder, into batches; a question that rests on more than `most` facts is left out.

    DataError names file and field; OSError where it cannot be read.
    """
    path = Path(path)
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path}: holds no *.json")
    batches: list[Batch] = []
    seen: Counter[str] = Counter()
    for file in files:
        try:
            batches += _batches(json_of(file), file.stem, most, seen)
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            raise DataError(f"{file}: lacks or misuses a field: {e}") from e
    eligible, covered = (sum(n for what, n in seen.items() if what.startswith(f"{name}/")) for name in ("eligible", "covered"))
    report = {"eligible": eligible, "covered": covered, "share": covered / max(1, eligible), **dict(sorted(seen.items()))}
    return Conversations(tuple(batches), report)


def ask(tokenizer: Any, question: str) -> str:
    """The text in which a question is asked."""
    system, before, after = INSTRUCTIONS[0]
    return chat_probe(tokenizer, before + question + after, "", system).text


def _turns(data: dict[str, Any]) -> dict[str, Turn]:
    turns = {}
    for name, session in data.items():
        if re.fullmatch(r"session_\d+", name):
            day = session_date(data[f"{name}_date_time"])
            turns |= {turn["dia_id"]: Turn(turn.get("text", ""), day, []) for turn in session}
    for name, people in data.items():
        if re.fullmatch(r"session_\d+_observation", name):
            for person, sentences in people.items():
                for sentence, evidence in sentences:
                    for turn in _TURN.findall(str(evidence)):
                        if turn in turns:
                            turns[turn].observations.append((person, sentence))
    return turns


def _facts(turn: Turn) -> Iterator[Edit]:
    """The facts of a turn's observations. One that does not name its person, or says too little after the name, is none."""
    for person, sentence in turn.observations:
        when = resolved(sentence, turn.day)
        said = when or _said_of(sentence.replace(person, ""), turn)
        before, named, after = (when[0] if when else sentence).partition(person)
        words = _clause(after).split()
        if not named or len(words) < 3:
            continue
        lead = f"{before}{{}}{'' if after[:1] in ('', chr(39)) else ' '}"  # a name may be followed by 's
        split = max(2, len(words) - TARGET_WORDS)
        yield Edit(person, lead + " ".join(words[:split]), " ".join(words[split:]))
        if said:
            preposition, _, rest = said[1].partition(" ")
            prompt, dated = lead + " ".join(words), preposition in ("on", "in")
            asked = f"When was it that {prompt.replace('{}', person)}?"
            yield Edit(person, f"{prompt} {preposition}" if dated else prompt, rest if dated else said[1], asked)


def _clause(after: str) -> str:
    """What follows a name up to the end of the first clause that says something."""
    text = after.strip().rstrip(".")
    ends = (m.start() for m in _CLAUSE.finditer(text) if len(text[: m.start()].split()) >= CLAUSE_WORDS)
    return text[: next(ends, len(text))].strip()


def _said_of(sentence: str, turn: Turn) -> tuple[str, str] | None:
    """What `resolved` finds in those sentences of a turn which speak of what an observation says: which share a longer word with it."""
    stems = lambda text: {word[:5] for word in re.findall(r"[a-z]{4,}", text.lower())} - _COMMON  # noqa: E731
    about = stems(sentence)
    for said in re.split(r"(?<=[.!?])\s+", turn.text):
        if about & stems(said) and (found := resolved(said, turn.day)):
            return found
    return None


def _batches(data: dict[str, Any], name: str, most: int, seen: Counter[str]) -> list[Batch]:
    turns = _turns(data)
    of: dict[str, list[tuple[Question, tuple[Edit, ...]]]] = {}
    for qa in data["qa"]:
        kind = KINDS.get(qa["category"])
        if kind is None:
            continue
        seen[f"eligible/{kind}"] += 1
        evidence = [turn for text in qa["evidence"] for turn in _TURN.findall(text)]
        reason, facts = _rests_on(evidence, turns, most)
        if reason:
            seen[f"left out/{reason}"] += 1
            continue
        seen[f"covered/{kind}"] += 1
        seen["covered in part"] += not all(any(_facts(turns[turn])) for turn in evidence)
        of.setdefault(facts[0].subject, []).append((Question(qa["question"], str(qa["answer"]), kind), facts))
    return [batch for person, questions in of.items() for batch in _grouped(f"{name} {person}", questions, _spare(turns, person))]


def _rests_on(evidence: Sequence[str], turns: dict[str, Turn], most: int) -> tuple[str, tuple[Edit, ...]]:
    """(why a question cannot be covered, or nothing; the facts that it rests on)."""
    if not evidence or any(turn not in turns for turn in evidence):
        return "its evidence names no turn", ()
    every = tuple({edit.prompt: edit for turn in evidence for edit in _facts(turns[turn])}.values())
    if not every:
        return "no turn of its evidence has an observation", ()
    if len({edit.subject for edit in every}) > 1:
        return "it rests on facts of two people", ()
    if len(every) > most:
        return f"it rests on more than {most} facts", ()
    return "", every


def _spare(turns: dict[str, Turn], person: str) -> list[Edit]:
    """Every fact of a person, to fill an edit that would have too few."""
    return [edit for turn in turns.values() for edit in _facts(turn) if edit.subject == person]


def _grouped(name: str, questions: Sequence[tuple[Question, tuple[Edit, ...]]], spare: Sequence[Edit]) -> list[Batch]:
    """As many questions together as rest on no more than LEAST_FACTS facts, or one; what is missing to that number is filled up."""
    groups: list[tuple[dict[str, Edit], list[Question]]] = []
    for question, facts in questions:
        new = {edit.prompt: edit for edit in facts}
        if not groups or len(groups[-1][0] | new) > LEAST_FACTS:
            groups.append(({}, []))
        groups[-1][0].update(new)
        groups[-1][1].append(question)
    for facts, _ in groups:
        for edit in spare:
            if len(facts) < LEAST_FACTS:
                facts.setdefault(edit.prompt, edit)
    return [Batch(f"{name} {i}", tuple(facts.values()), tuple(asked)) for i, (facts, asked) in enumerate(groups, 1)]


def main(argv: Sequence[str] | None = None) -> int:
    """Print how many questions of the conversations are covered, and why the others are not."""
    parser = argparse.ArgumentParser(prog="bench.datasets.locomo", description=main.__doc__)
    parser.add_argument("path", help="a conversation file, or the folder of them")
    print(json.dumps(load(parser.parse_args(argv).path).report, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
