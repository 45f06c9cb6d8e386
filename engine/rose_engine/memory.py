"""Memory: the keys that earlier edits wrote, which a later write leaves where they are.

A write on top of others is a step of recursive least squares around the unedited weights: with the earlier keys K_o protected
(C = ridge I + K_o K_o^T) and the residual still missing, R - dW_o K, the weights become what one write of all columns would have made,
dW = R_all (ridge I + K_all^T K_all)^-1 K_all^T. That holds for subjects edited once and without bystanders, whose keys are protected in
the one write and not remembered. The keys stand in the deltas. A subject that is edited again brings its earlier facts along; its old
columns are no longer protected, so that the new ones, at nearly the same keys, overwrite them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

from torch import Tensor

from rose_engine.delta import Delta
from rose_engine.edits import Edit, with_rewordings_of
from rose_engine.precondition import Preconditioner


def facts_in(deltas: Sequence[Delta]) -> list[Edit]:
    """The edits of the deltas, in order. DeltaError where one of them is not an edit."""
    return [edit for delta in deltas for edit in delta.edits]


def found_in(edits: Sequence[Edit], told: Sequence[Edit]) -> dict[str, list[str]]:
    """The rewordings that were found for prompts of edits which bring none, by prompt, a prompt's first ones; told: the edits with them."""
    found: dict[str, list[str]] = {}
    for edit, other in zip(edits, told, strict=True):
        if other.rewordings and not edit.rewordings:
            found.setdefault(edit.texts[0], list(other.rewordings))
    return found


def rewordings_in(deltas: Sequence[Delta]) -> dict[str, list[str]]:
    """What was found for prompts when the deltas were made, by prompt; a prompt's first count."""
    return {prompt: texts for delta in reversed(deltas) for prompt, texts in delta.metadata.get("rewordings", {}).items()}


def latest(edits: Iterable[Edit]) -> list[Edit]:
    """Of edits of one subject that share a prompt or a rewording those with the last one's target, each once, with all its rewordings;
    white space around texts does not count."""
    facts: dict[str, list[Edit]] = {}
    for edit in edits:
        known = facts.setdefault(edit.subject.strip(), [])
        stay, place = [], None
        for other in known:
            again = other.fact == edit.fact
            if again or _contradicts(other, edit):
                place = len(stay) if place is None else place
                edit = with_rewordings_of(edit, other) if again else edit
            else:
                stay.append(other)
        stay.insert(len(stay) if place is None else place, edit)
        known[:] = stay
    return [edit for known in facts.values() for edit in known]


def _contradicts(one: Edit, other: Edit) -> bool:
    return one.target.strip() != other.target.strip() and not set(one.texts).isdisjoint(other.texts)


def with_earlier(earlier: Sequence[Edit], edits: Sequence[Edit]) -> list[Edit]:
    """The edits of each subject in order, after its earlier ones; of two targets for one prompt the later counts."""
    facts: dict[str, list[Edit]] = {edit.subject.strip(): [] for edit in edits}
    for edit in latest(edit for edit in (*earlier, *edits) if edit.subject.strip() in facts):
        facts[edit.subject.strip()].append(edit)
    return [edit for group in facts.values() for edit in group]


def latest_columns(deltas: Sequence[Delta], without: Collection[str] = ()) -> list[tuple[int, ...]]:
    """Of each delta the columns of those subjects that no later one has and that are not in `without`."""
    last = {subject: i for i, delta in enumerate(deltas) for subject in delta.subjects}
    return [
        tuple(c for c, s in enumerate(delta.columns) if last[delta.subjects[s]] == i and delta.subjects[s] not in without)
        for i, delta in enumerate(deltas)
    ]


class Memory:
    """The protected keys of the deltas in the weights, by weight: appended to while edits come, built anew where one has left.

    part: of a key's rows [d_in, n] those that this rank has.
    """

    def __init__(self, part: Callable[[Tensor], Tensor] = lambda keys: keys):
        self._part = part
        self._held: dict[str, tuple[list[tuple], Preconditioner]] = {}

    def joined(self, name: str, start: Preconditioner, deltas: Sequence[Delta], without: Collection[str] | None = None) -> Preconditioner:
        """`start` with the keys that the deltas wrote to the weight `name`: all, or where `without` is given those that still hold.

        Those are a subject's columns of the last delta that has it, and no columns of a subject in `without`. The same deltas give
        the same bits, whatever was asked before.
        """
        every = [tuple(range(len(delta.columns))) for delta in deltas] if without is None else latest_columns(deltas, without)
        parts = [
            (delta.id, columns, delta.keys[name]) for delta, columns in zip(deltas, every, strict=True) if name in delta.keys and columns
        ]
        asked = [(start.base, start.ridge, start.keys.device, *part[:2]) for part in parts]
        had, held = self._held.get(name, ([], start))
        if asked[: len(had)] != had:
            had, held = [], start
        for _, columns, keys in parts[len(had) :]:
            held = held.joined(self._part(_chosen(keys, columns)).to(start.keys.device))
        if parts:
            self._held[name] = asked, held
        return held if parts else start


def _chosen(keys: Tensor, columns: tuple[int, ...]) -> Tensor:
    return keys if len(columns) == keys.shape[1] else keys[:, list(columns)]
