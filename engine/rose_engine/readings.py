"""What recipes read off the unedited model, once: rewordings, the coordinates of values, sampled prefixes, and second moments.

The default recipe needs the first, the embedded model's preset the first two; MEMIT's and AlphaEdit's need the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, broadcast

from rose_engine.architecture import Decoder
from rose_engine.fisher import Coordinates, coordinates, fisher_information
from rose_engine.moments import MODEL, moments
from rose_engine.parallel import of_the_first
from rose_engine.precondition import Base, covariance, identity, moment_factor, moment_null_space, null_space
from rose_engine.recipe import Recipe
from rose_engine.rewording import written
from rose_engine.sample import beginning, sample_prefixes
from rose_engine.statements import STATEMENTS

# Prompts whose rewordings are kept at one time.
PROMPTS = 4096


class Readings:
    """Kept as long as the model is. unedited: a context in which the model has its unedited weights. groups: of ranks that must agree."""

    def __init__(
        self, decoder: Decoder, tokenizer: Any, unedited: Callable[[], AbstractContextManager[None]], groups: Sequence[ProcessGroup] = ()
    ):
        self._decoder, self._tokenizer, self._unedited, self._groups = decoder, tokenizer, unedited, groups
        self._written: dict[tuple[str, str], list[str]] = {}
        self._prefixes: dict[int, tuple[str, ...]] = {}
        self._parts: dict[tuple[Any, ...], Tensor] = {}
        self._bases: dict[tuple[Any, ...], Base] = {}
        self._coordinates: dict[tuple[Any, ...], Coordinates] = {}

    def rewordings(self, name: str, prompts: Sequence[str]) -> list[list[str]]:
        """What is found for prompts with a name in their place (`rewording.written`)."""
        new = [prompt for prompt in prompts if (name, prompt) not in self._written]
        if new:
            if len(self._written) >= PROMPTS:
                self._written.clear()
                new = list(prompts)
            with self._unedited():
                found = written(self._decoder, self._tokenizer, name, new)
            for group in self._groups:
                found = of_the_first(found, group)
            self._written.update({(name, prompt): texts for prompt, texts in zip(new, found, strict=True)})
        return [self._written[name, prompt] for prompt in prompts]

    def complete(self, recipe: Recipe) -> Recipe:
        """Read what a recipe needs beside coordinates; returns it with its prefixes."""
        if recipe.texts == "prefixes" and not recipe.prefixes:
            if recipe.seed not in self._prefixes:
                with self._unedited():
                    self._prefixes[recipe.seed] = sample_prefixes(self._decoder.model, self._tokenizer, recipe.seed)
            recipe = replace(recipe, prefixes=self._prefixes[recipe.seed])
        for layer in recipe.layers:
            self.base(recipe, self._decoder.weight_name(layer))
        return recipe

    def coordinates(self, recipe: Recipe) -> Coordinates | None:
        """Those in which a recipe's values are optimised, or None (`fisher`)."""
        about = (recipe.fisher, recipe.layers, recipe.seed)
        if recipe.fisher and about not in self._coordinates:
            texts = [beginning(self._tokenizer, text) for text in STATEMENTS]
            with self._unedited():
                found = coordinates(fisher_information(self._decoder, texts, recipe.layers, recipe.seed), recipe.fisher)
            for group in self._groups:
                broadcast(found, group=group, group_src=0)
            self._coordinates[about] = Coordinates(found, float(torch.linalg.matrix_norm(found, 2)))
        return self._coordinates.get(about)

    def base(self, recipe: Recipe, name: str) -> Base:
        """What a weight's preconditioner is made on: the same object as long as nothing about it changes."""
        if recipe.preconditioner == "identity":
            return identity
        part, scale = self._part(recipe, name), (recipe.covariance_weight, recipe.ridge)
        make = partial(null_space, part) if recipe.preconditioner == "null_space" else partial(covariance, part, *scale)
        return self._bases.setdefault((id(part), *scale), make())

    def _part(self, recipe: Recipe, name: str) -> Tensor:
        """Of a weight's second moment the Cholesky factor, or the null space's basis."""
        threshold = recipe.null_threshold if recipe.preconditioner == "null_space" else None
        about = (recipe.corpus, recipe.corpus_tokens, recipe.seed if recipe.corpus == MODEL else None, threshold)
        if (name, *about) not in self._parts:
            with self._unedited():
                found = moments(self._decoder, self._tokenizer, recipe.layers, recipe.corpus, recipe.corpus_tokens, recipe.seed)
            for weight, moment in found.items():
                if (weight, *about) not in self._parts:
                    part = moment_factor(moment) if threshold is None else moment_null_space(moment, threshold)
                    self._parts[weight, *about] = part
        return self._parts[name, *about]
