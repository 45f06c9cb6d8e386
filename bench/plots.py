"""The paper's figures for a folder of results, by matplotlib."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from bench.tables import GENERAL, TITLES, Results

# The groups of bars of a suite that edits each subject alone.
COLUMNS = ("instructed", "efficacy", "paraphrase", "locality", "single_hop", "multi_hop", "temporal", "overall")


def plots(results: Results) -> dict[str, Figure]:
    """name -> figure: recall, or recall after so many sequential edits; and time and memory where they were measured."""
    figures = _sequences(results) if results.suite == "sequential" else {"recall": _bars(results)}
    for what, label in (("seconds", "seconds an edit"), ("peak_mb", "MB above the model")):
        found = {recipe: value for recipe in results.summary if recipe != "vanilla" and (value := results.cost(recipe, what)) is not None}
        if found:
            figures[what], axes = _figure(f"{label} (Fig. 18)", label)
            axes.bar(list(found), list(found.values()))
            axes.tick_params(axis="x", rotation=30)
    return {f"{results.suite}_{name}": figure for name, figure in figures.items()}


def _figure(title: str, ylabel: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, ylabel=ylabel)
    axes.grid(axis="y", alpha=0.3)
    return figure, axes


def _bars(results: Results) -> Figure:
    """Every metric of every recipe, standard errors over subjects as whiskers."""
    summary = results.summary
    columns = [metric for metric in COLUMNS if any(metric in row for row in summary.values())]
    figure, axes = _figure(TITLES[results.suite], "F1, percent" if results.suite == "locomo" else "percent")
    width = 0.8 / len(summary)
    for i, (recipe, found) in enumerate(summary.items()):
        places = [x + (i - (len(summary) - 1) / 2) * width for x in range(len(columns))]
        errors = [results.standard_error(recipe, metric) or 0.0 for metric in columns]
        axes.bar(places, [found.get(metric, [0.0])[0] for metric in columns], width, yerr=errors, label=recipe)
    axes.set_xticks(range(len(columns)), columns)
    figure.legend(fontsize="small", ncols=4, loc="outside lower center")
    return figure


def _sequences(results: Results) -> dict[str, Figure]:
    """Each metric against the number of subjects that were edited."""
    counts = sorted({line["count"] for line in results.lines})
    figures = {}
    for metric in ("overall", "instructed", "locality", *GENERAL[:1]):
        figures[metric], axes = _figure(f"{metric} after sequential edits (Fig. 20)", metric if metric in GENERAL else "percent")
        for recipe, found in results.summary.items():
            axes.plot(counts, [found.get(f"{metric}_{n}", [float("nan")])[0] for n in counts], marker="o", label=recipe)
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(n) for n in counts])
        axes.set_xlabel("subjects edited")
        figures[metric].legend(fontsize="small", ncols=4, loc="outside lower center")
    return figures
