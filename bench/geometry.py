"""The paper's geometry on a model: tolerance radius against deviation for each recipe, gradient conflict, key similarity.

    python -m bench.geometry --model smollm2 --data same_subject_dev.json --subjects 20 --json - [--plot FOLDER] [--forms 2,4,6,8]
        [--layers 4-12] [--sweep 8]

Each subject is edited alone with each recipe and taken back. R is eq. 4 around the optimised value on the unedited weights (every target
at 0.9 or more), R_written the same around what the weights hold after the edit; R_kept and R_kept_written keep a target at the
probability of the certificate instead, which small models reach. D_question and D_instructed: how far the residual stream after the last
edited layer is moved otherwise than in the statement, in questions that no edit has seen, the sum over layers of what eq. 5 says of one;
D_layer_*: eq. 5 of the last layer alone, with eq16_* and bound_*, what eq. 16 and eq. 17 or 18 make of it. conflict: eq. 6 between
relations, with the first recipe. key_similarity: cosines of keys in the last edited layer of the unedited model. spectrum: of the
second moment there, where a recipe has one. --forms: the same for so many forms (Fig. 19). --layers: R_kept_written and D after each of
these layers, and cosines of the keys in them (Fig. 12). --sweep: both on so many subjects alone, the first ones, but for the cosines.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rose_engine import ROSE, Editor, Recipe
from rose_engine.certificate import KEPT, wordings
from rose_engine.files import write_files
from rose_engine.forms import Row, row_of
from rose_engine.geometry import (
    STEP,
    State,
    conflict,
    deviation,
    deviation_bound,
    first_order,
    off_diagonal,
    read_state,
    similarity,
    tolerance_radius,
    within_and_between,
)
from rose_engine.moments import moments
from rose_engine.optimize import Values
from rose_engine.precondition import covariance, moment_factor

from bench.datasets.cases import SubjectCases
from bench.methods import layers_of, methods_of
from bench.output import emit
from bench.subjects import note, opened, parser_of

RECIPES = ("memit_merge", "rose_no_iga", "rose_no_hki", "rose")
WORDINGS = ("question", "instructed")


def rows_of(editor: Editor, subject: SubjectCases) -> list[Row]:
    """Of each wording (statement, question, instruction) every fact's row, asked as no edit has seen it where the data says how."""
    edits = []
    for case in subject.cases:
        unseen = next((q for q in case.questions if subject.name in q), case.edit.question)
        edits.append(replace(case.edit, question=unseen))
    return [row_of(edit, form, editor.tokenizer) for form in wordings(editor.tokenizer) for edit in edits]


def radius(editor: Editor, rows: Sequence[Row], delta: torch.Tensor, step: float, layer: int, probability: float) -> float:
    """R of one subject around its rows' value with `delta` [d] added."""
    one = torch.tensor([step], device=delta.device)
    found = tolerance_radius(editor.decoder, rows, [0] * len(rows), delta[None], one, layer=layer, probability=probability)
    return float(found.subjects[0])


# What two recipes may differ in that optimise the same value.
WRITE = (
    "name",
    "preconditioner",
    "covariance_weight",
    "null_threshold",
    "columns",
    "ridge",
    "bystanders",
    "waypoints",
    "corpus",
    "corpus_tokens",
)


@dataclass(frozen=True)
class Measured:
    """numbers: by name. layers: R_kept_written and D after each layer that was asked for. values: what was written."""

    numbers: dict[str, float]
    layers: dict[int, dict[str, float]]
    values: Values


def measure(
    editor: Editor,
    subject: SubjectCases,
    recipe: Recipe,
    spectrum: dict[str, Any] | None,
    values: Values | None = None,
    layers: Sequence[int] = (),
) -> Measured:
    """The geometry of one subject's edit, which is taken back; `values`: as found before, to be written otherwise."""
    rows, count = rows_of(editor, subject), len(subject.cases)
    statements, layer = rows[:count], recipe.last_layer
    before = read_state(editor.decoder, rows, recipe.layers)
    before_after = {at: read_state(editor.decoder, rows, [at]).hidden for at in layers}
    step = STEP * float(before.hidden[0].norm())
    began = time.perf_counter()
    with editor.preview(subject.edits, recipe=recipe, verify=False, values=values) as result:
        found = {} if values else {"seconds": time.perf_counter() - began}
        after = read_state(editor.decoder, rows, recipe.layers)
        none = torch.zeros_like(result.values.delta[0])
        found |= {"R_written": radius(editor, statements, none, step, layer, 0.9)}
        found |= {"R_kept_written": radius(editor, statements, none, step, layer, KEPT)}
        by_layer = {}
        for at, hidden in before_after.items():
            R = radius(editor, statements, none, STEP * float(hidden[0].norm()), at, KEPT)
            by_layer[at] = {"R_kept_written": R} | _deviations(hidden, read_state(editor.decoder, rows, [at]).hidden, count)
    value = result.values.delta[0]
    found |= {"R": radius(editor, statements, value, step, layer, 0.9), "R_kept": radius(editor, statements, value, step, layer, KEPT)}
    found |= _deviations(before.hidden, after.hidden, count)
    for i, wording in enumerate(WORDINGS, 1):
        found |= {f"{name}_{wording}": x for name, x in _last_layer(editor, result.delta, recipe, after, count, i, spectrum).items()}
    return Measured(found, by_layer, result.values)


def _deviations(before: torch.Tensor, after: torch.Tensor, count: int) -> dict[str, float]:
    """D by wording from the rows' residual streams [3 * count, d]: statements, then each wording."""
    moved = (after - before).view(3, count, -1)
    return {f"D_{wording}": float((moved[i] - moved[0]).norm(dim=-1).mean()) for i, wording in enumerate(WORDINGS, 1)}


def _last_layer(
    editor: Editor, delta: Any, recipe: Recipe, after: State, count: int, form: int, spectrum: dict[str, Any] | None
) -> dict[str, float]:
    """Eq. 5 of the last edited layer, what eq. 16 makes of it, and the bound of eq. 17 or 18."""
    name = editor.decoder.weight_name(recipe.last_layer)
    k = after.keys[recipe.last_layer].view(3, count, -1)
    (U, V), K = (x.to(k.device) for x in delta.factors[name]), delta.keys[name].to(k.device)
    difference = k[form] - k[0]
    found = {"D_layer": float(deviation((U, V), k[0], k[form]).mean())}
    if recipe.preconditioner == "null_space":
        return found
    if recipe.preconditioner == "covariance":
        least, solve = recipe.covariance_weight * spectrum["least"], covariance(spectrum["factor"], recipe.covariance_weight, ridge=1.0)
    else:
        least, solve = recipe.ridge, lambda x: x / recipe.ridge
    # With protected keys C is larger than this: the bound holds with them too, eq. 16 would be another C's.
    found["bound"] = float(deviation_bound(K, U, difference, least).mean())
    if not recipe.bystanders:
        found["eq16"] = float(first_order(K, U, difference, solve).mean())
    return found


def spectrum_of(editor: Editor, recipe: Recipe) -> dict[str, Any]:
    """Of the second moment in the recipe's last layer: the Cholesky factor, the extreme eigenvalues, and how many hold 99% of the trace."""
    every = moments(editor.decoder, editor.tokenizer, recipe.layers, recipe.corpus, recipe.corpus_tokens, recipe.seed)
    moment = every[editor.decoder.weight_name(recipe.last_layer)]
    values = torch.linalg.eigvalsh(moment).flip(0)
    share = values.cumsum(0) / values.sum()
    found = {"least": float(values[-1]), "largest": float(values[0]), "condition": float(values[0] / values[-1])}
    return {"factor": moment_factor(moment), **found, "rank_99": int((share < 0.99).sum()) + 1, "width": len(values)}


def geometry(
    editor: Editor,
    subjects: Sequence[SubjectCases],
    recipes: dict[str, Recipe],
    forms: Sequence[int] = (),
    layers: Sequence[int] = (),
    sweep: int | None = None,
) -> dict[str, Any]:
    """Means over subjects of all that is measured; `subjects` holds them one by one. Forms and layers, but for the cosines, are of the
    first `sweep` subjects."""
    spectra = {name: spectrum_of(editor, recipe) for name, recipe in recipes.items() if recipe.preconditioner == "covariance"}
    lines: list[dict[str, Any]] = []
    last = next(iter(recipes.values())).last_layer
    keys: dict[int, list[torch.Tensor]] = {layer: [] for layer in (last, *layers)}
    for i, subject in enumerate(subjects):
        swept = sweep is None or i < sweep
        line: dict[str, Any] = {"facts": len(subject.cases), "recipes": {}, "layers": {}, "forms": {}}
        values: dict[Recipe, Values] = {}
        for name, recipe in recipes.items():
            editor.prepare(recipe)
            alike = replace(recipe, **{field: getattr(ROSE, field) for field in WRITE})
            found = measure(editor, subject, recipe, spectra.get(name), values.get(alike), layers if swept else ())
            line["recipes"][name], line["layers"][name], values[alike] = found.numbers, found.layers, found.values
        centroids = next(iter(values.values())).centroids
        if len(centroids) > 1:
            line["conflict"] = conflict(centroids).tolist()
        for n in forms if swept else ():
            found = measure(editor, subject, replace(recipes["rose"], forms=n), None)
            line["forms"][n] = {name: found.numbers[name] for name in ("R", "R_kept", "D_question", "D_instructed", "seconds")}
        for layer, some in read_state(editor.decoder, rows_of(editor, subject), sorted(keys)).keys.items():
            keys[layer].append(some)
        lines.append(line)
        told = "; ".join(f"{name} R {x['R_kept']:.0f} D {x['D_instructed']:.0f}" for name, x in line["recipes"].items())
        note(f"{i + 1}/{len(subjects)} {subject.name}: {told}")
    for spectrum in spectra.values():
        del spectrum["factor"]
    first = lines[:sweep]
    conflicts = [float(off_diagonal(torch.tensor(line["conflict"])).mean()) for line in lines if "conflict" in line]
    return {
        "recipes": {name: _means([line["recipes"][name] for line in lines]) for name in recipes},
        "conflict": fmean(conflicts) if conflicts else None,
        "key_similarity": _similarity(keys[last]),
        "cosines": similarity(torch.stack([k.mean(0) for k in keys[last]])).tolist(),
        "spectrum": spectra,
        "forms": {n: _means([line["forms"][n] for line in first]) for n in forms},
        "layers": {
            n: {name: _means([line["layers"][name][n] for line in first]) for name in recipes} | {"keys": _similarity(keys[n])}
            for n in layers
        },
        "subjects": lines,
    }


def _similarity(keys: Sequence[torch.Tensor]) -> dict[str, float | None]:
    """Mean cosines of keys, [rows, d_in] of each subject."""
    owner = [i for i, some in enumerate(keys) for _ in some]
    return dict(zip(("within", "between"), within_and_between(torch.cat(list(keys)), owner), strict=True))


def _means(lines: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of every number that all lines have."""
    return {name: fmean(line[name] for line in lines) for name in lines[0] if all(name in line for line in lines)}


def draw(found: dict[str, Any], folder: Path) -> None:
    """Write the figures as PNG. Subjects and relations are numbered, so that the figures hold no text of the data."""
    from rose_engine.diagrams import MOST, curve_figure, deviation_figure, matrix_figure, png

    figures = {}
    for name in found["recipes"]:
        lines = [line["recipes"][name] for line in found["subjects"]]
        by_form = {wording: [line[f"D_{wording}"] for line in lines] for wording in WORDINGS}
        figures[f"deviation_{name}"] = deviation_figure([line["R_kept"] for line in lines], by_form, f"{name} (Figs. 2, 7)")
        if found["layers"]:
            layers = list(found["layers"])
            curves = {what: [found["layers"][n][name][what] for n in layers] for what in found["layers"][layers[0]][name]}
            figures[f"layers_{name}"] = curve_figure(layers, curves, "layer", "R, D", f"{name}: after each layer (Fig. 12)")
    if found["forms"]:
        counts = list(found["forms"])
        curves = {what: [found["forms"][n][what] for n in counts] for what in ("R_kept", "D_instructed", "seconds")}
        figures["forms"] = curve_figure(counts, curves, "forms", "R, D; seconds", "number of forms (Fig. 19)")
    if found["conflict"] is not None:
        most = max((line["conflict"] for line in found["subjects"] if "conflict" in line), key=len)
        figures["conflict"] = matrix_figure(most, _numbers(most), "gradient conflict of one subject's facts (Figs. 3, 9)")
    cosines = [row[:MOST] for row in found["cosines"][:MOST]]
    figures["similarity"] = matrix_figure(cosines, _numbers(cosines), "cosine of the subjects' mean keys (Fig. 4)", low=-1)
    write_files(folder, {f"{name}.png": png(figure) for name, figure in figures.items()})


def _numbers(rows: Sequence[Any]) -> list[str]:
    return [str(i + 1) for i in range(len(rows))]


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("bench.geometry", __doc__, count="subjects", default=20)
    parser.set_defaults(dtype="auto")
    parser.add_argument("--recipes", default=",".join(RECIPES), help="recipes by name (`bench.methods`), separated by commas")
    parser.add_argument("--forms", default="", help="numbers of forms to sweep with rose, separated by commas")
    parser.add_argument("--layers", default="", help="layers to measure after, as 4-12 or 4+8+12")
    parser.add_argument("--sweep", type=int, default=None, metavar="N", help="sweep forms and layers on the first N subjects alone (all)")
    parser.add_argument("--plot", type=Path, default=None, metavar="FOLDER", help="write the figures as PNG into this folder")
    args = parser.parse_args(argv)
    if args.sweep is not None and args.sweep < 1:
        parser.error("--sweep must be 1 or more: the subjects to sweep on")
    editor, data = opened(args)
    recipes = {name: method.recipe for name, method in methods_of(args.recipes, editor).items()}
    if None in recipes.values():
        raise SystemExit(f"no recipe of the engine: {', '.join(name for name, recipe in recipes.items() if recipe is None)}")
    if any(recipe.grouping != "subject" for recipe in recipes.values()):
        raise SystemExit("what is measured is the geometry of one value a subject; recipes with a value for each fact have none")
    forms = [int(n) for n in args.forms.split(",") if n.strip()]
    if forms and "rose" not in recipes:
        raise SystemExit("--forms sweeps the recipe rose, which is not among --recipes")
    try:
        layers = layers_of(args.layers) if args.layers else ()
    except ValueError:
        raise SystemExit(f"--layers {args.layers!r}: give layers as 4-12 or 4+8+12") from None
    beyond = [n for n in layers if not 0 <= n < len(editor.decoder.layers) - 1]
    if beyond:
        raise SystemExit(
            f"--layers: there is no layer {beyond[0]} with another above it; the model has 0 to {len(editor.decoder.layers) - 1}"
        )
    found = geometry(editor, data.subjects, recipes, forms, layers, args.sweep)
    if args.plot:
        draw(found, args.plot)
    columns = ("R", "R_written", "R_kept", "R_kept_written", "D_question", "D_instructed", "seconds")
    lines = [f"{'':12s}" + "".join(f"{name:>16s}" for name in columns)]
    lines += [f"{name:12s}" + "".join(f"{row.get(c, float('nan')):16.2f}" for c in columns) for name, row in found["recipes"].items()]
    lines.append(f"conflict {found['conflict']}; key similarity {found['key_similarity']}")
    emit(found, args.json, "\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
