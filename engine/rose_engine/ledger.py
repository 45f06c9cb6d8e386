"""Ledger: the edits of one model as a directory of commits that only grows, and survives being killed at any moment.

    000001.json          a commit: its number, what it did (apply a delta, revert an earlier commit, check out the state after one), the
                         SHA-256 of its delta's file and of the commit before it, and what a stream wants to find again
    000001.safetensors   its delta, as `Delta.save` writes it; only an apply has one
    HEAD                 number and SHA-256 of the last commit, so that a lost tail is noticed
    LOCK                 held by the one writer, whom it names; the system gives it back when that process ends, however it ends

A commit is there from the moment its JSON takes its name; the delta is on disk by then, and HEAD follows. A process that is killed in
between leaves a delta that no commit names, which the next commit replaces, a temporary file, or a HEAD that is one commit behind; the
next writer puts these right before it writes. Readers take no lock.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from rose_engine.compress import combined
from rose_engine.delta import Delta
from rose_engine.files import Busy, locked, replacing

FORMAT = 1
HEAD, LOCK = "HEAD", "LOCK"


class LedgerError(ValueError):
    """A ledger that cannot be used as it stands, or is in use; the message names the commit or the holder."""


@dataclass(frozen=True)
class Commit:
    """One entry. number: from 1. parent, delta: SHA-256 of the commit file before it (None for the first) and of the delta's file (of an
    apply). refers_to: the commit that a revert takes back, or whose state a checkout takes up again (0: no edit). edits: how many an
    apply wrote or a revert took back. note: JSON values of whoever made it."""

    number: int
    kind: Literal["apply", "revert", "checkout"]
    parent: str | None
    delta: str | None
    refers_to: int | None
    edits: int
    created: str
    note: Mapping[str, Any] = field(default_factory=dict)
    format: int = FORMAT


def commit_file(path: Path, number: int) -> Path:
    """Where a commit stands."""
    return path / f"{number:06d}.json"


def delta_file(path: Path, number: int) -> Path:
    """Where a commit's delta stands."""
    return path / f"{number:06d}.safetensors"


def _regular(path: Path) -> bytes:
    """The bytes of a file of the ledger; LedgerError where it is missing or not a plain file, such as a link out of the directory."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError as e:
        raise LedgerError(f"{path}: is missing") from e
    except OSError as e:
        raise LedgerError(f"{path}: cannot be read as a plain file: {e.strerror}") from e
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise LedgerError(f"{path}: is not a plain file")
    with open(descriptor, "rb") as f:
        return f.read()


def _read(path: Path, number: int) -> tuple[Commit, str]:
    """A commit and the SHA-256 of its file."""
    file = commit_file(path, number)
    data = _regular(file)
    try:
        commit = Commit(**json.loads(data))
    except (TypeError, ValueError, RecursionError) as e:
        raise LedgerError(f"{file}: is not a commit: {e}") from e
    applies = commit.kind == "apply"
    whole = (
        (applies or commit.kind in ("revert", "checkout"))
        and (commit.number, commit.format) == (number, FORMAT)
        and isinstance(commit.delta, str) == applies
        and isinstance(commit.refers_to, int) != applies
        and isinstance(commit.edits, int)
        and isinstance(commit.note, dict)
        and isinstance(commit.note.get("streams", {}), dict)
        and all(_is_place(place) for place in commit.note.get("streams", {}).values())
    )
    if not whole:
        raise LedgerError(f"{file}: is not commit {number} of ledger format {FORMAT}")
    return commit, hashlib.sha256(data).hexdigest()


def _is_place(place: Any) -> bool:
    """Whether a note says how far a stream has come."""
    return isinstance(place, dict) and type(place.get("lines")) is int and place["lines"] >= 0 and isinstance(place.get("sha256"), str)


def log(path: str | Path) -> list[Commit]:
    """Every commit, the first one first; none of an empty or missing directory.

    The chain is checked: LedgerError where a commit is missing, does not follow from the one before it, or HEAD names another.
    """
    path = Path(path)
    commits, _ = _chain(path)
    head = _head(path)
    if head and head[0] > len(commits):  # a commit may have come since the files were listed
        commits, _ = _chain(path)
    last = head[0] if head else 0
    if last > len(commits):
        raise LedgerError(f"{commit_file(path, len(commits) + 1)}: is missing; {HEAD} is at commit {last}")
    if head and head[1] != _read(path, last)[1]:
        raise LedgerError(f"{commit_file(path, last)}: is not the commit that {HEAD} names")
    if last < len(commits) - 1 and (_head(path) or (0,))[0] < len(commits) - 1:
        raise LedgerError(f"{path / HEAD}: is at commit {last}, but there are {len(commits)} commits")
    return commits


def _chain(path: Path) -> tuple[list[Commit], str | None]:
    """The commits as they follow from each other, and the SHA-256 of the last one's file."""
    commits: list[Commit] = []
    before: str | None = None
    held: dict[int, None] = {}
    while commit_file(path, len(commits) + 1).exists() or commit_file(path, len(commits) + 1).is_symlink():
        commit, digest = _read(path, len(commits) + 1)
        if commit.parent != before:
            raise LedgerError(f"{commit_file(path, commit.number)}: does not follow commit {len(commits)}; one of the two was exchanged")
        if commit.kind == "revert" and commit.refers_to not in held:
            raise LedgerError(f"{commit_file(path, commit.number)}: takes back commit {commit.refers_to}, which is not in the weights")
        if commit.kind == "checkout" and not 0 <= commit.refers_to < commit.number:
            raise LedgerError(f"{commit_file(path, commit.number)}: goes back to commit {commit.refers_to}, which is not before it")
        commits.append(commit)
        before = digest
        if commit.kind == "checkout":
            held = dict.fromkeys(standing(commits))
        else:
            _do(commit, held)
    return commits, before


def _head(path: Path) -> tuple[int, str] | None:
    if not (path / HEAD).exists():
        return None
    number, _, digest = _regular(path / HEAD).decode("ascii", "replace").strip().partition(" ")
    if not re.fullmatch(r"[0-9]{1,18}", number) or len(digest) != 64:
        raise LedgerError(f"{path / HEAD}: does not name a commit")
    return int(number), digest


def lineage(commits: Sequence[Commit]) -> list[Commit]:
    """The applies and reverts that led to the state after the last of these, in order, without what a checkout went back behind."""
    found, number = [], len(commits)
    while number:
        commit = commits[number - 1]
        if commit.kind == "checkout":
            number = commit.refers_to
        else:
            found.append(commit)
            number -= 1
    return found[::-1]


def standing(commits: Sequence[Commit]) -> list[int]:
    """The numbers of the commits whose deltas are in the weights after the last of these, in order."""
    held: dict[int, None] = {}
    for commit in lineage(commits):
        _do(commit, held)
    return list(held)


def _do(commit: Commit, held: dict[int, None]) -> None:
    """Bring the numbers of what is in the weights, in order, behind an apply or a revert."""
    if commit.kind == "apply":
        held[commit.number] = None
    else:
        del held[commit.refers_to]


def active(path: str | Path, at: int | None = None) -> list[int]:
    """The numbers of the commits whose deltas are in the weights, in order: after the last commit, or after commit `at` (0: none)."""
    return standing(_until(path, at))


def _until(path: str | Path, at: int | None) -> list[Commit]:
    commits = log(path)
    if at is not None:
        _check_number(path, at, commits)
    return commits if at is None else commits[:at]


def _check_number(path: str | Path, number: int, commits: list[Commit], first: int = 0) -> None:
    if not first <= number <= len(commits):
        raise LedgerError(f"{path}: has no commit {number}; the last is {len(commits)}")


def commit_of(path: str | Path, number: int) -> Commit:
    """One commit, from 1, of a chain that was checked. LedgerError where there is none of that number."""
    commits = log(path)
    _check_number(path, number, commits, first=1)
    return commits[number - 1]


def delta_of(path: str | Path, commit: Commit) -> Delta:
    """A commit's delta. LedgerError where its file is not the one that was committed, DeltaError where it is not a delta."""
    file = delta_file(Path(path), commit.number)
    if commit.delta is None:
        raise LedgerError(f"commit {commit.number} is a {commit.kind} and has no delta of its own")
    if hashlib.sha256(_regular(file)).hexdigest() != commit.delta:
        raise LedgerError(f"{file}: is not the file that was committed")
    return Delta.load(file)


def deltas(path: str | Path, at: int | None = None) -> list[Delta]:
    """The deltas that make up the weights, in order, after the last commit or after commit `at`."""
    commits = _until(path, at)
    return [delta_of(path, commits[number - 1]) for number in standing(commits)]


def verify(path: str | Path) -> list[Commit]:
    """Check the chain and every delta's file; returns the commits. LedgerError or DeltaError names the first that is wrong."""
    commits = log(path)
    for commit in commits:
        if commit.delta is not None:
            delta_of(path, commit)
    return commits


def streams(commits: Sequence[Commit]) -> dict[str, Any]:
    """How far each stream has come, by its name: what the last commit noted of it. A checkout takes streams back too, a revert does not."""
    places: dict[str, Any] = {}
    for commit in lineage(commits):
        places |= commit.note.get("streams", {})
    return places


def compact(path: str | Path, out: str | Path, tolerance: float = 1e-6) -> Commit:
    """A new ledger in the directory `out` with one commit: the sum of the deltas in the weights, at the smallest rank within `tolerance`
    (relative, of each weight's change). Streams go on there; the weights differ from those of `path` by rounding and the tolerance.

    LedgerError where nothing is in the weights, or `out` is a ledger already.
    """
    commits = log(path)
    if not standing(commits):
        raise LedgerError(f"{path}: holds no edit to compact")
    delta, error = combined(deltas(path, len(commits)), tolerance)
    compacted = {"commits": len(commits), "tolerance": tolerance, "error": error}
    with writing(out) as writer:
        if log(out):
            raise LedgerError(f"{out}: is a ledger already; compact into a new directory")
        return writer.apply(delta, {"streams": streams(commits), "compacted": compacted})


@contextmanager
def writing(path: str | Path) -> Iterator[Writer]:
    """Hold the ledger for writing, making its directory if need be. LedgerError, at once, where another process holds it."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(locked(path / LOCK))
        except Busy as e:
            raise LedgerError(f"{path}: is being written by {e}; wait for it, or end it") from e
        except OSError as e:
            raise LedgerError(f"{path / LOCK}: cannot be locked as a plain file: {e.strerror}") from e
        yield Writer(path)


class Writer:
    """Appends commits to a ledger that `writing` holds."""

    def __init__(self, path: Path):
        self.path = path
        self._commits = log(path)
        self._usable = True
        self._last = _read(path, len(self._commits))[1] if self._commits else None
        for stray in path.glob(".*.tmp"):  # of a process that was killed: nobody else writes now
            if re.fullmatch(r"\.(HEAD|\d{6,}\.(json|safetensors))\.\d+\.tmp", stray.name):
                stray.unlink()
        if self._commits:
            self._write_head()

    @property
    def commits(self) -> tuple[Commit, ...]:
        """Every commit, as `log` gives them."""
        return tuple(self._commits)

    def apply(self, delta: Delta, note: Mapping[str, Any] | None = None) -> Commit:
        """Commit a delta. Where this raises there is no commit, unless the disk failed after it took its name; a new writer tells."""
        self._check_usable()
        file = delta_file(self.path, len(self._commits) + 1)
        delta.save(file)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        return self._append("apply", digest, None, len(delta.metadata.get("edits", ())), note)

    def revert(self, number: int, note: Mapping[str, Any] | None = None) -> Commit:
        """Commit that an earlier commit is taken back. LedgerError where it is not in the weights."""
        if number not in standing(self._commits):
            raise LedgerError(f"{self.path}: commit {number} is not in the weights; those that are: {standing(self._commits)}")
        return self._append("revert", None, number, self._commits[number - 1].edits, note)

    def checkout(self, number: int, note: Mapping[str, Any] | None = None) -> Commit:
        """Commit that the state after an earlier commit (0: no edit) is taken up again. LedgerError where there is none."""
        _check_number(self.path, number, self._commits)
        return self._append("checkout", None, number, 0, note)

    def _append(self, kind, delta: str | None, refers_to: int | None, edits: int, note: Mapping[str, Any] | None) -> Commit:
        self._check_usable()
        number = len(self._commits) + 1
        if number > 1 and (_head(self.path) or (0,))[0] != number - 1:
            self._write_head()  # never two behind
        created = datetime.now(UTC).isoformat(timespec="seconds")
        commit = Commit(number, kind, self._last, delta, refers_to, edits, created, dict(note or {}))
        text = json.dumps(asdict(commit), ensure_ascii=False, indent=1) + "\n"
        data = text.encode("utf-8", "surrogatepass")  # a stream's name may be a path
        self._usable = False  # until it is known that the commit stands
        with replacing(commit_file(self.path, number)) as temporary:
            temporary.write_bytes(data)
        self._usable = True
        self._commits.append(commit)
        self._last = hashlib.sha256(data).hexdigest()
        try:
            self._write_head()
        except OSError as e:  # the commit stands; the next one, or the next writer, brings HEAD along
            logging.getLogger(__name__).warning("%s could not be brought to commit %d: %s", self.path / HEAD, number, e)
        return commit

    def _check_usable(self) -> None:
        if not self._usable:
            raise LedgerError(f"{self.path}: a commit failed halfway; open the ledger again")

    def _write_head(self) -> None:
        number = len(self._commits)
        with replacing(self.path / HEAD) as temporary:
            temporary.write_text(f"{number} {self._last}\n", "ascii")
