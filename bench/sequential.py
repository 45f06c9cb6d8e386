"""Sequential edits: subject after subject into one model, and what is left of all of them.

    python -m bench.sequential --model smollm2 --data same_subject_dev.json --edits 40 --json -

Each subject is one edit of all its facts. After 5, 10, 20 and 40 of them, all subjects so far are asked (`instructed`, teacher-forced,
percent) and their neighbours compared with the unedited model (`locality`, percent). plain: each write sees only the weights as
they are. joint: each write is solved together with the earlier ones (`rose_engine.memory`). batch: all subjects in one `apply`, at the end.
vanilla: no edit. No rewording says a paraphrase of the data.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from statistics import fmean

from rose_engine import Editor, Recipe

from bench.datasets.cases import Dataset, SubjectCases, paraphrases_of
from bench.methods import Method, apply
from bench.metrics import Outcome, Probe
from bench.output import emit
from bench.quality import probes_of, read
from bench.subjects import note, opened, parser_of

COUNTS = (5, 10, 20, 40, 80, 160)
METRICS = ("instructed", "locality")

Table = dict[str, dict[str, float]]


def measure(editor: Editor, probes: Sequence[dict[str, list[Probe]]], unedited: Sequence[dict[str, list[Outcome]]]) -> dict[str, float]:
    """Means over subjects in percent, of the model as it is now."""
    values: dict[str, list[float]] = {metric: [] for metric in METRICS}
    for asked, before in zip(probes, unedited, strict=True):
        now = read(editor, asked)
        if asked["instructed"]:
            values["instructed"].append(fmean(outcome.success for outcome in now["instructed"]))
        if asked["locality"]:
            values["locality"].append(fmean(a.said == b.said for a, b in zip(now["locality"], before["locality"], strict=True)))
    return {metric: round(100 * fmean(values[metric]), 2) for metric in METRICS if values[metric]}


def sequence(
    editor: Editor,
    subjects: Sequence[SubjectCases],
    recipe: Recipe | None,
    at: Sequence[int],
    read_now: Callable[[int], dict[str, float]],
    note: Callable[[str], None],
    unseen: Collection[str] = (),
) -> Table:
    """Edit subject after subject (None: no edit), measuring after each number in `at`; the model is then as before. unseen: what no
    rewording may say."""
    table: Table = {}
    for number, subject in enumerate(subjects, 1):
        began = time.perf_counter()
        if recipe is not None:
            apply(editor, Method(recipe), subject.edits, recipe.seed, unseen)
            note(f"{number}/{len(subjects)}: {time.perf_counter() - began:.1f} s")
        if number in at:
            table[str(number)] = read_now(number)
            note(f"{number}: {table[str(number)]}")
    editor.restore([])
    return table


def evaluate(editor: Editor, data: Dataset, recipe: Recipe, note: Callable[[str], None] = lambda line: None) -> dict[str, Table]:
    """The four tables, each a number of subjects -> metric -> percent."""
    subjects, count = data.subjects, len(data.subjects)
    probes = [probes_of(editor.tokenizer, subject, data) for subject in subjects]
    for asked in probes:  # read again and again: only what is told
        for metric in asked.keys() - set(METRICS):
            asked[metric] = []
    unedited = [read(editor, asked) for asked in probes]
    at = [n for n in COUNTS if n < count] + [count]
    read_now = lambda n: measure(editor, probes[:n], unedited[:n])  # noqa: E731
    unseen = paraphrases_of(*subjects)  # of all, for words are kept from one subject to the next
    results = {"vanilla": sequence(editor, subjects, None, at, read_now, note)}
    for name in ("plain", "joint"):
        tell = lambda line, name=name: note(f"{name} {line}")  # noqa: E731
        results[name] = sequence(editor, subjects, replace(recipe, sequential=name), at, read_now, tell, unseen)
    began = time.perf_counter()
    apply(editor, Method(recipe), [edit for subject in subjects for edit in subject.edits], recipe.seed, unseen)
    results["batch"] = {str(count): read_now(count)}
    note(f"batch of {count}: {time.perf_counter() - began:.1f} s, {results['batch'][str(count)]}")
    editor.restore([])
    return {name: results[name] for name in ("plain", "joint", "batch", "vanilla")}


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("bench.sequential", __doc__, count="edits", default=40)
    args = parser.parse_args(argv)
    editor, data = opened(args)
    results = evaluate(editor, data, editor.recipe, note)
    emit(results, args.json, table_of(results))
    return 0


def table_of(results: dict[str, Table]) -> str:
    """The four tables as lines of text."""
    rows = [("", *(f"{metric} {n}" for metric in METRICS for n in results["vanilla"]))]
    for name, table in results.items():
        cells = (table.get(n, {}).get(metric) for metric in METRICS for n in results["vanilla"])
        rows.append((name, *("" if cell is None else f"{cell:.1f}" for cell in cells)))
    return "\n".join("".join(f"{cell:>15s}" for cell in row) for row in rows)


if __name__ == "__main__":
    raise SystemExit(main())
