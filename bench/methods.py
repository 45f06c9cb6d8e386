"""Methods by name: how each edits a model, and takes its edits back.

A method is a recipe of the engine (method.md section 3) or a baseline with machinery of its own. A name may carry settings of its recipe:
`rose[forms=4;layers=2-6]`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

from rose_engine import Edit, Editor, Recipe
from rose_engine.recipe import ALPHAEDIT, MEMIT, MEMIT_MERGE, ROME, ROSE_PAPER

from bench.baselines import grace, wise
from bench.memory import Memory

# edit(editor, batches, seed): a context in which the model is edited, each batch on top of the ones before.
EditWithin = Callable[[Editor, Sequence[Sequence[Edit]], int], AbstractContextManager[None]]


@dataclass(frozen=True)
class Method:
    """recipe: of the engine; one_by_one: a call for each fact. edit: a baseline of its own, random: which draws from a seed.
    Neither recipe nor edit: the model as it is."""

    recipe: Recipe | None = None
    one_by_one: bool = False
    edit: EditWithin | None = None
    random: bool = False

    @property
    def seeded(self) -> bool:
        """Whether another seed gives another result."""
        r = self.recipe
        return self.random or bool(r and (r.texts == "prefixes" or r.preconditioner != "identity" or r.noise or r.fisher))


def known(editor: Editor) -> dict[str, Method]:
    """Every method that has a name. rose is the model's preset, rose_paper the paper's settings; the ablations are the preset's. All
    edit the layers of the preset, ROME the second of them (layer 5 of 4 to 8, where it is published)."""
    rose, layers = editor.recipe, editor.recipe.layers
    at_these = partial(replace, layers=layers)
    return {
        "vanilla": Method(),
        "rome": Method(replace(ROME, layers=(layers[min(1, len(layers) - 1)],)), one_by_one=True),
        "memit": Method(at_these(MEMIT)),
        "alphaedit": Method(at_these(ALPHAEDIT)),
        "memit_merge": Method(at_these(MEMIT_MERGE)),
        "rose": Method(rose),
        "rose_paper": Method(at_these(ROSE_PAPER)),
        "rose_no_iga": Method(replace(rose, name="rose_no_iga", preconditioner="covariance", bystanders=0)),
        "rose_no_hki": Method(replace(rose, name="rose_no_hki", texts="prefixes", rewordings=0)),
        "wise": Method(edit=wise.edited, random=True),
        "grace": Method(edit=grace.edited),
    }


def methods_of(names: str, editor: Editor) -> dict[str, Method]:
    """The methods of a comma-separated list. SystemExit names what is not known, and what is."""
    methods, every = {}, known(editor)
    for name in filter(None, (name.strip() for name in names.split(","))):
        base, found, settings = name.partition("[")
        if base not in every:
            raise SystemExit(f"unknown recipe {base!r}; known are {', '.join(every)}")
        method = every[base]
        if found:
            if method.recipe is None or not settings.endswith("]"):
                raise SystemExit(f"{name!r}: settings stand in brackets after the name of a recipe of the engine")
            method = replace(method, recipe=_with_settings(method.recipe, settings[:-1], name))
        methods[name] = method
    return methods


def _with_settings(recipe: Recipe, settings: str, name: str) -> Recipe:
    values: dict[str, Any] = {}
    types = {f.name: type(getattr(recipe, f.name)) for f in fields(recipe) if f.name not in ("name", "prefixes", "seed")}
    for setting in settings.split(";"):
        key, found, text = (part.strip() for part in setting.partition("="))
        if not found or key not in types:
            raise SystemExit(f"{name!r}: {setting!r} is no setting; known are {', '.join(types)}")
        try:
            values[key] = layers_of(text) if key == "layers" else types[key](text)
        except (ValueError, TypeError) as e:
            raise SystemExit(f"{name!r}: {setting!r}: {e}") from e
    try:
        return replace(recipe, **values)
    except ValueError as e:
        raise SystemExit(f"{name!r}: {e}") from e


def layers_of(text: str) -> tuple[int, ...]:
    """Layer numbers, written `4-8` or `4+6+8`. ValueError where they are not."""
    first, found, last = text.partition("-")
    if found and int(first) > int(last):
        raise ValueError(f"{text} counts down")
    return tuple(range(int(first), int(last) + 1)) if found else tuple(int(layer) for layer in text.split("+"))


@contextmanager
def edited(
    editor: Editor, method: Method, batches: Sequence[Sequence[Edit]], seed: int, without: Collection[str] = ()
) -> Iterator[dict[str, Any]]:
    """Edit within a `with` block, each batch on top of the ones before; its end takes everything back. `without`: the prompts of the
    evaluation, which no rewording may say.

    Gives {"seconds", "peak_mb"} of the editing, without what a recipe needs once (`Editor.prepare`); peak_mb above what the process
    held, None where the system does not tell.
    """
    if method.recipe is not None:
        editor.prepare(replace(method.recipe, seed=seed))
    cost: dict[str, Any] = {"seconds": 0.0, "peak_mb": None}
    try:
        memory = Memory(editor.model.device.type == "cuda")
    except OSError:
        memory = None
    began, before = time.perf_counter(), editor.applied

    def spent() -> dict[str, Any]:
        cost["seconds"] = time.perf_counter() - began
        cost["peak_mb"] = memory.peak_mb() if memory else None
        return cost

    if method.edit is not None:
        with method.edit(editor, batches, seed):
            yield spent()
        return
    try:
        for batch in batches if method.recipe is not None else ():
            apply(editor, method, batch, seed, without)
        yield spent()
    finally:
        if editor.applied != before:
            editor.restore(before)


def apply(editor: Editor, method: Method, edits: Sequence[Edit], seed: int, without: Collection[str] = ()) -> None:
    """Apply edits with the method's recipe."""
    recipe = replace(method.recipe, seed=seed)
    if recipe.rewordings:
        edits = editor.reword(edits, count=recipe.rewordings, without=without)
        recipe = replace(recipe, rewordings=0)
    for some in ([edit] for edit in edits) if method.one_by_one else (edits,):
        editor.apply(some, recipe=recipe, verify=False)
