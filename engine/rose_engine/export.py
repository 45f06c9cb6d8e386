"""Ship an edit: as a whole Hugging Face checkpoint, as a PEFT LoRA adapter, or as the edited tensors alone.

A checkpoint is made from a base folder without a model in memory: shards that hold edited tensors are copied and the tensors' bytes
replaced, every other file is copied, by the file system itself where that can. All outputs appear whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rose_engine.branch import is_quantised, state_digest
from rose_engine.compress import compress_all, joined
from rose_engine.delta import Delta, DeltaError, base_records, check_record, fingerprint, rebased, tensor_bytes
from rose_engine.files import replacing
from rose_kernels import add_low_rank_

# Ranks that adapter servers accept.
SERVED_RANKS = (8, 16, 32, 64, 128, 256, 512)
# Files of a checkpoint that hold the weights a second time, unedited; they are left out.
OTHER_WEIGHTS = ("pytorch_model*", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.onnx_data")


class ExportError(ValueError):
    """An export that cannot be made; the message says why."""


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name when the block ends well. ExportError where `path` exists and is not empty."""
    path = Path(path).resolve()  # of a link, the folder itself
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ExportError(f"{path}: exists and is not an empty folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if path.exists():
            path.rmdir()
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def edited(stored: Tensor, name: str, deltas: Sequence[Delta]) -> Tensor:
    """A base weight, as a file stores it, with the deltas written into it in their order: the editor's bits.

    DeltaError where the base is another one.
    """
    stored = stored.clone()
    weight = _checked(stored, name, deltas)
    for delta in deltas:
        if name in delta.factors:
            U, V = delta.factors[name]
            add_low_rank_([weight], [U], [V])
    return stored


def _checked(stored: Tensor, name: str, deltas: Sequence[Delta]) -> Tensor:
    """The weight [d_out, d_in] that a file stores so or, as GPT-2's do, transposed. DeltaError where it is not that of the deltas."""
    record = base_records(deltas)[name]
    if is_quantised(record):
        raise DeltaError(
            f"`{name}` was quantised when the edit was made; ship an adapter of that model, or adopt the edit on the full-precision one"
        )
    weight = _oriented(stored, record["shape"])
    (ours,) = fingerprint({name: weight})
    check_record(ours, record)
    return weight


def _oriented(stored: Tensor, shape: list[int]) -> Tensor:
    return stored.T if list(stored.shape) != shape == list(stored.shape)[::-1] else stored


def export_checkpoint(base: str | Path, deltas: Sequence[Delta], out: str | Path) -> Path:
    """A copy of the checkpoint folder `base` with the deltas in its weights. Memory: one weight twice, whatever the size of a shard.

    Only safetensors checkpoints, sharded or not; weights that the folder holds in other files or formats too are left out. A section of
    README.md and rose_edits.json say what was edited. ExportError where an edited weight is not in it, DeltaError where it is another base.
    """
    base = Path(base)
    files, places = set(_places(base).values()), _edited_places(base, deltas)
    inside = sorted(p.relative_to(base) for p in base.rglob("*") if p.is_file())
    if left := sorted(files - {relative.as_posix() for relative in inside}):
        raise ExportError(f"{base}: {left[0]} of its index was not found among its files")
    with new_folder(out) as folder:
        for relative in inside:
            again = relative.suffix == ".safetensors" or any(relative.match(pattern) for pattern in OTHER_WEIGHTS)
            if again and relative.as_posix() not in files:  # the weights once more, under other names
                continue
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            if stored := {name: place.name for name, place in places.items() if place.file == relative.as_posix()}:
                _write_shard(base / relative, folder / relative, stored, deltas)
            elif relative.as_posix() not in ("README.md", "rose_edits.json"):
                _copy(base / relative, folder / relative)
        card = (base / "README.md").read_text("utf-8", "replace").rstrip() + "\n\n" if (base / "README.md").is_file() else ""
        (folder / "README.md").write_text(card + edited_facts(deltas), "utf-8")
        (folder / "rose_edits.json").write_text(json.dumps(_said(deltas), ensure_ascii=False, indent=1) + "\n", "utf-8")
    return Path(out)


def _write_shard(file: Path, to: Path, stored: Mapping[str, str], deltas: Sequence[Delta]) -> None:
    """Copy a safetensors file and replace some tensors' bytes where they lie: shapes and dtypes, and so the header, stay. stored: by the
    edited weights' names those in the file."""
    _copy(file, to)
    with open(to, "r+b") as out:
        length = int.from_bytes(out.read(8), "little")
        header = json.loads(out.read(length))
        for name, place in stored.items():
            out.seek(8 + length + header[place]["data_offsets"][0])
            out.write(tensor_bytes(edited(_tensor(file, place), name, deltas)))
        out.flush()
        os.fsync(out.fileno())


@dataclass(frozen=True)
class Place:
    """Where a checkpoint keeps a weight: the file, relative to its folder, and the weight's name there."""

    file: str
    name: str


def _edited_places(base: Path, deltas: Sequence[Delta]) -> dict[str, Place]:
    """The edited weights by their names in the model, and where the checkpoint keeps them: under the same, or as some are published,
    GPT-2 among them, without the head's prefix."""
    if not deltas:
        raise ExportError("there are no edits to export")
    places, found = _places(base), {}
    for name in sorted({name for delta in deltas for name in delta.factors}):
        stored = next((one for one in (name, name.partition(".")[2]) if one in places), None)
        if stored is None:
            raise ExportError(f"{base}: has no weight `{name}`")
        file = places[stored]
        if not (base / file).is_file():
            raise ExportError(f"{base}: lacks {file}, in which its index says that `{stored}` is")
        with _opened(base / file) as shard:
            if stored not in shard.keys():  # noqa: SIM118 - not a mapping
                raise ExportError(f"{base}: its index says that `{stored}` is in {file}, but it is not")
        found[name] = Place(file, stored)
    return found


def check_base(base: str | Path, deltas: Sequence[Delta]) -> None:
    """ExportError or DeltaError where the deltas do not belong to the checkpoint folder `base`."""
    base, records = Path(base), base_records(deltas)
    for name, place in _edited_places(base, deltas).items():
        if not is_quantised(records[name]):
            _checked(_tensor(base / place.file, place.name), name, deltas)
        elif state_digest(_state_beside(base, place.name)) != records[name]["sha256"]:
            raise DeltaError(f"the delta belongs to another base: `{name}` was quantised otherwise")


def _state_beside(base: Path, name: str) -> dict[str, Tensor]:
    """A quantised weight of a checkpoint and what its quantiser keeps beside it, by their names within the projection."""
    before = name.removesuffix("weight")
    return {key.removeprefix(before): _tensor(base / place, key) for key, place in _places(base).items() if key.startswith(before)}


def adopted(base: str | Path, deltas: Sequence[Delta]) -> list[Delta]:
    """The deltas as of the checkpoint folder `base`, the model that they were made on in another precision (`delta.rebased`)."""
    records = {}
    for name, place in _edited_places(Path(base), deltas).items():
        shape, stored = base_records(deltas)[name]["shape"], _tensor(Path(base) / place.file, place.name)
        (records[name],) = fingerprint({name: _oriented(stored, shape)})
    return rebased(deltas, records)


def _places(base: Path) -> dict[str, str]:
    """Weight name -> the file of the checkpoint that holds it; where there is a single file too it counts, as for transformers."""
    single, index = base / "model.safetensors", base / "model.safetensors.index.json"
    if single.is_file():
        with _opened(single) as f:
            return dict.fromkeys(f.keys(), single.name)
    if not index.is_file():
        raise ExportError(f"{base}: holds no safetensors checkpoint")
    try:
        places = {name: Path(file) for name, file in json.loads(index.read_text("utf-8"))["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ExportError(f"{index}: is not the index of a checkpoint: {e!r}") from e
    if outside := next((file for file in places.values() if file.is_absolute() or ".." in file.parts), None):
        raise ExportError(f"{index}: names {outside}, which is outside of the checkpoint's folder")
    return {name: file.as_posix() for name, file in places.items()}


def _copy(file: Path, to: Path) -> None:
    """A file of its own, so that whoever changes the export leaves the base as it is; sharing blocks on file systems that can."""
    with open(file, "rb") as source, open(to, "wb") as target:
        try:
            while os.copy_file_range(source.fileno(), target.fileno(), 1 << 30):
                pass
            return
        except (OSError, AttributeError):  # another file system, or another system
            pass
    shutil.copyfile(file, to)


def _said(deltas: Sequence[Delta]) -> list[dict]:
    return [{key: delta.metadata.get(key) for key in ("edits", "recipe", "report", "versions", "created")} for delta in deltas]


def export_tensors(base: str | Path, deltas: Sequence[Delta], out: str | Path) -> Path:
    """The edited tensors alone, whole, as one safetensors file, which must not be there yet. ExportError and DeltaError as for a
    checkpoint."""
    if Path(out).exists():
        raise ExportError(f"{out}: exists")
    places = _edited_places(Path(base), deltas)
    with replacing(out) as temporary:
        save_file({name: edited(_tensor(Path(base) / p.file, p.name), name, deltas) for name, p in places.items()}, temporary)
    return Path(out)


def _tensor(file: Path, name: str) -> Tensor:
    with _opened(file) as shard:
        return shard.get_tensor(name)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file. ExportError where it is none, such as a pointer that git-lfs left in its place."""
    try:
        with safe_open(str(file), framework="pt") as shard:
            yield shard
    except SafetensorError as e:
        raise ExportError(f"{file}: is not a whole safetensors file: {e}") from e


def export_peft(deltas: Sequence[Delta], out: str | Path, *, base: str, rank: int | None = None, tolerance: float = 1e-6) -> float:
    """A LoRA adapter folder as the `peft` library loads it; returns the largest relative error of a weight's change.

    base: what the adapter names as its base model; `check_base` tells whether the deltas belong to it. rank: at most so many; None keeps
    what `tolerance` asks for. The rank is then rounded up to one that servers accept, with zeros; alpha equals it, so that nothing
    is scaled. ExportError where no such rank is large enough.
    """
    if not deltas:
        raise ExportError("there are no edits to export")
    base_records(deltas)  # one base
    factors, error = compress_all(joined(deltas), tolerance=tolerance, rank=rank)
    needed = max(U.shape[1] for U, _ in factors.values())
    served = next((r for r in SERVED_RANKS if r >= needed), None)
    if served is None:
        raise ExportError(f"rank {needed} is needed; servers accept at most {SERVED_RANKS[-1]}: give a rank or a larger tolerance")
    paths = [name.removesuffix(".weight") for name in factors]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": served,
        "lora_alpha": served,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": paths,
    }
    tensors = {}
    for path, (U, V) in zip(paths, factors.values(), strict=True):
        tensors[f"base_model.model.{path}.lora_A.weight"] = _padded(V, served, 0)
        tensors[f"base_model.model.{path}.lora_B.weight"] = _padded(U, served, 1)
    with new_folder(out) as folder:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")
        (folder / "README.md").write_text(_card(base, deltas, error), "utf-8")
    return error


def _padded(x: Tensor, rank: int, dim: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = rank - shape[dim]
    return torch.cat([x, x.new_zeros(shape)], dim).contiguous()


def _card(base: str, deltas: Sequence[Delta], error: float) -> str:
    """The adapter's page."""
    head = "\n".join(["---", f"base_model: {base}", "library_name: peft", "---", "", ""])
    return head + edited_facts(deltas) + f"\nLargest relative error of a weight's change by compression: {error:.1e}.\n"


def edited_facts(deltas: Sequence[Delta]) -> str:
    """A section of a model card that says what was edited, in which weights and with which recipe."""
    edits = [edit for delta in deltas for edit in delta.metadata["edits"]]
    facts = [f"- {_line(e['prompt'].replace('{}', e['subject'].strip()))} → {_line(e['target'])}" for e in edits]
    weights = sorted({name for delta in deltas for name in delta.factors})
    recipes = sorted({str((delta.metadata.get("recipe") or {}).get("name", "unknown")) for delta in deltas})
    return "\n".join(
        [
            "## Edited facts",
            "",
            f"{len(edits)} facts were written into the weights with ROSE (recipe: {', '.join(recipes)}):",
            "",
            *facts,
            "",
            f"Edited weights: {', '.join(f'`{name}`' for name in weights)}.",
            "",
        ]
    )


def _line(text: str) -> str:
    return " ".join(text.split())
