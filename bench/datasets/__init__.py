"""Data sets of facts to edit, read into `cases.Dataset`. `load` tells by its fields which one a file is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rose_engine.edits import EditError

from bench.datasets import counterfact, knowedit, s2rke, zsre
from bench.datasets.cases import Case, DataError, Dataset, grouped, json_of

# Fields of a record by which its data set is told, and who reads it.
READERS = (
    (("requested_rewrite",), counterfact.nested_case),
    (("prompt", "subject", "target_new", "locality_prompt"), counterfact.flat_case),
    (("subject", "src", "loc"), zsre.case),
    (("prompt", "subject", "target_new"), knowedit.case),
)


def load(path: str | Path, limit: int | None = None) -> Dataset:
    """Read a file of S2RKE, CounterFact (nested JSON or flat JSONL), zsRE or KnowEdit, `limit` subjects of it, from its start.

    DataError or EditError names file and record; OSError where it cannot be read.
    """
    data = json_of(path)
    if isinstance(data, dict):
        return s2rke.from_json(data, path, limit)
    reader = reader_of(data, path)
    cases: list[Case] = []
    names: set[str] = set()
    for number, record in enumerate(data, 1):
        source = f"{path}: record {number}"
        try:
            case = reader(record, source)
        except (KeyError, TypeError, AttributeError, IndexError) as e:
            raise DataError(f"{source} lacks or misuses the field {e}") from e
        except EditError:
            raise
        except DataError as e:
            raise DataError(f"{source}: {e}") from e
        if case.edit.subject not in names and limit is not None and len(names) == limit:
            continue
        names.add(case.edit.subject)
        cases.append(case)
    return Dataset(grouped(cases))


def reader_of(records: Any, path: str | Path) -> Any:
    """The reader of a file's records, told by the fields of the first."""
    if not isinstance(records, list) or not records or not isinstance(records[0], dict):
        raise DataError(f"{path}: must hold an object with `records`, or a list of records, one at least")
    for fields, reader in READERS:
        if all(name in records[0] for name in fields):
            return reader
    raise DataError(f"{path}: is of no known data set; its first record has the fields {', '.join(records[0])}")
