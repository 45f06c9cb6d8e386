"""Quality of edits on same-subject data: each subject is edited alone, measured, and taken back.

    python -m bench.quality --data same_subject_dev.json --model smollm2 --recipes vanilla,rose --subjects 20 --json -

Metrics, in percent (the paper's Appendix D.2). Teacher-forced: efficacy with the edit's prompt, paraphrase with other
statements, instructed with unseen questions in unseen instructions; each with _generated: greedy answers of at most 24
tokens that hold the target. locality, locality_instructed: share of prompts about other subjects whose argmax answer is
the unedited model's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from rose_engine import Editor

from bench.datasets.cases import Dataset, SubjectCases, paraphrases_of
from bench.methods import Method, edited, methods_of
from bench.metrics import Outcome, Probe, chat_probe, contains, generate, plain_probe, teacher_forced
from bench.output import emit
from bench.subjects import note, opened, parser_of
from bench.tables import error_of_mean, with_error

RECALL = ("efficacy", "paraphrase", "instructed")
LOCALITY = ("locality", "locality_instructed")
# Every share of recall stands beside that of free generation.
METRICS = (*(name for metric in RECALL for name in (metric, f"{metric}_generated")), *LOCALITY)


def probes_of(tokenizer, subject: SubjectCases, data: Dataset) -> dict[str, list[Probe]]:
    """The probes of a subject by metric."""
    asked = lambda q, a: [chat_probe(tokenizer, before + q + after, a, system) for system, before, after in data.instructions]  # noqa: E731
    probes: dict[str, list[Probe]] = {"efficacy": [], "paraphrase": [], "instructed": [], "locality": [], "locality_instructed": []}
    for case in subject.cases:
        target = case.edit.target
        probes["efficacy"].append(plain_probe(case.edit.prompt.replace("{}", subject.name), target))
        probes["paraphrase"] += (plain_probe(p, target) for p in case.paraphrases)
        for question in case.questions:
            probes["instructed"] += asked(question, target)
        for prompt, answer in case.neighbours:
            probes["locality"].append(plain_probe(prompt, answer))
            probes["locality_instructed"] += asked(prompt, answer)
    return probes


def read(editor: Editor, probes: dict[str, list[Probe]]) -> dict[str, list[Outcome]]:
    """Outcomes of all probes, read together."""
    together = [probe for group in probes.values() for probe in group]
    outcomes = iter(teacher_forced(editor.model, editor.tokenizer, together))
    return {metric: [next(outcomes) for _ in group] for metric, group in probes.items()}


@dataclass(frozen=True)
class Scores:
    """values: of every metric, one a probe. answers: what was generated for each metric of `RECALL`, one a probe."""

    values: dict[str, list[float]]
    answers: dict[str, list[str]]


def score(editor: Editor, probes: dict[str, list[Probe]], unedited: dict[str, list[Outcome]]) -> Scores:
    """Every metric of the model as it is now."""
    now, values, answers = read(editor, probes), {}, {}
    for metric in RECALL:
        values[metric] = [outcome.success for outcome in now[metric]]
        asked = probes[metric]
        answers[metric] = generate(editor.model, editor.tokenizer, [p.text for p in asked], chat=asked[0].chat) if asked else []
        values[f"{metric}_generated"] = [float(contains(said, p.answer)) for said, p in zip(answers[metric], asked, strict=True)]
    for metric in LOCALITY:
        values[metric] = [float(a.said == b.said) for a, b in zip(now[metric], unedited[metric], strict=True)]
    return Scores(values, answers)


def evaluate(
    editor: Editor, data: Dataset, methods: dict[str, Method], note: Callable[[str], None] = lambda line: None
) -> dict[str, dict[str, list[float]]]:
    """method -> metric -> one mean a subject."""
    results: dict[str, dict[str, list[float]]] = {name: {metric: [] for metric in METRICS} for name in methods}
    for number, subject in enumerate(data.subjects, 1):
        probes = probes_of(editor.tokenizer, subject, data)
        unedited = read(editor, probes)
        for name, method in methods.items():
            with edited(editor, method, [subject.edits], 0, paraphrases_of(subject)) as cost:
                values = score(editor, probes, unedited).values
            means = {metric: fmean(values[metric]) for metric in METRICS if values[metric]}
            note(f"{number}/{len(data.subjects)} {name}: {keep(means, results[name])}, {cost['seconds']:.1f} s")
    return results


def keep(means: dict[str, float], results: dict[str, list[float]]) -> str:
    """Add a subject's means to the lists of each metric; returns them as they are told. A subject without probes of a metric does not
    count there."""
    for metric, mean in means.items():
        results[metric].append(mean)
    return " ".join(f"{metric} {100 * mean:.0f}" for metric, mean in means.items())


def percent(results: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Means over subjects in percent."""
    return {
        name: {metric: round(100 * fmean(values), 2) for metric, values in metrics.items() if values} for name, metrics in results.items()
    }


def standard_errors(results: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Standard errors over subjects in percent, where there are two or more."""
    errors = {name: {metric: error_of_mean(values) for metric, values in metrics.items()} for name, metrics in results.items()}
    return {name: {m: round(100 * error, 2) for m, error in of.items() if error is not None} for name, of in errors.items()}


def emit_means(results: dict[str, dict[str, list[float]]], metrics: Sequence[str], where: str | None) -> None:
    """Tell the means of every name over subjects, with their standard errors, in percent: as JSON or as a table (`output.emit`)."""
    table, errors = percent(results), standard_errors(results)
    width = max([12, *map(len, table)])
    lines = [" " * width + "".join(f"{metric:>22s}" for metric in metrics)]
    for name, means in table.items():
        cells = (with_error(means[m], errors[name].get(m)) if m in means else "" for m in metrics)
        lines.append(f"{name:{width}s}" + "".join(f"{cell:>22s}" for cell in cells))
    every = {name: means | {"standard_error": errors[name], "by_subject": results[name]} for name, means in table.items()}
    emit(every, where, "\n".join(lines))


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("bench.quality", __doc__, count="subjects", default=20)
    parser.add_argument("--recipes", default="vanilla,rose", help="methods by name (`bench.methods`), separated by commas")
    args = parser.parse_args(argv)
    editor, data = opened(args)
    results = evaluate(editor, data, methods_of(args.recipes, editor), note)
    emit_means(results, METRICS, args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
