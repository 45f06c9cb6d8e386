"""Delta: what an edit changed, as low-rank factors of each edited weight, with all that is needed to trust and repeat it.

One safetensors file: for each edited weight NAME the float32 tensors `NAME.U` [d_out, n] and `NAME.V` [n, d_in], whose product was added,
`NAME.K` [d_in, m], the keys at which it was wanted, the metadata as JSON under the header key `rose`, and under `sha256` a checksum of
all this (docs/delta-format.md). Nothing in a file is ever executed, and everything is checked before use.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rose_engine.edits import Edit, EditError, edit_from_dict
from rose_engine.files import replacing

FORMAT = 1
HEADER, CHECKSUM = "rose", "sha256"
DTYPES = (torch.float32, torch.bfloat16)


class DeltaError(ValueError):
    """A delta file that cannot be used, or a delta that does not belong to the model."""


@dataclass(frozen=True)
class Delta:
    """By the state-dict name of each edited weight its factors (U [d_out, n], V [n, d_in]) and its keys [d_in, m], float32; and metadata.

    metadata: JSON values. `base` holds, for each edited weight of the model the delta was made on, name, shape, dtype and SHA-256;
    `parent` the `state_id` of the deltas that were in the weights then, and `below` their number; `edits`, `recipe`, `report`,
    `versions` and `created` say what was done, `certificate` what it is worth where that was asked for. `subjects` and `columns` [m] say
    which subject each key is of. keys: of all weights or, where the change is all that is kept, of none.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    metadata: Mapping[str, Any]
    keys: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def subjects(self) -> list[str]:
        """The subjects that were edited."""
        return self.metadata.get("subjects", [])

    @property
    def columns(self) -> list[int]:
        """For each column of the keys, its subject's place in `subjects`."""
        return self.metadata.get("columns", [])

    @cached_property
    def id(self) -> str:
        """The SHA-256 of the factors, by which other deltas name this one."""
        digest = hashlib.sha256()
        for name, factors in sorted(self.factors.items()):
            digest.update(name.encode())
            for factor in factors:
                digest.update(tensor_bytes(factor))
        return digest.hexdigest()

    @cached_property
    def edits(self) -> tuple[Edit, ...]:
        """The edits that it holds. DeltaError where one of them is none."""
        return tuple(edit_of(record, f"delta {self.id[:8]}") for record in self.metadata["edits"])

    @property
    def nbytes(self) -> int:
        """Bytes of the factors and the keys."""
        return sum(x.nbytes for x in self._tensors().values())

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"{name}.{part}": x for name, factors in self.factors.items() for part, x in zip("UV", factors, strict=True)}
        return tensors | {f"{name}.K": x for name, x in self.keys.items()}

    def save(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write the file; it appears whole or not at all, and OSError says why.

        dtype: bfloat16 halves the file. What is read back is then another delta, rounded (docs/delta-format.md has the effect).
        """
        tensors = {name: x.to(dtype).contiguous().cpu() for name, x in self._tensors().items()}
        text = json.dumps(dict(self.metadata), ensure_ascii=False, allow_nan=False)
        with replacing(path) as temporary:
            try:
                save_file(tensors, temporary, metadata={HEADER: text, CHECKSUM: _checksum(text, tensors)})
            except SafetensorError as e:
                raise OSError(f"{path}: cannot be written: {e}") from e

    @classmethod
    def load(cls, path: str | Path) -> Delta:
        """Read and check a file. DeltaError says what is wrong with it; OSError where it cannot be read."""
        try:
            with safe_open(str(path), framework="pt") as f:
                header = f.metadata()
                metadata = _metadata(header, path)
                names = [record["name"] for record in metadata["base"]]
                parts = "UVK" if "columns" in metadata else "UV"
                if sorted(f.keys()) != sorted(f"{name}.{part}" for name in names for part in parts):
                    raise DeltaError(f"{path}: its tensors are not {', '.join(parts)} of the weights it names")
                tensors = {f"{name}.{part}": f.get_tensor(f"{name}.{part}").clone() for name in names for part in parts}
        except SafetensorError as e:
            raise DeltaError(f"{path}: is not a safetensors file: {e}") from e
        if header.get(CHECKSUM) != _checksum(header[HEADER], tensors):
            raise DeltaError(f"{path}: does not have the checksum that it names; it was damaged or changed")
        read = {name: [tensors[f"{name}.{part}"] for part in parts] for name in names}
        for record in metadata["base"]:
            _check_tensors(read[record["name"]], record, len(metadata.get("columns", ())), path)
        wide = {name: [x.float() for x in parts] for name, parts in read.items()}
        return cls({n: (U, V) for n, (U, V, *_) in wide.items()}, metadata, {n: K[0] for n, (_, _, *K) in wide.items() if K})


def edit_of(record: Any, source: Any) -> Edit:
    """An edit of a delta's metadata. DeltaError where it is none."""
    try:
        return edit_from_dict(record)
    except EditError as e:
        raise DeltaError(f"{source}: one of its edits is none: {e}") from e


def base_records(deltas: Sequence[Delta]) -> dict[str, dict[str, Any]]:
    """The record of each weight that the deltas edit. DeltaError where they do not agree on one."""
    base: dict[str, dict[str, Any]] = {}
    for record in (record for delta in deltas for record in delta.metadata["base"]):
        if base.setdefault(record["name"], record) != record:
            raise DeltaError(f"the deltas belong to different bases: they do not agree on `{record['name']}`")
    return base


def check_record(ours: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """DeltaError where a weight's record in a delta is not that of the weight at hand, `ours`."""
    if ours != record:
        what = next(key for key in ("shape", "dtype", "sha256") if ours[key] != record[key])
        raise DeltaError(f"the delta belongs to another base: {what} of `{record['name']}` is {ours[what]}, not {record[what]}")


def state_id(deltas: Sequence[Delta]) -> str | None:
    """What names a state of the weights: the SHA-256 of the ids of the deltas in them, in order; None for the base."""
    return hashlib.sha256("\n".join(delta.id for delta in deltas).encode()).hexdigest() if deltas else None


def rebased(deltas: Sequence[Delta], base: Mapping[str, Mapping[str, Any]]) -> list[Delta]:
    """Deltas, all that stood in some weights in their order, as of another base, given by its records by weight: the same model in
    another precision. What was measured there, report and certificate, is left out. DeltaError where the base lacks one of their weights or
    has it in another shape, or the first of them stood on others."""
    if deltas and deltas[0].metadata["below"]:
        raise DeltaError(f"the delta was made on top of {deltas[0].metadata['below']} other edits; give those too, before it")
    out: list[Delta] = []
    for delta in deltas:
        for record in delta.metadata["base"]:
            if record["name"] not in base or base[record["name"]]["shape"] != record["shape"]:
                raise DeltaError(f"the other base has no weight `{record['name']}` of shape {record['shape']}")
        here = {"base": [dict(base[record["name"]]) for record in delta.metadata["base"]], "parent": state_id(out), "below": len(out)}
        kept = {key: value for key, value in delta.metadata.items() if key != "certificate"}
        out.append(replace(delta, metadata={**kept, **here, "report": None}))
    return out


def _metadata(header: dict[str, str] | None, path: str | Path) -> dict[str, Any]:
    if not header or HEADER not in header:
        raise DeltaError(f"{path}: has no `{HEADER}` entry in its header; it is not a delta")
    try:
        metadata = json.loads(header[HEADER])
    except (ValueError, RecursionError) as e:
        raise DeltaError(f"{path}: its metadata is not JSON: {e}") from e
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise DeltaError(f"{path}: is not of delta format {FORMAT}")
    parent, below = metadata.get("parent"), metadata.get("below")
    if type(below) is not int or below < 0 or not isinstance(parent, str if below else type(None)):
        raise DeltaError(f"{path}: does not say which edits it stands on")
    _check_facts(metadata, path)
    base = metadata.get("base")
    keys = {"name": str, "shape": list, "dtype": str, "sha256": str}
    if not isinstance(base, list) or not base:
        raise DeltaError(f"{path}: names no weights of its base")
    for record in base:
        if not isinstance(record, dict) or set(record) != set(keys) or any(not isinstance(record[k], t) for k, t in keys.items()):
            raise DeltaError(f"{path}: its description of the base is incomplete, or says more than it should")
        if len(record["shape"]) != 2 or not all(isinstance(n, int) and n > 0 for n in record["shape"]):
            raise DeltaError(f"{path}: the shape of `{record['name']}` is not that of a matrix")
    if len({record["name"] for record in base}) != len(base):
        raise DeltaError(f"{path}: names a weight twice")
    return metadata


def _check_facts(metadata: Mapping[str, Any], path: str | Path) -> None:
    edits = metadata.get("edits")
    if not isinstance(edits, list) or not isinstance(metadata.get("recipe"), dict | None):
        raise DeltaError(f"{path}: does not say which edits it holds")
    if not isinstance(metadata.get("certificate"), dict | None):
        raise DeltaError(f"{path}: its certificate is none")
    for edit in edits:
        edit_of(edit, path)
    written = metadata.get("rewordings", {})
    if not isinstance(written, dict):
        raise DeltaError(f"{path}: its rewordings are no lists by prompt")
    for prompt, texts in written.items():
        edit_of({"subject": "x", "prompt": prompt, "target": "x", "rewordings": texts}, path)
    columns, subjects = metadata.get("columns", []), metadata.get("subjects", [])
    if not isinstance(subjects, list) or not all(isinstance(s, str) for s in subjects) or not isinstance(columns, list):
        raise DeltaError(f"{path}: does not say whose its keys are")
    if any(type(c) is not int or not 0 <= c < len(subjects) for c in columns):
        raise DeltaError(f"{path}: a key is of no subject that it names")


def _check_tensors(tensors: list[Tensor], record: Mapping[str, Any], columns: int, path: str | Path) -> None:
    name, shape, (U, V, *K) = record["name"], tuple(record["shape"]), tensors
    if any(x.dtype not in DTYPES for x in tensors):
        raise DeltaError(f"{path}: the tensors of `{name}` are {', '.join(str(x.dtype) for x in tensors)}, not float32 or bfloat16")
    if U.dim() != 2 or V.dim() != 2 or (U.shape[0], V.shape[1]) != shape or U.shape[1] != V.shape[0] or not U.shape[1]:
        raise DeltaError(f"{path}: factors {list(U.shape)} and {list(V.shape)} do not make `{name}` {list(shape)}")
    if K and K[0].shape != (shape[1], columns):
        raise DeltaError(f"{path}: keys {list(K[0].shape)} of `{name}` are not [{shape[1]}, {columns}]")
    if not all(torch.isfinite(x).all() for x in tensors):
        raise DeltaError(f"{path}: the tensors of `{name}` hold NaN or Inf")


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of the metadata's text and of every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for name, x in sorted(tensors.items()):
        digest.update(f"\n{name} {x.dtype} {list(x.shape)}\n".encode())
        digest.update(tensor_bytes(x))
    return digest.hexdigest()


def tensor_bytes(x: Tensor) -> Any:
    """The bytes of a tensor, row by row, as an array of uint8."""
    return x.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()


def fingerprint(weights: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """What identifies a base: name, shape, dtype and the SHA-256 of the bytes of each weight, in the given order."""
    return [
        {
            "name": name,
            "shape": list(weight.shape),
            "dtype": str(weight.dtype).removeprefix("torch."),
            "sha256": hashlib.sha256(tensor_bytes(weight)).hexdigest(),
        }
        for name, weight in weights.items()
    ]
