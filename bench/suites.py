"""The suites of `bench.run`: which results there are, how one is measured, and how they become a table.

A suite yields cells; a cell has a key, which says what it is a result of, and a function that measures it. A line of results is
the key's fields, `values` (metric -> one number a probe) and what the run cost.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from hashlib import sha256
from itertools import chain, zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from rose_engine import Delta, Editor

from bench.ability import ability, fluency, predictions
from bench.datasets import load, locomo
from bench.datasets.cases import SubjectCases, paraphrases_of
from bench.methods import Method, apply, edited
from bench.metrics import Probe, generate, token_f1
from bench.quality import METRICS, probes_of, read, score

# Metrics in percent; the others are told in their own units.
SHARES = (*METRICS, "overall", "single_hop", "multi_hop", "temporal")
COUNTS = (5, 10, 20, 40)
# Facts of one person that are edited together (the paper's Appendix D.2).
LOCOMO_FACTS = 10


@dataclass(frozen=True)
class Job:
    """What a suite is run on. data: the file or folder that was given; limit: how many subjects, or conversations, of it."""

    editor: Editor
    methods: dict[str, Method]
    data: Path
    limit: int
    seeds: int
    out: Path

    @cached_property
    def predictions(self) -> torch.Tensor:
        """What the model predicts on the texts of `bench.ability`; asked for the first time before anything is edited."""
        return predictions(self.editor.model, self.editor.tokenizer)[0]

    def seeds_of(self, method: Method) -> range:
        """The seeds with which a method runs: the first alone where it samples nothing."""
        return range(self.seeds if method.seeded else 1)


class Cell(NamedTuple):
    """key: field -> what the result is of. run: measures it and gives the rest of the line."""

    key: dict[str, Any]
    run: Callable[[], dict[str, Any]]


def rounded(values: Iterable[float]) -> list[float]:
    """Numbers as lines keep them."""
    return [round(value, 6) for value in values]


@torch.no_grad()
def general(job: Job, unedited: torch.Tensor, said: Iterable[str]) -> dict[str, list[float]]:
    """The metrics of `bench.ability` of the model as it is now, and of what it has said."""
    found = ability(job.editor.model, job.editor.tokenizer, unedited)
    said = list(said)
    found |= {"fluency": fluency(said)} if said else {}
    return {metric: rounded([value]) for metric, value in found.items()}


def alone(job: Job, asked: Sequence[str] = METRICS) -> Iterator[Cell]:
    """Every subject edited alone, by every method, with every seed; `asked` are the metrics whose probes are read."""
    data = load(job.data, job.limit)
    if "instructed" in asked and not any(case.questions for subject in data.subjects for case in subject.cases):
        raise SystemExit(f"{job.data} has no questions to ask; take the suite `declarative`")
    editor = job.editor

    for subject in data.subjects:
        probes = cache(lambda subject=subject: _only(probes_of(editor.tokenizer, subject, data), asked))
        unedited = cache(lambda probes=probes: read(editor, probes()))
        for name, method in job.methods.items():
            for seed in job.seeds_of(method):

                def run(subject=subject, probes=probes, unedited=unedited, method=method, seed=seed) -> dict[str, Any]:
                    before, base = unedited(), job.predictions
                    with edited(editor, method, [subject.edits], seed, paraphrases_of(subject)) as cost:
                        scores = score(editor, probes(), before)
                        values = {metric: rounded(some) for metric, some in scores.values.items()} | general(
                            job, base, chain(*scores.answers.values())
                        )
                    asked_and_said = zip(probes()["instructed"], scores.answers["instructed"], strict=True)
                    answers = [(probe.text, probe.answer, said) for probe, said in asked_and_said]
                    return {"values": values, "answers": answers, **cost}

                yield Cell({"recipe": name, "seed": seed, "subject": subject.name}, run)


def _only(probes: dict[str, list[Probe]], metrics: Sequence[str]) -> dict[str, list[Probe]]:
    return {metric: some if metric in metrics else [] for metric, some in probes.items()}


def sequence(job: Job) -> Iterator[Cell]:
    """Subject after subject into the same weights; all of them so far are asked after 5, 10, 20, 40.

    The deltas of the sequence are kept, so that a run which was stopped goes on after the last edit.
    """
    data = load(job.data, job.limit)
    editor = job.editor
    probes = [cache(lambda subject=subject: probes_of(editor.tokenizer, subject, data)) for subject in data.subjects]
    unedited = [cache(lambda asked=asked: read(editor, asked())) for asked in probes]
    counts = [count for count in COUNTS if count < len(data.subjects)] + [len(data.subjects)]
    unseen = paraphrases_of(*data.subjects)  # of all, for words are kept from one subject to the next
    for name, method in job.methods.items():
        for seed in job.seeds_of(method):
            for count in counts:

                def run(name=name, method=method, seed=seed, count=count) -> dict[str, Any]:
                    before, base = [one() for one in unedited[:count]], job.predictions
                    subjects, values, answers = data.subjects[:count], {}, []
                    # A recipe's edits are written here, deltas kept; a baseline's within its own context.
                    kept = method.recipe is not None
                    # Settings in a name may hold what a path may not.
                    folder = job.out / "sequences" / f"{name.partition('[')[0]}-{sha256(name.encode()).hexdigest()[:12]}.{seed}"
                    try:
                        if kept:
                            _go_on(job, method, subjects, seed, folder, unseen)
                        batches = [subject.edits for subject in subjects]
                        with edited(editor, Method() if kept else method, batches, seed, unseen) as cost:
                            for asked, was in zip(probes[:count], before, strict=True):
                                scores = score(editor, asked(), was)
                                answers += chain(*scores.answers.values())
                                for metric, some in scores.values.items():
                                    values.setdefault(metric, []).append(round(fmean(some), 6)) if some else None
                            values |= general(job, base, answers)
                    finally:
                        editor.restore([])
                    # What a sequence costs is known where it was edited in one go.
                    return {"values": values} if kept else {"values": values, **cost}

                yield Cell({"recipe": name, "seed": seed, "count": count}, run)


def _go_on(job: Job, method: Method, subjects: Sequence[SubjectCases], seed: int, folder: Path, without: Collection[str]) -> None:
    """Have the edits of these subjects in the weights, those whose deltas are in the folder by these."""
    path = lambda number: folder / f"{number:04d}"  # noqa: E731
    deltas: list[Delta] = []
    done = next((number for number in range(len(subjects)) if not (path(number) / "done").exists()), len(subjects))
    for number in range(done):
        deltas += [Delta.load(file) for file in sorted(path(number).glob("*.safetensors"))]
    job.editor.restore(deltas)
    for number in range(done, len(subjects)):
        first = len(job.editor.applied)
        apply(job.editor, method, subjects[number].edits, seed, without)
        for i, delta in enumerate(job.editor.applied[first:]):
            delta.save(path(number) / f"{i:04d}.safetensors")
        (path(number) / "done").touch()


def conversations(job: Job) -> Iterator[Cell]:
    """What people said in conversations, 5 to 10 facts of one person at a time; the questions that rest on them are then answered."""
    editor = job.editor
    for batch in _spread(locomo.load(job.data, LOCOMO_FACTS).batches, job.limit):
        texts = [locomo.ask(editor.tokenizer, question.text) for question in batch.questions]
        for name, method in job.methods.items():
            for seed in job.seeds_of(method):

                def run(batch=batch, texts=texts, method=method, seed=seed) -> dict[str, Any]:
                    base = job.predictions
                    with edited(editor, method, [list(batch.edits)], seed) as cost:
                        said = generate(editor.model, editor.tokenizer, texts, 32, chat=bool(editor.tokenizer.chat_template))
                        values = general(job, base, said)
                    for question, answer in zip(batch.questions, said, strict=True):
                        f1 = round(token_f1(answer, question.answer), 6)
                        for metric in (question.kind, "overall"):
                            values.setdefault(metric, []).append(f1)
                    asked = [(q.text, q.answer, answer) for q, answer in zip(batch.questions, said, strict=True)]
                    return {"values": values, "answers": asked, **cost}

                yield Cell({"recipe": name, "seed": seed, "subject": batch.name}, run)


def _spread(batches: Sequence[locomo.Batch], limit: int | None) -> list[locomo.Batch]:
    """`limit` batches, taken in turn from every person of every conversation, or all."""
    people: dict[str, list[locomo.Batch]] = {}
    for batch in batches:
        people.setdefault(batch.name.rpartition(" ")[0], []).append(batch)
    in_turn = [batch for some in zip_longest(*people.values()) for batch in some if batch is not None]
    return in_turn[:limit]


def by_subject(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over subjects of each metric's mean, and `overall`, the paper's mean of recall, paraphrase and locality."""
    means: dict[str, list[float]] = {}
    for line in lines:
        for metric, values in line["values"].items():
            if values:
                means.setdefault(metric, []).append(fmean(values))
    found = {metric: fmean(values) for metric, values in means.items()}
    recall = "instructed" if "instructed" in found else "efficacy"
    if {recall, "paraphrase", "locality"} <= found.keys():
        found["overall"] = fmean(found[metric] for metric in (recall, "paraphrase", "locality"))
    return found


def pooled(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over all probes of all subjects."""
    values: dict[str, list[float]] = {}
    for line in lines:
        for metric, some in line["values"].items():
            values.setdefault(metric, []).extend(some)
    return {metric: fmean(some) for metric, some in values.items() if some}


def by_count(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """`by_subject` of every number of edits: metric_5, metric_10 and so on."""
    return {f"{metric}_{line['count']}": value for line in lines for metric, value in by_subject([line]).items()}


@dataclass(frozen=True)
class Suite:
    """recipes: those that are run where none are named. cells: the results to get. table: lines of one recipe and seed -> metrics."""

    recipes: str
    cells: Callable[[Job], Iterator[Cell]]
    table: Callable[[Sequence[dict[str, Any]]], dict[str, float]]


PAPER = "vanilla,memit,alphaedit,memit_merge,rose"
SUITES = {
    "instructed": Suite(PAPER, alone, by_subject),
    "declarative": Suite(PAPER, partial(alone, asked=("efficacy", "paraphrase", "locality")), by_subject),
    "ablation": Suite("vanilla,memit_merge,rose_no_iga,rose_no_hki,rose", alone, by_subject),
    "templates": Suite("vanilla," + ",".join(f"rose[forms={forms};rewordings=0]" for forms in (1, 2, 4, 6, 8)), alone, by_subject),
    "layers": Suite("vanilla," + ",".join(f"rose[layers={first}-{first + 4}]" for first in (2, 4, 6, 8, 12)), alone, by_subject),
    "sequential": Suite("vanilla,alphaedit,wise,grace,rose", sequence, by_count),
    "locomo": Suite("vanilla,memit,alphaedit,memit_merge,rose", conversations, pooled),
}


def summary(suite: Suite, lines: Sequence[dict[str, Any]], recipes: Iterable[str], seeds: int) -> dict[str, dict[str, list[float]]]:
    """{recipe: {metric: [mean, standard deviation over seeds]}}; shares in percent."""
    table: dict[str, dict[str, list[float]]] = {}
    for recipe in recipes:
        of = [[line for line in lines if (line["recipe"], line["seed"]) == (recipe, seed)] for seed in range(seeds)]
        found = [suite.table(some) for some in of if some]
        table[recipe] = {}
        for metric in found[0]:
            scale = 100.0 if metric.rstrip("0123456789").removesuffix("_") in SHARES else 1.0
            values = [scale * one[metric] for one in found if metric in one]
            table[recipe][metric] = [round(fmean(values), 3), round(statistics.stdev(values), 3) if len(values) > 1 else 0.0]
    return table
