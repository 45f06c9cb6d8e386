"""The certificate of an edit: for each subject tolerance radius, deviation by form, verdict and neighbours; and what it does to others.

The verdict is the paper's condition D <= R (section 3.2), measured on the weights as they were written against the unedited ones: R of all
the subject's facts in their prompts, D in an instruction that no edit uses. What the quantities are is `geometry`'s;
docs/geometry.md shows what the verdict is worth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rose_engine.architecture import Decoder
from rose_engine.edits import Edit
from rose_engine.forms import STATEMENT, Form, Row, row_of
from rose_engine.geometry import STEP, State, conflict, deviation, read_state, tolerance_radius
from rose_engine.verify import INSTRUCTED_CHAT, INSTRUCTED_PLAIN

# The probability that a target keeps within R. The paper asks for 0.9, which the values of small models do not reach; with this one D <= R
# tells facts that are recalled when asked from facts that are not (docs/geometry.md).
KEPT = 0.25
# Keys of two subjects with a larger cosine pull at each other (the paper's iPhone 11 and iPhone 16 have 0.5).
NEAR = 0.3
# Subjects that no edit should move, where the caller names none.
OTHERS = ("Johannes Brahms", "Canada", "Volvo", "Barcelona", "the University of Tokyo", "Marie Curie")
# So many prompts of the edits are read with each of these names in the subject's place.
PROMPTS = 4

QUESTION = Form("question", ("How does this go on? ", ""), ("", ""))


@dataclass(frozen=True)
class FactCertificate:
    """A fact: probability of its target after the edit; radius (R) of its statement alone and deviation (D) by form, in units of the
    residual stream."""

    prompt: str
    target: str
    probability: float
    radius: float
    deviation: Mapping[str, float]


@dataclass(frozen=True)
class SubjectCertificate:
    """A subject: radius (R) of all its facts together and deviation (D) by form, the mean over its facts, in units of the residual stream.
    by_layer: eq. 5 for each edited layer alone, at the projection's output. conflict [M][M]: eq. 6 between its facts, None where they are
    one or a gradient vanishes. neighbours: the edited subjects whose keys lie nearest, with the cosine."""

    subject: str
    radius: float
    deviation: Mapping[str, float]
    by_layer: Mapping[str, Mapping[str, float]]
    conflict: list[list[float]] | None
    neighbours: tuple[tuple[str, float], ...]
    facts: tuple[FactCertificate, ...]

    @property
    def margin(self) -> dict[str, float]:
        """R - D by form."""
        return {form: self.radius - deviation for form, deviation in self.deviation.items()}

    @property
    def holds(self) -> bool:
        """The verdict: D <= R where the model is asked in an instruction."""
        return self.margin["instructed"] >= 0

    @property
    def near(self) -> list[str]:
        """Neighbours so near that an edit of one is likely to change the other."""
        return [name for name, cosine in self.neighbours if cosine > NEAR]


@dataclass(frozen=True)
class Interference:
    """A subject that was not edited: shift, how far its residual stream moved in the prompts of the edits, as a share of how far the
    edited subjects' moved; and the edited subject whose key is nearest, with the cosine."""

    subject: str
    shift: float
    nearest: str
    cosine: float


@dataclass(frozen=True)
class Certificate:
    """kept: the probability that defines the radii."""

    kept: float
    subjects: tuple[SubjectCertificate, ...]
    others: tuple[Interference, ...]

    def as_dict(self) -> dict[str, Any]:
        """The certificate as JSON values, with margins and verdicts."""
        found = asdict(self)
        for record, subject in zip(found["subjects"], self.subjects, strict=True):
            record |= {"margin": subject.margin, "holds": subject.holds, "near": subject.near}
        return found


# Heads and rows.
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def tables(certificate: Certificate, neighbours: int = 1) -> list[Table]:
    """The certificate as texts: its subjects with so many neighbours each, and, where some were read, the subjects that were not edited."""
    subjects = [
        (
            s.subject,
            *(f"{x:.1f}" for x in (s.radius, *s.deviation.values(), s.margin["instructed"])),
            "D <= R" if s.holds else "D > R",
            ", ".join(f"{name} {cosine:.2f}{' (near)' if name in s.near else ''}" for name, cosine in s.neighbours[:neighbours]),
        )
        for s in certificate.subjects
    ]
    others = [(o.subject, f"{o.shift:.1%}", o.nearest, f"{o.cosine:.2f}") for o in certificate.others]
    every = [(("subject", "R", "D question", "D instructed", "R - D", "verdict", "nearest edited subject"), subjects)]
    return every + [(("not edited", "moved, of the edited", "nearest edited subject", "cosine"), others)] * bool(others)


@dataclass(frozen=True)
class Observation:
    """Rows that are read before and after an edit: of every fact the statement, the question and the instruction in turn, then `others`,
    each (name, rows)."""

    edits: tuple[Edit, ...]
    facts: tuple[Row, ...]
    others: tuple[tuple[str, tuple[Row, ...]], ...]
    layers: tuple[int, ...]

    @property
    def rows(self) -> list[Row]:
        """All of them."""
        return [*self.facts, *(row for _, rows in self.others for row in rows)]

    def read(self, decoder: Decoder) -> State:
        """The model as it is now."""
        return read_state(decoder, self.rows, self.layers)


def wordings(tokenizer: Any) -> tuple[Form, Form, Form]:
    """The statement that is edited, and the wordings whose deviation counts: none of them is among the forms of an edit."""
    return STATEMENT, QUESTION, INSTRUCTED_CHAT if tokenizer.chat_template else INSTRUCTED_PLAIN


def observation(tokenizer: Any, edits: Sequence[Edit], others: Sequence[str] | None, layers: Sequence[int], max_length: int) -> Observation:
    """What to read of these edits, and of `others` (None: `OTHERS`) in their prompts. EditError as `row_of`."""
    facts = tuple(row_of(edit, form, tokenizer, max_length) for edit in edits for form in wordings(tokenizer))
    edited = {edit.subject.strip().casefold() for edit in edits}
    names = [name for name in (OTHERS if others is None else others) if name.strip().casefold() not in edited]
    prompts = list({edit.prompt: edit for edit in edits}.values())[:PROMPTS]
    told = lambda name: tuple(row_of(replace(e, subject=name, question=None), STATEMENT, tokenizer, max_length) for e in prompts)  # noqa: E731
    return Observation(tuple(edits), facts, tuple((name, told(name)) for name in names), tuple(layers))


@torch.no_grad()
def certificate_of(
    decoder: Decoder,
    seen: Observation,
    before: State,
    after: State,
    factors: Mapping[int, tuple[Tensor, Tensor]],
    keys: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    kept: float = KEPT,
) -> Certificate:
    """The certificate of edits that are in the weights now.

    before, after: what `seen` read of the model without them and with them. factors: layer -> (U, V), the weights' change. keys: subject ->
    unit vector [d_in], its mean key in the last layer, of every edited subject. gradients: subject -> its relations' centroids [M, d].
    """
    edits, forms = seen.edits, 3
    names = list(dict.fromkeys(edit.subject.strip() for edit in edits))
    owner = [names.index(edit.subject.strip()) for edit in edits]
    moved = (after.hidden - before.hidden)[: len(seen.facts)].view(len(edits), forms, -1)
    shift = (moved[:, 1:] - moved[:, :1]).norm(dim=-1)  # the sum over the edited layers of what eq. 5 says of one
    layers = {}
    for layer, (U, V) in factors.items():
        k = after.keys[layer][: len(seen.facts)].view(len(edits), forms, -1)
        layers[layer] = torch.stack([deviation((U, V), k[:, form], k[:, 0]) for form in range(1, forms)], 1)

    norm = before.hidden[: len(seen.facts) : forms].norm(dim=-1)
    step = STEP * norm[[owner.index(s) for s in range(len(names))]]
    none = moved.new_zeros(len(names), moved.shape[-1])
    radii = tolerance_radius(decoder, seen.facts[::forms], owner, none, step, layer=seen.layers[-1], probability=kept)

    told = ("question", "instructed")
    facts = [
        FactCertificate(e.prompt, e.target, p, r, dict(zip(told, d, strict=True)))
        for e, p, r, d in zip(edits, radii.probability.tolist(), radii.facts.tolist(), shift.tolist(), strict=True)
    ]
    mean = lambda x, s: dict(zip(told, x[[i for i, o in enumerate(owner) if o == s]].mean(0).tolist(), strict=True))  # noqa: E731
    subjects = tuple(
        SubjectCertificate(
            name,
            radius,
            mean(shift, s),
            {str(layer): mean(x, s) for layer, x in layers.items()},
            _conflict(gradients.get(name)),
            _nearest(keys.get(name), {other: key for other, key in keys.items() if other != name}),
            tuple(fact for fact, o in zip(facts, owner, strict=True) if o == s),
        )
        for s, (name, radius) in enumerate(zip(names, radii.subjects.tolist(), strict=True))
    )
    return Certificate(kept, subjects, _interference(seen, before, after, moved[:, 0], keys))


def _conflict(gradients: Tensor | None) -> list[list[float]] | None:
    if gradients is None or len(gradients) < 2 or not gradients.norm(dim=-1).all():
        return None
    return conflict(gradients).tolist()


def _nearest(key: Tensor | None, others: Mapping[str, Tensor], count: int = 3) -> tuple[tuple[str, float], ...]:
    if key is None or not others:
        return ()
    cosine = torch.stack(list(others.values())) @ key
    value, index = cosine.topk(min(count, len(others)))
    names = list(others)
    return tuple((names[i], v) for i, v in zip(index.tolist(), value.tolist(), strict=True))


def _interference(seen: Observation, before: State, after: State, moved: Tensor, keys: Mapping[str, Tensor]) -> tuple[Interference, ...]:
    found, first, layer = [], len(seen.facts), seen.layers[-1]
    scale = moved.norm(dim=-1).mean()
    for name, rows in seen.others:
        place = slice(first, first := first + len(rows))
        shift = (after.hidden[place] - before.hidden[place]).norm(dim=-1).mean()
        shift = shift / scale if scale > 0 else 0.0  # facts that the model knew move nothing
        (nearest, cosine), *_ = _nearest(mean_key(before.keys[layer][place]), keys) or (("", 0.0),)
        found.append(Interference(name, float(shift), nearest, cosine))
    return tuple(found)


def mean_key(keys: Tensor) -> Tensor:
    """The direction [d_in] of several keys [n, d_in], each of the same weight; a zero key of a damaged row counts for nothing."""
    mean = torch.nn.functional.normalize(keys, dim=1).sum(0)
    return torch.nn.functional.normalize(mean, dim=0)


def subject_keys(name: str, deltas: Sequence[Any]) -> dict[str, Tensor]:
    """Of every subject that the deltas edit its mean key in the weight `name`, from its latest delta that has keys there."""
    found: dict[str, Tensor] = {}
    for delta in deltas:
        owners = [delta.subjects[c].strip() for c in delta.columns] if name in delta.keys else []
        for subject in dict.fromkeys(owners):
            found[subject] = mean_key(delta.keys[name].T[[owner == subject for owner in owners]])
    return found
