"""The values: one delta a subject, optimised over every relation in every form (HKI, method.md section 1).

All subjects of a call step together; each step is a forward and backward over the packed suffixes and one aggregate step. A
subject whose loss is low enough leaves. What a step computes is `forward`'s, what it does with the gradients is
`rose_kernels`'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rose_engine import captured
from rose_engine.architecture import Decoder
from rose_engine.captured import Frame, Frames
from rose_engine.edits import Subject
from rose_engine.fisher import Coordinates
from rose_engine.forms import Form, Row, forms_for, prefix_forms, regulariser_row, row_of
from rose_engine.forward import Prepared, Step, pack, prepare, suffix_step
from rose_engine.packing import inputs, split_rows
from rose_engine.recipe import Recipe
from rose_kernels import aggregate_step_
from rose_kernels.reference import segment_mean

# Suffix tokens whose activations exist at one time, and suffix tokens whose prefixes are held at one time. The first bounds the
# memory of a step, the second that of a batch; neither changes a result beyond rounding.
STEP_TOKENS = 320
BATCH_TOKENS = 640
# Steps from one look of the host at the losses to the next, by device, 1 where none is told. A look at a GPU's waits for all it has to do.
READ_EVERY = {"cuda": 8}


class Diverged(FloatingPointError):
    """The loss of some subjects was not finite. subjects: their places in the call, from 0; step: at which that was seen."""

    def __init__(self, subjects: Sequence[int], step: int):
        super().__init__(f"the loss is not finite at step {step}; a smaller lr or float32 weights may help")
        self.subjects, self.step = tuple(subjects), step


# progress(subjects done, subjects in all, step, mean loss of the batch), as often as the host looks (`READ_EVERY`)
Progress = Callable[[int, int, int, float], None]
# clock(stage): the stage, "prepare" or "optimise", has just ended
Clock = Callable[[str], None]


@dataclass(frozen=True)
class SubjectRows:
    """A subject's rows: of each relation one row a form and a rewording, and the neutral row of the regulariser."""

    relations: tuple[tuple[Row, ...], ...]
    neutral: Row

    @property
    def facts(self) -> list[Row]:
        """The rows of all relations, in order."""
        return [row for relation in self.relations for row in relation]

    @property
    def suffix_tokens(self) -> int:
        """Tokens that every step runs."""
        return sum(len(inputs(row)) - row.last for row in (*self.facts, self.neutral))


def forms_of(tokenizer: Any, recipe: Recipe) -> tuple[Form, ...]:
    """The texts in which a recipe says a fact."""
    if recipe.texts == "prefixes":
        return prefix_forms(recipe.prefixes)
    return forms_for(tokenizer, recipe.forms, paper=recipe.texts == "paper_forms")


def subject_rows(decoder: Decoder, tokenizer: Any, subject: Subject, recipe: Recipe) -> SubjectRows:
    """Every fact of a subject in every form, or after every prefix, of the recipe, and in its rewordings as they stand. EditError names an
    edit that cannot be made a row."""
    forms = forms_of(tokenizer, recipe)
    relations = []
    for edit in subject.edits:
        said = [(edit, form) for form in forms]
        for i, text in enumerate(edit.rewordings, 1):
            said.append((replace(edit, prompt=text, rewordings=()), Form(f"rewording {i}")))
        relations.append(tuple(row_of(some, form, tokenizer, decoder.max_length) for some, form in said))
    return SubjectRows(tuple(relations), regulariser_row(subject.name, tokenizer))


@dataclass(frozen=True)
class Values:
    """Optimised values of S subjects with M relations and B rows (neutral rows not counted), all float32.

    delta, v0 [S, d]: z = v0 + delta, v0 read at the subject's first row. wanted [B, d]: the unedited hidden state at every row's
    subject token, to which the subject's delta is to be added. loss [S]: the mean over relations at the last step. steps
    [S]: Adam steps taken. centroids [M, d]: the relations' gradients at the first step (eq. 11), from which the gradient
    conflict (eq. 6) is read.
    """

    delta: Tensor
    v0: Tensor
    wanted: Tensor
    loss: Tensor
    steps: Tensor
    centroids: Tensor


def batches_of(subjects: Sequence[SubjectRows], budget: int) -> list[list[SubjectRows]]:
    """Subjects in order, as many together as `budget` suffix tokens hold, one at least."""
    batches: list[list[SubjectRows]] = []
    used = budget
    for subject in subjects:
        if not batches or used + subject.suffix_tokens > budget:
            batches.append([])
            used = 0
        batches[-1].append(subject)
        used += subject.suffix_tokens
    return batches


def optimize_values(
    decoder: Decoder,
    subjects: Sequence[SubjectRows],
    recipe: Recipe,
    progress: Progress | None = None,
    clock: Clock = lambda stage: None,
    *,
    coordinates: Coordinates | None = None,
    frames: Frames | None = None,
    batch_tokens: int = BATCH_TOKENS,
    step_tokens: int = STEP_TOKENS,
) -> Values:
    """Optimise one delta for each subject, as many subjects at a time as `batch_tokens` suffix tokens hold.

    frames: where steps are captured, those of earlier calls with this decoder, to be used again.
    coordinates: in which Adam steps, delta = T u (`fisher`); None is the identity. In them weight decay and clamp are those of u, and the
    clamp is so much smaller that delta stays within its own. Diverged where a loss is not finite.
    """
    parts, done, frames = [], 0, frames or Frames()
    for members in batches_of(subjects, batch_tokens):
        report = partial(progress, done, len(subjects)) if progress else None
        try:
            parts.append(_optimize_batch(decoder, members, recipe, report, clock, coordinates, frames, step_tokens))
        except Diverged as e:
            raise Diverged([done + subject for subject in e.subjects], e.step) from None
        done += len(members)
    return Values(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Values)})


class Noise:
    """Draws that disturb each row's delta while it is optimised, so that the value stays good around itself: Gaussian directions of
    length `share` ||delta||, another for every row and step, none for the neutral rows. A subject's draws depend on the seed alone."""

    def __init__(self, share: float, rows: Sequence[int], seed: int, device: torch.device):
        self.share, self.rows = share, rows
        self.generators = [torch.Generator(device).manual_seed(seed) for _ in rows]

    def of(self, delta: Tensor) -> Tensor:
        """[rows + subjects, d]: of every fact's row in order, then zeros for the neutral ones."""
        drawn = [torch.randn(n, delta.shape[1], generator=g, device=g.device) for n, g in zip(self.rows, self.generators, strict=True)]
        length = self.share * delta.norm(dim=-1)
        return torch.cat([*(length[s] * F.normalize(u, dim=-1) for s, u in enumerate(drawn)), torch.zeros_like(delta)])


def _optimize_batch(
    decoder: Decoder,
    subjects: Sequence[SubjectRows],
    recipe: Recipe,
    progress: Callable[[int, float], None] | None,
    clock: Clock,
    coordinates: Coordinates | None,
    frames: Frames,
    step_tokens: int,
) -> Values:
    rows = [row for subject in subjects for row in subject.facts]
    facts, count = len(rows), len(subjects)
    owner = [s for s, subject in enumerate(subjects) for _ in subject.facts] + list(range(count))
    rows += [subject.neutral for subject in subjects]
    prepared = prepare(decoder, rows, recipe.last_layer)
    clock("prepare")

    on = lambda x: torch.tensor(x, device=prepared.hidden.device)  # noqa: E731
    subject = on(owner)
    relation_offset = on([0, *accumulate(len(relation) for s in subjects for relation in s.relations)])
    subject_offset = on([0, *accumulate(len(s.relations) for s in subjects)])
    wanted = prepared.hidden[prepared.last[:facts]].float()
    v0 = wanted[relation_offset[subject_offset[:-1]]]
    v0_norm = v0.norm(dim=-1)
    longest = 1.0 if coordinates is None else coordinates.longest
    u, exp_avg, exp_avg_sq = (torch.zeros_like(v0) for _ in range(3))
    delta = u
    steps = torch.zeros(count, dtype=torch.int32, device=v0.device)
    active, diverged = torch.ones(count, dtype=torch.bool, device=v0.device), torch.zeros(count, dtype=torch.bool, device=v0.device)
    row_grad = v0.new_zeros(len(rows), v0.shape[1])
    row_loss = v0.new_zeros(len(rows))

    noise = Noise(recipe.noise, [len(s.facts) for s in subjects], recipe.seed, v0.device) if recipe.noise else None
    every = READ_EVERY.get(v0.device.type, 1)
    loss, first_centroids, alive, batches = v0.new_zeros(count), None, None, []
    for step in range(recipe.steps):
        if step % every == 0 and alive != (alive := active.tolist()):  # whoever has converged leaves
            parts = split_rows(rows, [r for r, s in enumerate(owner) if alive[s]], step_tokens)
            batches = [(on(index), run) for index, run in zip(parts, _steps_of(prepared, parts, frames), strict=True)]
        given = delta[subject] if noise is None else delta[subject] + noise.of(delta)
        for index, run in batches:
            result = run(given, index)
            row_grad[index], row_loss[index] = result.grad, result.loss
        if decoder.sharding is not None:  # ranks that share weights take the same steps
            decoder.sharding.same(row_grad)
            decoder.sharding.same(row_loss)
        loss = torch.where(active, segment_mean(segment_mean(row_loss[:facts], relation_offset), subject_offset), loss)
        active &= ~(loss < recipe.stop_loss)
        diverged |= ~torch.isfinite(loss)
        if step % every == every - 1 or step == recipe.steps - 1:
            if diverged.any():
                raise Diverged(diverged.nonzero()[:, 0].tolist(), step)
            if progress is not None:
                progress(step, float(loss.mean()))
            if first_centroids is not None and not active.any():
                break
        if first_centroids is None:
            first_centroids = segment_mean(row_grad[:facts], relation_offset)
        grad = _scaled(row_grad, coordinates)
        aggregate_step_(
            grad[:facts],
            relation_offset,
            subject_offset,
            u,
            exp_avg,
            exp_avg_sq,
            steps,
            v0_norm,
            active,
            recipe.kl * grad[facts:],
            recipe.lr,
            weight_decay=recipe.weight_decay,
            clamp=recipe.clamp / longest,
        )
        delta = _scaled(u, coordinates)
    clock("optimise")
    return Values(delta, v0, wanted, loss, steps, first_centroids)


def _steps_of(prepared: Prepared, parts: Sequence[Sequence[int]], frames: Frames) -> list[Callable[[Tensor, Tensor], Step]]:
    """Of the rows of each part what takes a step, from the deltas of all rows [rows, d] and which of them these are [B]: a frame where
    frames serve, and otherwise packed suffixes."""
    if captured.serves(prepared):
        return [partial(_step_in, frame) for frame in frames.lay(prepared, parts)]
    return [partial(suffix_step, pack(prepared, index)) for index in parts]


def _step_in(frame: Frame, given: Tensor, index: Tensor) -> Step:
    torch.index_select(given, 0, index, out=frame.given[: len(index)])
    return frame.step()


def _scaled(x: Tensor, coordinates: Coordinates | None) -> Tensor:
    """x T [n, d]: what stands in one system in the other, a gradient or a value."""
    return x if coordinates is None else (x.to(coordinates.T.dtype) @ coordinates.T).float()
