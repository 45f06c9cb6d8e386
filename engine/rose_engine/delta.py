"""Delta: what an edit changed, as low-rank factors of each edited weight, with all that is needed to trust and repeat it.

One safetensors file: for each edited weight NAME the float32 tensors `NAME.U` [d_out, n] and `NAME.V` [n, d_in], whose product was added,
and the metadata as JSON under the header key `rose`. Nothing in a file is ever executed, and everything is checked before use.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rose_engine.files import replacing

FORMAT = 1
HEADER = "rose"


class DeltaError(ValueError):
    """A delta file that cannot be used, or a delta that does not belong to the model."""


@dataclass(frozen=True)
class Delta:
    """Factors of each edited weight by state-dict name: (U [d_out, n], V [n, d_in]), float32, and metadata.

    metadata: JSON values. `base` holds, for each edited weight of the model the delta was made on, name, shape, dtype and SHA-256;
    `parents` the ids of the deltas that were in the weights then; `edits`, `recipe`, `report`, `versions` and `created` say what
    was done.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    metadata: Mapping[str, Any]

    @cached_property
    def id(self) -> str:
        """The SHA-256 of the factors, by which other deltas name this one."""
        digest = hashlib.sha256()
        for name, factors in sorted(self.factors.items()):
            digest.update(name.encode())
            for factor in factors:
                digest.update(_bytes(factor))
        return digest.hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of the factors."""
        return sum(U.nbytes + V.nbytes for U, V in self.factors.values())

    def save(self, path: str | Path) -> None:
        """Write the file; it appears whole or not at all."""
        tensors = {}
        for name, (U, V) in self.factors.items():
            tensors[f"{name}.U"], tensors[f"{name}.V"] = U.contiguous().cpu(), V.contiguous().cpu()
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={HEADER: json.dumps(dict(self.metadata), ensure_ascii=False, allow_nan=False)})

    @classmethod
    def load(cls, path: str | Path) -> Delta:
        """Read and check a file. DeltaError says what is wrong with it; OSError where it cannot be read."""
        try:
            with safe_open(str(path), framework="pt") as f:
                metadata = _metadata(f.metadata(), path)
                names = [record["name"] for record in metadata["base"]]
                if sorted(f.keys()) != sorted(f"{name}.{part}" for name in names for part in "UV"):
                    raise DeltaError(f"{path}: its tensors are not the factors U and V of the weights it names")
                factors = {name: (f.get_tensor(f"{name}.U"), f.get_tensor(f"{name}.V")) for name in names}
        except SafetensorError as e:
            raise DeltaError(f"{path}: is not a safetensors file: {e}") from e
        for record in metadata["base"]:
            _check_factors(*factors[record["name"]], record, path)
        return cls(factors, metadata)


def _metadata(header: dict[str, str] | None, path: str | Path) -> dict[str, Any]:
    if not header or HEADER not in header:
        raise DeltaError(f"{path}: has no `{HEADER}` entry in its header; it is not a delta")
    try:
        metadata = json.loads(header[HEADER])
    except (json.JSONDecodeError, RecursionError) as e:
        raise DeltaError(f"{path}: its metadata is not JSON: {e}") from e
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise DeltaError(f"{path}: is not of delta format {FORMAT}")
    parents = metadata.get("parents")
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise DeltaError(f"{path}: does not say which edits it stands on")
    base = metadata.get("base")
    keys = {"name": str, "shape": list, "dtype": str, "sha256": str}
    if not isinstance(base, list) or not base:
        raise DeltaError(f"{path}: names no weights of its base")
    for record in base:
        if not isinstance(record, dict) or any(not isinstance(record.get(k), t) for k, t in keys.items()):
            raise DeltaError(f"{path}: its description of the base is incomplete")
        if len(record["shape"]) != 2 or not all(isinstance(n, int) and n > 0 for n in record["shape"]):
            raise DeltaError(f"{path}: the shape of `{record['name']}` is not that of a matrix")
    if len({record["name"] for record in base}) != len(base):
        raise DeltaError(f"{path}: names a weight twice")
    return metadata


def _check_factors(U: Tensor, V: Tensor, record: Mapping[str, Any], path: str | Path) -> None:
    name, shape = record["name"], tuple(record["shape"])
    if U.dtype != torch.float32 or V.dtype != torch.float32:
        raise DeltaError(f"{path}: the factors of `{name}` are {U.dtype} and {V.dtype}, not float32")
    if U.dim() != 2 or V.dim() != 2 or (U.shape[0], V.shape[1]) != shape or U.shape[1] != V.shape[0] or not U.shape[1]:
        raise DeltaError(f"{path}: factors {list(U.shape)} and {list(V.shape)} do not make `{name}` {list(shape)}")
    if not (torch.isfinite(U).all() and torch.isfinite(V).all()):
        raise DeltaError(f"{path}: the factors of `{name}` hold NaN or Inf")


def _bytes(x: Tensor):
    """The bytes of a tensor, row by row, as an array of uint8."""
    return x.detach().contiguous().cpu().view(torch.uint8).numpy()


def fingerprint(weights: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """What identifies a base: name, shape, dtype and the SHA-256 of the bytes of each weight, in the given order."""
    return [
        {
            "name": name,
            "shape": list(weight.shape),
            "dtype": str(weight.dtype).removeprefix("torch."),
            "sha256": hashlib.sha256(_bytes(weight)).hexdigest(),
        }
        for name, weight in weights.items()
    ]
