"""Streaming: edits of any number, applied batch by batch, each batch committed to a ledger before the next one is read.

A batch is taken from the stream in its order, up to a number of suffix tokens; a fact that contradicts one of the batch begins the next. A
commit notes how many lines were consumed and their SHA-256, so that a process that was killed goes on after its last commit, with
the same lines or not at all: nothing is lost, and nothing applied twice. A line that cannot be used goes to the rejects file with
the reason, and the stream goes on.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import queue
import stat
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from rose_engine import ledger
from rose_engine.edits import Edit, EditError, check_consistent, group_by_subject, parse_line
from rose_engine.optimize import Diverged, Progress, subject_rows
from rose_engine.recipe import Recipe
from rose_engine.verify import FactReport, fact_rows

if TYPE_CHECKING:  # `Editor.stream` is this module's
    from rose_engine.certificate import Certificate
    from rose_engine.editor import Editor, Result

# Suffix tokens of the subjects that one batch takes, in the recipe's forms: about four subjects with four facts.
STREAM_TOKENS = 1024
# In the ledger's directory, unless another file is named.
REJECTS = "rejects.jsonl"


@dataclass(frozen=True)
class Step:
    """A committed batch. lines: consumed of the stream in all. failed: facts that the model does not say with the edit's own prompt; with
    `require_success` they were taken back, with `require_certificate` also those of subjects whose D exceeds R. rejected: lines that
    went to the rejects file since the stream was started."""

    commit: ledger.Commit
    result: Result
    lines: int
    failed: tuple[FactReport, ...]
    rejected: int


class Rejects:
    """The lines of a stream that could not be used, as JSONL with `stream` (its name), `line` (its number), `reason` and `text`; the file
    is opened with the first, and only ever added to, a record at a time: it may be shared with other streams.

    lines: how many a commit notes as consumed. What the file says of later ones is not said again. What was applied is for the ledger to
    tell: a last line that was read before it was whole stands here, and may have been applied since.
    """

    def __init__(self, path: Path, stream: str, lines: int):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "the rejects go to a file, and this is a folder", str(path))
        self._path, self._stream, self._lines, self._file, self._said, self.count = path, stream, lines, None, set(), 0

    def add(self, number: int, text: str, reason: str) -> None:
        """Note a line."""
        record = {"stream": self._stream, "line": number, "reason": reason, "text": text.rstrip("\r\n")}
        written, file = json.dumps(record, ensure_ascii=True).encode() + b"\n", self._open()
        if written not in self._said:
            file.write(written)
            file.flush()
        self.count += 1

    def flush(self) -> None:
        """Bring what was added to disk."""
        if self._file is not None and stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
            os.fsync(self._file.fileno())

    def _open(self) -> BinaryIO:
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
            self._file = open(os.open(self._path, flags, 0o644), "ab")  # noqa: SIM115 - closed by `close`
            if stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
                self._read()
        return self._file

    def _read(self) -> None:
        """Find out what the file says already, and end a line that a power failure has cut."""
        line = b"\n"
        with open(self._path, "rb") as before:
            for line in before:
                try:
                    record = json.loads(line)
                    if record["stream"] == self._stream and record["line"] > self._lines:
                        self._said.add(line)
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue  # not one of ours
        if not line.endswith(b"\n"):
            self._file.write(b"\n")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


@dataclass(frozen=True)
class _Line:
    number: int
    text: str
    edit: Edit


def stream(
    editor: Editor,
    path: str | Path,
    lines: Iterable[str | Edit],
    name: str = "<stream>",
    *,
    recipe: Recipe | None = None,
    rejects: str | Path | None = None,
    strict: bool = False,
    require_success: bool = False,
    require_certificate: bool = False,
    batch_tokens: int = STREAM_TOKENS,
    max_wait: float | None = None,
    progress: Progress | None = None,
) -> Iterator[Step]:
    """Apply edits, given as such or as JSONL lines, and commit them to the ledger in directory `path`, yielding after every commit.

    The editor's weights are first brought to the ledger's state, and the lines of the stream `name` that its commits note as
    consumed are passed over. rejects: the file to which lines that cannot be used are added, `rejects.jsonl` in the ledger where it is
    None; a line that is read again because no commit followed it is not added again. strict: raise EditError or Diverged at the first
    line that cannot be used, after what came before it was committed.
    max_wait: seconds that a begun batch waits for more lines, where they are read from something that may pause; None: without end.
    require_success: take back, alone, each fact that the model does not say afterwards with the edit's own prompt. require_certificate:
    take back each subject whose deviation exceeds its radius (`certificate`), and keep the certificates in the deltas. LedgerError
    where another process writes the ledger or it is damaged. Whatever is raised, the weights are as after the last commit that was made.
    """
    if max_wait is not None and not max_wait > 0:
        raise ValueError(f"max_wait must be positive, given {max_wait}")
    recipe = recipe or editor.recipe
    with ledger.writing(path) as writer:
        editor.restore(ledger.deltas(path))
        last = ledger.streams(writer.commits).get(name, {"lines": 0, "sha256": None})
        rest = _Counted(lines if max_wait is None else _with_pauses(lines, max_wait), name)
        rest.skip(last["lines"], last["sha256"])
        refused = Rejects(Path(rejects or Path(path) / REJECTS), name, last["lines"])
        try:
            for batch, consumed, sha256 in _batches(editor, rest, recipe, refused, strict, batch_tokens, max_wait):
                result, failed = _apply(editor, batch, recipe, require_success, require_certificate, strict, refused, progress)
                if result is None:
                    continue
                committed = len(writer.commits)
                try:
                    refused.flush()
                    commit = writer.apply(result.delta, {"streams": {name: {"lines": consumed, "sha256": sha256}}})
                except BaseException:
                    if not ledger.commit_file(Path(path), committed + 1).exists():
                        editor.revert(result)
                    raise
                yield Step(commit, result, consumed, failed, refused.count)
            refused.flush()
        finally:
            refused.close()


def _with_pauses(lines: Iterable[str | Edit], seconds: float) -> Iterator[str | Edit | None]:
    """The lines, and None each time that none has come for so many seconds; read ahead by a thread, a bounded number of them."""
    ahead: queue.Queue = queue.Queue(maxsize=1000)
    end, left = object(), threading.Event()

    def put(item: object) -> None:
        while not left.is_set():
            try:
                return ahead.put(item, timeout=1)
            except queue.Full:
                pass

    def read() -> None:
        try:
            for line in lines:
                put(line)
                if left.is_set():
                    return
            put(end)
        except BaseException as e:
            put(e)

    threading.Thread(target=read, daemon=True).start()
    try:
        while True:
            try:
                item = ahead.get(timeout=seconds)
            except queue.Empty:
                item = None
            if item is end:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        left.set()


class _Counted:
    """Lines with their numbers, and the SHA-256 of all that have been read, however they end; a pause (None) is passed on, not counted. An
    edit is a line."""

    def __init__(self, lines: Iterable[str | Edit | None], name: str):
        self.name, self.number, self._lines, self._digest = name, 0, iter(lines), hashlib.sha256()

    def __iter__(self) -> Iterator[tuple[int, str | None]]:
        for line in self._lines:
            text = json.dumps(line.as_dict(), ensure_ascii=False) + "\n" if isinstance(line, Edit) else line
            if text is not None:
                self.number += 1
                self._digest.update(text.rstrip("\r\n").encode("utf-8", "surrogatepass") + b"\n")
            yield self.number, text

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def skip(self, count: int, sha256: str | None) -> None:
        """Read `count` lines. LedgerError where they are not those that were consumed."""
        for number, _ in self if count else ():
            if number == count:
                break
        if self.number < count or (count and self.sha256 != sha256):
            raise ledger.LedgerError(
                f"{self.name}: its first {count} lines are not those that the ledger's commits have consumed;"
                " give the same stream again, or this one another name"
            )


def _batches(
    editor: Editor, lines: _Counted, recipe: Recipe, refused: Rejects, strict: bool, budget: int, max_wait: float | None
) -> Iterator[tuple[list[_Line], int, str]]:
    """Batches of usable lines, each with the number and the SHA-256 of the lines consumed when it ends. What was read last before a pause
    or the end, without a line end, and cannot be used may be half a line, and does not count as consumed."""
    batch: list[_Line] = []
    tokens, began, half = 0, 0.0, False
    before = now = lines.number, lines.sha256
    for number, text in lines:
        if text is not None or not half:
            before = now
        if batch and max_wait is not None and time.monotonic() - began >= max_wait:
            yield batch, *before
            batch, tokens = [], 0
        if text is None:
            continue
        try:
            edit = parse_line(text, number, lines.name)
            if edit is not None:
                (subject,) = group_by_subject([edit])
                fact_rows(editor.decoder, editor.tokenizer, [edit])
                cost = subject_rows(editor.decoder, editor.tokenizer, subject, recipe).suffix_tokens
        except EditError as e:
            if strict:
                if batch:
                    yield batch, *before
                raise
            edit = None
            refused.add(number, text, str(e))
        half = edit is None and not text.endswith(("\n", "\r"))
        if edit is not None:
            if batch and (tokens + cost > budget or _contradicts(batch, edit)):
                yield batch, *before
                batch, tokens = [], 0
            began = began if batch else time.monotonic()
            batch.append(_Line(number, text, edit))
            tokens += cost
        now = lines.number, lines.sha256
    if batch:
        yield batch, *(before if half else now)


def _contradicts(batch: list[_Line], edit: Edit) -> bool:
    try:
        check_consistent([*(line.edit for line in batch), edit])
    except EditError:
        return True
    return False


def _apply(
    editor: Editor,
    batch: list[_Line],
    recipe: Recipe,
    require_success: bool,
    require_certificate: bool,
    strict: bool,
    refused: Rejects,
    progress: Progress | None,
) -> tuple[Result | None, tuple[FactReport, ...]]:
    """Apply a batch without the subjects that diverge, and without the facts that fail what is required. None where nothing is left."""
    taken_back: list[FactReport] = []
    while batch:
        try:
            result = editor.apply([line.edit for line in batch], recipe=recipe, certify=require_certificate, progress=progress)
        except Diverged as e:
            if strict:
                raise
            names = {subject.name for i, subject in enumerate(group_by_subject(line.edit for line in batch)) if i in e.subjects}
            for line in batch:
                if line.edit.subject.strip() in names:
                    refused.add(line.number, line.text, f"could not be applied: {e}")
            batch = [line for line in batch if line.edit.subject.strip() not in names]
            continue
        facts = result.report.facts
        unsaid = {i: f"the model says {f.prompt_after.says!r} after the edit" for i, f in enumerate(facts) if f.prompt_after.success < 1}
        loose = _loose(result.certificate, facts) if require_certificate else {}
        wrong = loose | unsaid if require_success else loose
        if not wrong:
            return result, (*taken_back, *(facts[i] for i in unsaid))
        editor.revert(result)
        for i, reason in sorted(wrong.items()):
            taken_back.append(facts[i])
            refused.add(batch[i].number, batch[i].text, f"{reason}; taken back")
        batch = [line for i, line in enumerate(batch) if i not in wrong]
    return None, ()


def _loose(certificate: Certificate, facts: Sequence[FactReport]) -> dict[int, str]:
    """Of the facts whose subject's deviation exceeds its radius why they are taken back, by their place."""
    short = {
        s.subject: f"its radius {s.radius:.3g} is below its deviation {s.deviation['instructed']:.3g}"
        for s in certificate.subjects
        if not s.holds
    }
    return {i: short[fact.subject.strip()] for i, fact in enumerate(facts) if fact.subject.strip() in short}
