"""Recipes: everything that may be chosen about an edit, as one value; and presets, recipes that suit a known model.

The fields name the symbols of method.md sections 1 and 2. ROSE_PAPER holds the paper's settings (Appendix D.3), ROSE what was found to make
values hold in wordings that they have not seen (docs/value-generalisation.md).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from transformers import PretrainedConfig


@dataclass(frozen=True)
class Recipe:
    """How a value is optimised and how it is written.

    grouping: one value for all facts of a "subject", or one for each "fact". texts: "forms" renders every fact in `forms` linguistic
    forms; "paper_forms" in such as name the subject before its relation; "prefixes" takes the prompt alone and after each of `prefixes`,
    sentences that are sampled from the model with `seed` where none are given. rewordings: how many other statements are found
    for a prompt that brings none (`rewording`); 0 is none. steps, lr: Adam's. weight_decay (wd), kl: the
    regularisers' weights. clamp (c): the value stays within clamp * ||v0|| of v0. stop_loss: a subject leaves once the mean of its
    relations' losses is below; 0 keeps it to the last step. noise: at every step each row's delta is disturbed by this share of its length
    in a Gaussian direction of its own, drawn with `seed`, so that what is found stays good around itself; 0 is none. fisher: a direction
    on which the model's answers about others depend as on the average one is shrunk by sqrt(1 + fisher) beside one of which they are
    independent (`fisher`; the answers are drawn with `seed`); 0 shrinks none.
    layers: the edited layers; the last is L. columns: "row" writes one key for each fact in a form, "mean" one for a value.
    preconditioner: C is the "identity" times ridge (eq. 10), the "covariance" covariance_weight * E[k k^T] (ridge cancels), or the
    "null_space" below null_threshold of E[k k^T] is kept, with ridge. corpus: what E is taken over, `corpus_tokens` tokens of it: "model"
    is text sampled from the model with `seed`; else see `moments.texts_of`. bystanders: how many texts about other subjects the write
    keeps from moving, two thirds of them in the words of the edits and their rewordings, and six more a subject, and more statements
    where several subjects are in the weights (`bystanders`); 0 is none. waypoints: how often the cost of the writes is evaluated to
    choose what each layer writes (`waypoints`), three times as often where several subjects are in the weights; 0 writes an even share
    in each, which values of a larger loss than `waypoints.LEARNT` are given always. sequential: "joint" solves a write together with all
    earlier ones (`memory`) and does a subject's earlier facts again with its new ones; "protect" does the first alone; "plain" does
    neither.
    """

    name: str = "rose"
    grouping: Literal["subject", "fact"] = "subject"
    texts: Literal["forms", "paper_forms", "prefixes"] = "forms"
    forms: int = 8
    prefixes: tuple[str, ...] = ()
    rewordings: int = 2
    steps: int = 80
    lr: float = 0.5
    weight_decay: float = 0.5
    kl: float = 0.0625
    clamp: float = 4.0
    stop_loss: float = 0.05
    noise: float = 0.1
    fisher: float = 0.0
    layers: tuple[int, ...] = (4, 5, 6, 7, 8)
    columns: Literal["row", "mean"] = "row"
    ridge: float = 1.0
    preconditioner: Literal["identity", "covariance", "null_space"] = "identity"
    covariance_weight: float = 15_000.0
    null_threshold: float = 2e-2
    corpus: str = "model"
    corpus_tokens: int = 32_768
    bystanders: int = 288
    waypoints: int = 20
    sequential: Literal["joint", "protect", "plain"] = "joint"
    seed: int = 0

    def __post_init__(self):
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise ValueError(f"layers must be ascending layer numbers, given {self.layers}")
        for name, choices in get_type_hints(Recipe).items():
            if get_origin(choices) is Literal and getattr(self, name) not in get_args(choices):
                known = " or ".join(repr(choice) for choice in get_args(choices))
                raise ValueError(f"{name} must be {known}, given {getattr(self, name)!r}")
        for name in ("steps", "lr", "clamp", "ridge", "covariance_weight", "null_threshold", "corpus_tokens"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, given {getattr(self, name)}")
        for name in ("weight_decay", "kl", "stop_loss", "noise", "fisher", "bystanders", "waypoints", "rewordings"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, given {getattr(self, name)}")
        if self.waypoints and (self.columns, self.grouping) != ("row", "subject"):
            raise ValueError("waypoints are chosen for a column a row and a value a subject; waypoints=0 writes even shares of others")
        if self.fisher == math.inf:
            raise ValueError("fisher must be finite, given inf")

    @property
    def last_layer(self) -> int:
        """L, the layer after which the value is read and injected."""
        return self.layers[-1]

    def as_dict(self) -> dict[str, Any]:
        """Every field, for metadata."""
        return asdict(self)


ROSE = Recipe()
ROSE_PAPER = replace(ROSE, name="rose_paper", texts="paper_forms", rewordings=0, steps=35, noise=0.0, bystanders=0, waypoints=0)
# method.md section 3. The published methods that the engine can express, all with MEMIT-Merge's optimisation, which is that of the paper's
# RoSE too (Appendix D.3), so that they differ in what section 3 names alone.
MEMIT_MERGE = replace(ROSE_PAPER, name="memit_merge", texts="prefixes", columns="mean", preconditioner="covariance", sequential="plain")
MEMIT = replace(MEMIT_MERGE, name="memit", grouping="fact")
ALPHAEDIT = replace(MEMIT, name="alphaedit", preconditioner="null_space", sequential="protect")
# Meng et al. 2022a, eq. 2: the mean key's output moves by exactly the residual, with the least change in the metric of the covariance:
# a covariance of next to no weight. That holds for one fact in one layer: `apply` takes one fact at a time with it.
ROME = replace(MEMIT, name="rome", layers=(5,), covariance_weight=1e-4)
# Chosen on same-subject data; what was tried stands in docs/smollm2-preset.md.
SMOLLM2 = replace(ROSE, name="rose-smollm2", lr=1.4, fisher=3.0, ridge=30.0)


def preset(config: PretrainedConfig) -> Recipe:
    """The recipe that suits a model, by its configuration: ROSE where nothing better was measured, with the layers of `layers_of_depth`.

    Of models other than the embedded one, made-up ones of 12 layers alone were measured (docs/value-generalisation.md).
    """
    if config.model_type == "llama" and config.num_hidden_layers == 30 and config.hidden_size == 576:
        return SMOLLM2
    return replace(ROSE, layers=layers_of_depth(config.num_hidden_layers))


def layers_of_depth(count: int) -> tuple[int, ...]:
    """The edited layers of a model of so many: the paper's 4 to 8 of 28 and more, of fewer those at the same share of the depth."""
    depth = min(count, 28)
    return tuple(range(depth // 7, depth * 2 // 7 + 1))
