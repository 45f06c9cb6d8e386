"""Edits: what a fact is, how edits are read from JSONL, JSON and CSV, and how they are grouped by subject.

Everything that can be said about an edit without a model is checked here, and errors name the file and the line. What needs
the tokenizer (can the subject be located, is the target empty) is checked by `forms`, which repeats the same place.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TextIO

SLOT = "{}"
REQUIRED = ("subject", "prompt", "target")
FORMATS = ("jsonl", "json", "csv")


class EditError(ValueError):
    """An edit that cannot be used. The message starts with where it was read, for example `edits.jsonl:3`."""

    def __init__(self, message: str, source: str | None = None):
        super().__init__(f"{source}: {message}" if source else message)


@dataclass(frozen=True)
class Edit:
    """One fact to write: `prompt` with the subject in place of `{}` is to be continued by `target`.

    question: the same fact asked as a question; it holds `{}` in the subject's place, or names it (`subject_in`). It is used while
    editing, as are rewordings: other prompts with `{}` that the target continues as well ("{} works as a" beside "The occupation of {}
    is").
    relation, id: free labels, kept in reports and deltas. source: where the edit was read, for messages.
    EditError where a field is missing, empty or of the wrong type, or where `{}` is not in the prompt or a rewording exactly once.
    """

    subject: str
    prompt: str
    target: str
    question: str | None = None
    relation: str | None = None
    id: str | None = None
    rewordings: Sequence[str] | None = ()  # kept as a tuple
    source: str | None = field(default=None, compare=False, repr=False)

    def __post_init__(self):
        for name in REQUIRED:
            value = getattr(self, name)
            if not isinstance(value, str):
                raise EditError(f"`{name}` must be a string, given {type(value).__name__}", self.source)
            if not value.strip():
                raise EditError(f"`{name}` is empty", self.source)
            _check_encodable(name, value, self.source)
        for name in ("question", "relation", "id"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise EditError(f"`{name}` must be a string or absent, given {type(value).__name__}", self.source)
            _check_encodable(name, value or "", self.source)
        _check_slot("prompt", self.prompt, self.source)
        self._check_rewordings()
        if self.question is not None:
            if not self.question.strip():
                raise EditError("`question` is empty; leave it out instead", self.source)
            if self.question.count(SLOT) > 1 or subject_in(self.question, self.subject.strip()) is None:
                raise EditError("`question` must name the subject word for word, or hold {} once in its place", self.source)

    def _check_rewordings(self) -> None:
        given = () if self.rewordings is None else self.rewordings
        if not isinstance(given, list | tuple):
            raise EditError(f"`rewordings` must be a list of strings, given {type(given).__name__}", self.source)
        said = {self.prompt.strip()}
        for i, text in enumerate(given, 1):
            name = f"rewording {i}"
            if not isinstance(text, str):
                raise EditError(f"`{name}` must be a string, given {type(text).__name__}", self.source)
            _check_encodable(name, text, self.source)
            _check_slot(name, text, self.source)
            if text.strip() in said:
                raise EditError(f"`{name}` says again what the prompt or another rewording says", self.source)
            said.add(text.strip())
        object.__setattr__(self, "rewordings", tuple(given))

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompt and its rewordings, without white space around them."""
        return tuple(text.strip() for text in (self.prompt, *self.rewordings))

    @property
    def fact(self) -> tuple[str, str, str | None]:
        """Prompt, target and question: what makes two edits of one subject the same fact, whatever their rewordings."""
        return self.prompt.strip(), self.target.strip(), self.question

    def as_dict(self) -> dict[str, Any]:
        """The fields that are set, as `read_edits` would read them: JSON values."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("source", "rewordings")}
        found = {name: value for name, value in found.items() if value is not None}
        return found | {"rewordings": list(self.rewordings)} if self.rewordings else found


def subject_in(text: str, subject: str) -> tuple[int, int] | None:
    """Where a question says its subject, as a span of characters: at `{}`, or else where the subject stands last: as words of its own if
    it does ("Go", not in "Google"), or with an ending ("iPhones"), or within a word. None where it is not said.

    Letters without case, as of Chinese, which puts nothing between words, stand as words of their own."""
    if SLOT in text and not (SLOT in subject and subject in text):
        start = text.index(SLOT)
        return start, start + len(SLOT)
    best, rank, end = None, -1, len(text)
    while rank < 2 and (start := text.rfind(subject, 0, end)) >= 0:
        after = start + len(subject)
        how = 0 if _joined(text[start - 1 : start + 1]) else 1 if _joined(text[after - 1 : after + 1]) else 2
        if how > rank:
            best, rank = (start, after), how
        end = start
    return best


def _joined(pair: str) -> bool:
    """Whether two characters belong to one word: letters that have case, and digits, or a letter and its accent."""
    return len(pair) == 2 and (bool(unicodedata.combining(pair[1])) or all(c.isdecimal() or c.lower() != c.upper() for c in pair))


def _check_slot(name: str, text: str, source: str | None) -> None:
    slots = text.count(SLOT)
    if slots != 1:
        raise EditError(f"`{name}` must hold {{}} exactly once, where the subject goes; it holds {slots}", source)


def _check_encodable(name: str, text: str, source: str | None) -> None:
    """EditError where text holds half of a surrogate pair, which JSON can write and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise EditError(f"`{name}` holds half a character at position {e.start}", source) from e


@dataclass(frozen=True)
class Subject:
    """A subject and its facts, in the order in which they were given."""

    name: str
    edits: tuple[Edit, ...]


KNOWN = tuple(f.name for f in fields(Edit) if f.name != "source")


def edit_from_dict(record: object, source: str | None = None) -> Edit:
    """One edit from a mapping. EditError for anything but a mapping with the known fields."""
    if not isinstance(record, dict):
        raise EditError(f"an edit is an object with {', '.join(REQUIRED)}; given {type(record).__name__}", source)
    unknown = [str(k) for k in record if k not in KNOWN]
    if unknown:
        raise EditError(f"unknown field `{unknown[0]}`; known are {', '.join(KNOWN)}", source)
    for name in REQUIRED:
        if record.get(name) is None:
            raise EditError(f"`{name}` is missing", source)
    return Edit(**record, source=source)


def read_edits(path: str | Path, format: str | None = None) -> list[Edit]:
    """Read edits from a file, or from standard input where `path` is `-`.

    format: jsonl, json (a list of objects) or csv (a header line with the field names; of rewordings, one a line of their cell); None
    takes it from the file's name, and JSONL for standard input. The text is UTF-8. EditError names file and line; OSError where it cannot
    be read.
    """
    name = "<stdin>" if str(path) == "-" else str(path)
    kind = format or (Path(name).suffix.lstrip(".").lower() if str(path) != "-" else "jsonl")
    if kind not in FORMATS:
        raise EditError(f"cannot tell the format of this file by its name; give one of {', '.join(FORMATS)}", name)
    try:
        text = (sys.stdin.buffer.read() if str(path) == "-" else Path(path).read_bytes()).decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise EditError(f"is not UTF-8: byte {e.start}", name) from e
    edits = list(parse_edits(io.StringIO(text, newline=""), kind, name))
    if not edits:
        raise EditError("holds no edits", name)
    check_consistent(edits)
    return edits


def parse_edits(stream: TextIO, format: str, name: str) -> Iterator[Edit]:
    """Yield the edits of an open text stream; `name` stands in the messages. Blank lines of JSONL and CSV are passed over."""
    if format == "jsonl":
        yield from (edit for number, line in enumerate(stream, 1) if (edit := parse_line(line, number, name)) is not None)
    elif format == "json":
        for line, text in _json_items(stream.read(), name):
            yield edit_from_dict(_json(text, f"{name}:{line}", line), f"{name}:{line}")
    else:
        yield from _parse_csv(stream, name)


def parse_line(line: str, number: int, name: str) -> Edit | None:
    """The edit of one line of JSONL, or None where the line is blank; `name` and its number stand in the messages."""
    source = f"{name}:{number}"
    return edit_from_dict(_json(line, source, number), source) if line.strip() else None


def _json_items(text: str, name: str) -> Iterator[tuple[int, str]]:
    """The items of a JSON list, each as (line where it begins, its text)."""
    records = _json(text, name)
    if not isinstance(records, list):
        raise EditError(f"holds {type(records).__name__}, not a list of edits; one object a line is JSONL", name)
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,]*")
    at, line, counted = text.index("[") + 1, 1, 0
    for _ in records:
        at = between.match(text, at).end()
        line, counted = line + text.count("\n", counted, at), at
        _, end = decoder.raw_decode(text, at)
        yield line, text[at:end]
        at = end


def _json(text: str, name: str, line: int | None = None) -> object:
    """Parse JSON; errors name line and column. A text whose line is known is one edit, in which no key may be said twice."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        record: dict[str, object] = {}
        for key, value in pairs:
            if key in record:
                raise EditError(f"field `{key}` is given twice", name)
            record[key] = value
        return record

    try:
        return json.loads(text, object_pairs_hook=unique if line is not None else None)
    except json.JSONDecodeError as e:
        place = name if line is not None else f"{name}:{e.lineno}"
        raise EditError(f"is not JSON: {e.msg} at column {e.colno}", place) from e
    except RecursionError as e:
        raise EditError("is nested too deeply", name) from e
    except EditError:
        raise
    except ValueError as e:  # a number of thousands of digits
        raise EditError(f"is not JSON that can be read: {e}", name) from e


def _parse_csv(stream: TextIO, name: str) -> Iterator[Edit]:
    reader = csv.reader(stream, strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        for column in header:
            if column not in KNOWN or header.count(column) > 1:
                raise EditError(f"column `{column}` is unknown or doubled; known are {', '.join(KNOWN)}", f"{name}:1")
        line = reader.line_num + 1
        for cells in reader:
            source, line = f"{name}:{line}", reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(header):
                raise EditError(f"has {len(cells)} cells, the header has {len(header)}", source)
            record: dict[str, Any] = {k: v for k, v in zip(header, cells, strict=True) if v or k in REQUIRED}
            if "rewordings" in record:
                record["rewordings"] = [text for text in re.split("[\r\n]+", record["rewordings"]) if text.strip()]
            yield edit_from_dict(record, source)
    except csv.Error as e:
        raise EditError(f"is not CSV: {e}", f"{name}:{reader.line_num}") from e


def check_consistent(edits: Iterable[Edit]) -> None:
    """EditError where a prompt or rewording of one subject is given two targets: both cannot be written."""
    seen: dict[tuple[str, str], Edit] = {}
    for edit in edits:
        for text in edit.texts:
            first = seen.setdefault((edit.subject.strip(), text), edit)
            if first.target.strip() != edit.target.strip():
                where = f" (the first at {first.source})" if first.source else ""
                raise EditError(f"two targets for subject {edit.subject!r} and prompt {text!r}{where}", edit.source)


def with_rewordings_of(edit: Edit, other: Edit) -> Edit:
    """The edit with the rewordings that another of the same fact has as well, its own first."""
    known = dict.fromkeys(text.strip() for text in edit.rewordings)
    more = [text for text in other.rewordings if text.strip() not in known]
    return replace(edit, rewordings=(*edit.rewordings, *more)) if more else edit


def group_by_subject(edits: Iterable[Edit]) -> list[Subject]:
    """Group by subject in order of first appearance; white space around texts does not count.

    A fact that is given twice with the same question counts once, with the rewordings of both.
    """
    groups: dict[str, dict[tuple[str, str, str | None], Edit]] = {}
    for edit in edits:
        facts = groups.setdefault(edit.subject.strip(), {})
        facts[edit.fact] = with_rewordings_of(facts[edit.fact], edit) if edit.fact in facts else edit
    return [Subject(name, tuple(facts.values())) for name, facts in groups.items()]


def group_by_fact(edits: Iterable[Edit]) -> list[Subject]:
    """Every fact alone, in the order of `group_by_subject`."""
    return [Subject(subject.name, (edit,)) for subject in group_by_subject(edits) for edit in subject.edits]
