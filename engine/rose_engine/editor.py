"""Editor: a model, a tokenizer, and the edits that are in it. The facade over the engine, and nothing more."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rose_engine import embedded
from rose_engine import stream as streaming
from rose_engine.adapter import Adapter
from rose_engine.architecture import check_placed, decoder_of
from rose_engine.base import Base
from rose_engine.branch import Branch, check_gradient, pass_gradients
from rose_engine.bystanders import bystander_rows
from rose_engine.captured import Frames
from rose_engine.certificate import Certificate, Observation, certificate_of, observation, subject_keys
from rose_engine.delta import FORMAT, Delta, DeltaError, rebased, state_id
from rose_engine.dtype import dtype_of
from rose_engine.edits import Edit, EditError, Subject, check_consistent, group_by_fact, group_by_subject
from rose_engine.forms import STATEMENT, chat_parts, row_of
from rose_engine.geometry import State
from rose_engine.memory import Memory, facts_in, found_in, latest, rewordings_in, with_earlier
from rose_engine.optimize import Progress, Values, optimize_values, subject_rows
from rose_engine.parallel import optimize_spread
from rose_engine.precondition import Preconditioner, preconditioner
from rose_engine.readings import Readings
from rose_engine.recipe import ROSE, Recipe, preset
from rose_engine.rewording import reworded
from rose_engine.verify import UNRELATED, Report, compare, snapshot
from rose_engine.write import all_or_nothing, write_layers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What `Editor.apply` did: the delta that was written, the verification and the certificate (None where they were not asked for),
    seconds by stage (prepare, optimise, write, verify, certify, and on ranks exchange), and the values, of each subject in order of first
    appearance."""

    delta: Delta
    report: Report | None
    certificate: Certificate | None
    seconds: dict[str, float]
    values: Values

    @property
    def steps(self) -> list[int]:
        """Adam steps of each subject."""
        return self.values.steps.tolist()

    @property
    def loss(self) -> list[float]:
        """The last mean loss of each subject."""
        return self.values.loss.tolist()


def versions() -> dict[str, str]:
    """Versions of what computes an edit."""
    found = {}
    for package in ("rose-edit", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from the source tree
            found[package] = "source tree"
    return found


class Editor:
    """Edits facts of a causal language model in place and takes them back.

    model: a loaded Hugging Face causal model of a family in `architecture.FAMILIES`; it is edited in place and stays usable as it is.
    tokenizer: its fast tokenizer. recipe: None takes the preset of the model. UnsupportedModelError where the model is not
    one the engine edits. The unedited tensors of the edited layers are kept on the host from the first edit on.
    group: ranks that each hold such a model and make the same calls; the subjects of an edit are optimised spread over them (`parallel`).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        recipe: Recipe | None = None,
        *,
        group: ProcessGroup | None = None,
    ):
        if not tokenizer.is_fast:
            raise ValueError("a fast tokenizer is needed: subjects are located by character offsets")
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.decoder = decoder_of(model)
        self.recipe = recipe or preset(model.config)
        check_placed(model)
        if self.decoder.quantiser:
            pass_gradients(model)
            check_gradient(self.decoder.projection(len(self.decoder.layers) - 1), self.decoder.head.dtype)
        self._group, sharding = group, self.decoder.sharding
        self._base = Base(self.decoder)
        self._frames = Frames()
        self._applied: list[Delta] = []
        self._memory = Memory() if sharding is None else Memory(lambda keys: sharding.part(keys, 0))
        groups = [g for g in (sharding and sharding.group, group) if g is not None]
        self._readings = Readings(self.decoder, tokenizer, self._unedited, groups)

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device = "cpu",
        recipe: Recipe | None = None,
        trust_remote_code: bool = False,
    ) -> Editor:
        """Load a model by Hugging Face id or local folder, or the embedded one by the name `smollm2`.

        dtype: float32, bfloat16 or float16; `auto` takes whichever of the first two is faster on the device, by a short
        measurement; None keeps the checkpoint's. MissingModelError, OSError, ValueError.
        """
        dtype = dtype_of(dtype, device)
        folder = str(embedded.embedded_model()) if name == embedded.NAME else name
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        quantised = getattr(AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code), "quantization_config", None)
        where = {"device_map": {"": device}} if quantised else {}  # a quantised model cannot be moved
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto", trust_remote_code=trust_remote_code, **where)
        return cls(model if quantised else model.to(device), tokenizer, recipe)

    @property
    def applied(self) -> tuple[Delta, ...]:
        """The deltas that are in the weights, in the order in which they were written."""
        return tuple(self._applied)

    def apply(
        self,
        edits: Iterable[Edit],
        *,
        recipe: Recipe | None = None,
        verify: bool = True,
        unrelated: Sequence[str] = UNRELATED,
        certify: bool = False,
        others: Sequence[str] | None = None,
        values: Values | None = None,
        progress: Progress | None = None,
    ) -> Result:
        """Write edits into the model: all of them, or none where an exception is raised.

        A recipe whose `sequential` is "joint" leaves what earlier edits wrote where it is, and optimises a subject that was edited before
        with all its facts; of two targets for one prompt the later replaces the earlier.
        verify: read the facts and the `unrelated` prompts before and after. certify: measure the edit's geometry, a few seconds a
        subject on a CPU, and keep the certificate in the delta; `others`: subjects that must not change (None: a few everyday ones).
        values: those that an earlier call found for these edits on the same weights, to be written with a recipe that differs in the
        write alone. EditError names an edit that cannot be used; Diverged names the subjects whose optimisation did; ValueError where
        the weights' system cannot be solved.
        """
        edits, recipe = list(edits), recipe or self.recipe
        if not edits:
            raise EditError("there are no edits to apply")
        self.decoder.check_last_layer(recipe.last_layer)
        if certify:
            self._need_whole("a certificate")
        check_consistent(edits)
        joint = recipe.sequential == "joint"
        before_these = facts_in(self._applied) if joint else []
        group = group_by_subject if recipe.grouping == "subject" else group_by_fact
        subjects = group(with_earlier(before_these, edits) if joint else edits)
        names = [subject.name for subject in subjects]
        clock = _Clock()
        recipe = self._complete(recipe)
        coordinates = self._readings.coordinates(recipe) if values is None else None
        known = [edit for subject in subjects for edit in subject.edits]
        told = self.reword(known, count=recipe.rewordings) if recipe.rewordings else known
        plans = [subject_rows(self.decoder, self.tokenizer, subject, recipe) for subject in group(told)]
        clock("prepare")
        before = snapshot(self.decoder, self.tokenizer, edits, unrelated) if verify else None
        clock("verify")
        rows = [row for plan in plans for row in plan.facts]
        if values is None:
            values = optimize_spread(self.decoder, plans, recipe, self._group, progress, clock, coordinates, self._frames)
        elif (len(values.delta), len(values.wanted)) != (len(subjects), len(rows)):
            raise ValueError(
                f"the values are of {len(values.delta)} subjects and {len(values.wanted)} rows, not {len(subjects)} and {len(rows)}"
            )
        owner = [s for s, plan in enumerate(plans) for _ in plan.facts]
        if certify:  # a subject that is edited again with all its facts, and against the unedited model
            seen = observation(self.tokenizer, known, others, recipe.layers, self.decoder.max_length)
            with self._unedited():
                unedited = seen.read(self.decoder)
            clock("certify")
        found = rewordings_in(self._applied)
        bystanders = bystander_rows(told, self.tokenizer, recipe.bystanders, before_these, found, self.decoder.max_length)
        with all_or_nothing(self.weights(recipe.layers).values()):
            held = partial(self._preconditioner, recipe, names)
            written = write_layers(self.decoder, rows, owner, values.wanted, values.delta, values.loss.tolist(), recipe, held, bystanders)
            clock("write")
            after = snapshot(self.decoder, self.tokenizer, edits, unrelated) if verify else None
            report = compare(edits, unrelated, before, after) if before and after else None
            clock("verify")
            metadata = {
                "format": FORMAT,
                "base": [self._base.records[name] for name in written.factors],
                "parent": state_id(self._applied),
                "below": len(self._applied),
                "edits": [edit.as_dict() for edit in edits],
                "rewordings": found_in(known, told),
                "subjects": names,
                "columns": written.columns,
                "recipe": recipe.as_dict(),
                "report": report.as_dict() if report else None,
                "versions": versions(),
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            factors = {name: (U.cpu(), V.cpu()) for name, (U, V) in written.factors.items()}
            delta = Delta(factors, metadata, {name: K.contiguous().cpu() for name, K in written.keys.items()})
            certificate = None
            if certify:
                certificate = self._certify(seen, unedited, [*self._applied, delta], _gradients(subjects, values))
                delta = replace(delta, metadata=metadata | {"certificate": certificate.as_dict()})
                clock("certify")
            self._applied.append(delta)
        log.info("applied %d edits of %d subjects in %.2f s", len(edits), len(subjects), sum(clock.seconds.values()))
        return Result(delta, report, certificate, clock.seconds, values)

    def reword(self, edits: Iterable[Edit], *, count: int = 2, without: Iterable[str] = ()) -> list[Edit]:
        """The edits with up to `count` rewordings of each prompt: their own, those that an edit in the weights has for the same prompt, or
        such as are found with the unedited model (`rewording`). `apply` does so with its recipe's number.

        without: prompts that none may say, such as those that are kept for measuring.
        """
        earlier = facts_in(self._applied)
        brought = {edit.texts[0]: edit.rewordings for edit in reversed(earlier) if edit.rewordings}
        known = rewordings_in(self._applied) | brought
        return reworded(list(edits), count, known, self._readings.rewordings, self._usable, earlier, without)

    def _usable(self, edit: Edit) -> bool:
        """Whether an edit can be given to the model as a statement."""
        try:
            row_of(replace(edit, rewordings=()), STATEMENT, self.tokenizer, self.decoder.max_length)
        except EditError:
            return False
        return True

    def load(self, delta: Delta) -> None:
        """Write a delta, as made by `apply`, into the model: the same bits. DeltaError where it belongs to another base, or was made
        on top of other edits than those that are in the weights."""
        layers = self._base.check(delta)
        if delta.metadata["parent"] != state_id(self._applied):
            below = delta.metadata["below"]
            raise DeltaError(f"the delta was made on top of {below} other edits; load those first, in their order, or `restore` them all")
        with all_or_nothing(self.weights(layers).values()):
            self._base.add(delta)
        self._applied.append(delta)

    def revert(self, edit: Result | Delta) -> None:
        """Take one edit back: base tensors are restored and the other deltas written again in their order, bit for bit.

        A later edit keeps its own change, which was made while this one was there. ValueError where it is not in the weights.
        """
        delta = edit.delta if isinstance(edit, Result) else edit
        place = next((i for i, applied in enumerate(self._applied) if applied is delta), None)
        if place is None:
            raise ValueError("this edit is not in the weights; `editor.applied` lists those that are")
        self._rewrite(self._applied[:place] + self._applied[place + 1 :])

    def diagnose(self, deltas: Sequence[Delta], *, others: Sequence[str] | None = None) -> Certificate:
        """The certificate of what the deltas hold, all together, on the base; the weights are afterwards as they were.

        others: subjects that must not change (None: a few everyday ones). DeltaError where there are none, or one belongs to another base.
        """
        if not deltas:
            raise DeltaError("there are no edits to diagnose")
        self._need_whole("a certificate")
        layers = sorted({layer for delta in deltas for layer in self._base.check(delta)})
        edits, first_step = latest(facts_in(deltas)), replace(ROSE, layers=tuple(layers), steps=1)
        seen, subjects = observation(self.tokenizer, edits, others, layers, self.decoder.max_length), group_by_subject(edits)
        with self._unedited():
            unedited = seen.read(self.decoder)
            plans = [subject_rows(self.decoder, self.tokenizer, subject, first_step) for subject in subjects]
            gradients = _gradients(subjects, optimize_values(self.decoder, plans, first_step))
            self._rewrite(list(deltas))
            return self._certify(seen, unedited, deltas, gradients)

    def _certify(self, seen: Observation, unedited: State, deltas: Sequence[Delta], gradients: dict[str, Tensor]) -> Certificate:
        """The certificate of what was seen, in weights that hold the deltas."""
        name, device = self.decoder.weight_name, unedited.hidden.device
        factors = {}
        for layer in seen.layers:
            some = [delta.factors[name(layer)] for delta in deltas if name(layer) in delta.factors]
            factors[layer] = tuple(torch.cat(parts, 1 - i).to(device) for i, parts in enumerate(zip(*some, strict=True)))
        keys = subject_keys(name(seen.layers[-1]), deltas)
        keys = {subject: key.to(device) for subject, key in keys.items()}
        return certificate_of(self.decoder, seen, unedited, seen.read(self.decoder), factors, keys, gradients)

    @contextmanager
    def preview(self, edits: Iterable[Edit], **options: Any) -> Iterator[Result]:
        """Apply edits within a `with` block only: its end takes them back, bit for bit, however the block ends.

        options: those of `apply`, whose result the block is given.
        """
        result = self.apply(edits, **options)
        try:
            yield result
        finally:
            if any(applied is result.delta for applied in self._applied):  # the block may have taken it back itself
                self.revert(result)

    def as_adapter(self, *deltas: Delta) -> Adapter:
        """Serve deltas beside the weights as they are: `with adapter:` answers with the edits, elsewhere the model answers without.

        Their changes are added to what the weights are; a low-rank branch of the edited projections costs two thin products a token.
        DeltaError where a delta belongs to another base.
        """
        self._need_whole("an adapter")
        for delta in deltas:
            self._base.check(delta)
        return Adapter({name: self.decoder.projection(layer) for name, layer in self.decoder.layer_of().items()}, deltas)

    def stream(self, path: str | Path, lines: Iterable[str | Edit], name: str = "<stream>", **options: Any) -> Iterator[streaming.Step]:
        """Apply edits or JSONL lines batch by batch, each committed to the ledger in directory `path`: `rose_engine.stream.stream`.

        ValueError where this editor is one of several ranks'.
        """
        if self._group is not None or self.decoder.sharding is not None:
            raise ValueError("a stream is one process's; on ranks, call `apply` on each and commit its delta on the one that leads")
        return streaming.stream(self, path, lines, name, **options)

    def restore(self, deltas: Sequence[Delta]) -> None:
        """Make the weights the base with these deltas, written in their order: the bits that they had when the deltas were made so.

        DeltaError where one belongs to another base; the weights are then as before.
        """
        for delta in deltas:
            self._base.check(delta)
        self._rewrite(list(deltas))

    def adopt(self, deltas: Sequence[Delta]) -> list[Delta]:
        """Deltas of the same model in another precision, such as a quantised one, as if they had been made on this base.

        They are all those that stood in the weights there, in their order. What they are worth here `verify` tells: between 4 bits and
        more much is lost (docs/how-to.md). DeltaError where this model has not their weights.
        """
        layer_of = self.decoder.layer_of()
        self._base.keep([layer_of[name] for name in sorted({name for delta in deltas for name in delta.factors} & set(layer_of))])
        return rebased(deltas, self._base.records)

    def _rewrite(self, deltas: list[Delta]) -> None:
        self._base.rewrite(deltas)
        self._applied = deltas

    def verify(self, edits: Sequence[Edit]) -> list[dict[str, Any]]:
        """Read edits in the model as it is now: for each, probability and success with its prompt and instructed."""
        now = snapshot(self.decoder, self.tokenizer, list(edits), ())
        return [{"prompt": vars(p), "instructed": vars(i)} for p, i in zip(now.prompt, now.instructed, strict=True)]

    def ask(self, question: str, *, system: str | None = None, max_new_tokens: int = 24) -> str:
        """The model's greedy answer: in its chat template where it has one, else as a plain continuation."""
        if not self.tokenizer.chat_template:
            return self.complete(question if system is None else f"{system}\n\n{question}", max_new_tokens=max_new_tokens)
        before, after = chat_parts(self.tokenizer, system)
        coded = self.tokenizer(before + question.strip() + after, add_special_tokens=False, return_tensors="pt")
        return self._continue(coded, max_new_tokens)

    def complete(self, text: str, *, max_new_tokens: int = 24) -> str:
        """The model's greedy continuation of a text."""
        return self._continue(self.tokenizer(text, return_tensors="pt"), max_new_tokens)

    @torch.no_grad()
    def _continue(self, coded: Any, max_new_tokens: int) -> str:
        ids, mask = coded["input_ids"].to(self.model.device), coded["attention_mask"].to(self.model.device)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        said = self.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad)
        return self.tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True).strip()

    def weights(self, layers: Iterable[int] | None = None) -> dict[str, Tensor | Branch]:
        """The weights [d_out, d_in] that may be edited, by state-dict name, live: of the given layers, or of all. Of a quantised model the
        branches beside them."""
        return self._base.weights(layers)

    def _need_whole(self, what: str) -> None:
        if self.decoder.sharding is not None:
            raise ValueError(f"{what} needs whole weights, and these are spread over ranks; make the edit first, then load its delta")

    def prepare(self, recipe: Recipe | None = None) -> Recipe:
        """Have what a recipe needs once, which `apply` would see to otherwise: the coordinates of values, prefixes and second moments, read
        off the unedited model.

        Returns the recipe with its prefixes. ValueError or OSError where its corpus does not serve.
        """
        recipe = self._complete(recipe or self.recipe)
        self._readings.coordinates(recipe)
        return recipe

    def _complete(self, recipe: Recipe) -> Recipe:
        """A recipe with its prefixes, of which everything but the coordinates of values has been read."""
        if recipe.preconditioner != "identity":
            self._need_whole("a second moment of the keys")
        self._base.keep(recipe.layers)
        return self._readings.complete(recipe)

    @contextmanager
    def _unedited(self) -> Iterator[None]:
        """The unedited weights within the block, afterwards those from before, bit for bit."""
        applied, weights = self._applied, self._base.weights()
        edited = [(weights[name], weights[name].clone()) for name in self._base.tensors]
        self._rewrite([])
        try:
            yield
        finally:
            self._rewrite([])  # layers that were kept within the block
            for weight, before in edited:
                weight.copy_(before)
            self._applied = applied

    def _preconditioner(self, recipe: Recipe, without: Sequence[str], name: str) -> Preconditioner:
        """That of a weight: the recipe's base with the keys of earlier edits that the recipe protects; `without`: subjects done again."""
        weight, sharding = self.weights()[name], self.decoder.sharding
        total = {} if sharding is None else {"total": sharding.total}
        start = preconditioner(weight.shape[1], recipe.ridge, self._readings.base(recipe, name), weight.device, **total)
        if recipe.sequential == "plain":
            return start
        return self._memory.joined(name, start, self._applied, without if recipe.sequential == "joint" else None)


def _gradients(subjects: Sequence[Subject], values: Values) -> dict[str, Tensor]:
    """Of each subject the centroids of its relations."""
    return dict(zip((s.name for s in subjects), values.centroids.split([len(s.edits) for s in subjects]), strict=True))


class _Clock:
    """Seconds by stage: each call adds the time since the last one to a stage."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def __call__(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now
