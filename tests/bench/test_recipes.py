"""The published methods as recipes of the engine, against their plain programs: values to 1e-3, weights to 1e-4, relative."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rose_engine import Edit, Editor
from rose_engine import editor as editing
from rose_engine.moments import moments
from rose_engine.recipe import ALPHAEDIT, MEMIT, MEMIT_MERGE, ROME

from bench.baselines import alphaedit, memit_merge, rome
from bench.baselines.memit_merge import Settings

PREFIXES = ("The rain has gone. ", "Therefore we went home at last. ", "I think that you know it. ")
FACTS = (
    Edit("Lin Nu", "{} follows the religion of", "Islam"),
    Edit("Lin Nu", "The city in which {} worked is", "Madrid"),
    Edit("Henri Marteau", "{} plays the instrument", "harp"),
    Edit("Henri Marteau", "{} was born in", "Quito"),
)
NAMES, NOUNS, WORDS = ("Peru", "my friend", "Ada", "the sea", "Kyoto"), ("river", "king", "music", "price"), ("old", "near it", "42")
TEXTS = [f"The {noun} of {name} is {word}, and {name} has more of them.\n" for name in NAMES for noun in NOUNS for word in WORDS]


def plain_program(recipe, model, tokenizer, C, settings):
    """The plain method's values; the model is edited."""
    prefixes = ("", *PREFIXES)
    if recipe.name == "rome":
        return rome.edit(model, tokenizer, FACTS, C, prefixes, replace(settings, merge=False))
    if recipe.name == "alphaedit":
        Pi = alphaedit.projectors(C, recipe.null_threshold)
        settings = replace(settings, merge=False)
        first, earlier = alphaedit.edit(model, tokenizer, FACTS[:2], Pi, {}, settings, prefixes)
        return first + alphaedit.edit(model, tokenizer, FACTS[2:], Pi, earlier, settings, prefixes)[0]
    return memit_merge.edit(model, tokenizer, FACTS, C, replace(settings, merge=recipe.grouping == "subject"), prefixes).values


def check(editor, recipe, texts, tmp_path, monkeypatch, same_moments=False):
    """same_moments: the plain program is given the engine's; a corpus that is small for the model's width leaves directions to rounding."""
    (tmp_path / "corpus.txt").write_text("".join(texts))
    recipe = replace(recipe, prefixes=PREFIXES, stop_loss=0.0, corpus=str(tmp_path / "corpus.txt"), corpus_tokens=20_000)
    plain = copy.deepcopy(editor.model)
    z = []

    def spy(*args, **options):
        values = optimize(*args, **options)
        z.append(values.v0 + values.delta)
        return values

    optimize = editing.optimize_spread
    monkeypatch.setattr(editing, "optimize_spread", spy)
    calls = {"rome": [FACTS[i : i + 1] for i in range(4)], "alphaedit": [FACTS[:2], FACTS[2:]]}.get(recipe.name, [FACTS])
    before = {layer: editor.decoder.projection(layer).weight.clone() for layer in recipe.layers}
    second = moments(editor.decoder, editor.tokenizer, recipe.layers, recipe.corpus, recipe.corpus_tokens, recipe.seed)
    for facts in calls:
        editor.apply(facts, recipe=recipe, verify=False)
    settings = Settings(recipe.layers, recipe.steps, recipe.lr, covariance_weight=recipe.covariance_weight)
    if same_moments:
        C = dict(zip(recipe.layers, second.values(), strict=True))
    else:
        C = memit_merge.covariance(plain, editor.tokenizer, texts, recipe.layers)
    theirs = torch.stack([value.z for value in plain_program(recipe, plain, editor.tokenizer, C, settings)])
    ours = torch.cat(z)
    print(recipe.name, "values", float((ours - theirs).norm() / theirs.norm()))
    assert ours.shape == theirs.shape and (ours - theirs).norm() <= 1e-3 * theirs.norm()
    for layer, unedited in before.items():
        weight = plain.model.layers[layer].mlp.down_proj.weight
        difference = (editor.decoder.projection(layer).weight - weight).norm()
        print(recipe.name, "layer", layer, float(difference / weight.norm()), float((weight - unedited).norm() / weight.norm()))
        assert difference <= 1e-4 * weight.norm() and difference <= 2e-2 * (weight - unedited).norm()
    while editor.applied:
        editor.revert(editor.applied[-1])


RECIPES = pytest.mark.parametrize("recipe", [MEMIT, MEMIT_MERGE, ALPHAEDIT, ROME], ids=lambda recipe: recipe.name)


@RECIPES
def test_recipes_are_the_plain_programs(make_model, tokenizer, recipe, own_cache, tmp_path, monkeypatch):
    editor = Editor(make_model(seed=3, initializer_range=0.2), tokenizer)
    layers = (2,) if recipe.name == "rome" else (1, 2, 4)
    weight = recipe.covariance_weight if recipe.name == "rome" else 0.5
    recipe = replace(recipe, layers=layers, steps=5, lr=0.05, covariance_weight=weight, null_threshold=1.0)
    check(editor, recipe, TEXTS * 4, tmp_path, monkeypatch)


@pytest.mark.slow
@RECIPES
def test_recipes_are_the_plain_programs_on_the_embedded_model(smollm2, recipe, own_cache, tmp_path, monkeypatch):
    """35 steps with the published settings, moments over this project's own text."""
    root = Path(__file__).parents[2]
    lines = [
        line for file in [*root.glob("*.md"), *root.glob("engine/*/*.py")] for line in file.read_text().splitlines(True) if line.strip()
    ]
    check(smollm2, recipe, lines, tmp_path, monkeypatch, same_moments=True)
