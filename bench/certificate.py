"""What the certificate is worth: facts recalled when asked, of subjects with D <= R and of the others.

    python -m bench.certificate --model smollm2 --data same_subject_dev.json --subjects 40 --json -

Each subject is edited alone, certified, asked in questions and instructions that neither the edit nor the certificate has seen
(`instructed`, teacher-forced, percent), and taken back. holds, fails: facts and their success by the verdict of their subject, and the
difference. curve: success by fifths of the margin R - D, and correlation over subjects. within_size: the difference where
subjects with equally many facts are compared, weighted by their facts; more facts make R smaller and recall harder.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import correlation, fmean, pstdev
from typing import Any

from rose_engine import Editor, Recipe

from bench.datasets.cases import Dataset, SubjectCases
from bench.methods import methods_of
from bench.metrics import teacher_forced
from bench.output import emit
from bench.quality import probes_of
from bench.subjects import note, opened, parser_of

PARTS = 5


def instructed(editor: Editor, subject: SubjectCases, data: Dataset) -> list[float]:
    """Of each fact that has questions its mean success."""
    found = []
    for case in subject.cases:
        probes = probes_of(editor.tokenizer, SubjectCases(subject.name, (case,)), data)["instructed"]
        if probes:
            found.append(fmean(outcome.success for outcome in teacher_forced(editor.model, editor.tokenizer, probes)))
    return found


def certified(editor: Editor, data: Dataset, recipe: Recipe) -> list[dict[str, Any]]:
    """Of each subject its R, D, margin and verdict, and the success of its facts."""
    lines = []
    for i, subject in enumerate(data.subjects):
        with editor.preview(subject.edits, recipe=recipe, verify=False, certify=True, others=()) as result:
            success = instructed(editor, subject, data)
        (found,) = result.certificate.subjects
        margin = found.margin["instructed"]
        lines.append({"R": found.radius, "D": found.deviation["instructed"], "margin": margin, "holds": found.holds, "success": success})
        note(f"{i + 1}/{len(data.subjects)} {subject.name}: R - D {margin:.1f}, instructed {100 * fmean(success or [0]):.0f}")
    return [line for line in lines if line["success"]]


def worth(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How well the verdict, and the margin, tell the facts that are recalled."""
    sides = {name: [line for line in lines if line["holds"] == held] for name, held in (("holds", True), ("fails", False))}
    found: dict[str, Any] = {name: _facts(some) for name, some in sides.items()}
    if sides["holds"] and sides["fails"]:
        found["difference"] = found["holds"]["instructed"] - found["fails"]["instructed"]
        found["within_size"] = _within(lines)
    ordered = sorted(lines, key=lambda line: line["margin"])
    parts = [ordered[i * len(ordered) // PARTS : (i + 1) * len(ordered) // PARTS] for i in range(PARTS)]
    found["curve"] = [{"margin": fmean(line["margin"] for line in part), **_facts(part)} for part in parts if part]
    margins, means = [line["margin"] for line in lines], [fmean(line["success"]) for line in lines]
    found["correlation"] = correlation(margins, means) if len(lines) > 1 and pstdev(margins) and pstdev(means) else None
    return found | {"subjects": list(lines)}


def _facts(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    every = [x for line in lines for x in line["success"]]
    return {"subjects": len(lines), "facts": len(every), "instructed": 100 * fmean(every) if every else None}


def _within(lines: Sequence[dict[str, Any]]) -> float | None:
    parts = []
    for size in {len(line["success"]) for line in lines}:
        held, failed = ([line for line in lines if len(line["success"]) == size and line["holds"] == holds] for holds in (True, False))
        if held and failed:
            parts.append((len(held) + len(failed), size, _facts(held)["instructed"] - _facts(failed)["instructed"]))
    weight = sum(count * size for count, size, _ in parts)
    return sum(count * size * difference for count, size, difference in parts) / weight if weight else None


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("bench.certificate", __doc__, count="subjects", default=40)
    parser.set_defaults(dtype="auto")
    parser.add_argument("--recipe", default="rose", help="a recipe by name (`bench.methods`)")
    args = parser.parse_args(argv)
    editor, data = opened(args)
    method = next(iter(methods_of(args.recipe, editor).values()))
    if method.recipe is None:
        raise SystemExit(f"no recipe of the engine: {args.recipe}")
    found = worth(certified(editor, data, method.recipe))
    text = [f"{name}: {found[name]['facts']} facts, instructed {found[name]['instructed'] or 0:.1f}" for name in ("holds", "fails")]
    text.append(f"difference {found.get('difference', float('nan')):.1f}, correlation over subjects {found['correlation'] or 0:.2f}")
    emit(found, args.json, "\n".join(text))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
