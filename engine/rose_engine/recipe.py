"""Recipes: everything that may be chosen about an edit, as one value; and presets, recipes that suit a known model.

The fields name the symbols of method.md sections 1 and 2. ROSE holds the paper's settings (Appendix D.3).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from transformers import PretrainedConfig


@dataclass(frozen=True)
class Recipe:
    """How a value is optimised and how it is written.

    forms: linguistic forms under each relation. steps, lr: Adam's. weight_decay (wd), kl: the regularisers' weights. clamp (c): the
    value stays within clamp * ||v0|| of v0. stop_loss: a subject leaves once the mean of its relations' losses is below; 0 keeps
    it to the last step.
    layers: the edited layers; the last is L. columns: "row" writes one key for each fact in a form, "mean" one for a subject.
    ridge: the identity's weight in eq. 10. bystanders: how many prompts about other subjects the write keeps from moving
    (`precondition.Protected`); 0 is the paper's identity alone. sequential: "joint" solves a write together with all earlier ones
    (`memory`) and does a subject's earlier facts again with its new ones; "plain" does neither.
    """

    name: str = "rose"
    forms: int = 8
    steps: int = 35
    lr: float = 0.5
    weight_decay: float = 0.5
    kl: float = 0.0625
    clamp: float = 4.0
    stop_loss: float = 0.05
    layers: tuple[int, ...] = (4, 5, 6, 7, 8)
    columns: Literal["row", "mean"] = "row"
    ridge: float = 1.0
    bystanders: int = 0
    sequential: Literal["joint", "plain"] = "joint"

    def __post_init__(self):
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise ValueError(f"layers must be ascending layer numbers, given {self.layers}")
        if self.columns not in ("row", "mean"):
            raise ValueError(f"columns must be 'row' or 'mean', given {self.columns!r}")
        if self.sequential not in ("joint", "plain"):
            raise ValueError(f"sequential must be 'joint' or 'plain', given {self.sequential!r}")
        for name in ("steps", "lr", "clamp", "ridge"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, given {getattr(self, name)}")
        for name in ("weight_decay", "kl", "stop_loss", "bystanders"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, given {getattr(self, name)}")

    @property
    def last_layer(self) -> int:
        """L, the layer after which the value is read and injected."""
        return self.layers[-1]

    def as_dict(self) -> dict[str, Any]:
        """Every field, for metadata."""
        return asdict(self)


ROSE = Recipe()
# Chosen on same-subject data; what was tried stands in docs/smollm2-preset.md.
SMOLLM2 = replace(ROSE, name="rose-smollm2", steps=40, lr=0.7, ridge=10.0, bystanders=64)


def preset(config: PretrainedConfig) -> Recipe:
    """The recipe that suits a model, by its configuration: ROSE where nothing better was measured."""
    if config.model_type == "llama" and config.num_hidden_layers == 30 and config.hidden_size == 576:
        return SMOLLM2
    return ROSE
