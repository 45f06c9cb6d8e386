"""A folder that `bench.run` has written, as read by the reports."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

TITLES = {
    "instructed": "Same-subject edits, asked in instructions (Table 1)",
    "declarative": "Same-subject edits, declarative (Fig. 16)",
    "ablation": "Ablation (Fig. 6)",
    "templates": "Recall by the number of linguistic forms",
    "layers": "Recall by the edited layers",
    "sequential": "Sequential edits (Fig. 20)",
    "locomo": "LoCoMo-Edit, token F1 (Table 2)",
}
# Metrics that are not shares.
GENERAL = ("perplexity", "kl_neutral", "fluency")


def error_of_mean(values: Sequence[float]) -> float | None:
    """The standard error of a mean; None of fewer than two values."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def with_error(mean: float, error: float | None, digits: int = 1) -> str:
    """A mean as it is printed, with its standard error where there is one."""
    return f"{mean:.{digits}f}" if error is None else f"{mean:.{digits}f} ± {error:.{digits}f}"


@dataclass(frozen=True)
class Results:
    """run.json, summary.json and the lines of results.jsonl."""

    run: dict[str, Any]
    summary: dict[str, dict[str, list[float]]]
    lines: list[dict[str, Any]]

    @property
    def suite(self) -> str:
        """The suite's name."""
        return self.run["suite"]

    def standard_error(self, recipe: str, metric: str) -> float | None:
        """Of the mean over subjects, in the summary's unit; None where there are not two subjects with this metric."""
        of: dict[str, list[float]] = {}
        for line in self.lines:
            if line["recipe"] == recipe and "subject" in line and line["values"].get(metric):
                of.setdefault(line["subject"], []).append(fmean(line["values"][metric]))
        error = error_of_mean([fmean(values) for values in of.values()])
        return None if error is None else (1.0 if metric in GENERAL else 100.0) * error

    def cost(self, recipe: str, what: str) -> float | None:
        """Mean `seconds` or `peak_mb` of an edit; None where it was not measured."""
        found = [line[what] for line in self.lines if line["recipe"] == recipe and line.get(what) is not None]
        return fmean(found) if found else None

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(head, rows): every metric with its standard error over subjects and, of several seeds, in brackets the spread over these.

        A sequence has a row for each number of edits.
        """
        counts = sorted({line["count"] for line in self.lines if "count" in line})
        ends = [f"_{count}" for count in counts] or [""]
        names = [metric for row in self.summary.values() for metric in row if metric.endswith(ends[-1])]
        metrics = list(dict.fromkeys(name.removesuffix(ends[-1]) for name in names))
        costs = [what for what in ("seconds", "peak_mb") if any(self.cost(recipe, what) for recipe in self.summary)]
        rows = []
        for recipe, found in self.summary.items():
            for end in ends:
                row = [recipe, *([end.removeprefix("_")] if counts else [])]
                row += [self._cell(recipe, metric, found.get(metric + end)) for metric in metrics]
                rows.append(row + ["" if (value := self.cost(recipe, what)) is None else f"{value:.1f}" for what in costs])
        return ["recipe", *(["edits"] if counts else []), *metrics, *costs], rows

    def _cell(self, recipe: str, metric: str, value: list[float] | None) -> str:
        if value is None:
            return ""
        error, digits = self.standard_error(recipe, metric), 2 if metric in GENERAL else 1
        text = with_error(value[0], error, digits)
        return f"{text} ({value[1]:.{digits}f})" if self.run["seeds"] > 1 else text

    def told(self) -> str:
        """A sentence that says what was run on what."""
        run = self.run
        model, machine, seeds = run["model"], run["hardware"], run["seeds"]
        subjects = len({line["subject"] for line in self.lines if "subject" in line})
        if subjects:
            what = "1 subject" if subjects == 1 else f"{subjects} subjects"
        else:
            what = f"up to {max(line['count'] for line in self.lines)} subjects in sequence"
        where = machine.get("gpu") or f"{machine['cores']} cores, {machine.get('cpu') or machine['system']}"
        versions = ", ".join(f"{package} {version}" for package, version in run["versions"].items())
        count = "1 seed" if seeds == 1 else f"{seeds} seeds"
        failed = [f"{number} results failed" for number in [sum("failed" in line for line in self.lines)] if number]
        return f"{model['name']}, {model['dtype']}; {what} of {run['data']['file']}; {count}; {'; '.join([where, versions, *failed])}"

    def cases(self) -> list[dict[str, Any]]:
        """Of every question that was asked: subject, prompt, wanted, and what each recipe says with the first seed."""
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for line in self.lines:
            for prompt, wanted, said in line.get("answers", ()) if line["seed"] == 0 else ():
                new = {"subject": line["subject"], "prompt": prompt, "wanted": wanted, "said": {}}
                found.setdefault((line["subject"], prompt), new)["said"][line["recipe"]] = said
        return list(found.values())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a results.jsonl; a last one that is not whole is not read."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().rpartition(b"\n")[0].splitlines()]


def read_results(folder: Path) -> Results:
    """SystemExit where the folder holds no finished run."""
    try:
        run, summary = (json.loads((folder / name).read_text("utf-8")) for name in ("run.json", "summary.json"))
    except (OSError, json.JSONDecodeError) as e:
        raise SystemExit(f"{folder} holds no finished run of bench.run: {e}") from e
    return Results(run, summary, read_lines(folder / "results.jsonl"))
